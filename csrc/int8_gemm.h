// The gather GEMM on uint8 maps and int8 weights: exact sums in 32 bits, everything behind them in float32, each
// operation rounded by itself, so that all instruction sets give the same bits. Included once per instruction set
// after gather_gemm.h, by a file that has chosen the target, forbidden the compiler to contract a product and a sum into
// one operation, and perhaps defined
//   QX_DOT_U8S8(acc, a, b)  acc[i] + the four products of bytes of a[i], unsigned, and b[i], signed; without saturation
//   QX_MADD16(a, b)         the two products of signed 16-bit halves of a[i] and b[i], added
//   QX_WIDEN_U8(p)          kLanes bytes as 32-bit numbers, where the compiler takes several instructions for it
//   QX_ROUND(v)             the numbers rounded to integers, ties to even; a NaN and what does not fit become the lowest.
//                           Then what is stored is saturated at 0 and 255 there, else it is within them before:
//   QX_NARROW_U8(p, v)      kLanes numbers stored as bytes
//   QX_NARROW_SOME_U8(p, nv, a, b, c, d)  nv vectors of them, 2 to 4
//   QX_GREATER(a, b), QX_LESSER(a, b)  a > b ? a : b and a < b ? a : b, where the compiler takes several for it
// The epilogue does not know who summed: int8_tiles.h uses it, too.
#pragma once

#include "few_channels.h"

