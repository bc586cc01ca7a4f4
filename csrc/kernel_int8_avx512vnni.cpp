// Eight bits on x86-64 with AVX-512 VNNI: four products in one instruction.
#if defined(__x86_64__) && defined(__GNUC__)
#include <cstddef>
#include <cstdint>

#if defined(__clang__)
#pragma clang fp contract(off)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,fma,avx512vnni"))), apply_to = function)
#else
#pragma GCC optimize("fp-contract=off")
#pragma GCC target("arch=x86-64-v4,avx512vnni,prefer-vector-width=512")
#endif
#include "int8_avx512.h"

#define QX_ISA avx512vnni_int8
#define QX_DOT_U8S8(acc, a, b) ((vi)_mm512_dpbusd_epi32((__m512i)(acc), (__m512i)(a), (__m512i)(b)))
#include "int8_gemm.h"

extern const quincunx::Int8Kernels qx_int8_avx512vnni;
const quincunx::Int8Kernels qx_int8_avx512vnni = quincunx::avx512vnni_int8::kInt8;

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
