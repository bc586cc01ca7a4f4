// Convolutions of a map of few channels, as a network's first is: the values behind all taps of a position are copied
// side by side, and are then the channels of one tap. Included once per instruction set, behind gather_gemm.h; stands in
// front of its kernels, or those of int8_gemm.h. A tap of three channels would fill three quarters of what an
// instruction multiplies, and its row would have to be looked up for every few products. Taps that are neighbours in
// a row of the map are copied together.
#pragma once

#include "gather_gemm.h"

namespace quincunx {
namespace QX_ISA {
namespace {

constexpr int64_t kFewChannels = 4;
constexpr int64_t kMostMerged = 380;         // values of a position: less than a block of channels
constexpr int64_t kMergedBytes = 48 * 1024;  // of positions that are copied at a time
// For fewer taps copying takes longer than it saves. Bytes are multiplied fastest, so that all else matters more.
constexpr int64_t kLeastTaps = 16, kLeastTapsOfBytes = 2;

struct Counting {
  int32_t at[kChunk];
  constexpr Counting() : at{} {
    for (int32_t i = 0; i < kChunk; ++i) at[i] = i;
  }
};
constexpr Counting kCounting{};

// pieces that overlap, so that none is copied byte by byte
QX_INLINE void copy_piece(char* to, const char* from, int64_t bytes) {
#ifdef QX_MASKED
  for (; bytes > 0; bytes -= 64, to += 64, from += 64) {
    const __mmask64 some = bytes < 64 ? (uint64_t{1} << bytes) - 1 : ~uint64_t{0};
    _mm512_mask_storeu_epi8(to, some, _mm512_maskz_loadu_epi8(some, from));
  }
#else
  if (bytes >= 16) {
    for (int64_t i = 0; i + 16 <= bytes; i += 16) __builtin_memcpy(to + i, from + i, 16);
    __builtin_memcpy(to + bytes - 16, from + bytes - 16, 16);
  } else if (bytes >= 8) {
    __builtin_memcpy(to, from, 8);
    __builtin_memcpy(to + bytes - 8, from + bytes - 8, 8);
  } else if (bytes >= 4) {
    __builtin_memcpy(to, from, 4);
    __builtin_memcpy(to + bytes - 4, from + bytes - 4, 4);
  } else {
    for (int64_t i = 0; i < bytes; ++i) to[i] = from[i];
  }
#endif
}

// Copies what a position of one tap group reads, which names each tap once. Most positions read the same rows
// relative to their first one.
template <class T>
class Merging {
 public:
  QX_INLINE Merging(const GatherGemm& g, const int32_t* taps, int64_t num_taps, T outside)
      : channels_(g.in_channels), size_(g.num_taps * g.in_channels), num_taps_(num_taps), taps_(taps), outside_(outside),
        full_(num_taps == g.num_taps) {}

  // to: [size of a position, padded to stride]
  QX_INLINE void copy(const T* map, const int32_t* index, T* to, int64_t stride) {
    for (int64_t i = size_; i < stride; ++i) to[i] = outside_;
    if (count_ < 0) look_at(index);
    if (count_ > 0 && index[0] >= 0 && fits(index)) {
      if (!full_) clear(to);
      const char* from = reinterpret_cast<const char*>(map + int64_t{index[0]} * channels_);
      for (int64_t i = 0; i < count_; ++i) {
        copy_piece(reinterpret_cast<char*>(to) + pieces_[i].to, from + pieces_[i].from, pieces_[i].bytes);
      }
      return;
    }
    clear(to);
    for (int64_t t = 0; t < num_taps_; ++t) {
      if (index[t] < 0) continue;
      const T* from = map + int64_t{index[t]} * channels_;
      for (int64_t c = 0; c < channels_; ++c) to[taps_[t] * channels_ + c] = from[c];
    }
  }

 private:
  struct Piece {
    int64_t from, to, bytes;
  };

  QX_INLINE void clear(T* to) const {
    for (int64_t i = 0; i < size_; ++i) to[i] = outside_;
  }
  QX_INLINE bool fits(const int32_t* index) const {
    int32_t off = 0;
    for (int64_t t = 0; t < num_taps_; ++t) off |= index[t] - index[0] - distance_[t];
    return off == 0;
  }
  // takes the pieces from a position whose taps all lie inside, the first of them before the others
  void look_at(const int32_t* index) {
    for (int64_t t = 0; t < num_taps_; ++t) {
      if (index[t] < index[0] || index[0] < 0) return;
    }
    count_ = 0;
    const int64_t bytes = channels_ * int64_t{sizeof(T)};
    for (int64_t t = 0; t < num_taps_; ++t) {
      distance_[t] = index[t] - index[0];
      const int64_t from = distance_[t] * bytes, to = taps_[t] * bytes;
      Piece* last = count_ ? &pieces_[count_ - 1] : nullptr;
      if (last && last->from + last->bytes == from && last->to + last->bytes == to) {
        last->bytes += bytes;
      } else {
        pieces_[count_++] = Piece{from, to, bytes};
      }
    }
  }

