// The maximum or the sum of each channel over lists of rows: a pooling that reads its map through a
// table, and the adjoint of a fill. Included once per instruction set, after gather_gemm.h.
#pragma once

#include "gather_gemm.h"

namespace quincunx {
namespace QX_ISA {
namespace {

struct Greatest {
  static QX_INLINE vf of_none() { return -__builtin_inff() - vf{}; }
  // a NaN propagates, as in torch
  static QX_INLINE vf of(vf best, vf v) { return (v > best) | (v != v) ? v : best; }
};

struct Sum {
  // -0 + v is v, also for v = -0
  static QX_INLINE vf of_none() { return -vf{}; }
  static QX_INLINE vf of(vf sum, vf v) { return sum + v; }
};

template <class Reduce, class S>
void over_windows(const Windows* problem, int64_t part, int64_t parts) {
  const Windows& g = *problem;
  const int64_t total = g.batch * g.positions, first = total * part / parts;
  if (total == 0) return;
  int64_t p = first % g.positions;
  const S* map = static_cast<const S*>(g.x) + first / g.positions * g.rows_in * g.channels;
  S* out = static_cast<S*>(g.out) + first * g.channels;
  for (int64_t left = total * (part + 1) / parts - first; left > 0; --left, out += g.channels) {
    const int32_t begin = g.starts[p], end = g.starts[p + 1];
    for (int64_t c = 0; c < g.channels; c += kLanes) {
      vf value = Reduce::of_none();
      for (int32_t e = begin; e < end; ++e) {
        value = Reduce::of(value, load_some(map + g.index[e] * g.channels + c, g.channels - c));
      }
      store_some(out + c, value, g.channels - c);
    }
    if (++p == g.positions) {
      p = 0;
      map += g.rows_in * g.channels;
    }
  }
}

constexpr WindowKernels kMax = {&over_windows<Greatest, float>, &over_windows<Greatest, uint16_t>};
constexpr WindowKernels kSum = {&over_windows<Sum, float>, &over_windows<Sum, uint16_t>};

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
