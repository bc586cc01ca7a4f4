// The weight gradient in bfloat16 on tiles, with float32 sums: grad[o, c, t] = sum over positions of gy[o] x[c].
// Steps of K are 32 positions, so both operands are turned first. A tile of gy has 16 outputs in rows of 32 positions;
// it serves all taps and channels, and is made once for as many positions as half of the second-level cache holds. A
// tile of x has 16 pairs of positions, each with the two numbers of 16 channels side by side; it serves all outputs, and
// is made for as many positions at a time as the first-level cache holds. Both are made two steps before they are first
// multiplied, so that vectors work while the tiles do.
//
// A unit of work is a panel of outputs times 2 tiles of x: 32 channels behind one tap, or 16 each behind two where one
// tile is left over. Its sums are squares of 32 outputs and 32 columns. Vectors pair numbers within 16 bytes, so the
// columns of 4 channels each take turns between both tiles; the gradient has them in order again.
//
// A file that includes this may define QX_TWO_PLACES(a, b) and QX_FOUR_PLACES(p, apart): a vector of 64 bytes from two
// places, or from four that are equally far apart.
#pragma once

#include "tile_gemm.h"

namespace quincunx {
namespace QX_ISA {
namespace {

constexpr int64_t kGradStep = kTileBytes / 2;   // positions of a step
// Steps of a block, whose tiles of x stay in the first-level cache. Few outputs leave no time to wait for it.
constexpr int64_t kBlockSteps = 8, kFewPairs = 2, kFewSteps = 6;
constexpr int64_t kBlockPositions = kBlockSteps * kGradStep;
constexpr int64_t kPanelPairs = 16;             // pairs of tiles of outputs that share the tiles of x
constexpr int64_t kLeastGrad = 64;              // positions at a time, without memory for more
constexpr int64_t kHalf = kTileBytes / 4, kColumns = 2 * kHalf, kSquare = kColumns * kColumns;
constexpr int64_t kRowBytes = 2 * kHalf;        // of 16 channels
// multiply-adds that pay for another thread
constexpr int64_t kLeastTileGrad = 3000000;

typedef uint16_t Halves __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint64_t Doubles __attribute__((vector_size(64)));
typedef uint16_t HalvesLoose __attribute__((vector_size(64), aligned(2), may_alias));

typedef int64_t Rows8 __attribute__((vector_size(64), aligned(8), may_alias));
typedef int32_t Index8 __attribute__((vector_size(32), aligned(4), may_alias));

QX_INLINE int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

// ---------------------------------------------------------------- units

struct GradHalf {  // 16 columns of a unit
  int64_t tap, channel, count;
};

struct TileGradUnit {
  int64_t group, panel;
  GradHalf halves[2];
};

struct TileGradLayout {
  int64_t groups, outputs, channels, taps;  // outputs, channels: of a group
  int64_t pairs, panels, wide, joined;      // wide: units of 32 channels behind a tap; joined: of two taps
  int64_t panel_units, units, chunk, chunks;
  QX_INLINE explicit TileGradLayout(const WeightGrad& g) {
    groups = g.channel_groups;
    outputs = g.out_channels / groups;
    channels = g.in_channels / groups;
    taps = g.num_taps;
    pairs = ceil_div(outputs, kColumns);
    panels = ceil_div(pairs, kPanelPairs);
    const int64_t tiles = ceil_div(channels, kHalf);
    wide = tiles / 2 * taps;
    joined = tiles % 2 * ceil_div(taps, 2);
    panel_units = wide + joined;
    units = groups * panels * panel_units;
    // positions whose tiles of gy fill half of the second-level cache
    const int64_t fitting = level2_bytes() / 2 / (most_pairs() * kColumns * 2);
    chunk = most(kLeastGrad, fitting / kBlockPositions * kBlockPositions);
    chunks = most(1, ceil_div(g.batch * g.positions, chunk));
  }
  QX_INLINE int64_t block_steps() const { return most_pairs() <= kFewPairs ? kFewSteps : kBlockSteps; }
  QX_INLINE int64_t most_pairs() const { return ceil_div(pairs, panels); }
  QX_INLINE int64_t pair(int64_t panel) const { return pairs * panel / panels; }
  QX_INLINE int64_t unit_size() const { return most_pairs() * kSquare; }
  QX_INLINE int64_t size() const { return units * unit_size(); }
  // Units of one job differ in the tap alone. A gradient whose taps are neighbours is written job by job.
  QX_INLINE int64_t job_end(int64_t number) const {
    const int64_t i = number % panel_units;
    return number - i + (i < wide ? (i / taps + 1) * taps : panel_units);
  }
  QX_INLINE TileGradUnit unit(int64_t number) const {
    const int64_t panel = number / panel_units, i = number % panel_units;
    TileGradUnit unit{panel / panels, panel % panels, {}};
    if (i < wide) {
      const int64_t c = i / taps * kColumns, tap = i % taps;
      unit.halves[0] = GradHalf{tap, c, kHalf};
      unit.halves[1] = GradHalf{tap, c + kHalf, least(kHalf, channels - c - kHalf)};
    } else {
      const int64_t c = wide / taps * kColumns, tap = (i - wide) * 2;
      unit.halves[0] = GradHalf{tap, c, channels - c};
      unit.halves[1] = tap + 1 < taps ? GradHalf{tap + 1, c, channels - c} : GradHalf{tap, c, 0};
    }
    return unit;
  }
  // the last of as many whole jobs of one panel as `piece` units hold, at least one
  QX_INLINE int64_t piece_end(int64_t first, int64_t limit, int64_t piece) const {
    const int64_t most_units = least(limit, (first / panel_units + 1) * panel_units);
    int64_t last = least(job_end(first), most_units);
    while (last < most_units && job_end(last) - first <= piece) last = least(job_end(last), most_units);
    return last;
  }
  // Units whose sums are kept at a time: those of one job if all positions are taken at once, else of many, since tiles
  // of gy are made again for each piece.
  QX_INLINE int64_t piece() const {
    const int64_t kept = chunks == 1 ? 1 : 2 * level2_bytes() / 4 / unit_size();
    return least(units, most(taps, kept));
  }
};

QX_INLINE Cut split_tile_grad(const WeightGrad& g, const TileGradLayout& layout, int64_t parts) {
  const int64_t total = g.batch * g.positions;
  return cheapest_split(total, layout.units, kBlockPositions, parts, [&](int64_t u, int64_t p) {
    // In cycles: a step of a square takes 64; every part makes the tiles of gy that it needs. A partial sum is written
    // and read again.
    const double steps = double(ceil_div(ceil_div(total, p), kGradStep)) * layout.most_pairs();
    return (ceil_div(layout.units, u) + 2) * steps * 64 + (p > 1 ? double(p + 1) * layout.size() / parts : 0.0);
  });
}

// ---------------------------------------------------------------- tiles

// Numbers of both in turns, the first or the second half of each 16 bytes. Vectors wider than the target's are not
// passed by value.
template <class V>
QX_INLINE void in_turns(const V& a, const V& b, int second, V& found) {
  constexpr int kCount = sizeof(V) / sizeof(a[0]), kLane = 16 / sizeof(a[0]);
  V from;
#pragma GCC unroll 32
  for (int l = 0; l < kCount; ++l) {
    from[l] = l / kLane * kLane + second * kLane / 2 + l % kLane / 2 + (l % 2 ? kCount : 0);
  }
#if defined(__clang__)
  for (int l = 0; l < kCount; ++l) found[l] = from[l] < kCount ? a[from[l]] : b[from[l] - kCount];
#else
  found = __builtin_shuffle(a, b, from);
#endif
}

QX_INLINE void load_halves(const char* from, Halves& v) { v = *reinterpret_cast<const HalvesLoose*>(from); }
// twice 32 bytes
QX_INLINE void load_halves(const char* first, const char* second, Halves& v) {
#ifdef QX_TWO_PLACES
  v = QX_TWO_PLACES(first, second);
#else
  char buffer[64];
  __builtin_memcpy(buffer, first, 32);
  __builtin_memcpy(buffer + 32, second, 32);
  load_halves(buffer, v);
#endif
}
// four times 16 bytes
QX_INLINE void load_halves(const char* first, int64_t apart, Halves& v) {
#ifdef QX_FOUR_PLACES
  v = QX_FOUR_PLACES(first, apart);
#else
  char buffer[64];
  for (int i = 0; i < 4; ++i) __builtin_memcpy(buffer + 16 * i, first + i * apart, 16);
  load_halves(buffer, v);
#endif
}
QX_INLINE void store_halves(char* to, const Halves& v) { *reinterpret_cast<HalvesLoose*>(to) = v; }

// TILES tiles of outputs from 32 rows of gy: within each 16 bytes, squares of 8 numbers are turned.
template <int TILES>
__attribute__((noinline)) void turn_outputs(char* to, const char* from, int64_t stride) {
#pragma GCC unroll 1
  for (int64_t octet = 0; octet < 2 * TILES; ++octet, from += 16, to += 8 * kTileBytes) {
    Halves rows[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) load_halves(from + i * stride, 8 * stride, rows[i]);
    Words twos[8];
    // twos[2 i + s]: rows 2 i and 2 i + 1 of outputs 4 s to 4 s + 3
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      Halves pair;
      in_turns(rows[i / 2 * 2], rows[i / 2 * 2 + 1], i % 2, pair);
      twos[i] = reinterpret_cast<Words>(pair);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      Words low, high;
      in_turns(twos[i / 2], twos[i / 2 + 2], i % 2, low);
      in_turns(twos[i / 2 + 4], twos[i / 2 + 6], i % 2, high);
#pragma GCC unroll 2
      for (int second = 0; second < 2; ++second) {
        Doubles turned;
        in_turns(reinterpret_cast<Doubles>(low), reinterpret_cast<Doubles>(high), second, turned);
        store_halves(to + (2 * i + second) * kTileBytes, reinterpret_cast<Halves>(turned));
      }
    }
  }
}

// Where the rows of x behind a unit are, and how far its channels are from their first.
struct GradRows {
  const char* const* rows[2];  // of each half's tap
  int64_t moved[2];
  bool side_by_side;
};

// A row of each of two tiles of x.
QX_INLINE void store_pairs(char* to, const Halves& a, const Halves& b) {
  Halves pairs;
  in_turns(a, b, 0, pairs);
  store_halves(to, pairs);
  in_turns(a, b, 1, pairs);
  store_halves(to + kTileSize, pairs);
}

__attribute__((noinline)) void pair_inputs(char* to, const GradRows& x, int64_t step) {
  const char* const* low = x.rows[0] + step * kGradStep;
  const char* const* high = x.rows[1] + step * kGradStep;
  const int64_t moved = x.moved[0], moved_high = x.moved[1];
  if (x.side_by_side) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < kTileHeight; ++k, low += 2, to += kTileBytes) {
      Halves a, b;
      load_halves(low[0] + moved, a);
      load_halves(low[1] + moved, b);
      store_pairs(to, a, b);
    }
    return;
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < kTileHeight; ++k, low += 2, high += 2, to += kTileBytes) {
    Halves a, b;
    load_halves(low[0] + moved, high[0] + moved_high, a);
    load_halves(low[1] + moved, high[1] + moved_high, b);
    store_pairs(to, a, b);
  }
}

