// Checks every instruction set that this processor has against plain loops. Torch-free:
// make sanitize
// Every array is a block of exactly its size, so that the sanitiser sees any access outside it; without one it ends at a
// page that may not be touched, which also stops vectors with masks that reach too far.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "check_tiles.h"
#include "checks.h"
#include "dispatch.h"
#include "norm_sums.h"
#include "onnxruntime/thread_count.h"
#include "scratch.h"
#include "trap_tiles.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#ifdef QX_TRAPS
extern const quincunx::ForwardKernels qx_bf16_amx;
extern const quincunx::GradKernels qx_grad_amx;
extern const quincunx::Int8Kernels qx_int8_amx;
#endif

namespace {

using namespace quincunx;

std::mt19937 generator(1);
int failures = 0;

int64_t pick(std::initializer_list<int64_t> values) { return values.begin()[generator() % values.size()]; }
float normal() { return std::normal_distribution<float>()(generator); }

float widen(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
uint16_t narrow(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return std::isnan(f) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
struct Unmap {
  void* base = nullptr;
  size_t size = 0;
  void operator()(const void*) const { munmap(base, size); }
};
template <class T>
using Exactly = std::unique_ptr<T[], Unmap>;
template <class T>
Exactly<T> exactly(int64_t count) {
  constexpr size_t kPage = 4096;
  const size_t bytes = count * sizeof(T), readable = (bytes + kPage - 1) / kPage * kPage;
  void* base = mmap(nullptr, readable + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED || mprotect(static_cast<char*>(base) + readable, kPage, PROT_NONE) != 0) {
    std::perror("no memory for an array");
    std::exit(1);
  }
  return Exactly<T>(reinterpret_cast<T*>(static_cast<char*>(base) + readable - bytes), Unmap{base, readable + kPage});
}
#else
template <class T>
using Exactly = std::unique_ptr<T[]>;
template <class T>
Exactly<T> exactly(int64_t count) {
  return Exactly<T>(new T[count]);
}
#endif

// values in the type of a map, and what they are as float
struct Array {
  Array(int64_t count, bool bf16, bool random = true) : bf16(bf16), count(count) {
    bytes = exactly<char>(count * (bf16 ? 2 : 4));
    for (int64_t i = 0; i < count; ++i) set(i, random ? normal() : std::nanf(""));
  }
  void set(int64_t i, float v) {
    if (bf16) reinterpret_cast<uint16_t*>(bytes.get())[i] = narrow(v);
    else reinterpret_cast<float*>(bytes.get())[i] = v;
  }
  float operator[](int64_t i) const {
    return bf16 ? widen(reinterpret_cast<const uint16_t*>(bytes.get())[i])
                : reinterpret_cast<const float*>(bytes.get())[i];
  }
  float* floats() { return reinterpret_cast<float*>(bytes.get()); }
  bool bf16;
  int64_t count;
  Exactly<char> bytes;
};

std::vector<int32_t> exact(const std::vector<int32_t>& v) {
  std::vector<int32_t> copy(v);
  copy.shrink_to_fit();
  return copy;
}

// a formula in double
double activated(double x, int32_t activation, double slope) {
  const double clipped = std::min(std::max(x + 3, 0.0), 6.0);
  switch (activation) {
    case kNone: return x;
    case kRelu: return std::max(x, 0.0);
    case kRelu6: return std::min(std::max(x, 0.0), 6.0);
    case kLeaky: return x > 0 ? x : x * slope;
    case kHardsigmoid: return clipped / 6;
    case kHardswish: return x * clipped / 6;
    case kSigmoid: return 1 / (1 + std::exp(-x));
    case kSilu: return x / (1 + std::exp(-x));
    case kGelu: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    default: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
  }
}

void compare(const std::string& what, double got, double want, double scale, double tolerance) {
  if (std::abs(got - want) <= tolerance * (1 + scale)) return;
  if (++failures < 20) std::printf("FAIL %s: got %g, expected %g\n", what.c_str(), got, want);
}

struct Case {
  int64_t groups, in_per, out_per, taps, batch, rows_in, residual_channels, residual_size;
  std::vector<int32_t> index, rows, tap_list, sizes, residual_rows, shifts;
  int64_t in() const { return groups * in_per; }
  int64_t out() const { return groups * out_per; }
  const int32_t* residual_table() const { return residual_rows.empty() ? nullptr : residual_rows.data(); }
  int64_t residual_row(int64_t row) const { return residual_rows.empty() ? row : residual_rows[row]; }
};

Case random_case() {
  Case c;
  c.groups = pick({1, 1, 2, 3});
  c.in_per = pick({1, 2, 3, 8, 16, 17, 32, 33, 64, 401});
  c.out_per = pick({1, 3, 15, 16, 17, 32, 48, 65, 100});
  c.taps = pick({1, 2, 5, 9});
  c.batch = pick({0, 1, 2, 3, 11});
  c.rows_in = pick({1, 7, 40, 90});
  for (int64_t g = pick({0, 1, 2, 3}); g > 0; --g) {
    const int64_t positions = pick({0, 1, 5, 13, 210}), used = generator() % (c.taps + 1);
    c.sizes.insert(c.sizes.end(), {int32_t(positions), int32_t(used)});
    std::vector<int32_t> order(c.taps);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), generator);
    c.tap_list.insert(c.tap_list.end(), order.begin(), order.begin() + used);
    for (int64_t p = 0; p < positions; ++p) c.rows.push_back(c.rows.size());
    // rows anywhere, or at each tap equally far apart, as where a map is read row by row
    const int64_t apart = pick({-1, 0, 1, 2}), outside = generator() % (used + 1);
    for (int64_t i = 0; i < positions * used; ++i) {
      int64_t row = int64_t(generator() % (c.rows_in + 1)) - 1;
      if (apart >= 0) row = i % used == outside ? -1 : (i % used * 3 + i / used * apart) % c.rows_in;
      c.index.push_back(int32_t(row));
    }
    if (used > 0 && positions > 20) std::fill(c.index.end() - 20 * used, c.index.end(), -1);
  }
  for (size_t i = c.rows.size(); i > 1; --i) std::swap(c.rows[i - 1], c.rows[generator() % i]);
  c.residual_channels = pick({0, c.out(), (c.out() + 1) / 2});
  c.residual_size = pick({1, 9});
  for (size_t i = 0; i < c.rows.size(); ++i) c.residual_rows.push_back(generator() % c.residual_size);
  for (auto* table : {&c.index, &c.rows, &c.tap_list, &c.sizes, &c.residual_rows}) *table = exact(*table);
  return c;
}

// Whatever a thread's memory holds from before must not reach a result.
void spoil_scratch() {
  constexpr int64_t kBytes = 1 << 21;
  if (char* memory = thread_scratch(kBytes)) std::memset(memory, 0xff, kBytes);
}

// All parts, in the order that finds most mistakes; some of their threads have no memory.
void run_parts(const ForwardKernels& kernels, const GatherGemm& g, Cut cut) {
  const int64_t before = scratch_limit;
  for (int64_t part = cut.outputs * cut.positions; part-- > 0;) {
    scratch_limit = generator() % 8 ? before : 0;
    kernels.run(&g, cut, part);
  }
  scratch_limit = before;
}

void check_forward(const std::string& name, const ForwardKernels& kernels, bool bf16, const Case& c) {
  spoil_scratch();
  const int64_t out = c.out(), rows_out = c.rows.size();
  Array x(c.batch * c.rows_in * c.in(), bf16), weight(out * c.in_per * c.taps, bf16);
  Array bias(out, false), scale(out, false), shift(out, false), slope(out, false);
  Array residual(c.batch * c.residual_size * c.residual_channels, bf16);
  Array result(c.batch * rows_out * out, bf16, false), result2(result.count, bf16, false);
  Array packed(kernels.packed_size(out, c.in_per, c.taps, c.groups), kernels.packs_bf16, false);

  // the strides of [O, C / groups, T], or of its permutations [T, C / groups, O] and [O, T, C / groups]
  const int64_t order = pick({0, 1, 2});
  const int64_t output = order == 1 ? 1 : c.in_per * c.taps, channel = order == 0 ? c.taps : order == 1 ? out : 1;
  const int64_t tap = order == 0 ? 1 : order == 1 ? out * c.in_per : c.in_per;
  // what no table names must not be multiplied, not even by zero
  const auto named = [](const std::vector<int32_t>& table, int64_t i) {
    return std::find(table.begin(), table.end(), int32_t(i)) != table.end();
  };
  // in some of the images: others may be computed in another form
  std::vector<bool> spoilt(c.batch);
  const bool some = generator() % 2;
  for (int64_t n = 0; n < c.batch; ++n) spoilt[n] = !some || generator() % 2;
  for (int64_t row = 0; row < c.rows_in; ++row) {
    for (int64_t i = 0; !named(c.index, row) && i < c.batch * c.in(); ++i) {
      if (spoilt[i / c.in()]) x.set((i / c.in() * c.rows_in + row) * c.in() + i % c.in(), std::nanf(""));
    }
  }
  for (int64_t t = 0; t < c.taps; ++t) {
    for (int64_t i = 0; !named(c.tap_list, t) && i < out * c.in_per; ++i) {
      weight.set(i / c.in_per * output + i % c.in_per * channel + t * tap, std::numeric_limits<float>::infinity());
    }
  }
  const Weight w{weight.bytes.get(), c.groups, c.out_per, c.in_per, c.taps, c.out_per * output, output, channel, tap};
  const int64_t pack_parts = pick({1, 3});
  for (int64_t part = 0; part < pack_parts; ++part) kernels.pack(&w, packed.bytes.get(), part, pack_parts);
  for (int64_t i = 0; i < packed.count; ++i) {
    if (std::isnan(packed[i])) compare(name + " packed", packed[i], 0, 0, 0);
  }

  if (bf16) {  // given in float32 it is rounded, and packed to the same bytes
    Array wide(weight.count, false), again(packed.count, kernels.packs_bf16, false);
    for (int64_t i = 0; i < weight.count; ++i) {
      const float off = generator() % 2 ? 1 + 0x1p-9f : 1;  // less than half of a step
      wide.set(i, weight[i] * off);
    }
    Weight same = w;
    same.data = wide.bytes.get();
    same.wide = true;
    for (int64_t part = 0; part < pack_parts; ++part) kernels.pack(&same, again.bytes.get(), part, pack_parts);
    if (std::memcmp(packed.bytes.get(), again.bytes.get(), packed.count * (kernels.packs_bf16 ? 2 : 4))) {
      compare(name + " packed from float32", 1, 0, 0, 0);
    }
  }

  GatherGemm g{};
  g.x = x.bytes.get();
  g.weight = packed.bytes.get();
  g.bias = generator() % 2 ? bias.floats() : nullptr;
  g.residual = c.residual_channels ? residual.bytes.get() : nullptr;
  g.residual_rows = c.residual_table();
  g.index = c.index.data();
  g.rows = c.rows.data();
  g.taps = c.tap_list.data();
  g.groups = c.sizes.data();
  g.shifts = c.shifts.empty() ? nullptr : c.shifts.data();
  const bool first = generator() % 4, second = !first || generator() % 2;
  g.out = first ? result.bytes.get() : nullptr;
  g.out2 = second ? result2.bytes.get() : nullptr;
  g.scale2 = scale.floats();
  g.shift2 = shift.floats();
  g.low2 = generator() % 2 ? 0 : -INFINITY;
  g.batch = c.batch;
  g.rows_in = c.rows_in;
  g.rows_out = rows_out;
  g.residual_size = c.residual_size;
  g.in_channels = c.in();
  g.out_channels = out;
  g.channel_groups = c.groups;
  g.num_taps = c.taps;
  g.num_groups = c.sizes.size() / 2;
  g.residual_channels = c.residual_channels;
  g.activation = generator() % kActivations;
  g.slope = g.activation == kLeaky ? slope.floats() : nullptr;
  Cut cut = kernels.cut(&g, pick({1, 2, 16}));
  if (generator() % 2) cut = Cut{pick({1, 2, 7}), pick({1, 3, 50})};  // more parts than outputs or rows, too
  run_parts(kernels, g, cut);

  const double tolerance = bf16 ? 8e-3 : 2e-6;
  const int32_t *index = g.index, *row = g.rows, *taps = g.taps;
  for (int64_t group = 0; group < g.num_groups; ++group) {
    const int64_t positions = g.groups[2 * group], used = g.groups[2 * group + 1];
    for (int64_t n = 0; n < c.batch; ++n) {
      for (int64_t p = 0; p < positions; ++p) {
        for (int64_t o = 0; o < out; ++o) {
          double sum = g.bias ? bias[o] : 0, size = 0;
          for (int64_t t = 0; t < used; ++t) {
            const int64_t from = index[p * used + t];
            for (int64_t i = 0; from >= 0 && i < c.in_per; ++i) {
              const double term = double(x[(n * c.rows_in + from) * c.in() + o / c.out_per * c.in_per + i]) *
                                  weight[o * output + i * channel + taps[t] * tap];
              sum += term;
              size += std::abs(term);
            }
          }
          size += std::abs(sum);
          if (o < c.residual_channels) {
            sum += residual[(n * c.residual_size + c.residual_row(row[p])) * c.residual_channels + o];
          }
          size += std::abs(sum);
          sum = activated(sum, g.activation, slope[o]);
          if (g.activation == kLeaky) size *= 1 + std::abs(slope[o]);
          size *= 1.2;  // the steepest slope of the others, hardswish's apart
          if (g.activation == kHardswish) size *= 1.3;
          const int64_t at = (n * rows_out + row[p]) * out + o;
          if (first) compare(name + " out", result[at], sum, size, tolerance);
          const double sum2 = std::max(sum * scale[o] + shift[o], double{g.low2});
          if (second) compare(name + " out2", result2[at], sum2, size * std::abs(scale[o]) + 2, tolerance);
        }
      }
    }
    index += positions * used;
    row += positions;
    taps += used;
  }
}

// groups of one channel, with one output or a few
Case depthwise_case() {
  Case c = random_case();
  c.groups = pick({1, 3, 5, 16, 24, 64, 100, 161});
  c.in_per = 1, c.out_per = pick({1, 1, 1, 2, 3, 20});
  c.residual_channels = pick({0, c.out(), (c.out() + 1) / 2});
  return c;
}

// A map of few channels: the taps of a grid of `side` columns, read as a convolution does, then a group of some of them.
Case few_case() {
  Case c = random_case();
  c.groups = 1, c.in_per = pick({1, 2, 3, 3, 4, 5});
  const int64_t kernel = pick({2, 4, 5, 7, 10}), side = 12, last = side - 1;
  c.taps = kernel * kernel, c.rows_in = side * side;
  c.residual_channels = pick({0, c.out(), (c.out() + 1) / 2});
  c.rows.clear(), c.tap_list.clear(), c.index.clear(), c.residual_rows.clear(), c.sizes.clear();
  for (const bool every : {true, false}) {
    std::vector<int32_t> used;
    for (int64_t t = 0; t < c.taps; ++t) {
      if (every || generator() % 3) used.push_back(int32_t(t));
    }
    const int64_t positions = pick({0, 1, 30, 130, 250}), from = pick({-3, 0, 2});
    for (int64_t p = 0; p < positions; ++p) {
      const int64_t top = from + p / last, left = from + p % last;
      for (const int32_t t : used) {
        const int64_t row = top + t / kernel, column = left + t % kernel;
        const bool inside = row >= 0 && row < side && column >= 0 && column < side;
        c.index.push_back(int32_t(inside ? row * side + column : -1));
      }
      c.rows.push_back(c.rows.size());
    }
    c.sizes.insert(c.sizes.end(), {int32_t(positions), int32_t(used.size())});
    c.tap_list.insert(c.tap_list.end(), used.begin(), used.end());
  }
  std::shuffle(c.rows.begin(), c.rows.end(), generator);
  for (size_t i = 0; i < c.rows.size(); ++i) c.residual_rows.push_back(generator() % c.residual_size);
  for (auto* table : {&c.index, &c.rows, &c.tap_list, &c.sizes, &c.residual_rows}) *table = exact(*table);
  return c;
}

// Taps that are shifts: classes of outputs that read lines of slots, and the tables that say the same.
Case shifted_case() {
  Case c = random_case();
  c.groups = 1, c.taps = pick({2, 5, 9, 25}), c.batch = pick({1, 1, 2, 3, 11, 70});
  c.residual_channels = pick({0, c.out(), (c.out() + 1) / 2});
  c.index.clear(), c.rows.clear(), c.tap_list.clear(), c.sizes.clear(), c.residual_rows.clear();
  struct Class {
    std::vector<int32_t> taps, offsets;
    int64_t positions;
  };
  std::vector<Class> classes(pick({1, 1, 2, 4}));
  int64_t slots = pick({0, 3});
  const int64_t apart = pick({1, 1, 2, 3});
  for (Class& own : classes) {
    own.positions = pick({1, 15, 33, 70, 300});
    const int64_t line = pick({3, 19}), first = pick({0, 5});
    for (int64_t t = 0; t < c.taps; ++t) {
      // the first has every tap: merged taps are all multiplied
      if (&own != &classes[0] && generator() % 5 == 0) continue;
      own.taps.push_back(int32_t(t));
      own.offsets.push_back(int32_t(first + t / 3 * line + t % 3));
      slots = std::max<int64_t>(slots, own.offsets.back() + apart * (own.positions - 1) + 1);
    }
  }
  std::vector<int32_t> inputs(slots), outputs, body;
  for (int32_t& row : inputs) row = int32_t(generator() % (c.rows_in + 1)) - 1;
  c.shifts = {int32_t(classes.size()), int32_t(slots), int32_t(apart)};
  for (const Class& own : classes) {
    c.shifts.insert(c.shifts.end(), {int32_t(own.taps.size()), int32_t(own.positions)});
    body.insert(body.end(), own.taps.begin(), own.taps.end());
    body.insert(body.end(), own.offsets.begin(), own.offsets.end());
    int32_t count = 0;
    for (int64_t q = 0; q < own.positions; ++q) {
      const bool needed = generator() % 6 > 0;
      body.push_back(needed ? int32_t(c.rows.size()) : -1);
      if (!needed) continue;
      ++count;
      c.rows.push_back(int32_t(c.rows.size()));
      for (const int32_t offset : own.offsets) c.index.push_back(inputs[offset + apart * q]);
    }
    c.sizes.insert(c.sizes.end(), {count, int32_t(own.taps.size())});
    c.tap_list.insert(c.tap_list.end(), own.taps.begin(), own.taps.end());
  }
  c.shifts.insert(c.shifts.end(), body.begin(), body.end());
  c.shifts.insert(c.shifts.end(), inputs.begin(), inputs.end());
  // what is compared takes long under sanitisers
  const auto large = [&c] { return double(c.batch) * c.index.size() * c.in_per * c.out_per > 4e6; };
  while (c.batch > 1 && large()) c.batch /= 2;
  if (large()) c.in_per = pick({3, 17, 33});
  for (size_t i = 0; i < c.rows.size(); ++i) c.residual_rows.push_back(generator() % c.residual_size);
  for (auto* table : {&c.index, &c.rows, &c.tap_list, &c.sizes, &c.residual_rows, &c.shifts}) *table = exact(*table);
  return c;
}

// Outputs in the order of their inputs, as of a dense 1 x 1, or with two of them exchanged.
Case ordered_case() {
  Case c = random_case();
  c.in_per = pick({1, 17, 32, 64, 96, 128, 256, 512, 2048}), c.batch = pick({1, 1, 2, 3});
  c.rows_in = pick({1, 15, 16, 49, 64, 200});
  if (c.in_per > 200) c.groups = 1, c.rows_in = pick({16, 49});
  c.index.resize(c.rows_in);
  std::iota(c.index.begin(), c.index.end(), 0);
  c.rows = c.index;
  c.tap_list = {int32_t(generator() % c.taps)};
  c.sizes = {int32_t(c.rows_in), 1};
  c.residual_channels = pick({0, c.out(), (c.out() + 1) / 2});
  c.residual_rows.clear();
  c.residual_size = c.rows_in;
  if (generator() % 4 == 0) {
    auto& exchanged = generator() % 2 ? c.rows : c.index;
    std::swap(exchanged[0], exchanged[c.rows_in / 2]);
  }
  if (generator() % 4 == 0) {
    c.residual_rows = c.rows;
    std::reverse(c.residual_rows.begin(), c.residual_rows.end());
  }
  for (auto* table : {&c.index, &c.rows, &c.tap_list, &c.sizes, &c.residual_rows}) *table = exact(*table);
  return c;
}

// more taps than tiles take at once, and inputs that fill no cache
Case deep_case(int64_t kind) {
  Case c = random_case();
  while (c.rows.empty() || c.batch == 0) c = random_case();
  c.groups = 1, c.batch = 1, c.out_per = pick({16, 40}), c.rows_in = 90;
  std::tie(c.in_per, c.taps) = std::array<std::pair<int64_t, int64_t>, 5>{
      {{3, 150}, {16, 70}, {40, 67}, {700, 9}, {1504, 25}}}[kind % 5];
  const int64_t positions = pick({37, 40}), used = c.taps - pick({0, 0, 1});
  c.sizes = {int32_t(positions), int32_t(used)};
  c.rows.clear(), c.tap_list.clear(), c.index.clear(), c.residual_rows.clear();
  for (int64_t t = 0; t < used; ++t) c.tap_list.push_back(t);
  if (generator() % 2) std::shuffle(c.tap_list.begin(), c.tap_list.end(), generator);
  for (int64_t p = 0; p < positions; ++p) c.rows.push_back(p), c.residual_rows.push_back(p % c.residual_size);
  const bool apart = kind / 5 % 2;
  for (int64_t i = 0; i < positions * used; ++i) {
    c.index.push_back(int32_t(apart ? (i / used + i % used) % c.rows_in : int64_t(generator() % (c.rows_in + 1)) - 1));
  }
  c.residual_channels = c.out();
  for (auto* table : {&c.index, &c.rows, &c.tap_list, &c.sizes, &c.residual_rows}) *table = exact(*table);
  return c;
}

// Tiles must be released after each part: other libraries of the process use them, too.
void check_released(const std::string& name) {
  bool in_use = emulated_tiles_in_use();
#if defined(__x86_64__)
  if (name == "amx") {
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
    in_use |= (low & 3u << 17) != 0;
  }
#endif
  if (in_use) compare(name + " leaves tiles in use", 1, 0, 0, 0);
}

// few maps, as many positions as its tiles are made for at a time, and more outputs than share one pass
Case wide_case() {
  Case c{};
  c.groups = 1;
  c.in_per = pick({16, 48, 81});
  c.out_per = pick({16, 560, 1040});
  c.taps = pick({1, 3});
  c.batch = pick({2, 5});
  c.rows_in = 70;
  return c;
}

void check_grad(const std::string& name, const GradKernels& kernels, bool bf16, const Case& c) {
  const int64_t positions = pick({0, 1, 9, 31, 64, 300}), parts = pick({1, 2, 5});
  Array x(c.batch * c.rows_in * c.in(), bf16), gy(c.batch * positions * c.out(), bf16);
  Array grad(c.out() * c.in_per * c.taps, false, false);
  std::vector<int32_t> index;
  for (int64_t i = 0; i < positions * c.taps; ++i) index.push_back(int32_t(generator() % (c.rows_in + 1)) - 1);
  index = exact(index);
  WeightGrad g{x.bytes.get(), gy.bytes.get(), index.data(), grad.floats(), nullptr, c.batch, c.rows_in, positions,
               int32_t(c.in()), int32_t(c.out()), int32_t(c.groups), int32_t(c.taps), bf16, pick({0, 1}) == 1};
  Array partial(kernels.partial_floats(&g, parts), false, false);
  g.partial = partial.floats();
  for (int64_t part = parts; part-- > 0;) kernels.run(&g, part, parts);
  const int64_t finish_parts = pick({1, 3});
  for (int64_t part = 0; part < finish_parts; ++part) kernels.finish(&g, part, finish_parts, parts);
  for (int64_t o = 0; o < c.out(); ++o) {
    for (int64_t i = 0; i < c.in_per; ++i) {
      for (int64_t t = 0; t < c.taps; ++t) {
        double sum = 0, size = 0;
        for (int64_t q = 0; q < c.batch * positions; ++q) {
          const int64_t from = index[q % positions * c.taps + t];
          if (from < 0) continue;
          const double term = double(gy[q * c.out() + o]) *
                              x[(q / positions * c.rows_in + from) * c.in() + o / c.out_per * c.in_per + i];
          sum += term;
          size += std::abs(term);
        }
        const int64_t at = g.channels_last ? (o * c.taps + t) * c.in_per + i : (o * c.in_per + i) * c.taps + t;
        compare(name + " grad", grad[at], sum, size, 2e-6);
      }
    }
  }
}

void check_lookup(const std::string& name, const LookupKernels& kernels) {
  const int64_t groups = pick({1, 1, 2}), channels = pick({1, 3, 8, 17}), outputs = pick({1, 3, 40, 71});
  const int64_t width = std::min(channels, pick({1, 3, 4, 8})), subspaces = (channels + width - 1) / width;
  const int64_t codewords = pick({2, 5, 64, 300}), taps = pick({1, 2, 9, 25}), batch = pick({0, 1, 2});
  const int64_t rows_in = pick({1, 7, 40}), positions = pick({0, 1, 4, 5, 16, 33, 70, 900});
  const int64_t count = groups * subspaces * taps * outputs, parts = pick({1, 2, 5});
  Array codebooks(groups * subspaces * codewords * width, false), bias(groups * outputs, false);
  Array x(batch * rows_in * groups * channels, false);
  std::vector<int32_t> slots, offsets, order(taps), rows, values;
  // some taps far from each other, some near, some reading behind the last slot
  for (int64_t t = 0; t < taps; ++t) offsets.push_back(generator() % pick({1, 30, 2000}));
  for (int64_t i = pick({0, 50, 1000}); i > 0; --i) slots.push_back(int32_t(generator() % (rows_in + 1)) - 1);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return offsets[a] < offsets[b]; });
  int32_t rows_out = 0;
  for (int64_t q = 0; q < positions; ++q) rows.push_back(generator() % 4 ? rows_out++ : -1);
  const std::unique_ptr<uint8_t[]> narrow_values(new uint8_t[count]);
  const std::unique_ptr<int16_t[]> wide_values(new int16_t[count]);
  for (int64_t i = 0; i < count; ++i) {
    values.push_back(generator() % codewords);
    narrow_values[i] = uint8_t(values[i]);
    wide_values[i] = int16_t(values[i]);
  }
  for (auto* table : {&slots, &offsets, &order, &rows}) *table = exact(*table);
  Array out(batch * rows_out * groups * outputs, false, false);
  LookupConv g{};
  g.x = x.floats();
  g.codebooks = codebooks.floats();
  g.wide = codewords > 256 || generator() % 2;
  g.assignments = g.wide ? static_cast<const void*>(wide_values.get()) : narrow_values.get();
  g.bias = generator() % 2 ? bias.floats() : nullptr;
  g.slots = slots.data();
  g.offsets = offsets.data();
  g.order = order.data();
  g.rows = rows.data();
  g.out = out.floats();
  g.batch = batch;
  g.rows_in = rows_in;
  g.rows_out = rows_out;
  g.num_slots = slots.size();
  g.positions = positions;
  g.in_channels = groups * channels;
  g.out_channels = groups * outputs;
  g.channel_groups = groups;
  g.subspaces = subspaces;
  g.codewords = codewords;
  g.width = width;
  g.num_taps = taps;
  Array scratch(kernels.scratch_floats(&g, parts) * parts, false, false);
  g.scratch = scratch.floats();
  for (int64_t part = parts; part-- > 0;) kernels.run(&g, part, parts);
  for (int64_t n = 0; n < batch; ++n) {
    for (int64_t q = 0; q < positions; ++q) {
      for (int64_t o = 0; rows[q] >= 0 && o < groups * outputs; ++o) {
        const int64_t group = o / outputs;
        double sum = g.bias ? bias[o] : 0, size = std::abs(sum);
        for (int64_t t = 0; t < taps; ++t) {
          const size_t slot = offsets[t] + q;
          const int64_t row = slot < slots.size() ? slots[slot] : -1;
          for (int64_t c = 0; row >= 0 && c < channels; ++c) {
            const int64_t subspace = group * subspaces + c / width;
            const int64_t word = values[(subspace * taps + t) * outputs + o % outputs];
            const double term = double(codebooks[(subspace * codewords + word) * width + c % width]) *
                                x[(n * rows_in + row) * groups * channels + group * channels + c];
            sum += term;
            size += std::abs(term);
          }
        }
        compare(name + " lookup", out[(n * rows_out + rows[q]) * groups * outputs + o], sum, size, 2e-6);
      }
    }
  }
}

