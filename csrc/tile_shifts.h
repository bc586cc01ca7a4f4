// The gather GEMM on tiles where taps are shifts (ops/shifts.py): a part's inputs are copied once in the order of the
// table's slots, and every tile of 16 outputs is read in place there, whatever the tap. tile_gemm.h is the general form:
// it copies a tile for each tap, but has no rows of a tile that nobody needs.
#pragma once

#include "tile_gemm.h"

namespace quincunx {
namespace QX_ISA {
namespace {

constexpr int64_t kMostRanges = kMostShiftClasses * kSliceTaps, kMostSegments = 64;
constexpr int64_t kLineTiles = 8;  // tiles of rows whose places are found together
// What a step of a tile takes, in products of a panel whose inputs lie in lines: one of copied tiles, which come from a
// farther cache; to copy a tile, and to copy a slot.
constexpr double kCopiedStep = 1.25, kTileCopy = 1.5, kSlotCopy = 0.1;

// A part of an image's outputs, for all classes: positions [first, last).
struct Segment {
  int64_t image, first, last;
};

// The table, and how a part's slots lie in memory: pieces of the slots, each as many as `length` outputs read.
struct ShiftPlan {
  struct Class {
    int64_t taps, count;
    const int32_t *tap, *offset, *row;
  };
  struct Range {
    int64_t first, last, place;  // slots [first, last + reach), from slot `place` of the memory on
  };
  Class classes[kMostShiftClasses];
  int64_t num_classes, num_slots, apart, longest = 0, reach = 0, slots_used = 0, num_ranges = 0;
  const int32_t* slots;
  Range ranges[kMostRanges];

  explicit ShiftPlan(const GatherGemm& g) {
    const int32_t *head = g.shifts, *sizes = head + kShiftHead, *body = sizes + 2 * head[0];
    num_classes = head[0];
    num_slots = head[1];
    apart = head[2];
    for (int64_t c = 0; c < num_classes; ++c) {
      Class& own = classes[c];
      own.taps = sizes[2 * c];
      own.count = sizes[2 * c + 1];
      own.tap = body;
      own.offset = body + own.taps;
      own.row = own.offset + own.taps;
      body = own.row + own.count;
      longest = most(longest, own.count);
    }
    slots = body;
  }

  // what outputs [q, q + positions) of every class read, whatever q, and as many slots more as the last step reads
  void cover(int64_t positions, int64_t joined) {
    reach = apart * (positions - 1) + joined;
    num_ranges = 0;
    for (int64_t c = 0; c < num_classes; ++c) {
      for (int64_t t = 0; t < classes[c].taps; ++t) add(classes[c].offset[t]);
    }
    slots_used = 0;
    for (int64_t r = 0; r < num_ranges; ++r) {
      ranges[r].place = slots_used;
      slots_used += ranges[r].last - ranges[r].first + reach;
    }
    slots_used += (apart + 1) * kTileHeight;  // what the last tile has too many, and the last row of it
  }
  QX_INLINE int64_t place_of(int64_t offset) const {
    for (int64_t r = 0;; ++r) {
      if (offset <= ranges[r].last) return ranges[r].place + offset - ranges[r].first;
    }
  }

 private:
  // keeps ranges apart and in order
  void add(int64_t offset) {
    int64_t r = 0;
    while (r < num_ranges && ranges[r].last + reach < offset) ++r;
    if (r == num_ranges || offset + reach < ranges[r].first) {
      for (int64_t i = num_ranges++; i > r; --i) ranges[i] = ranges[i - 1];
      ranges[r] = Range{offset, offset, 0};
      return;
    }
    ranges[r].first = least(ranges[r].first, offset);
    ranges[r].last = most(ranges[r].last, offset);
    if (r + 1 < num_ranges && ranges[r].last + reach >= ranges[r + 1].first) {
      ranges[r].last = most(ranges[r].last, ranges[r + 1].last);
      --num_ranges;
      for (int64_t i = r + 1; i < num_ranges; ++i) ranges[i] = ranges[i + 1];
    }
  }
};

// The steps of a class: a tap each, or taps whose slots follow each other.
struct ShiftSteps {
  int64_t count = 0;
  int64_t order[kSliceTaps];  // the class's taps, by their slots where they are joined
  int64_t first[kSliceTaps], taps[kSliceTaps], leading[kSliceTaps];  // leading: those of the step before, not multiplied again

