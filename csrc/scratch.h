// Memory that a thread keeps from call to call.
#pragma once

#include <cstdint>

namespace quincunx {

// At least this many bytes, aligned to a page, of the calling thread; their content is not kept. Null without memory.
char* thread_scratch(int64_t bytes);
// The most that a thread gets; the kernels' test lowers it.
extern int64_t scratch_limit;

// The same for the time of one call, and never null: without memory, the process's reserve, which threads have one after
// the other. How a problem is divided may depend on the size of memory, so all parts must get the same.
class Scratch {
 public:
  static constexpr int64_t kMost = (1 << 21) + (1 << 16);
  // bytes: at most kMost
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data;

 private:
  bool reserved_;
};

}  // namespace quincunx
