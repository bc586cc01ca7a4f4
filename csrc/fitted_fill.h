// A sampled map made whole: computed positions keep their values, each other one is a combination of a few
// computed ones, channel by channel. Included once per instruction set, behind gather_gemm.h.
#pragma once

#include "gather_gemm.h"

namespace quincunx {
namespace QX_ISA {
namespace {

constexpr int kFillVectors = 4;  // of channels that are summed side by side, so that additions overlap

template <class S, int kVectors>
QX_INLINE void fill_channels(const FittedFill& g, const S* map, const int32_t* taps, int32_t kind, const S* residual,
                             S* out, int64_t c) {
  vf sum[kVectors];
  if (kind < 0) {
    const S* row = map + taps[0] * g.channels + c;
    for (int v = 0; v < kVectors; ++v) sum[v] = load_some(row + v * kLanes, g.channels - c - v * kLanes);
  } else {
    const int64_t first = kind * g.num_taps * g.channels + c;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = g.channels - c - v * kLanes;
      sum[v] = g.bias == nullptr ? vf{} : load_some(g.bias + kind * g.channels + c + v * kLanes, left);
    }
    for (int64_t t = 0; t < g.num_taps; ++t) {
      if (taps[t] < 0) continue;
      const S* row = map + taps[t] * g.channels + c;
      const float* weight = g.weight + first + t * g.channels;
      for (int v = 0; v < kVectors; ++v) {
        const int64_t left = g.channels - c - v * kLanes;
        sum[v] += load_some(weight + v * kLanes, left) * load_some(row + v * kLanes, left);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const int64_t left = g.channels - c - v * kLanes;
    if (residual != nullptr) sum[v] += load_some(residual + c + v * kLanes, left);
    if (g.activation != kNone) sum[v] = at_least(sum[v], 0);
    if (g.activation == kRelu6) sum[v] = at_most(sum[v], 6);
    store_some(out + c + v * kLanes, sum[v], left);
  }
}

template <class S>
void fitted_fill(const FittedFill* problem, int64_t part, int64_t parts) {
  const FittedFill& g = *problem;
  const int64_t total = g.batch * g.positions, first = total * part / parts;
  if (total == 0) return;
  const int64_t stride = g.num_taps > 0 ? g.num_taps : 1;
  int64_t p = first % g.positions;
  const S* map = static_cast<const S*>(g.x) + first / g.positions * g.rows_in * g.channels;
  const S* residual = g.residual == nullptr ? nullptr : static_cast<const S*>(g.residual) + first * g.channels;
  S* out = static_cast<S*>(g.out) + first * g.channels;
  for (int64_t left = total * (part + 1) / parts - first; left > 0; --left, out += g.channels) {
    const int32_t* taps = g.index + p * stride;
    int64_t c = 0;
    for (; c + kFillVectors * kLanes <= g.channels; c += kFillVectors * kLanes) {
      fill_channels<S, kFillVectors>(g, map, taps, g.kinds[p], residual, out, c);
    }
    for (; c < g.channels; c += kLanes) fill_channels<S, 1>(g, map, taps, g.kinds[p], residual, out, c);
    if (residual != nullptr) residual += g.channels;
    if (++p == g.positions) {
      p = 0;
      map += g.rows_in * g.channels;
    }
  }
}

constexpr FillKernels kFill = {&fitted_fill<float>, &fitted_fill<uint16_t>};

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