  ShiftSteps(const ShiftPlan::Class& c, int64_t joined) {
    for (int64_t t = 0; t < c.taps; ++t) {
      int64_t at = t;
      for (; joined > 1 && at > 0 && c.offset[order[at - 1]] > c.offset[t]; --at) order[at] = order[at - 1];
      order[at] = t;
    }
    for (int64_t t = 0; t < c.taps;) {
      int64_t run = 1;
      while (t + run < c.taps && c.offset[order[t + run]] == c.offset[order[t]] + run) ++run;
      for (int64_t at = 0; at < run; at += joined, ++count) {
        // a step that would reach beyond its run starts before it
        const int64_t back = least(at, most(0, at + joined - run));
        first[count] = t + at - back;
        leading[count] = back;
        taps[count] = least(joined, run - at) + back;
      }
      t += run;
    }
  }
};

// Remembers whether a value that was copied is not finite: weights of 0 do not make up for those.
template <class Input, int BYTES>
struct Finite {
  typedef Input Type __attribute__((vector_size(BYTES)));
  Type infinite{};
  QX_INLINE void see(const char* copied) {
    if constexpr (sizeof(Input) == 2) {
      Type values;
      __builtin_memcpy(&values, copied, BYTES);
      infinite |= reinterpret_cast<Type>((values & 0x7f80) == 0x7f80);
    }
  }
  QX_INLINE bool all() const {
    Input any = 0;
    for (int i = 0; i < BYTES / int(sizeof(Input)); ++i) any |= infinite[i];
    return any == 0;
  }
};

template <class K>
struct Slots {
  typedef typename K::Input Input;
  const GatherGemm& g;
  const ShiftPlan& plan;
  const TileDepth<K>& depth;
  const int64_t pitch;
  const char* outside;

