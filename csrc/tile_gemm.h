// The gather GEMM on tiles (tiles.h): bfloat16 maps and weights, float32 sums. Included once per kind of tiles, by a
// file that has chosen the target as for gather_gemm.h.
//
// A tile of inputs holds 16 output rows and one step of K: 32 channels of one tap, or several taps of at most 16
// channels each. Where the 16 rows are equally far apart in the map it is read in place; otherwise its rows are copied
// side by side, two steps before they are multiplied, and used again by all output channels. A register tile is up to
// 2 x 2 tiles of sums, or 4 x 1 where only 16 output channels are left. Its epilogue runs between the products of the next one.
#pragma once

#include "gather_gemm.h"
#include "scratch.h"
#include "tiles.h"

namespace quincunx {
namespace QX_ISA {
namespace {

constexpr int64_t kStepChannels = kTileBytes / 2, kTileOutputs = kTileBytes / 4, kTileElements = kTileSize / 2;
constexpr int64_t kPanelTiles = 2, kMostTiles = 4;  // of outputs side by side, of rows one below the other
constexpr int64_t kSliceTaps = 64;                  // taps at a time
constexpr int64_t kPairRows = 2 * kTileHeight;      // of a register tile of 32 outputs
constexpr int64_t kChunkTiles = 32;                 // tiles of rows that share one pass over the weights
constexpr int64_t kCopyAhead = 2;                   // steps from copying a tile to reading it
constexpr int64_t kJointBytes = kSliceTaps / 2 * kPanelTiles * kTileSize;  // of weights whose taps are brought together
constexpr int64_t kLeastBytes = 64 * kTileSize;     // of copied tiles, without memory for more
// Lines of a tile read in place that may share a set of a first-level cache, which has one set for each line of a
// page: more displace each other, and a copy is faster.
constexpr int64_t kSetBytes = 4096, kLinesOfSet = 2;
// While a vector does one multiply-add, tiles do about ten.
constexpr Costs kTileCosts{1500000, 150000, 20};

constexpr TileConfig kFullTiles = TileConfig::full();

// The steps of K of one channel group: for each block of 32 channels each tap, or `joined` taps in each step.
struct Depth {
  int64_t channels, taps, unit, joined, blocks;
  QX_INLINE Depth(int64_t channels_per_group, int64_t num_taps) {
    channels = channels_per_group;
    taps = num_taps;
    for (unit = 2; unit < channels && unit < kStepChannels;) unit *= 2;
    joined = kStepChannels / unit;
    blocks = ceil_div(channels, kStepChannels);
  }
  QX_INLINE int64_t inner(int64_t count) const { return ceil_div(count, joined); }  // steps of so many taps
  QX_INLINE int64_t steps() const { return blocks * inner(taps); }
};

// ---------------------------------------------------------------- weights
// Packed: panel after panel of 32 outputs (the last may have 16), [step][tile of outputs][pair][output][2].

int64_t tile_packed_size(int64_t outputs, int64_t channels, int64_t taps, int64_t groups) {
  return groups * ceil_div(outputs / groups, kTileOutputs) * Depth(channels, taps).steps() * kTileElements;
}

QX_INLINE int64_t panel_width(int64_t tiles, int64_t panel) {
  return least(kPanelTiles, tiles - panel * kPanelTiles);
}

template <class W>
void tile_pack_from(const Weight& w, void* packed, int64_t part, int64_t parts) {
  const Depth depth(w.channels, w.taps);
  const int64_t tiles = ceil_div(w.outputs, kTileOutputs), jobs = w.groups * tiles * depth.blocks;
  for (int64_t job = jobs * part / parts; job < jobs * (part + 1) / parts; ++job) {
    const int64_t block = job % depth.blocks, tile = job / depth.blocks % tiles, group = job / depth.blocks / tiles;
    const int64_t panel = tile / kPanelTiles, width = panel_width(tiles, panel);
    const int64_t c0 = block * kStepChannels, o0 = tile * kTileOutputs, per_block = depth.inner(w.taps);
    uint16_t* to = static_cast<uint16_t*>(packed) +
                   ((group * tiles + panel * kPanelTiles) * depth.steps() + tile % kPanelTiles) * kTileElements;
    const W* from = static_cast<const W*>(w.data) + group * w.group_stride + c0 * w.channel_stride;
    for (int64_t tap = 0; tap < per_block * depth.joined; ++tap) {
      uint16_t* pairs = to + (block * per_block + tap / depth.joined) * width * kTileElements +
                        tap % depth.joined * depth.unit * kTileOutputs;
      for (int64_t c = 0; c < depth.unit; ++c) {
        const bool inside = tap < w.taps && c0 + c < w.channels;
        for (int64_t o = 0; o < kTileOutputs; ++o) {
          const int64_t at = (o0 + o) * w.output_stride + c * w.channel_stride + tap * w.tap_stride;
          uint16_t& cell = pairs[c / 2 * kStepChannels + o * 2 + c % 2];
          if (inside && o0 + o < w.outputs) convert(from[at], cell);
          else cell = 0;
        }
      }
    }
  }
}
void tile_pack(const Weight* w, void* packed, int64_t part, int64_t parts) {
  (w->wide ? &tile_pack_from<float> : &tile_pack_from<uint16_t>)(*w, packed, part, parts);
}

// ---------------------------------------------------------------- inputs

// Where a tile of inputs lies at one tap (or at joined taps), and how far it moves from one block of channels to the next.
struct Source {
  const char* base;
  int64_t stride, advance;
};

struct Slice {  // taps [tap, tap + count) of the tap group, blocks [block, block + outer)
  int64_t tap, count, inner, block, outer;
  QX_INLINE int64_t steps() const { return inner * outer; }
};

// The rows of one register tile while their tiles are made.
struct Copying {
  const char* rows[kSliceTaps][kMostTiles * kTileHeight];
  bool copied[kMostTiles][kSliceTaps];  // by tile and inner step
  char* tiles[kMostTiles];              // where they are copied to, step after step
  uintptr_t end;                        // of the map
  const Depth* depth;
  Slice slice;
};

alignas(64) const uint16_t kNumbers[kStepChannels] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                      16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

template <int BYTES>
struct Piece {
  typedef uint16_t Type __attribute__((vector_size(BYTES)));
  typedef uint16_t Loose __attribute__((vector_size(BYTES), aligned(2), may_alias));
  static QX_INLINE void mask(int64_t channels, Type& kept) {
    Type number;
    __builtin_memcpy(&number, kNumbers, BYTES);
    kept = reinterpret_cast<Type>(number < Type{} + static_cast<uint16_t>(channels));
  }
  // `channels` of them and zeros; channels beyond may be read, and are dropped, but nothing beyond the map
  static QX_INLINE void copy(const char* from, char* to, int64_t channels, const Type& kept, uintptr_t end) {
    if (end - reinterpret_cast<uintptr_t>(from) >= BYTES) {
      *reinterpret_cast<Loose*>(to) = *reinterpret_cast<const Loose*>(from) & kept;
      return;
    }
    uint16_t buffer[BYTES / 2] = {};
    __builtin_memcpy(buffer, from, channels * 2);
    __builtin_memcpy(to, buffer, BYTES);
  }
};

QX_INLINE const char* outside() { return reinterpret_cast<const char*>(kZeros); }

template <int UNIT>
void copy_joined(const Copying& c, int64_t tile, int64_t step) {
  typedef Piece<UNIT * 2> P;
  constexpr int64_t kJoined = kStepChannels / UNIT;
  typename P::Type kept;
  P::mask(c.depth->channels, kept);
  char* to = c.tiles[tile] + step * kTileSize;
  for (int64_t j = 0; j < kJoined; ++j, to += UNIT * 2) {
    const int64_t tap = step * kJoined + j;
    for (int64_t r = 0; r < kTileHeight; ++r) {
      const char* from = tap < c.slice.count ? c.rows[tap][tile * kTileHeight + r] : outside();
      P::copy(from, to + r * kTileBytes, c.depth->channels, kept, c.end);
    }
  }
}

QX_INLINE void copy_channels(const Copying& c, int64_t tile, int64_t step, int64_t tap, int64_t block) {
  typedef Piece<kTileBytes> P;
  const int64_t left = c.depth->channels - block * kStepChannels, moved = block * kTileBytes;
  const char* const* rows = c.rows[tap] + tile * kTileHeight;
  char* to = c.tiles[tile] + step * kTileSize;
  if (left >= kStepChannels) {
#pragma GCC unroll 16
    for (int64_t r = 0; r < kTileHeight; ++r) {
      const char* from = rows[r] + (rows[r] == outside() ? 0 : moved);
      *reinterpret_cast<P::Loose*>(to + r * kTileBytes) = *reinterpret_cast<const P::Loose*>(from);
    }
    return;
  }
  P::Type kept;
  P::mask(left, kept);
  for (int64_t r = 0; r < kTileHeight; ++r) {
    P::copy(rows[r] + (rows[r] == outside() ? 0 : moved), to + r * kTileBytes, left, kept, c.end);
  }
}

// The next steps to copy, counted like those that are multiplied.
struct CopySteps {
  int64_t step = 0, inner = 0, outer = 0;
  QX_INLINE void copy(const Copying& c, int64_t tiles) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      if (!c.copied[tile][inner]) continue;
      switch (c.depth->unit) {
        case 2: copy_joined<2>(c, tile, step); break;
        case 4: copy_joined<4>(c, tile, step); break;
        case 8: copy_joined<8>(c, tile, step); break;
        case 16: copy_joined<16>(c, tile, step); break;
        default: copy_channels(c, tile, step, inner, c.slice.block + outer);
      }
    }
    ++step;
    if (++inner < c.slice.inner) return;
    inner = 0;
    ++outer;
  }
};

// The output rows of a chunk: where each reads and writes.
struct TileRows {
  const char* x[kChunkTiles * kTileHeight];         // the image's first row
  const int32_t* index[kChunkTiles * kTileHeight];  // the position's taps
  int64_t place[kChunkTiles * kTileHeight], residual[kChunkTiles * kTileHeight];  // as in Rows
};

// Finds the rows of one tile and decides, tap by tap, whether it is read in place.
void locate(Copying& c, int64_t tile, const TileRows& rows, int64_t q, int64_t count, int64_t row_bytes,
            int64_t group_bytes, Source* sources) {
  const Depth& depth = *c.depth;
  const Slice& slice = c.slice;
  const bool whole = count == kTileHeight && depth.channels % kStepChannels == 0;
  for (int64_t t = 0; t < slice.count; ++t) {
    const char** from = c.rows[t] + tile * kTileHeight;
    int64_t inside = 0;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = rows.index[q + r][slice.tap + t];
      from[r] = row < 0 ? outside() : rows.x[q + r] + row * row_bytes + group_bytes;
      inside += row >= 0;
    }
    for (int64_t r = count; r < kTileHeight; ++r) from[r] = outside();
    if (depth.joined > 1) continue;
    const int64_t stride = from[1] - from[0];
    int64_t differs = 0;
    for (int64_t r = 2; r < kTileHeight; ++r) differs |= (from[r] - from[r - 1]) ^ stride;
    // rows lie in sets at multiples of the greatest power of two in the stride
    const int64_t lines_of_set = kTileHeight * least(stride & -stride, kSetBytes) / kSetBytes;
    const bool in_place = whole && inside == kTileHeight && differs == 0 && lines_of_set <= kLinesOfSet;
    c.copied[tile][t] = inside > 0 && !in_place;
    if (inside == 0) {
      sources[t] = Source{outside(), 0, 0};
    } else if (in_place) {
      sources[t] = Source{from[0] + slice.block * kTileBytes, stride, kTileBytes};
    } else {
      sources[t] = Source{c.tiles[tile] + t * kTileSize, kTileBytes, slice.inner * kTileSize};
    }
  }
  for (int64_t i = 0; depth.joined > 1 && i < slice.inner; ++i) {
    c.copied[tile][i] = true;
    sources[i] = Source{c.tiles[tile] + i * kTileSize, kTileBytes, 0};
  }
}