// gy of one group, of positions [q0, q1)
struct GradOutputs {
  const char *from, *end;  // position q0; of the map
  int64_t stride, count;

  // The tiles of outputs from `output` on at one step. What lies beyond the last position is 0.
  template <int TILES>
  void turn(char* to, int64_t step, int64_t output) const {
    const int64_t q = step * kGradStep;
    const char* first = from + q * stride + output * 2;
    const int64_t left = count - q;
    if (left >= kGradStep && end - first >= (kGradStep - 1) * stride + TILES * kRowBytes) {
      return turn_outputs<TILES>(to, first, stride);
    }
    char rows[kGradStep * kTileBytes] = {};
    for (int64_t r = 0; r < least(left, kGradStep); ++r, first += stride) {
      __builtin_memcpy(rows + r * kTileBytes, first, least(end - first, TILES * kRowBytes));
    }
    turn_outputs<TILES>(to, rows, kTileBytes);
  }
};

// ---------------------------------------------------------------- squares of sums

// The product of one pair of tiles of outputs with the two tiles of x, over the steps of a block.
struct GradProduct {
  char *outputs, *inputs;  // their tiles, step after step
  float* sums;
  int64_t steps, step;  // step: the block's first one of the chunk
  int64_t output;
  const GradOutputs* turn;  // makes the tiles of outputs; null where they are there
  const GradRows* pair;     // likewise of x, whose rows are the block's
  bool first;               // the sums start at 0
  Area output_area, input_area, sum_area;
};

