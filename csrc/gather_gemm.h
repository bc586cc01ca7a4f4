// The gather GEMM and its weight gradient on compiler vectors. Included once per instruction set,
// by a file that has chosen the target and defined
//   QX_ISA        namespace of this instruction set
//   QX_BYTES      bytes of a vector
//   QX_MAX_NV     vectors of output channels in the widest register tile
//   QX_TILE_ROWS  {rows of the register tile for 1, 2, .. QX_MAX_NV vectors}
//   QX_DOT_BF16   if the target has a bfloat16 dot product
//   QX_NARROW_BF16(v)  the vector rounded to bfloat16, if the target has an instruction for it
//   QX_WIDEN_BF16(h)   16-bit numbers as 32-bit ones, where the compiler takes several instructions for one
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
constexpr int kMaxRows = 28;
constexpr int kUnroll = 2;
// steps of K at a time in a tile of one vector, whose weights stay in registers; 0 without registers for them
constexpr int kDeep = QX_BYTES == 64 ? 8 : 0;
// channels of one K segment: a row is read in pieces of this many
constexpr int kMaxSegment = 384;
// positions that share one pass over the weights
constexpr int64_t kChunk = 192;
// images whose rows are taken side by side; fewer where their rows are far apart and displace each other
constexpr int64_t kImages = 8, kLargeMap = 1024;
// How work is cut: the least multiply-adds that pay for handing work to another thread, and what a part costs besides
// its own, counted in them: to begin, and a byte of 4-byte weights and maps from a far cache.
struct Costs {
  int64_t least_part;
  double part, byte;
};
constexpr Costs kVectorCosts{150000, 5000, 2};
// the same for a mean, in values read
constexpr int64_t kMinMeanValues = 40000;
constexpr int64_t kPartsPerThread = 4, kFewGroups = 16;

typedef float vf __attribute__((vector_size(QX_BYTES)));
typedef float vf_loose __attribute__((vector_size(QX_BYTES), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(QX_BYTES)));
typedef int32_t vi_loose __attribute__((vector_size(QX_BYTES), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(QX_BYTES)));
typedef uint16_t vh __attribute__((vector_size(QX_BYTES / 2)));
typedef uint16_t vh_loose __attribute__((vector_size(QX_BYTES / 2), aligned(2), may_alias));
typedef int32_t int_alias __attribute__((aligned(2), may_alias));

alignas(64) const float kZeros[kMaxSegment] = {};

QX_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_loose*>(p); }
QX_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_loose*>(p) = v; }
QX_INLINE vf load(const uint16_t* p) {
  vh h = *reinterpret_cast<const vh_loose*>(p);
#ifdef QX_WIDEN_BF16
  return reinterpret_cast<vf>(QX_WIDEN_BF16(h) << 16);
#else
  return reinterpret_cast<vf>(__builtin_convertvector(h, vu) << 16);
#endif
}
// to nearest, ties to even; a NaN stays one
QX_INLINE void store(uint16_t* p, vf v) {
#ifdef QX_NARROW_BF16
  *reinterpret_cast<vh_loose*>(p) = QX_NARROW_BF16(v);
#else
  vu u = reinterpret_cast<vu>(v);
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vi ordered = v == v;
  rounded = (rounded & reinterpret_cast<vu>(ordered)) | (0x7fc0u & ~reinterpret_cast<vu>(ordered));
  *reinterpret_cast<vh_loose*>(p) = __builtin_convertvector(rounded, vh);
#endif
}
// The first `count` of a vector's numbers, the others zeros. A sanitiser does not see what masks read, so it gets loops.
#if defined(__SANITIZE_ADDRESS__)
#elif QX_BYTES == 64 && defined(__x86_64__)
#define QX_MASKED
QX_INLINE __mmask16 first_lanes(int64_t count) { return __mmask16(count <= 0 ? 0 : (1u << count) - 1); }
QX_INLINE vf load_first(const float* p, int64_t count) { return (vf)_mm512_maskz_loadu_ps(first_lanes(count), p); }
QX_INLINE vf load_first(const uint16_t* p, int64_t count) {
  const __m256i halves = _mm256_maskz_loadu_epi16(first_lanes(count), p);
  return (vf)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, halves), 16);
}
QX_INLINE void store_first(float* p, vf v, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)v); }
QX_INLINE void store_first(uint16_t* p, vf v, int64_t count) {
  uint16_t buffer[kLanes];
  store(buffer, v);
  _mm256_mask_storeu_epi16(p, first_lanes(count), _mm256_loadu_si256((const __m256i*)buffer));
}
#endif
template <class S>
QX_INLINE vf load_some(const S* p, int64_t count) {
  if (count >= kLanes) return load(p);
#ifdef QX_MASKED
  return load_first(p, count);
#else
  S buffer[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = p[i];
  return load(buffer);
#endif
}
template <class S>
QX_INLINE void store_some(S* p, vf v, int64_t count) {
  if (count >= kLanes) return store(p, v);
#ifdef QX_MASKED
  store_first(p, v, count);
#else
  S buffer[kLanes];
  store(buffer, v);
  for (int64_t i = 0; i < count; ++i) p[i] = buffer[i];
#endif
}
// rounded to bfloat16, as a store is
QX_INLINE vf rounded(vf v) {
#ifdef QX_NARROW_BF16
  return reinterpret_cast<vf>(QX_WIDEN_BF16(QX_NARROW_BF16(v)) << 16);
#else
  uint16_t buffer[kLanes];
  store(buffer, v);
  return load(buffer);
#endif
}
// of each lane two numbers of bfloat16, given as float32, the first one below
QX_INLINE vf paired(vf first, vf second) {
  return reinterpret_cast<vf>((reinterpret_cast<vu>(first) >> 16) | reinterpret_cast<vu>(second));
}
QX_INLINE vf at_least(vf v, float low) {
  vf bound = low - vf{};
  return v < bound ? bound : v;  // a NaN passes
}
QX_INLINE vf at_most(vf v, float high) {
  vf bound = high - vf{};
  return v > bound ? bound : v;
}
}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx

#include "activations.h"

