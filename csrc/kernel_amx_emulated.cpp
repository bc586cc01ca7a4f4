// bfloat16 on emulated tiles, for every processor: slow, to test the kernels of kernel_amx.cpp where there is no AMX.
#include <cstddef>
#include <cstdint>

#define QX_ISA amx_emulated
#define QX_BYTES 16
#define QX_MAX_NV 2
#define QX_TILE_ROWS 12, 6
#define QX_GRAD_ROWS 12, 6
#include "tile_bf16.h"
#include "tile_grad.h"
#include "depthwise.h"

extern const quincunx::ForwardKernels qx_bf16_amx_emulated;
extern const quincunx::GradKernels qx_grad_amx_emulated;
const quincunx::ForwardKernels qx_bf16_amx_emulated =
    quincunx::amx_emulated::Depthwise<&quincunx::amx_emulated::kTileKernels, quincunx::amx_emulated::Plain<uint16_t>,
                                      uint16_t, uint16_t>::kernels;
const quincunx::GradKernels qx_grad_amx_emulated =
    quincunx::amx_emulated::TileGrad<&quincunx::amx_emulated::kGrad>::kernels;