// ---------------------------------------------------------------- register tile

struct Unfinished {  // sums whose epilogue is still to come
  const float* sums;
  int64_t width;  // of a row of sums
  Epilogue<uint16_t> e;
  const int64_t *place, *residual;
  int64_t rows, done;
  bool full;
};

template <bool ADDED, bool SECOND>
QX_INLINE void finish_full(const Unfinished& u, int64_t last) {
  const Epilogue<uint16_t>& e = u.e;
  const Bounds bounds(e.activation);
  for (int64_t at = 0; at < u.width; at += kLanes) {
    const vf bias = e.bias ? load(e.bias + at) : vf{};
    const vf scale = SECOND ? load(e.scale + at) : vf{}, shift = SECOND ? load(e.shift + at) : vf{};
    for (int64_t r = u.done; r < last; ++r) {
      vf value = load(u.sums + r * u.width + at) + bias;
      if (ADDED && (!SECOND || e.residual)) value += load(e.residual + u.residual[r] + at);
      value = bounds.of(value);
      if (!SECOND || e.out) store(e.out + u.place[r] + at, value);
      if (SECOND) store(e.out2 + u.place[r] + at, at_least(value * scale + shift, 0.0f));
    }
  }
}

QX_INLINE void finish_some(const Unfinished& u, int64_t r) {
  const Epilogue<uint16_t>& e = u.e;
  for (int64_t at = 0; at < e.count; at += kLanes) {
    const int64_t left = e.count - at, added = e.residual ? e.added - at : 0;
    vf value = load(u.sums + r * u.width + at);
    if (e.bias) value += load_some(e.bias + at, left);
    if (added > 0) value += load_some(e.residual + u.residual[r] + at, added);
    value = activated(value, e.activation, e.slope ? load_some(e.slope + at, left) : vf{});
    if (e.out) store_some(e.out + u.place[r] + at, value, left);
    if (e.out2) {
      value = value * load_some(e.scale + at, left) + load_some(e.shift + at, left);
      store_some(e.out2 + u.place[r] + at, at_least(value, 0.0f), left);
    }
  }
}