  // copy(from, to, missing) for each slot of the segment
  template <class Copy>
  QX_INLINE void each(const Segment& segment, char* memory, const Copy& copy) const {
    const int64_t row_bytes = g.in_channels * int64_t{sizeof(Input)};
    const char* image = static_cast<const char*>(g.x) + segment.image * g.rows_in * row_bytes;
    for (int64_t r = 0; r < plan.num_ranges; ++r) {
      const ShiftPlan::Range& range = plan.ranges[r];
      // weights of 0 do not make up for what memory may hold
      const int64_t last = range.last + plan.apart * (segment.last - 1) + depth.joined;
      char* to = memory + range.place * pitch;
      for (int64_t slot = range.first + plan.apart * segment.first; slot < last; ++slot, to += pitch) {
        const int64_t row = slot < plan.num_slots ? plan.slots[slot] : -1;
        copy(row < 0 ? outside : image + row * row_bytes, to, row < 0);
      }
    }
  }
  // of fewer channels than a tile's row has; returns whether all values are finite
  template <int BYTES>
  bool narrow(const Segment& segment, char* memory) const {
    typedef Piece<Input, BYTES> P;
    typename P::Type kept;
    P::mask(g.in_channels, kept);
    const uintptr_t end = the_end();
    const int64_t channels = g.in_channels;
    Finite<Input, BYTES> finite;
    each(segment, memory, [&](const char* from, char* to, bool) __attribute__((always_inline)) {
      P::copy(from, to, channels, kept, end);
      finite.see(to);
    });
    return finite.all();
  }
  void wide(const Segment& segment, char* memory) const {
    typedef Piece<Input, kTileBytes> P;
    typedef typename P::Loose Loose;
    const int64_t lines = g.in_channels / kStepChannels<K>, left = g.in_channels % kStepChannels<K>;
    const uintptr_t end = the_end();
    typename P::Type kept;
    P::mask(left, kept);
    each(segment, memory, [&](const char* from, char* to, bool missing) __attribute__((always_inline)) {
      const int64_t step = missing ? 0 : kTileBytes;
      for (int64_t line = 0; line < lines; ++line, from += step, to += kTileBytes) {
        *reinterpret_cast<Loose*>(to) = *reinterpret_cast<const Loose*>(from);
      }
      if (left) P::copy(from, to, left, kept, end);
    });
  }
  bool copy(const Segment& segment, char* memory) const {
    switch (pitch) {
      case 4: return narrow<4>(segment, memory);
      case 8: return narrow<8>(segment, memory);
      case 16: return narrow<16>(segment, memory);
      case 32: return narrow<32>(segment, memory);
      default: wide(segment, memory); return true;
    }
  }
  // whether the values of an image are
  bool finite(int64_t image) const {
    const int64_t values = g.rows_in * g.in_channels;
    const Input* map = static_cast<const Input*>(g.x) + image * values;
    Input infinite = 0;
    for (int64_t i = 0; i < values; ++i) infinite |= (map[i] & 0x7f80) == 0x7f80;
    return infinite == 0;
  }
  uintptr_t the_end() const {
    return reinterpret_cast<uintptr_t>(static_cast<const Input*>(g.x) + g.batch * g.rows_in * g.in_channels);
  }
};

// Where the rows of a tile lie in a map of so many rows and channels, -1 for what nobody needs.
QX_INLINE void set_places(int64_t image, int64_t map_rows, int64_t channels, const int32_t* rows, int64_t count,
                          int64_t* to) {
  constexpr int64_t kRows = 8;
  typedef int32_t Rows __attribute__((vector_size(4 * kRows)));
  typedef int32_t LooseRows __attribute__((vector_size(4 * kRows), aligned(4), may_alias));
  typedef int64_t Places __attribute__((vector_size(8 * kRows)));
  typedef int64_t LoosePlaces __attribute__((vector_size(8 * kRows), aligned(8), may_alias));
  int32_t buffer[kTileHeight];
  if (count < kTileHeight) {
    for (int64_t r = 0; r < kTileHeight; ++r) buffer[r] = r < count ? rows[r] : -1;
    rows = buffer;
  }
  const int64_t first = image * map_rows * channels;
  for (int64_t r = 0; r < kTileHeight; r += kRows) {
    const Rows own = *reinterpret_cast<const LooseRows*>(rows + r);
    const Places wide = __builtin_convertvector(own, Places), place = wide * channels + first;
    *reinterpret_cast<LoosePlaces*>(to + r) = place | (wide < 0);
  }
}
QX_INLINE void set_rows(const GatherGemm& g, int64_t image, const int32_t* rows, int64_t count, int64_t* place,
                        int64_t* residual) {
  set_places(image, g.rows_out, g.out_channels, rows, count, place);
  if (!g.residual) return;
  if (!g.residual_rows) return set_places(image, g.residual_size, g.residual_channels, rows, count, residual);
  for (int64_t r = 0; r < count; ++r) {
    if (rows[r] < 0) continue;
    residual[r] = (image * g.residual_size + g.residual_rows[rows[r]]) * g.residual_channels;
  }
}

// How long the outputs of a segment are: as long as they fit, and short enough for as many parts as are asked for.
// The plan covers them then; 0 where not even a few fit.
int64_t segment_length(ShiftPlan& plan, int64_t joined, int64_t batch, int64_t parts, int64_t slots) {
  const int64_t wanted = ceil_div(ceil_div(plan.longest, ceil_div(parts, most(1, batch))), kPairRows) * kPairRows;
  for (int64_t length = most(wanted, kPairRows);; length = ceil_div(length / 2, kPairRows) * kPairRows) {
    plan.cover(length, joined);
    if (plan.slots_used <= slots) return length;
    if (length == kPairRows) return 0;
  }
}

template <class K>
int64_t slot_pitch(const GatherGemm& g, const TileDepth<K>& depth) {
  if (depth.joined > 1) return depth.unit * int64_t{sizeof(typename K::Input)};
  const int64_t bytes = depth.blocks * kTileBytes;
  // an odd number of lines, so that neighbours fall into different sets of a cache
  return bytes % (2 * kTileBytes) ? bytes : bytes + kTileBytes;
}

// Whether tiles in lines take less time than copied ones, of which there are fewer.
template <class K>
bool shifts_pay(const GatherGemm& g, const ShiftPlan& plan, const Cut& cut) {
  const TileDepth<K> depth(g.in_channels, g.num_taps);
  double in_lines = 0, copied = 0;
  for (int64_t c = 0; c < plan.num_classes; ++c) {
    const ShiftSteps steps(plan.classes[c], depth.joined);
    if (steps.count > kSliceTaps / 2 && depth.joined > 1) return false;
    in_lines += double(g.batch * ceil_div(plan.classes[c].count, kTileHeight) * steps.count);
  }
  for (int64_t i = 0; i < g.num_groups; ++i) {
    copied += double(ceil_div(g.batch * g.groups[2 * i], kTileHeight) * depth.inner(g.groups[2 * i + 1]));
  }
  const double panels = double(ceil_div(ceil_div(g.out_channels, kTileOutputs * kPanelTiles), cut.outputs));
  return in_lines * panels + kSlotCopy * double(g.batch * plan.num_slots) <
         copied * (kCopiedStep * panels + kTileCopy * double(depth.joined));
}

template <class K>
struct ShiftRun {
  const GatherGemm& g;
  const ShiftPlan& plan;
  const TileDepth<K> depth;
  const int64_t pitch;
  char *joint, *copies;
  const char* weights[kSliceTaps];
  InPlace in_place{};
  typename K::Start start;
  alignas(64) typename K::Sum sums[kMostTiles * kTileHeight * kTileOutputs];

