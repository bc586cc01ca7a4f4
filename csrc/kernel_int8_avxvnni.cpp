// Eight bits on x86-64 with AVX-VNNI: four products in one instruction, 256 bits wide.
#if defined(__x86_64__) && defined(__GNUC__)
#include <cstddef>
#include <cstdint>

#if defined(__clang__)
#pragma clang fp contract(off)
#pragma clang attribute push(__attribute__((target("avx2,fma,avxvnni"))), apply_to = function)
#else
#pragma GCC optimize("fp-contract=off")
#pragma GCC target("arch=x86-64-v3,avxvnni")
#endif
#include "int8_avx2.h"

#define QX_ISA avxvnni_int8
#define QX_DOT_U8S8(acc, a, b) ((vi)_mm256_dpbusd_avx_epi32((__m256i)(acc), (__m256i)(a), (__m256i)(b)))
#include "int8_gemm.h"

extern const quincunx::Int8Kernels qx_int8_avxvnni;
const quincunx::Int8Kernels qx_int8_avxvnni = quincunx::avxvnni_int8::kInt8;

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