template <int TILES>
QX_INLINE void prepare(const GradProduct& p, int64_t step) {
  if (step >= p.steps) return;
  if (p.pair) pair_inputs(p.inputs + step * 2 * kTileSize, *p.pair, step);
  if (p.turn) p.turn->turn<TILES>(p.outputs + step * TILES * kTileSize, p.step + step, p.output);
}

// With one tile of outputs even and odd steps have sums of their own, to be added: a sum waits for the one before.
template <int TILES>
void grad_product(const GradProduct& p) {
  constexpr int64_t kStride = kColumns * 4;
  float* const below = p.sums + kTileHeight * kColumns;
  for (int64_t step = 0; step < kCopyAhead; ++step) prepare<TILES>(p, step);
  if (p.first) {
    TileUnit::zero<0>();
    TileUnit::zero<1>();
    TileUnit::zero<2>();
    TileUnit::zero<3>();
  } else {
    TileUnit::load<0>(reinterpret_cast<const char*>(p.sums), kStride, p.sum_area);
    TileUnit::load<1>(reinterpret_cast<const char*>(p.sums + kHalf), kStride, p.sum_area);
    TileUnit::load<2>(reinterpret_cast<const char*>(below), kStride, p.sum_area);
    TileUnit::load<3>(reinterpret_cast<const char*>(below + kHalf), kStride, p.sum_area);
  }
  const char *a = p.outputs, *b = p.inputs;
  for (int64_t step = 0; step < p.steps; ++step, a += TILES * kTileSize, b += 2 * kTileSize) {
    prepare<TILES>(p, step + kCopyAhead);
    TileUnit::load<4>(a, kTileBytes, p.output_area);
    TileUnit::load<6>(b, kTileBytes, p.input_area);
    TileUnit::load<7>(b + kTileSize, kTileBytes, p.input_area);
    if (TILES == 2 || step % 2 == 0) {
      TileUnit::dot<0, 4, 6>();
      TileUnit::dot<1, 4, 7>();
    } else {
      TileUnit::dot<2, 4, 6>();
      TileUnit::dot<3, 4, 7>();
    }
    if (TILES == 2) {
      TileUnit::load<5>(a + kTileSize, kTileBytes, p.output_area);
      TileUnit::dot<2, 5, 6>();
      TileUnit::dot<3, 5, 7>();
    }
  }
  TileUnit::store<0>(p.sums, kStride);
  TileUnit::store<1>(p.sums + kHalf, kStride);
  TileUnit::store<2>(below, kStride);
  TileUnit::store<3>(below + kHalf, kStride);
}

