// Each value by itself: scaled, shifted, another map added, activated. And maps at the border of a program, turned
// between [N, C, H, W] and rows of channels, in float32 or bfloat16. Included once per instruction set, after
// gather_gemm.h.
#pragma once

#include "gather_gemm.h"

namespace quincunx {
namespace QX_ISA {
namespace {

template <class S>
void pointwise(const Pointwise* problem, int64_t part, int64_t parts) {
  const Pointwise& g = *problem;
  for (int64_t row = g.rows * part / parts; row < g.rows * (part + 1) / parts; ++row) {
    const S* x = static_cast<const S*>(g.x) + row * g.channels;
    const S* residual = g.residual ? static_cast<const S*>(g.residual) + row * g.residual_channels : nullptr;
    S* out = static_cast<S*>(g.out) + row * g.channels;
    for (int64_t c = 0; c < g.channels; c += kLanes) {
      const int64_t left = g.channels - c;
      vf v = load_some(x + c, left);
      if (g.scale) v = v * load_some(g.scale + c, left);
      if (g.shift) v = v + load_some(g.shift + c, left);
      if (residual && c < g.residual_channels) v = v + load_some(residual + c, g.residual_channels - c);
      store_some(out + c, activated(v, g.activation, g.slope ? load_some(g.slope + c, left) : vf{}), left);
    }
  }
}

constexpr PointwiseKernels kPointwiseKernels = {&pointwise<float>, &pointwise<uint16_t>};

QX_INLINE void convert(float from, float* to) { *to = from; }
QX_INLINE void convert(uint16_t from, uint16_t* to) { *to = from; }
QX_INLINE void convert(uint16_t from, float* to) {
  const uint32_t bits = uint32_t{from} << 16;
  __builtin_memcpy(to, &bits, 4);
}
// to the nearest, ties to even; a NaN stays one
QX_INLINE void convert(float from, uint16_t* to) {
  uint32_t bits;
  __builtin_memcpy(&bits, &from, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *to = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

constexpr int64_t kTurned = 16;  // rows and columns of a tile that is turned in registers and the nearest cache

// rows [first, first + count) of [rows, columns] as columns of [columns, rows]
template <class From, class To>
void turn_rows(const From* from, To* to, int64_t rows, int64_t columns, int64_t first, int64_t count) {
  for (int64_t c = 0; c < columns; c += kTurned) {
    if (count == kTurned && c + kTurned <= columns) {
      From tile[kTurned][kTurned];
      for (int64_t i = 0; i < kTurned; ++i) __builtin_memcpy(tile[i], from + (first + i) * columns + c, sizeof tile[i]);
      for (int64_t j = 0; j < kTurned; ++j) {
        To row[kTurned];
        for (int64_t i = 0; i < kTurned; ++i) convert(tile[i][j], row + i);
        __builtin_memcpy(to + (c + j) * rows + first, row, sizeof row);
      }
      continue;
    }
    for (int64_t j = c; j < least(c + kTurned, columns); ++j) {
      for (int64_t i = first; i < first + count; ++i) convert(from[i * columns + j], to + j * rows + i);
    }
  }
}

template <class From, class To>
void cross(const Border& g, int64_t part, int64_t parts) {
  const int64_t size = g.rows * g.columns;
  const From* from = static_cast<const From*>(g.from);
  To* to = static_cast<To*>(g.to);
  if (!g.turn) {
    const int64_t all = g.batch * size;
    for (int64_t i = all * part / parts; i < all * (part + 1) / parts; ++i) convert(from[i], to + i);
    return;
  }
  const int64_t bands = ceil_div(g.rows, kTurned), all = g.batch * bands;
  for (int64_t band = all * part / parts; band < all * (part + 1) / parts; ++band) {
    const int64_t image = band / bands, first = band % bands * kTurned;
    turn_rows(from + image * size, to + image * size, g.rows, g.columns, first, least(kTurned, g.rows - first));
  }
}

void cross_border(const Border* g, int64_t part, int64_t parts) {
  if (g->from_bf16) return g->to_bf16 ? cross<uint16_t, uint16_t>(*g, part, parts) : cross<uint16_t, float>(*g, part, parts);
  return g->to_bf16 ? cross<float, uint16_t>(*g, part, parts) : cross<float, float>(*g, part, parts);
}

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