void check_binary(const std::string& name, const BinaryKernels& kernels, Case c) {
  c.rows_in = pick({1, 7, 40, 700});  // of the last, tables are kept for some rows only
  const int64_t positions = pick({0, 1, 9, 300}), parts = pick({1, 2, 5}), out = c.out();
  const int64_t row_bytes = (c.in_per * c.taps + 7) / 8;
  Array x(c.batch * c.rows_in * c.in(), false), scale(out, false), bias(out, false);
  Array result(c.batch * positions * out, false, false);
  std::vector<uint8_t> bits(out * row_bytes);
  for (uint8_t& byte : bits) byte = static_cast<uint8_t>(generator());
  // near each other, as a kernel's taps are, or anywhere
  const int64_t spread = generator() % 2 ? 3 : c.rows_in;
  std::vector<int32_t> index;
  for (int64_t i = 0; i < positions * c.taps; ++i) {
    const int64_t row = i / c.taps * c.rows_in / (positions + 1) + generator() % spread;
    index.push_back(generator() % 4 ? std::min(row, c.rows_in - 1) : -1);
  }
  index = exact(index);
  const BinaryWeight w{bits.data(), row_bytes, c.groups, c.out_per, c.in_per, c.taps};
  const int64_t words = kernels.packed_words(out, c.in_per, c.taps, c.groups);
  const std::unique_ptr<uint32_t[]> packed(new uint32_t[words]);
  kernels.pack(&w, packed.get());
  BinaryGemm g{};
  g.x = x.floats();
  g.packed = packed.get();
  g.scale = generator() % 2 ? scale.floats() : nullptr;
  g.bias = generator() % 2 ? bias.floats() : nullptr;
  g.index = index.data();
  g.out = result.floats();
  g.batch = c.batch;
  g.rows_in = c.rows_in;
  g.positions = positions;
  g.in_channels = int32_t(c.in());
  g.out_channels = int32_t(out);
  g.channel_groups = int32_t(c.groups);
  g.num_taps = int32_t(c.taps);
  g.window = kernels.window(&g);
  for (int64_t part = parts; part-- > 0;) {
    Array scratch(kernels.scratch_floats(&g), false, false);
    kernels.run(&g, scratch.floats(), part, parts);
  }
  for (int64_t i = 0; i < result.count; ++i) {
    const int64_t o = i % out, p = i / out % positions, n = i / out / positions;
    double sum = 0, size = 0;
    for (int64_t t = 0; t < c.taps; ++t) {
      const int64_t from = index[p * c.taps + t];
      for (int64_t k = 0; from >= 0 && k < c.in_per; ++k) {
        const int64_t at = k * c.taps + t;
        const double term = x[(n * c.rows_in + from) * c.in() + o / c.out_per * c.in_per + k];
        sum += bits[o * row_bytes + at / 8] >> at % 8 & 1 ? term : -term;
        size += std::abs(term);
      }
    }
    const double factor = g.scale ? scale[o] : 1;
    sum = factor * sum + (g.bias ? bias[o] : 0);
    compare(name + " binary", result[i], sum, size * std::abs(factor), 2e-6);
  }
}

