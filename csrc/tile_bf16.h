// The gather GEMM on tiles in bfloat16, with float32 sums.
#pragma once

#include "tile_gemm.h"

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

  template <bool ADDED, bool SECOND>
  static QX_INLINE void finish_full(const Unfinished<PairTiles>& u, int64_t last) {
    const End& e = u.e;
    const Bounds bounds(e.activation);
    for (int64_t at = 0; at < u.width; at += kLanes) {
      const vf bias = e.bias ? load(e.bias + at) : vf{};
      const vf scale = SECOND ? load(e.scale + at) : vf{}, shift = SECOND ? load(e.shift + at) : vf{};
      for (int64_t r = u.done; r < last; ++r) {
        vf value = load(u.sums + r * u.width + at) + bias;
        if (ADDED && (!SECOND || e.residual)) value += load(e.residual + u.residual[r] + at);
        value = bounds.of(value);
        if (!SECOND || e.out) store(e.out + u.place[r] + at, value);
        if (SECOND) store(e.out2 + u.place[r] + at, at_least(value * scale + shift, 0.0f));
      }
    }
  }

  static QX_INLINE void finish_some(const Unfinished<PairTiles>& u, int64_t r) {
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
        store_some(e.out2 + u.place[r] + at, at_least(value, 0.0f), left);
      }
    }
  }

  static QX_INLINE void finish(const Unfinished<PairTiles>& u, int64_t last) {
    if (!u.full) {
      for (int64_t r = u.done; r < last; ++r) finish_some(u, r);
    } else if (u.e.out2) {
      finish_full<true, true>(u, last);
    } else if (u.e.residual) {
      finish_full<true, false>(u, last);
    } else {
      finish_full<false, false>(u, last);
    }
  }

  static void mean(const GatherGemm& g, Cut cut, int64_t part) { mean_of_rows<uint16_t>(g, cut, part); }
};

constexpr ForwardKernels kTileKernels = tile_kernels<PairTiles>();

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
