// Programs in eight bits as a torch operator, through torch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "allocate.h"
#include "checks.h"
#include "dispatch.h"
#include "int8_program.h"
#include "maps.h"
#include "schedule.h"

namespace {

using quincunx::ForwardKernels;
using quincunx::kInt32Max;
using quincunx::Layout;
using quincunx::MapGrid;
using quincunx::Table;
using quincunx::Weight;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ScalarType type_of(const MapGrid& grid) {
  return grid.type == quincunx::kFloat32    ? ScalarType::Float
         : grid.type == quincunx::kBfloat16 ? ScalarType::BFloat16
                                            : ScalarType::Byte;
}

// the values of a contiguous tensor
const void* values_of(const Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), name, " must be contiguous and on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == type, name, " must be ", torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  return t.data_ptr();
}

class Tensors final : public quincunx::Operands {
 public:
  explicit Tensors(const std::vector<Tensor>& tensors) : tensors_(tensors), tables_(tensors.size()) {}

  Table& table(int64_t number, const char* name) override {
    const auto* data = static_cast<const int32_t*>(values_of(at(number), name, ScalarType::Int));
    if (tables_[number].data == nullptr) tables_[number] = Table(data, at(number).numel());
    return tables_[number];
  }
  const float* floats(int64_t number, const char* name, int64_t count) override {
    const Tensor& tensor = at(number);
    STD_TORCH_CHECK(tensor.numel() == count, name, " must have ", count, " values, got ", tensor.numel());
    return static_cast<const float*>(values_of(tensor, name, ScalarType::Float));
  }
  int64_t first_size(int64_t number, const char* name) override {
    STD_TORCH_CHECK(at(number).dim() > 0, name, " must have a size");
    return at(number).sizes()[0];
  }
  const void* weight(int64_t number, int64_t outputs, int64_t channels, int64_t taps, int64_t groups, bool) override {
    const Tensor& tensor = at(number);
    const int64_t bytes = quincunx::kernels().int8.forward.packed_size(outputs, channels, taps, groups);
    STD_TORCH_CHECK(tensor.numel() == bytes, "packed weight must have ", bytes, " bytes, got ", tensor.numel(),
                    "; was it packed for these channels, taps and groups?");
    return values_of(tensor, "packed weight", ScalarType::Byte);
  }

 private:
  const Tensor& at(int64_t number) const {
    STD_TORCH_CHECK(number >= 0 && number < static_cast<int64_t>(tensors_.size()), "code names a tensor ", number,
                    " that does not exist");
    return tensors_[number];
  }

  const std::vector<Tensor>& tensors_;
  std::vector<Table> tables_;
};

// weight [groups, O / groups, C / groups, T] in int8, any strides
Tensor pack_int8(const Tensor& weight) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 4 && weight.scalar_type() == ScalarType::Char && weight.numel() > 0,
                  "weight must be int8 [groups, O / groups, C / groups, T], on the CPU and not empty");
  const ForwardKernels& kernels = quincunx::kernels().int8.forward;
  const auto sizes = weight.sizes(), strides = weight.strides();
  STD_TORCH_CHECK(sizes[0] <= kInt32Max && sizes[1] <= kInt32Max, "the weight is too large");
  const Weight w{weight.data_ptr(), sizes[0], sizes[1], sizes[2], sizes[3], strides[0], strides[1], strides[2],
                 strides[3]};
  quincunx::check_weight(w.groups * w.outputs, w.channels, w.taps, w.groups);
  const int64_t size = kernels.packed_size(w.groups * w.outputs, w.channels, w.taps, w.groups);
  Tensor packed = quincunx::empty({size}, ScalarType::Byte);
  void* to = packed.data_ptr();
  const int64_t parts = quincunx::parts_for(size, 32768);
  quincunx::parallel(parts, [&](int64_t part) { kernels.pack(&w, to, part, parts); });
  return packed;
}