void check_mean(const std::string& name, const ForwardKernels& kernels, bool bf16) {
  const int64_t batch = pick({0, 1, 3, 9}), rows_in = pick({1, 7, 40}), positions = pick({0, 1, 5, 30});
  const int64_t taps = pick({1, 4, 9}), channels = pick({1, 3, 15, 16, 17, 100, 700});
  Array x(batch * rows_in * channels, bf16), result(batch * positions * channels, bf16, false);
  std::vector<int32_t> index, rows(positions), groups{int32_t(positions), int32_t(taps)};
  for (int64_t i = 0; i < positions * taps; ++i) index.push_back(int32_t(generator() % (rows_in + 1)) - 1);
  std::iota(rows.begin(), rows.end(), 0);
  std::shuffle(rows.begin(), rows.end(), generator);
  index = exact(index), rows = exact(rows), groups = exact(groups);
  GatherGemm g{};
  g.x = x.bytes.get(), g.index = index.data(), g.rows = rows.data(), g.groups = groups.data();
  g.out = result.bytes.get(), g.batch = batch, g.rows_in = rows_in, g.rows_out = positions;
  g.in_channels = g.out_channels = channels, g.channel_groups = 1, g.num_taps = taps, g.num_groups = 1;
  const Cut cut = kernels.cut(&g, pick({1, 2, 5}));
  for (int64_t part = cut.outputs * cut.positions; part-- > 0;) kernels.run(&g, cut, part);
  for (int64_t n = 0; n < batch; ++n) {
    for (int64_t p = 0; p < positions; ++p) {
      for (int64_t c = 0; c < channels; ++c) {
        double sum = 0, size = 0, count = 0;
        for (int64_t t = 0; t < taps; ++t) {
          const int32_t row = index[p * taps + t];
          if (row < 0) continue;
          sum += x[(n * rows_in + row) * channels + c];
          size += std::abs(x[(n * rows_in + row) * channels + c]);
          ++count;
        }
        const double got = result[(n * positions + rows[p]) * channels + c], least = std::max(count, 1.0);
        compare(name + " mean", got, sum / least, size / least + 1e-6, bf16 ? 1e-2 : 2e-6);
      }
    }
  }
}

