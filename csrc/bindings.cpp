// The kernels as torch operators, through torch's stable ABI: all arguments of a caller are
// checked here, before memory is touched.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "dispatch.h"
#include "kept.h"
#include "maps.h"
#include "permission.h"
#include "program.h"
#include "schedule.h"

namespace {

using quincunx::as_map;
using quincunx::FillGrad;
using quincunx::FittedFill;
using quincunx::Engine;
using quincunx::ForwardKernels;
using quincunx::GatherGemm;
using quincunx::kInt32Max;
using quincunx::Kernels;
using quincunx::LookupConv;
using quincunx::Map;
using quincunx::map_type;
using quincunx::size_of;
using quincunx::Table;
using quincunx::Weight;
using quincunx::WeightGrad;
using quincunx::WindowKernels;
using quincunx::Windows;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, MemoryFormat format = MemoryFormat::Contiguous) {
  return quincunx::empty_map(sizes, type, format);
}

// ---------------------------------------------------------------- arguments

const ForwardKernels& forward_of(ScalarType type) {
  return type == ScalarType::Float ? quincunx::kernels().f32 : quincunx::kernels().bf16;
}

Engine engine_of(ScalarType type) { return Engine{quincunx::kernels(), type == ScalarType::BFloat16}; }

// A tensor that is not a map: read at its first use, its values at the first request.
class Operand {
 public:
  explicit Operand(const Tensor& tensor) : tensor_(&tensor) {}

  Table& table(const char* name) {
    read(name, ScalarType::Int);
    if (table_.data == nullptr) table_ = Table(static_cast<const int32_t*>(data_), count_);
    return table_;
  }

  const float* channels(const char* name, int64_t count) {
    read(name, ScalarType::Float);
    STD_TORCH_CHECK(count_ == count, name, " must have ", count, " values, got ", count_);
    return static_cast<const float*>(data_);
  }

  const void* weight(const ForwardKernels& kernels, int64_t count) {
    read("packed weight", kernels.packs_bf16 ? ScalarType::BFloat16 : ScalarType::Float);
    STD_TORCH_CHECK(count_ == count, "packed weight must have ", count, " values, got ", count_,
                    "; was it packed for these channels, taps and groups?");
    return data_;
  }

 private:
  void read(const char* name, ScalarType type) {
    if (data_ == nullptr) {
      STD_TORCH_CHECK(tensor_->is_cpu() && tensor_->is_contiguous(), name, " must be contiguous and on the CPU");
      type_ = tensor_->scalar_type();
      data_ = tensor_->data_ptr();
      count_ = tensor_->numel();
    }
    STD_TORCH_CHECK(type_ == type, name, " must be ", torch::headeronly::toString(type), ", got ",
                    torch::headeronly::toString(type_));
  }

  const Tensor* tensor_;
  const void* data_ = nullptr;
  ScalarType type_ = ScalarType::Undefined;
  int64_t count_ = 0;
  Table table_;
};

struct Tables {
  Operand &index, &rows, &taps, &groups;
};

void set_tables(GatherGemm& g, Tables tables) {
  quincunx::check_tables(g, tables.index.table("index"), tables.rows.table("rows"), tables.taps.table("taps"),
                         tables.groups.table("groups"));
}

void set_shape(GatherGemm& g, const Map& x, int64_t out_channels, int64_t rows_out, int64_t num_taps,
               int64_t channel_groups, int64_t activation) {
  quincunx::set_shape(g, x.batch, x.channels, x.rows(), out_channels, rows_out, num_taps, channel_groups, activation);
  g.x = x.data;
}

int64_t packed_size(const ForwardKernels& kernels, const GatherGemm& g) {
  return kernels.packed_size(g.out_channels, g.in_channels / g.channel_groups, g.num_taps, g.channel_groups);
}

// ---------------------------------------------------------------- operators

