// What the integers of a program mean, and the checks that make steps of them: nothing that a program says is used
// before it was compared with the sizes of maps and tensors. Torch-free; torch's operator and the reader of program
// files both go through here. Each refusal is a std::runtime_error of one sentence.
#pragma once

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "checks.h"
#include "runner.h"

namespace quincunx {

// What the integers of a program say, a record for each map and for each step. BufferCode and StepCode in
// src/quincunx/fusion/program.py have the same names in the same order; a test compares them.
enum BufferField : int64_t { kKind, kChannels, kHeight, kWidth, kOffset, kBufferFields };
enum StepField : int64_t {
  kX, kWeight, kBias, kResidual, kResidualRows, kResidualChannels, kScale2, kShift2, kTapIndex, kRows, kTaps,
  kGroups, kOut, kOut2, kNumTaps, kChannelGroups, kActivation, kSlope, kWork, kShifts,
  kActivation2, kStepFields
};

// The tensors of a program, by number. Each function refuses a number or a tensor that does not fit.
class Operands {
 public:
  virtual ~Operands() = default;
  virtual Table& table(int64_t number, const char* name) = 0;
  virtual const float* floats(int64_t number, const char* name, int64_t count) = 0;
  virtual int64_t first_size(int64_t number, const char* name) = 0;
  // packed for the kernels, of a step in eight bits or not; outputs of all groups, channels of one
  virtual const void* weight(int64_t number, int64_t outputs, int64_t channels, int64_t taps, int64_t groups,
                             bool bytes) = 0;
};

inline void set_shape(GatherGemm& g, int64_t batch, int64_t in_channels, int64_t rows_in, int64_t out_channels,
                      int64_t rows_out, int64_t num_taps, int64_t channel_groups, int64_t activation) {
  require(num_taps >= 1 && num_taps <= kInt32Max, "num_taps must be at least 1, got ", num_taps);
  require(channel_groups >= 1 && in_channels >= 1 && in_channels % channel_groups == 0, "channel_groups = ",
          channel_groups, " must divide the channels ", in_channels);
  check_weight(out_channels, in_channels / channel_groups, num_taps, channel_groups);
  require(activation >= 0 && activation < kActivations, "activation must be 0 (none) to ", kActivations - 1, ", got ",
          activation);
  g.batch = batch;
  g.rows_in = rows_in;
  g.rows_out = rows_out;
  g.in_channels = static_cast<int32_t>(in_channels);
  g.out_channels = static_cast<int32_t>(out_channels);
  g.channel_groups = static_cast<int32_t>(channel_groups);
  g.num_taps = static_cast<int32_t>(num_taps);
  g.activation = static_cast<int32_t>(activation);
}

// The maps of a program: sizes, where they lie, and what has been written.
struct Layout {
  struct Size {
    int64_t kind, channels, height, width, offset;  // offset: in the arena, in units per image
    int64_t rows() const { return height * width; }
    int64_t values() const { return channels * rows(); }
  };
  std::vector<Size> maps;
  Flow flow;
  int64_t arena = 0;  // units per image: elements, or bytes where maps have types of their own

  const Size& map(int64_t number) const {
    require(number >= 0 && number < static_cast<int64_t>(maps.size()), "code names a buffer ", number,
            " that does not exist");
    return maps[number];
  }

