// The gather GEMM on tiles (tiles.h), for any kind of numbers that tiles multiply; tile_bf16.h and int8_tiles.h say what
// a kind K is:
//   Input, Sum, End      the numbers of maps and weights, the sums, what the epilogue of a register tile knows
//   kTogether            channels of one output that lie side by side in a tile of weights
//   kZerosSuffice        whether weights of 0 make up for any input: not if it may be NaN
//   outside(g)           what is read outside of the map
//   Start                what the sums of a panel start with: find(..) it, then put<T>(tile of outputs, tile's first)
//   dot<C, A, B>()       the products of tiles
//   more(..), pack_more(..)       what lies behind the packed weights, and how long that is
//   end(..), full(..), finish(Outputs)  the epilogue, and whether it needs no questions for each vector
//   kCosts, mean(..)     as of gather_gemm.h
//
// A tile of inputs holds 16 output rows and one step of K: 64 bytes of channels of one tap (32 bfloat16 numbers, 64
// bytes), or several taps of at most half as many channels. Where the 16 rows are equally far apart in the map it is read
// in place; otherwise its rows are copied side by side, two steps before they are multiplied, and used again by all
// output channels. A register tile is up to 2 x 2 tiles of sums, or 4 x 1 where only 16 output channels are left. Its
// epilogue follows it at once: the products of the next one do not wait for it, but stores of sums would wait for those
// of an epilogue between or behind them.
#pragma once

#include "gather_gemm.h"
#include "scratch.h"
#include "tiles.h"

