// The kernels for x86-64 with AVX2 and FMA.
#if defined(__x86_64__) && defined(__GNUC__)
#include <cstddef>
#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v3")
#endif
#include <immintrin.h>

#define QX_ISA avx2
#define QX_BYTES 32
#define QX_MAX_NV 2
#define QX_TILE_ROWS 12, 6
#define QX_GRAD_ROWS 12, 6
#define QX_BINARY_ROWS 8, 4
#define QX_LOOK_UP(table, code) ((vf)_mm256_permutevar8x32_ps((__m256)(table), (__m256i)(code)))
#include "gather_gemm.h"
#include "depthwise.h"
#include "lookup_conv.h"
#include "binary_gemm.h"
#include "windows.h"
#include "fitted_fill.h"
#include "pointwise.h"
#include "norm_act.h"

extern const quincunx::Kernels qx_kernels_avx2;
const quincunx::Kernels qx_kernels_avx2 = {
    quincunx::avx2::all_kernels<quincunx::avx2::Float, float>(),
    quincunx::avx2::all_kernels<quincunx::avx2::WideBf16, uint16_t>(),
    quincunx::avx2::kGrad,
    quincunx::avx2::kLookup,
    &quincunx::avx2::extremes,
    quincunx::avx2::kBinary,
    quincunx::avx2::kMax,
    quincunx::avx2::kSum,
    quincunx::avx2::kFill,
    quincunx::avx2::kPointwiseKernels,
    &quincunx::avx2::cross_border,
    quincunx::avx2::kNorm<float>,
    quincunx::avx2::kNorm<uint16_t>,
};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