namespace quincunx {
namespace QX_ISA {
namespace {

QX_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
QX_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
QX_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Weights of one K block times one tile of output channels, which stay in the second-level cache with their input.
// Caches of 2 MB gain nothing from longer blocks: 512 channels of 7 x 7 positions are 4 to 12% slower with them.
inline int64_t panel_bytes() {
  constexpr int64_t kMostPanel = 320 << 10;
  return least(level2_bytes() / 16 * 5, kMostPanel);
}

// ---------------------------------------------------------------- arithmetic of one step of K
// A step reads kStep channels of an input row.

struct Float {
  typedef float Input;
  typedef float Packed;
  static constexpr int kStep = 1;
  static QX_INLINE vf add(vf acc, const Input* a, vf b) { return acc + *a * b; }
  static QX_INLINE vf add_last(vf acc, const Input*, vf) { return acc; }
};

// bfloat16 maps where only float32 can be multiplied
struct WideBf16 {
  typedef uint16_t Input;
  typedef float Packed;
  static constexpr int kStep = 1;
  static QX_INLINE vf add(vf acc, const Input* a, vf b) {
    return acc + reinterpret_cast<vf>(vu{} + (static_cast<uint32_t>(*a) << 16)) * b;
  }
  static QX_INLINE vf add_last(vf acc, const Input*, vf) { return acc; }
};

#ifdef QX_DOT_BF16
struct DotBf16 {
  typedef uint16_t Input;
  typedef uint16_t Packed;
  static constexpr int kStep = 2;
  static QX_INLINE vf add(vf acc, const Input* a, vf b) {
    return dot_bf16(acc, *reinterpret_cast<const int_alias*>(a), b);
  }
  // an odd channel count: the pair's second half is not ours to read
  static QX_INLINE vf add_last(vf acc, const Input* a, vf b) { return dot_bf16(acc, *a, b); }
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

template <class T>
QX_INLINE void convert(T from, T& to) {
  to = from;
}
QX_INLINE void convert(uint16_t from, float& to) {
  uint32_t bits = static_cast<uint32_t>(from) << 16;
  __builtin_memcpy(&to, &bits, 4);
}
// to nearest, ties to even; a NaN stays one
QX_INLINE void convert(float from, uint16_t& to) {
  uint32_t bits;
  __builtin_memcpy(&bits, &from, 4);
  to = static_cast<uint16_t>(from != from ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// a weight as it is multiplied with maps of type S: rounded where they are bfloat16
template <class S, class W, class P>
QX_INLINE void convert_weight(W from, P& to) {
  S format;
  convert(from, format);
  convert(format, to);
}
template <class S, class W>
QX_INLINE vf load_weights(const W* from) {
  return sizeof(S) < sizeof(W) ? rounded(load(from)) : load(from);
}

// few at a time and close together, so that what is written strided stays in cache
constexpr int64_t kPackChannels = 32, kPackTaps = 9;

QX_INLINE int64_t channel_offset(const Weight& w, int64_t c) {
  return w.inner == 1 ? c * w.channel_stride : c / w.inner * w.channel_stride + c % w.inner * w.inner_stride;
}

QX_INLINE vf shuffled(vf a, vf b, vi from) {
#if defined(__clang__)
  vf found;
  for (int l = 0; l < kLanes; ++l) found[l] = from[l] < kLanes ? a[from[l]] : b[from[l] - kLanes];
  return found;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// A square of lanes turned: what is apart by APART, once for each power of two.
template <int APART>
QX_INLINE void transpose(vf (&rows)[kLanes]) {
  if constexpr (APART < kLanes) {
    vi low, high;
#pragma GCC unroll 32
    for (int l = 0; l < kLanes; ++l) {
      low[l] = l & APART ? kLanes + l - APART : l;
      high[l] = l & APART ? kLanes + l : l + APART;
    }
#pragma GCC unroll 32
    for (int i = 0; i < kLanes; ++i) {
      if (i & APART) continue;
      const vf a = rows[i], b = rows[i + APART];
      rows[i] = shuffled(a, b, low);
      rows[i + APART] = shuffled(a, b, high);
    }
    transpose<2 * APART>(rows);
  }
}

// What one job of `pack` writes: a tile of outputs, `count` steps of K from step `first` of a block, all taps.
template <class Op>
struct PackedTile {
  typename Op::Packed* to;  // the tile's part of the block
  int64_t o0, nv, c0, length, first, count;
  int64_t width() const { return nv * kLanes; }
  // where the lanes of a vector of outputs lie
  typename Op::Packed* at(int64_t tap, int64_t step, int64_t v) const {
    return to + ((tap * steps<Op>(length) + step) * width() + v * kLanes) * Op::kStep;
  }
};

// From a weight whose channels are neighbours: squares of outputs and steps, turned in registers.
template <class Op, class W>
void pack_rows(const Weight& w, const W* from, const PackedTile<Op>& tile) {
  typedef typename Op::Input S;
  typedef typename Op::Packed P;
  constexpr int64_t step = Op::kStep;
  alignas(64) float square[kLanes * kLanes];
  for (int64_t v = 0; v < tile.nv; ++v) {
    for (int64_t t = 0; t < w.taps; ++t) {
      for (int64_t i = tile.first; i < tile.first + tile.count; i += kLanes) {
        const int64_t count = least(kLanes, tile.first + tile.count - i);
        const int64_t channels = least(count * step, tile.length - i * step);
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t o = tile.o0 + v * kLanes + lane;
          P* row = reinterpret_cast<P*>(square + lane * kLanes);
          const W* source = from + o * w.output_stride + (tile.c0 + i * step) * w.channel_stride + t * w.tap_stride;
          if (o < w.outputs && channels == kLanes * step) {
            if constexpr (sizeof(P) == sizeof(W) && sizeof(S) == sizeof(W)) {
              __builtin_memcpy(row, source, kLanes * step * sizeof(P));
            } else {
              for (int64_t k = 0; k < step; ++k) store(row + k * kLanes, load_weights<S>(source + k * kLanes));
            }
            continue;
          }
          const int64_t there = o < w.outputs ? channels : 0;
          for (int64_t c = 0; c < there; ++c) convert_weight<S>(source[c * w.channel_stride], row[c]);
          for (int64_t c = there; c < kLanes * step; ++c) row[c] = 0;
        }
        vf rows[kLanes];
#pragma GCC unroll 32
        for (int lane = 0; lane < kLanes; ++lane) rows[lane] = load(square + lane * kLanes);
        transpose<1>(rows);
        if (count == kLanes) {
#pragma GCC unroll 32
          for (int k = 0; k < kLanes; ++k) store(reinterpret_cast<float*>(tile.at(t, i + k, v)), rows[k]);
          continue;
        }
        for (int lane = 0; lane < kLanes; ++lane) store(square + lane * kLanes, rows[lane]);
        for (int64_t k = 0; k < count; ++k) {
          store(reinterpret_cast<float*>(tile.at(t, i + k, v)), load(square + k * kLanes));
        }
      }
    }
  }
}

// From a weight whose outputs are neighbours, as the adjoint's are.
template <class Op, class W>
void pack_columns(const Weight& w, const W* from, const PackedTile<Op>& tile) {
  typedef typename Op::Input S;
  typedef typename Op::Packed P;
  constexpr int64_t step = Op::kStep;
  for (int64_t i = tile.first; i < tile.first + tile.count; ++i) {
    const bool second = i * step + 1 < tile.length;
    for (int64_t t = 0; t < w.taps; ++t) {
      const W* source = from + (tile.c0 + i * step) * w.channel_stride + t * w.tap_stride;
      for (int64_t v = 0; v < tile.nv; ++v) {
        const int64_t o = tile.o0 + v * kLanes;
        P* to = tile.at(t, i, v);
        if (o + kLanes <= w.outputs) {
          vf value = load_weights<S>(source + o);
          if (step == 2) value = paired(value, second ? load_weights<S>(source + w.channel_stride + o) : vf{});
          store(reinterpret_cast<float*>(to), value);
          continue;
        }
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          for (int64_t c = 0; c < step; ++c) {
            const bool there = o + lane < w.outputs && (c == 0 || second);
            P& cell = to[lane * step + c];
            if (there) convert_weight<S>(source[c * w.channel_stride + (o + lane) * w.output_stride], cell);
            else cell = 0;
          }
        }
      }
    }
  }
}

// From any other weight.
template <class Op, class W>
void pack_cells(const Weight& w, const W* from, const PackedTile<Op>& tile) {
  typedef typename Op::Packed P;
  constexpr int64_t step = Op::kStep;
  constexpr int64_t kVector = kLanes * step, kTap = kPackChannels * kLanes;  // in the buffer
  alignas(64) P together[kPackTaps * kTap];
  const int64_t first = tile.first * step, stop = first + tile.count * step;
  for (int64_t v = 0; v < tile.nv; ++v) {
    for (int64_t t0 = 0; t0 < w.taps; t0 += kPackTaps) {
      const int64_t t_count = least(kPackTaps, w.taps - t0);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t o = tile.o0 + v * kLanes + lane;
        for (int64_t i = first; i < stop; ++i) {
          P* cell = together + (i - first) / step * kVector + lane * step + i % step;
          if (o < w.outputs && i < tile.length) {
            const W* row = from + o * w.output_stride + channel_offset(w, tile.c0 + i) + t0 * w.tap_stride;
            for (int64_t t = 0; t < t_count; ++t) {
              convert_weight<typename Op::Input>(row[t * w.tap_stride], cell[t * kTap]);
            }
          } else {
            for (int64_t t = 0; t < t_count; ++t) cell[t * kTap] = 0;
          }
        }
      }
      for (int64_t t = 0; t < t_count; ++t) {
        for (int64_t i = 0; i < tile.count; ++i) {
          __builtin_memcpy(tile.at(t0 + t, tile.first + i, v), together + t * kTap + i * kVector, kVector * sizeof(P));
        }
      }
    }
  }
}

template <class Op, class W>
void pack_from(const Weight& w, void* packed, int64_t part, int64_t parts) {
  typedef typename Op::Packed P;
  const bool rows = w.inner == 1 && w.channel_stride == 1, columns = !rows && w.inner == 1 && w.output_stride == 1;
  const Tiling tiling(w.outputs);
  const Blocking blocking(w.channels);
  const int64_t column = w.taps * steps<Op>(w.channels) * Op::kStep * kLanes;  // one vector of outputs
  const int64_t piece = rows || columns ? blocking.size : kPackChannels;
  const int64_t pieces = ceil_div(blocking.size, piece);  // of a channel block
  const int64_t jobs = w.groups * tiling.tiles * blocking.blocks * pieces;
  for (int64_t job = jobs * part / parts; job < jobs * (part + 1) / parts; ++job) {
    const int64_t block = job / pieces % blocking.blocks, number = job / pieces / blocking.blocks % tiling.tiles;
    const int64_t group = job / pieces / blocking.blocks / tiling.tiles;
    const int64_t v0 = tiling.start(number), nv = tiling.start(number + 1) - v0;
    const int64_t c0 = blocking.start(block), length = blocking.length(block);
    const int64_t first = job % pieces * piece / Op::kStep;
    const int64_t count = least(piece / Op::kStep, steps<Op>(length) - first);
    if (count <= 0) continue;
    P* to = static_cast<P*>(packed) + (group * tiling.vectors + v0) * column + c0 * w.taps * nv * kLanes;
    const PackedTile<Op> tile{to, v0 * kLanes, nv, c0, length, first, count};
    const W* from = static_cast<const W*>(w.data) + group * w.group_stride;
    (rows ? &pack_rows<Op, W> : columns ? &pack_columns<Op, W> : &pack_cells<Op, W>)(w, from, tile);
  }
}

template <class Op>
void pack(const Weight* w, void* packed, int64_t part, int64_t parts) {
  typedef typename Op::Input S;
  (w->wide ? &pack_from<Op, float> : &pack_from<Op, S>)(*w, packed, part, parts);
}

// ---------------------------------------------------------------- register tile

template <class Op>
struct Segments {  // one K block: segments [first, last) of channel blocks times taps
  const typename Op::Packed* weight;  // of the output tile
  const int32_t* taps;                // of the tap group
  int64_t num_taps, all_taps, first, last, in_channels;
  int64_t channel;  // the channel group's first
  int64_t count;    // segments in all
  // Weights from a far cache are fetched while the K block before is multiplied: lines for each step of
  // K, 0 where the weights stay near, and how many tiles of this K block did so before.
  int64_t ahead_lines, ahead_turn;
  Blocking blocking;
  const typename Op::Packed* segment(int64_t block, int64_t tap, int64_t width) const {
    const int64_t before = blocking.start(block) * all_taps;
    return weight + (before + taps[tap] * steps<Op>(blocking.length(block)) * Op::kStep) * width;
  }
};

// The output rows of a chunk: where each reads and writes.
template <class Op>
struct Rows {
  const typename Op::Input* x[kChunk];  // the image's first row
  const int32_t* index[kChunk];         // the position's taps
  int64_t place[kChunk];                // of the row's first channel in the output
  int64_t residual[kChunk];             // and in the residual
};

template <class S>
struct Epilogue {  // of one tile of output channels; pointers are at its first channel
  const float *bias, *scale, *shift, *slope;
  const S* residual;  // null where the tile lies beyond the residual's channels
  S *out, *out2;
  int64_t count, added;  // channels of the output and of the residual in this tile
  int32_t activation;
  float low2;
};

// no activation, ReLU or ReLU6 as two bounds, without a question for each vector
struct Bounds {
  float low, high;
  QX_INLINE explicit Bounds(int32_t activation) {
    low = activation == kNone ? -__builtin_inff() : 0.0f;
    high = activation == kRelu6 ? 6.0f : __builtin_inff();
  }
  QX_INLINE vf of(vf value) const { return at_most(at_least(value, low), high); }
};

// where a tile is not full, or the activation takes longer than a loop
template <class Op, class S>
void finish_partly(const Epilogue<S>& e, const Rows<Op>& rows, int64_t q, int64_t n, int64_t nv, const float* acc) {
  for (int64_t v = 0; v * kLanes < e.count; ++v) {
    const int64_t at = v * kLanes, left = e.count - at, added = e.residual ? e.added - at : 0;
    const vf bias = e.bias ? load_some(e.bias + at, left) : vf{};
    const vf scale = e.out2 ? load_some(e.scale + at, left) : vf{};
    const vf shift = e.out2 ? load_some(e.shift + at, left) : vf{};
    const vf slope = e.slope ? load_some(e.slope + at, left) : vf{};
    for (int64_t r = 0; r < n; ++r) {
      vf value = load(acc + (r * nv + v) * kLanes) + bias;
      if (added > 0) value += load_some(e.residual + rows.residual[q + r] + at, added);
      value = activated(value, e.activation, slope);
      if (e.out) store_some(e.out + rows.place[q + r] + at, value, left);
      if (e.out2) store_some(e.out2 + rows.place[q + r] + at, at_least(value * scale + shift, e.low2), left);
    }
  }
}

// A full tile, in its registers, many times over: no code for what is long. ADDED: a residual; SECOND: a second output.
template <class Op, class S, int ROWS, int NV, bool ADDED, bool SECOND>
QX_INLINE void finish_tile(const Epilogue<S>& e, const Rows<Op>& rows, int64_t q, const vf (&acc)[ROWS][NV]) {
  const Bounds bounds(e.activation);
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) {
    const int64_t at = v * kLanes;
    const vf bias = e.bias ? load(e.bias + at) : vf{};
    const vf scale = SECOND ? load(e.scale + at) : vf{};
    const vf shift = SECOND ? load(e.shift + at) : vf{};
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; ++r) {
      vf value = acc[r][v] + bias;
      if (ADDED && (!SECOND || e.residual)) value += load(e.residual + rows.residual[q + r] + at);
      value = bounds.of(value);
      if (!SECOND || e.out) store(e.out + rows.place[q + r] + at, value);
      if (SECOND) store(e.out2 + rows.place[q + r] + at, at_least(value * scale + shift, e.low2));
    }
  }
}

// where every vector of a tile is full and its activation a bound or none
template <class Op, class S, int ROWS, int NV>
QX_INLINE void finish_whole(const Epilogue<S>& e, const Rows<Op>& rows, int64_t q, const vf (&acc)[ROWS][NV]) {
  if (e.out2) return finish_tile<Op, S, ROWS, NV, true, true>(e, rows, q, acc);
  if (e.residual) return finish_tile<Op, S, ROWS, NV, true, false>(e, rows, q, acc);
  finish_tile<Op, S, ROWS, NV, false, false>(e, rows, q, acc);
}

// Rows [q, q + ROWS): acc (+)= gathered rows times NV vectors of weights, finished if it is the last K block.
template <class Op, class S, int ROWS, int NV>
void tile(const Segments<Op>& s, const Epilogue<S>& e, const Rows<Op>& rows, int64_t q, float* memory, bool first,
          bool last) {
  typedef typename Op::Input Input;
  constexpr int64_t kWidth = NV * kLanes;
  const bool full = e.count == kWidth && (!e.residual || e.added >= kWidth) && e.activation <= kRelu6;
  if (last && full) {
    // what the epilogue touches comes while the products are summed
    for (int r = 0; r < ROWS; ++r) {
      for (int64_t v = 0; v < kWidth; v += 64 / int64_t(sizeof(S))) {
        if (e.residual) __builtin_prefetch(e.residual + rows.residual[q + r] + v, 0);
        if (e.out) __builtin_prefetch(e.out + rows.place[q + r] + v, 1);
        if (e.out2) __builtin_prefetch(e.out2 + rows.place[q + r] + v, 1);
      }
    }
  }
  vf acc[ROWS][NV];
#pragma GCC unroll 32
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[r][v] = first ? vf{} : load(memory + (r * NV + v) * kLanes);
  }
  int64_t block = s.first ? s.first / s.num_taps : 0;
  int64_t t = s.first - block * s.num_taps;
  for (int64_t i = s.first; i < s.last; ++i) {
    const int64_t c0 = s.blocking.start(block), length = s.blocking.length(block);
    const int64_t channel = s.channel + c0;
    const Input* a[ROWS];
    int32_t all = -1;
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; ++r) {
      const int32_t row = rows.index[q + r][t];
      all &= row;
      a[r] = row < 0 ? reinterpret_cast<const Input*>(kZeros) : rows.x[q + r] + row * s.in_channels + channel;
    }
    if (all >= 0) {
      const int64_t count = length / Op::kStep;
      const float* b = reinterpret_cast<const float*>(s.segment(block, t, kWidth));
      const char* ahead = reinterpret_cast<const char*>(b);
      const int64_t later = i + s.last - s.first;
      const int64_t ahead_step = later < s.count ? 64 * s.ahead_lines : 0;
      if (ahead_step) {
        ahead = reinterpret_cast<const char*>(s.segment(later / s.num_taps, later % s.num_taps, kWidth)) +
                s.ahead_turn * count * ahead_step;
      }
      const auto multiply = [&](int64_t k, bool fetch) __attribute__((always_inline)) {
        vf w[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) w[v] = load(b + k * kWidth + v * kLanes);
        if (fetch) {
          __builtin_prefetch(ahead, 0, 2);
          ahead += ahead_step;
        }
#pragma GCC unroll 32
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) acc[r][v] = Op::add(acc[r][v], a[r] + k * Op::kStep, w[v]);
        }
      };
      int64_t k = 0;
      if (NV == kMaxNv && ahead_step) {
        for (; k < count; ++k) multiply(k, true);
      }
      if constexpr (NV == 1 && kDeep > 0) {
        // Row by row: there are more rows than registers for their places, and each is fetched once for all steps.
        for (; k + kDeep <= count; k += kDeep) {
          vf w[kDeep > 0 ? kDeep : 1];
#pragma GCC unroll 8
          for (int u = 0; u < kDeep; ++u) w[u] = load(b + (k + u) * kLanes);
#pragma GCC unroll 32
          for (int r = 0; r < ROWS; ++r) {
            const Input* from = a[r] + k * Op::kStep;
            asm("" : "+r"(from));  // one register with constant offsets, else GCC makes one of each
#pragma GCC unroll 8
            for (int u = 0; u < kDeep; ++u) acc[r][0] = Op::add(acc[r][0], from + u * Op::kStep, w[u]);
          }
        }
      }
      for (; k + kUnroll <= count; k += kUnroll) {
#pragma GCC unroll 8
        for (int u = 0; u < kUnroll; ++u) multiply(k + u, false);
      }
      for (; k < count; ++k) multiply(k, false);
      if (Op::kStep > 1 && length % Op::kStep) {
#pragma GCC unroll 32
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) {
            acc[r][v] = Op::add_last(acc[r][v], a[r] + count * Op::kStep, load(b + count * kWidth + v * kLanes));
          }
        }
      }
    }
    if (++t == s.num_taps) {
      t = 0;
      ++block;
    }
  }
  if (last && full) return finish_whole<Op, S, ROWS, NV>(e, rows, q, acc);
