// bfloat16 on x86-64 with AVX-512 BF16: pairs of channels in one dot product.
#if defined(__x86_64__) && defined(__GNUC__)
#include <cstddef>
#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")
#endif
#include <immintrin.h>

namespace {
typedef float dot_vf __attribute__((vector_size(64)));
// acc[i] += a.low b[i].low + a.high b[i].high
inline __attribute__((always_inline)) dot_vf dot_bf16(dot_vf acc, int32_t pair, dot_vf b) {
  return (dot_vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
}
}  // namespace

#define QX_ISA avx512bf16
#define QX_BYTES 64
#define QX_MAX_NV 4
#define QX_TILE_ROWS 16, 14, 8, 6
#define QX_GRAD_ROWS 16, 12
#define QX_DOT_BF16
#define QX_NARROW_BF16(v) ((vh)_mm512_cvtneps_pbh((__m512)(v)))
#define QX_WIDEN_BF16(h) ((vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)(h)))
#include "gather_gemm.h"
#include "depthwise.h"
#include "norm_act.h"

extern const quincunx::ForwardKernels qx_bf16_avx512bf16;
extern const quincunx::GradKernels qx_grad_avx512bf16;
extern const quincunx::NormKernels qx_norm_avx512bf16;
const quincunx::ForwardKernels qx_bf16_avx512bf16 =
    quincunx::avx512bf16::all_kernels<quincunx::avx512bf16::DotBf16, uint16_t>();
const quincunx::GradKernels qx_grad_avx512bf16 = quincunx::avx512bf16::kGrad;
const quincunx::NormKernels qx_norm_avx512bf16 = quincunx::avx512bf16::kNorm<uint16_t>;

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
