// Depthwise convolutions through the tables of a gather GEMM: a group of one input channel, whose outputs are lanes.
// Included once per instruction set, behind gather_gemm.h, whose kernels it puts behind its own for other groups.
// A general tile would multiply one lane of each vector by something else than padding. Here a tap is a
// multiply-add of vectors of channels: out[p, c] += x[index[p, t], c] w[t, c].
#pragma once

#include "few_channels.h"

namespace quincunx {
namespace QX_ISA {
namespace {

// Rows and vectors of channels of a tile: its sums and one tap's weights stay in registers.
constexpr int kDepthwiseRows = kMaxNv == 4 ? 6 : 4;
// products that pay for handing work to another thread
constexpr int64_t kLeastDepthwise = 40000;

// Whether a group's outputs read one channel and are too few for the lanes of a vector of their own.
QX_INLINE bool is_depthwise(int64_t outputs_per_group, int64_t channels_per_group, int64_t groups) {
  return channels_per_group == 1 && (outputs_per_group == 1 || (groups > 1 && outputs_per_group < kLanes));
}

// [taps][vectors of outputs], the last one padded
template <class S, class P, class W>
void pack_depthwise(const Weight& w, P* packed, int64_t part, int64_t parts) {
  const int64_t outputs = w.groups * w.outputs, vectors = ceil_div(outputs, kLanes);
  for (int64_t v = vectors * part / parts; v < vectors * (part + 1) / parts; ++v) {
    for (int64_t o = v * kLanes; o < (v + 1) * kLanes; ++o) {
      const W* from =
          static_cast<const W*>(w.data) + o / w.outputs * w.group_stride + o % w.outputs * w.output_stride;
      for (int64_t t = 0; t < w.taps; ++t) {
        P& to = packed[t * vectors * kLanes + o];
        if (o < outputs) convert_weight<S>(from[t * w.tap_stride], to);
        else to = 0;
      }
    }
  }
}

template <class P>
struct DepthwiseTaps {  // of a tap group, at the first channel of a tile
  const P* weight;
  const int32_t* taps;
  int64_t stride;  // of weights, between taps
  int64_t num_taps, in_channels, output, outputs_per_group;
};

// Rows [q, q + ROWS) and NV full vectors, each lane with a channel of its own.
template <class Op, class P, class S, int ROWS, int NV>
void depthwise_tile(const DepthwiseTaps<P>& d, const Epilogue<S>& e, const Rows<Op>& rows, int64_t q) {
  vf acc[ROWS][NV] = {};
  for (int64_t t = 0; t < d.num_taps; ++t) {
    const S* a[ROWS];
    int32_t all = -1;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const int32_t row = rows.index[q + r][t];
      all &= row;
      a[r] = row < 0 ? reinterpret_cast<const S*>(kZeros) : rows.x[q + r] + row * d.in_channels + d.output;
    }
    if (all < 0) continue;  // outside for every row
    const P* w = d.weight + d.taps[t] * d.stride;
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      const vf weight = load(w + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) acc[r][v] += load(a[r] + v * kLanes) * weight;
    }
  }
  if ((!e.residual || e.added >= NV * kLanes) && e.activation <= kRelu6) {
    return finish_whole<Op, S, ROWS, NV>(e, rows, q, acc);
  }
  alignas(64) float memory[ROWS * NV * kLanes];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(memory + (r * NV + v) * kLanes, acc[r][v]);
  }
  finish_partly(e, rows, q, ROWS, NV, memory);
}

