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

constexpr int64_t kFillRows = 64;  // positions whose products are summed in registers
constexpr int kFillTaps = 4;       // that are summed side by side

template <class S>
struct FillRow {
  const S *map, *z;  // of an image, and of a position in it
  const int32_t* taps;
};

template <class S, int kTaps, int kVectors>
QX_INLINE void grad_channels(const FillGrad& g, const FillRow<S>* rows, int64_t count, int64_t t, int64_t c, float* sums) {
  vf sum[kTaps][kVectors] = {};
  for (int64_t r = 0; r < count; ++r) {
    vf z[kVectors];
    for (int v = 0; v < kVectors; ++v) z[v] = load_some(rows[r].z + c + v * kLanes, g.channels - c - v * kLanes);
    for (int i = 0; i < kTaps; ++i) {
      if (rows[r].taps[t + i] < 0) continue;
      const S* x = rows[r].map + rows[r].taps[t + i] * g.channels + c;
      for (int v = 0; v < kVectors; ++v) sum[i][v] += load_some(x + v * kLanes, g.channels - c - v * kLanes) * z[v];
    }
  }
  for (int i = 0; i < kTaps; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      float* to = sums + i * g.channels + c + v * kLanes;
      const int64_t left = g.channels - c - v * kLanes;
      store_some(to, load_some(to, left) + sum[i][v], left);
    }
  }
}

template <class S, int kTaps>
QX_INLINE void grad_taps(const FillGrad& g, const FillRow<S>* rows, int64_t count, int64_t t, float* sums) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= g.channels; c += 2 * kLanes) grad_channels<S, kTaps, 2>(g, rows, count, t, c, sums);
  for (; c < g.channels; c += kLanes) grad_channels<S, kTaps, 1>(g, rows, count, t, c, sums);
}

// One share of one kind is one piece of work; which part does it changes nothing in its sums.
template <class S>
void fill_grad(const FillGrad* problem, int64_t part, int64_t parts) {
  const FillGrad& g = *problem;
  const int64_t items = g.shares * g.kinds, stride = g.num_taps > 0 ? g.num_taps : 1;
  FillRow<S> rows[kFillRows];
  for (int64_t item = items * part / parts; item < items * (part + 1) / parts; ++item) {
    const int64_t share = item / g.kinds, kind = item % g.kinds, begin = g.starts[kind];
    const int64_t each = g.starts[kind + 1] - begin, total = g.batch * each;
    float* sums = g.partial + item * g.num_taps * g.channels;
    for (int64_t i = 0; i < g.num_taps * g.channels; ++i) sums[i] = 0;
    const int64_t end = total * (share + 1) / g.shares;
    for (int64_t first = total * share / g.shares; first < end; first += kFillRows) {
      const int64_t count = end - first < kFillRows ? end - first : kFillRows;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t n = (first + r) / each, p = g.order[begin + (first + r) % each];
        rows[r] = {static_cast<const S*>(g.x) + n * g.rows_in * g.channels,
                   static_cast<const S*>(g.z) + (n * g.positions + p) * g.channels, g.index + p * stride};
      }
      int64_t t = 0;
      for (; t + kFillTaps <= g.num_taps; t += kFillTaps) {
        grad_taps<S, kFillTaps>(g, rows, count, t, sums + t * g.channels);
      }
      for (; t < g.num_taps; ++t) grad_taps<S, 1>(g, rows, count, t, sums + t * g.channels);
    }
  }
}

constexpr FillKernels kFill = {&fitted_fill<float>, &fitted_fill<uint16_t>, &fill_grad<float>, &fill_grad<uint16_t>};

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