// low: for maps in bfloat16 also where the weight is float32
Tensor pack_weight(const Tensor& weight, int64_t groups, bool low) {
  STD_TORCH_CHECK(weight.is_cpu(), "weight must be on the CPU");
  const int64_t dim = weight.dim();
  STD_TORCH_CHECK(dim == 3 || dim == 4, "weight must be [O, C / groups, T] or [groups, O / groups, C / groups, T]");
  const ScalarType type = map_type(weight);
  const ForwardKernels& kernels = forward_of(low ? ScalarType::BFloat16 : type);
  const auto sizes = weight.sizes(), strides = weight.strides();
  STD_TORCH_CHECK(groups >= 1 && (dim == 4 ? sizes[0] == groups : sizes[0] % groups == 0), "groups = ", groups,
                  " does not fit a weight whose first size is ", sizes[0]);
  Weight w{weight.data_ptr(), groups,           sizes[dim - 3],   sizes[dim - 2],   sizes[dim - 1],
           0,                 strides[dim - 3], strides[dim - 2], strides[dim - 1]};
  w.wide = low && type == ScalarType::Float;
  if (dim == 3) w.outputs /= groups;
  STD_TORCH_CHECK(*std::min_element(sizes.begin(), sizes.end()) > 0, "weight must not be empty");
  STD_TORCH_CHECK(groups <= kInt32Max && w.outputs <= kInt32Max, "the weight is too large: ", groups, " groups of ",
                  w.outputs, " outputs");
  quincunx::check_weight(groups * w.outputs, w.channels, w.taps, groups);
  w.group_stride = dim == 4 ? strides[0] : w.outputs * w.output_stride;
  const int64_t size = kernels.packed_size(groups * w.outputs, w.channels, w.taps, groups);
  Tensor packed = empty({size}, kernels.packs_bf16 ? ScalarType::BFloat16 : ScalarType::Float);
  void* to = packed.data_ptr();
  const int64_t parts = quincunx::parts_for(size, 16384);
  quincunx::parallel(parts, [&](int64_t part) { kernels.pack(&w, to, part, parts); });
  return packed;
}

std::tuple<Tensor, Tensor> gather_gemm(Tensor x, const Tensor& packed, std::optional<Tensor> bias,
                                       std::optional<Tensor> residual, std::optional<Tensor> scale2,
                                       std::optional<Tensor> shift2, const Tensor& index, const Tensor& rows,
                                       const Tensor& taps, const Tensor& groups, std::vector<int64_t> out_size,
                                       int64_t out_channels, int64_t num_taps, int64_t channel_groups,
                                       int64_t activation, std::optional<Tensor> shifts) {
  const ScalarType type = map_type(x);
  const ForwardKernels& kernels = forward_of(type);
  const Map in = as_map(x, "x", type);
  const int64_t rows_out = quincunx::check_output(out_size, in.batch, out_channels);
  std::vector<quincunx::Step> steps(1);
  GatherGemm& g = steps[0].problem;
  set_shape(g, in, out_channels, rows_out, num_taps, channel_groups, activation);
  STD_TORCH_CHECK(activation != quincunx::kLeaky, "activation ", activation, " has a slope, which this has not");
  Operand index_table(index), rows_table(rows), taps_table(taps), groups_table(groups);
  set_tables(g, {index_table, rows_table, taps_table, groups_table});
  if (shifts) quincunx::check_shifts(g, Operand(*shifts).table("shifts"));
  g.weight = Operand(packed).weight(kernels, packed_size(kernels, g));
  for (auto* channels : {&bias, &scale2, &shift2}) {
    if (*channels && (*channels)->scalar_type() == ScalarType::BFloat16) {
      *channels = torch::stable::to(**channels, ScalarType::Float);
    }
  }
  if (bias) g.bias = Operand(*bias).channels("bias", out_channels);
  STD_TORCH_CHECK(scale2.has_value() == shift2.has_value(), "scale2 and shift2 go together");
  if (residual) {
    const Map map = as_map(*residual, "residual", type);
    STD_TORCH_CHECK(map.batch == in.batch && map.channels == out_channels && map.rows() == g.rows_out,
                    "residual must have the output's batch, channels and positions");
    g.residual = map.data;
    g.residual_size = g.rows_out;
    g.residual_channels = g.out_channels;
  }
  const std::vector<int64_t> shape{in.batch, out_channels, out_size[0], out_size[1]};
  Tensor out = empty(shape, type, MemoryFormat::ChannelsLast);
  Tensor out2 = scale2 ? empty(shape, type, MemoryFormat::ChannelsLast) : empty({0}, type);
  g.out = out.data_ptr();
  if (scale2) {
    g.scale2 = Operand(*scale2).channels("scale2", out_channels);
    g.shift2 = Operand(*shift2).channels("shift2", out_channels);
    g.out2 = out2.data_ptr();
  }
  quincunx::run_steps(steps, engine_of(type), quincunx::torch_host());
  return {out, out2};
}