// A row and one vector: the last one, or one whose neighbouring lanes share channels.
template <class Op, class P, class S>
void depthwise_vector(const DepthwiseTaps<P>& d, const Epilogue<S>& e, const Rows<Op>& rows, int64_t q) {
  const int64_t count = least(kLanes, e.count);
  int32_t channels[kLanes];
  for (int64_t i = 0; i < count; ++i) channels[i] = int32_t((d.output + i) / d.outputs_per_group);
  vf acc{};
  for (int64_t t = 0; t < d.num_taps; ++t) {
    const int32_t row = rows.index[q][t];
    if (row < 0) continue;
    const S* x = rows.x[q] + row * d.in_channels;
    S lanes[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = x[channels[i]];
    acc += load(lanes) * load(d.weight + d.taps[t] * d.stride);
  }
  alignas(64) float memory[kLanes];
  store(memory, acc);
  finish_partly(e, rows, q, 1, 1, memory);
}

template <class Op, class P, class S>
struct DepthwiseTiles {
  void (*at[kMaxNv + 1][kDepthwiseRows + 1])(const DepthwiseTaps<P>&, const Epilogue<S>&, const Rows<Op>&, int64_t);
  template <int NV, int ROWS>
  constexpr void fill() {
    at[NV][ROWS] = &depthwise_tile<Op, P, S, ROWS, NV>;
    if constexpr (ROWS > 1) {
      fill<NV, ROWS - 1>();
    } else if constexpr (NV > 1) {
      fill<NV - 1, kDepthwiseRows>();
    }
  }
  constexpr DepthwiseTiles() : at{} { fill<kMaxNv, kDepthwiseRows>(); }
};
template <class Op, class P, class S>
constexpr DepthwiseTiles<Op, P, S> kDepthwiseTiles{};

template <class Op, class P, class S>
void run_depthwise(const GatherGemm& g, Cut cut, int64_t part) {
  Rows<Op> rows;
  const int64_t vectors = ceil_div(g.out_channels, kLanes), per_group = g.out_channels / g.channel_groups;
  const int64_t full = per_group == 1 ? g.out_channels / kLanes : 0;  // vectors with a channel for each lane
  const int32_t* index = g.index;
  const int32_t* out_rows = g.rows;
  const int32_t* taps = g.taps;
  for (int64_t group = 0; group < g.num_groups; ++group) {
    const int64_t positions = g.groups[2 * group], num_taps = g.groups[2 * group + 1], total = positions * g.batch;
    const int64_t q_first = total * part / cut.positions, q_last = total * (part + 1) / cut.positions;
    // one image after the other: neighbouring positions read the same rows again
    Walk walk(g.batch, 1, positions);
    const int64_t chunks = ceil_div(q_last - q_first, kChunk);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t q0 = q_first + (q_last - q_first) * chunk / chunks;
      const int64_t count = q_first + (q_last - q_first) * (chunk + 1) / chunks - q0;
      walk.go_to(q0);
      take_rows(g, walk, count, index, num_taps, out_rows, rows);
      const int64_t tiles = ceil_div(count, kDepthwiseRows);
      for (int64_t v = 0, nv; v < vectors; v += nv) {
        nv = v < full ? least(kMaxNv, full - v) : 1;
        const int64_t o = v * kLanes;
        const DepthwiseTaps<P> d{static_cast<const P*>(g.weight) + o, taps, vectors * kLanes, num_taps,
                                 g.in_channels, o, per_group};
        const Epilogue<S> e = epilogue<S>(g, o, least(nv * kLanes, g.out_channels - o));
        if (v >= full) {
          for (int64_t q = 0; q < count; ++q) depthwise_vector<Op, P, S>(d, e, rows, q);
          continue;
        }
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t q = count * i / tiles;
          kDepthwiseTiles<Op, P, S>.at[nv][count * (i + 1) / tiles - q](d, e, rows, q);
        }
      }
    }
    index += positions * num_taps;
    out_rows += positions;
    taps += num_taps;
  }
}

// Kernels that are depthwise where the groups are, and kGeneral's otherwise. Op: how a map is read, P: packed weights.
template <const ForwardKernels* kGeneral, class Op, class P, class S>
struct Depthwise {
  static int64_t packed_size(int64_t outputs, int64_t channels, int64_t taps, int64_t groups) {
    if (!is_depthwise(outputs / groups, channels, groups)) {
      return kGeneral->packed_size(outputs, channels, taps, groups);
    }
    return ceil_div(outputs, kLanes) * kLanes * taps;
  }
  static void pack(const Weight* w, void* packed, int64_t part, int64_t parts) {
    if (!is_depthwise(w->outputs, w->channels, w->groups)) return kGeneral->pack(w, packed, part, parts);
    (w->wide ? &pack_depthwise<S, P, float> : &pack_depthwise<S, P, S>)(*w, static_cast<P*>(packed), part, parts);
  }
  static bool fits(const GatherGemm& g) {
    return g.weight != nullptr && is_depthwise(g.out_channels / g.channel_groups, g.in_channels / g.channel_groups,
                                               g.channel_groups);
  }
  static Cut cut(const GatherGemm* g, int64_t threads) {
    if (!fits(*g)) return kGeneral->cut(g, threads);
    const int64_t parts = all_work(*g) * g->out_channels / kLeastDepthwise;
    return Cut{1, most(1, least(kPartsPerThread * threads, parts))};
  }
  static void run(const GatherGemm* g, Cut cut, int64_t part) {
    if (!fits(*g)) return kGeneral->run(g, cut, part);
    // whoever cut it as something else still gets every position once
    if (part % cut.outputs == 0) run_depthwise<Op, P, S>(*g, cut, part / cut.outputs);
  }
  static constexpr ForwardKernels kernels{kGeneral->packs_bf16, &packed_size, &pack, &cut, &run};
};

template <class Op, class S>
constexpr ForwardKernels kGeneralKernels = forward_kernels<Op, S>();
template <class Op, class S>
constexpr ForwardKernels kDenseKernels = FewChannels<&kGeneralKernels<Op, S>, S, Op::kStep>::kernels;
// how vectors of a map's type are read
template <class S>
struct Plain {
  typedef S Input;
};
template <class Op, class S>
constexpr ForwardKernels all_kernels() {
  return Depthwise<&kDenseKernels<Op, S>, Plain<S>, typename Op::Packed, S>::kernels;
}

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