QX_INLINE void finish(Unfinished& u, int64_t upto) {
  const int64_t last = least(upto, u.rows);
  if (u.done >= last) return;
  if (!u.full) {
    for (int64_t r = u.done; r < last; ++r) finish_some(u, r);
  } else if (u.e.out2) {
    finish_full<true, true>(u, last);
  } else if (u.e.residual) {
    finish_full<true, false>(u, last);
  } else {
    finish_full<false, false>(u, last);
  }
  u.done = last;
}

// What a register tile reads; areas are for the emulation alone.
struct Operands {
  const Source* sources[kMostTiles];  // of each tile of rows, by inner step
  const char* weights[kSliceTaps];    // by inner step
  int64_t weights_advance;
  Area map, copies, weight_area;
  QX_INLINE Area area(const Source& s) const {
    if (s.base == outside()) return Area{outside(), outside() + kTileBytes};
    return s.base >= copies.first && s.base < copies.last ? copies : map;
  }
};

template <int TILE>
QX_INLINE void load_inputs(const Operands& o, int64_t tile, int64_t inner, int64_t outer) {
  const Source& s = o.sources[tile][inner];
  TileUnit::load<TILE>(s.base + outer * s.advance, s.stride, o.area(s));
}

// ROWS x OUTS tiles of sums: tiles 0 to 3 hold them, 4 and 5 inputs, 6 and 7 weights.
template <int ROWS, int OUTS>
void multiply(const Operands& o, const Slice& slice, const Copying* copying, Unfinished& before, float* sums,
              bool first, bool last) {
  static_assert(ROWS * OUTS <= 4, "there are four tiles of sums");
  if (first) {
    TileUnit::zero<0>();
    if constexpr (ROWS * OUTS > 1) TileUnit::zero<1>();
    if constexpr (ROWS * OUTS > 2) TileUnit::zero<2>();
    if constexpr (ROWS * OUTS > 3) TileUnit::zero<3>();
  }
  const int64_t steps = slice.steps(), rows_a_step = ceil_div(before.rows - before.done, most(1, steps));
  CopySteps ahead;
  while (copying && ahead.step < least(kCopyAhead, steps)) ahead.copy(*copying, ROWS);
  for (int64_t outer = 0; outer < slice.outer; ++outer) {
    for (int64_t inner = 0; inner < slice.inner; ++inner) {
      if (copying && ahead.step < steps) ahead.copy(*copying, ROWS);
      const char* weights = o.weights[inner] + outer * o.weights_advance;
      TileUnit::load<6>(weights, kTileBytes, o.weight_area);
      load_inputs<4>(o, 0, inner, outer);
      TileUnit::dot<0, 4, 6>();
      if constexpr (OUTS == 2) {
        TileUnit::load<7>(weights + kTileSize, kTileBytes, o.weight_area);
        TileUnit::dot<1, 4, 7>();
        if constexpr (ROWS == 2) {
          load_inputs<5>(o, 1, inner, outer);
          TileUnit::dot<2, 5, 6>();
          TileUnit::dot<3, 5, 7>();
        }
      } else {
        if constexpr (ROWS > 1) {
          load_inputs<5>(o, 1, inner, outer);
          TileUnit::dot<1, 5, 6>();
        }
        if constexpr (ROWS > 2) {
          load_inputs<4>(o, 2, inner, outer);
          TileUnit::dot<2, 4, 6>();
        }
        if constexpr (ROWS > 3) {
          load_inputs<5>(o, 3, inner, outer);
          TileUnit::dot<3, 5, 6>();
        }
      }
      finish(before, before.done + rows_a_step);
    }
  }
  if (!last) return;
  finish(before, before.rows);
  constexpr int64_t kWidth = OUTS * kTileOutputs, kStride = kWidth * 4, kBelow = kTileHeight * kWidth;
  TileUnit::store<0>(sums, kStride);
  if constexpr (OUTS == 2) {
    TileUnit::store<1>(sums + kTileOutputs, kStride);
    if constexpr (ROWS == 2) {
      TileUnit::store<2>(sums + kBelow, kStride);
      TileUnit::store<3>(sums + kBelow + kTileOutputs, kStride);
    }
  } else {
    if constexpr (ROWS > 1) TileUnit::store<1>(sums + kBelow, kStride);
    if constexpr (ROWS > 2) TileUnit::store<2>(sums + 2 * kBelow, kStride);
    if constexpr (ROWS > 3) TileUnit::store<3>(sums + 3 * kBelow, kStride);
  }
}

