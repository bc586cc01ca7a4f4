// Whether this process may use AMX tiles.
#pragma once

#include <string>

namespace quincunx {

// Why not; empty if it may. Asks the system once a process; threads and forked processes inherit the answer.
const std::string& tiles_refused();

}  // namespace quincunx