Tensor weight_grad(Tensor x, Tensor gy, const Tensor& index, int64_t num_taps, int64_t channel_groups,
                   bool channels_last) {
  const ScalarType type = map_type(x);
  const Map in = as_map(x, "x", type), out = as_map(gy, "gy", type);
  STD_TORCH_CHECK(in.batch == out.batch, "x and gy must have the same batch size");
  GatherGemm shape{};
  set_shape(shape, in, out.channels, out.rows(), num_taps, channel_groups, 0);
  Operand operand(index);
  Table& table = operand.table("index");
  WeightGrad g{};
  g.index = table.data;
  STD_TORCH_CHECK(table.count == out.rows() * num_taps, "index must be [", out.rows(), ", ", num_taps, "], got ",
                  table.count, " entries");
  table.within("index", -1, in.rows());
  g.x = in.data;
  g.gy = out.data;
  g.bf16 = type == ScalarType::BFloat16;
  g.batch = in.batch;
  g.rows_in = in.rows();
  g.positions = out.rows();
  g.in_channels = shape.in_channels;
  g.out_channels = shape.out_channels;
  g.channel_groups = shape.channel_groups;
  g.num_taps = shape.num_taps;
  const int64_t per_group = in.channels / channel_groups;
  g.channels_last = channels_last;
  Tensor grad = empty({out.channels, channels_last ? num_taps : per_group, channels_last ? per_group : num_taps},
                      ScalarType::Float);
  g.grad = static_cast<float*>(grad.data_ptr());
  const auto& kernels = quincunx::kernels().grad;
  const int64_t macs = g.batch * g.positions * grad.numel();
  const int64_t parts = quincunx::parts_for(macs, kernels.least_part(&g));
  Tensor partial = empty({kernels.partial_floats(&g, parts)}, ScalarType::Float);
  g.partial = static_cast<float*>(partial.data_ptr());
  quincunx::parallel(parts, [&](int64_t part) { kernels.run(&g, part, parts); });
  quincunx::parallel(parts, [&](int64_t part) { kernels.finish(&g, part, parts, parts); });
  return grad;
}

