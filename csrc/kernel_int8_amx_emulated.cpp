// Eight bits on emulated tiles, for every processor: slow, to test the kernels of kernel_int8_amx.cpp where there is no AMX.
#include <cstddef>
#include <cstdint>

#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#define QX_ISA amx_emulated_int8
#define QX_BYTES 16
#define QX_MAX_NV 2
#define QX_TILE_ROWS 12, 6
#define QX_GRAD_ROWS 12, 6
#include "int8_tiles.h"

extern const quincunx::Int8Kernels qx_int8_amx_emulated;
const quincunx::Int8Kernels qx_int8_amx_emulated = quincunx::amx_emulated_int8::kTileInt8;