  ShiftRun(const GatherGemm& problem, const ShiftPlan& shifts, char* weight_memory, char* memory, int64_t bytes)
      : g(problem), plan(shifts), depth(problem.in_channels, problem.num_taps), pitch(slot_pitch<K>(problem, depth)),
        joint(weight_memory), copies(memory) {
    in_place.map = Area{memory, memory + bytes};
    in_place.stride = plan.apart * pitch;
    in_place.weights = weights;
    in_place.outer = depth.blocks;
  }

  // Panels [first, last) of the segments' outputs.
  void run(const Segment* segments, int64_t count, int64_t first, int64_t last) {
    const int64_t tiles = ceil_div(g.out_channels, kTileOutputs);
    const int64_t weight_bytes = tiles * depth.steps() * kTileSize;
    // near weights are read again for a few tiles, whose inputs and outputs then stay in the first cache
    const bool near = depth.joined == 1 && weight_bytes <= level2_bytes() / 2;
    const int64_t together = near ? most(1, last - first) : 1;
    for (int64_t panel = first; panel < last; panel += together) {
      for (int64_t c = 0; c < plan.num_classes; ++c) run_class(plan.classes[c], segments, count, panel, panel + together);
    }
  }

 private:
  // Tiles of outputs whose sources and rows are found once for all panels.
  struct Chunk {
    int64_t tiles = 0;
    const char* rows[kLineTiles][kSliceTaps];
    int64_t place[kLineTiles * kTileHeight], residual[kLineTiles * kTileHeight];
  };

  void run_class(const ShiftPlan::Class& c, const Segment* segments, int64_t count, int64_t first, int64_t last) {
    const ShiftSteps steps(c, depth.joined);
    int64_t offsets[kSliceTaps];  // of the steps, in bytes
    for (int64_t s = 0; s < steps.count; ++s) {
      offsets[s] = plan.place_of(c.offset[steps.order[steps.first[s]]]) * pitch;
    }
    // of several panels each chunk finds its own
    if (last - first == 1) find_weights(c, steps, first);
    chunk.tiles = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Segment& segment = segments[i];
      const char* base = copies + i * plan.slots_used * pitch;
      for (int64_t q = segment.first; q < least(segment.last, c.count); q += kTileHeight) {
        const char* own = base + (q - segment.first) * in_place.stride;
        for (int64_t s = 0; s < steps.count; ++s) {
          chunk.rows[chunk.tiles][s] = own + offsets[s];
        }
        set_rows(g, segment.image, c.row + q, least(kTileHeight, c.count - q), chunk.place + chunk.tiles * kTileHeight,
                 chunk.residual + chunk.tiles * kTileHeight);
        if (++chunk.tiles == kLineTiles) multiply_chunk(c, steps, first, last);
      }
    }
    if (chunk.tiles) multiply_chunk(c, steps, first, last);
  }

