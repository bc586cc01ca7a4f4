// Convolution with weights of one bit as torch operators, through torch's stable ABI. What a caller can
// get wrong is checked here, before memory is touched.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "dispatch.h"
#include "schedule.h"

namespace {

using quincunx::BinaryGemm;
using quincunx::BinaryWeight;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kInt32Max = 0x7fffffff;
constexpr double kMostValues = 1e18;  // of a map or a weight, so that 64-bit offsets cannot overflow

Tensor empty(const std::vector<int64_t>& sizes, ScalarType type,
             MemoryFormat format = MemoryFormat::Contiguous) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::empty(sizes, type, std::nullopt, cpu, std::nullopt, format);
}

// of a contiguous tensor
template <class T>
const T* values(const Tensor& t, const char* name, ScalarType type, int64_t count) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), name, " must be contiguous and on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == type, name, " must be ", torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.numel() == count, name, " must have ", count, " values, got ", t.numel());
  return static_cast<const T*>(t.data_ptr());
}

void check_sizes(int64_t outputs, int64_t channels, int64_t taps, int64_t groups) {
  STD_TORCH_CHECK(outputs >= 1 && channels >= 1 && taps >= 1 && groups >= 1 && outputs % groups == 0,
                  "out_channels = ", outputs, ", channels = ", channels, ", taps = ", taps, " and groups = ",
                  groups, " must be positive, and groups divide out_channels");
  STD_TORCH_CHECK(outputs <= kInt32Max && channels <= kInt32Max && taps <= kInt32Max &&
                      double(channels + 64) * (outputs + 64.0 * groups) * taps < kMostValues,
                  "the weight is too large");
}

Tensor binary_pack(const Tensor& bits, int64_t channels, int64_t taps, int64_t groups) {
  STD_TORCH_CHECK(bits.dim() == 2, "bits must be [O, bytes], got ", bits.dim(), " dimensions");
  const int64_t outputs = bits.sizes()[0], row_bytes = bits.sizes()[1];
  check_sizes(outputs, channels, taps, groups);
  STD_TORCH_CHECK(row_bytes == (channels * taps + 7) / 8, "bits must have ", (channels * taps + 7) / 8,
                  " bytes a row, got ", row_bytes);
  const uint8_t* data = values<uint8_t>(bits, "bits", ScalarType::Byte, outputs * row_bytes);
  const BinaryWeight w{data, row_bytes, groups, outputs / groups, channels, taps};
  const auto& kernels = quincunx::kernels().binary;
  Tensor packed = empty({kernels.packed_words(outputs, channels, taps, groups)}, ScalarType::Int);
  kernels.pack(&w, static_cast<uint32_t*>(packed.data_ptr()));
  return packed;
}

Tensor binary_gemm(Tensor x, const Tensor& packed, std::optional<Tensor> scale, std::optional<Tensor> bias,
                   const Tensor& index, std::vector<int64_t> out_size, int64_t out_channels, int64_t num_taps,
                   int64_t channel_groups) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.scalar_type() == ScalarType::Float,
                  "x must be a float32 map [N, C, H, W] on the CPU");
  x = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  const auto sizes = x.sizes();
  const int64_t batch = sizes[0], channels = sizes[1];
  STD_TORCH_CHECK(channel_groups >= 1 && channels % channel_groups == 0, "channel_groups = ", channel_groups,
                  " must divide the channels ", channels);
  check_sizes(out_channels, channels / channel_groups, num_taps, channel_groups);
  STD_TORCH_CHECK(channels <= kInt32Max && sizes[2] * sizes[3] <= kInt32Max, "x is too large");
  STD_TORCH_CHECK(out_size.size() == 2 && out_size[0] >= 0 && out_size[1] >= 0 && out_size[0] <= kInt32Max &&
                      out_size[1] <= kInt32Max && out_size[0] * out_size[1] <= kInt32Max,
                  "out_size must be (height, width)");
  const auto& kernels = quincunx::kernels().binary;
  BinaryGemm g{};
  g.batch = batch;
  g.rows_in = sizes[2] * sizes[3];
  g.positions = out_size[0] * out_size[1];
  g.in_channels = static_cast<int32_t>(channels);
  g.out_channels = static_cast<int32_t>(out_channels);
  g.channel_groups = static_cast<int32_t>(channel_groups);
  g.num_taps = static_cast<int32_t>(num_taps);
  g.x = static_cast<const float*>(x.data_ptr());
  const int64_t per_group = channels / channel_groups;
  const int64_t words = kernels.packed_words(out_channels, per_group, num_taps, channel_groups);
  g.packed = values<uint32_t>(packed, "packed weight", ScalarType::Int, words);
  if (scale) g.scale = values<float>(*scale, "scale", ScalarType::Float, out_channels);
  if (bias) g.bias = values<float>(*bias, "bias", ScalarType::Float, out_channels);
  g.index = values<int32_t>(index, "index", ScalarType::Int, g.positions * num_taps);
  int32_t low, high;
  quincunx::kernels().extremes(g.index, g.positions * num_taps, &low, &high);
  // a map without rows has nothing to read, not even row 0
  STD_TORCH_CHECK(g.positions == 0 || (low >= -1 && high < g.rows_in), "index must lie in [-1, ", g.rows_in,
                  "), got values from ", low, " to ", high);
  const std::vector<int64_t> shape{batch, out_channels, out_size[0], out_size[1]};
  Tensor out = empty(shape, ScalarType::Float, MemoryFormat::ChannelsLast);
  if (out.numel() == 0) return out;
  g.out = static_cast<float*>(out.data_ptr());
  g.window = kernels.window(&g);
  const int64_t floats = kernels.scratch_floats(&g);
  const int64_t parts = kernels.parts(&g, torch::stable::get_num_threads());
  const Tensor scratch = empty({parts * floats}, ScalarType::Float);
  float* own = static_cast<float*>(scratch.data_ptr());
  quincunx::parallel(parts, [&](int64_t part) { kernels.run(&g, own + part * floats, part, parts); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(quincunx_native, m) {
  m.def("binary_pack(Tensor bits, int channels, int taps, int groups) -> Tensor");
  m.def(
      "binary_gemm(Tensor x, Tensor packed, Tensor? scale, Tensor? bias, Tensor index, int[] out_size, "
      "int out_channels, int num_taps, int channel_groups) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(quincunx_native, CPU, m) {
  m.impl("binary_pack", TORCH_BOX(&binary_pack));
  m.impl("binary_gemm", TORCH_BOX(&binary_gemm));
}