void check_windows(const std::string& name, const WindowKernels& kernels, bool bf16, bool sum) {
  const int64_t batch = pick({0, 1, 3}), rows_in = pick({1, 7, 40}), positions = pick({0, 1, 5, 30});
  const int64_t channels = pick({1, 3, 15, 16, 17, 100}), parts = pick({1, 2, 5});
  Array x(batch * rows_in * channels, bf16), result(batch * positions * channels, bf16, false);
  if (x.count > 0) x.set(generator() % x.count, std::nanf(""));
  std::vector<int32_t> index, starts{0};
  for (int64_t p = 0; p < positions; ++p) {
    for (int64_t count = pick({0, 1, 2, 9}); count > 0; --count) index.push_back(generator() % rows_in);
    starts.push_back(index.size());
  }
  index = exact(index), starts = exact(starts);
  const Windows g{x.bytes.get(), index.data(), starts.data(), result.bytes.get(), batch, rows_in, positions, channels};
  for (int64_t part = parts; part-- > 0;) (bf16 ? kernels.bf16 : kernels.f32)(&g, part, parts);
  for (int64_t i = 0; i < result.count; ++i) {
    const int64_t c = i % channels, p = i / channels % positions, n = i / channels / positions;
    float want = sum ? 0 : -std::numeric_limits<float>::infinity();
    for (int64_t e = starts[p]; e < starts[p + 1]; ++e) {
      const float v = x[(n * rows_in + index[e]) * channels + c];
      if (sum) want += v;
      else if (std::isnan(v) || v > want) want = v;
    }
    if (bf16) want = widen(narrow(want));
    const float got = result[i];
    if (got != want && !(std::isnan(got) && std::isnan(want))) compare(name, got, want, 0, -1);
  }
}

