// Convolution with one-bit weights, +1 or -1. Included after gather_gemm.h, in the same namespace.
// The target also defines
//   QX_BINARY_ROWS            {rows of the register tile for 1, 2, .. QX_MAX_NV vectors}
//   QX_LOOK_UP(table, code)   for each lane the entry of a vector of floats that the lowest bits of code
//                             select, if the target has such an instruction
//   QX_BINARY_SPREAD          if every second addition should use the multiply-add units, as 1 * a + b:
//                             some processors have separate units for additions and can keep both busy
// All signed sums of four channels are computed once for each input row, as a table; each
// output channel then looks up its sum with its four sign bits and adds it. So four products cost one
// look-up and one addition, and a weight of 32 channels is one word per lane.

namespace quincunx {
namespace QX_ISA {
namespace {

typedef uint32_t vu_loose __attribute__((vector_size(QX_BYTES), aligned(4), may_alias));

constexpr int64_t kWord = 32, kQuad = 4, kQuads = kWord / kQuad;  // bits of a word, of a look-up
constexpr int64_t kBinaryChunk = 96;                              // positions that share tables
// the least number of rows whose tables are kept, if the map has as many
constexpr int64_t kBinaryWindow = 128;
constexpr int64_t kMinBinaryMacs = 600000;
constexpr int kBinaryRows[kMaxNv + 1] = {1, QX_BINARY_ROWS};
#ifdef QX_BINARY_SPREAD
constexpr bool kSpread = true;
#else
constexpr bool kSpread = false;
#endif
constexpr uint32_t kSign = 0x80000000u;

QX_INLINE vu load_words(const uint32_t* p) { return *reinterpret_cast<const vu_loose*>(p); }
QX_INLINE vf flipped(vf v, vu signs) { return reinterpret_cast<vf>(reinterpret_cast<vu>(v) ^ signs); }
QX_INLINE vf splat(float a) { return a - vf{}; }

#ifdef QX_LOOK_UP
// Entry p is the sum of +a[i] for set bits i of p and -a[i] for the others. With eight lanes only the
// sums with +a[3] are stored: the others are their negatives.
constexpr bool kHalved = kLanes == 8;
constexpr int64_t kTable = kLanes;

struct SignLanes {
  uint32_t at[4][kLanes];
  constexpr SignLanes() : at{} {
    for (int i = 0; i < 4; ++i) {
      for (int p = 0; p < kLanes; ++p) at[i][p] = (kHalved && i == 3) || (p >> i & 1) ? 0 : kSign;
    }
  }
};
alignas(64) constexpr SignLanes kSignLanes{};

QX_INLINE void make_table(const float* a, float* table) {
  vf sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = flipped(splat(a[i]), load_words(kSignLanes.at[i]));
  store(table, (sum[0] + sum[1]) + (sum[2] + sum[3]));
}

QX_INLINE vf look_up(const float* table, vu code) {
  const vf found = QX_LOOK_UP(load(table), code);
  return kHalved ? flipped(found, code << 28 & kSign) : found;
}

// the four sign bits of a look-up, 1 for +1, in the table's encoding
QX_INLINE uint32_t encoded(uint32_t bits) { return kHalved ? (bits & 8 ? bits & 7 : 8 | (~bits & 7)) : bits; }
#else
constexpr int64_t kTable = kQuad;

QX_INLINE void make_table(const float* a, float* table) {
  for (int i = 0; i < kQuad; ++i) table[i] = a[i];
}

QX_INLINE vf look_up(const float* table, vu code) {
  const vf low = flipped(splat(table[0]), code << 31) + flipped(splat(table[1]), code << 30 & kSign);
  const vf high = flipped(splat(table[2]), code << 29 & kSign) + flipped(splat(table[3]), code << 28 & kSign);
  return low + high;
}

QX_INLINE uint32_t encoded(uint32_t bits) { return ~bits & 15; }
#endif

QX_INLINE int64_t words(int64_t channels) { return ceil_div(channels, kWord); }
QX_INLINE int64_t quads(int64_t channels) { return ceil_div(channels, kQuad); }

// ---------------------------------------------------------------- packed weights
// tile after tile, [tap][word][lane of the tile]

int64_t binary_packed_words(int64_t outputs, int64_t channels, int64_t taps, int64_t groups) {
  return groups * Tiling(outputs / groups).vectors * kLanes * taps * words(channels);
}

void binary_pack(const BinaryWeight* weight, uint32_t* packed) {
  const BinaryWeight& w = *weight;
  const Tiling tiling(w.outputs);
  for (int64_t job = 0; job < w.groups * tiling.tiles; ++job) {
    const int64_t group = job / tiling.tiles, tile = job % tiling.tiles;
    const int64_t first = tiling.start(tile) * kLanes, width = tiling.start(tile + 1) * kLanes - first;
    for (int64_t t = 0; t < w.taps; ++t) {
      for (int64_t word = 0; word < words(w.channels); ++word) {
        for (int64_t lane = 0; lane < width; ++lane) {
          uint32_t bits = 0;
          const int64_t o = first + lane, stop = least(kWord, w.channels - word * kWord);
          const uint8_t* row = w.bits + (group * w.outputs + o) * w.row_bytes;
          for (int64_t i = 0; o < w.outputs && i < stop; ++i) {
            const int64_t at = (word * kWord + i) * w.taps + t;
            bits |= static_cast<uint32_t>(row[at / 8] >> at % 8 & 1) << i;
          }
          uint32_t code = 0;
          for (int64_t i = 0; i < kWord; i += kQuad) code |= encoded(bits >> i & 15) << i;
          *packed++ = code;
        }
      }
    }
  }
}

// ---------------------------------------------------------------- tables
// Tables of the last rows read, in a ring whose size is a power of two, and a row of zeros for taps outside.

int64_t binary_window(const BinaryGemm* problem) {
  const BinaryGemm& g = *problem;
  int64_t widest = least(g.rows_in, kBinaryWindow);
  for (int64_t p = 0; p < g.positions; ++p) {
    int64_t low = g.rows_in, high = -1;
    for (int64_t t = 0; t < g.num_taps; ++t) {
      const int64_t row = g.index[p * g.num_taps + t];
      if (row < 0) continue;
      low = least(low, row);
      high = most(high, row);
    }
    widest = most(widest, high - low + 1);
  }
  int64_t window = 1;
  while (window < widest) window *= 2;
  return window;
}

int64_t binary_scratch_floats(const BinaryGemm* g) {
  return (g->window + 1) * quads(g->in_channels / g->channel_groups) * kTable;
}

struct Ring {
  float* tables;
  const float* x;  // of the channel group, in the image's first row
  int64_t window, channels, in_channels, size;
  int64_t first = 0, end = 0;  // rows in the ring