// ---------------------------------------------------------------- the gradient

// Where column `channel` of a half lies in a row of sums.
QX_INLINE int64_t column(int64_t half, int64_t channel) {
  return channel / 4 % 2 * kHalf + half * 8 + channel / 8 * 4 + channel % 4;
}

// The gradient of units [first, last) of one job.
QX_INLINE void write_tile_units(const WeightGrad& g, const TileGradLayout& layout, float* sums, int64_t first,
                                int64_t last) {
  const TileGradUnit start = layout.unit(first);
  const int64_t p0 = layout.pair(start.panel), p1 = layout.pair(start.panel + 1), size = layout.unit_size();
  const int64_t row = layout.channels * layout.taps;  // of an output
  for (int64_t pair = p0; pair < p1; ++pair, sums += kSquare) {
    const int64_t o0 = pair * kColumns, count = least(kColumns, layout.outputs - o0);
    float* to = g.grad + (start.group * layout.outputs + o0) * row;
    for (int64_t number = first; count <= kHalf && number < last; ++number) {
      float* square = sums + (number - first) * size;
      for (int64_t i = 0; i < kSquare / 2; i += kLanes) {
        store(square + i, load(square + i) + load(square + kSquare / 2 + i));
      }
    }
    for (int64_t number = first; g.channels_last && number < last; ++number) {
      const TileGradUnit unit = layout.unit(number);
      for (int64_t half = 0; half < 2; ++half) {
        const GradHalf& own = unit.halves[half];
        float* cells = to + own.tap * layout.channels + own.channel;
        const float* from = sums + (number - first) * size + column(half, 0);
        for (int64_t o = 0; o < count; ++o, cells += row, from += kColumns) {
          if (own.count == kHalf) {
#pragma GCC unroll 4
            for (int64_t c = 0; c < kHalf; c += 4) __builtin_memcpy(cells + c, from + column(0, c), 16);
          } else {
            for (int64_t c = 0; c < own.count; ++c) cells[c] = from[column(0, c)];
          }
        }
      }
    }
    if (g.channels_last) continue;
    for (int64_t o = 0; o < count; ++o, to += row) {
      const float* square = sums + o * kColumns;
      if (start.halves[0].tap == start.halves[1].tap && start.halves[1].channel != start.halves[0].channel) {
        const int64_t channels = kHalf + start.halves[1].count;
        for (int64_t c = 0; c < channels; ++c) {
          float* cells = to + (start.halves[0].channel + c) * layout.taps + start.halves[0].tap;
          const float* from = square + column(c / kHalf, c % kHalf);
          for (int64_t t = 0; t < last - first; ++t) cells[t] = from[t * size];
        }
      } else {
        const int64_t taps = least(2 * (last - first), layout.taps - start.halves[0].tap);
        for (int64_t c = 0; c < start.halves[0].count; ++c) {
          float* cells = to + (start.halves[0].channel + c) * layout.taps + start.halves[0].tap;
          for (int64_t t = 0; t < taps; ++t) cells[t] = square[t / 2 * size + column(t % 2, c)];
        }
      }
    }
  }
}