// memory that must be written holds NaN before; so do rows of the map that no position names
void check_fill(const std::string& name, const FillKernels& kernels, bool bf16) {
  const int64_t batch = pick({0, 1, 3}), rows_in = pick({1, 7, 40}), positions = pick({0, 1, 5, 30});
  const int64_t channels = pick({1, 3, 15, 16, 17, 64, 100}), taps = pick({0, 1, 2, 5}), count = pick({1, 3});
  const int64_t stride = std::max<int64_t>(taps, 1), parts = pick({1, 2, 5});
  Array x(batch * rows_in * channels, bf16), result(batch * positions * channels, bf16, false);
  Array weight(count * taps * channels, false), bias(count * channels, false), residual(result.count, bf16);
  std::vector<int32_t> index, kinds;
  for (int64_t p = 0; p < positions; ++p) {
    kinds.push_back(int32_t(generator() % (count + 1)) - 1);
    for (int64_t t = 0; t < stride; ++t) index.push_back(int32_t(generator() % (rows_in + 1)) - 1);
    if (kinds.back() < 0) index[p * stride] = generator() % rows_in;
  }
  index = exact(index), kinds = exact(kinds);
  std::vector<char> named(rows_in, 0);
  for (int64_t p = 0; p < positions; ++p) {
    for (int64_t t = 0; t < (kinds[p] < 0 ? 1 : taps); ++t) {
      if (index[p * stride + t] >= 0) named[index[p * stride + t]] = 1;
    }
  }
  for (int64_t i = 0; i < x.count; ++i) {
    if (!named[i / channels % rows_in]) x.set(i, std::nanf(""));
  }
  FittedFill g{};
  g.x = x.bytes.get();
  g.weight = weight.floats();
  g.bias = generator() % 2 ? bias.floats() : nullptr;
  g.residual = generator() % 2 ? residual.bytes.get() : nullptr;
  g.index = index.data();
  g.kinds = kinds.data();
  g.out = result.bytes.get();
  g.batch = batch;
  g.rows_in = rows_in;
  g.positions = positions;
  g.channels = channels;
  g.num_taps = taps;
  g.activation = generator() % 3;
  for (int64_t part = parts; part-- > 0;) (bf16 ? kernels.bf16 : kernels.f32)(&g, part, parts);
  for (int64_t i = 0; i < result.count; ++i) {
    const int64_t c = i % channels, p = i / channels % positions, n = i / channels / positions;
    const auto at = [&](int64_t t) { return double(x[(n * rows_in + index[p * stride + t]) * channels + c]); };
    double want = 0, scale = 0;
    if (kinds[p] < 0) want = at(0);
    else {
      if (g.bias != nullptr) want = bias[kinds[p] * channels + c];
      for (int64_t t = 0; t < taps; ++t) {
        if (index[p * stride + t] < 0) continue;
        want += weight[(kinds[p] * taps + t) * channels + c] * at(t);
        scale += std::abs(weight[(kinds[p] * taps + t) * channels + c] * at(t));
      }
    }
    scale += std::abs(want);
    if (g.residual != nullptr) want += residual[i], scale += std::abs(residual[i]);
    if (g.activation != kNone) want = std::max(want, 0.0);
    if (g.activation == kRelu6) want = std::min(want, 6.0);
    compare(name, result[i], want, scale, bf16 ? 8e-3 : 2e-6);
  }
}

