// How the sums of norm_act.h's chunks become those of a whole map: in double and in the order of the chunks. Torch-free.
#pragma once

#include <algorithm>
#include <vector>

#include "kernel_api.h"

namespace quincunx {

// Rows of a chunk: what the first-level cache holds, and enough to make its sums worth their place.
inline int64_t norm_chunk(int64_t channels) {
  return std::clamp<int64_t>(8192 / std::max<int64_t>(channels, 1), 32, 256);
}

inline int64_t norm_chunks(const NormAct& g) { return (g.rows + g.chunk - 1) / g.chunk; }

struct ChannelSums {
  std::vector<double> first, second;  // [channels]
  explicit ChannelSums(int64_t channels) : first(channels), second(channels) {}
};

// Mean and variance (over rows, not over rows - 1) of each channel, after `sums`.
inline ChannelSums join_moments(const NormAct& g) {
  ChannelSums all(g.channels);
  const auto over_chunks = [&](const auto& add) {
    for (int64_t i = 0; i < norm_chunks(g); ++i) {
      const double rows = static_cast<double>(std::min(g.chunk, g.rows - i * g.chunk));
      const float* means = g.partial + 2 * i * g.channels;
      for (int64_t c = 0; c < g.channels; ++c) add(c, rows, double{means[c]}, double{means[g.channels + c]});
    }
  };
  const double rows = static_cast<double>(g.rows);
  over_chunks([&](int64_t c, double count, double mean, double) { all.first[c] += count * mean; });
  for (double& mean : all.first) mean /= rows;
  over_chunks([&](int64_t c, double count, double mean, double squares) {
    const double off = mean - all.first[c];
    all.second[c] += squares + count * off * off;
  });
  for (double& variance : all.second) variance /= rows;
  return all;
}

// The two sums of each channel, after `reduce`.
inline ChannelSums join_sums(const NormAct& g) {
  ChannelSums all(g.channels);
  for (int64_t i = 0; i < norm_chunks(g); ++i) {
    const float* sums = g.partial + 2 * i * g.channels;
    for (int64_t c = 0; c < g.channels; ++c) {
      all.first[c] += sums[c];
      all.second[c] += sums[g.channels + c];
    }
  }
  return all;
}

}  // namespace quincunx