  const int64_t channels_, size_, num_taps_;
  const int32_t* taps_;
  const T outside_;
  const bool full_;
  int64_t count_ = -1;  // of pieces; unknown so far
  int32_t distance_[kMostMerged];
  Piece pieces_[kMostMerged];
};

QX_INLINE int64_t bytes_of(int32_t type) { return type == kFloat32 ? 4 : type == kBfloat16 ? 2 : 1; }

// Kernels that merge the taps of maps of few channels, and are kGeneral's otherwise. T: of maps. kStep: channels that an
// instruction multiplies.
template <const ForwardKernels* kGeneral, class T, int kStep>
struct FewChannels {
  static bool fits(int64_t channels, int64_t taps, int64_t groups) {
    return groups == 1 && channels <= kFewChannels && taps * channels <= kMostMerged &&
           taps >= (sizeof(T) == 1 ? kLeastTapsOfBytes : kLeastTaps);
  }
  static bool fits(const GatherGemm& g) {
    return g.weight != nullptr && fits(g.in_channels, g.num_taps, g.channel_groups);
  }
  static int64_t packed_size(int64_t outputs, int64_t channels, int64_t taps, int64_t groups) {
    if (!fits(channels, taps, groups)) return kGeneral->packed_size(outputs, channels, taps, groups);
    return kGeneral->packed_size(outputs, channels * taps, 1, 1);
  }
  static void pack(const Weight* weight, void* packed, int64_t part, int64_t parts) {
    Weight w = *weight;
    if (fits(w.channels, w.taps, w.groups)) {
      w.inner = w.channels;
      w.inner_stride = w.channel_stride;
      w.channel_stride = w.tap_stride;
      w.channels *= w.taps;
      w.taps = 1;
    }
    kGeneral->pack(&w, packed, part, parts);
  }
  static int64_t stride(const GatherGemm& g) { return ceil_div(int64_t{g.num_taps} * g.in_channels, kStep) * kStep; }
  static int64_t positions(const GatherGemm& g) {
    int64_t count = 0;
    for (int64_t i = 0; i < g.num_groups; ++i) count += g.groups[2 * i];
    return count;
  }

  static Cut cut(const GatherGemm* problem, int64_t threads) {
    if (!fits(*problem)) return kGeneral->cut(problem, threads);
    const int32_t groups[2] = {static_cast<int32_t>(positions(*problem)), 1};
    GatherGemm g = *problem;
    g.groups = groups;
    g.num_groups = g.num_taps = 1;
    g.rows_in = most(1, g.rows_in * g.in_channels / stride(*problem));
    g.in_channels = static_cast<int32_t>(stride(*problem));
    return kGeneral->cut(&g, threads);
  }

  static void run(const GatherGemm* problem, Cut cut, int64_t part) {
    const GatherGemm& g = *problem;
    if (!fits(g)) return kGeneral->run(problem, cut, part);
    alignas(64) T together[kMergedBytes / sizeof(T)];
    const int64_t width = stride(g), most_rows = least(kChunk, kMergedBytes / int64_t{sizeof(T)} / width);
    const int64_t all = positions(g), outputs = cut.outputs;
    const int64_t first = all * g.batch * (part / outputs) / cut.positions;
    const int64_t last = all * g.batch * (part / outputs + 1) / cut.positions;
    const Quantised* maps = g.quantised;
    const T outside = maps ? static_cast<T>(maps->x.zero) : T{};
    const int64_t added = maps ? bytes_of(maps->residual.type) : sizeof(T);
    const int64_t written = maps ? bytes_of(maps->out.type) : sizeof(T);
    const int64_t written2 = maps ? bytes_of(maps->out2.type) : sizeof(T);
    int32_t groups[2] = {0, 1};
    GatherGemm one = g;
    one.x = together;
    one.index = kCounting.at;
    one.taps = kCounting.at;
    one.groups = groups;
    one.batch = one.num_taps = one.num_groups = 1;
    one.in_channels = static_cast<int32_t>(width);
    const auto place = [](const void* base, int64_t bytes) __attribute__((always_inline)) {
      return base ? const_cast<char*>(static_cast<const char*>(base)) + bytes : nullptr;
    };
    const int32_t *index = g.index, *rows = g.rows, *taps = g.taps;
    for (int64_t before = 0, group = 0; group < g.num_groups; ++group) {
      const int64_t count = g.groups[2 * group], num_taps = g.groups[2 * group + 1];
      Merging<T> merging(g, taps, num_taps, outside);
      for (int64_t image = 0; image < g.batch; ++image) {
        const int64_t start = image * all + before;
        const int64_t p_last = least(count, last - start);
        const T* map = static_cast<const T*>(g.x) + image * g.rows_in * g.in_channels;
        one.residual = place(g.residual, image * g.residual_size * g.residual_channels * added);
        one.out = place(g.out, image * g.rows_out * g.out_channels * written);
        one.out2 = place(g.out2, image * g.rows_out * g.out_channels * written2);
        for (int64_t p = most(0, first - start); p < p_last;) {
          const int64_t n = least(most_rows, p_last - p);
          for (int64_t r = 0; r < n; ++r) {
            merging.copy(map, index + (p + r) * num_taps, together + r * width, width);
          }
          groups[0] = static_cast<int32_t>(n);
          one.rows_in = n;
          one.rows = rows + p;
          kGeneral->run(&one, Cut{outputs, 1}, part % outputs);
          p += n;
        }
      }
      before += count;
      index += count * num_taps;
      rows += count;
      taps += num_taps;
    }
  }
  static constexpr ForwardKernels kernels{kGeneral->packs_bf16, &packed_size, &pack, &cut, &run};
};

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx
