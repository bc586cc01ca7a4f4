// The gather GEMM on tiles in bfloat16, with float32 sums.
#pragma once

#include "tile_shifts.h"

namespace quincunx {
namespace QX_ISA {
namespace {

struct PairTiles {
  typedef uint16_t Input;
  typedef float Sum;
  typedef Epilogue<uint16_t> End;
  static constexpr int64_t kTogether = 2;
  static constexpr bool kZerosSuffice = false;
  // While a vector does one multiply-add, tiles do about ten.
  static constexpr Costs kCosts{1500000, 150000, 20};

  static QX_INLINE Input outside(const GatherGemm&) { return 0; }
  struct Start {
    QX_INLINE void find(const GatherGemm&, const char*, const int32_t*, int64_t, int64_t, int64_t, int64_t) {}
    template <int T>
    QX_INLINE void put(int64_t) const {
      TileUnit::zero<T>();
    }
  };
  template <int C, int A, int B>
  static QX_INLINE void dot() {
    TileUnit::dot<C, A, B>();
  }
  static QX_INLINE int64_t more(int64_t, int64_t) { return 0; }
  static QX_INLINE void pack_more(const Weight&, Input*, int64_t, int64_t, int64_t) {}

  static QX_INLINE End end(const GatherGemm& g, int64_t o0, int64_t count) { return epilogue<uint16_t>(g, o0, count); }
  static QX_INLINE bool full(const End& e) { return (!e.residual || e.added >= e.count) && e.activation <= kRelu6; }

  // NV vectors side by side: all of a row
  template <int NV, bool ADDED, bool SECOND>
  static QX_INLINE void finish_full(const Outputs<PairTiles>& u) {
    const End& e = u.e;
    const Bounds bounds(e.activation);
    vf bias[NV], scale[NV], shift[NV];
    for (int v = 0; v < NV; ++v) {
      bias[v] = e.bias ? load(e.bias + v * kLanes) : vf{};
      scale[v] = SECOND ? load(e.scale + v * kLanes) : vf{};
      shift[v] = SECOND ? load(e.shift + v * kLanes) : vf{};
    }
    for (int64_t r = 0; r < u.rows; ++r) {
      if (u.place[r] < 0) continue;
      vf value[NV];
      for (int v = 0; v < NV; ++v) {
        value[v] = load(u.sums + r * u.width + v * kLanes) + bias[v];
        if (ADDED && (!SECOND || e.residual)) value[v] += load(e.residual + u.residual[r] + v * kLanes);
        value[v] = bounds.of(value[v]);
      }
      if (!SECOND || e.out) store_all(e.out + u.place[r], value);
      if (SECOND) {
        for (int v = 0; v < NV; ++v) value[v] = at_least(value[v] * scale[v] + shift[v], e.low2);
        store_all(e.out2 + u.place[r], value);
      }
    }
  }
  template <int NV>
  static QX_INLINE void store_all(uint16_t* to, const vf (&values)[NV]) {
#ifdef QX_NARROW_TWO_BF16
    if constexpr (NV == 2) {
      typedef uint32_t Loose __attribute__((vector_size(QX_BYTES), aligned(2), may_alias));
      *reinterpret_cast<Loose*>(to) = QX_NARROW_TWO_BF16(values[0], values[1]);
      return;
    }
#endif
    for (int v = 0; v < NV; ++v) store(to + v * kLanes, values[v]);
  }

  static QX_INLINE void finish_some(const Outputs<PairTiles>& u, int64_t r) {
    const End& e = u.e;
    for (int64_t at = 0; at < e.count; at += kLanes) {
      const int64_t left = e.count - at, added = e.residual ? e.added - at : 0;
      vf value = load(u.sums + r * u.width + at);
      if (e.bias) value += load_some(e.bias + at, left);
      if (added > 0) value += load_some(e.residual + u.residual[r] + at, added);
      value = activated(value, e.activation, e.slope ? load_some(e.slope + at, left) : vf{});
      if (e.out) store_some(e.out + u.place[r] + at, value, left);
      if (e.out2) {
        value = value * load_some(e.scale + at, left) + load_some(e.shift + at, left);
        store_some(e.out2 + u.place[r] + at, at_least(value, e.low2), left);
      }
    }
  }

  template <int NV>
  static QX_INLINE void finish_full(const Outputs<PairTiles>& u) {
    if (u.e.out2) {
      finish_full<NV, true, true>(u);
    } else if (u.e.residual) {
      finish_full<NV, true, false>(u);
    } else {
      finish_full<NV, false, false>(u);
    }
  }
  static QX_INLINE void finish(const Outputs<PairTiles>& u) {
    constexpr int kOfTile = kTileOutputs / kLanes;
    if (!u.full) {
      for (int64_t r = 0; r < u.rows; ++r) {
        if (u.place[r] >= 0) finish_some(u, r);
      }
    } else if (u.width > kTileOutputs) {
      finish_full<2 * kOfTile>(u);
    } else {
      finish_full<kOfTile>(u);
    }
  }

  static void mean(const GatherGemm& g, Cut cut, int64_t part) { mean_of_rows<uint16_t>(g, cut, part); }
};

constexpr ForwardKernels kTileKernels = tile_kernels<PairTiles>();

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