// rows that no position names hold NaN, and so do sums before
void check_fill_grad(const std::string& name, const FillKernels& kernels, bool bf16) {
  const int64_t batch = pick({0, 1, 3}), rows_in = pick({1, 7, 40}), positions = pick({1, 5, 30, 300});
  const int64_t channels = pick({1, 3, 15, 16, 17, 64, 100}), taps = pick({0, 1, 2, 5, 9}), kinds = pick({1, 3, 12});
  const int64_t stride = std::max<int64_t>(taps, 1), shares = pick({1, 2, 7}), parts = pick({1, 2, 5});
  Array x(batch * rows_in * channels, bf16), z(batch * positions * channels, bf16);
  Array sums(shares * kinds * taps * channels, false, false);
  std::vector<int32_t> index, order, starts{0};
  for (int64_t i = 0; i < positions * stride; ++i) index.push_back(int32_t(generator() % (rows_in + 1)) - 1);
  // each position in one kind or, where it is computed, in none
  std::vector<std::vector<int32_t>> members(kinds);
  for (int64_t p = 0; p < positions; ++p) {
    const int64_t kind = int64_t(generator() % (kinds + 1)) - 1;
    if (kind >= 0) members[kind].push_back(p);
  }
  std::vector<char> named(rows_in, 0), skipped(positions, 0);
  for (const auto& list : members) {
    for (const int32_t p : list) {
      skipped[p] = 1;
      order.push_back(p);
      for (int64_t t = 0; t < taps; ++t) {
        if (index[p * stride + t] >= 0) named[index[p * stride + t]] = 1;
      }
    }
    starts.push_back(order.size());
  }
  index = exact(index), order = exact(order), starts = exact(starts);
  for (int64_t i = 0; i < x.count; ++i) {
    if (!named[i / channels % rows_in]) x.set(i, std::nanf(""));
  }
  for (int64_t i = 0; i < z.count; ++i) {
    if (!skipped[i / channels % positions]) z.set(i, std::nanf(""));
  }
  FillGrad g{};
  g.x = x.bytes.get();
  g.z = z.bytes.get();
  g.index = index.data();
  g.order = order.data();
  g.starts = starts.data();
  g.partial = sums.floats();
  g.batch = batch;
  g.rows_in = rows_in;
  g.positions = positions;
  g.channels = channels;
  g.num_taps = taps;
  g.kinds = kinds;
  g.shares = shares;
  for (int64_t part = parts; part-- > 0;) (bf16 ? kernels.grad_bf16 : kernels.grad_f32)(&g, part, parts);
  for (int64_t i = 0; i < kinds * taps * channels; ++i) {
    const int64_t c = i % channels, t = i / channels % taps, kind = i / channels / taps;
    double want = 0, scale = 0, got = 0;
    for (int64_t s = 0; s < shares; ++s) got += sums[s * kinds * taps * channels + i];
    for (int64_t n = 0; n < batch; ++n) {
      for (const int32_t p : members[kind]) {
        const int32_t row = index[p * stride + t];
        if (row < 0) continue;
        const double product = double(x[(n * rows_in + row) * channels + c]) * z[(n * positions + p) * channels + c];
        want += product, scale += std::abs(product);
      }
    }
    compare(name, got, want, scale, 2e-6);
  }
}

// ---------------------------------------------------------------- arguments that no caller should pass

int refused = 0, taken = 0;

template <class Check>
bool passes(const Check& check) {
  try {
    check();
  } catch (const std::runtime_error& refusal) {
    if (std::strchr(refusal.what(), '\n') != nullptr) compare("a refusal of one line", 1, 0, 0, 0);
    ++refused;
    return false;
  }
  ++taken;
  return true;
}

// a table in a heap block of exactly its size
struct Entries {
  explicit Entries(const std::vector<int32_t>& v) : data(new int32_t[v.size()]), table(data.get(), v.size()) {
    std::copy(v.begin(), v.end(), data.get());
  }
  std::unique_ptr<int32_t[]> data;
  Table table;
};

// one entry too many or too few, another value, a value that is there already
void spoil(std::vector<int32_t>& v, int32_t limit) {
  const size_t at = v.empty() ? 0 : generator() % v.size();
  switch (generator() % 5) {
    case 0: v.push_back(int32_t(generator() % 3) - 1); break;
    case 1: if (!v.empty()) v.pop_back(); break;
    case 2: if (!v.empty()) v[at] = v[generator() % v.size()]; break;
    default:
      if (!v.empty()) v[at] = int32_t(pick({-2, -1, 0, limit - 1, limit, 2 * limit, kInt32Max, INT32_MIN}));
  }
}

// Whatever the checks let through stays inside its arrays, and leaves no output unwritten.
void check_spoilt(const std::string& name, const ForwardKernels& kernels, bool bf16) {
  Case c = generator() % 2 ? random_case() : shifted_case();
  c.in_per = pick({1, 3, 17}), c.out_per = pick({1, 15, 33}), c.batch = pick({1, 2});
  const int64_t out = c.out(), rows_out = c.rows.size();
  for (int64_t times = generator() % 3; times > 0; --times) {
    switch (generator() % (c.shifts.empty() ? 4 : 8)) {
      case 0: spoil(c.index, c.rows_in); break;
      case 1: spoil(c.rows, rows_out); break;
      case 2: spoil(c.tap_list, c.taps); break;
      case 3: spoil(c.sizes, rows_out); break;
      default: spoil(c.shifts, pick({c.rows_in, rows_out, c.taps}));
    }
  }
  Entries index(c.index), rows(c.rows), taps(c.tap_list), sizes(c.sizes), shifts(c.shifts);
  GatherGemm g{};
  g.batch = c.batch, g.rows_in = c.rows_in, g.rows_out = rows_out;
  g.in_channels = c.in(), g.out_channels = out, g.channel_groups = c.groups, g.num_taps = c.taps;
  if (!passes([&] { check_tables(g, index.table, rows.table, taps.table, sizes.table); })) return;
  if (!c.shifts.empty() && !passes([&] { check_shifts(g, shifts.table); })) return;
  Array x(c.batch * c.rows_in * c.in(), bf16), weight(out * c.in_per * c.taps, bf16);
  Array result(c.batch * rows_out * out, bf16, false);
  Array packed(kernels.packed_size(out, c.in_per, c.taps, c.groups), kernels.packs_bf16, false);
  const Weight w{weight.bytes.get(), c.groups, c.out_per, c.in_per, c.taps, c.out_per * c.in_per * c.taps,
                 c.in_per * c.taps,  c.taps,   1};
  kernels.pack(&w, packed.bytes.get(), 0, 1);
  g.x = x.bytes.get(), g.weight = packed.bytes.get(), g.out = result.bytes.get();
  const Cut cut = kernels.cut(&g, pick({1, 3}));
  for (int64_t part = cut.outputs * cut.positions; part-- > 0;) kernels.run(&g, cut, part);
  for (int64_t i = 0; i < result.count; ++i) {
    if (std::isnan(result[i])) compare(name + " left unwritten", result[i], 0, 0, 0);
  }
}

// sizes near every limit: what passes has a packed size and offsets that 64 bits hold
void check_sizes(const Kernels& kernels) {
  const auto size = [] {
    const int64_t power = int64_t{1} << generator() % 63;
    return pick({0, 1, 3, power, power - 1, power + 1, -power, kInt32Max, std::numeric_limits<int64_t>::max(),
                 std::numeric_limits<int64_t>::min()});
  };
  const int64_t outputs = size(), channels = size(), taps = size(), groups = pick({1, 1, 2, size()});
  if (passes([&] { check_weight(outputs, channels, taps, groups); })) {
    const double values = double(outputs) * channels * taps;
    for (const ForwardKernels* forward : {&kernels.f32, &kernels.bf16}) {
      const double packed = forward->packed_size(outputs, channels, taps, groups);
      if (packed < values || packed > 4e18) compare("a packed size", packed, values, 0, 0);
    }
    const double words = kernels.binary.packed_words(outputs, channels, taps, groups);
    if (words * 32 < values || words > 4e18) compare("packed words", words, values / 32, 0, 0);
  }
  const int64_t batch = size(), height = size(), width = size();
  if (passes([&] { check_map("x", batch, channels, height, width); })) {
    const double values = double(batch) * channels * height * width;
    if (values < 0 || values > 2e18 || height * width > kInt32Max) compare("a map's size", values, 0, 0, 0);
  }
  if (passes([&] { check_output({height, width}, batch, channels); }) && double(height) * width > kInt32Max) {
    compare("an output's size", double(height) * width, 0, 0, 0);
  }
}