  std::vector<Place> places(int64_t element_bytes) const {
    std::vector<Place> found;
    for (const Size& map : maps) {
      const int64_t offset = map.kind == Flow::kScratch ? map.offset * element_bytes : -1;
      found.push_back(Place{nullptr, map.values() * element_bytes, offset});
    }
    return found;
  }
};

// `grids`: of each map where they have types of their own
inline Layout read_layout(const int64_t* fields, int64_t count, int64_t inputs, int64_t batch,
                          const MapGrid* grids = nullptr) {
  Layout layout;
  int64_t arena = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t *f = fields + i * kBufferFields, kind = f[kKind], offset = f[kOffset];
    require(i < inputs ? kind == Flow::kInput : kind == Flow::kScratch || kind == Flow::kOutput, "buffer ", i,
            " has the wrong kind ", kind, ": inputs come first, then scratch (1) and outputs (2)");
    require(f[kChannels] >= 1 && f[kHeight] >= 0 && f[kWidth] >= 0, "buffer ", i, " has an impossible size");
    check_map("a buffer", batch, f[kChannels], f[kHeight], f[kWidth]);
    const Layout::Size map{kind, f[kChannels], f[kHeight], f[kWidth], offset};
    const int64_t length = map.values() * (grids ? bytes_of(grids[i].type) : 1);
    if (kind == Flow::kScratch) {
      require(offset >= 0 && offset % 32 == 0 && offset < (int64_t{1} << 40), "buffer ", i,
              ": the offset must be a multiple of 32");
      require(countable({offset + length, batch + 1}), "buffer ", i, " is too large");
      arena = std::max(arena, offset + length);
    }
    layout.flow.add(kind, kind == Flow::kScratch ? offset : 0, length);
    layout.maps.push_back(map);
  }
  require(count >= inputs, "every input must have a buffer");
  // the next image's maps start on a cache line too
  layout.arena = (arena + 31) / 32 * 32;
  return layout;
}