// ---------------------------------------------------------------- driver

// What is read where the map has no row, and copies of its last rows: tiles read more of them than there is.
struct GradMargin {
  int64_t row_bytes, first;  // first: the first row, of all images, that is copied
  QX_INLINE GradMargin(const WeightGrad& g, const TileGradLayout& layout) {
    row_bytes = g.in_channels * 2;
    const int64_t rows = g.batch * g.rows_in;
    first = layout.channels % kHalf == 0 ? rows : most(0, rows - ceil_div(kRowBytes, row_bytes));
  }
  // of zeros, then of copies
  QX_INLINE int64_t zeros() const { return row_bytes + kRowBytes; }
  QX_INLINE int64_t bytes(const WeightGrad& g) const {
    return zeros() + (g.batch * g.rows_in - first) * row_bytes + kRowBytes;
  }
};

// Bytes of memory for the tiles of outputs of so many positions, and for blocks.
struct GradMemory {
  int64_t margin, rows, index, outputs;
  QX_INLINE GradMemory(const WeightGrad& g, const TileGradLayout& layout, int64_t positions) {
    margin = round_up(GradMargin(g, layout).bytes(g), kTileBytes);
    rows = kBlockPositions * layout.taps * int64_t{sizeof(char*)};
    index = round_up(g.positions * layout.taps * int64_t{sizeof(int32_t)}, kTileBytes);
    if (index > level2_bytes() / 8 || positions == kLeastGrad) index = 0;
    outputs = positions * layout.most_pairs() * kColumns * 2;
  }
  QX_INLINE int64_t bytes() const { return margin + rows + index + outputs; }
};