#pragma GCC unroll 32
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(memory + (r * NV + v) * kLanes, acc[r][v]);
  }
  if (last) finish_partly(e, rows, q, ROWS, NV, memory);
}

// every register tile there is, by vectors and rows
template <class Op, class S>
struct Tiles {
  void (*at[kMaxNv + 1][kMaxRows + 1])(const Segments<Op>&, const Epilogue<S>&, const Rows<Op>&, int64_t, float*, bool,
                                       bool);
  template <int NV, int ROWS>
  constexpr void fill() {
    at[NV][ROWS] = &tile<Op, S, ROWS, NV>;
    if constexpr (ROWS > 1) {
      fill<NV, ROWS - 1>();
    } else if constexpr (NV > 1) {
      fill<NV - 1, kTileRows[NV - 1]>();
    }
  }
  constexpr Tiles() : at{} { fill<kMaxNv, kTileRows[kMaxNv]>(); }
};
template <class Op, class S>
constexpr Tiles<Op, S> kTiles{};

// ---------------------------------------------------------------- driver

// Rows times taps of all groups and images: what the positions are cut by. A row without taps costs too.
QX_INLINE int64_t all_work(const GatherGemm& g) {
  int64_t work = 0;
  for (int64_t i = 0; i < g.num_groups; ++i) work += g.groups[2 * i] * most(1, g.groups[2 * i + 1]);
  return work * g.batch;
}