  void multiply_chunk(const ShiftPlan::Class& c, const ShiftSteps& steps, int64_t first, int64_t last) {
    const int64_t tiles = ceil_div(g.out_channels, kTileOutputs);
    in_place.inner = steps.count;
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t width = panel_width(tiles, panel), o = panel * kPanelTiles * kTileOutputs;
      const int64_t outputs = least(width * kTileOutputs, g.out_channels - o), high = kMostTiles / width;
      const typename K::End e = K::end(g, o, outputs);
      const bool full = outputs == width * kTileOutputs && K::full(e);
      if (last - first > 1) find_weights(c, steps, panel);
      for (int64_t tile = 0; tile < chunk.tiles; tile += high) {
        const int64_t height = least(high, chunk.tiles - tile);
        for (int64_t i = 0; i < height; ++i) in_place.rows[i] = chunk.rows[tile + i];
        kMultiplyInPlace<K>[width][height](
            in_place, start,
            Outputs<K>{sums, width * kTileOutputs, e, chunk.place + tile * kTileHeight,
                       chunk.residual + tile * kTileHeight, height * kTileHeight, full});
      }
    }
    chunk.tiles = 0;
  }

  // The weights of a class's steps, of joined taps side by side, and what their sums start with.
  void find_weights(const ShiftPlan::Class& c, const ShiftSteps& steps, int64_t number) {
    const int64_t tiles = ceil_div(g.out_channels, kTileOutputs), width = panel_width(tiles, number);
    const int64_t step_bytes = width * kTileSize, tap_bytes = depth.unit / K::kTogether * kTileBytes;
    const char* packed = static_cast<const char*>(g.weight);
    const char* more = packed + tiles * depth.steps() * kTileSize;
    const char* panel = packed + number * kPanelTiles * depth.steps() * kTileSize;
    start.find(g, more, c.tap, c.taps, number * kPanelTiles * kTileOutputs, tiles * kTileOutputs, width);
    in_place.weight_area = depth.joined == 1 ? Area{packed, more} : Area{joint, joint + kJointBytes};
    in_place.weights_advance = depth.joined == 1 ? depth.taps * step_bytes : 0;
    for (int64_t s = 0; s < steps.count; ++s) {
      if (depth.joined == 1) {
        weights[s] = panel + c.tap[steps.order[steps.first[s]]] * step_bytes;
        continue;
      }
      char* to = joint + s * step_bytes;
      weights[s] = to;
      __builtin_memset(to, 0, step_bytes);
      for (int64_t j = steps.leading[s]; j < steps.taps[s]; ++j) {
        const int64_t tap = c.tap[steps.order[steps.first[s] + j]];
        const char* from = panel + tap / depth.joined * step_bytes + tap % depth.joined * tap_bytes;
        for (int64_t n = 0; n < width; ++n) {
          __builtin_memcpy(to + n * kTileSize + j * tap_bytes, from + n * kTileSize, tap_bytes);
        }
      }
    }
  }