QX_INLINE int64_t kept_sums(const TileGradLayout& layout, const Cut& cut) {
  return cut.positions > 1 ? layout.size() * cut.positions : cut.outputs * layout.piece() * layout.unit_size();
}

// Memory that a part has at least, in floats, with room to align it.
QX_INLINE int64_t least_floats(const WeightGrad& g, const TileGradLayout& layout) {
  return (GradMemory(g, layout, kLeastGrad).bytes() + kTileBytes) / 4;
}

int64_t tile_grad_partial(const WeightGrad* g, int64_t parts) {
  const TileGradLayout layout(*g);
  const Cut cut = split_tile_grad(*g, layout, parts);
  return kept_sums(layout, cut) + cut.outputs * cut.positions * least_floats(*g, layout);
}

// The rows of x behind the taps of a block's positions: tap after tap.
struct FoundRows {
  const char** first;
  const int32_t* index;             // of tap 0
  int64_t tap_stride, index_stride;  // from a tap to the next, from a position to the next

  // Copied tap after tap where there is memory for it: rows of neighbours are found together then.
  QX_INLINE FoundRows(const WeightGrad& g, char* rows, int32_t* turned) {
    const int64_t taps = g.num_taps;
    first = reinterpret_cast<const char**>(rows);
    index = g.index;
    tap_stride = 1;
    index_stride = taps;
    if (turned == nullptr) return;
    for (int64_t p = 0; p < g.positions; ++p) {
      for (int64_t t = 0; t < taps; ++t) turned[t * g.positions + p] = g.index[p * taps + t];
    }
    index = turned;
    tap_stride = g.positions;
    index_stride = 1;
  }

  // of positions [q0, q1); behind them there is nothing up to a whole step
  void find(const WeightGrad& g, const GradMargin& margin, const char* spare, int64_t q0, int64_t q1) const {
    const int64_t bytes = margin.row_bytes;
    const char* const x = static_cast<const char*>(g.x);
    const char* const copies = spare + margin.zeros() - margin.first * bytes;
    for (int64_t q = q0; q < q1;) {
      const int64_t image = q / g.positions, p = q % g.positions, number = least(q1 - q, g.positions - p);
      const int64_t moved = image * g.rows_in * bytes, last = margin.first - image * g.rows_in;
      const bool together = index_stride == 1 && last >= g.rows_in;
      for (int64_t t = 0; t < g.num_taps; ++t) {
        const int32_t* own = index + t * tap_stride + p * index_stride;
        const char** to = first + t * kBlockPositions + q - q0;
        int64_t i = 0;
        for (; together && i + 8 <= number; i += 8) {
          const Rows8 rows = __builtin_convertvector(*reinterpret_cast<const Index8*>(own + i), Rows8);
          const Rows8 there = rows * bytes + reinterpret_cast<int64_t>(x + moved);
          *reinterpret_cast<Rows8*>(to + i) = rows < 0 ? Rows8{} + reinterpret_cast<int64_t>(spare) : there;
        }
        for (; i < number; ++i) {
          const int64_t row = own[i * index_stride];
          to[i] = row < 0 ? spare : (row < last ? x : copies) + moved + row * bytes;
        }
      }
      q += number;
    }
    for (int64_t t = 0; t < g.num_taps; ++t) {
      for (int64_t i = q1 - q0; i < round_up(q1 - q0, kGradStep); ++i) first[t * kBlockPositions + i] = spare;
    }
  }
};