namespace quincunx {
namespace QX_ISA {
namespace {

// what Rows and take_rows of gather_gemm.h have to know
struct Bytes {
  typedef uint8_t Input;
};

constexpr int64_t kQuad = 4;          // channels of one step
constexpr int64_t kMostDepth = 2048;  // channels of one segment; a multiple of kQuad
constexpr Costs kByteCosts{500000, 15000, 4};

typedef uint8_t vb __attribute__((vector_size(kLanes)));
typedef uint8_t vb_loose __attribute__((vector_size(kLanes), aligned(1), may_alias));
typedef uint16_t vu16 __attribute__((vector_size(QX_BYTES)));
typedef uint8_t vbytes __attribute__((vector_size(QX_BYTES)));
typedef uint8_t vbytes_loose __attribute__((vector_size(QX_BYTES), aligned(1), may_alias));

QX_INLINE vu load_ints(const void* p) { return reinterpret_cast<vu>(load(static_cast<const float*>(p))); }
QX_INLINE void store_ints(void* p, vu v) { store(static_cast<float*>(p), reinterpret_cast<vf>(v)); }

// ---------------------------------------------------------------- four products

#if defined(QX_DOT_U8S8)
struct Products {
  static constexpr int64_t kVectors = 1;  // of packed weights for a quad of channels
  typedef vi Quad;
  static QX_INLINE Quad prepare(int32_t quad) { return vi{} + quad; }
  static QX_INLINE vu add(vu acc, Quad a, const char* w) {
    return reinterpret_cast<vu>(QX_DOT_U8S8(reinterpret_cast<vi>(acc), a, reinterpret_cast<vi>(load_ints(w))));
  }
  static QX_INLINE void put(char* vectors, int64_t lane, const int8_t (&w)[kQuad]) {
    __builtin_memcpy(vectors + lane * kQuad, w, kQuad);
  }
};
#elif defined(QX_MADD16)
// the instruction that multiplies bytes saturates, so they are widened: channels 0 and 2, then 1 and 3
struct Products {
  static constexpr int64_t kVectors = 2;
  struct Quad {
    vi even, odd;
  };
  static QX_INLINE Quad prepare(int32_t quad) {
    const vi all = vi{} + quad;
    return {all & 0x00ff00ff, reinterpret_cast<vi>(reinterpret_cast<vu16>(all) >> 8)};
  }
  static QX_INLINE vu add(vu acc, Quad a, const char* w) {
    acc += reinterpret_cast<vu>(QX_MADD16(a.even, reinterpret_cast<vi>(load_ints(w))));
    return acc + reinterpret_cast<vu>(QX_MADD16(a.odd, reinterpret_cast<vi>(load_ints(w + QX_BYTES))));
  }
  static QX_INLINE void put(char* vectors, int64_t lane, const int8_t (&w)[kQuad]) {
    const int16_t even[2] = {w[0], w[2]}, odd[2] = {w[1], w[3]};
    __builtin_memcpy(vectors + lane * kQuad, even, sizeof even);
    __builtin_memcpy(vectors + QX_BYTES + lane * kQuad, odd, sizeof odd);
  }
};
#else
struct Products {
  static constexpr int64_t kVectors = 1;
  typedef vu Quad;
  static QX_INLINE Quad prepare(int32_t quad) { return vu{} + static_cast<uint32_t>(quad); }
  static QX_INLINE vu add(vu acc, Quad a, const char* at) {
    const vu w = load_ints(at);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const vi factor = reinterpret_cast<vi>(w << (24 - 8 * i)) >> 24;
      acc += ((a >> (8 * i)) & 0xffu) * reinterpret_cast<vu>(factor);
    }
    return acc;
  }
  static QX_INLINE void put(char* vectors, int64_t lane, const int8_t (&w)[kQuad]) {
    __builtin_memcpy(vectors + lane * kQuad, w, kQuad);
  }
};
#endif
constexpr int64_t kQuadBytes = Products::kVectors * QX_BYTES;  // packed weights of a vector of outputs

// ---------------------------------------------------------------- packed weights
// As in gather_gemm.h, tile after tile, [channel block][tap][quad][tile's vectors]; behind them the sums of each
// tap's weights, [tap][group][lanes] in 32 bits, which take the zero point out.

struct Depth {  // blocks of the channels of one group
  int64_t channels, blocks, size;
  QX_INLINE explicit Depth(int64_t c) {
    channels = c;
    blocks = ceil_div(c, kMostDepth);
    size = ceil_div(ceil_div(c, blocks), kQuad) * kQuad;
    blocks = ceil_div(c, size);
  }
  QX_INLINE int64_t start(int64_t block) const { return block * size; }
  QX_INLINE int64_t length(int64_t block) const { return least(size, channels - block * size); }
};

QX_INLINE int64_t quads(int64_t channels) { return ceil_div(channels, kQuad); }
QX_INLINE int64_t column_bytes(int64_t taps, int64_t channels) { return taps * quads(channels) * kQuadBytes; }

// A group of one channel would fill one lane of a tile. Lanes are channels there and weights float32, [tap][lanes]: all
// products and sums are integers below 2^24, which float32 holds exactly.
QX_INLINE bool by_lanes(int64_t outputs, int64_t channels, int64_t taps, int64_t groups) {
  return channels == 1 && outputs == groups && groups > 1 && taps <= 512;
}

int64_t packed_bytes(int64_t outputs, int64_t channels, int64_t taps, int64_t groups) {
  if (by_lanes(outputs, channels, taps, groups)) return taps * ceil_div(outputs, kLanes) * kLanes * 4;
  const int64_t vectors = groups * Tiling(outputs / groups).vectors;
  return vectors * column_bytes(taps, channels) + vectors * kLanes * taps * 4;
}

void pack_bytes(const Weight* weight, void* packed, int64_t part, int64_t parts) {
  const Weight& w = *weight;
  if (by_lanes(w.groups * w.outputs, w.channels, w.taps, w.groups)) {
    const int64_t lanes = ceil_div(w.groups, kLanes) * kLanes;
    for (int64_t i = lanes * part / parts; i < lanes * (part + 1) / parts; ++i) {
      const int8_t* from = static_cast<const int8_t*>(w.data) + i * w.group_stride;
      for (int64_t t = 0; t < w.taps; ++t) {
        static_cast<float*>(packed)[t * lanes + i] = i < w.groups ? float(from[t * w.tap_stride]) : 0.0f;
      }
    }
    return;
  }
  const Tiling tiling(w.outputs);
  const Depth depth(w.channels);
  const int64_t column = column_bytes(w.taps, w.channels), vectors = w.groups * tiling.vectors;
  char* sums = static_cast<char*>(packed) + vectors * column;
  const int64_t jobs = w.groups * tiling.tiles;
  for (int64_t job = jobs * part / parts; job < jobs * (part + 1) / parts; ++job) {
    const int64_t group = job / tiling.tiles, tile = job % tiling.tiles;
    const int64_t v0 = tiling.start(tile), nv = tiling.start(tile + 1) - v0;
    const int8_t* from = static_cast<const int8_t*>(w.data) + group * w.group_stride;
    char* to = static_cast<char*>(packed) + (group * tiling.vectors + v0) * column;
    for (int64_t lane = 0; lane < nv * kLanes; ++lane) {
      const int64_t o = v0 * kLanes + lane, v = lane / kLanes;
      for (int64_t t = 0; t < w.taps; ++t) {
        int32_t sum = 0;
        for (int64_t block = 0; block < depth.blocks; ++block) {
          const int64_t c0 = depth.start(block), length = depth.length(block);
          char* at = to + (c0 / kQuad * w.taps + t * quads(length)) * nv * kQuadBytes + v * kQuadBytes;
          for (int64_t c = 0; c < length; c += kQuad, at += nv * kQuadBytes) {
            int8_t quad[kQuad] = {};
            for (int64_t i = 0; i < least(kQuad, length - c) && o < w.outputs; ++i) {
              quad[i] = from[o * w.output_stride + channel_offset(w, c0 + c + i) + t * w.tap_stride];
              sum += quad[i];
            }
            Products::put(at, lane % kLanes, quad);
          }
        }
        const int64_t place = (t * w.groups + group) * tiling.vectors * kLanes + o;
        __builtin_memcpy(sums + place * 4, &sum, 4);
      }
    }
  }
}

// ---------------------------------------------------------------- real numbers and integers

QX_INLINE vf to_floats(vi v) { return __builtin_convertvector(v, vf); }
QX_INLINE vi widen_bytes(const uint8_t* p) {
#ifdef QX_WIDEN_U8
  return QX_WIDEN_U8(p);
#else
  return __builtin_convertvector(*reinterpret_cast<const vb_loose*>(p), vi);
#endif
}
// `rest` stands where there are no more bytes
QX_INLINE vi widen_some(const uint8_t* p, int64_t count, int32_t rest) {
  if (count >= kLanes) return widen_bytes(p);
  uint8_t buffer[kLanes];
  __builtin_memset(buffer, rest, kLanes);
  for (int64_t i = 0; i < count; ++i) buffer[i] = p[i];
  return widen_bytes(buffer);
}
QX_INLINE void narrow_bytes(uint8_t* p, vi v) {
#ifdef QX_NARROW_U8
  QX_NARROW_U8(p, v);
#else
  *reinterpret_cast<vb_loose*>(p) = __builtin_convertvector(v, vb);
#endif
}
template <int NV>
QX_INLINE void narrow_row(uint8_t* p, const vi (&v)[NV]) {
#ifdef QX_NARROW_SOME_U8
  if constexpr (NV > 1) {
    QX_NARROW_SOME_U8(p, NV, v[0], v[1], v[NV > 2 ? 2 : 0], v[NV - 1]);
    return;
  }
#endif
#pragma GCC unroll 8
  for (int i = 0; i < NV; ++i) narrow_bytes(p + i * kLanes, v[i]);
}
QX_INLINE void narrow_some(uint8_t* p, vi v, int64_t count) {
  if (count >= kLanes) return narrow_bytes(p, v);
  uint8_t buffer[kLanes];
  narrow_bytes(buffer, v);
  for (int64_t i = 0; i < count; ++i) p[i] = buffer[i];
}

// b where a is not a number
QX_INLINE vf greater(vf a, vf b) {
#ifdef QX_GREATER
  return QX_GREATER(a, b);
#else
  return a > b ? a : b;
#endif
}
QX_INLINE vf lesser(vf a, vf b) {
#ifdef QX_LESSER
  return QX_LESSER(a, b);
#else
  return a < b ? a : b;
#endif
}

// A grid to store on: a NaN becomes the lowest. Results are for narrow_bytes and its like alone.
struct Stored {
  float inverse, low, high;
  int32_t zero;
  QX_INLINE explicit Stored(const MapGrid& grid) {
    inverse = 1.0f / grid.scale;
    low = float(-grid.zero);
    high = float(255 - grid.zero);
    zero = grid.zero;
  }
  // store no greater numbers than this real one, which is not negative
  QX_INLINE void bound(float most) { high = most * inverse < high ? most * inverse : high; }
  QX_INLINE vi of(vf value) const { return of_zero(value) + zero; }
  // if the zero point is 0
  QX_INLINE vi of_zero(vf value) const {
#ifdef QX_ROUND
    return QX_ROUND(lesser(vf{} + high, value * inverse));
#else
    // the bounds first, so that rounding by a large addend is exact
    value = lesser(greater(value * inverse, vf{} + low), vf{} + high);
    return reinterpret_cast<vi>(value + 12582912.0f) - 0x4b400000;  // 1.5 2^23 and its bits
#endif
  }
};

// numbers of any map, `at` counted in them; 0 where there are no more
QX_INLINE vf read_real(const void* map, const MapGrid& grid, int64_t at, int64_t count) {
  if (grid.type == kFloat32) return load_some(static_cast<const float*>(map) + at, count);
  if (grid.type == kBfloat16) return load_some(static_cast<const uint16_t*>(map) + at, count);
  return to_floats(widen_some(static_cast<const uint8_t*>(map) + at, count, grid.zero) - grid.zero) * grid.scale;
}
QX_INLINE void write_real(void* map, const MapGrid& grid, int64_t at, vf value, int64_t count) {
  if (grid.type == kFloat32) return store_some(static_cast<float*>(map) + at, value, count);
  if (grid.type == kBfloat16) return store_some(static_cast<uint16_t*>(map) + at, value, count);
  narrow_some(static_cast<uint8_t*>(map) + at, Stored(grid).of(value), count);
}

// ---------------------------------------------------------------- register tile

struct ByteSegments {  // one K block: segments [first, last) of channel blocks times taps
  const char* weight;  // of the output tile
  const char* sums;    // of its taps; a tap's are sums_stride bytes behind the one before
  const int32_t* taps;
  int64_t num_taps, all_taps, first, last, in_channels, channel, sums_stride;
  const uint8_t* outside;  // a row of zero points
  int32_t zero;
  Depth depth;
  // Weights from a far cache are fetched while the K block or the tile before is multiplied: those `later` segments
  // behind, of a tile of ahead_nv vectors (null: none), a line a step of K, and how many tiles of rows did so
  // before.
  const char* ahead = nullptr;
  int64_t ahead_nv = 0, later = 0, ahead_turn = 0;
  QX_INLINE const char* segment(const char* tile, int64_t nv, int64_t block, int64_t t) const {
    const int64_t before = depth.start(block) / kQuad * all_taps + taps[t] * quads(depth.length(block));
    return tile + before * nv * kQuadBytes;
  }
};

// whether every map of a step is uint8, so that a tile is finished in its registers
QX_INLINE bool all_bytes(const GatherGemm& g) {
  const Quantised& maps = *g.quantised;
  return (!g.residual || maps.residual.type == kUint8) && (!g.out || maps.out.type == kUint8) &&
         (!g.out2 || maps.out2.type == kUint8);
}

struct ByteEpilogue {  // of one tile of output channels, whose first one is o0
  const GatherGemm* g;
  int64_t o0, count, added;  // channels of the output and of the residual in this tile
  ByteEpilogue() = default;
  QX_INLINE ByteEpilogue(const GatherGemm& problem, int64_t first, int64_t number) {
    g = &problem;
    o0 = first;
    count = number;
    added = problem.residual ? problem.residual_channels - first : 0;
  }
  // whether all its channels are alike and take a few instructions each
  QX_INLINE bool alike() const { return (added <= 0 || added >= count) && g->activation <= kRelu6; }
  QX_INLINE bool simple() const { return alike() && all_bytes(*g); }
  QX_INLINE bool to_real() const {
    const Quantised& maps = *g->quantised;
    return alike() && !g->out2 && maps.out.type != kUint8 && (added <= 0 || maps.residual.type == kUint8);
  }
};

// no activation, ReLU or ReLU6, as Bounds of gather_gemm.h; a NaN passes
struct ByteBounds {
  float low, high;
  QX_INLINE explicit ByteBounds(int32_t activation) {
    const Bounds bounds(activation);
    low = bounds.low;
    high = bounds.high;
  }
  QX_INLINE vf of(vf value) const { return lesser(vf{} + high, greater(vf{} + low, value)); }
};

QX_INLINE vf added_bytes(vf value, const uint8_t* p, const MapGrid& grid) {
  return value + to_floats(widen_bytes(p) - grid.zero) * grid.scale;
}

// The end of NV vectors of channels of a simple epilogue, for row after row. ADDED: a residual; SECOND: a second output.
// MOVED: the output's zero point is not 0. If it is, a ReLU is what saturation does anyhow; the upper bounds of
// activation and grid are one, since multiplying by a positive number keeps the order.
template <int NV, bool ADDED, bool MOVED, bool SECOND>
class RowOfBytes {
 public:
  QX_INLINE explicit RowOfBytes(const ByteEpilogue& e)
      : bounds_(e.g->activation), stored_(e.g->quantised->out), stored2_(e.g->quantised->out2) {
    const GatherGemm& g = *e.g;
    multiplier_ = g.quantised->multiplier + e.o0;
    // 0 changes no number
    bias_ = g.bias ? g.bias + e.o0 : kZeros;
    scale_ = g.scale2 + e.o0;
    shift_ = g.shift2 + e.o0;
    low2_ = g.low2;
    added_ = ADDED ? static_cast<const uint8_t*>(g.residual) + e.o0 : nullptr;
    added_grid_ = g.quantised->residual;
    out_ = g.out ? static_cast<uint8_t*>(g.out) + e.o0 : nullptr;
    out2_ = g.out2 ? static_cast<uint8_t*>(g.out2) + e.o0 : nullptr;
    if (!SECOND) stored_.bound(bounds_.high);
  }
  // place, residual: of the row
  QX_INLINE void finish(const vu (&sums)[NV], int64_t place, int64_t residual) const {
    vi bytes[NV], bytes2[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      vf value = to_floats(reinterpret_cast<vi>(sums[v])) * load(multiplier_ + v * kLanes);
      value += load(bias_ + v * kLanes);
      if (ADDED) value = added_bytes(value, added_ + residual + v * kLanes, added_grid_);
      if (SECOND) {
        value = bounds_.of(value);
        const vf scaled = value * load(scale_ + v * kLanes);
        bytes2[v] = stored2_.of(greater(vf{} + low2_, scaled + load(shift_ + v * kLanes)));
      } else if (MOVED) {
        value = greater(vf{} + bounds_.low, value);
      }
      bytes[v] = MOVED ? stored_.of(value) : stored_.of_zero(value);
    }
    if (!SECOND || out_) narrow_row(out_ + place, bytes);
    if (SECOND) narrow_row(out2_ + place, bytes2);
  }

