// What int8_gemm.h may use where there is AVX2. Included by a file that has chosen the target.
#pragma once

#include <immintrin.h>

#define QX_BYTES 32
#define QX_MAX_NV 2
#define QX_TILE_ROWS 12, 6
#define QX_GRAD_ROWS 12, 6
#define QX_WIDEN_U8(p) ((vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p))))
#define QX_GREATER(a, b) ((vf)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define QX_LESSER(a, b) ((vf)_mm256_min_ps((__m256)(a), (__m256)(b)))
#define QX_ROUND(v) ((vi)_mm256_cvtps_epi32((__m256)(v)))
#define QX_NARROW_U8(p, v) \
  do { \
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)(v)), _mm256_extracti128_si256((__m256i)(v), 1)); \
    _mm_storel_epi64((__m128i*)(p), _mm_packus_epi16(words, words)); \
  } while (false)