void tile_grad_run(const WeightGrad* problem, int64_t part, int64_t parts) {
  alignas(64) char inputs[kBlockSteps * 2 * kTileSize];
  const WeightGrad& g = *problem;
  const TileGradLayout layout(g);
  const Cut cut = split_tile_grad(g, layout, parts);
  if (part >= cut.outputs * cut.positions) return;
  const int64_t total = g.batch * g.positions, size = layout.unit_size();
  const int64_t pu = part % cut.outputs, pp = part / cut.outputs;
  const int64_t unit_first = layout.units * pu / cut.outputs, unit_last = layout.units * (pu + 1) / cut.outputs;
  const int64_t q_first = total * pp / cut.positions, q_last = total * (pp + 1) / cut.positions;
  const bool alone = cut.positions == 1;

  float* const sums_end = g.partial + kept_sums(layout, cut);
  int64_t chunk = layout.chunk;
  GradMemory sizes(g, layout, chunk);
  char* memory = thread_scratch(sizes.bytes());
  if (memory == nullptr) {
    chunk = kLeastGrad;
    sizes = GradMemory(g, layout, chunk);
    memory = reinterpret_cast<char*>(sums_end + part * least_floats(g, layout));
    memory += -reinterpret_cast<uintptr_t>(memory) % kTileBytes;
  }
  const GradMargin margin(g, layout);
  char* const spare = memory;
  char* const outputs = memory + sizes.margin + sizes.rows + sizes.index;
  char* const turned_index = memory + sizes.margin + sizes.rows;
  const FoundRows rows(g, memory + sizes.margin, sizes.index ? reinterpret_cast<int32_t*>(turned_index) : nullptr);
  __builtin_memset(spare, 0, sizes.margin);
  if (margin.first < g.batch * g.rows_in) {
    __builtin_memcpy(spare + margin.zeros(), static_cast<const char*>(g.x) + margin.first * margin.row_bytes,
                     (g.batch * g.rows_in - margin.first) * margin.row_bytes);
  }

  GradProduct product{};
  product.inputs = inputs;
  product.output_area = Area{outputs, outputs + sizes.outputs};
  product.input_area = Area{inputs, inputs + sizeof inputs};
  product.sum_area = Area{reinterpret_cast<char*>(g.partial), reinterpret_cast<char*>(sums_end)};
  GradOutputs gy;
  gy.stride = int64_t{g.out_channels} * 2;
  gy.end = static_cast<const char*>(g.gy) + total * gy.stride;
  GradRows x;

  const int64_t all_steps = ceil_div(q_last - q_first, kGradStep);
  // no positions at all: one chunk without steps writes the zeros
  const int64_t chunks = most(1, ceil_div(all_steps, chunk / kGradStep)), piece = alone ? layout.piece() : layout.units;
  int64_t turned_chunk = -1, turned_panel = -1;  // whose tiles of outputs are there
  TileUnit::configure(kFullTiles);
  for (int64_t first = unit_first, last; first < unit_last; first = last) {
    last = layout.piece_end(first, unit_last, piece);
    float* const sums = g.partial + (alone ? pu * piece : pp * layout.units + first) * size;
    const int64_t group = layout.unit(first).group, panel = layout.unit(first).panel;
    const int64_t p0 = layout.pair(panel), p1 = layout.pair(panel + 1);
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t step_first = all_steps * i / chunks, steps = all_steps * (i + 1) / chunks - step_first;
      const int64_t q0 = q_first + step_first * kGradStep, q1 = least(q_last, q0 + steps * kGradStep);
      gy.count = q1 - q0;
      gy.from = static_cast<const char*>(g.gy) + q0 * gy.stride + group * layout.outputs * 2;
      const bool turned = turned_chunk == i && turned_panel == group * layout.panels + panel;
      turned_chunk = i;
      turned_panel = group * layout.panels + panel;
      const int64_t blocks = most(1, ceil_div(steps, layout.block_steps()));
      for (int64_t block = 0; block < blocks; ++block) {
        product.step = steps * block / blocks;
        product.steps = steps * (block + 1) / blocks - product.step;
        product.first = i == 0 && block == 0;
        const int64_t block_start = q0 + product.step * kGradStep;
        rows.find(g, margin, spare, block_start, least(q1, block_start + product.steps * kGradStep));
        for (int64_t number = first; number < last; ++number) {
          const TileGradUnit unit = layout.unit(number);
          for (int64_t half = 0; half < 2; ++half) {
            x.rows[half] = rows.first + unit.halves[half].tap * kBlockPositions;
            x.moved[half] = (group * layout.channels + unit.halves[half].channel) * 2;
          }
          x.side_by_side = x.rows[0] == x.rows[1] && x.moved[1] - x.moved[0] == kRowBytes;
          product.turn = number > first || turned ? nullptr : &gy;
          for (int64_t pair = p0; pair < p1; ++pair) {
            product.output = pair * kColumns;
            product.sums = sums + (number - first) * size + (pair - p0) * kSquare;
            product.pair = pair == p0 ? &x : nullptr;
            const bool both = layout.outputs - product.output > kHalf;
            product.outputs = outputs + (pair - p0) * steps * 2 * kTileSize + product.step * (both ? 2 : 1) * kTileSize;
            (both ? &grad_product<2> : &grad_product<1>)(product);
          }
        }
      }
    }
    for (int64_t job = first, end; alone && job < last; job = end) {
      end = least(layout.job_end(job), last);
      write_tile_units(g, layout, sums + (job - first) * size, job, end);
    }
  }
  TileUnit::release();
}

