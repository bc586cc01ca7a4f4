// Runs consecutive steps in one parallel region of torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "kernel_api.h"

namespace quincunx {

// Neighbouring parts: their own thread takes them first, but idle threads take the rest.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};  // the first part that no thread has taken
  int64_t last = 0;
};

struct Step {
  GatherGemm problem{};
  Cut cut{};
  int64_t parts = 0;
  alignas(64) std::atomic<int64_t> done{0};
  std::vector<Share> shares;  // of the threads
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
  // the thread that we wait for may share this core
  if (turn > 1000) return std::this_thread::yield();
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Any number of threads, including one, completes the work.
inline void work_on(std::vector<Step>& steps, int64_t thread, const ForwardKernels& kernels) {
  for (Step& step : steps) {
    const int64_t count = step.shares.size();
    for (int64_t i = 0; i < count; ++i) {
      Share& share = step.shares[(thread + i) % count];
      for (;;) {
        if (share.next.load(std::memory_order_relaxed) >= share.last) break;
        const int64_t part = share.next.fetch_add(1, std::memory_order_relaxed);
        if (part >= share.last) break;
        kernels.run(&step.problem, step.cut, part);
        step.done.fetch_add(1, std::memory_order_release);
      }
    }
    for (int64_t turn = 0; step.done.load(std::memory_order_acquire) < step.parts; ++turn) relax(turn);
  }
}

// The maps of a program for some of its images: maps in the arena have one place per thread.
struct Places {
  int64_t x, residual, out, out2;  // numbers of the step's maps, -1 for none
};
struct Place {
  char* base = nullptr;     // of an input or output
  int64_t image_bytes = 0;  // distance of its images
  int64_t offset = -1;      // in the arena, bytes per image; -1 for inputs and outputs
};

// The maps of a step for the images from `first` on; `arena` holds the maps of `images` of them.
inline void set_maps(GatherGemm& g, const Places& maps, const std::vector<Place>& places, char* arena, int64_t first,
                     int64_t images) {
  const auto at = [&](int64_t number) -> char* {
    if (number < 0) return nullptr;
    const Place& place = places[number];
    return place.offset < 0 ? place.base + first * place.image_bytes : arena + place.offset * images;
  };
  g.x = at(maps.x);
  g.residual = at(maps.residual);
  g.out = at(maps.out);
  g.out2 = at(maps.out2);
}

// The number of images to run at a time through a whole program, so that its maps stay in a near cache; 0 if
// it is better to share the steps among the threads one by one.
inline int64_t images_at_a_time(const std::vector<Step>& steps, int64_t batch, int64_t element_bytes) {
  constexpr int64_t kTileRows = 32, kWeightsPerRow = 24 * 1024;
  const int64_t near_cache = level2_bytes() / 2;
  const int64_t threads = torch::stable::get_num_threads();
  int64_t enough = 1, largest = 1;
  for (const Step& step : steps) {
    const GatherGemm& g = step.problem;
    largest = std::max({largest, element_bytes * g.rows_in * g.in_channels, element_bytes * g.rows_out * g.out_channels});
    const int64_t weights =
        g.weight ? int64_t{4} * g.num_taps * g.in_channels / g.channel_groups * g.out_channels : 0;
    // weights are read once for all rows that run together
    const int64_t rows = std::max(kTileRows, weights / kWeightsPerRow);
    enough = std::max(enough, (rows - 1) / std::max<int64_t>(1, g.rows_out) + 1);
  }
  const int64_t share = (batch + threads - 1) / threads;
  // a step reads one map and writes another
  const int64_t most = std::max(enough, near_cache / 2 / largest);
  const int64_t turns = (share + most - 1) / std::max<int64_t>(1, most);
  const int64_t images = turns > 0 ? (share + turns - 1) / turns : 0;
  // so that no thread waits long for the last one
  const bool even = images * turns * threads * 9 <= batch * 10;
  return batch > 1 && images >= enough && even ? images : 0;
}

inline void run_images(const std::vector<Step>& steps, const std::vector<Places>& maps, const std::vector<Place>& places,
                       char* arena, int64_t arena_bytes, int64_t batch, int64_t images, const ForwardKernels& kernels) {
  std::atomic<int64_t> next{0};
  const int64_t chunks = (batch + images - 1) / images;
  parallel(std::min<int64_t>(chunks, torch::stable::get_num_threads()), [&](int64_t thread) {
    char* own = arena + thread * arena_bytes * images;
    for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      const int64_t first = chunk * images, count = std::min(images, batch - first);
      for (size_t i = 0; i < steps.size(); ++i) {
        GatherGemm g = steps[i].problem;
        g.batch = count;
        set_maps(g, maps[i], places, own, first, images);
        kernels.run(&g, Cut{1, 1}, 0);
      }
    }
  });
}

inline void run_steps(std::vector<Step>& steps, const ForwardKernels& kernels) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t widest = 1;
  for (Step& step : steps) {
    step.cut = kernels.cut(&step.problem, threads);
    step.parts = step.cut.outputs * step.cut.positions;
    widest = std::max(widest, std::min(step.parts, threads));
  }
  for (Step& step : steps) {
    step.shares = std::vector<Share>(widest);
    for (int64_t i = 0; i < widest; ++i) {
      // parts that differ only in their output channels are adjacent
      step.shares[i].next = step.parts * i / widest;
      step.shares[i].last = step.parts * (i + 1) / widest;
    }
  }
  parallel(widest, [&](int64_t thread) { work_on(steps, thread, kernels); });
}

}  // namespace quincunx
