// The kernels for x86-64 with AVX-512 (F, BW, CD, DQ, VL).
#if defined(__x86_64__) && defined(__GNUC__)
#include <cstddef>
#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#endif
#include <immintrin.h>

#define QX_ISA avx512
#define QX_BYTES 64
#define QX_MAX_NV 4
#define QX_TILE_ROWS 20, 14, 8, 6
#define QX_GRAD_ROWS 16, 12
#define QX_BINARY_ROWS 20, 10, 8, 6
#define QX_BINARY_SPREAD
// a mask with all lanes: without one GCC warns about undefined lanes
#define QX_LOOK_UP(table, code) ((vf)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)(code), (__m512)(table)))
#define QX_WIDEN_BF16(h) ((vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)(h)))
#include "gather_gemm.h"
#include "depthwise.h"
#include "lookup_conv.h"
#include "binary_gemm.h"
#include "windows.h"
#include "fitted_fill.h"
#include "pointwise.h"
#include "norm_act.h"

extern const quincunx::Kernels qx_kernels_avx512;
const quincunx::Kernels qx_kernels_avx512 = {
    quincunx::avx512::all_kernels<quincunx::avx512::Float, float>(),
    quincunx::avx512::all_kernels<quincunx::avx512::WideBf16, uint16_t>(),
    quincunx::avx512::kGrad,
    quincunx::avx512::kLookup,
    &quincunx::avx512::extremes,
    quincunx::avx512::kBinary,
    quincunx::avx512::kMax,
    quincunx::avx512::kSum,
    quincunx::avx512::kFill,
    quincunx::avx512::kPointwiseKernels,
    &quincunx::avx512::cross_border,
    quincunx::avx512::kNorm<float>,
    quincunx::avx512::kNorm<uint16_t>,
};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
