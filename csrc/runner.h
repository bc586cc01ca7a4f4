// Runs the checked steps of a program in one parallel region of whatever threads the host has. Torch-free: torch's
// operators, the C interface and the plug-ins of other engines all run this.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "kernel_api.h"

namespace quincunx {

// Who runs a program: the number of threads, and a function that calls body(argument, i) once for each i of
// [0, count), in any order and perhaps at the same time. Without the function the caller's thread does everything.
struct Host {
  int64_t threads = 1;
  void* context = nullptr;
  void (*parallel_for)(void* context, int64_t count, void (*body)(void* argument, int64_t index), void* argument) =
      nullptr;
};

inline int64_t parts_for(const Host& host, int64_t work, int64_t least_work) {
  return std::max<int64_t>(1, std::min(host.threads, work / least_work));
}

template <class F>
void parallel(const Host& host, int64_t parts, const F& run) {
  if (parts == 1 || host.parallel_for == nullptr) {
    for (int64_t part = 0; part < parts; ++part) run(part);
    return;
  }
  const auto body = [](void* argument, int64_t index) { (*static_cast<const F*>(argument))(index); };
  host.parallel_for(host.context, parts, body, const_cast<F*>(&run));
}

// What a step does with the fields of its GatherGemm, beside what they mean there:
enum Work : int64_t {
  kConvolve,   // all of GatherGemm, a mean without a weight
  kWindowMax,  // rows are the starts of the windows in index
  kFill,       // FittedFill: rows are the kinds, weight is float32
  kCopy,       // x to the output channels from residual_channels on: a part of a concatenation
  kPointwise,  // out = act(x scale2 + shift2 + residual), each of them or none
  kWorks
};

inline int64_t bytes_of(int32_t type) { return type == kFloat32 ? 4 : type == kBfloat16 ? 2 : 1; }

// The functions for one type of real maps, and for steps in eight bits among them.
struct Engine {
  const Kernels& all;
  bool bf16;
  const ForwardKernels& forward() const { return bf16 ? all.bf16 : all.f32; }
  const ForwardKernels& forward(const GatherGemm& g) const { return g.quantised ? all.int8.forward : forward(); }
  int64_t real_bytes() const { return bf16 ? 2 : 4; }
  int64_t bytes_in(const GatherGemm& g) const { return g.quantised ? bytes_of(g.quantised->x.type) : real_bytes(); }
  int64_t bytes_out(const GatherGemm& g) const { return g.quantised ? bytes_of(g.quantised->out.type) : real_bytes(); }
};

// Neighbouring parts: their own thread takes them first, but idle threads take the rest.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};  // the first part that no thread has taken
  int64_t last = 0;
};

struct Step {
  Work work = kConvolve;
  GatherGemm problem{};
  Cut cut{};
  int64_t parts = 0;
  alignas(64) std::atomic<int64_t> done{0};
  std::vector<Share> shares;  // of the threads
};

inline Windows as_windows(const GatherGemm& g) {
  return Windows{g.x, g.index, g.rows, g.out, g.batch, g.rows_in, g.rows_out, g.in_channels};
}

inline FittedFill as_fill(const GatherGemm& g) {
  return FittedFill{g.x,     static_cast<const float*>(g.weight),
                    g.bias,  g.residual,
                    g.index, g.rows,
                    g.out,   g.batch,
                    g.rows_in, g.rows_out,
                    g.in_channels, g.num_taps,
                    g.activation};
}

inline Pointwise as_pointwise(const GatherGemm& g) {
  return Pointwise{g.x,   g.scale2, g.shift2, g.slope, g.residual, g.out, g.batch * g.rows_out, g.out_channels,
                   g.residual_channels, g.activation};
}

inline void copy_channels(const GatherGemm& g, int64_t element_bytes, int64_t part, int64_t parts) {
  const int64_t rows = g.batch * g.rows_in, bytes = g.in_channels * element_bytes;
  const int64_t stride = g.out_channels * element_bytes, from = g.residual_channels * element_bytes;
  for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
    std::memcpy(static_cast<char*>(g.out) + row * stride + from, static_cast<const char*>(g.x) + row * bytes, bytes);
  }
}

inline Cut cut_step(Work work, const GatherGemm& g, const Engine& engine, int64_t threads) {
  if (work == kConvolve) return engine.forward(g).cut(&g, threads);
  constexpr int64_t kLeastValues = 50000, kPartsPerThread = 4;
  int64_t reads = 1;
  if (work == kWindowMax && g.rows_out > 0) reads = 1 + g.rows[g.rows_out] / g.rows_out;
  if (work == kFill) reads = 1 + g.num_taps;
  const int64_t values = g.batch * g.rows_out * std::max(g.in_channels, g.out_channels) * reads;
  return Cut{1, std::max<int64_t>(1, std::min(kPartsPerThread * threads, values / kLeastValues))};
}

