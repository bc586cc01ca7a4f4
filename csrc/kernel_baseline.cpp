// The kernels for the compiler's default target: SSE2 on x86-64, NEON on AArch64.
#include <cstddef>
#include <cstdint>

#define QX_ISA baseline
#define QX_BYTES 16
#if defined(__aarch64__)
#define QX_MAX_NV 4
#define QX_TILE_ROWS 12, 12, 8, 6
#define QX_GRAD_ROWS 16, 12
#define QX_BINARY_ROWS 8, 8, 5, 4
#else
#define QX_MAX_NV 2
#define QX_TILE_ROWS 12, 6
#define QX_GRAD_ROWS 12, 6
#define QX_BINARY_ROWS 6, 3
#endif
#include "gather_gemm.h"
#include "depthwise.h"
#include "lookup_conv.h"
#include "binary_gemm.h"
#include "windows.h"
#include "fitted_fill.h"
#include "pointwise.h"
#include "norm_act.h"

extern const quincunx::Kernels qx_kernels_baseline;
const quincunx::Kernels qx_kernels_baseline = {
    quincunx::baseline::all_kernels<quincunx::baseline::Float, float>(),
    quincunx::baseline::all_kernels<quincunx::baseline::WideBf16, uint16_t>(),
    quincunx::baseline::kGrad,
    quincunx::baseline::kLookup,
    &quincunx::baseline::extremes,
    quincunx::baseline::kBinary,
    quincunx::baseline::kMax,
    quincunx::baseline::kSum,
    quincunx::baseline::kFill,
    quincunx::baseline::kPointwiseKernels,
    &quincunx::baseline::cross_border,
    quincunx::baseline::kNorm<float>,
    quincunx::baseline::kNorm<uint16_t>,
};
