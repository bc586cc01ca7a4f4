// Eight bits for the compiler's default target.
#include <cstddef>
#include <cstdint>

#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#define QX_MADD16(a, b) ((vi)_mm_madd_epi16((__m128i)(a), (__m128i)(b)))
#endif

#define QX_ISA baseline_int8
#define QX_BYTES 16
#define QX_MAX_NV 2
#define QX_TILE_ROWS 12, 6
#define QX_GRAD_ROWS 12, 6

#include "int8_gemm.h"

extern const quincunx::Int8Kernels qx_int8_baseline;
const quincunx::Int8Kernels qx_int8_baseline = quincunx::baseline_int8::kInt8;
