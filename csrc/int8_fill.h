// A fitted fill in eight bits: computed positions keep their values, each other one is a combination of a few computed
// ones. Coefficients stay float32: a fill reads two to nine bytes for each that it writes, so that memory and not
// arithmetic is its time, and coefficients in eight bits would be a second rounding for nothing. They are multiplied by
// the map's scale before, so that the integers need no product of their own. Included by int8_gemm.h.
#pragma once

namespace quincunx {
namespace QX_ISA {
namespace {

constexpr int kByteFillVectors = 4;  // of channels that are summed side by side, so that additions overlap

template <int kVectors>
QX_INLINE void fill_byte_channels(const GatherGemm& g, const uint8_t* map, const int32_t* taps, int32_t kind,
                                  int64_t residual, int64_t out, int64_t c) {
  const Quantised& maps = *g.quantised;
  const int64_t channels = g.out_channels;
  const int32_t zero = maps.x.zero;
  vf sum[kVectors];
  if (kind < 0) {
    const uint8_t* row = map + taps[0] * channels + c;
    for (int v = 0; v < kVectors; ++v) {
      const vi number = widen_some(row + v * kLanes, channels - c - v * kLanes, zero) - zero;
      sum[v] = to_floats(number) * maps.x.scale;
    }
  } else {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = c + v * kLanes;
      sum[v] = g.bias == nullptr ? vf{} : load_some(g.bias + kind * channels + at, channels - at);
    }
    const float* weight = static_cast<const float*>(g.weight) + int64_t{kind} * g.num_taps * channels + c;
    for (int32_t t = 0; t < g.num_taps; ++t) {
      if (taps[t] < 0) continue;
      const uint8_t* row = map + taps[t] * channels + c;
      for (int v = 0; v < kVectors; ++v) {
        const int64_t left = channels - c - v * kLanes;
        const vi number = widen_some(row + v * kLanes, left, zero) - zero;
        sum[v] += load_some(weight + t * channels + v * kLanes, left) * to_floats(number);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = c + v * kLanes, left = channels - at;
    if (g.residual != nullptr && at < g.residual_channels) {
      sum[v] += read_real(g.residual, maps.residual, residual + at, g.residual_channels - at);
    }
    const vf value = activated(sum[v], g.activation, g.slope ? load_some(g.slope + at, left) : vf{});
    if (g.out) write_real(g.out, maps.out, out + at, value, left);
    if (g.out2) {
      const vf second = value * load_some(g.scale2 + at, left) + load_some(g.shift2 + at, left);
      write_real(g.out2, maps.out2, out + at, at_least(second, g.low2), left);
    }
  }
}

// rows are the kinds of positions, as in FittedFill; the residual may be of any rows and of fewer channels
void fill_bytes(const GatherGemm* problem, int64_t part, int64_t parts) {
  const GatherGemm& g = *problem;
  const int64_t channels = g.out_channels, positions = g.rows_out, total = g.batch * positions;
  const int64_t stride = g.num_taps > 0 ? g.num_taps : 1;
  for (int64_t at = total * part / parts; at < total * (part + 1) / parts; ++at) {
    const int64_t image = at / positions, p = at % positions;
    const uint8_t* map = static_cast<const uint8_t*>(g.x) + image * g.rows_in * channels;
    const int64_t from = g.residual_rows ? g.residual_rows[p] : p;
    const int64_t residual = (image * g.residual_size + from) * g.residual_channels;
    const int32_t* taps = g.index + p * stride;
    int64_t c = 0;
    for (; c + kByteFillVectors * kLanes <= channels; c += kByteFillVectors * kLanes) {
      fill_byte_channels<kByteFillVectors>(g, map, taps, g.rows[p], residual, at * channels, c);
    }
    for (; c < channels; c += kLanes) {
      fill_byte_channels<1>(g, map, taps, g.rows[p], residual, at * channels, c);
    }
  }
}

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
