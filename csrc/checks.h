// Checks a caller's arguments before memory is touched: sizes whose products would wrap around, table
// entries out of range, output rows written twice or never, maps that are read before they are written.
// Torch-free, so that the kernels' own test can use it; each refusal is a std::runtime_error of one sentence.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "dispatch.h"

namespace quincunx {

constexpr int64_t kInt32Max = 0x7fffffff;
constexpr double kMostValues = 1e18;  // of a map or a weight, so that 64-bit offsets in bytes cannot overflow

template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream sentence;
  ((sentence << parts), ...);
  throw std::runtime_error(sentence.str());
}

// Returns whether no product of these sizes overflows.
inline bool countable(std::initializer_list<int64_t> sizes) {
  double product = 1;
  for (const int64_t size : sizes) {
    if (size < 0) return false;
    product *= static_cast<double>(std::max<int64_t>(size, 1));
  }
  return product < kMostValues;
}

inline void check_map(const char* name, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  require(countable({batch, channels, height, width}) && channels <= kInt32Max && height <= kInt32Max &&
              width <= kInt32Max && height * width <= kInt32Max,
          name, " is too large: [", batch, ", ", channels, ", ", height, ", ", width, "]");
}

// The positions of an output of (height, width).
inline int64_t check_output(const std::vector<int64_t>& size, int64_t batch, int64_t channels) {
  require(size.size() == 2 && size[0] >= 0 && size[1] >= 0, "out_size must be (height, width)");
  check_map("the output", batch, channels, size[0], size[1]);
  return size[0] * size[1];
}

// channels: of one group; outputs: of all groups
inline void check_weight(int64_t outputs, int64_t channels, int64_t taps, int64_t groups) {
  require(outputs >= 1 && channels >= 1 && taps >= 1 && groups >= 1, "out_channels = ", outputs, ", channels = ",
          channels, ", taps = ", taps, " and groups = ", groups, " must be at least 1");
  require(outputs % groups == 0, "groups = ", groups, " must divide out_channels = ", outputs);
  // padded to whole vectors
  require(outputs <= kInt32Max && channels <= kInt32Max && taps <= kInt32Max &&
              countable({channels + 64, outputs + 64 * groups, taps}),
          "the weight is too large: ", outputs, " outputs, ", channels, " channels and ", taps, " taps");
}

// A table of 32-bit numbers, read only once even if many steps use it.
class Table {
 public:
  Table() = default;
  Table(const int32_t* data, int64_t count) : data(data), count(count) {}

  const int32_t* data = nullptr;
  int64_t count = 0;

  // every value v has low <= v < high
  void within(const char* name, int64_t low, int64_t high) {
    if (!scanned_) {
      kernels().extremes(data, count, &low_, &high_);
      scanned_ = true;
    }
    require(count == 0 || (low_ >= low && high_ < high), name, " must lie in [", low, ", ", high,
            "), got values from ", low_, " to ", high_);
  }

  // every row of [0, rows) occurs exactly once; negative values are ignored
  void each_once(const char* name, int64_t rows) {
    if (once_ == rows) return;
    within(name, INT32_MIN, rows);
    if (!in_order(rows)) {
      std::vector<char> named(rows, 0);
      for (int64_t i = 0; i < count; ++i) {
        if (data[i] < 0) continue;
        require(!named[data[i]], name, " must name each of the ", rows, " output rows once, but names ", data[i],
                " twice");
        named[data[i]] = 1;
      }
      const int64_t missing = std::find(named.begin(), named.end(), 0) - named.begin();
      require(missing == rows, name, " must name each of the ", rows, " output rows once, but does not name ",
              missing);
    }
    once_ = rows;
  }

 private:
  // 0, 1, 2 ..., like most tables; cheaper to check
  bool in_order(int64_t rows) const {
    if (count != rows) return false;
    int32_t differs = 0;
    for (int64_t i = 0; i < count; ++i) differs |= data[i] ^ static_cast<int32_t>(i);
    return differs == 0;
  }

  bool scanned_ = false;
  int32_t low_ = 0, high_ = 0;
  int64_t once_ = -1;
};