// A part's share of one tap group after the other: rows [first, last) of its positions times the images, its tables.
// A part takes its share of every group, so that it stays at one place of the map and finds it in the cache of the
// thread that wrote it, in whole `unit`s of rows; many small groups are cut one behind the other.
struct PartOfGroups {
  const GatherGemm& g;
  const int64_t parts, part, unit;
  int64_t work_first, work_last, done = 0;  // done: work of the groups before
  int64_t group = -1, positions = 0, num_taps = 0, first = 0, last = 0;
  const int32_t *index, *rows, *taps;
  QX_INLINE PartOfGroups(const GatherGemm& problem, int64_t of, int64_t number, int64_t rows_together = 1)
      : g(problem), parts(of), part(number), unit(rows_together), index(g.index), rows(g.rows), taps(g.taps) {
    const int64_t work = all_work(g);
    work_first = work * part / parts;
    work_last = work * (part + 1) / parts;
  }
  QX_INLINE bool next() {
    index += positions * num_taps;
    rows += positions;
    taps += num_taps;
    if (++group == g.num_groups) return false;
    positions = g.groups[2 * group];
    num_taps = g.groups[2 * group + 1];
    first = start(part, work_first);
    last = start(part + 1, work_last);
    done += positions * g.batch * most(1, num_taps);
    return true;
  }