 private:
  ByteBounds bounds_;
  Stored stored_, stored2_;
  const float *multiplier_, *bias_, *scale_, *shift_;
  float low2_;
  const uint8_t* added_;
  MapGrid added_grid_;
  uint8_t *out_, *out2_;
};

// calls rows(a RowOfBytes that fits the epilogue)
template <int NV, class Each>
QX_INLINE void finish_simply(const ByteEpilogue& e, const Each& rows) {
  const bool moved = e.g->quantised->out.zero != 0;
  if (e.g->out2) {
    e.added > 0 ? rows(RowOfBytes<NV, true, true, true>(e)) : rows(RowOfBytes<NV, false, true, true>(e));
  } else if (e.added > 0) {
    moved ? rows(RowOfBytes<NV, true, true, false>(e)) : rows(RowOfBytes<NV, true, false, false>(e));
  } else {
    moved ? rows(RowOfBytes<NV, false, true, false>(e)) : rows(RowOfBytes<NV, false, false, false>(e));
  }
}

// full vectors to a map of real numbers
template <class S, bool ADDED>
void finish_real(const ByteEpilogue& e, const int64_t* place, const int64_t* residual, int64_t n, int64_t nv,
                 const char* acc) {
  const GatherGemm& g = *e.g;
  const MapGrid grid = g.quantised->residual;
  const ByteBounds bounds(g.activation);
  for (int64_t v = 0; v < nv; ++v) {
    const int64_t o = e.o0 + v * kLanes;
    const vf multiplier = load(g.quantised->multiplier + o), bias = g.bias ? load(g.bias + o) : vf{};
    const uint8_t* added = ADDED ? static_cast<const uint8_t*>(g.residual) + o : nullptr;
    S* out = static_cast<S*>(g.out) + o;
    for (int64_t r = 0; r < n; ++r) {
      vf value = to_floats(reinterpret_cast<vi>(load_ints(acc + (r * nv + v) * QX_BYTES))) * multiplier;
      value += bias;
      if (ADDED) value = added_bytes(value, added + residual[r], grid);
      store(out + place[r], bounds.of(value));
    }
  }
}

// acc: of n rows, nv vectors each; place, residual: as of Rows
void finish_bytes_partly(const ByteEpilogue& e, const int64_t* place, const int64_t* residual, int64_t n, int64_t nv,
                         const char* acc) {
  const GatherGemm& g = *e.g;
  const Quantised& maps = *g.quantised;
  if (e.count == nv * kLanes && e.to_real()) {
    if (maps.out.type == kFloat32) {
      return (e.added > 0 ? &finish_real<float, true> : &finish_real<float, false>)(e, place, residual, n, nv, acc);
    }
    return (e.added > 0 ? &finish_real<uint16_t, true> : &finish_real<uint16_t, false>)(e, place, residual, n, nv, acc);
  }
  for (int64_t v = 0; v * kLanes < e.count; ++v) {
    const int64_t at = v * kLanes, left = e.count - at, added = e.added - at, o = e.o0 + at;
    const vf multiplier = load_some(maps.multiplier + o, left);
    const vf bias = g.bias ? load_some(g.bias + o, left) : vf{};
    const vf scale = g.out2 ? load_some(g.scale2 + o, left) : vf{};
    const vf shift = g.out2 ? load_some(g.shift2 + o, left) : vf{};
    const vf slope = g.slope ? load_some(g.slope + o, left) : vf{};
    for (int64_t r = 0; r < n; ++r) {
      vf value = to_floats(reinterpret_cast<vi>(load_ints(acc + (r * nv + v) * QX_BYTES))) * multiplier;
      if (g.bias) value += bias;
      if (added > 0) value += read_real(g.residual, maps.residual, residual[r] + o, added);
      value = activated(value, g.activation, slope);
      if (g.out) write_real(g.out, maps.out, place[r] + o, value, left);
      if (g.out2) write_real(g.out2, maps.out2, place[r] + o, at_least(value * scale + shift, g.low2), left);
    }
  }
}

// a full tile of a simple epilogue, in its registers
template <int ROWS, int NV>
QX_INLINE void finish_bytes(const ByteEpilogue& e, const Rows<Bytes>& rows, int64_t q, const vu (&acc)[ROWS][NV]) {
  finish_simply<NV>(e, [&](const auto& row) __attribute__((always_inline)) {
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; ++r) row.finish(acc[r], rows.place[q + r], rows.residual[q + r]);
  });
}

QX_INLINE int32_t quad_of(const uint8_t* p, int64_t count) {
  uint32_t quad = 0;
  for (int64_t i = 0; i < count; ++i) quad |= uint32_t{p[i]} << (8 * i);
  return static_cast<int32_t>(quad);
}

// Rows [q, q + ROWS): acc (+)= gathered rows times NV vectors of weights, finished if it is the last K block.
template <int ROWS, int NV>
void byte_tile(const ByteSegments& s, const ByteEpilogue& e, const Rows<Bytes>& rows, int64_t q, char* memory,
               const char* base, bool last) {
  const bool full = e.count == NV * kLanes && e.simple();
  vu acc[ROWS][NV];
#pragma GCC unroll 32
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      acc[r][v] = s.first == 0 ? load_ints(base + v * QX_BYTES) : load_ints(memory + (r * NV + v) * QX_BYTES);
    }
  }
  int64_t block = s.first ? s.first / s.num_taps : 0;
  int64_t t = s.first - block * s.num_taps;
  for (int64_t i = s.first; i < s.last; ++i) {
    const int64_t c0 = s.depth.start(block), length = s.depth.length(block);
    const uint8_t* a[ROWS];
    int32_t all = -1;
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; ++r) {
      const int32_t row = rows.index[q + r][t];
      all &= row;
      a[r] = row < 0 ? s.outside : rows.x[q + r] + row * s.in_channels + s.channel + c0;
    }
    if (all >= 0) {
      const int64_t count = length / kQuad, rest = length % kQuad;
      const char* w = s.segment(s.weight, NV, block, t);
      const auto multiply = [&](const char* at, auto quad) __attribute__((always_inline)) {
#pragma GCC unroll 32
        for (int r = 0; r < ROWS; ++r) {
          const typename Products::Quad prepared = Products::prepare(quad(r));
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) acc[r][v] = Products::add(acc[r][v], prepared, at + v * kQuadBytes);
        }
      };
      // without weights to fetch, the rows behind these, which the next tile reads first where there is one tap
      const char* ahead = reinterpret_cast<const char*>(a[ROWS - 1]) + s.in_channels;
      const int64_t later = i + s.later;
      if (NV == kMaxNv && s.ahead && later < s.depth.blocks * s.num_taps) {
        ahead = s.segment(s.ahead, s.ahead_nv, later / s.num_taps, later % s.num_taps) +
                s.ahead_turn * count * 64;
      }
      for (int64_t k = 0; k < count; ++k) {
        if (NV == kMaxNv) {
          __builtin_prefetch(ahead, 0, 2);
          ahead += 64;
        }
        multiply(w, [&](int r) __attribute__((always_inline)) {
          int32_t quad;
          __builtin_memcpy(&quad, a[r] + k * kQuad, kQuad);
          return quad;
        });
        w += NV * kQuadBytes;
      }
      // the rest of the last quad is not ours to read
      if (rest) {
        multiply(w, [&](int r) __attribute__((always_inline)) { return quad_of(a[r] + count * kQuad, rest); });
      }
    } else if (s.zero && block == 0) {
      // outside for every row: what would be multiplied by the zero point, of all channels
      const char* sums = s.sums + s.taps[t] * s.sums_stride;
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const vu total = load_ints(sums + v * QX_BYTES) * static_cast<uint32_t>(s.zero);
#pragma GCC unroll 32
        for (int r = 0; r < ROWS; ++r) acc[r][v] += total;
      }
    }
    if (++t == s.num_taps) {
      t = 0;
      ++block;
    }
  }
  if (last && full) return finish_bytes(e, rows, q, acc);
#pragma GCC unroll 32
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store_ints(memory + (r * NV + v) * QX_BYTES, acc[r][v]);
  }
  if (last) finish_bytes_partly(e, rows.place + q, rows.residual + q, ROWS, NV, memory);
}

struct ByteTiles {
  void (*at[kMaxNv + 1][kMaxRows + 1])(const ByteSegments&, const ByteEpilogue&, const Rows<Bytes>&, int64_t, char*,
                                       const char*, bool);
  template <int NV, int ROWS>
  constexpr void fill() {
    at[NV][ROWS] = &byte_tile<ROWS, NV>;
    if constexpr (ROWS > 1) {
      fill<NV, ROWS - 1>();
    } else if constexpr (NV > 1) {
      fill<NV - 1, kTileRows[NV - 1]>();
    }
  }
  constexpr ByteTiles() : at{} { fill<kMaxNv, kTileRows[kMaxNv]>(); }
};
constexpr ByteTiles kByteTiles{};

// ---------------------------------------------------------------- driver

QX_INLINE bool by_lanes(const GatherGemm& g) {
  return g.weight && by_lanes(g.out_channels, g.in_channels / g.channel_groups, g.num_taps, g.channel_groups);
}

// a few rows at a time, so that the vectors of a tile stay in registers over the taps
void run_by_lanes(const GatherGemm& g, Cut cut, int64_t part) {
  alignas(64) char acc[kChunk * kMaxNv * QX_BYTES];
  Rows<Bytes> rows;
  const int32_t zero = g.quantised->x.zero;
  const int64_t channels = g.out_channels, lanes = ceil_div(channels, kLanes) * kLanes;
  const float* weight = static_cast<const float*>(g.weight);
  const int32_t *index = g.index, *out_rows = g.rows, *taps = g.taps;
  for (int64_t group = 0; group < g.num_groups; ++group) {
    const int64_t positions = g.groups[2 * group], num_taps = g.groups[2 * group + 1], total = positions * g.batch;
    const int64_t q_first = total * part / cut.positions, q_last = total * (part + 1) / cut.positions;
    Walk walk(g.batch, g.rows_in < kLargeMap ? kImages : kImages / 2, positions);
    if (q_first < q_last) walk.go_to(q_first);
    for (int64_t q0 = q_first; q0 < q_last; q0 += kChunk) {
      const int64_t n = least(kChunk, q_last - q0);
      take_rows(g, walk, n, index, num_taps, out_rows, rows);
      for (int64_t c = 0; c < channels; c += kMaxNv * kLanes) {
        const int64_t count = least(kMaxNv * kLanes, channels - c), nv = ceil_div(count, kLanes);
        for (int64_t r = 0; r < n; ++r) {
          for (int64_t v = 0; v < nv; ++v) {
            const int64_t at = c + v * kLanes;
            vf sum{};
            for (int64_t t = 0; t < num_taps; ++t) {
              const int64_t row = rows.index[r][t];
              if (row < 0) continue;
              const vi x = widen_some(rows.x[r] + row * channels + at, channels - at, zero) - zero;
              sum += to_floats(x) * load(weight + taps[t] * lanes + at);
            }
            store_ints(acc + (r * nv + v) * QX_BYTES, reinterpret_cast<vu>(__builtin_convertvector(sum, vi)));
          }
        }
        finish_bytes_partly(ByteEpilogue(g, c, count), rows.place, rows.residual, n, nv, acc);
      }
    }
    index += positions * num_taps;
    out_rows += positions;
    taps += num_taps;
  }
}

Cut cut_bytes(const GatherGemm* g, int64_t threads) {
  if (by_lanes(*g)) return Cut{1, most(1, least(kPartsPerThread * threads, all_work(*g) * g->in_channels / kMinMeanValues))};
  if (g->weight) return cut_outputs(*g, threads, Tiling(g->out_channels / g->channel_groups).tiles, kByteCosts);
  return cut(g, threads);
}

void mean_of_bytes(const GatherGemm& g, Cut cut, int64_t part) {
  const Quantised& maps = *g.quantised;
  const int64_t positions = g.groups[0], total = g.batch * positions;
  for (int64_t at = total * part / cut.positions; at < total * (part + 1) / cut.positions; ++at) {
    const int64_t image = at / positions, p = at % positions;
    const int32_t* index = g.index + p * g.num_taps;
    const uint8_t* map = static_cast<const uint8_t*>(g.x) + image * g.rows_in * g.in_channels;
    const int64_t place = (image * g.rows_out + g.rows[p]) * g.in_channels;
    int32_t count = 0;
    for (int32_t t = 0; t < g.num_taps; ++t) count += index[t] >= 0;
    const float share = maps.x.scale / float(most(1, count));
    for (int64_t c = 0; c < g.in_channels; c += kLanes) {
      const int64_t left = g.in_channels - c;
      vi sum = vi{} - count * maps.x.zero;
      for (int32_t t = 0; t < g.num_taps; ++t) {
        if (index[t] >= 0) sum += widen_some(map + int64_t{index[t]} * g.in_channels + c, left, 0);
      }
      write_real(g.out, maps.out, place + c, to_floats(sum) * share, left);
    }
  }
}