// Checks the tables of a gather GEMM with known sizes: g stays inside its maps and writes every output row.
inline void check_tables(GatherGemm& g, Table& index, Table& rows, Table& taps, const Table& groups) {
  require(groups.count % 2 == 0 && groups.count <= kInt32Max, "groups must be [G, 2]");
  g.index = index.data;
  g.rows = rows.data;
  g.taps = taps.data;
  g.groups = groups.data;
  g.num_groups = static_cast<int32_t>(groups.count / 2);
  int64_t index_sum = 0, rows_sum = 0, taps_sum = 0;
  for (int64_t i = 0; i < g.num_groups; ++i) {
    const int64_t positions = g.groups[2 * i], used = g.groups[2 * i + 1];
    require(positions >= 0 && used >= 0, "groups must not be negative");
    rows_sum += positions;
    taps_sum += used;
    index_sum += positions * used;
    require(rows_sum <= rows.count && taps_sum <= taps.count && index_sum <= index.count,
            "groups exceed the sizes of index, rows or taps");
  }
  require(rows_sum == rows.count && taps_sum == taps.count && index_sum == index.count,
          "index, rows and taps must have as many entries as groups say");
  require(rows.count == g.rows_out, "rows must name each of the ", g.rows_out, " output rows once, got ", rows.count);
  index.within("index", -1, g.rows_in);
  rows.within("rows", 0, g.rows_out);
  rows.each_once("rows", g.rows_out);
  taps.within("taps", 0, g.num_taps);
  const int32_t* of_group = g.taps;
  for (int64_t i = 0; i < g.num_groups; of_group += g.groups[2 * i + 1], ++i) {
    const int32_t* end = of_group + g.groups[2 * i + 1];
    require(std::adjacent_find(of_group, end, std::greater_equal<int32_t>()) == end,
            "taps of a group must ascend");
  }
}

// Checks the table of shifts of a gather GEMM whose other tables were checked: every slot that a class reads exists, and
// every output row is in one class.
inline void check_shifts(GatherGemm& g, const Table& shifts) {
  const int32_t* head = shifts.data;
  require(shifts.count >= kShiftHead && head[0] >= 1 && head[0] <= kMostShiftClasses && head[1] >= 0 &&
              shifts.count >= kShiftHead + 2 * int64_t{head[0]},
          "shifts must begin with at most ", kMostShiftClasses, " classes and the number of slots");
  const int64_t classes = head[0], slots = head[1], apart = head[2];
  require(apart >= 1 && apart <= kMostShiftTaps, "outputs of shifts must lie 1 to ", kMostShiftTaps,
          " slots apart, got ", apart);
  const int32_t* sizes = head + kShiftHead;
  int64_t length = kShiftHead + 2 * classes + slots;
  for (int64_t c = 0; c < classes; ++c) {
    const int64_t taps = sizes[2 * c], positions = sizes[2 * c + 1];
    require(taps >= 0 && taps <= kMostShiftTaps && positions >= 0, "a class of shifts has at most ", kMostShiftTaps,
            " taps");
    length += 2 * taps + positions;
  }
  require(length == shifts.count, "shifts must have as many entries as their classes say, ", length, ", got ",
          shifts.count);
  const int32_t* body = sizes + 2 * classes;
  std::vector<int32_t> rows;
  for (int64_t c = 0; c < classes; ++c) {
    const int64_t taps = sizes[2 * c], positions = sizes[2 * c + 1];
    const int64_t read = positions > 0 ? apart * (positions - 1) + 1 : 0;
    for (int64_t t = 0; t < taps; ++t) {
      require(body[t] >= 0 && body[t] < g.num_taps && (t == 0 || body[t] > body[t - 1]),
              "taps of a class of shifts must ascend below ", g.num_taps);
      require(body[taps + t] >= 0 && body[taps + t] + read <= slots, "a class of shifts reads beyond its ", slots,
              " slots");
    }
    rows.insert(rows.end(), body + 2 * taps, body + 2 * taps + positions);
    body += 2 * taps + positions;
  }
  Table named(rows.data(), static_cast<int64_t>(rows.size()));
  named.within("rows of shifts", -1, g.rows_out);
  named.each_once("rows of shifts", g.rows_out);
  Table(body, slots).within("slots of shifts", -1, g.rows_in);
  g.shifts = shifts.data;
}

// Checks the tables of a reduction over windows: positions + 1 ascending starts in a list of input rows.
inline void check_windows(int64_t rows_in, int64_t positions, Table& index, const Table& starts) {
  const int64_t entries = index.count, count = starts.count;
  require(count == positions + 1, "starts must have ", positions + 1, " entries, got ", count);
  require(starts.data[0] == 0 && starts.data[count - 1] == entries && std::is_sorted(starts.data, starts.data + count),
          "starts must ascend from 0 to the ", entries, " entries of index");
  // an empty map has no row to refer to
  require(entries == 0 || rows_in > 0, "x has no positions");
  index.within("index", 0, std::max<int64_t>(rows_in, 1));
}