namespace detail {

inline bool none(const int64_t* f, std::initializer_list<StepField> fields) {
  return std::all_of(fields.begin(), fields.end(), [f](StepField field) { return f[field] < 0; });
}

// the residual of a convolution and of a pointwise step
inline void set_residual(GatherGemm& g, const int64_t* f, int64_t number, const Layout& layout, Operands& operands) {
  if (f[kResidual] < 0) return;
  const Layout::Size& residual = layout.map(f[kResidual]);
  require(residual.channels == f[kResidualChannels] && residual.channels <= g.out_channels, "step ", number,
          ": residual_channels must be the residual's channels, at most ", g.out_channels);
  g.residual_size = residual.rows();
  g.residual_channels = static_cast<int32_t>(residual.channels);
  if (f[kResidualRows] < 0) {
    require(residual.rows() == g.rows_out, "step ", number, ": the residual has ", residual.rows(),
            " positions, the output ", g.rows_out);
    return;
  }
  Table& table = operands.table(f[kResidualRows], "residual_rows");
  g.residual_rows = table.data;
  require(table.count == g.rows_out, "residual_rows must have ", g.rows_out, " entries, got ", table.count);
  table.within("residual_rows", 0, g.residual_size);
}

inline void set_slope(GatherGemm& g, const int64_t* f, int64_t number, Operands& operands) {
  require((f[kActivation] == kLeaky) == (f[kSlope] >= 0), "step ", number, ": activation ", int64_t{kLeaky},
          ", and no other, has a slope");
  if (f[kSlope] >= 0) g.slope = operands.floats(f[kSlope], "slope", g.out_channels);
}

inline void set_second(GatherGemm& g, const int64_t* f, int64_t number, const Layout& layout, Operands& operands) {
  if (f[kOut2] < 0) return;
  const Layout::Size& out2 = layout.map(f[kOut2]);
  require(out2.channels == g.out_channels && out2.rows() == g.rows_out, "step ", number,
          ": out and out2 must have one size");
  g.scale2 = operands.floats(f[kScale2], "scale2", g.out_channels);
  g.shift2 = operands.floats(f[kShift2], "shift2", g.out_channels);
  require(f[kActivation2] == kNone || f[kActivation2] == kRelu, "step ", number,
          ": the activation of the second output must be 0 (none) or 1 (ReLU), got ", f[kActivation2]);
  g.low2 = f[kActivation2] == kNone ? -std::numeric_limits<float>::infinity() : 0.0f;
}

// `bytes`: in eight bits, as below
inline void set_convolution(GatherGemm& g, const int64_t* f, int64_t number, const Layout& layout,
                            Operands& operands, bool bytes) {
  check_tables(g, operands.table(f[kTapIndex], "index"), operands.table(f[kRows], "rows"),
               operands.table(f[kTaps], "taps"), operands.table(f[kGroups], "groups"));
  if (f[kWeight] < 0) {
    const bool plain = none(f, {kBias, kSlope, kResidual, kOut2}) && f[kActivation] == 0 && f[kOut] >= 0;
    require(plain && g.channel_groups == 1 && g.in_channels == g.out_channels, "step ", number,
            ": a mean has one output of as many channels and nothing else");
    require(g.num_groups == 1 && g.groups[1] == g.num_taps, "step ", number, ": a mean has one group of all taps");
    return;
  }
  g.weight = operands.weight(f[kWeight], g.out_channels, g.in_channels / g.channel_groups, g.num_taps,
                             g.channel_groups, bytes);
  if (f[kShifts] >= 0) check_shifts(g, operands.table(f[kShifts], "shifts"));
  if (f[kBias] >= 0) g.bias = operands.floats(f[kBias], "bias", g.out_channels);
  set_slope(g, f, number, operands);
  set_second(g, f, number, layout, operands);
  set_residual(g, f, number, layout, operands);
}

inline void same_channels(const GatherGemm& g, int64_t number) {
  require(g.in_channels == g.out_channels && g.channel_groups == 1, "step ", number, ": the output must have the ",
          g.in_channels, " channels of the input");
}

inline void set_window_max(GatherGemm& g, const int64_t* f, int64_t number, Operands& operands) {
  same_channels(g, number);
  require(none(f, {kWeight, kBias, kSlope, kResidual, kOut2}) && f[kActivation] == 0, "step ", number,
          ": a maximum has one output and nothing else");
  check_windows(g.rows_in, g.rows_out, operands.table(f[kTapIndex], "index"), operands.table(f[kRows], "starts"));
  g.index = operands.table(f[kTapIndex], "index").data;
  g.rows = operands.table(f[kRows], "starts").data;
}

inline void set_fill(GatherGemm& g, const int64_t* f, int64_t number, const Layout& layout, Operands& operands,
                     bool bytes) {
  same_channels(g, number);
  require(bytes || none(f, {kSlope, kOut2, kResidualRows}), "step ", number,
          ": a fill has one output and no row table");
  // a fill may have no taps, which num_taps cannot say: then its weight is missing
  const bool taps = f[kWeight] >= 0;
  const int64_t kinds = f[kBias] >= 0  ? operands.first_size(f[kBias], "bias")
                        : taps         ? operands.first_size(f[kWeight], "weight")
                                       : kInt32Max;
  require(taps || f[kNumTaps] == 1, "step ", number, ": a fill without a weight has no taps, so num_taps must be 1");
  require(countable({kinds, g.num_taps, g.in_channels}), "step ", number, ": the fill is too large");
  Table &index = operands.table(f[kTapIndex], "index"), &kind_table = operands.table(f[kRows], "kinds");
  check_fill(g.rows_in, g.rows_out, g.num_taps, kinds, index, kind_table);
  if (taps) g.weight = operands.floats(f[kWeight], "weight", kinds * g.num_taps * g.in_channels);
  if (!taps) g.num_taps = 0;
  if (f[kBias] >= 0) g.bias = operands.floats(f[kBias], "bias", kinds * g.in_channels);
  if (bytes) {
    // its epilogue is that of a convolution
    set_slope(g, f, number, operands);
    set_second(g, f, number, layout, operands);
    set_residual(g, f, number, layout, operands);
  } else {
    require(g.activation <= kRelu6, "activation must be 0, 1 or 2, got ", g.activation);
  }
  if (!bytes && f[kResidual] >= 0) {
    const Layout::Size& residual = layout.map(f[kResidual]);
    require(residual.channels == g.out_channels && residual.rows() == g.rows_out, "step ", number,
            ": the residual of a fill must have the output's shape");
  }
  g.index = index.data;
  g.rows = kind_table.data;
}

inline void set_pointwise(GatherGemm& g, const int64_t* f, int64_t number, const Layout& layout,
                          Operands& operands) {
  same_channels(g, number);
  require(none(f, {kWeight, kBias, kOut2, kResidualRows}) && g.rows_in == g.rows_out, "step ", number,
          ": a pointwise step has one output of the input's positions, and neither a weight nor a row table");
  if (f[kScale2] >= 0) g.scale2 = operands.floats(f[kScale2], "scale2", g.out_channels);
  if (f[kShift2] >= 0) g.shift2 = operands.floats(f[kShift2], "shift2", g.out_channels);
  set_slope(g, f, number, operands);
  set_residual(g, f, number, layout, operands);
}

// Copies into one map follow each other and cover its channels in order; so nobody reads a part of it.
class Copies {
 public:
  void step(int64_t number, const int64_t* f, GatherGemm& g) {
    if (f[kWork] != kCopy) return end(number);
    require(none(f, {kWeight, kBias, kSlope, kResidual, kOut2}) && f[kActivation] == 0 && g.rows_in == g.rows_out,
            "step ", number, ": a copy has one output of the input's positions and nothing else");
    if (out_ != f[kOut]) {
      end(number);
      out_ = f[kOut];
      at_ = 0;
      channels_ = g.out_channels;
    }
    require(f[kResidualChannels] == at_ && at_ + g.in_channels <= channels_, "step ", number, ": the copy of ",
            g.in_channels, " channels must begin at channel ", at_, " of ", channels_, ", got ",
            f[kResidualChannels]);
    g.residual_channels = static_cast<int32_t>(at_);
    at_ += g.in_channels;
    if (at_ == channels_) out_ = -1;
  }
  void end(int64_t number) const {
    require(out_ < 0, "step ", number, ": the copies before it leave channels of buffer ", out_, " unwritten");
  }