typedef void (*MultiplyFunction)(const Operands&, const Slice&, const Copying*, Unfinished&, float*, bool, bool);
// by tiles of outputs and of rows
constexpr MultiplyFunction kMultiply[kPanelTiles + 1][kMostTiles + 1] = {
    {},
    {nullptr, &multiply<1, 1>, &multiply<2, 1>, &multiply<3, 1>, &multiply<4, 1>},
    {nullptr, &multiply<1, 2>, &multiply<2, 2>, nullptr, nullptr}};

// ---------------------------------------------------------------- driver

Cut tile_cut(const GatherGemm* g, int64_t threads) {
  if (!g->weight) return cut(g, threads);
  const int64_t tiles = ceil_div(g->out_channels / g->channel_groups, kTileOutputs);
  return cut_outputs(*g, threads, ceil_div(tiles, kPanelTiles), kTileCosts);
}

// The slices of a tap group: as many taps and blocks at a time as `most_steps` copied tiles hold.
struct Slices {
  int64_t used, taps, blocks, all_blocks, joined;
  QX_INLINE Slices(const Depth& depth, int64_t num_taps, int64_t most_steps) {
    used = num_taps;
    all_blocks = depth.blocks;
    joined = depth.joined;
    taps = most(1, least(least(num_taps, kSliceTaps), most_steps * joined));
    blocks = most(1, least(all_blocks, most_steps / depth.inner(taps)));
  }
  // a group without taps has one slice without steps
  QX_INLINE int64_t count() const { return most(1, ceil_div(used, taps)) * ceil_div(all_blocks, blocks); }
  QX_INLINE Slice at(int64_t number) const {
    const int64_t runs = ceil_div(all_blocks, blocks);
    const int64_t tap = number / runs * taps, block = number % runs * blocks, length = least(taps, used - tap);
    return Slice{tap, length, ceil_div(length, joined), block, least(blocks, all_blocks - block)};
  }
};