// A random program on a real arena: what passes never reads what no step wrote, and writes every output.
void check_flow() {
  const int64_t count = pick({2, 3, 6}), arena = 12;
  std::vector<int64_t> kinds, from, length;
  std::vector<std::vector<int>> own;  // what an input or output holds; 0 is nothing
  std::vector<int> shared(arena, 0);
  Flow flow;
  for (int64_t i = 0; i < count; ++i) {
    kinds.push_back(i == 0 ? Flow::kInput : pick({Flow::kScratch, Flow::kScratch, Flow::kOutput}));
    from.push_back(generator() % 3 * 4);
    length.push_back(pick({0, 2, 4}));
    own.emplace_back(length[i], kinds[i] == Flow::kInput);
    flow.add(kinds[i], from[i], length[i]);
  }
  const auto at = [&](int64_t map) { return kinds[map] == Flow::kScratch ? &shared[from[map]] : own[map].data(); };
  int64_t steps = pick({1, 2, 5}), step = 0;
  // what is written holds its step and its map, so that a map which is read holds one value
  const bool passed = passes([&] {
    std::vector<int> holds(count, 0);
    holds[0] = 1;
    for (; step < steps; ++step) {
      const auto any = [&] { return int64_t(generator() % count); };
      const int64_t x = any(), residual = generator() % 2 ? any() : -1, out = generator() % 4 ? any() : -1;
      const int64_t out2 = generator() % 4 == 0 || out < 0 ? any() : -1;
      flow.step(step, x, residual, out, out2, generator() % 2);
      for (const int64_t map : {x, residual}) {
        for (int64_t i = 0; map >= 0 && i < length[map]; ++i) {
          if (at(map)[i] == 0 || at(map)[i] != holds[map]) compare("a map that is read", at(map)[i], holds[map], 0, 0);
        }
      }
      for (const int64_t map : {out, out2}) {
        if (map < 0) continue;
        holds[map] = int(100 * (step + 1) + map);
        std::fill(at(map), at(map) + length[map], holds[map]);
      }
    }
    flow.end();
  });
  for (int64_t map = 0; passed && map < count; ++map) {
    if (kinds[map] != Flow::kOutput) continue;
    for (const int value : own[map]) compare("an output that is written", value != 0, 1, 0, 0);
  }
}

// every second option missing at random; what has to be written holds NaN before
void check_pointwise(const std::string& name, const PointwiseKernels& kernels, bool bf16) {
  const int64_t rows = pick({0, 1, 5, 40}), channels = pick({1, 3, 15, 16, 17, 64, 100}), parts = pick({1, 2, 5});
  const int64_t added = pick({0, 1, (channels + 1) / 2, channels});
  Array x(rows * channels, bf16), residual(rows * added, bf16), result(rows * channels, bf16, false);
  Array scale(channels, false), shift(channels, false), slope(channels, false);
  Pointwise g{};
  g.x = x.bytes.get();
  g.scale = generator() % 2 ? scale.floats() : nullptr;
  g.shift = generator() % 2 ? shift.floats() : nullptr;
  g.residual = added > 0 ? residual.bytes.get() : nullptr;
  g.out = result.bytes.get();
  g.rows = rows;
  g.channels = channels;
  g.residual_channels = added;
  g.activation = generator() % kActivations;
  if (g.activation == kLeaky) g.slope = slope.floats();
  for (int64_t part = parts; part-- > 0;) (bf16 ? kernels.bf16 : kernels.f32)(&g, part, parts);
  for (int64_t i = 0; i < result.count; ++i) {
    const int64_t c = i % channels, row = i / channels;
    double sum = x[i];
    if (g.scale) sum *= scale[c];
    if (g.shift) sum += shift[c];
    if (c < added) sum += residual[row * added + c];
    const double want = activated(sum, g.activation, slope[c]);
    compare(name, result[i], want, 1 + std::abs(sum), bf16 ? 0.02 : 2e-5);
  }
}

void check_norm(const std::string& name, const NormKernels& kernels, bool bf16) {
  const int64_t rows = pick({2, 5, 40, 130}), channels = pick({1, 3, 15, 16, 17, 20, 48, 64, 100}), parts = pick({1, 2, 5});
  const int64_t size = rows * channels;
  const double tolerance = bf16 ? 1e-2 : 1e-5, eps = 1e-3, far = pick({0, 0, 1000});
  const bool added = pick({0, 1}) == 1, from_output = pick({0, 1}) == 1;
  Array x(size, bf16), residual(size, bf16), grad(size, bf16), y(size, bf16, false), joined(size, bf16, false);
  Array out(size, bf16, false);
  for (int64_t i = 0; i < size; ++i) x.set(i, static_cast<float>(x[i] + far));
  Array mean(channels, false), scale(channels, false), shift(channels, false), slope(channels, false);
  Array offset(channels, false);
  NormAct g{};
  g.x = x.bytes.get();
  g.residual = added ? residual.bytes.get() : nullptr;
  g.out = y.bytes.get();
  g.rows = rows;
  g.channels = channels;
  g.chunk = pick({1, 7, 32});
  g.activation = static_cast<int32_t>(pick({kNone, kRelu, kRelu6}));
  Array partial(2 * norm_chunks(g) * channels, false, false);
  g.partial = partial.floats();
  g.mean = mean.floats(), g.scale = scale.floats(), g.shift = shift.floats();
  g.slope = slope.floats(), g.offset = offset.floats();
  const auto run = [&](auto kernel) {
    for (int64_t part = parts; part-- > 0;) kernel(&g, part, parts);
  };
  run(kernels.sums);
  const ChannelSums moments = join_moments(g);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0, squares = 0;
    for (int64_t r = 0; r < rows; ++r) sum += x[r * channels + c];
    for (int64_t r = 0; r < rows; ++r) squares += std::pow(x[r * channels + c] - sum / rows, 2);
    compare(name + " mean", moments.first[c], sum / rows, far, 1e-6);
    // means of chunks are rounded to float32
    compare(name + " variance", moments.second[c], squares / rows, squares / rows, far > 0 ? 3e-4 : 1e-5);
    mean.set(c, static_cast<float>(moments.first[c]));
    scale.set(c, static_cast<float>(normal() / std::sqrt(moments.second[c] + eps)));
  }
  run(kernels.apply);
  const auto z_of = [&](int64_t i) { return (double{x[i]} - mean[i % channels]) * scale[i % channels] + shift[i % channels]; };
  for (int64_t i = 0; i < size; ++i) {
    const double z = z_of(i) + (added ? residual[i] : 0);
    compare(name + " apply", y[i], activated(z, g.activation, 0), std::abs(z), tolerance);
  }
  // backward: from the output of the pass above, or from x, where that had no shortcut
  if (from_output || added) {
    g.y = y.bytes.get();
    g.joined = joined.bytes.get();
  }
  g.grad = grad.bytes.get();
  g.out = out.bytes.get();
  run(kernels.reduce);
  const ChannelSums sums = join_sums(g);
  run(kernels.return_grad);
  std::vector<double> first(channels), second(channels), size_of(channels);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t c = i % channels;
    const double z = g.joined ? double{y[i]} : z_of(i), off = double{x[i]} - mean[c];
    // where rounding decides, either is right
    const bool near = !g.joined && g.activation != kNone && (std::abs(z) < 1e-4 || std::abs(z - 6) < 1e-4);
    const bool passes = g.activation == kNone || (z > 0 && (g.activation == kRelu || z < 6));
    const double d = passes ? double{grad[i]} : 0;
    if (g.joined) compare(name + " joined", joined[i], d, 0, 0);
    first[c] += d, second[c] += d * off, size_of[c] += std::abs(double{grad[i]}) * (1 + std::abs(off));
    if (near) size_of[c] = std::numeric_limits<double>::infinity();
    const double want = d * scale[c] + off * slope[c] + offset[c] + (added ? residual[i] : 0);
    if (!near) compare(name + " return", out[i], want, std::abs(want) + std::abs(off * slope[c]), tolerance);
  }
  for (int64_t c = 0; c < channels; ++c) {
    compare(name + " sum", sums.first[c], first[c], size_of[c], 1e-5);
    compare(name + " product", sums.second[c], second[c], size_of[c], 1e-5);
  }
}