 private:
  QX_INLINE int64_t start(int64_t number, int64_t work) const {
    const int64_t total = positions * g.batch;
    if (g.num_groups <= kFewGroups) return least(total, ceil_div(total, unit) * number / parts * unit);
    return least(total, ceil_div(most(0, work - done), most(1, num_taps)));
  }
};

// tiles_per_group: in how many tiles the outputs of a channel group are cut
Cut cut_outputs(const GatherGemm& g, int64_t threads, int64_t tiles_per_group, const Costs& costs) {
  const int64_t per_group = g.out_channels / g.channel_groups;
  const int64_t tiles = tiles_per_group * g.channel_groups, channels = g.in_channels / g.channel_groups;
  const double work = all_work(g), macs_per_tile = work * channels * per_group / tiles_per_group;
  const int64_t limit =
      most(1, least(kPartsPerThread * threads, int64_t(macs_per_tile * tiles) / costs.least_part));
  const double tile_bytes = 4.0 * g.num_taps * channels * per_group / tiles_per_group;
  const double map_bytes = 4.0 * g.batch * g.rows_in * g.in_channels;
  Cut best{1, 1};
  double best_cost = -1;
  for (int64_t o = 1; o <= least(limit, tiles); ++o) {
    for (int64_t n = 1; n <= kPartsPerThread; ++n) {
      const int64_t p = most(1, n * threads / o);
      if (o * p > limit && p > 1) break;
      const double part_tiles = ceil_div(tiles, o);
      const double part = part_tiles * macs_per_tile / p +
                          costs.byte * (part_tiles * tile_bytes + map_bytes / p) + costs.part;
      // threads take turns, and on the average one of them comes late by some of a part; a single one waits for nobody
      const double cost = part * (ceil_div(o * p, threads) + (threads > 1 ? 0.25 : 0.0));
      if (best_cost < 0 || cost < best_cost) {
        best_cost = cost;
        best = Cut{o, p};
      }
    }
  }
  return best;
}

Cut cut(const GatherGemm* g, int64_t threads) {
  if (g->weight) return cut_outputs(*g, threads, Tiling(g->out_channels / g->channel_groups).tiles, kVectorCosts);
  const int64_t parts = all_work(*g) * g->in_channels / kMinMeanValues;
  return Cut{1, most(1, least(kPartsPerThread * threads, parts))};
}

// The order of a group's rows: a few images at a time, position after position. Images side by side
// have the same border, so that whole tiles can skip the taps that fall outside.
struct Walk {
  int64_t batch, blocks, positions;
  int64_t block, first, last, position, image;
  QX_INLINE Walk(int64_t images, int64_t number, int64_t count) {
    batch = images;
    blocks = ceil_div(images, number);
    positions = count;
  }
  QX_INLINE void enter(int64_t which) {
    block = which;
    first = batch * block / blocks;
    last = batch * (block + 1) / blocks;
  }
  QX_INLINE void go_to(int64_t q) {
    const int64_t image_before = q / positions;
    enter(image_before * blocks / batch);
    if (image_before >= last) enter(block + 1);
    const int64_t rest = q - first * positions;
    position = rest / (last - first);
    image = first + rest % (last - first);
  }
  QX_INLINE void step() {
    if (++image < last) return;
    image = first;
    if (++position < positions) return;
    position = 0;
    enter(block + 1);
    image = first;
  }
};

template <class S>
Epilogue<S> epilogue(const GatherGemm& g, int64_t o0, int64_t count) {
  const auto at = [o0](const void* data) { return data ? static_cast<const S*>(data) + o0 : nullptr; };
  const int64_t added = g.residual ? g.residual_channels - o0 : 0;
  return Epilogue<S>{g.bias ? g.bias + o0 : nullptr,
                     g.scale2 ? g.scale2 + o0 : nullptr,
                     g.shift2 ? g.shift2 + o0 : nullptr,
                     g.slope ? g.slope + o0 : nullptr,
                     added > 0 ? at(g.residual) : nullptr,
                     const_cast<S*>(at(g.out)),
                     const_cast<S*>(at(g.out2)),
                     count,
                     added,
                     g.activation,
                     g.low2};
}

template <class S>
void mean_of_rows(const GatherGemm& g, Cut cut, int64_t part) {
  const int64_t positions = g.groups[0], total = g.batch * positions;
  for (int64_t at = total * part / cut.positions; at < total * (part + 1) / cut.positions; ++at) {
    const int64_t image = at / positions, p = at % positions;
    const int32_t* index = g.index + p * g.num_taps;
    const S* map = static_cast<const S*>(g.x) + image * g.rows_in * g.in_channels;
    S* out = static_cast<S*>(g.out) + (image * g.rows_out + g.rows[p]) * g.in_channels;
    if (g.num_taps == 1 && index[0] >= 0) {
      // one row is what a map is filled with
      __builtin_memcpy(out, map + int64_t{index[0]} * g.in_channels, g.in_channels * sizeof(S));
      continue;
    }
    int64_t count = 0;
    for (int32_t t = 0; t < g.num_taps; ++t) count += index[t] >= 0;
    const vf share = vf{} + 1.0f / float(most(1, count));
    for (int64_t c = 0; c < g.in_channels; c += kLanes) {
      vf sum{};
      for (int32_t t = 0; t < g.num_taps; ++t) {
        if (index[t] >= 0) sum += load_some(map + int64_t{index[t]} * g.in_channels + c, g.in_channels - c);
      }
      store_some(out + c, sum * share, g.in_channels - c);
    }
  }
}

// The next rows of a walk through a group, whose tables are given.
template <class Op>
void take_rows(const GatherGemm& g, Walk& walk, int64_t count, const int32_t* index, int64_t num_taps,
               const int32_t* out_rows, Rows<Op>& rows) {
  for (int64_t r = 0; r < count; ++r) {
    const int64_t row = out_rows[walk.position];
    rows.x[r] = static_cast<const typename Op::Input*>(g.x) + walk.image * g.rows_in * g.in_channels;
    rows.index[r] = index + walk.position * num_taps;
    rows.place[r] = (walk.image * g.rows_out + row) * g.out_channels;
    if (g.residual) {
      const int64_t from = g.residual_rows ? g.residual_rows[row] : row;
      rows.residual[r] = (walk.image * g.residual_size + from) * g.residual_channels;
    }
    walk.step();
  }
}

