// The gather GEMM and its weight gradient on compiler vectors. Included once per instruction set,
// by a file that has chosen the target and defined
//   QX_ISA        namespace of this instruction set
//   QX_BYTES      bytes of a vector
//   QX_MAX_NV     vectors of output channels in the widest register tile
//   QX_TILE_ROWS  {rows of the register tile for 1, 2, .. QX_MAX_NV vectors}
//   QX_DOT_BF16   if the target has a bfloat16 dot product
// Nothing here may instantiate an inline function of the standard library: the linker could keep the
// copy made for the newest target and an older processor would crash in unrelated code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernel_api.h"

#define QX_INLINE inline __attribute__((always_inline))

namespace quincunx {
namespace QX_ISA {
namespace {

constexpr int kLanes = QX_BYTES / 4;
constexpr int kMaxNv = QX_MAX_NV;
constexpr int kTileRows[kMaxNv + 1] = {1, QX_TILE_ROWS};
constexpr int kMaxRows = 16;
// weights of one K block times one tile of output channels; stays in a level 2 cache with its input
constexpr int64_t kPanelBytes = 320 * 1024;
// channels of one K segment: a row is read in pieces of this many
constexpr int kMaxSegment = 384;
// positions that share one pass over the weights
constexpr int64_t kChunk = 192;
// least multiply-adds that pay for handing work to another thread
constexpr int64_t kMinPartMacs = 200000;

typedef float vf __attribute__((vector_size(QX_BYTES)));
typedef float vf_loose __attribute__((vector_size(QX_BYTES), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(QX_BYTES)));
typedef uint32_t vu __attribute__((vector_size(QX_BYTES)));
typedef uint16_t vh __attribute__((vector_size(QX_BYTES / 2)));
typedef uint16_t vh_loose __attribute__((vector_size(QX_BYTES / 2), aligned(2), may_alias));
typedef float float_alias __attribute__((aligned(2), may_alias));
typedef int32_t int_alias __attribute__((aligned(2), may_alias));

alignas(64) const float kZeros[kMaxSegment] = {};

QX_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_loose*>(p); }
QX_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_loose*>(p) = v; }
QX_INLINE vf load(const uint16_t* p) {
  vh h = *reinterpret_cast<const vh_loose*>(p);
  return reinterpret_cast<vf>(__builtin_convertvector(h, vu) << 16);
}
// to nearest, ties to even; a NaN stays one
QX_INLINE void store(uint16_t* p, vf v) {
  vu u = reinterpret_cast<vu>(v);
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vi ordered = v == v;
  rounded = (rounded & reinterpret_cast<vu>(ordered)) | (0x7fc0u & ~reinterpret_cast<vu>(ordered));
  *reinterpret_cast<vh_loose*>(p) = __builtin_convertvector(rounded, vh);
}
template <class S>
QX_INLINE vf load_some(const S* p, int64_t count) {
  if (count >= kLanes) return load(p);
  S buffer[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class S>
QX_INLINE void store_some(S* p, vf v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  S buffer[kLanes];
  store(buffer, v);
  for (int64_t i = 0; i < count; ++i) p[i] = buffer[i];
}
QX_INLINE vf at_least(vf v, float low) {
  vf bound = low - vf{};
  return v < bound ? bound : v;  // a NaN passes
}
QX_INLINE vf at_most(vf v, float high) {
  vf bound = high - vf{};
  return v > bound ? bound : v;
}
QX_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
QX_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
QX_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------- arithmetic of one step of K
// A step is four bytes of an input row: one float32 or two bfloat16.

struct Float {
  typedef float Input;
  static constexpr int kStep = 1;
  static QX_INLINE vf add(vf acc, const char* a, vf b) {
    return acc + *reinterpret_cast<const float_alias*>(a) * b;
  }
  static QX_INLINE vf add_last(vf acc, const char*, vf) { return acc; }
};

#ifdef QX_DOT_BF16
struct DotBf16 {
  typedef uint16_t Input;
  static constexpr int kStep = 2;
  static QX_INLINE vf add(vf acc, const char* a, vf b) {
    return dot_bf16(acc, *reinterpret_cast<const int_alias*>(a), b);
  }
  // an odd channel count: the pair's second half is not ours to read
  static QX_INLINE vf add_last(vf acc, const char* a, vf b) {
    return dot_bf16(acc, *reinterpret_cast<const uint16_t*>(a), b);
  }
};
#endif

// ---------------------------------------------------------------- how output channels are tiled
// Each channel group's outputs are cut in vectors, the last one padded, and these evenly in tiles of
// at most kMaxNv. Packed weights: tile after tile, [channel block][tap][channel step][tile's lanes].

struct Tiling {
  int64_t vectors, tiles, per_group;
  QX_INLINE Tiling(int64_t outputs_per_group, int max_nv = kMaxNv) {
    per_group = outputs_per_group;
    vectors = ceil_div(outputs_per_group, kLanes);
    tiles = ceil_div(vectors, max_nv);
  }
  QX_INLINE int64_t start(int64_t tile) const { return vectors * tile / tiles; }
};

struct Blocking {  // of the channels of one group
  int64_t channels, blocks, size;
  QX_INLINE explicit Blocking(int64_t c) {
    channels = c;
    blocks = ceil_div(c, kMaxSegment);
    size = ceil_div(ceil_div(c, blocks), 2) * 2;
    blocks = ceil_div(c, size);
  }
  QX_INLINE int64_t start(int64_t block) const { return block * size; }
  QX_INLINE int64_t length(int64_t block) const { return least(size, channels - block * size); }
};

template <class Op>
QX_INLINE int64_t steps(int64_t channels) {
  return ceil_div(channels, Op::kStep);
}

template <class Op>
int64_t packed_size(int64_t outputs, int64_t channels, int64_t taps, int64_t groups) {
  return groups * Tiling(outputs / groups).vectors * kLanes * taps * steps<Op>(channels) * Op::kStep;
}

template <class Op, class W>
void pack(const void* weight, void* packed, int64_t outputs, int64_t channels, int64_t taps, int64_t groups,
          int64_t part, int64_t parts);

QX_INLINE void convert(float from, float& to) { to = from; }
QX_INLINE void convert(uint16_t from, uint16_t& to) { to = from; }
QX_INLINE void convert(uint16_t from, float& to) {
  uint32_t bits = static_cast<uint32_t>(from) << 16;
  __builtin_memcpy(&to, &bits, 4);
}

template <class Op, class W>
void pack(const void* weight, void* packed, int64_t outputs, int64_t channels, int64_t taps, int64_t groups,
          int64_t part, int64_t parts) {
  typedef typename Op::Input P;
  constexpr int64_t step = Op::kStep;
  const W* from = static_cast<const W*>(weight);
  const Tiling tiling(outputs / groups);
  const Blocking blocking(channels);
  const int64_t column = taps * steps<Op>(channels) * step * kLanes;  // one vector of outputs
  const int64_t jobs = groups * tiling.tiles * blocking.blocks;
  for (int64_t job = jobs * part / parts; job < jobs * (part + 1) / parts; ++job) {
    const int64_t block = job % blocking.blocks, tile = job / blocking.blocks % tiling.tiles;
    const int64_t group = job / blocking.blocks / tiling.tiles;
    const int64_t v0 = tiling.start(tile), nv = tiling.start(tile + 1) - v0, width = nv * kLanes;
    const int64_t c0 = blocking.start(block), length = blocking.length(block);
    const int64_t tap_size = steps<Op>(length) * step * width;
    P* to = static_cast<P*>(packed) + (group * tiling.vectors + v0) * column + c0 * taps * width;
    const int64_t o0 = v0 * kLanes;
    // few channels at a time, so that what is written strided stays in cache
    for (int64_t c = 0; c < steps<Op>(length) * step; c += 8) {
      const int64_t stop = least(c + 8, steps<Op>(length) * step);
      for (int64_t lane = 0; lane < width; ++lane) {
        const bool real = o0 + lane < tiling.per_group;
        const W* row = from + ((group * tiling.per_group + o0 + lane) * channels + c0) * taps;
        for (int64_t i = c; i < stop; ++i) {
          P* cell = to + (i / step) * width * step + lane * step + i % step;
          if (real && i < length) {
            for (int64_t t = 0; t < taps; ++t) convert(row[i * taps + t], cell[t * tap_size]);
          } else {
            for (int64_t t = 0; t < taps; ++t) cell[t * tap_size] = 0;
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------- register tile

struct Segments {  // one K block: segments [first, last) of channel blocks times taps
  const char* weight;   // of the output tile
  const int32_t* taps;  // of the tap group
  int64_t num_taps, all_taps, first, last;
  Blocking blocking;
  int64_t row_bytes, tap_base;
};

struct TileRows {
  const char* x[kMaxRows];         // the image's first row, at the channel group
  const int32_t* index[kMaxRows];  // the position's taps
};

// acc[rows][NV vectors] (+)= gathered rows times weights
template <class Op, int ROWS, int NV>
void tile(const Segments& s, const TileRows& rows, float* out, bool first) {
  vf acc[ROWS][NV];
#pragma GCC unroll 32
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[r][v] = first ? vf{} : load(out + (r * NV + v) * kLanes);
  }
  int64_t block = s.num_taps ? s.first / s.num_taps : 0;
  int64_t t = s.first - block * s.num_taps;
  for (int64_t i = s.first; i < s.last; ++i) {
    const int64_t c0 = s.blocking.start(block), length = s.blocking.length(block);
    const char* a[ROWS];
    int32_t all = -1;
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; ++r) {
      const int32_t row = rows.index[r][t];
      all &= row;
      a[r] = row < 0 ? reinterpret_cast<const char*>(kZeros)
                     : rows.x[r] + row * s.row_bytes + c0 * (4 / Op::kStep);
    }
    if (all >= 0) {
      const int64_t count = length / Op::kStep;
      const float* b = reinterpret_cast<const float*>(s.weight) +
                       (c0 / Op::kStep * s.all_taps + s.taps[t] * steps<Op>(length)) * (NV * kLanes);
      for (int64_t k = 0; k < count; ++k) {
        vf w[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) w[v] = load(b + v * kLanes);
#pragma GCC unroll 32
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) acc[r][v] = Op::add(acc[r][v], a[r] + k * 4, w[v]);
        }
        b += NV * kLanes;
      }
      if (Op::kStep > 1 && length % Op::kStep) {
#pragma GCC unroll 32
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) acc[r][v] = Op::add_last(acc[r][v], a[r] + count * 4, load(b + v * kLanes));
        }
      }
    }
    if (++t == s.num_taps) {
      t = 0;
      ++block;
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(out + (r * NV + v) * kLanes, acc[r][v]);
  }
}

typedef void (*TileFunction)(const Segments&, const TileRows&, float*, bool);

template <class Op, int NV, int ROWS>
struct FillTable {
  static QX_INLINE void fill(TileFunction* table) {
    FillTable<Op, NV, ROWS - 1>::fill(table);
    table[ROWS] = &tile<Op, ROWS, NV>;
  }
};
template <class Op, int NV>
struct FillTable<Op, NV, 0> {
  static QX_INLINE void fill(TileFunction*) {}
};

template <class Op>
QX_INLINE TileFunction pick(int64_t nv, int64_t rows) {
  TileFunction table[kMaxRows + 1];
  switch (nv) {
    case 1: FillTable<Op, 1, kTileRows[1]>::fill(table); break;
#if QX_MAX_NV >= 2
    case 2: FillTable<Op, 2, kTileRows[2]>::fill(table); break;
#endif
#if QX_MAX_NV >= 3
    case 3: FillTable<Op, 3, kTileRows[3]>::fill(table); break;
#endif
#if QX_MAX_NV >= 4
    case 4: FillTable<Op, 4, kTileRows[4]>::fill(table); break;
#endif
  }
  return table[rows];
}

// ---------------------------------------------------------------- epilogue

template <class S>
void finish_rows(const GatherGemm& g, const float* acc, int64_t width, const int64_t* offset, int64_t rows,
                 int64_t o0, int64_t count) {
  S* out = static_cast<S*>(g.out) + o0;
  S* out2 = g.out2 ? static_cast<S*>(g.out2) + o0 : nullptr;
  const S* residual = g.residual ? static_cast<const S*>(g.residual) + o0 : nullptr;
  for (int64_t v = 0; v < count; v += kLanes) {
    const int64_t left = count - v;
    const vf bias = g.bias ? load_some(g.bias + o0 + v, left) : vf{};
    const vf scale = out2 ? load_some(g.scale2 + o0 + v, left) : vf{};
    const vf shift = out2 ? load_some(g.shift2 + o0 + v, left) : vf{};
    for (int64_t r = 0; r < rows; ++r) {
      vf value = load(acc + r * width + v) + bias;
      if (residual) value += load_some(residual + offset[r] + v, left);
      if (g.activation != kNone) value = at_least(value, 0.0f);
      if (g.activation == kRelu6) value = at_most(value, 6.0f);
      store_some(out + offset[r] + v, value, left);
      if (out2) store_some(out2 + offset[r] + v, at_least(value * scale + shift, 0.0f), left);
    }
  }
}

// ---------------------------------------------------------------- driver

struct Split {  // of one tap group's positions and output tiles over the parts
  int64_t outputs, positions;
};

// The largest share decides; among equals, the one that reads least.
QX_INLINE Split split(int64_t tiles, int64_t positions, int64_t weight_bytes, int64_t row_bytes, int64_t parts) {
  Split best{1, parts};
  double best_cost = -1;
  for (int64_t o = 1; o <= least(parts, tiles); ++o) {
    const int64_t p = parts / o;
    const double tile_share = ceil_div(tiles, o), position_share = ceil_div(positions, p);
    const double work = tile_share * position_share / (double(tiles) * positions);
    const double read = (tile_share / tiles * weight_bytes + position_share * row_bytes);
    // a byte from a far cache costs about as much as this many multiply-adds
    const double macs = double(tiles) * positions * (weight_bytes / 4.0 / tiles);
    const double cost = work * macs + 2.0 * read;
    if (best_cost < 0 || cost < best_cost) {
      best_cost = cost;
      best = Split{o, p};
    }
  }
  return best;
}

int64_t forward_scratch(const GatherGemm*) { return kChunk * kMaxNv * QX_BYTES; }

template <class Op, class S>
void forward(const GatherGemm* problem, int64_t part, int64_t parts, void* scratch) {
  const GatherGemm& g = *problem;
  const int64_t channels = g.in_channels / g.channel_groups;
  const Tiling tiling(g.out_channels / g.channel_groups);
  const int64_t tiles = tiling.tiles * g.channel_groups;
  const int64_t column_bytes = g.num_taps * steps<Op>(channels) * QX_BYTES;
  const int64_t element = 4 / Op::kStep;
  const int64_t row_bytes = g.in_channels * element;
  const Blocking blocking(channels);
  float* acc = static_cast<float*>(scratch);
  const int32_t* index = g.index;
  const int32_t* out_rows = g.rows;
  const int32_t* taps = g.taps;

  for (int64_t group = 0; group < g.num_groups; ++group) {
    const int64_t positions = g.groups[2 * group], num_taps = g.groups[2 * group + 1];
    const int64_t total = positions * g.batch;
    const int64_t segments = blocking.blocks * num_taps;
    const int64_t macs_per_row = num_taps * channels * tiling.per_group * g.channel_groups;
    // this group may be too small for every part
    const int64_t useful = most(1, least(parts, total * macs_per_row / kMinPartMacs));
    const Split cut = split(tiles, most(total, 1), num_taps * channels * 4 * g.out_channels,
                            row_bytes, useful);
    // small groups start at another part each, so that they do not all wait for the first
    const int64_t turned = (part + group * useful) % parts;
    if (turned < cut.outputs * cut.positions && total > 0) {
      const int64_t po = turned % cut.outputs, pp = turned / cut.outputs;
      const int64_t tile_first = tiles * po / cut.outputs, tile_last = tiles * (po + 1) / cut.outputs;
      const int64_t q_first = total * pp / cut.positions, q_last = total * (pp + 1) / cut.positions;
      const int64_t chunks = ceil_div(q_last - q_first, kChunk);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t q0 = q_first + (q_last - q_first) * chunk / chunks;
        const int64_t q1 = q_first + (q_last - q_first) * (chunk + 1) / chunks;
        for (int64_t job = tile_first; job < tile_last; ++job) {
          const int64_t channel_group = job / tiling.tiles, tile_number = job % tiling.tiles;
          const int64_t v0 = tiling.start(tile_number), nv = tiling.start(tile_number + 1) - v0;
          const int64_t width = nv * kLanes;
          const int64_t o_local = v0 * kLanes;
          const int64_t count = least(width, tiling.per_group - o_local);
          const int64_t panel = num_taps * steps<Op>(channels) * width * 4;
          const int64_t k_blocks = most(1, least(segments, ceil_div(panel, kPanelBytes)));
          const int64_t count_tiles = ceil_div(q1 - q0, kTileRows[nv]);
          Segments s{static_cast<const char*>(g.weight) + (channel_group * tiling.vectors + v0) * column_bytes,
                     taps, num_taps, g.num_taps, 0, 0, blocking, row_bytes, 0};
          const char* x = static_cast<const char*>(g.x) + channel_group * channels * element;
          for (int64_t k = 0; k < k_blocks; ++k) {
            s.first = segments * k / k_blocks;
            s.last = segments * (k + 1) / k_blocks;
            int64_t image = q0 / positions, p = q0 % positions;
            for (int64_t i = 0; i < count_tiles; ++i) {
              const int64_t from = q0 + (q1 - q0) * i / count_tiles, to = q0 + (q1 - q0) * (i + 1) / count_tiles;
              const int64_t n_rows = to - from;
              TileRows rows;
              int64_t offset[kMaxRows];
              for (int64_t r = 0; r < n_rows; ++r) {
                rows.x[r] = x + image * g.rows_in * row_bytes;
                rows.index[r] = index + p * num_taps;
                offset[r] = (image * g.rows_out + out_rows[p]) * g.out_channels;
                if (++p == positions) {
                  p = 0;
                  ++image;
                }
              }
              float* cell = acc + (from - q0) * width;
              pick<Op>(nv, n_rows)(s, rows, cell, k == 0);
              if (k == k_blocks - 1) {
                finish_rows<S>(g, cell, width, offset, n_rows, channel_group * tiling.per_group + o_local, count);
              }
            }
          }
        }
      }
    }
    index += positions * num_taps;
    out_rows += positions;
    taps += num_taps;
  }
}

template <class Op, class W, class S>
constexpr ForwardKernels forward_kernels() {
  return ForwardKernels{&packed_size<Op>, &pack<Op, W>, &forward_scratch, &forward<Op, S>};
}

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