// x [N, C, H, W], codebooks [groups * M, K, width], assignments [groups * M, T, O / groups]
Tensor lookup_conv(Tensor x, const Tensor& codebooks, const Tensor& assignments, std::optional<Tensor> bias,
                   const Tensor& slots, const Tensor& offsets, const Tensor& rows,
                   std::vector<int64_t> out_size, int64_t channel_groups) {
  const Map in = as_map(x, "x", ScalarType::Float);
  const ScalarType type = assignments.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Byte || type == ScalarType::Short,
                  "assignments must be uint8 or int16, got ", torch::headeronly::toString(type));
  for (const Tensor* t : {&codebooks, &assignments}) {
    STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous() && t->dim() == 3 && t->numel() > 0,
                    "codebooks and assignments must be contiguous, on the CPU, of 3 dimensions and not empty");
  }
  STD_TORCH_CHECK(codebooks.scalar_type() == ScalarType::Float, "codebooks must be float32");
  const auto books = codebooks.sizes(), given = assignments.sizes();
  const int64_t subspaces = books[0], codewords = books[1], width = books[2], num_taps = given[1];
  STD_TORCH_CHECK(channel_groups >= 1 && channel_groups <= subspaces && subspaces % channel_groups == 0 &&
                      given[0] == subspaces && given[2] <= kInt32Max / channel_groups,
                  "channel_groups = ", channel_groups, " does not fit the codebooks and assignments");
  GatherGemm shape{};
  const int64_t rows_out = quincunx::check_output(out_size, in.batch, channel_groups * given[2]);
  set_shape(shape, in, channel_groups * given[2], rows_out, num_taps, channel_groups, 0);
  const int64_t channels = in.channels / channel_groups, per_group = subspaces / channel_groups;
  STD_TORCH_CHECK(width <= channels && (channels - 1) / width + 1 == per_group, per_group, " subspaces of ",
                  width, " channels do not make ", channels, " channels");
  STD_TORCH_CHECK(codewords <= (type == ScalarType::Byte ? 256 : 32767), "too many codewords: ", codewords);
  LookupConv g{};
  g.wide = type == ScalarType::Short;
  g.assignments = assignments.data_ptr();
  const int64_t count = assignments.numel();
  // unsigned, so that a negative value is too large
  const auto greatest = [count](const auto* values) {
    return count > 0 ? int64_t{*std::max_element(values, values + count)} : 0;
  };
  const int64_t highest = g.wide ? greatest(static_cast<const uint16_t*>(g.assignments))
                                 : greatest(static_cast<const uint8_t*>(g.assignments));
  STD_TORCH_CHECK(highest < codewords, "assignments must lie in [0, ", codewords, "), got ", highest);
  Operand slot_operand(slots), offset_operand(offsets), row_operand(rows);
  Table &slot_table = slot_operand.table("slots"), &offset_table = offset_operand.table("offsets");
  Table& row_table = row_operand.table("rows");
  g.slots = slot_table.data;
  g.num_slots = slot_table.count;
  g.offsets = offset_table.data;
  g.rows = row_table.data;
  g.positions = row_table.count;
  STD_TORCH_CHECK(offset_table.count == num_taps, "offsets must have ", num_taps, " entries, got ",
                  offset_table.count);
  STD_TORCH_CHECK(g.num_slots <= kInt32Max / 4 && g.positions <= kInt32Max / 4, "the map is too large");
  slot_table.within("slots", -1, in.rows());
  offset_table.within("offsets", 0, kInt32Max / 4);
  row_table.within("rows", -1, shape.rows_out);
  row_table.each_once("rows", shape.rows_out);
  std::vector<int32_t> order(num_taps);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return g.offsets[a] < g.offsets[b]; });
  g.order = order.data();
  g.x = reinterpret_cast<const float*>(in.data);
  g.codebooks = static_cast<const float*>(codebooks.data_ptr());
  if (bias) g.bias = Operand(*bias).channels("bias", shape.out_channels);
  g.batch = in.batch;
  g.rows_in = shape.rows_in;
  g.rows_out = shape.rows_out;
  g.in_channels = shape.in_channels;
  g.out_channels = shape.out_channels;
  g.channel_groups = shape.channel_groups;
  g.subspaces = static_cast<int32_t>(per_group);
  g.codewords = static_cast<int32_t>(codewords);
  g.width = static_cast<int32_t>(width);
  g.num_taps = shape.num_taps;
  Tensor out = empty({in.batch, shape.out_channels, out_size[0], out_size[1]}, ScalarType::Float,
                     MemoryFormat::ChannelsLast);
  g.out = static_cast<float*>(out.data_ptr());
  const auto& kernels = quincunx::kernels().lookup;
  const int64_t look_ups = in.batch * g.positions * count, least_work = 100000;
  const int64_t parts = quincunx::parts_for(look_ups, least_work);
  const int64_t floats = kernels.scratch_floats(&g, parts);
  STD_TORCH_CHECK(floats <= kInt32Max, "the tables are too large");
  Tensor scratch = empty({floats * parts}, ScalarType::Float);
  g.scratch = static_cast<float*>(scratch.data_ptr());
  quincunx::parallel(parts, [&](int64_t part) { kernels.run(&g, part, parts); });
  return out;
}

Tensor over_windows(Tensor x, const Tensor& index, const Tensor& starts, const std::vector<int64_t>& out_size,
                    const WindowKernels& kernels) {
  const ScalarType type = map_type(x);
  const Map in = as_map(x, "x", type);
  Operand index_operand(index), starts_operand(starts);
  Table& index_table = index_operand.table("index");
  const Table& starts_table = starts_operand.table("starts");
  Windows g{};
  const int64_t entries = index_table.count;
  g.index = index_table.data;
  g.starts = starts_table.data;
  g.positions = quincunx::check_output(out_size, in.batch, in.channels);
  quincunx::check_windows(in.rows(), g.positions, index_table, starts_table);
  g.x = in.data;
  g.batch = in.batch;
  g.rows_in = in.rows();
  g.channels = in.channels;
  Tensor out = empty({in.batch, in.channels, out_size[0], out_size[1]}, type, MemoryFormat::ChannelsLast);
  g.out = out.data_ptr();
  const auto run = type == ScalarType::Float ? kernels.f32 : kernels.bf16;
  const int64_t least_work = 100000;
  const int64_t parts = quincunx::parts_for(g.batch * (entries + g.positions) * g.channels, least_work);
  quincunx::parallel(parts, [&](int64_t part) { run(&g, part, parts); });
  return out;
}

Tensor window_max(Tensor x, const Tensor& index, const Tensor& starts, std::vector<int64_t> out_size) {
  return over_windows(x, index, starts, out_size, quincunx::kernels().max);
}