template <class Op, class S>
void run(const GatherGemm* problem, Cut cut, int64_t part) {
  if (!problem->weight) return mean_of_rows<S>(*problem, cut, part);
  typedef typename Op::Packed Packed;
  alignas(64) float acc[kChunk * kMaxNv * kLanes];
  Rows<Op> rows;
  const GatherGemm& g = *problem;
  const int64_t channels = g.in_channels / g.channel_groups;
  const Tiling tiling(g.out_channels / g.channel_groups);
  const int64_t tiles = tiling.tiles * g.channel_groups;
  const int64_t column = g.num_taps * steps<Op>(channels) * Op::kStep * kLanes;
  const Blocking blocking(channels);
  const int64_t po = part % cut.outputs;
  const int64_t tile_first = tiles * po / cut.outputs, tile_last = tiles * (po + 1) / cut.outputs;
  for (PartOfGroups own(g, cut.positions, part / cut.outputs); own.next();) {
    const int64_t positions = own.positions, num_taps = own.num_taps, q_first = own.first, q_last = own.last;
    const int32_t* taps = own.taps;
    const int64_t segments = blocking.blocks * num_taps;
    Walk walk(g.batch, g.rows_in < kLargeMap ? kImages : kImages / 2, positions);
    const int64_t chunks = ceil_div(q_last - q_first, kChunk);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t q0 = q_first + (q_last - q_first) * chunk / chunks;
      const int64_t q1 = q_first + (q_last - q_first) * (chunk + 1) / chunks;
      walk.go_to(q0);
      take_rows(g, walk, q1 - q0, own.index, num_taps, own.rows, rows);
      for (int64_t job = tile_first; job < tile_last; ++job) {
        const int64_t channel_group = job / tiling.tiles, tile_number = job % tiling.tiles;
        const int64_t v0 = tiling.start(tile_number), nv = tiling.start(tile_number + 1) - v0;
        const int64_t width = nv * kLanes;
        const int64_t o_local = v0 * kLanes, o0 = channel_group * tiling.per_group + o_local;
        const int64_t count = least(width, tiling.per_group - o_local);
        const int64_t panel = num_taps * steps<Op>(channels) * width * 4;
        const int64_t k_blocks = most(1, least(segments, ceil_div(panel, panel_bytes())));
        const int64_t count_tiles = ceil_div(q1 - q0, kTileRows[nv]);
        const int64_t least_rows = (q1 - q0) / count_tiles, larger = (q1 - q0) % count_tiles;
        Segments<Op> s{static_cast<const Packed*>(g.weight) + (channel_group * tiling.vectors + v0) * column,
                       taps, num_taps, g.num_taps, 0, 0, g.in_channels, channel_group * channels,
                       segments, 0, 0, blocking};
        // one tile reads its weights once; more share the fetching
        if (k_blocks > 1 && count_tiles > 1) s.ahead_lines = count_tiles < kMaxNv ? 2 : 1;
        const Epilogue<S> e = epilogue<S>(g, o0, count);
        for (int64_t k = 0; k < k_blocks; ++k) {
          s.first = segments * k / k_blocks;
          s.last = segments * (k + 1) / k_blocks;
          int64_t q = 0;
          for (int64_t i = 0; i < count_tiles; ++i) {
            const int64_t n = least_rows + (i < larger);
            s.ahead_turn = i;
            kTiles<Op, S>.at[nv][n](s, e, rows, q, acc + q * width, k == 0, k == k_blocks - 1);
            q += n;
          }
        }
      }
    }
  }
}

// maps and unpacked weights are of type S
template <class Op, class S>
constexpr ForwardKernels forward_kernels() {
  return ForwardKernels{sizeof(typename Op::Packed) == 2, &packed_size<Op>, &pack<Op>, &cut, &run<Op, S>};
}

// ---------------------------------------------------------------- weight gradient
// For one tap: [C, O] = (gathered x)^T gy, a sum of outer products over the positions. A unit of work is a panel of
// outputs, one block of channels and one tap; its sums are kept as [tile of outputs][channel][lanes]. A part owns some
// units for some of the positions, and goes through all of these for a few units at a time, whose sums stay in the
// cache. Where nobody else adds to them they go from there to the gradient.
// Positions are taken one by one as float32 or, where there is a dot product of bfloat16, in pairs: a float then
// holds the same channel at both of them.

constexpr int kGradNv = kMaxNv < 2 ? kMaxNv : 2;
constexpr int kGradRows[3] = {1, QX_GRAD_ROWS};
constexpr int64_t kGradChannels = 96;  // of a block
constexpr int64_t kGradChunk = 256;    // positions at a time
constexpr int64_t kGradTiles = 2;      // of a panel: they share the rows of x
// of the sums of the units at a time
inline int64_t grad_bytes() { return level2_bytes() / 2; }

// float32 maps, read in place
struct Singly {
  typedef const float* const* Rows;
  static constexpr int64_t kPositions = 1;
  static QX_INLINE const float* row(Rows x, int64_t q) { return x[q]; }
  static QX_INLINE vf add(vf acc, const float* a, vf b) { return acc + *a * b; }
};

// rows as float32, copied side by side
struct Widened {
  typedef const float* Rows;
  static constexpr int64_t kPositions = 1;
  static QX_INLINE const float* row(Rows x, int64_t q) { return x + q * kGradChannels; }
  static QX_INLINE vf add(vf acc, const float* a, vf b) { return acc + *a * b; }
};

#ifdef QX_DOT_BF16
struct InPairs {
  typedef const float* Rows;
  static constexpr int64_t kPositions = 2;
  static QX_INLINE const float* row(Rows x, int64_t q) { return x + q * kGradChannels; }
  static QX_INLINE vf add(vf acc, const float* a, vf b) {
    int32_t pair;
    __builtin_memcpy(&pair, a, 4);
    return dot_bf16(acc, pair, b);
  }
};
#endif

template <class By, int ROWS, int NV>
void outer(typename By::Rows x, int64_t c0, const float* gy, int64_t count, float* out, bool first) {
  vf acc[ROWS][NV];
#pragma GCC unroll 32
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[r][v] = first ? vf{} : load(out + (r * NV + v) * kLanes);
  }
  for (int64_t q = 0; q < count; ++q) {
    const float* a = By::row(x, q) + c0;
    // one register with constant offsets: else GCC makes one of each offset, and spills them
    asm("" : "+r"(a));
    vf b[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) b[v] = load(gy + v * kLanes);
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[r][v] = By::add(acc[r][v], a + r, b[v]);
    }
    gy += NV * kLanes;
  }
#pragma GCC unroll 32
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(out + (r * NV + v) * kLanes, acc[r][v]);
  }
}

// The row's first channel, or zeros; without a branch, which borders would make unpredictable.
template <class S>
QX_INLINE const S* gathered(const S* first_row, int32_t row, int64_t channels) {
  const uintptr_t inside = reinterpret_cast<uintptr_t>(first_row) + row * channels * sizeof(S);
  const uintptr_t outside = reinterpret_cast<uintptr_t>(kZeros);
  const uintptr_t mask = static_cast<uintptr_t>(static_cast<intptr_t>(row >> 31));
  return reinterpret_cast<const S*>(inside ^ ((inside ^ outside) & mask));
}

template <class By>
struct Outers {
  void (*at[kGradNv + 1][kMaxRows + 1])(typename By::Rows, int64_t, const float*, int64_t, float*, bool);
  template <int NV, int ROWS>
  constexpr void fill() {
    at[NV][ROWS] = &outer<By, ROWS, NV>;
    if constexpr (ROWS > 1) {
      fill<NV, ROWS - 1>();
    } else if constexpr (NV > 1) {
      fill<NV - 1, kGradRows[NV - 1]>();
    }
  }
  constexpr Outers() : at{} { fill<kGradNv, kGradRows[kGradNv]>(); }
};
template <class By>
constexpr Outers<By> kOuters{};

struct GradUnit {
  int64_t group, panel, block, tap;
};

