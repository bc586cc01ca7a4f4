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
#define QX_HARDWARE_TILES
#include "tile_bf16.h"
#include "depthwise.h"

extern const quincunx::ForwardKernels qx_bf16_amx;
const quincunx::ForwardKernels qx_bf16_amx =
    quincunx::amx::Depthwise<&quincunx::amx::kTileKernels, quincunx::amx::Plain<uint16_t>, uint16_t, uint16_t>::kernels;

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
