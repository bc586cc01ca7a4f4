// Eight bits on x86-64 with AVX2: bytes widened to 16 bits, since its product of bytes saturates.
#if defined(__x86_64__) && defined(__GNUC__)
#include <cstddef>
#include <cstdint>

#if defined(__clang__)
#pragma clang fp contract(off)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC optimize("fp-contract=off")
#pragma GCC target("arch=x86-64-v3")
#endif
#include "int8_avx2.h"

#define QX_ISA avx2_int8
#define QX_MADD16(a, b) ((vi)_mm256_madd_epi16((__m256i)(a), (__m256i)(b)))
#include "int8_gemm.h"

extern const quincunx::Int8Kernels qx_int8_avx2;
const quincunx::Int8Kernels qx_int8_avx2 = quincunx::avx2_int8::kInt8;

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