// The weights of a slice; several taps of a step that do not lie side by side are copied to `joint`.
QX_INLINE void find_weights(Operands& o, const Depth& depth, const Slice& slice, const int32_t* taps,
                            const char* panel, int64_t width, char* joint, const Area& all) {
  const int64_t step_bytes = width * kTileSize;
  o.weight_area = all;
  if (depth.joined == 1) {
    o.weights_advance = depth.taps * step_bytes;
    for (int64_t i = 0; i < slice.inner; ++i) {
      o.weights[i] = panel + (slice.block * depth.taps + taps[slice.tap + i]) * step_bytes;
    }
    return;
  }
  o.weights_advance = 0;
  const int32_t* own = taps + slice.tap;
  bool side_by_side = slice.count > 0 && own[0] % depth.joined == 0;
  for (int64_t t = 1; t < slice.count; ++t) side_by_side &= own[t] == own[0] + t;
  // what follows the last tap is multiplied by zeros, but must not be NaN or infinite: only padding is sure
  side_by_side = side_by_side && (slice.count % depth.joined == 0 || own[0] + slice.count == depth.taps);
  for (int64_t i = 0; i < slice.inner; ++i) {
    o.weights[i] = side_by_side ? panel + (own[0] / depth.joined + i) * step_bytes : joint + i * step_bytes;
  }
  if (side_by_side) return;
  o.weight_area = Area{joint, joint + kJointBytes};
  const int64_t tap_bytes = depth.unit / 2 * kTileBytes;
  for (int64_t t = 0; t < slice.inner * depth.joined; ++t) {
    for (int64_t n = 0; n < width; ++n) {
      char* to = joint + t / depth.joined * step_bytes + n * kTileSize + t % depth.joined * tap_bytes;
      if (t < slice.count) {
        const int64_t tap = own[t];
        __builtin_memcpy(to, panel + tap / depth.joined * step_bytes + n * kTileSize + tap % depth.joined * tap_bytes,
                         tap_bytes);
      } else {
        __builtin_memset(to, 0, tap_bytes);
      }
    }
  }
}