Tensor window_sum(Tensor x, const Tensor& index, const Tensor& starts, std::vector<int64_t> out_size) {
  return over_windows(x, index, starts, out_size, quincunx::kernels().sum);
}

Tensor fitted_fill(Tensor x, const Tensor& weight, const std::optional<Tensor>& bias, std::optional<Tensor> residual,
                   const Tensor& index, const Tensor& kinds, std::vector<int64_t> out_size, int64_t activation) {
  const ScalarType type = map_type(x);
  const Map in = as_map(x, "x", type);
  Operand weight_operand(weight), index_operand(index), kinds_operand(kinds);
  STD_TORCH_CHECK(weight.dim() == 3, "weight must have 3 dimensions [kinds, taps, C], got ", weight.dim());
  const auto sizes = weight.sizes();
  FittedFill g{};
  g.num_taps = sizes[1];
  g.positions = quincunx::check_output(out_size, in.batch, in.channels);
  STD_TORCH_CHECK(sizes[2] == in.channels && quincunx::countable({sizes[0], sizes[1], sizes[2]}), "weight must be [kinds, "
                  "taps, ", in.channels, "], got [", sizes[0], ", ", sizes[1], ", ", sizes[2], "]");
  g.weight = weight_operand.channels("weight", sizes[0] * sizes[1] * sizes[2]);
  Table& index_table = index_operand.table("index");
  Table& kinds_table = kinds_operand.table("kinds");
  quincunx::check_fill(in.rows(), g.positions, g.num_taps, sizes[0], index_table, kinds_table);
  g.index = index_table.data;
  g.kinds = kinds_table.data;
  std::optional<Operand> bias_operand;
  if (bias.has_value()) g.bias = bias_operand.emplace(*bias).channels("bias", sizes[0] * in.channels);
  if (residual.has_value()) {
    const Map added = as_map(*residual, "residual", type);
    STD_TORCH_CHECK(added.batch == in.batch && added.channels == in.channels && added.height == out_size[0] &&
                        added.width == out_size[1], "residual must have the output's shape");
    g.residual = added.data;
  }
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation must be 0, 1 or 2, got ", activation);
  g.activation = static_cast<int32_t>(activation);
  g.x = in.data;
  g.batch = in.batch;
  g.rows_in = in.rows();
  g.channels = in.channels;
  Tensor out = empty({in.batch, in.channels, out_size[0], out_size[1]}, type, MemoryFormat::ChannelsLast);
  g.out = out.data_ptr();
  const auto run = type == ScalarType::Float ? quincunx::kernels().fill.f32 : quincunx::kernels().fill.bf16;
  const int64_t least_work = 100000;
  const int64_t parts = quincunx::parts_for(g.batch * g.positions * (std::max<int64_t>(g.num_taps, 1) + 1) * g.channels, least_work);
  quincunx::parallel(parts, [&](int64_t part) { run(&g, part, parts); });
  return out;
}

Tensor fill_grad(Tensor x, Tensor z, const Tensor& index, const Tensor& order, const Tensor& starts, int64_t num_taps) {
  const ScalarType type = map_type(x);
  const Map in = as_map(x, "x", type), out = as_map(z, "z", type);
  STD_TORCH_CHECK(in.batch == out.batch && in.channels == out.channels, "x and z must have the same batch size and channels");
  STD_TORCH_CHECK(num_taps >= 0 && num_taps <= kInt32Max, "num_taps must be a count, got ", num_taps);
  Operand index_operand(index), order_operand(order), starts_operand(starts);
  Table &index_table = index_operand.table("index"), &order_table = order_operand.table("order");
  const Table& starts_table = starts_operand.table("starts");
  quincunx::check_fill_grad(in.rows(), out.rows(), num_taps, index_table, order_table, starts_table);
  FillGrad g{};
  g.x = in.data;
  g.z = out.data;
  g.index = index_table.data;
  g.order = order_table.data;
  g.starts = starts_table.data;
  g.batch = in.batch;
  g.rows_in = in.rows();
  g.positions = out.rows();
  g.channels = in.channels;
  g.num_taps = num_taps;
  g.kinds = starts_table.count - 1;
  // by the problem alone, so that sums do not depend on the number of threads: enough for many of them, few to add
  const int64_t rows = g.batch * order_table.count, most = 64;
  g.shares = std::clamp<int64_t>(std::min(most / std::max<int64_t>(g.kinds, 1), rows / 1024), 1, most);
  STD_TORCH_CHECK(quincunx::countable({g.shares, g.kinds, num_taps, in.channels}), "the sums are too large");
  Tensor partial = empty({g.shares, g.kinds, num_taps, in.channels}, ScalarType::Float);
  g.partial = static_cast<float*>(partial.data_ptr());
  const auto run = type == ScalarType::Float ? quincunx::kernels().fill.grad_f32 : quincunx::kernels().fill.grad_bf16;
  const int64_t least_work = 100000;
  const int64_t parts = std::min(quincunx::parts_for(rows * (num_taps + 1) * g.channels, least_work),
                                 std::max<int64_t>(g.shares * g.kinds, 1));
  quincunx::parallel(parts, [&](int64_t part) { run(&g, part, parts); });
  return partial;
}