// Checks the tables of a fitted fill: `kinds` rows of coefficients; a position without a kind is computed.
inline void check_fill(int64_t rows_in, int64_t positions, int64_t num_taps, int64_t kinds, Table& index,
                       Table& kind_table) {
  const int64_t stride = std::max<int64_t>(num_taps, 1);
  require(kind_table.count == positions && index.count / stride == positions && index.count % stride == 0,
          "kinds and index must have ", positions, " and ", positions, " x ", stride, " entries, got ",
          kind_table.count, " and ", index.count);
  index.within("index", -1, std::max<int64_t>(rows_in, 0));
  kind_table.within("kinds", -1, std::max<int64_t>(kinds, 1));
  for (int64_t p = 0; p < positions; ++p) {
    const int32_t kind = kind_table.data[p];
    require(kind < kinds, "kinds must be below ", kinds, ", got ", kind);
    require(kind >= 0 || index.data[p * stride] >= 0, "index names no row for the computed position ", p);
  }
}

// Checks the tables of its derivative: each kind's positions, one kind after another.
inline void check_fill_grad(int64_t rows_in, int64_t positions, int64_t num_taps, Table& index, Table& order,
                            const Table& starts) {
  const int64_t stride = std::max<int64_t>(num_taps, 1);
  require(index.count / stride == positions && index.count % stride == 0, "index must have ", positions, " x ", stride,
          " entries, got ", index.count);
  require(starts.count > 0 && starts.data[0] == 0 && starts.data[starts.count - 1] == order.count &&
              std::is_sorted(starts.data, starts.data + starts.count),
          "starts must ascend from 0 to the ", order.count, " entries of order");
  index.within("index", -1, std::max<int64_t>(rows_in, 0));
  // an empty map has no position to refer to
  require(order.count == 0 || positions > 0, "z has no positions");
  order.within("order", 0, std::max<int64_t>(positions, 1));
}

// Checks the maps of a program step by step: nothing is read before it is written, no
// step writes where it reads other rows, no input is written, and every output is.
class Flow {
 public:
  enum Kind : int64_t { kInput, kScratch, kOutput };

  void add(int64_t kind, int64_t from, int64_t length) {
    maps_.push_back({kind, from, from + length});
    written_.push_back(kind == kInput);
  }

  // a step; -1 for a missing map. `same_rows`: each output row adds the residual's same row
  void step(int64_t number, int64_t x, int64_t residual, int64_t out, int64_t out2, bool same_rows) {
    for (const int64_t map : {x, residual}) {
      require(map < 0 || written_[map], "step ", number, " reads buffer ", map, ", which nothing has written");
    }
    require(!meet(out, out2), "step ", number, ": out and out2 must not overlap");
    for (const int64_t map : {out, out2}) {
      if (map < 0) continue;
      require(maps_[map].kind != kInput, "step ", number, " writes to buffer ", map, ", an input");
      require(!meet(map, x), "step ", number, " writes to buffer ", map, ", where it reads");
      require(!meet(map, residual) || (same_rows && same(map, residual)), "step ", number, " writes to buffer ", map,
              ", where it reads other rows of its residual");
    }
    for (const int64_t map : {out, out2}) {
      if (map < 0) continue;
      // other maps at the same place are overwritten
      const auto lost = [&](int64_t other) {
        if (other == map || !meet(map, other)) return false;
        written_[other] = false;
        return true;
      };
      live_.erase(std::remove_if(live_.begin(), live_.end(), lost), live_.end());
      if (maps_[map].kind == kScratch && !written_[map]) live_.push_back(map);
      written_[map] = true;
    }
  }

  void end() const {
    for (size_t i = 0; i < maps_.size(); ++i) {
      require(maps_[i].kind != kOutput || written_[i], "buffer ", i, " is an output that no step writes");
    }
  }

 private:
  struct Place {
    int64_t kind, from, to;
  };

  bool same(int64_t a, int64_t b) const {
    return a == b || (maps_[a].from == maps_[b].from && maps_[a].to == maps_[b].to);
  }
  // only maps in the arena can share memory
  bool meet(int64_t a, int64_t b) const {
    if (a < 0 || b < 0) return false;
    const Place &p = maps_[a], &q = maps_[b];
    return a == b || (p.kind == kScratch && q.kind == kScratch && p.from < q.to && q.from < p.to);
  }

  std::vector<Place> maps_;
  std::vector<char> written_;
  std::vector<int64_t> live_;  // of the arena, written
};

}  // namespace quincunx
