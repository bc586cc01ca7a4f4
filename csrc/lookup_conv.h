// Convolution with quantised weights by look-up tables. Included once per instruction set, after
// gather_gemm.h, whose vectors it uses; the same rules apply.
//
// The lanes of a vector are positions. For each subspace the inner products of all input rows with all
// codewords form a table [codeword][slot]; for each tap an output channel then adds one vector of that
// table, which starts at the slot that the tap reads for the first position. Slots are input rows in an
// order in which every tap reads neighbouring slots for neighbouring positions (see quincunx/ops/plan.py).
#pragma once

#include "gather_gemm.h"

namespace quincunx {
namespace QX_ISA {
namespace {

// The tables and sums of a chunk of positions fit in a level 2 cache.
constexpr int64_t kTableBytes = 480 * 1024, kSumBytes = 320 * 1024;
// codewords times taps looked up in one pass over the sums
constexpr int64_t kPassVectors = 512;
constexpr int64_t kTermsPerPass = 9;
// vectors of positions summed together; with the outputs of look_up_all they fill the registers
constexpr int64_t kBlockVectors = 3;
// the least outputs of a part, since every part computes its own tables
constexpr int64_t kLeastOutputs = 32;
// up to this many positions are looked up one by one
constexpr int64_t kFewPositions = 2;

struct OneLane {
  typedef float V;
  static constexpr int64_t kWidth = 1;
  static QX_INLINE V get(const float* p) { return *p; }
  static QX_INLINE void put(float* p, V v) { *p = v; }
  static QX_INLINE V all(float v) { return v; }
};
struct AllLanes {
  typedef vf V;
  static constexpr int64_t kWidth = kLanes;
  static QX_INLINE V get(const float* p) { return load(p); }
  static QX_INLINE void put(float* p, V v) { store(p, v); }
  static QX_INLINE V all(float v) { return v - vf{}; }
};

QX_INLINE int64_t round_up(int64_t value, int64_t to) { return ceil_div(value, to) * to; }

// The division of a problem, the same for every part.
struct LookupShape {
  int64_t lanes, block;     // positions in a vector, and positions summed together
  int64_t chunk, chunks;    // positions whose tables are computed together
  int64_t slots;            // in the tables of a chunk
  int64_t together;         // subspaces whose tables are adjacent
  int64_t outputs, cuts;    // the most outputs of a job, and the number of jobs per channel group
  int64_t jobs;
};

// Slots that a chunk reads: overlapping ranges of the taps are joined. `local`, if given, gets the place
// in the chunk's tables that each tap reads for the first position.
template <class F>
QX_INLINE int64_t each_range(const LookupConv& g, int64_t chunk, int64_t lanes, int32_t* local,
                             const F& visit) {
  const int32_t* order = g.order;
  int64_t place = 0;
  for (int64_t t = 0; t < g.num_taps;) {
    const int64_t first = g.offsets[order[t]];
    int64_t end = first + chunk;
    for (; t < g.num_taps && g.offsets[order[t]] <= end; ++t) {
      if (local) local[order[t]] = static_cast<int32_t>(place + g.offsets[order[t]] - first);
      end = most(end, g.offsets[order[t]] + chunk);
    }
    const int64_t length = round_up(end - first, lanes);
    visit(first, place, length);
    place += length;
  }
  // rows with an odd number of vectors spread over all sets of a cache
  return place / lanes % 2 ? place : place + lanes;
}

LookupShape lookup_shape(const LookupConv& g, int64_t parts) {
  LookupShape s;
  const int64_t outputs = g.out_channels / g.channel_groups;
  s.lanes = g.positions <= kFewPositions ? 1 : kLanes;
  s.block = s.lanes == 1 ? 1 : kLanes * least(kBlockVectors, ceil_div(g.positions, kLanes));
  const int64_t vectors = s.lanes == 1 ? kPassVectors * kLanes : kPassVectors;
  s.together = most(1, least(g.subspaces, vectors / (int64_t{g.codewords} * g.num_taps)));
  for (int64_t n = 1;; ++n) {
    s.chunk = most(s.block, round_up(ceil_div(g.positions, n), s.block));
    s.slots = each_range(g, s.chunk, s.lanes, nullptr, [](int64_t, int64_t, int64_t) {});
    const int64_t table_bytes = 4 * s.together * g.codewords * s.slots, sum_bytes = 4 * outputs * s.chunk;
    const bool fits = table_bytes <= kTableBytes && sum_bytes <= kSumBytes;
    if (fits || s.chunk <= 2 * s.block) break;
  }
  s.chunks = ceil_div(g.positions, s.chunk);
  const int64_t whole = most(1, g.batch * g.channel_groups * s.chunks);
  s.cuts = most(1, least(ceil_div(parts, whole), outputs / kLeastOutputs));
  s.outputs = ceil_div(outputs, s.cuts);
  s.jobs = g.batch * g.channel_groups * s.chunks * s.cuts;
  return s;
}

struct LookupScratch {  // of a part, in floats
  int64_t local, x, table, sums, terms, size;
  LookupScratch(const LookupConv& g, const LookupShape& s) {
    constexpr int64_t kLine = 16;
    local = 0;
    x = round_up(g.num_taps, kLine);
    table = x + round_up(s.together * g.width * s.slots, kLine);
    sums = table + round_up(s.together * g.codewords * s.slots, kLine);
    terms = sums + round_up(s.outputs * s.chunk, kLine);
    size = terms + round_up(s.together * g.num_taps * s.outputs, kLine);
  }
};

template <int N>
struct Number {
  static constexpr int value = N;
};

// table[k][slot] = <codeword k, x[slot]>
template <class L>
void make_table(const float* codebook, const float* x, int64_t codewords, int64_t width, int64_t slots,
                float* table) {
  constexpr int kRows = 4, kVectors = 4;
  const auto tile = [&](auto rows, auto vectors, int64_t k, int64_t at) __attribute__((always_inline)) {
    constexpr int kR = decltype(rows)::value, kV = decltype(vectors)::value;
    typename L::V acc[kR][kV] = {};
    for (int64_t c = 0; c < width; ++c) {
      typename L::V read[kV];
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) read[v] = L::get(x + c * slots + at + v * L::kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kR; ++r) {
        const float weight = codebook[(k + r) * width + c];
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) acc[r][v] += weight * read[v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) L::put(table + (k + r) * slots + at + v * L::kWidth, acc[r][v]);
    }
  };
  int64_t k = 0;
  const auto row = [&](auto rows) __attribute__((always_inline)) {
    int64_t at = 0;
    constexpr int64_t kStep = kVectors * L::kWidth;
    for (; at + kStep <= slots; at += kStep) tile(rows, Number<kVectors>{}, k, at);
    for (; at < slots; at += L::kWidth) tile(rows, Number<1>{}, k, at);
  };
  for (; k + kRows <= codewords; k += kRows) row(Number<kRows>{});
  for (; k < codewords; ++k) row(Number<1>{});
}

// sums[r] += table[terms[i][r]] for R outputs and NV vectors of positions
template <class L, int NV, int R>
QX_INLINE void look_up(const float* table, const int32_t* terms, int64_t count, int64_t stride, float* sums) {
  typename L::V acc[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[r][v] = L::get(sums + (r * NV + v) * L::kWidth);
  }
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float* from = table + static_cast<uint32_t>(terms[i * stride + r]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[r][v] += L::get(from + v * L::kWidth);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) L::put(sums + (r * NV + v) * L::kWidth, acc[r][v]);
  }
}

template <class L, int NV>
void look_up_all(const float* table, const int32_t* terms, int64_t count, int64_t outputs, float* sums) {
  constexpr int kOutputs = QX_BYTES == 64 ? 8 : 4;
  int64_t o = 0;
  for (; o + kOutputs <= outputs; o += kOutputs) {
    look_up<L, NV, kOutputs>(table, terms + o, count, outputs, sums + o * NV * L::kWidth);
  }
  for (; o < outputs; ++o) look_up<L, NV, 1>(table, terms + o, count, outputs, sums + o * NV * L::kWidth);
}

// The same for one position, directly from the assignments: sums[o] += from[i][which[i][o] * slots]
template <class I, int N>
QX_INLINE void add_terms(const float* const* from, const I* const* which, int64_t slots, int64_t outputs,
                         float* sums) {
  for (int64_t o = 0; o < outputs; ++o) {
    float sum = 0;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sum += from[i][which[i][o] * slots];
    sums[o] += sum;
  }
}

// for the terms of `together` subspaces
template <class I>
void add_all_terms(const LookupConv& g, const LookupShape& s, int64_t subspace, int64_t together, int64_t o0,
                   int64_t outputs, const int32_t* local, const float* table, float* sums) {
  constexpr int kTogether = 8;
  const int64_t all_outputs = g.out_channels / g.channel_groups, count = together * g.num_taps;
  const float* from[kTogether];
  const I* which[kTogether];
  int filled = 0;
  for (int64_t i = 0; i < count; ++i) {
    from[filled] = table + i / g.num_taps * g.codewords * s.slots + local[i % g.num_taps];
    which[filled++] = static_cast<const I*>(g.assignments) + (subspace * g.num_taps + i) * all_outputs + o0;
    if (filled == kTogether) {
      add_terms<I, kTogether>(from, which, s.slots, outputs, sums);
      filled = 0;
    }
  }
  for (int i = 0; i < filled; ++i) add_terms<I, 1>(from + i, which + i, s.slots, outputs, sums);
}

template <class I>
void fill_terms(const I* assignments, int64_t count, int64_t slots, int64_t base, int32_t* terms) {
  for (int64_t o = 0; o < count; ++o) terms[o] = static_cast<int32_t>(assignments[o] * slots + base);
}

// x[c][slot] for `wanted` channels from `from` on, of which only `count` exist; the others are zeros.
void read_slots(const LookupConv& g, const LookupShape& s, int64_t q0, const float* from, int64_t wanted,
                int64_t count, int32_t* local, float* x) {
  const int64_t there = least(wanted, count);
  int64_t used = 0;
  each_range(g, s.chunk, s.lanes, local, [&](int64_t first, int64_t place, int64_t length) {
    for (int64_t i = 0; i < length; ++i) {
      const int64_t slot = first + q0 + i;
      const int64_t row = slot < g.num_slots ? g.slots[slot] : -1;
      float* to = x + place + i;
      if (row >= 0) {
        const float* read = from + row * g.in_channels;
        for (int64_t c = 0; c < there; ++c) to[c * s.slots] = read[c];
      } else {
        for (int64_t c = 0; c < there; ++c) to[c * s.slots] = 0.0f;
      }
    }
    used = place + length;
  });
  for (int64_t c = 0; c < wanted; ++c) {
    for (int64_t i = c < there ? used : 0; i < s.slots; ++i) x[c * s.slots + i] = 0.0f;
  }
}

template <class L>
void look_up_chunk(const LookupConv& g, const LookupShape& s, int64_t job, float* scratch) {
  const LookupScratch at(g, s);
  const int64_t all_outputs = g.out_channels / g.channel_groups, channels = g.in_channels / g.channel_groups;
  const int64_t cut = job % s.cuts, chunk = job / s.cuts % s.chunks;
  const int64_t group = job / s.cuts / s.chunks % g.channel_groups;
  const int64_t image = job / s.cuts / s.chunks / g.channel_groups;
  const int64_t o0 = all_outputs * cut / s.cuts, outputs = all_outputs * (cut + 1) / s.cuts - o0;
  const int64_t q0 = chunk * s.chunk, positions = least(s.chunk, g.positions - q0);
  const int64_t blocks = ceil_div(positions, s.block);
  int32_t* local = reinterpret_cast<int32_t*>(scratch + at.local);
  int32_t* terms = reinterpret_cast<int32_t*>(scratch + at.terms);
  float *x = scratch + at.x, *table = scratch + at.table, *sums = scratch + at.sums;
  const float* image_x = g.x + image * g.rows_in * g.in_channels + group * channels;
  // positions of a block, in whole vectors
  const auto width_of = [&](int64_t b) {
    return least(s.block, round_up(positions - b * s.block, L::kWidth));
  };
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t width = width_of(b);
    for (int64_t o = 0; o < outputs; ++o) {
      const float bias = g.bias ? g.bias[group * all_outputs + o0 + o] : 0.0f;
      float* to = sums + b * outputs * s.block + o * width;
      for (int64_t v = 0; v < width; v += L::kWidth) L::put(to + v, L::all(bias));
    }
  }
  for (int64_t m0 = 0; m0 < g.subspaces; m0 += s.together) {
    const int64_t together = least(s.together, g.subspaces - m0);
    read_slots(g, s, q0, image_x + m0 * g.width, together * g.width, channels - m0 * g.width, local, x);
    for (int64_t m = 0; m < together; ++m) {
      const int64_t subspace = group * g.subspaces + m0 + m;
      make_table<L>(g.codebooks + subspace * g.codewords * g.width, x + m * g.width * s.slots, g.codewords,
                    g.width, s.slots, table + m * g.codewords * s.slots);
      for (int64_t t = 0; L::kWidth > 1 && t < g.num_taps; ++t) {
        const int64_t from = (subspace * g.num_taps + t) * all_outputs + o0;
        const int64_t base = m * g.codewords * s.slots + local[t];
        int32_t* to = terms + (m * g.num_taps + t) * outputs;
        if (g.wide) fill_terms(static_cast<const int16_t*>(g.assignments) + from, outputs, s.slots, base, to);
        else fill_terms(static_cast<const uint8_t*>(g.assignments) + from, outputs, s.slots, base, to);
      }
    }
    if (L::kWidth == 1) {
      const int64_t first = group * g.subspaces + m0;
      for (int64_t b = 0; b < blocks; ++b) {
        const auto add = g.wide ? &add_all_terms<int16_t> : &add_all_terms<uint8_t>;
        add(g, s, first, together, o0, outputs, local, table + b, sums + b * outputs);
      }
      continue;
    }
    const int64_t count = together * g.num_taps, passes = ceil_div(count, kTermsPerPass);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t vectors = width_of(b) / L::kWidth;
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t first = count * pass / passes, last = count * (pass + 1) / passes;
        const float* from = table + b * s.block;
        const int32_t* which = terms + first * outputs;
        float* to = sums + b * outputs * s.block;
        if (vectors == 3) look_up_all<L, 3>(from, which, last - first, outputs, to);
        else if (vectors == 2) look_up_all<L, 2>(from, which, last - first, outputs, to);
        else look_up_all<L, 1>(from, which, last - first, outputs, to);
      }
    }
  }
  // few outputs at a time, so that strided reads stay in cache
  constexpr int64_t kFew = 32;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t width = width_of(b), count = least(s.block, positions - b * s.block);
    for (int64_t o = 0; o < outputs; o += kFew) {
      const int64_t stop = least(o + kFew, outputs);
      for (int64_t q = 0; q < count; ++q) {
        const int64_t row = g.rows[q0 + b * s.block + q];
        if (row < 0) continue;
        float* to = g.out + (image * g.rows_out + row) * g.out_channels + group * all_outputs + o0;
        const float* from = sums + b * outputs * s.block + q;
        for (int64_t i = o; i < stop; ++i) to[i] = from[i * width];
      }
    }
  }
}

int64_t lookup_scratch(const LookupConv* problem, int64_t parts) {
  return LookupScratch(*problem, lookup_shape(*problem, parts)).size;
}

void lookup_run(const LookupConv* problem, int64_t part, int64_t parts) {
  const LookupConv& g = *problem;
  const LookupShape s = lookup_shape(g, parts);
  float* scratch = g.scratch + part * LookupScratch(g, s).size;
  for (int64_t job = s.jobs * part / parts; job < s.jobs * (part + 1) / parts; ++job) {
    if (s.lanes == 1) look_up_chunk<OneLane>(g, s, job, scratch);
    else look_up_chunk<AllLanes>(g, s, job, scratch);
  }
}

constexpr LookupKernels kLookup{&lookup_scratch, &lookup_run};

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
