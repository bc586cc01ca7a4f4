// Whether this process may use AMX tiles.
#pragma once

#include <string>

namespace quincunx {

// Why not; empty if it may. Asks the system once a process; threads and forked processes inherit the answer.
const std::string& tiles_refused();
// Whether the processor's tiles multiply bytes, besides bfloat16; it may lack tiles altogether.
bool tiles_multiply_bytes();

}  // namespace quincunx