// joint: kJointBytes and copy_bytes of memory
void tile_run_in(const GatherGemm& g, Cut cut, int64_t part, char* joint, int64_t copy_bytes) {
  alignas(64) float sums[2][kMostTiles * kTileHeight * kTileOutputs];
  TileRows rows;
  Copying copying;
  Source sources[kChunkTiles][kSliceTaps];
  Unfinished before{};

  char* copies = joint + kJointBytes;

  const Depth depth(g.in_channels / g.channel_groups, g.num_taps);
  const int64_t per_group = g.out_channels / g.channel_groups, tiles = ceil_div(per_group, kTileOutputs);
  const int64_t panels = ceil_div(tiles, kPanelTiles), jobs = panels * g.channel_groups;
  const int64_t row_bytes = int64_t{g.in_channels} * 2, image_bytes = g.rows_in * row_bytes;
  const int64_t po = part % cut.outputs, pp = part / cut.outputs;
  const int64_t job_first = jobs * po / cut.outputs, job_last = jobs * (po + 1) / cut.outputs;
  const int64_t work = all_work(g);
  const int64_t work_first = work * pp / cut.positions, work_last = work * (pp + 1) / cut.positions;
  const char* x = static_cast<const char*>(g.x);
  const char* packed = static_cast<const char*>(g.weight);
  const Area packed_area{
      packed, packed + tile_packed_size(g.out_channels, depth.channels, g.num_taps, g.channel_groups) * 2};
  const int32_t *index = g.index, *out_rows = g.rows, *taps = g.taps;
  copying.depth = &depth;
  copying.end = reinterpret_cast<uintptr_t>(x + g.batch * image_bytes);
  Operands operands{};
  operands.map = Area{x, x + g.batch * image_bytes};
  operands.copies = Area{copies, copies + copy_bytes};

  TileUnit::configure(kFullTiles);
  int turn = 0;
  int64_t done = 0;  // work of the groups before
  for (int64_t group = 0; group < g.num_groups; ++group) {
    const int64_t positions = g.groups[2 * group], num_taps = g.groups[2 * group + 1];
    const int64_t total = positions * g.batch, row_work = most(1, num_taps);
    const int64_t all_pairs = ceil_div(total, kPairRows);
    // as in gather_gemm.h, in whole register tiles where groups are large
    const bool few = g.num_groups <= kFewGroups;
    const int64_t q_first = few ? least(total, all_pairs * pp / cut.positions * kPairRows)
                                : least(total, ceil_div(most(0, work_first - done), row_work));
    const int64_t q_last = few ? least(total, all_pairs * (pp + 1) / cut.positions * kPairRows)
                               : least(total, ceil_div(most(0, work_last - done), row_work));
    done += total * row_work;
    // Copied tiles are kept for all output channels if a chunk of at least two tiles fits; otherwise each register
    // tile copies its own, slice after slice.
    const int64_t all_steps = depth.blocks * depth.inner(num_taps);
    const int64_t fitting = copy_bytes / kTileSize / most(1, all_steps);
    const bool kept = num_taps <= kSliceTaps && fitting >= 2;
    const Slices slices(depth, num_taps, kept ? most(1, all_steps) : copy_bytes / kTileSize / kMostTiles);
    const int64_t pairs = ceil_div(q_last - q_first, kPairRows);
    const int64_t chunks = ceil_div(pairs, (kept ? least(fitting, kChunkTiles) : kChunkTiles) / 2);
    // one image after the other, so that a tile's rows are often equally far apart
    Walk walk(g.batch, 1, positions);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t q0 = q_first + pairs * chunk / chunks * kPairRows;
      const int64_t q1 = least(q_last, q_first + pairs * (chunk + 1) / chunks * kPairRows);
      const int64_t chunk_tiles = ceil_div(q1 - q0, kTileHeight);
      walk.go_to(q0);
      for (int64_t r = 0; r < q1 - q0; ++r) {
        const int64_t row = out_rows[walk.position];
        rows.x[r] = x + walk.image * image_bytes;
        rows.index[r] = index + walk.position * num_taps;
        rows.place[r] = (walk.image * g.rows_out + row) * g.out_channels;
        if (g.residual) {
          const int64_t from = g.residual_rows ? g.residual_rows[row] : row;
          rows.residual[r] = (walk.image * g.residual_size + from) * g.residual_channels;
        }
        walk.step();
      }
      int64_t located = -1;  // the channel group whose tiles are kept
      for (int64_t job = job_first; job < job_last; ++job) {
        const int64_t channel_group = job / panels, panel = job % panels, width = panel_width(tiles, panel);
        const int64_t o_local = panel * kPanelTiles * kTileOutputs;
        const int64_t count = least(width * kTileOutputs, per_group - o_local);
        const char* weights = packed + (channel_group * tiles + panel * kPanelTiles) * depth.steps() * kTileSize;
        const int64_t group_bytes = channel_group * depth.channels * 2;
        const bool fresh = !kept || located != channel_group;
        located = channel_group;
        const Epilogue<uint16_t> e = epilogue<uint16_t>(g, channel_group * per_group + o_local, count);
        const bool full = count == width * kTileOutputs && (!e.residual || e.added >= count) && e.activation <= kRelu6;
        if (kept) find_weights(operands, depth, slices.at(0), taps, weights, width, joint, packed_area);
        const int64_t high = kMostTiles / width;
        for (int64_t tile = 0; tile < chunk_tiles; tile += high) {
          const int64_t height = least(high, chunk_tiles - tile), number = slices.count();
          for (int64_t s = 0; s < number; ++s) {
            const Slice slice = slices.at(s);
            for (int64_t i = 0; i < height; ++i) {
              const int64_t slot = kept ? tile + i : i, q = (tile + i) * kTileHeight;
              operands.sources[i] = sources[slot];
              if (!fresh) continue;
              copying.slice = slice;
              copying.tiles[i] = copies + slot * slice.steps() * kTileSize;
              locate(copying, i, rows, q, least(kTileHeight, q1 - q0 - q), row_bytes, group_bytes, sources[slot]);
            }
            if (!kept) find_weights(operands, depth, slice, taps, weights, width, joint, packed_area);
            kMultiply[width][height](operands, slice, fresh ? &copying : nullptr, before, sums[turn], s == 0,
                                     s == number - 1);
          }
          const int64_t q = tile * kTileHeight;
          before = Unfinished{sums[turn], width * kTileOutputs, e, rows.place + q, rows.residual + q,
                              least(height * kTileHeight, q1 - q0 - q), 0, full};
          turn ^= 1;
        }
      }
      finish(before, before.rows);  // the next chunk has other rows
    }
    index += positions * num_taps;
    out_rows += positions;
    taps += num_taps;
  }
  TileUnit::release();
}

__attribute__((noinline)) void tile_run_on_stack(const GatherGemm& g, Cut cut, int64_t part) {
  alignas(64) char memory[kJointBytes + kLeastBytes];
  tile_run_in(g, cut, part, memory, kLeastBytes);
}

void tile_run(const GatherGemm* g, Cut cut, int64_t part) {
  if (!g->weight) return mean_of_rows<uint16_t>(*g, cut, part);
  // half of the second-level cache for copied inputs, the rest for weights and maps
  const int64_t copy_bytes = most(kLeastBytes, level2_bytes() / 2);
  char* memory = thread_scratch(kJointBytes + copy_bytes);
  if (memory == nullptr) return tile_run_on_stack(*g, cut, part);
  tile_run_in(*g, cut, part, memory, copy_bytes);
}

constexpr ForwardKernels kTileKernels{true, &tile_packed_size, &tile_pack, &tile_cut, &tile_run};

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
