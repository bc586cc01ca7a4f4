// Fused programs that were checked once and are run by their number; torch's operators are in bindings_kept.cpp.
#pragma once

#include <cstdint>

namespace quincunx {

// Forgets the program of this number. Calls of it that have begun go on; later ones are refused.
void drop_program(int64_t number);

}  // namespace quincunx
