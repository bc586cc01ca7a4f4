// The greatest value of each channel over lists of rows: a pooling that reads its map through a table.
// Included once per instruction set, behind gather_gemm.h.
#pragma once

#include "gather_gemm.h"

namespace quincunx {
namespace QX_ISA {
namespace {

template <class S>
void window_max(const WindowMax* problem, int64_t part, int64_t parts) {
  const WindowMax& g = *problem;
  const int64_t total = g.batch * g.positions;
  for (int64_t at = total * part / parts; at < total * (part + 1) / parts; ++at) {
    const S* map = static_cast<const S*>(g.x) + at / g.positions * g.rows_in * g.channels;
    S* out = static_cast<S*>(g.out) + at * g.channels;
    const int64_t p = at % g.positions;
    for (int64_t c = 0; c < g.channels; c += kLanes) {
      vf best = -__builtin_inff() - vf{};
      for (int32_t e = g.starts[p]; e < g.starts[p + 1]; ++e) {
        const vf v = load_some(map + g.index[e] * g.channels + c, g.channels - c);
        // a NaN stays, as in torch
        best = (v > best) | (v != v) ? v : best;
      }
      store_some(out + c, best, g.channels - c);
    }
  }
}

constexpr MaxKernels kMax = {&window_max<float>, &window_max<uint16_t>};

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