 private:
  int64_t out_ = -1, at_ = 0, channels_ = 0;
};

}  // namespace detail

// The steps of a program that may run on maps of this layout. `in_bytes(maps)` says of a step's
// maps, which exist, whether it is in eight bits.
template <class InBytes>
std::vector<Call> read_steps(const int64_t* code, int64_t count, Layout& layout, Operands& operands, int64_t batch,
                             const InBytes& in_bytes) {
  std::vector<Call> calls(count);
  detail::Copies copies;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* f = code + i * kStepFields;
    Call& call = calls[i];
    require(f[kWork] >= 0 && f[kWork] < kWorks, "step ", i, ": work must be 0 to ", kWorks - 1, ", got ", f[kWork]);
    call.work = static_cast<Work>(f[kWork]);
    call.maps = Places{f[kX], f[kResidual], f[kOut], f[kOut2]};
    require(f[kOut] >= 0 || f[kOut2] >= 0, "step ", i, " writes nothing");
    for (const StepField map : {kX, kResidual, kOut, kOut2}) {
      if (f[map] >= 0 || map == kX) layout.map(f[map]);
    }
    const bool bytes = in_bytes(call.maps);
    require(f[kOut] >= 0 || call.work == kConvolve || (bytes && call.work == kFill), "step ", i, " writes nothing");
    const Layout::Size &x = layout.map(f[kX]), &out = layout.map(f[kOut] >= 0 ? f[kOut] : f[kOut2]);
    GatherGemm& g = call.problem;
    set_shape(g, batch, x.channels, x.rows(), out.channels, out.rows(), f[kNumTaps], f[kChannelGroups],
              f[kActivation]);
    copies.step(i, f, g);
    switch (call.work) {
      case kWindowMax: detail::set_window_max(g, f, i, operands); break;
      case kFill: detail::set_fill(g, f, i, layout, operands, bytes); break;
      case kPointwise: detail::set_pointwise(g, f, i, layout, operands); break;
      case kCopy: break;
      default: detail::set_convolution(g, f, i, layout, operands, bytes);
    }
    layout.flow.step(i, f[kX], f[kResidual], f[kOut], f[kOut2], g.residual_rows == nullptr);
  }
  copies.end(count);
  layout.flow.end();
  return calls;
}

inline std::vector<Call> read_steps(const int64_t* code, int64_t count, Layout& layout, Operands& operands,
                                    int64_t batch) {
  return read_steps(code, count, layout, operands, batch, [](const Places&) { return false; });
}

}  // namespace quincunx