void check_border(const std::string& name, const Kernels& kernels) {
  const int64_t batch = pick({0, 1, 3}), rows = pick({1, 2, 15, 16, 17, 33}), columns = pick({1, 3, 16, 31, 48});
  const int64_t parts = pick({1, 2, 5}), size = rows * columns;
  Border g{};
  g.turn = generator() % 2;
  g.from_bf16 = generator() % 2;
  g.to_bf16 = generator() % 2;
  Array from(batch * size, g.from_bf16), to(batch * size, g.to_bf16, false);
  if (from.count > 0) from.set(0, std::nanf("")), from.set(from.count - 1, -INFINITY);
  g.from = from.bytes.get();
  g.to = to.bytes.get();
  g.batch = batch;
  g.rows = rows;
  g.columns = columns;
  for (int64_t part = parts; part-- > 0;) kernels.cross_border(&g, part, parts);
  for (int64_t i = 0; i < from.count; ++i) {
    const int64_t image = i / size, row = i % size / columns, column = i % columns;
    const int64_t place = g.turn ? image * size + column * rows + row : i;
    const float want = g.to_bf16 ? widen(narrow(from[i])) : from[i], got = to[place];
    if (got != want && !(std::isnan(got) && std::isnan(want))) compare(name, got, want, 0, -1);
  }
}

#include "check_int8.h"

}  // namespace

// hosts that do not say how many threads they have
void check_thread_count() {
  struct Fake {
    int64_t threads, lonely_calls;
  };
  const auto run = [](void* context, int64_t count, void (*body)(void*, int64_t), void* argument) {
    Fake& fake = *static_cast<Fake*>(context);
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      for (int64_t i; (i = next.fetch_add(1)) < count;) body(argument, i);
    };
    std::vector<std::thread> others;
    for (int64_t t = 1; t < fake.threads && fake.lonely_calls <= 0; ++t) others.emplace_back(work);
    --fake.lonely_calls;
    work();
    for (std::thread& other : others) other.join();
  };
  for (const int64_t threads : {1, 2, 3}) {
    int64_t found = 0;
    // on a busy machine a thread may come too late for every call
    for (int64_t attempt = 0; attempt < 100 && found < threads; ++attempt) {
      Fake fake{threads, 1};
      ThreadCount count(4);
      const Host host{1, &fake, run};
      compare("threads of a host whose others sleep", count.at_call(host), 1, 0, 0);
      for (int64_t call = 1; call <= 64; ++call) found = count.at_call(host);
    }
    compare("threads that come later", found, threads, 0, 0);
  }
  Fake fake{3, 0};
  ThreadCount one(1);
  compare("threads of a machine that has one", one.at_call(Host{1, &fake, run}), 1, 0, 0);
}

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 120;
  if (argc > 2) generator.seed(std::atoi(argv[2]));
  const auto differs = [](const std::string& what, double got, double want) { compare(what, got, want, 0, -1); };
  tile_checks::check_arithmetic(generator, differs);
  tile_checks::check_faults(differs);
  check_thread_count();
  std::istringstream names(available_isas());
  for (std::string name; std::getline(names, name, ',');) {
    const Kernels& kernels = *kernels_of(name);
    for (int i = 0; i < rounds; ++i) {
      const Case c = random_case();
      check_forward(name + " float32", kernels.f32, false, c);
      check_forward(name + " bfloat16", kernels.bf16, true, c);
      const Case narrow = depthwise_case();
      check_forward(name + " depthwise float32", kernels.f32, false, narrow);
      check_forward(name + " depthwise bfloat16", kernels.bf16, true, narrow);
      const Case few = few_case();
      check_forward(name + " few channels float32", kernels.f32, false, few);
      check_forward(name + " few channels bfloat16", kernels.bf16, true, few);
      check_bytes(name + " few channels int8", kernels.int8, few);
      const Case shifted = shifted_case();
      check_forward(name + " shifts bfloat16", kernels.bf16, true, shifted);
      check_bytes(name + " shifts int8", kernels.int8, shifted);
      const Case ordered = ordered_case();
      check_forward(name + " in order float32", kernels.f32, false, ordered);
      check_forward(name + " in order bfloat16", kernels.bf16, true, ordered);
      check_bytes(name + " in order int8", kernels.int8, ordered);
      if (i % 5 == 0) check_forward(name + " deep bfloat16", kernels.bf16, true, deep_case(i / 5));
      if (i % 10 == 5) {
        const int64_t before = std::exchange(scratch_limit, 0);
        check_bytes(name + " int8 without scratch", kernels.int8, i % 20 == 5 ? deep_case(i / 20) : c);
        check_forward(name + " bfloat16 without scratch", kernels.bf16, true, i % 20 == 5 ? deep_case(i / 20) : c);
        scratch_limit = before;
      }
      check_bytes(name + " int8", kernels.int8, c);
      check_bytes(name + " int8 depthwise", kernels.int8, narrow);
      if (i % 5 == 0) check_bytes(name + " int8 deep", kernels.int8, deep_case(i / 5));
      check_bytes_mean(name + " int8", kernels.int8.forward);
      check_bytes_around(name + " int8", kernels.int8);
      check_bytes_fill(name + " int8 fill", kernels.int8);
      check_released(name);
      if (i % 4 == 0) check_lookup(name, kernels.lookup);
      check_binary(name, kernels.binary, c);
      check_border(name + " border", kernels);
      if (i % 10 == 4) {
        const int64_t before = std::exchange(scratch_limit, i % 20 == 4 ? 0 : scratch_limit);
        check_grad(name + " wide", kernels.grad, true, wide_case());
        check_grad(name + " without scratch", kernels.grad, true, c);
        check_released(name);
        scratch_limit = before;
      }
      check_grad(name + " depthwise", kernels.grad, true, narrow);
      for (bool bf16 : {false, true}) {
        check_grad(name, kernels.grad, bf16, c);
        check_released(name);
        check_windows(name + " max", kernels.max, bf16, false);
        check_windows(name + " sum", kernels.sum, bf16, true);
        check_fill(name + " fill", kernels.fill, bf16);
        check_fill_grad(name + " fill's weight", kernels.fill, bf16);
        check_pointwise(name + " pointwise", kernels.pointwise, bf16);
        check_norm(name + " norm", bf16 ? kernels.norm_bf16 : kernels.norm_f32, bf16);
        check_mean(name, bf16 ? kernels.bf16 : kernels.f32, bf16);
        for (int n = 0; n < 5; ++n) check_spoilt(name, bf16 ? kernels.bf16 : kernels.f32, bf16);
      }
      for (int n = 0; n < 100; ++n) check_sizes(kernels), check_flow();
    }
    std::printf("%s: %d failures so far\n", name.c_str(), failures);
  }
#ifdef QX_TRAPS
  if (kernels_of("amx") == nullptr && kernels_of("avx512bf16") != nullptr) {
    const trap_tiles::Trap trap;
    for (int i = 0; i < rounds / 2; ++i) {
      check_forward("trapped amx", qx_bf16_amx, true, random_case());
      check_forward("trapped amx depthwise", qx_bf16_amx, true, depthwise_case());
      check_forward("trapped amx shifts", qx_bf16_amx, true, shifted_case());
      if (i % 10 == 0) check_forward("trapped amx deep", qx_bf16_amx, true, deep_case(i / 10));
      check_grad("trapped amx", qx_grad_amx, true, random_case());
      check_mean("trapped amx", qx_bf16_amx, true);
      check_spoilt("trapped amx", qx_bf16_amx, true);
      check_bytes("trapped amx int8", qx_int8_amx, random_case());
      check_bytes("trapped amx int8 depthwise", qx_int8_amx, depthwise_case());
      check_bytes("trapped amx int8 shifts", qx_int8_amx, shifted_case());
      check_bytes("trapped amx int8 few channels", qx_int8_amx, few_case());
      if (i % 10 == 0) check_bytes("trapped amx int8 deep", qx_int8_amx, deep_case(i / 10));
      check_bytes_mean("trapped amx int8", qx_int8_amx.forward);
      check_released("trapped amx");
    }
    std::printf("amx by its own instructions, each emulated: %d failures so far\n", failures);
  }
#endif
  std::printf("arguments that were refused: %d, that were taken: %d\n", refused, taken);
  return failures != 0;
}
