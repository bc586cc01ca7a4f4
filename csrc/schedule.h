// Torch's threads as a host of programs and of single operators.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "runner.h"

namespace quincunx {

inline void in_torch_threads(void*, int64_t count, void (*body)(void*, int64_t), void* argument) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) body(argument, index);
  });
}

inline Host torch_host() {
  return Host{static_cast<int64_t>(torch::stable::get_num_threads()), nullptr, &in_torch_threads};
}

inline int64_t parts_for(int64_t work, int64_t least_work) { return parts_for(torch_host(), work, least_work); }

template <class F>
void parallel(int64_t parts, const F& run) {
  parallel(torch_host(), parts, run);
}

}  // namespace quincunx
