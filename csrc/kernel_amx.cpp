// bfloat16 on x86-64 with AMX tiles, beside the vectors of AVX-512.
#if defined(__x86_64__) && defined(__GNUC__)
#include <cstddef>
#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")
#endif
#include <immintrin.h>

#define QX_ISA amx
#define QX_BYTES 64
#define QX_MAX_NV 4
#define QX_TILE_ROWS 16, 14, 8, 6
#define QX_GRAD_ROWS 16, 12
#define QX_NARROW_BF16(v) ((vh)_mm512_cvtneps_pbh((__m512)(v)))
#define QX_WIDEN_BF16(h) ((vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)(h)))
#define QX_NARROW_TWO_BF16(a, b) ((vu)_mm512_cvtne2ps_pbh((__m512)(b), (__m512)(a)))
#define QX_TWO_PLACES(a, b)                                                                      \
  ((Halves)_mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(_mm256_loadu_si256((__m256i_u*)(a))), \
                                    _mm256_loadu_si256((__m256i_u*)(b)), 1))
#define QX_QUARTER(p) _mm_loadu_si128((__m128i_u*)(p))
#define QX_INSERT(v, p, n) _mm512_maskz_inserti32x4(0xffff, v, QX_QUARTER(p), n)
#define QX_FOUR_PLACES(p, apart)                                                                             \
  ((Halves)QX_INSERT(QX_INSERT(QX_INSERT(_mm512_castsi128_si512(QX_QUARTER(p)), (p) + (apart), 1), (p) + 2 * (apart), \
                               2),                                                                           \
                     (p) + 3 * (apart), 3))
#define QX_HARDWARE_TILES
#include "tile_bf16.h"
#include "tile_grad.h"
#include "depthwise.h"

extern const quincunx::GradKernels qx_grad_avx512bf16;
extern const quincunx::ForwardKernels qx_bf16_amx;
extern const quincunx::GradKernels qx_grad_amx;
const quincunx::ForwardKernels qx_bf16_amx =
    quincunx::amx::Depthwise<&quincunx::amx::kTileKernels, quincunx::amx::Plain<uint16_t>, uint16_t, uint16_t>::kernels;
const quincunx::GradKernels qx_grad_amx = quincunx::amx::TileGrad<&qx_grad_avx512bf16>::kernels;

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
