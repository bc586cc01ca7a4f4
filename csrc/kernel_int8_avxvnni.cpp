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
#include <immintrin.h>

#define QX_ISA avxvnni_int8
#define QX_BYTES 32
#define QX_MAX_NV 2
#define QX_TILE_ROWS 12, 6
#define QX_GRAD_ROWS 12, 6
#define QX_DOT_U8S8(acc, a, b) ((vi)_mm256_dpbusd_avx_epi32((__m256i)(acc), (__m256i)(a), (__m256i)(b)))
#define QX_WIDEN_U8(p) ((vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p))))
#define QX_NARROW_U8(p, v) \
  do { \
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)(v)), _mm256_extracti128_si256((__m256i)(v), 1)); \
    _mm_storel_epi64((__m128i*)(p), _mm_packus_epi16(words, words)); \
  } while (false)
#define QX_GREATER(a, b) ((vf)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define QX_LESSER(a, b) ((vf)_mm256_min_ps((__m256)(a), (__m256)(b)))
#include "int8_gemm.h"

extern const quincunx::Int8Kernels qx_int8_avxvnni;
const quincunx::Int8Kernels qx_int8_avxvnni = quincunx::avxvnni_int8::kInt8;

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