// types, zeros: of each buffer; scales: float32, likewise; multipliers: a tensor's number for each step, or -1
std::vector<Tensor> run_int8_program(std::vector<Tensor> inputs, std::vector<Tensor> tensors,
                                     std::vector<int64_t> buffers, std::vector<int64_t> code,
                                     std::vector<int64_t> types, std::vector<int64_t> zeros, const Tensor& scales,
                                     std::vector<int64_t> multipliers) {
  STD_TORCH_CHECK(!inputs.empty() && inputs[0].dim() == 4, "a program needs an input [N, C, H, W]");
  constexpr int64_t kBuffer = quincunx::kBufferFields, kStep = quincunx::kStepFields;
  STD_TORCH_CHECK(buffers.size() % kBuffer == 0, "buffers must have ", kBuffer, " integers each");
  STD_TORCH_CHECK(code.size() % kStep == 0, "code must have ", kStep, " integers for each step");
  const size_t count = buffers.size() / kBuffer, steps = code.size() / kStep;
  STD_TORCH_CHECK(types.size() == count && zeros.size() == count && scales.numel() == static_cast<int64_t>(count) &&
                      multipliers.size() == steps,
                  "types, zeros and scales must have ", count, " entries and multipliers ", steps);
  const quincunx::Engine engine{quincunx::kernels(), false};
  const int64_t batch = inputs[0].sizes()[0];
  const std::vector<MapGrid> grids = quincunx::read_grids(
      count, types.data(), zeros.data(), static_cast<const float*>(values_of(scales, "scales", ScalarType::Float)));
  Layout layout = quincunx::read_layout(buffers.data(), count, inputs.size(), batch, grids.data());
  std::vector<quincunx::Place> places = quincunx::places_of(layout, grids);
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < count; ++i) {
    const Layout::Size& size = layout.maps[i];
    const ScalarType type = type_of(grids[i]);
    if (size.kind == quincunx::Flow::kInput) {
      Tensor& t = inputs[i];
      STD_TORCH_CHECK(t.is_cpu() && t.dim() == 4 && t.scalar_type() == type, "input ", i, " must be a map [N, C, H, W] of ",
                      torch::headeronly::toString(type), " on the CPU");
      const auto sizes = t.sizes();
      STD_TORCH_CHECK(sizes[0] == batch && sizes[1] == size.channels && sizes[2] == size.height && sizes[3] == size.width,
                      "input ", i, " must be [", batch, ", ", size.channels, ", ", size.height, ", ", size.width, "]");
      t = torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
      places[i].base = static_cast<char*>(t.data_ptr());
    } else if (size.kind == quincunx::Flow::kOutput) {
      outputs.push_back(
          quincunx::empty_map({batch, size.channels, size.height, size.width}, type, MemoryFormat::ChannelsLast));
      places[i].base = static_cast<char*>(outputs.back().data_ptr());
    }
  }
  Tensors operands(tensors);
  const auto always = [](const quincunx::Places&) { return true; };
  auto calls = quincunx::read_steps(code.data(), steps, layout, operands, batch, always);
  const auto quantised = quincunx::quantise_steps(calls, layout, grids, multipliers.data(), operands, always);
  std::optional<Tensor> arena;
  quincunx::run_calls(calls, places, layout.arena, batch, engine, quincunx::torch_host(), [&](int64_t bytes) {
    arena = quincunx::empty({bytes}, ScalarType::Byte);
    return static_cast<char*>(arena->data_ptr());
  });
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(quincunx_native, m) {
  m.def("pack_int8(Tensor weight) -> Tensor");
  m.def(
      "run_int8_program(Tensor[] inputs, Tensor[] tensors, int[] buffers, int[] code, int[] types, int[] zeros, "
      "Tensor scales, int[] multipliers) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(quincunx_native, CPU, m) {
  m.impl("pack_int8", TORCH_BOX(&pack_int8));
  m.impl("run_int8_program", TORCH_BOX(&run_int8_program));
}