std::string isa() { return quincunx::isa(); }
int64_t level2_bytes() { return quincunx::level2_bytes(); }
std::string tile_formats() { return quincunx::tile_formats(); }
std::string tiles_refused() { return quincunx::tiles_refused(); }
std::string available_isas() { return quincunx::available_isas(); }

}  // namespace

STABLE_TORCH_LIBRARY(quincunx_native, m) {
  m.def("pack_weight(Tensor weight, int groups, bool low=False) -> Tensor");
  m.def(
      "gather_gemm(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, Tensor? scale2, Tensor? shift2, "
      "Tensor index, Tensor rows, Tensor taps, Tensor groups, int[] out_size, int out_channels, int num_taps, "
      "int channel_groups, int activation, Tensor? shifts=None) -> (Tensor, Tensor)");
  m.def("weight_grad(Tensor x, Tensor gy, Tensor index, int num_taps, int channel_groups, bool channels_last) -> Tensor");
  m.def(
      "lookup_conv(Tensor x, Tensor codebooks, Tensor assignments, Tensor? bias, Tensor slots, "
      "Tensor offsets, Tensor rows, int[] out_size, int channel_groups) -> Tensor");
  m.def("window_max(Tensor x, Tensor index, Tensor starts, int[] out_size) -> Tensor");
  m.def("window_sum(Tensor x, Tensor index, Tensor starts, int[] out_size) -> Tensor");
  m.def("fill_grad(Tensor x, Tensor z, Tensor index, Tensor order, Tensor starts, int num_taps) -> Tensor");
  m.def(
      "fitted_fill(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor index, Tensor kinds, "
      "int[] out_size, int activation) -> Tensor");
  m.def("isa() -> str");
  m.def("available_isas() -> str");
  m.def("level2_bytes() -> int");
  m.def("tile_formats() -> str");
  m.def("tiles_refused() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(quincunx_native, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("gather_gemm", TORCH_BOX(&gather_gemm));
  m.impl("weight_grad", TORCH_BOX(&weight_grad));
  m.impl("lookup_conv", TORCH_BOX(&lookup_conv));
  m.impl("window_max", TORCH_BOX(&window_max));
  m.impl("window_sum", TORCH_BOX(&window_sum));
  m.impl("fitted_fill", TORCH_BOX(&fitted_fill));
  m.impl("fill_grad", TORCH_BOX(&fill_grad));
}

STABLE_TORCH_LIBRARY_IMPL(quincunx_native, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("available_isas", TORCH_BOX(&available_isas));
  m.impl("level2_bytes", TORCH_BOX(&level2_bytes));
  m.impl("tile_formats", TORCH_BOX(&tile_formats));
  m.impl("tiles_refused", TORCH_BOX(&tiles_refused));
}

// Not an operator: an object that is freed may be freed within whatever mode of torch.
PyObject* drop_program(PyObject*, PyObject* number) {
  const long long value = PyLong_AsLongLong(number);
  if (value == -1 && PyErr_Occurred() != nullptr) return nullptr;
  quincunx::drop_program(value);
  // a number and not None: where a host has no Python, functions may be missing, but no data
  return PyLong_FromLong(0);
}

// importing the module registers the operators and does nothing else
PyMODINIT_FUNC PyInit__native() {
  static PyMethodDef methods[] = {{"drop_program", drop_program, METH_O, "Forget a program that was kept."},
                                  {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods,
                               nullptr,               nullptr,   nullptr, nullptr};
  return PyModule_Create(&module);
}