struct GradLayout {
  int64_t channels, blocks, panels, taps, units, size;  // size: floats of the sums of all units
  Tiling tiling;
  QX_INLINE explicit GradLayout(const WeightGrad& g)
      : tiling(g.out_channels / g.channel_groups, kGradNv) {
    channels = g.in_channels / g.channel_groups;
    blocks = ceil_div(channels, kGradChannels);
    panels = ceil_div(tiling.tiles, kGradTiles);
    taps = g.num_taps;
    units = g.channel_groups * panels * blocks * taps;
    size = units * unit_size();
  }
  QX_INLINE int64_t start(int64_t block) const { return channels * block / blocks; }
  QX_INLINE int64_t tile(int64_t panel) const { return tiling.tiles * panel / panels; }
  // floats between the sums of two units
  QX_INLINE int64_t unit_size() const {
    return least(kGradTiles * kGradNv, tiling.vectors) * kLanes * ceil_div(channels, blocks);
  }
  QX_INLINE GradUnit unit(int64_t number) const {
    const int64_t job = number / taps, panel = job / blocks;
    return GradUnit{panel / panels, panel % panels, job % blocks, number % taps};
  }
};

// The cheapest split of parts into units' parts times positions' parts, of which each has at least so many positions.
// cost(units' parts, positions' parts)
template <class Cost>
QX_INLINE Cut cheapest_split(int64_t positions, int64_t units, int64_t least_positions, int64_t parts, const Cost& cost) {
  Cut best{1, 1};
  double best_cost = -1;
  for (int64_t p = 1; p <= parts; ++p) {
    const int64_t u = least(parts / p, units);
    if (p > 1 && positions / p < least_positions) break;
    const double its_cost = cost(u, p);
    if (best_cost < 0 || its_cost < best_cost) {
      best_cost = its_cost;
      best = Cut{u, p};
    }
  }
  return best;
}

QX_INLINE Cut split_grad(const WeightGrad& g, const GradLayout& layout, int64_t parts) {
  const int64_t total = g.batch * g.positions;
  return cheapest_split(total, layout.units, kGradChunk, parts, [&](int64_t u, int64_t p) {
    const double unit_macs = double(layout.size) / layout.units;
    // adding up a set of partial sums costs about as much as this many multiply-adds a float
    return double(ceil_div(layout.units, u)) * unit_macs * ceil_div(total, p) +
           (p > 1 ? 32.0 * (p + 1) * layout.size / parts : 0.0);
  });
}

// Units at a time: whole jobs where they fit, since a gradient whose taps are neighbours is written job by job.
QX_INLINE int64_t grad_piece(const GradLayout& layout) {
  const int64_t fitting = most(1, grad_bytes() / 4 / layout.unit_size());
  return fitting < layout.taps ? fitting : fitting / layout.taps * layout.taps;
}

int64_t grad_partial(const WeightGrad* g, int64_t parts) {
  const GradLayout layout(*g);
  const Cut cut = split_grad(*g, layout, parts);
  if (cut.positions > 1) return layout.size * cut.positions;
  return cut.outputs * least(layout.units, grad_piece(layout)) * layout.unit_size();
}

// The sums of one tile of outputs, a block of channels and taps [t0, t1), which are apart by `stride`, as the gradient.
QX_INLINE void write_grad(const WeightGrad& g, const GradLayout& layout, const GradUnit& unit, int64_t tile,
                          const float* sums, int64_t stride, int64_t t1) {
  const int64_t v0 = layout.tiling.start(tile), width = (layout.tiling.start(tile + 1) - v0) * kLanes;
  const int64_t o0 = v0 * kLanes, count = least(width, layout.tiling.per_group - o0), t0 = unit.tap;
  const int64_t c0 = layout.start(unit.block), channels = layout.start(unit.block + 1) - c0;
  float* to = g.grad + (unit.group * layout.tiling.per_group + o0) * layout.channels * layout.taps;
  const int64_t row = layout.channels * layout.taps;  // of an output
  if (g.channels_last) {
    for (int64_t t = t0; t < t1; ++t) {
      const float* from = sums + (t - t0) * stride;
      float* last = to + t * layout.channels + c0;
      int64_t c = 0;
      for (; c + kLanes <= channels; c += kLanes) {
        for (int64_t o = 0; o < count; o += kLanes) {
          vf square[kLanes];
#pragma GCC unroll 32
          for (int i = 0; i < kLanes; ++i) square[i] = load(from + (c + i) * width + o);
          transpose<1>(square);
          if (o + kLanes <= count) {
#pragma GCC unroll 32
            for (int i = 0; i < kLanes; ++i) store(last + (o + i) * row + c, square[i]);
          } else {
            alignas(64) float rest[kLanes * kLanes];
#pragma GCC unroll 32
            for (int i = 0; i < kLanes; ++i) store(rest + i * kLanes, square[i]);
            for (int64_t i = 0; o + i < count; ++i) store(last + (o + i) * row + c, load(rest + i * kLanes));
          }
        }
      }
      for (int64_t o = 0; o < count; ++o) {
        for (int64_t i = c; i < channels; ++i) last[o * row + i] = from[i * width + o];
      }
    }
    return;
  }
  // few channels at a time, so that what is read strided stays in cache
  for (int64_t c = 0; c < channels; c += 16) {
    for (int64_t o = 0; o < count; ++o) {
      for (int64_t i = c; i < least(c + 16, channels); ++i) {
        const float* from = sums + i * width + o;
        float* cells = to + o * row + (c0 + i) * layout.taps;
        for (int64_t t = t0; t < t1; ++t) cells[t] = from[(t - t0) * stride];
      }
    }
  }
}

// The gradient of units [first, last), whose sums are kept one after the other, unit after unit.
QX_INLINE void write_units(const WeightGrad& g, const GradLayout& layout, const float* sums, int64_t first,
                           int64_t last) {
  for (int64_t number = first; number < last;) {
    const GradUnit unit = layout.unit(number);
    const int64_t taps = least(layout.taps - unit.tap, last - number);
    const int64_t channels = layout.start(unit.block + 1) - layout.start(unit.block);
    const float* from = sums + (number - first) * layout.unit_size();
    for (int64_t tile = layout.tile(unit.panel); tile < layout.tile(unit.panel + 1); ++tile) {
      write_grad(g, layout, unit, tile, from, layout.unit_size(), unit.tap + taps);
      from += channels * (layout.tiling.start(tile + 1) - layout.tiling.start(tile)) * kLanes;
    }
    number += taps;
  }
}

// What a chunk's units read: outputs of a panel, packed tile after tile, and the rows behind one tap.
template <class S, class By>
struct GradChunk {
  alignas(64) float gy[kGradChunk * kGradTiles * kGradNv * kLanes];
  alignas(64) float copies[sizeof(S) == 2 ? kGradChunk * kGradChannels : 1];
  const S* rows[kGradChunk + 1];
  int64_t q0, q1;
  QX_INLINE int64_t count() const { return ceil_div(q1 - q0, By::kPositions); }

  void take_outputs(const WeightGrad& g, const GradLayout& layout, int64_t group, int64_t panel) {
    float* to = gy;
    for (int64_t tile = layout.tile(panel); tile < layout.tile(panel + 1); ++tile) {
      const int64_t v0 = layout.tiling.start(tile), nv = layout.tiling.start(tile + 1) - v0;
      const int64_t o0 = v0 * kLanes, there = least(nv * kLanes, layout.tiling.per_group - o0);
      const S* from = static_cast<const S*>(g.gy) + q0 * g.out_channels + group * layout.tiling.per_group + o0;
      for (int64_t q = q0; q < q1; q += By::kPositions, from += By::kPositions * g.out_channels, to += nv * kLanes) {
        for (int64_t v = 0; v < nv; ++v) {
          const int64_t left = there - v * kLanes;
          vf value = load_some(from + v * kLanes, left);
          if constexpr (By::kPositions == 2) {
            value = paired(value, q + 1 < q1 ? load_some(from + g.out_channels + v * kLanes, left) : vf{});
          }
          store(to + v * kLanes, value);
        }
      }
    }
  }