  void make(int64_t row) {
    const float* from = x + row * in_channels;
    float* to = tables + (row & (window - 1)) * size;
    int64_t c = 0;
    for (; c + kQuad <= channels; c += kQuad, to += kTable) make_table(from + c, to);
    if (c < channels) {
      float rest[kQuad] = {};
      for (int64_t i = 0; c + i < channels; ++i) rest[i] = from[c + i];
      make_table(rest, to);
    }
  }
  void provide(int64_t low, int64_t high) {
    if (low < first || low > end) first = end = low;
    for (; end <= high; ++end) make(end);
    first = most(first, end - window);
  }
};

// ---------------------------------------------------------------- register tile

struct BinaryTask {
  const float* tables;
  const int32_t* index;  // of the chunk's first position
  int64_t num_taps, words, quads, mask, size;
};

struct BinaryOut {  // one tile of output channels; pointers point to its first channel
  float* out;       // of the chunk's first position
  const float *scale, *bias;
  int64_t stride, count;
};

template <int ROWS, int NV>
void binary_tile(const BinaryTask& s, const uint32_t* weight, const BinaryOut& e, int64_t q) {
  vf one = splat(1.0f);
#ifdef QX_BINARY_SPREAD
  asm("" : "+v"(one));  // hides from the compiler that 1 * a is a
#endif
  vf acc[ROWS][NV];
#pragma GCC unroll 32
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[r][v] = vf{};
  }
  for (int64_t t = 0; t < s.num_taps; ++t) {
    const float* a[ROWS];
    int32_t all = -1;
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; ++r) {
      const int32_t row = s.index[(q + r) * s.num_taps + t];
      all &= row;
      a[r] = s.tables + (row < 0 ? s.mask + 1 : row & s.mask) * s.size;
    }
    if (all < 0) {
      weight += s.words * NV * kLanes;
      continue;
    }
    for (int64_t left = s.quads; left > 0; left -= kQuads) {
      vu code[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) code[v] = load_words(weight + v * kLanes);
      weight += NV * kLanes;
      const int64_t count = least(left, kQuads);
      for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 32
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) {
            const vf sum = look_up(a[r], code[v]);
            acc[r][v] = kSpread && (r * NV + v) % 2 == 0 ? one * sum + acc[r][v] : acc[r][v] + sum;
          }
          a[r] += kTable;
        }
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) code[v] >>= kQuad;
      }
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) {
    const int64_t at = v * kLanes, left = e.count - at;
    if (left <= 0) break;
    const vf scale = e.scale ? load_some(e.scale + at, left) : splat(1.0f);
    const vf bias = e.bias ? load_some(e.bias + at, left) : vf{};
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; ++r) {
      store_some(e.out + (q + r) * e.stride + at, acc[r][v] * scale + bias, left);
    }
  }
}