  Chunk chunk;
};

// Whether a step multiplies a slot by weights of 0: one that its outputs need nothing of, or that another step has
// multiplied. An infinite value would become none.
template <class K>
bool reads_more(const ShiftPlan& plan, int64_t joined) {
  for (int64_t c = 0; joined > 1 && c < plan.num_classes; ++c) {
    const ShiftSteps steps(plan.classes[c], joined);
    for (int64_t s = 0; s < steps.count; ++s) {
      if (steps.taps[s] < joined || steps.leading[s] > 0) return true;
    }
  }
  return false;
}

// The same for some of the images; all maps have one type.
template <class Input>
GatherGemm images_of(const GatherGemm& g, int64_t first, int64_t count) {
  const auto from = [first](const void* map, int64_t rows, int64_t channels) {
    return map ? const_cast<Input*>(static_cast<const Input*>(map)) + first * rows * channels : nullptr;
  };
  GatherGemm some = g;
  some.batch = count;
  some.x = from(g.x, g.rows_in, g.in_channels);
  some.residual = from(g.residual, g.residual_size, g.residual_channels);
  some.out = from(g.out, g.rows_out, g.out_channels);
  some.out2 = from(g.out2, g.rows_out, g.out_channels);
  return some;
}

// The outputs of one part; false if it has to be computed in the general form. memory: of `bytes`, behind kJointBytes
template <class K>
bool run_shifted(const GatherGemm& g, Cut cut, int64_t part, char* joint, int64_t bytes) {
  typedef typename K::Input Input;
  ShiftPlan plan(g);
  if (!shifts_pay<K>(g, plan, cut)) return false;
  alignas(64) Input outside[kStepChannels<K>];
  for (Input& number : outside) number = K::outside(g);
  ShiftRun<K> run(g, plan, joint, joint + kJointBytes, bytes);
  const int64_t length = segment_length(plan, run.depth.joined, g.batch, cut.positions, bytes / run.pitch);
  if (length == 0) return false;
  const int64_t together = most(1, least(kMostSegments, bytes / run.pitch / plan.slots_used));
  const int64_t each = ceil_div(plan.longest, length), units = g.batch * each, number = part / cut.outputs;
  const int64_t panels = ceil_div(ceil_div(g.out_channels, kTileOutputs), kPanelTiles), po = part % cut.outputs;
  const int64_t first = units * number / cut.positions, last = units * (number + 1) / cut.positions;
  const Slots<K> slots{g, plan, run.depth, run.pitch, reinterpret_cast<const char*>(outside)};
  const bool strict = !K::kZerosSuffice && reads_more<K>(plan, run.depth.joined);
  // Whole images with values that are not finite, in the general form.
  const auto in_general = [&](int64_t image, int64_t count) {
    tile_run_in<K>(images_of<Input>(g, image, count), Cut{cut.outputs, 1}, po, joint, bytes);
    TileUnit::configure(kFullTiles);
  };
  TileUnit::configure(kFullTiles);
  int64_t known = 0;  // images before it, from the part's first on, are finite
  for (int64_t unit = first; unit < last;) {
    const int64_t image = unit / each;
    int64_t end = last;
    if (strict && each > 1) {
      end = least(last, (image + 1) * each);
      if (image >= known && !slots.finite(image)) {
        // every part that has some of the image finds the same; the one that has its first segment computes it
        if (unit % each == 0) in_general(image, 1);
        unit = end;
        continue;
      }
      known = image + 1;
    }
    Segment segments[kMostSegments];
    const int64_t count = least(together, end - unit);
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (unit + i) % each * length;
      segments[i] = Segment{(unit + i) / each, at, least(plan.longest, at + length)};
      finite &= slots.copy(segments[i], run.copies + i * plan.slots_used * run.pitch);
    }
    if (strict && !finite && each == 1) {
      in_general(unit, count);
    } else {
      run.run(segments, count, panels * po / cut.outputs, panels * (po + 1) / cut.outputs);
    }
    unit += count;
  }
  TileUnit::release();
  return true;
}

template <class K>
void tile_run(const GatherGemm* g, Cut cut, int64_t part) {
  if (!g->weight) return K::mean(*g, cut, part);
  // half of the second-level cache for copied inputs, the rest for weights and maps
  const int64_t copy_bytes = least(level2_bytes() / 2, Scratch::kMost - kJointBytes);
  const Scratch memory(kJointBytes + copy_bytes);
  const bool in_lines = g->shifts && g->channel_groups == 1 && g->num_taps > 1;
  if (in_lines && run_shifted<K>(*g, cut, part, memory.data, copy_bytes)) return;
  tile_run_in<K>(*g, cut, part, memory.data, copy_bytes);
}

template <class K>
constexpr ForwardKernels tile_kernels() {
  return ForwardKernels{sizeof(typename K::Input) == 2, &tile_packed_size<K>, &tile_pack<K>, &tile_cut<K>, &tile_run<K>};
}

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
