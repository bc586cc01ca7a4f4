// Runs steps that follow each other in one parallel region of torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "kernel_api.h"

namespace quincunx {

struct Step {
  GatherGemm problem{};
  Cut cut{};
  int64_t parts = 0;
  alignas(64) std::atomic<int64_t> next{0};  // the first part that nobody has taken
  alignas(64) std::atomic<int64_t> done{0};
};

inline int64_t parts_for(int64_t work, int64_t least_work) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min(threads, work / least_work));
}

template <class F>
void parallel(int64_t parts, const F& run) {
  if (parts == 1) return run(0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) run(part);
  });
}

inline void relax(int64_t turn) {
  // a core may be shared with the very thread that is waited for
  if (turn > 1000) return std::this_thread::yield();
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Every thread takes the next part that is left, so that any number of threads, also one, does all.
inline void work_on(std::vector<Step>& steps, const ForwardKernels& kernels) {
  for (Step& step : steps) {
    for (;;) {
      const int64_t part = step.next.fetch_add(1, std::memory_order_relaxed);
      if (part >= step.parts) break;
      kernels.run(&step.problem, step.cut, part);
      step.done.fetch_add(1, std::memory_order_release);
    }
    for (int64_t turn = 0; step.done.load(std::memory_order_acquire) < step.parts; ++turn) relax(turn);
  }
}

inline void run_steps(std::vector<Step>& steps, const ForwardKernels& kernels) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t widest = 1;
  for (Step& step : steps) {
    step.cut = kernels.cut(&step.problem, threads);
    step.parts = step.cut.outputs * step.cut.positions;
    widest = std::max(widest, std::min(step.parts, threads));
  }
  parallel(widest, [&](int64_t) { work_on(steps, kernels); });
}

}  // namespace quincunx
