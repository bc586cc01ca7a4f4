// What int8_gemm.h may use where there is AVX-512. Included by a file that has chosen the target.
#pragma once

#include <immintrin.h>

#define QX_BYTES 64
#define QX_MAX_NV 4
#define QX_TILE_ROWS 20, 12, 8, 6
#define QX_GRAD_ROWS 16, 12
#define QX_WIDEN_U8(p) ((vi)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i*)(p))))
#define QX_GREATER(a, b) ((vf)_mm512_maskz_max_ps(0xffff, (__m512)(a), (__m512)(b)))
#define QX_LESSER(a, b) ((vf)_mm512_maskz_min_ps(0xffff, (__m512)(a), (__m512)(b)))
#define QX_ROUND(v) ((vi)_mm512_maskz_cvtps_epi32(0xffff, (__m512)(v)))
#define QX_NARROW_U8(p, v) \
  _mm_storeu_si128((__m128i*)(p), _mm512_maskz_cvtusepi32_epi8(0xffff, _mm512_maskz_max_epi32(0xffff, (__m512i)(v), _mm512_setzero_si512())))
// two to four vectors: packing saturates and interleaves lanes of 128 bits, which one permutation undoes
#define QX_NARROW_SOME_U8(p, nv, a, b, c, d) \
  do { \
    const __m512i first = _mm512_packs_epi32((__m512i)(a), (__m512i)(b)); \
    const __m512i second = (nv) > 2 ? _mm512_packs_epi32((__m512i)(c), (__m512i)(d)) : first; \
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); \
    const __m512i all = _mm512_maskz_permutexvar_epi32(0xffff, order, _mm512_packus_epi16(first, second)); \
    if ((nv) > 3) _mm512_storeu_si512((p), all); \
    else _mm256_storeu_si256((__m256i*)(p), _mm512_castsi512_si256(all)); \
    if ((nv) == 3) _mm_storeu_si128((__m128i*)((p) + 32), _mm512_maskz_extracti32x4_epi32(15, all, 2)); \
  } while (false)