void tile_grad_finish(const WeightGrad* problem, int64_t part, int64_t parts, int64_t run_parts) {
  const WeightGrad& g = *problem;
  const TileGradLayout layout(g);
  const int64_t sets = split_tile_grad(g, layout, run_parts).positions, size = layout.unit_size();
  if (sets == 1) return;
  // a part's units begin and end with a job
  const auto limit = [&](int64_t number) {
    const int64_t first = layout.units * number / parts;
    return first == 0 ? 0 : layout.job_end(first - 1);
  };
  for (int64_t first = limit(part), last; first < limit(part + 1); first = last) {
    last = layout.job_end(first);
    float* sums = g.partial + first * size;
    for (int64_t i = 0; i < (last - first) * size; i += kLanes) {
      vf sum = load(sums + i);
      for (int64_t set = 1; set < sets; ++set) sum += load(sums + set * layout.size() + i);
      store(sums + i, sum);
    }
    write_tile_units(g, layout, sums, first, last);
  }
}

// Gradients in bfloat16 on tiles, also of groups that fill a part of them: vectors were slower for every shape tried,
// depthwise ones too. kGeneral's in float32.
template <const GradKernels* kGeneral>
struct TileGrad {
  static int64_t least_part(const WeightGrad* g) { return g->bf16 ? kLeastTileGrad : kGeneral->least_part(g); }
  static int64_t partial_floats(const WeightGrad* g, int64_t parts) {
    return (g->bf16 ? &tile_grad_partial : kGeneral->partial_floats)(g, parts);
  }
  static void run(const WeightGrad* g, int64_t part, int64_t parts) {
    (g->bf16 ? &tile_grad_run : kGeneral->run)(g, part, parts);
  }
  static void finish(const WeightGrad* g, int64_t part, int64_t parts, int64_t run_parts) {
    (g->bf16 ? &tile_grad_finish : kGeneral->finish)(g, part, parts, run_parts);
  }
  static constexpr GradKernels kernels{&least_part, &partial_floats, &run, &finish};
};

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