inline void run_part(Work work, const GatherGemm& g, const Engine& engine, Cut cut, int64_t part) {
  switch (work) {
    case kWindowMax: {
      const Windows windows = as_windows(g);
      if (g.quantised) return engine.all.int8.max(&windows, part, cut.positions);
      return (engine.bf16 ? engine.all.max.bf16 : engine.all.max.f32)(&windows, part, cut.positions);
    }
    case kFill: {
      if (g.quantised) return engine.all.int8.fill(&g, part, cut.positions);
      const FittedFill fill = as_fill(g);
      return (engine.bf16 ? engine.all.fill.bf16 : engine.all.fill.f32)(&fill, part, cut.positions);
    }
    case kCopy:
      return copy_channels(g, engine.bytes_in(g), part, cut.positions);
    case kPointwise: {
      if (g.quantised) return engine.all.int8.pointwise(&g, part, cut.positions);
      const Pointwise pointwise = as_pointwise(g);
      return (engine.bf16 ? engine.all.pointwise.bf16 : engine.all.pointwise.f32)(&pointwise, part, cut.positions);
    }
    default:
      return engine.forward(g).run(&g, cut, part);
  }
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
inline void work_on(std::vector<Step>& steps, int64_t thread, const Engine& engine) {
  for (Step& step : steps) {
    const int64_t count = step.shares.size();
    for (int64_t i = 0; i < count; ++i) {
      Share& share = step.shares[(thread + i) % count];
      for (;;) {
        if (share.next.load(std::memory_order_relaxed) >= share.last) break;
        const int64_t part = share.next.fetch_add(1, std::memory_order_relaxed);
        if (part >= share.last) break;
        run_part(step.work, step.problem, engine, step.cut, part);
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

// A checked step: its maps by number, everything else in place.
struct Call {
  Work work = kConvolve;
  GatherGemm problem{};
  Places maps{-1, -1, -1, -1};
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
inline int64_t images_at_a_time(const std::vector<Call>& calls, int64_t batch, const Engine& engine, int64_t threads) {
  constexpr int64_t kTileRows = 32, kWeightsPerRow = 24 * 1024;
  const int64_t near_cache = level2_bytes() / 2;
  int64_t enough = 1, largest = 1;
  for (const Call& call : calls) {
    const GatherGemm& g = call.problem;
    largest = std::max({largest, engine.bytes_in(g) * g.rows_in * g.in_channels,
                        engine.bytes_out(g) * g.rows_out * g.out_channels});
    // what has no weights gains nothing from rows that run together
    if (call.work != kConvolve || g.weight == nullptr) continue;
    const int64_t weights = int64_t{4} * g.num_taps * g.in_channels / g.channel_groups * g.out_channels;
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

inline void run_images(const std::vector<Call>& calls, const std::vector<Place>& places, char* arena,
                       int64_t arena_bytes, int64_t batch, int64_t images, const Engine& engine, const Host& host) {
  std::atomic<int64_t> next{0};
  const int64_t chunks = (batch + images - 1) / images;
  parallel(host, std::min<int64_t>(chunks, host.threads), [&](int64_t thread) {
    char* own = arena + thread * arena_bytes * images;
    for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      const int64_t first = chunk * images, count = std::min(images, batch - first);
      for (const Call& call : calls) {
        GatherGemm g = call.problem;
        g.batch = count;
        set_maps(g, call.maps, places, own, first, images);
        run_part(call.work, g, engine, Cut{1, 1}, 0);
      }
    }
  });
}

inline void run_steps(std::vector<Step>& steps, const Engine& engine, const Host& host) {
  int64_t widest = 1;
  for (Step& step : steps) {
    step.cut = cut_step(step.work, step.problem, engine, host.threads);
    step.parts = step.cut.outputs * step.cut.positions;
    widest = std::max(widest, std::min(step.parts, host.threads));
  }
  for (Step& step : steps) {
    step.shares = std::vector<Share>(widest);
    for (int64_t i = 0; i < widest; ++i) {
      // parts that differ only in their output channels are adjacent
      step.shares[i].next = step.parts * i / widest;
      step.shares[i].last = step.parts * (i + 1) / widest;
    }
  }
  parallel(host, widest, [&](int64_t thread) { work_on(steps, thread, engine); });
}

// Runs checked steps on a batch. `arena_bytes`: of one image; `allocate(bytes)` gives the memory of the arena, which
// has to live until this returns.
template <class Allocate>
void run_calls(const std::vector<Call>& calls, const std::vector<Place>& places, int64_t arena_bytes, int64_t batch,
               const Engine& engine, const Host& host, const Allocate& allocate) {
  const int64_t images = images_at_a_time(calls, batch, engine, host.threads);
  char* arena = allocate(arena_bytes * (images > 0 ? images * host.threads : batch));
  if (images > 0) return run_images(calls, places, arena, arena_bytes, batch, images, engine, host);
  std::vector<Step> steps(calls.size());
  for (size_t i = 0; i < calls.size(); ++i) {
    steps[i].work = calls[i].work;
    steps[i].problem = calls[i].problem;
    steps[i].problem.batch = batch;
    set_maps(steps[i].problem, calls[i].maps, places, arena, 0, batch);
  }
  run_steps(steps, engine, host);
}

}  // namespace quincunx