struct BinaryTiles {
  void (*at[kMaxNv + 1][kMaxRows + 1])(const BinaryTask&, const uint32_t*, const BinaryOut&, int64_t);
  template <int NV, int ROWS>
  constexpr void fill() {
    at[NV][ROWS] = &binary_tile<ROWS, NV>;
    if constexpr (ROWS > 1) {
      fill<NV, ROWS - 1>();
    } else if constexpr (NV > 1) {
      fill<NV - 1, kBinaryRows[NV - 1]>();
    }
  }
  constexpr BinaryTiles() : at{} { fill<kMaxNv, kBinaryRows[kMaxNv]>(); }
};
constexpr BinaryTiles kBinaryTiles{};

// ---------------------------------------------------------------- driver

int64_t binary_parts(const BinaryGemm* g, int64_t threads) {
  const int64_t rows = g->batch * g->positions;
  const double macs = double(rows) * g->num_taps * (g->in_channels / g->channel_groups) * g->out_channels;
  const int64_t worth = macs < 1e18 ? int64_t(macs) / kMinBinaryMacs : threads;
  return most(1, least(least(threads, worth), rows));
}

// positions [first, last) of one image and one channel group
void binary_image(const BinaryGemm& g, float* tables, int64_t image, int64_t group, int64_t first,
                  int64_t last) {
  const int64_t channels = g.in_channels / g.channel_groups, size = quads(channels) * kTable;
  const Tiling tiling(g.out_channels / g.channel_groups);
  const int64_t column = g.num_taps * words(channels) * kLanes;  // words of one vector of outputs
  Ring ring{tables, g.x + image * g.rows_in * g.in_channels + group * channels, g.window, channels,
            g.in_channels, size};
  int64_t p = first;
  while (p < last) {
    int64_t low = g.rows_in, high = -1, stop = p;
    for (; stop < least(p + kBinaryChunk, last); ++stop) {
      int64_t with_low = low, with_high = high;
      for (int64_t t = 0; t < g.num_taps; ++t) {
        const int64_t row = g.index[stop * g.num_taps + t];
        if (row < 0) continue;
        with_low = least(with_low, row);
        with_high = most(with_high, row);
      }
      if (with_high - with_low >= g.window) break;
      low = with_low;
      high = with_high;
    }
    if (high >= 0) ring.provide(low, high);
    const BinaryTask task{tables, g.index + p * g.num_taps, g.num_taps, words(channels), quads(channels),
                          g.window - 1, size};
    for (int64_t tile = 0; tile < tiling.tiles; ++tile) {
      const int64_t v0 = tiling.start(tile), nv = tiling.start(tile + 1) - v0;
      const int64_t o_local = v0 * kLanes, o0 = group * tiling.per_group + o_local;
      const BinaryOut out{g.out + (image * g.positions + p) * g.out_channels + o0,
                          g.scale ? g.scale + o0 : nullptr, g.bias ? g.bias + o0 : nullptr, g.out_channels,
                          least(nv * kLanes, tiling.per_group - o_local)};
      const uint32_t* weight = g.packed + (group * tiling.vectors + v0) * column;
      const int64_t count = ceil_div(stop - p, kBinaryRows[nv]);
      int64_t q = 0;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t next = (stop - p) * (i + 1) / count;
        kBinaryTiles.at[nv][next - q](task, weight, out, q);
        q = next;
      }
    }
    p = stop;
  }
}

void binary_run(const BinaryGemm* problem, float* scratch, int64_t part, int64_t parts) {
  const BinaryGemm& g = *problem;
  const int64_t size = quads(g.in_channels / g.channel_groups) * kTable;
  for (int64_t i = 0; i < size; ++i) scratch[g.window * size + i] = 0;
  const int64_t total = g.batch * g.positions;
  const int64_t first = total * part / parts, last = total * (part + 1) / parts;
  for (int64_t q = first; q < last;) {
    const int64_t image = q / g.positions, start = image * g.positions;
    const int64_t stop = least(last, start + g.positions);
    for (int64_t group = 0; group < g.channel_groups; ++group) {
      binary_image(g, scratch, image, group, q - start, stop - start);
    }
    q = stop;
  }
}

constexpr BinaryKernels kBinary{&binary_packed_words, &binary_pack, &binary_window, &binary_scratch_floats,
                                &binary_parts, &binary_run};

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
