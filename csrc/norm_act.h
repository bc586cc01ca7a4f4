// Batch norm of a training step, a shortcut added and an activation: four passes over rows of channels, two forward and
// two backward. Included once per instruction set, after gather_gemm.h.
#pragma once

#include "gather_gemm.h"

namespace quincunx {
namespace QX_ISA {
namespace {

// vectors of channels that one loop over rows keeps in registers
constexpr int kNormNv = 4;

// Comparisons with a NaN are false, so that a bound of NaN bounds nothing, not even infinities.
struct NormBounds {
  vf low, high;
  QX_INLINE explicit NormBounds(int32_t activation) {
    low = (activation == kNone ? __builtin_nanf("") : 0.0f) - vf{};
    high = (activation == kRelu6 ? 6.0f : __builtin_nanf("")) - vf{};
  }
  QX_INLINE vf of(vf z) const {
    z = z < low ? low : z;
    return z > high ? high : z;
  }
  // the gradient where the activation is not constant; of a NaN it passes
  QX_INLINE vf passed(vf z, vf grad) const {
#if QX_BYTES == 64
    // in a register: GCC would make a masked load of it, which waits for the stores before it
    asm("" : "+v"(grad));
#endif
    return (z <= low) | (z >= high) ? vf{} : grad;
  }
};

// Neighbouring vectors of channels. The last one of all begins early enough to be full: what it shares with the one
// before is computed twice, to the same values. FULL: no fewer channels than lanes.
template <int NV, bool FULL>
struct Band {
  static constexpr int kVectors = NV;
  int64_t at[NV], channels;
  QX_INLINE Band(int64_t first, int64_t all) : channels(all) {
    for (int v = 0; v < NV; ++v) at[v] = FULL ? least(first + v * kLanes, all - kLanes) : first;
  }
  template <class S>
  QX_INLINE vf take(const S* row, int v) const {
    return FULL ? load(row + at[v]) : load_some(row + at[v], channels);
  }
  template <class S>
  QX_INLINE void put(S* row, int v, vf value) const {
    FULL ? store(row + at[v], value) : store_some(row + at[v], value, channels);
  }
};

// Calls body(band) for all channels.
template <class F>
QX_INLINE void over_bands(int64_t channels, const F& body) {
  if (channels < kLanes) return body(Band<1, false>(0, channels));
  const int64_t vectors = ceil_div(channels, kLanes);
  int64_t v = 0;
  for (; vectors - v >= kNormNv; v += kNormNv) body(Band<kNormNv, true>(v * kLanes, channels));
  if (vectors - v >= 2) {
    body(Band<2, true>(v * kLanes, channels));
    v += 2;
  }
  if (vectors - v == 1) body(Band<1, true>(v * kLanes, channels));
}

// Calls chunk(number, first row, last row) for a part's chunks, whose rows do not depend on the parts.
template <class F>
QX_INLINE void over_chunks(const NormAct& g, int64_t part, int64_t parts, const F& chunk) {
  const int64_t chunks = ceil_div(g.rows, g.chunk);
  for (int64_t i = chunks * part / parts; i < chunks * (part + 1) / parts; ++i) {
    chunk(i, i * g.chunk, least((i + 1) * g.chunk, g.rows));
  }
}

// Sums of row(r, v) over rows, SUMS at once, in as many independent sums as hide an addition's latency.
template <int SUMS, class B, class F>
QX_INLINE void sum_rows(const B&, int64_t first, int64_t last, const F& add, vf (&total)[SUMS][B::kVectors]) {
  constexpr int kTogether = B::kVectors >= 4 ? 1 : 4 / B::kVectors;
  vf sums[kTogether][SUMS][B::kVectors] = {};
  int64_t r = first;
  for (; r + kTogether <= last; r += kTogether) {
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) add(r + i, sums[i]);
  }
  for (; r < last; ++r) add(r, sums[0]);
#pragma GCC unroll 2
  for (int s = 0; s < SUMS; ++s) {
#pragma GCC unroll 4
    for (int v = 0; v < B::kVectors; ++v) {
      total[s][v] = sums[0][s][v];
#pragma GCC unroll 4
      for (int i = 1; i < kTogether; ++i) total[s][v] += sums[i][s][v];
    }
  }
}

// Each chunk's mean, and its sum of squares around that mean: exact also for a map far from zero.
template <class S>
void norm_sums(const NormAct* problem, int64_t part, int64_t parts) {
  const NormAct& g = *problem;
  const S* x = static_cast<const S*>(g.x);
  over_chunks(g, part, parts, [&](int64_t chunk, int64_t first, int64_t last) {
    float* means = g.partial + 2 * chunk * g.channels;
    over_bands(g.channels, [&](auto band) {
      typedef decltype(band) B;
      vf mean[1][B::kVectors], squares[1][B::kVectors];
      sum_rows<1>(band, first, last, [&](int64_t r, vf (&sums)[1][B::kVectors]) {
#pragma GCC unroll 4
        for (int v = 0; v < B::kVectors; ++v) sums[0][v] += band.take(x + r * g.channels, v);
      }, mean);
      for (int v = 0; v < B::kVectors; ++v) mean[0][v] = mean[0][v] / static_cast<float>(last - first);
      sum_rows<1>(band, first, last, [&](int64_t r, vf (&sums)[1][B::kVectors]) {
#pragma GCC unroll 4
        for (int v = 0; v < B::kVectors; ++v) {
          const vf off = band.take(x + r * g.channels, v) - mean[0][v];
          sums[0][v] += off * off;
        }
      }, squares);
      for (int v = 0; v < B::kVectors; ++v) {
        band.put(means, v, mean[0][v]);
        band.put(means + g.channels, v, squares[0][v]);
      }
    });
  });
}

template <class S, bool ADDED>
void norm_apply_of(const NormAct& g, int64_t part, int64_t parts) {
  const S* x = static_cast<const S*>(g.x);
  const S* residual = static_cast<const S*>(g.residual);
  S* out = static_cast<S*>(g.out);
  const NormBounds bounds(g.activation);
  over_chunks(g, part, parts, [&](int64_t, int64_t first, int64_t last) {
    over_bands(g.channels, [&](auto band) {
      typedef decltype(band) B;
      vf mean[B::kVectors], scale[B::kVectors], shift[B::kVectors];
      for (int v = 0; v < B::kVectors; ++v) {
        mean[v] = band.take(g.mean, v);
        scale[v] = band.take(g.scale, v);
        shift[v] = band.take(g.shift, v);
      }
      for (int64_t r = first; r < last; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < B::kVectors; ++v) {
          vf z = (band.take(x + r * g.channels, v) - mean[v]) * scale[v] + shift[v];
          if (ADDED) z += band.take(residual + r * g.channels, v);
          band.put(out + r * g.channels, v, bounds.of(z));
        }
      }
    });
  });
}

template <class S>
void norm_apply(const NormAct* g, int64_t part, int64_t parts) {
  (g->residual ? &norm_apply_of<S, true> : &norm_apply_of<S, false>)(*g, part, parts);
}

// Each chunk's sums of d and of d (x - mean), d being the gradient behind the activation. FROM_OUTPUT: what the
// activation let pass is seen in its output, and d is written, since it is the shortcut's gradient too.
template <class S, bool FROM_OUTPUT>
void norm_reduce_of(const NormAct& g, int64_t part, int64_t parts) {
  const S *x = static_cast<const S*>(g.x), *y = static_cast<const S*>(g.y), *grad = static_cast<const S*>(g.grad);
  S* joined = static_cast<S*>(g.joined);
  const NormBounds bounds(g.activation);
  over_chunks(g, part, parts, [&](int64_t chunk, int64_t first, int64_t last) {
    float* to = g.partial + 2 * chunk * g.channels;
    over_bands(g.channels, [&](auto band) {
      typedef decltype(band) B;
      vf mean[B::kVectors], scale[B::kVectors], shift[B::kVectors], total[2][B::kVectors];
      for (int v = 0; v < B::kVectors; ++v) {
        mean[v] = band.take(g.mean, v);
        scale[v] = band.take(g.scale, v);
        shift[v] = band.take(g.shift, v);
      }
      sum_rows<2>(band, first, last, [&](int64_t r, vf (&sums)[2][B::kVectors]) {
#pragma GCC unroll 4
        for (int v = 0; v < B::kVectors; ++v) {
          const int64_t row = r * g.channels;
          const vf off = band.take(x + row, v) - mean[v];
          const vf z = FROM_OUTPUT ? band.take(y + row, v) : off * scale[v] + shift[v];
          const vf d = bounds.passed(z, band.take(grad + row, v));
          if (FROM_OUTPUT) band.put(joined + row, v, d);
          sums[0][v] += d;
          sums[1][v] += d * off;
        }
      }, total);
      for (int v = 0; v < B::kVectors; ++v) {
        band.put(to, v, total[0][v]);
        band.put(to + g.channels, v, total[1][v]);
      }
    });
  });
}

template <class S>
void norm_reduce(const NormAct* g, int64_t part, int64_t parts) {
  (g->joined ? &norm_reduce_of<S, true> : &norm_reduce_of<S, false>)(*g, part, parts);
}

// out = d scale + (x - mean) slope + offset + what came by another way
template <class S, bool JOINED, bool OTHER>
void norm_return_of(const NormAct& g, int64_t part, int64_t parts) {
  const S *x = static_cast<const S*>(g.x), *other = static_cast<const S*>(g.residual);
  const S* grad = static_cast<const S*>(JOINED ? g.joined : g.grad);
  S* out = static_cast<S*>(g.out);
  const NormBounds bounds(JOINED ? static_cast<int32_t>(kNone) : g.activation);
  over_chunks(g, part, parts, [&](int64_t, int64_t first, int64_t last) {
    over_bands(g.channels, [&](auto band) {
      typedef decltype(band) B;
      vf mean[B::kVectors], scale[B::kVectors], shift[B::kVectors], slope[B::kVectors], offset[B::kVectors];
      for (int v = 0; v < B::kVectors; ++v) {
        mean[v] = band.take(g.mean, v);
        scale[v] = band.take(g.scale, v);
        shift[v] = band.take(g.shift, v);
        slope[v] = band.take(g.slope, v);
        offset[v] = band.take(g.offset, v);
      }
      for (int64_t r = first; r < last; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < B::kVectors; ++v) {
          const int64_t row = r * g.channels;
          const vf off = band.take(x + row, v) - mean[v];
          vf d = band.take(grad + row, v);
          if (!JOINED) d = bounds.passed(off * scale[v] + shift[v], d);
          vf value = d * scale[v] + (off * slope[v] + offset[v]);
          if (OTHER) value += band.take(other + row, v);
          band.put(out + row, v, value);
        }
      }
    });
  });
}

template <class S>
void norm_return(const NormAct* g, int64_t part, int64_t parts) {
  if (g->joined) return (g->residual ? &norm_return_of<S, true, true> : &norm_return_of<S, true, false>)(*g, part, parts);
  (g->residual ? &norm_return_of<S, false, true> : &norm_return_of<S, false, false>)(*g, part, parts);
}

template <class S>
constexpr NormKernels kNorm{&norm_sums<S>, &norm_apply<S>, &norm_reduce<S>, &norm_return<S>};

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