namespace quincunx {
namespace QX_ISA {
namespace {

constexpr int64_t kTileOutputs = kTileBytes / 4;
template <class K>
constexpr int64_t kStepChannels = kTileBytes / int64_t{sizeof(typename K::Input)};
template <class K>
constexpr int64_t kTileElements = kTileSize / int64_t{sizeof(typename K::Input)};
constexpr int64_t kPanelTiles = 2, kMostTiles = 4;  // of outputs side by side, of rows one below the other
constexpr int64_t kSliceTaps = kMostShiftTaps;      // taps at a time
constexpr int64_t kPairRows = 2 * kTileHeight;      // of a register tile of 32 outputs
constexpr int64_t kChunkTiles = 32;                 // tiles of rows that share one pass over the weights
constexpr int64_t kNearTiles = 8;                   // the same where weights are near: outputs are written row by row
constexpr int64_t kCopyAhead = 2;                   // steps from copying a tile to reading it
constexpr int64_t kJointBytes = kSliceTaps / 2 * kPanelTiles * kTileSize;  // of weights whose taps are brought together
// Lines of a tile read in place that may share a set of a first-level cache, which has one set for each line of a
// page: more displace each other, and a copy is faster. Rows that follow each other share it better.
constexpr int64_t kSetBytes = 4096, kLinesOfSet = 2, kLinesOfSetInOrder = 8;
constexpr TileConfig kFullTiles = TileConfig::full();

// The steps of K of one channel group: for each block of channels each tap, or `joined` taps in each step.
template <class K>
struct TileDepth {
  static constexpr int64_t kChannels = kStepChannels<K>;
  int64_t channels, taps, unit, joined, blocks;
  QX_INLINE TileDepth(int64_t channels_per_group, int64_t num_taps) {
    channels = channels_per_group;
    taps = num_taps;
    // a single tap has none to be joined with, and may be read in place
    unit = taps == 1 ? kChannels : K::kTogether;
    while (unit < channels && unit < kChannels) unit *= 2;
    joined = kChannels / unit;
    blocks = ceil_div(channels, kChannels);
  }
  QX_INLINE int64_t inner(int64_t count) const { return ceil_div(count, joined); }  // steps of so many taps
  QX_INLINE int64_t steps() const { return blocks * inner(taps); }
};

// ---------------------------------------------------------------- weights
// Packed: panel after panel of 32 outputs (the last may have 16), [step][tile of outputs][kTogether channels][output]
// [channel]; behind them what the kind needs besides.

template <class K>
int64_t tile_packed_size(int64_t outputs, int64_t channels, int64_t taps, int64_t groups) {
  const int64_t tiles = groups * ceil_div(outputs / groups, kTileOutputs);
  return tiles * TileDepth<K>(channels, taps).steps() * kTileElements<K> + K::more(tiles * kTileOutputs, taps);
}

QX_INLINE int64_t panel_width(int64_t tiles, int64_t panel) {
  return least(kPanelTiles, tiles - panel * kPanelTiles);
}

template <class K, class W>
void tile_pack_from(const Weight& w, void* packed, int64_t part, int64_t parts) {
  typedef typename K::Input Input;
  const TileDepth<K> depth(w.channels, w.taps);
  const int64_t tiles = ceil_div(w.outputs, kTileOutputs), jobs = w.groups * tiles * depth.blocks;
  Input* const more = static_cast<Input*>(packed) + w.groups * tiles * depth.steps() * kTileElements<K>;
  for (int64_t job = jobs * part / parts; job < jobs * (part + 1) / parts; ++job) {
    const int64_t block = job % depth.blocks, tile = job / depth.blocks % tiles, group = job / depth.blocks / tiles;
    const int64_t panel = tile / kPanelTiles, width = panel_width(tiles, panel);
    const int64_t c0 = block * kStepChannels<K>, o0 = tile * kTileOutputs, per_block = depth.inner(w.taps);
    Input* to = static_cast<Input*>(packed) +
                ((group * tiles + panel * kPanelTiles) * depth.steps() + tile % kPanelTiles) * kTileElements<K>;
    const W* from = static_cast<const W*>(w.data) + group * w.group_stride;
    for (int64_t tap = 0; tap < per_block * depth.joined; ++tap) {
      Input* cells = to + (block * per_block + tap / depth.joined) * width * kTileElements<K> +
                     tap % depth.joined * depth.unit * kTileOutputs;
      for (int64_t c = 0; c < depth.unit; ++c) {
        const bool inside = tap < w.taps && c0 + c < w.channels;
        const int64_t at = inside ? channel_offset(w, c0 + c) + tap * w.tap_stride : 0;
        Input* cell = cells + (c / K::kTogether * kTileOutputs * K::kTogether + c % K::kTogether);
        for (int64_t o = 0; o < kTileOutputs; ++o) {
          if (inside && o0 + o < w.outputs) convert(from[(o0 + o) * w.output_stride + at], cell[o * K::kTogether]);
          else cell[o * K::kTogether] = 0;
        }
      }
    }
    if (block == 0) K::pack_more(w, more, group, o0, tiles * kTileOutputs);
  }
}
template <class K>
void tile_pack(const Weight* w, void* packed, int64_t part, int64_t parts) {
  typedef typename K::Input Input;
  if constexpr (sizeof(Input) == 2) {
    if (w->wide) return tile_pack_from<K, float>(*w, packed, part, parts);
  }
  tile_pack_from<K, Input>(*w, packed, part, parts);
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
template <class K>
struct Copying {
  const char* rows[kSliceTaps][kMostTiles * kTileHeight];
  bool copied[kMostTiles][kSliceTaps];  // by tile and inner step
  char* tiles[kMostTiles];              // where they are copied to, step after step
  uintptr_t end;                        // of the map
  const char* outside;                  // kTileBytes of what is read outside of it
  const TileDepth<K>* depth;
  Slice slice;
};

template <class Input>
struct Numbers {
  alignas(64) Input at[kTileBytes / sizeof(Input)];
  constexpr Numbers() : at{} {
    for (size_t i = 0; i < kTileBytes / sizeof(Input); ++i) at[i] = static_cast<Input>(i);
  }
};
template <class Input>
constexpr Numbers<Input> kNumbers{};

template <class Input, int BYTES>
struct Piece {
  typedef Input Type __attribute__((vector_size(BYTES)));
  typedef Input Loose __attribute__((vector_size(BYTES), aligned(sizeof(Input)), may_alias));
  static QX_INLINE void mask(int64_t channels, Type& kept) {
    Type number;
    __builtin_memcpy(&number, kNumbers<Input>.at, BYTES);
    kept = reinterpret_cast<Type>(number < Type{} + static_cast<Input>(channels));
  }
  // `channels` of them and zeros; channels beyond may be read, and are dropped, but nothing beyond the map
  static QX_INLINE void copy(const char* from, char* to, int64_t channels, const Type& kept, uintptr_t end) {
    if (end - reinterpret_cast<uintptr_t>(from) >= BYTES) {
      *reinterpret_cast<Loose*>(to) = *reinterpret_cast<const Loose*>(from) & kept;
      return;
    }
    Input buffer[BYTES / sizeof(Input)] = {};
    __builtin_memcpy(buffer, from, channels * sizeof(Input));
    __builtin_memcpy(to, buffer, BYTES);
  }
};

template <class K, int BYTES>  // of a tap's channels
void copy_joined(const Copying<K>& c, int64_t tile, int64_t step) {
  typedef Piece<typename K::Input, BYTES> P;
  constexpr int64_t kJoined = kTileBytes / BYTES;
  typename P::Type kept;
  P::mask(c.depth->channels, kept);
  char* to = c.tiles[tile] + step * kTileSize;
  for (int64_t j = 0; j < kJoined; ++j, to += BYTES) {
    const int64_t tap = step * kJoined + j;
    for (int64_t r = 0; r < kTileHeight; ++r) {
      const char* from = tap < c.slice.count ? c.rows[tap][tile * kTileHeight + r] : c.outside;
      P::copy(from, to + r * kTileBytes, c.depth->channels, kept, c.end);
    }
  }
}

template <class K>
QX_INLINE void copy_channels(const Copying<K>& c, int64_t tile, int64_t step, int64_t tap, int64_t block) {
  typedef Piece<typename K::Input, kTileBytes> P;
  const int64_t left = c.depth->channels - block * kStepChannels<K>, moved = block * kTileBytes;
  const char* const* rows = c.rows[tap] + tile * kTileHeight;
  char* to = c.tiles[tile] + step * kTileSize;
  if (left >= kStepChannels<K>) {
#pragma GCC unroll 16
    for (int64_t r = 0; r < kTileHeight; ++r) {
      const char* from = rows[r] + (rows[r] == c.outside ? 0 : moved);
      *reinterpret_cast<typename P::Loose*>(to + r * kTileBytes) = *reinterpret_cast<const typename P::Loose*>(from);
    }
    return;
  }
  typename P::Type kept;
  P::mask(left, kept);
  for (int64_t r = 0; r < kTileHeight; ++r) {
    P::copy(rows[r] + (rows[r] == c.outside ? 0 : moved), to + r * kTileBytes, left, kept, c.end);
  }
}

// The next steps to copy, counted like those that are multiplied.
struct CopySteps {
  int64_t step = 0, inner = 0, outer = 0;
  template <class K>
  QX_INLINE void copy(const Copying<K>& c, int64_t tiles) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      if (!c.copied[tile][inner]) continue;
      switch (c.depth->unit * sizeof(typename K::Input)) {
        case 4: copy_joined<K, 4>(c, tile, step); break;
        case 8: copy_joined<K, 8>(c, tile, step); break;
        case 16: copy_joined<K, 16>(c, tile, step); break;
        case 32: copy_joined<K, 32>(c, tile, step); break;
        default: copy_channels(c, tile, step, inner, c.slice.block + outer);
      }
    }
    ++step;
    if (++inner < c.slice.inner) return;
    inner = 0;
    ++outer;
  }
};

constexpr int32_t kRowItself = 0;

// The output rows of a chunk: where each reads and writes.
struct TileRows {
  const char* x[kChunkTiles * kTileHeight];         // the image's first row
  const int32_t* index[kChunkTiles * kTileHeight];  // the position's taps
  int64_t place[kChunkTiles * kTileHeight], residual[kChunkTiles * kTileHeight];  // as in Rows

