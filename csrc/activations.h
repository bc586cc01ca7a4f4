// What an epilogue does to each value beyond ReLU, on compiler vectors. Included by gather_gemm.h, once per
// instruction set. Formulas are those of torch in float32, so that NaN and infinities come out as there:
// -infinity times 0 is a NaN in x / (1 + e^-x), as in torch's.
#pragma once

namespace quincunx {
namespace QX_ISA {
namespace {

// e^x to about one unit in the last place, by 2^n e^r with r in [-ln 2 / 2, ln 2 / 2] and Cephes' polynomial
QX_INLINE vf exponential(vf x) {
  // beyond these it is infinite, and 0; a NaN passes
  x = at_most(at_least(x, -104.0f), 89.0f);
  const vf magic = vf{} + 12582912.0f;  // 1.5 2^23: what is added to it is rounded to an integer
  const vf shifted = x * 1.44269504f + magic;
  const vf n = shifted - magic;
  const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // the first product is exact
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors: n goes from -150 to 128
  const vi whole = reinterpret_cast<vi>(shifted) - reinterpret_cast<vi>(magic), half = whole >> 1;
  const vf low = reinterpret_cast<vf>((half + 127) << 23), high = reinterpret_cast<vf>((whole - half + 127) << 23);
  return p * low * high;
}

// 1 + erf(x / sqrt 2), by Abramowitz and Stegun 7.1.26: to 1.5e-7
QX_INLINE vf one_plus_erf(vf x) {
  const vf z = x * 0.70710678f, size = z < 0.0f ? -z : z;
  const vf t = 1.0f / (size * 0.3275911f + 1.0f);
  vf p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const vf rest = p * t * exponential(-size * size);
  return z < 0.0f ? rest : 2.0f - rest;
}

QX_INLINE vf clipped(vf x) { return at_most(at_least(x + 3.0f, 0.0f), 6.0f); }

// slope: of kLeaky
QX_INLINE vf activated(vf x, int32_t activation, vf slope) {
  switch (activation) {
    case kNone:
      return x;
    case kRelu:
      return at_least(x, 0.0f);
    case kRelu6:
      return at_most(at_least(x, 0.0f), 6.0f);
    case kLeaky:
      return x > 0.0f ? x : x * slope;
    case kHardsigmoid:
      return clipped(x) / 6.0f;
    case kHardswish:
      return x * clipped(x) / 6.0f;
    case kSigmoid:
      return 1.0f / (exponential(-x) + 1.0f);
    case kSilu:
      return x / (exponential(-x) + 1.0f);
    case kGelu:
      return x * 0.5f * one_plus_erf(x);
    default: {  // kGeluTanh: 1 + tanh u = 2 / (1 + e^-2u)
      const vf cube = x * x * x;
      return x / (exponential((cube * 0.044715f + x) * -1.5957691216f) + 1.0f);
    }
  }
}

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