void run_bytes(const GatherGemm* problem, Cut cut, int64_t part) {
  if (!problem->weight) return mean_of_bytes(*problem, cut, part);
  if (by_lanes(*problem)) {
    // parts that differ in their outputs have nothing to do here but the first
    return part % cut.outputs ? void() : run_by_lanes(*problem, Cut{1, cut.positions}, part / cut.outputs);
  }
  alignas(64) char acc[kChunk * kMaxNv * QX_BYTES];
  alignas(64) char base[kMaxNv * QX_BYTES];
  alignas(64) uint8_t outside[kMostDepth];
  Rows<Bytes> rows;
  const GatherGemm& g = *problem;
  const int32_t zero = g.quantised->x.zero;
  const int64_t channels = g.in_channels / g.channel_groups;
  const Tiling tiling(g.out_channels / g.channel_groups);
  const int64_t tiles = tiling.tiles * g.channel_groups;
  const int64_t column = column_bytes(g.num_taps, channels), vectors = tiling.vectors * g.channel_groups;
  const char* weight = static_cast<const char*>(g.weight);
  const Depth depth(channels);
  __builtin_memset(outside, zero, least(kMostDepth, channels));
  const int64_t po = part % cut.outputs;
  const int64_t tile_first = tiles * po / cut.outputs, tile_last = tiles * (po + 1) / cut.outputs;
  for (PartOfGroups own(g, cut.positions, part / cut.outputs); own.next();) {
    const int64_t positions = own.positions, num_taps = own.num_taps, q_first = own.first, q_last = own.last;
    const int32_t* taps = own.taps;
    const int64_t segments = depth.blocks * num_taps;
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
        const int64_t first_vector = channel_group * tiling.vectors + v0, o_local = v0 * kLanes;
        const int64_t o0 = channel_group * tiling.per_group + o_local;
        const int64_t panel = num_taps * quads(channels) * nv * kQuadBytes;
        const int64_t k_blocks = most(1, least(segments, ceil_div(panel, panel_bytes())));
        const int64_t count_tiles = ceil_div(q1 - q0, kTileRows[nv]);
        const int64_t least_rows = (q1 - q0) / count_tiles, larger = (q1 - q0) % count_tiles;
        ByteSegments s{weight + first_vector * column, weight + vectors * column + first_vector * QX_BYTES, taps,
                       num_taps, g.num_taps, 0, 0, g.in_channels, channel_group * channels, vectors * QX_BYTES,
                       outside, zero, depth};
        for (int64_t v = 0; v < nv; ++v) {
          vu sum{};
          for (int64_t t = 0; zero && t < num_taps; ++t) {
            sum -= load_ints(s.sums + taps[t] * s.sums_stride + v * QX_BYTES) * static_cast<uint32_t>(zero);
          }
          store_ints(base + v * QX_BYTES, sum);
        }
        const int64_t count = least(nv * kLanes, tiling.per_group - o_local);
        const ByteEpilogue e(g, o0, count);
        // weights are far at first, and always if they do not stay near
        const bool far = count_tiles > 1 && (chunk == 0 || vectors * column > panel_bytes());
        const char* next = job + 1 < tile_last ? s.weight + nv * column : nullptr;
        const int64_t next_nv = next ? tiling.start((job + 1) % tiling.tiles + 1) - tiling.start((job + 1) % tiling.tiles) : 0;
        for (int64_t k = 0; k < k_blocks; ++k) {
          s.first = segments * k / k_blocks;
          s.last = segments * (k + 1) / k_blocks;
          int64_t q = 0;
          for (int64_t i = 0; i < count_tiles; ++i) {
            const int64_t n = least_rows + (i < larger);
            s.ahead = i * 64 < nv * kQuadBytes && far ? (k_blocks > 1 ? s.weight : next) : nullptr;
            s.ahead_nv = k_blocks > 1 ? nv : next_nv;
            s.later = k_blocks > 1 ? s.last - s.first : 0;
            s.ahead_turn = i;
            kByteTiles.at[nv][n](s, e, rows, q, acc + q * nv * QX_BYTES, base, k == k_blocks - 1);
            q += n;
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------- besides convolutions

// the greatest byte of each window, whatever grid they are on; 0 for an empty window
void max_of_bytes(const Windows* problem, int64_t part, int64_t parts) {
  const Windows& g = *problem;
  const int64_t total = g.batch * g.positions;
  for (int64_t at = total * part / parts; at < total * (part + 1) / parts; ++at) {
    const int64_t image = at / g.positions, p = at % g.positions;
    const uint8_t* map = static_cast<const uint8_t*>(g.x) + image * g.rows_in * g.channels;
    uint8_t* out = static_cast<uint8_t*>(g.out) + at * g.channels;
    int64_t c = 0;
    for (; c + QX_BYTES <= g.channels; c += QX_BYTES) {
      vbytes best{};
      for (int32_t e = g.starts[p]; e < g.starts[p + 1]; ++e) {
        const vbytes v = *reinterpret_cast<const vbytes_loose*>(map + g.index[e] * g.channels + c);
        best = v > best ? v : best;
      }
      *reinterpret_cast<vbytes_loose*>(out + c) = best;
    }
    for (; c < g.channels; ++c) {
      uint8_t best = 0;
      for (int32_t e = g.starts[p]; e < g.starts[p + 1]; ++e) {
        const uint8_t v = map[g.index[e] * g.channels + c];
        best = v > best ? v : best;
      }
      out[c] = best;
    }
  }
}

// real numbers [first, last) of a map to bytes, all channels alike
template <class S>
void quantise_run(const GatherGemm& g, int64_t first, int64_t last) {
  const ByteBounds bounds(g.activation);
  const Stored stored(g.quantised->out);
  const S* x = static_cast<const S*>(g.x);
  uint8_t* out = static_cast<uint8_t*>(g.out);
  constexpr int64_t kRun = 4 * kLanes;
  int64_t at = first;
  for (; at + kRun <= last; at += kRun) {
    vi bytes[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) bytes[i] = stored.of(bounds.of(load(x + at + i * kLanes)));
    narrow_row(out + at, bytes);
  }
  for (; at < last; at += kLanes) {
    narrow_some(out + at, stored.of(bounds.of(load_some(x + at, last - at))), last - at);
  }
}

// out = act(x scale2 + shift2 + residual), from and to maps of any type: also what crosses between formats
void pointwise_bytes(const GatherGemm* problem, int64_t part, int64_t parts) {
  const GatherGemm& g = *problem;
  const Quantised& maps = *g.quantised;
  const int64_t rows = g.batch * g.rows_out;
  if (!g.scale2 && !g.shift2 && !g.slope && (!g.residual || g.residual_channels == g.out_channels)) {
    // all channels alike: a map of few has no vectors that are not full
    const int64_t vectors = ceil_div(rows * g.out_channels, kLanes);
    if (!g.residual && maps.x.type != kUint8 && maps.out.type == kUint8 && g.activation <= kRelu6) {
      const int64_t first = vectors * part / parts * kLanes, last = vectors * (part + 1) / parts * kLanes;
      return (maps.x.type == kFloat32 ? &quantise_run<float> : &quantise_run<uint16_t>)(
          g, first, least(last, rows * g.out_channels));
    }
    for (int64_t i = vectors * part / parts; i < vectors * (part + 1) / parts; ++i) {
      const int64_t at = i * kLanes, left = rows * g.out_channels - at;
      vf v = read_real(g.x, maps.x, at, left);
      if (g.residual) v = v + read_real(g.residual, maps.residual, at, left);
      write_real(g.out, maps.out, at, activated(v, g.activation, vf{}), left);
    }
    return;
  }
  for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
    for (int64_t c = 0; c < g.out_channels; c += kLanes) {
      const int64_t left = g.out_channels - c, at = row * g.out_channels + c;
      vf v = read_real(g.x, maps.x, at, left);
      if (g.scale2) v = v * load_some(g.scale2 + c, left);
      if (g.shift2) v = v + load_some(g.shift2 + c, left);
      if (g.residual && c < g.residual_channels) {
        v = v + read_real(g.residual, maps.residual, row * g.residual_channels + c, g.residual_channels - c);
      }
      v = activated(v, g.activation, g.slope ? load_some(g.slope + c, left) : vf{});
      write_real(g.out, maps.out, at, v, left);
    }
  }
}

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx

#include "int8_fill.h"

namespace quincunx {
namespace QX_ISA {
namespace {

constexpr ForwardKernels kByteKernels{false, &packed_bytes, &pack_bytes, &cut_bytes, &run_bytes};
constexpr Int8Kernels kInt8{FewChannels<&kByteKernels, uint8_t, kQuad>::kernels, &max_of_bytes, &pointwise_bytes,
                            &fill_bytes};

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