  // rows [q0, q1) of a tap group, one image after the other, so that a tile's rows are often equally far apart
  QX_INLINE void find(const GatherGemm& g, const PartOfGroups& own, int64_t q0, int64_t q1, const char* map,
                      int64_t row_bytes) {
    Walk walk(g.batch, 1, own.positions);
    walk.go_to(q0);
    for (int64_t r = 0; r < q1 - q0; ++r) {
      const int64_t row = own.rows[walk.position];
      x[r] = map + walk.image * g.rows_in * row_bytes;
      index[r] = own.index + walk.position * own.num_taps;
      place[r] = (walk.image * g.rows_out + row) * g.out_channels;
      if (g.residual) {
        const int64_t from = g.residual_rows ? g.residual_rows[row] : row;
        residual[r] = (walk.image * g.residual_size + from) * g.residual_channels;
      }
      walk.step();
    }
  }
  // where all are in order
  QX_INLINE void follow(const GatherGemm& g, int64_t q0, int64_t q1, const char* map, int64_t row_bytes) {
    for (int64_t r = 0; r < q1 - q0; ++r) {
      x[r] = map + (q0 + r) * row_bytes;
      index[r] = &kRowItself;
      place[r] = (q0 + r) * g.out_channels;
      residual[r] = (q0 + r) * g.residual_channels;
    }
  }
};

// Whether the outputs of a tap group follow each other as their inputs do, through all images: a dense 1 x 1.
QX_INLINE bool all_in_order(const GatherGemm& g, const PartOfGroups& own) {
  if (own.num_taps != 1 || own.positions != g.rows_out || own.positions != g.rows_in) return false;
  if (g.residual && (g.residual_rows || g.residual_size != g.rows_out)) return false;
  int32_t differs = 0;
  for (int32_t i = 0; i < own.positions; ++i) differs |= (own.index[i] ^ i) | (own.rows[i] ^ i);
  return differs == 0;
}

// Rows lie in sets at multiples of the greatest power of two in their distance.
QX_INLINE int64_t lines_of_set(int64_t stride) {
  return kTileHeight * least(stride & -stride, kSetBytes) / kSetBytes;
}

// Finds the rows of one tile and decides, tap by tap, whether it is read in place.
template <class K>
void locate(Copying<K>& c, int64_t tile, const TileRows& rows, int64_t q, int64_t count, int64_t row_bytes,
            int64_t group_bytes, Source* sources) {
  const TileDepth<K>& depth = *c.depth;
  const Slice& slice = c.slice;
  const bool whole = depth.channels % kStepChannels<K> == 0;
  for (int64_t t = 0; t < slice.count; ++t) {
    const char** from = c.rows[t] + tile * kTileHeight;
    int64_t inside = 0;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = rows.index[q + r][slice.tap + t];
      from[r] = row < 0 ? c.outside : rows.x[q + r] + row * row_bytes + group_bytes;
      inside += row >= 0;
    }
    for (int64_t r = count; r < kTileHeight; ++r) from[r] = c.outside;
    if (depth.joined > 1) continue;
    const int64_t stride = from[1] - from[0];
    int64_t differs = 0;
    for (int64_t r = 2; r < kTileHeight; ++r) differs |= (from[r] - from[r - 1]) ^ stride;
    // what a last block has too many of is multiplied by zeros, where it can be read at all
    const uintptr_t last = reinterpret_cast<uintptr_t>(stride < 0 ? from[0] : from[kTileHeight - 1]);
    const bool readable = whole || (K::kZerosSuffice && inside == kTileHeight &&
                                    c.end - last >= static_cast<uintptr_t>(depth.blocks * kTileBytes));
    const bool in_place = readable && inside == kTileHeight && differs == 0 && lines_of_set(stride) <= kLinesOfSet;
    c.copied[tile][t] = inside > 0 && !in_place;
    if (inside == 0) {
      sources[t] = Source{c.outside, 0, 0};
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

template <class K>
struct Outputs {  // of a register tile
  typename K::Sum* sums;
  int64_t width;  // of a row of sums
  typename K::End e;
  const int64_t *place, *residual;
  int64_t rows;
  bool full;
};

// What a register tile reads; areas are for the emulation alone.
struct Operands {
  const Source* sources[kMostTiles];  // of each tile of rows, by inner step
  const char* weights[kSliceTaps];    // by inner step
  int64_t weights_advance;
  const char* outside;
  Area map, copies, weight_area;
  QX_INLINE Area area(const Source& s) const {
    if (s.base == outside) return Area{outside, outside + kTileBytes};
    return s.base >= copies.first && s.base < copies.last ? copies : map;
  }
};

// ROWS x OUTS tiles of sums: tiles 0 to 3 hold them, 4 and 5 inputs, 6 and 7 weights.
template <int ROWS, int OUTS, class Start>
QX_INLINE void begin(const Start& start) {
  static_assert(ROWS * OUTS <= 4, "there are four tiles of sums");
  start.template put<0>(0);
  if constexpr (ROWS * OUTS > 1) start.template put<1>(OUTS == 2);
  if constexpr (ROWS * OUTS > 2) start.template put<2>(0);
  if constexpr (ROWS * OUTS > 3) start.template put<3>(OUTS == 2);
}

// One step; inputs.template load<T>(i) loads the i-th tile of rows.
template <class K, int ROWS, int OUTS, class Inputs>
QX_INLINE void products(const char* weights, const Area& area, const Inputs& inputs) {
  TileUnit::load<6>(weights, kTileBytes, area);
  inputs.template load<4>(0);
  K::template dot<0, 4, 6>();
  if constexpr (OUTS == 2) {
    TileUnit::load<7>(weights + kTileSize, kTileBytes, area);
    K::template dot<1, 4, 7>();
    if constexpr (ROWS == 2) {
      inputs.template load<5>(1);
      K::template dot<2, 5, 6>();
      K::template dot<3, 5, 7>();
    }
  } else {
    if constexpr (ROWS > 1) {
      inputs.template load<5>(1);
      K::template dot<1, 5, 6>();
    }
    if constexpr (ROWS > 2) {
      inputs.template load<4>(2);
      K::template dot<2, 4, 6>();
    }
    if constexpr (ROWS > 3) {
      inputs.template load<5>(3);
      K::template dot<3, 5, 6>();
    }
  }
}

template <int ROWS, int OUTS, class Sum>
QX_INLINE void store_sums(Sum* sums) {
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

struct AnyInputs {  // of one step
  const Operands& operands;
  int64_t inner, outer;
  template <int TILE>
  QX_INLINE void load(int64_t i) const {
    const Source& s = operands.sources[i][inner];
    TileUnit::load<TILE>(s.base + outer * s.advance, s.stride, operands.area(s));
  }
};

template <class K, int ROWS, int OUTS>
void multiply(const Operands& o, const Slice& slice, const Copying<K>* copying, const typename K::Start& start,
              const Outputs<K>& outputs, bool first, bool last) {
  if (first) begin<ROWS, OUTS>(start);
  const int64_t steps = slice.steps();
  CopySteps ahead;
  while (copying && ahead.step < least(kCopyAhead, steps)) ahead.copy(*copying, ROWS);
  for (int64_t outer = 0; outer < slice.outer; ++outer) {
    for (int64_t inner = 0; inner < slice.inner; ++inner) {
      if (copying && ahead.step < steps) ahead.copy(*copying, ROWS);
      products<K, ROWS, OUTS>(o.weights[inner] + outer * o.weights_advance, o.weight_area, AnyInputs{o, inner, outer});
    }
  }
  if (!last) return;
  store_sums<ROWS, OUTS>(outputs.sums);
  K::finish(outputs);
}

template <class K>
using MultiplyFunction = void (*)(const Operands&, const Slice&, const Copying<K>*, const typename K::Start&,
                                  const Outputs<K>&, bool, bool);
// by tiles of outputs and of rows
template <class K>
constexpr MultiplyFunction<K> kMultiply[kPanelTiles + 1][kMostTiles + 1] = {
    {},
    {nullptr, &multiply<K, 1, 1>, &multiply<K, 2, 1>, &multiply<K, 3, 1>, &multiply<K, 4, 1>},
    {nullptr, &multiply<K, 1, 2>, &multiply<K, 2, 2>, nullptr, nullptr}};

// A register tile whose tiles of inputs are all read in place, with one distance of rows and of blocks of channels.
// Fewer instructions lie between the loads than in the general form, so that more of them are under way at a time.
struct InPlace {
  const char* const* rows[kMostTiles];  // of each tile of rows, by inner step
  const char* const* weights;           // by inner step
  int64_t inner, outer, stride, weights_advance;
  Area map, weight_area;
};

struct InputsInPlace {  // of one step
  const InPlace& tiles;
  int64_t inner, moved;
  template <int TILE>
  QX_INLINE void load(int64_t i) const {
    TileUnit::load<TILE>(tiles.rows[i][inner] + moved, tiles.stride, tiles.map);
  }
};

template <class K, int ROWS, int OUTS>
void multiply_in_place(const InPlace& of, const typename K::Start& start, const Outputs<K>& outputs) {
  const InPlace tiles = of;  // memory may change with each load as the compiler sees it, what is here cannot
  begin<ROWS, OUTS>(start);
  for (int64_t outer = 0; outer < tiles.outer; ++outer) {
    for (int64_t inner = 0; inner < tiles.inner; ++inner) {
      products<K, ROWS, OUTS>(tiles.weights[inner] + outer * tiles.weights_advance, tiles.weight_area,
                              InputsInPlace{tiles, inner, outer * kTileBytes});
    }
  }
  store_sums<ROWS, OUTS>(outputs.sums);
  K::finish(outputs);
}

template <class K>
using MultiplyInPlaceFunction = void (*)(const InPlace&, const typename K::Start&, const Outputs<K>&);
template <class K>
constexpr MultiplyInPlaceFunction<K> kMultiplyInPlace[kPanelTiles + 1][kMostTiles + 1] = {
    {},
    {nullptr, &multiply_in_place<K, 1, 1>, &multiply_in_place<K, 2, 1>, &multiply_in_place<K, 3, 1>,
     &multiply_in_place<K, 4, 1>},
    {nullptr, &multiply_in_place<K, 1, 2>, &multiply_in_place<K, 2, 2>, nullptr, nullptr}};

// ---------------------------------------------------------------- driver

template <class K>
Cut tile_cut(const GatherGemm* g, int64_t threads) {
  if (!g->weight) return cut(g, threads);
  const int64_t tiles = ceil_div(g->out_channels / g->channel_groups, kTileOutputs);
  return cut_outputs(*g, threads, ceil_div(tiles, kPanelTiles), K::kCosts);
}

// The slices of a tap group: as many taps and blocks at a time as `most_steps` copied tiles hold.
struct Slices {
  int64_t used, taps, blocks, all_blocks, joined;
  template <class K>
  QX_INLINE Slices(const TileDepth<K>& depth, int64_t num_taps, int64_t most_steps) {
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
template <class K>
QX_INLINE void find_weights(Operands& o, const TileDepth<K>& depth, const Slice& slice, const int32_t* taps,
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
  // what follows the last tap is multiplied by what is read outside: only padding is sure to be zeros
  side_by_side = side_by_side && (slice.count % depth.joined == 0 || own[0] + slice.count == depth.taps);
  for (int64_t i = 0; i < slice.inner; ++i) {
    o.weights[i] = side_by_side ? panel + (own[0] / depth.joined + i) * step_bytes : joint + i * step_bytes;
  }
  if (side_by_side) return;
  o.weight_area = Area{joint, joint + kJointBytes};
  const int64_t tap_bytes = depth.unit / K::kTogether * kTileBytes;
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
template <class K>
void tile_run_in(const GatherGemm& g, Cut cut, int64_t part, char* joint, int64_t copy_bytes) {
  typedef typename K::Input Input;
  alignas(64) typename K::Sum sums[kMostTiles * kTileHeight * kTileOutputs];
  alignas(64) Input outside[kStepChannels<K>];
  TileRows rows;
  Copying<K> copying;
  Source sources[kChunkTiles][kSliceTaps];
  typename K::Start start;

  char* copies = joint + kJointBytes;
  for (Input& number : outside) number = K::outside(g);

  const TileDepth<K> depth(g.in_channels / g.channel_groups, g.num_taps);
  const int64_t per_group = g.out_channels / g.channel_groups, tiles = ceil_div(per_group, kTileOutputs);
  const int64_t panels = ceil_div(tiles, kPanelTiles), jobs = panels * g.channel_groups;
  const int64_t row_bytes = g.in_channels * int64_t{sizeof(Input)}, image_bytes = g.rows_in * row_bytes;
  const int64_t po = part % cut.outputs;
  const int64_t job_first = jobs * po / cut.outputs, job_last = jobs * (po + 1) / cut.outputs;
  const char* x = static_cast<const char*>(g.x);
  const char* packed = static_cast<const char*>(g.weight);
  const char* more = packed + g.channel_groups * tiles * depth.steps() * kTileSize;
  const Area packed_area{packed, more};
  copying.depth = &depth;
  copying.end = reinterpret_cast<uintptr_t>(x + g.batch * image_bytes);
  Operands operands{};
  copying.outside = operands.outside = reinterpret_cast<const char*>(outside);
  operands.map = Area{x, x + g.batch * image_bytes};
  operands.copies = Area{copies, copies + copy_bytes};

  TileUnit::configure(kFullTiles);
  for (PartOfGroups own(g, cut.positions, part / cut.outputs, kPairRows); own.next();) {
    const int64_t num_taps = own.num_taps, q_first = own.first, q_last = own.last;
    const int32_t* taps = own.taps;
    // Copied tiles are kept for all output channels if a chunk of at least two tiles fits; otherwise each register
    // tile copies its own, slice after slice.
    const int64_t all_steps = depth.blocks * depth.inner(num_taps);
    const int64_t fitting = copy_bytes / kTileSize / most(1, all_steps);
    const bool kept = num_taps <= kSliceTaps && fitting >= 2;
    const Slices slices(depth, num_taps, kept ? most(1, all_steps) : copy_bytes / kTileSize / kMostTiles);
    const int64_t pairs = ceil_div(q_last - q_first, kPairRows);
    const int64_t most_tiles = more - packed <= level2_bytes() / 2 ? kNearTiles : kChunkTiles;
    const int64_t chunks = ceil_div(pairs, (kept ? least(fitting, most_tiles) : most_tiles) / 2);
    const bool in_order = all_in_order(g, own);
    // whole tiles of such rows need no search
    const bool in_place =
        kept && in_order && depth.channels % kStepChannels<K> == 0 && lines_of_set(row_bytes) <= kLinesOfSetInOrder;
    const Slice first_slice = slices.at(0);
    const int64_t number = slices.count();
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t q0 = q_first + pairs * chunk / chunks * kPairRows;
      const int64_t q1 = least(q_last, q_first + pairs * (chunk + 1) / chunks * kPairRows);
      const int64_t chunk_tiles = ceil_div(q1 - q0, kTileHeight);
      if (in_order) {
        rows.follow(g, q0, q1, x, row_bytes);
      } else {
        rows.find(g, own, q0, q1, x, row_bytes);
      }
      int64_t located = -1;  // the channel group whose tiles are kept
      for (int64_t job = job_first; job < job_last; ++job) {
        const int64_t channel_group = job / panels, panel = job % panels, width = panel_width(tiles, panel);
        const int64_t o_local = panel * kPanelTiles * kTileOutputs;
        const int64_t count = least(width * kTileOutputs, per_group - o_local);
        const char* weights = packed + (channel_group * tiles + panel * kPanelTiles) * depth.steps() * kTileSize;
        const int64_t group_bytes = channel_group * depth.channels * int64_t{sizeof(Input)};
        const bool fresh = !kept || located != channel_group;
        located = channel_group;
        const typename K::End e = K::end(g, channel_group * per_group + o_local, count);
        const bool full = count == width * kTileOutputs && K::full(e);
        start.find(g, more, taps, num_taps, (channel_group * tiles + panel * kPanelTiles) * kTileOutputs,
                   g.channel_groups * tiles * kTileOutputs, width);
        if (kept) find_weights(operands, depth, first_slice, taps, weights, width, joint, packed_area);
        const int64_t high = kMostTiles / width;
        for (int64_t tile = 0; tile < chunk_tiles; tile += high) {
          const int64_t height = least(high, chunk_tiles - tile), q = tile * kTileHeight;
          const bool whole = q + height * kTileHeight <= q1 - q0;
          const Outputs<K> outputs{sums, width * kTileOutputs, e, rows.place + q, rows.residual + q,
                                   least(height * kTileHeight, q1 - q0 - q), full};
          if (in_place && whole) {
            const char* first_rows[kMostTiles];
            InPlace in{{},           operands.weights, first_slice.inner, first_slice.outer, row_bytes,
                       operands.weights_advance, operands.map, packed_area};
            for (int64_t i = 0; i < height; ++i) {
              first_rows[i] = x + (q0 + q + i * kTileHeight) * row_bytes + group_bytes;
              in.rows[i] = first_rows + i;
              // a narrower panel may join this tile with one that is not whole
              sources[tile + i][0] = Source{first_rows[i], row_bytes, kTileBytes};
            }
            kMultiplyInPlace<K>[width][height](in, start, outputs);
            continue;
          }
          for (int64_t s = 0; s < number; ++s) {
            const Slice slice = number == 1 ? first_slice : slices.at(s);
            for (int64_t i = 0; i < height; ++i) {
              const int64_t slot = kept ? tile + i : i, own_q = q + i * kTileHeight;
              operands.sources[i] = sources[slot];
              if (!fresh) continue;
              copying.slice = slice;
              copying.tiles[i] = copies + slot * slice.steps() * kTileSize;
              locate(copying, i, rows, own_q, least(kTileHeight, q1 - q0 - own_q), row_bytes, group_bytes, sources[slot]);
            }
            if (!kept) find_weights(operands, depth, slice, taps, weights, width, joint, packed_area);
            kMultiply<K>[width][height](operands, slice, fresh ? &copying : nullptr, start, outputs, s == 0,
                                        s == number - 1);
          }
        }
      }
    }
  }
  TileUnit::release();
}

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
