// Chooses the kernels for this processor, once.
// QUINCUNX_ISA=amx|avx512bf16|avx512vnni|avx512|avxvnni|avx2|baseline|amx-emulated forces a choice.
#pragma once

#include <string>

#include "kernel_api.h"

namespace quincunx {

// Throws std::runtime_error if a forced instruction set is unknown or not available.
const Kernels& kernels();
const char* isa();
// "bfloat16 and int8": what the chosen kernels multiply on tiles; empty for nothing
const char* tile_formats();
// best first, comma-separated
std::string available_isas();
// null if this processor lacks it
const Kernels* kernels_of(const std::string& isa);

}  // namespace quincunx