  typename By::Rows take_inputs(const WeightGrad& g, const S* base, int64_t tap, int64_t channels) {
    // image by image, so that the loop asks nothing
    const int64_t positions = most(1, g.positions);
    for (int64_t q = q0; q < q1;) {
      const int64_t p = q % positions, number = least(q1 - q, positions - p);
      const S* image = base + q / positions * g.rows_in * g.in_channels;
      const int32_t* index = g.index + p * g.num_taps + tap;
      for (int64_t i = 0; i < number; ++i) {
        rows[q - q0 + i] = gathered(image, index[i * g.num_taps], g.in_channels);
      }
      q += number;
    }
    if constexpr (sizeof(S) == 4) {
      return rows;
    } else {
      if constexpr (By::kPositions == 1) {
        for (int64_t i = 0; i < q1 - q0; ++i) copy_row(copies + i * kGradChannels, rows[i], channels);
      } else {
        rows[q1 - q0] = reinterpret_cast<const S*>(kZeros);  // a pair's second may not be
        float* to = copies;
        if (channels == kLanes) {  // a loop over a row would take as long as the row
          for (int64_t i = 0; i < q1 - q0; i += 2, to += kGradChannels) {
            store(to, paired(load(rows[i]), load(rows[i + 1])));
          }
          return copies;
        }
        for (int64_t i = 0; i < q1 - q0; i += 2, to += kGradChannels) pair_rows(to, rows[i], rows[i + 1], channels);
      }
      return copies;
    }
  }

 private:
  static QX_INLINE void copy_row(float* to, const S* from, int64_t channels) {
    for (int64_t c = 0; c < channels; c += kLanes) store_some(to + c, load_some(from + c, channels - c), channels - c);
  }
  static QX_INLINE void pair_rows(float* to, const S* first, const S* second, int64_t channels) {
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) store(to + c, paired(load(first + c), load(second + c)));
    if (c < channels) {
      store(to + c, paired(load_some(first + c, channels - c), load_some(second + c, channels - c)));
    }
  }
};

template <class S, class By>
void grad_run_of(const WeightGrad* problem, int64_t part, int64_t parts) {
  GradChunk<S, By> chunk;
  const WeightGrad& g = *problem;
  const GradLayout layout(g);
  const Cut cut = split_grad(g, layout, parts);
  if (part >= cut.outputs * cut.positions) return;
  const int64_t total = g.batch * g.positions;
  const int64_t pu = part % cut.outputs, pp = part / cut.outputs;
  const int64_t unit_first = layout.units * pu / cut.outputs, unit_last = layout.units * (pu + 1) / cut.outputs;
  const int64_t q_first = total * pp / cut.positions, q_last = total * (pp + 1) / cut.positions;
  const bool alone = cut.positions == 1;
  const int64_t piece = grad_piece(layout), size = layout.unit_size();
  // no positions at all: one empty chunk writes the zeros
  const int64_t chunks = most(1, ceil_div(q_last - q_first, kGradChunk));
  for (int64_t first = unit_first; first < unit_last;) {
    const int64_t last = least(unit_last, (first / piece + 1) * piece);
    float* sums = g.partial + (alone ? pu * least(layout.units, piece) : pp * layout.units + first) * size;
    for (int64_t i = 0; i < chunks; ++i) {
      chunk.q0 = q_first + (q_last - q_first) * i / chunks;
      chunk.q1 = q_first + (q_last - q_first) * (i + 1) / chunks;
      int64_t panel = -1;  // whose outputs are packed
      for (int64_t number = first; number < last; ++number) {
        const GradUnit unit = layout.unit(number);
        if (panel != unit.group * layout.panels + unit.panel) {
          panel = unit.group * layout.panels + unit.panel;
          chunk.take_outputs(g, layout, unit.group, unit.panel);
        }
        const int64_t c0 = layout.start(unit.block), channels = layout.start(unit.block + 1) - c0;
        const S* base = static_cast<const S*>(g.x) + unit.group * layout.channels + c0;
        const typename By::Rows x = chunk.take_inputs(g, base, unit.tap, channels);
        float* out = sums + (number - first) * size;
        const float* gy = chunk.gy;
        for (int64_t tile = layout.tile(unit.panel); tile < layout.tile(unit.panel + 1); ++tile) {
          const int64_t nv = layout.tiling.start(tile + 1) - layout.tiling.start(tile), width = nv * kLanes;
          const int64_t pieces = ceil_div(channels, kGradRows[nv]);
          for (int64_t k = 0; k < pieces; ++k) {
            const int64_t from = channels * k / pieces, to = channels * (k + 1) / pieces;
            kOuters<By>.at[nv][to - from](x, from, gy, chunk.count(), out + from * width, i == 0);
          }
          out += channels * width;
          gy += chunk.count() * width;
        }
      }
    }
    if (alone) write_units(g, layout, sums, first, last);
    first = last;
  }
}

void grad_run(const WeightGrad* g, int64_t part, int64_t parts) {
#ifdef QX_DOT_BF16
  typedef InPairs Half;
#else
  typedef Widened Half;
#endif
  (g->bf16 ? &grad_run_of<uint16_t, Half> : &grad_run_of<float, Singly>)(g, part, parts);
}

void grad_finish(const WeightGrad* problem, int64_t part, int64_t parts, int64_t run_parts) {
  const WeightGrad& g = *problem;
  const GradLayout layout(g);
  const int64_t sets = split_grad(g, layout, run_parts).positions;
  if (sets == 1) return;
  const int64_t jobs = layout.units / layout.taps;
  for (int64_t job = jobs * part / parts; job < jobs * (part + 1) / parts; ++job) {
    const int64_t first = job * layout.taps, size = layout.unit_size(), floats = layout.taps * size;
    float* sums = g.partial + first * size;
    for (int64_t i = 0; i < floats; i += kLanes) {
      vf sum = load(sums + i);
      for (int64_t set = 1; set < sets; ++set) sum += load(sums + set * layout.size + i);
      store(sums + i, sum);
    }
    write_units(g, layout, sums, first, first + layout.taps);
  }
}

[[maybe_unused]] void extremes(const int32_t* values, int64_t count, int32_t* low, int32_t* high) {
  vi lows{}, highs{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const vi v = *reinterpret_cast<const vi_loose*>(values + i);
    lows = v < lows ? v : lows;
    highs = v > highs ? v : highs;
  }
  *low = *high = 0;
  for (int l = 0; l < kLanes; ++l) {
    if (lows[l] < *low) *low = lows[l];
    if (highs[l] > *high) *high = highs[l];
  }
  for (; i < count; ++i) {
    if (values[i] < *low) *low = values[i];
    if (values[i] > *high) *high = values[i];
  }
}

int64_t grad_least_part(const WeightGrad*) { return 300000; }

constexpr GradKernels kGrad{&grad_least_part, &grad_partial, &grad_run, &grad_finish};

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
