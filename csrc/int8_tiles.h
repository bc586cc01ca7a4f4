// The gather GEMM on tiles in eight bits: uint8 maps, int8 weights, sums in 32 bits. Included once per kind of tiles, by
// a file that has chosen the target as for int8_gemm.h, whose epilogue it shares and whose vectors serve what tiles do
// not suit: depthwise convolutions, and groups of few channels.
#pragma once

#include "int8_gemm.h"
#include "tile_shifts.h"

namespace quincunx {
namespace QX_ISA {
namespace {

// Behind the packed weights are the sums of each tap's weights, [tap][groups][tiles of outputs], in 32 bits. What takes
// the zero point out is where the sums of a tile start: one row of them, read 16 times.
struct QuadTiles {
  typedef uint8_t Input;
  typedef int32_t Sum;
  typedef ByteEpilogue End;
  static constexpr int64_t kTogether = kQuad;
  static constexpr bool kZerosSuffice = true;
  // twice the products of bfloat16 in the same time, from half the bytes
  static constexpr Costs kCosts{3000000, 300000, 20};

  static QX_INLINE Input outside(const GatherGemm& g) { return static_cast<Input>(g.quantised->x.zero); }
  struct Start {
    alignas(64) int32_t sums[kPanelTiles * kTileOutputs];
    // column: the panel's first; more: the sums of taps, which have `columns` each
    QX_INLINE void find(const GatherGemm& g, const char* more, const int32_t* taps, int64_t num_taps, int64_t column,
                        int64_t columns, int64_t width) {
      const uint32_t zero = static_cast<uint32_t>(g.quantised->x.zero);
      for (int64_t at = 0; at < width * kTileOutputs; at += kLanes) {
        vu sum{};
        for (int64_t t = 0; zero && t < num_taps; ++t) {
          sum -= load_ints(more + (taps[t] * columns + column + at) * 4) * zero;
        }
        store_ints(sums + at, sum);
      }
    }
    template <int T>
    QX_INLINE void put(int64_t tile) const {
      const char* all = reinterpret_cast<const char*>(sums);
      TileUnit::load<T>(all + tile * kTileBytes, 0, Area{all, all + sizeof sums});
    }
  };
  template <int C, int A, int B>
  static QX_INLINE void dot() {
    TileUnit::dot_bytes<C, A, B>();
  }
  static QX_INLINE int64_t more(int64_t columns, int64_t taps) { return columns * taps * 4; }
  static QX_INLINE void pack_more(const Weight& w, Input* more, int64_t group, int64_t o0, int64_t columns) {
    for (int64_t t = 0; t < w.taps; ++t) {
      for (int64_t o = o0; o < o0 + kTileOutputs; ++o) {
        int32_t sum = 0;
        const int8_t* from = static_cast<const int8_t*>(w.data) + group * w.group_stride + o * w.output_stride;
        for (int64_t c = 0; o < w.outputs && c < w.channels; ++c) sum += from[channel_offset(w, c) + t * w.tap_stride];
        __builtin_memcpy(more + ((t * w.groups + group) * columns + o) * 4, &sum, 4);
      }
    }
  }

  static QX_INLINE End end(const GatherGemm& g, int64_t o0, int64_t count) { return ByteEpilogue(g, o0, count); }
  static QX_INLINE bool full(const End& e) { return e.simple(); }

  template <int TILES>
  static QX_INLINE void finish_full(const Outputs<QuadTiles>& u) {
    constexpr int kVectors = TILES * kTileOutputs / kLanes;
    finish_simply<kVectors>(u.e, [&](const auto& row) __attribute__((always_inline)) {
      for (int64_t r = 0; r < u.rows; ++r) {
        if (u.place[r] < 0) continue;
        vu sums[kVectors];
        for (int v = 0; v < kVectors; ++v) sums[v] = load_ints(u.sums + r * u.width + v * kLanes);
        row.finish(sums, u.place[r], u.residual[r]);
      }
    });
  }
  static void finish(const Outputs<QuadTiles>& u) {
    if (!u.full) {
      for (int64_t r = 0, next; r < u.rows; r = next + 1) {
        for (next = r; next < u.rows && u.place[next] >= 0;) ++next;
        if (next == r) continue;
        finish_bytes_partly(u.e, u.place + r, u.residual + r, next - r, u.width / kLanes,
                            reinterpret_cast<const char*>(u.sums + r * u.width));
      }
    } else if (u.width > kTileOutputs) {
      finish_full<2>(u);
    } else {
      finish_full<1>(u);
    }
  }

  static void mean(const GatherGemm& g, Cut cut, int64_t part) { mean_of_bytes(g, cut, part); }
};

// A tile of inputs costs its copying, which few products of it do not pay; one of outputs is 16 wide.
QX_INLINE bool suits_tiles(int64_t outputs_per_group, int64_t channels, int64_t taps, int64_t groups) {
  return channels > kQuad && 2 * outputs_per_group >= kTileOutputs &&
         !by_lanes(outputs_per_group * groups, channels, taps, groups);
}

struct TilesOrVectors {
  static constexpr ForwardKernels tiles = tile_kernels<QuadTiles>();
  static QX_INLINE const ForwardKernels& of(int64_t outputs_per_group, int64_t channels, int64_t taps, int64_t groups) {
    return suits_tiles(outputs_per_group, channels, taps, groups) ? tiles : kByteKernels;
  }
  static QX_INLINE const ForwardKernels& of(const GatherGemm& g) {
    return of(g.out_channels / g.channel_groups, g.in_channels / g.channel_groups, g.num_taps, g.channel_groups);
  }
  static int64_t packed_size(int64_t outputs, int64_t channels, int64_t taps, int64_t groups) {
    return of(outputs / groups, channels, taps, groups).packed_size(outputs, channels, taps, groups);
  }
  static void pack(const Weight* w, void* packed, int64_t part, int64_t parts) {
    of(w->outputs, w->channels, w->taps, w->groups).pack(w, packed, part, parts);
  }
  static Cut cut(const GatherGemm* g, int64_t threads) { return of(*g).cut(g, threads); }
  static void run(const GatherGemm* g, Cut cut, int64_t part) { of(*g).run(g, cut, part); }
  static constexpr ForwardKernels kernels{false, &packed_size, &pack, &cut, &run};
};

constexpr Int8Kernels kTileInt8{FewChannels<&TilesOrVectors::kernels, uint8_t, kQuad>::kernels, &max_of_bytes,
                                &pointwise_bytes, &fill_bytes};

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
