// Memory that a thread keeps from call to call.
#pragma once

#include <cstdint>

namespace quincunx {

// At least this many bytes, aligned to a page, of the calling thread; their content is not kept. Null without memory.
char* thread_scratch(int64_t bytes);
// The most that a thread gets; the kernels' test lowers it.
extern int64_t scratch_limit;

}  // namespace quincunx
