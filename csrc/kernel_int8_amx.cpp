// Eight bits on x86-64 with AMX tiles, beside the vectors of AVX-512 VNNI.
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

#define QX_ISA amx_int8
#define QX_DOT_U8S8(acc, a, b) ((vi)_mm512_dpbusd_epi32((__m512i)(acc), (__m512i)(a), (__m512i)(b)))
#define QX_HARDWARE_TILES
#include "int8_tiles.h"

extern const quincunx::Int8Kernels qx_int8_amx;
const quincunx::Int8Kernels qx_int8_amx = quincunx::amx_int8::kTileInt8;

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
