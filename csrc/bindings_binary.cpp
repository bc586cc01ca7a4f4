// Convolution with one-bit weights as torch operators, through torch's stable ABI. All arguments of a
// caller are checked here, before memory is touched.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "allocate.h"
#include "checks.h"
#include "dispatch.h"
#include "schedule.h"

namespace {

using quincunx::BinaryGemm;
using quincunx::BinaryWeight;
using quincunx::empty;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// of a contiguous tensor
template <class T>
const T* values(const Tensor& t, const char* name, ScalarType type, int64_t count) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), name, " must be contiguous and on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == type, name, " must be ", torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.numel() == count, name, " must have ", count, " values, got ", t.numel());
  return static_cast<const T*>(t.data_ptr());
}

Tensor binary_pack(const Tensor& bits, int64_t channels, int64_t taps, int64_t groups) {
  STD_TORCH_CHECK(bits.dim() == 2, "bits must be [O, bytes], got ", bits.dim(), " dimensions");
  const int64_t outputs = bits.sizes()[0], row_bytes = bits.sizes()[1];
  quincunx::check_weight(outputs, channels, taps, groups);
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
  const auto sizes = x.sizes();
  const int64_t batch = sizes[0], channels = sizes[1];
  // before it is copied
  quincunx::check_map("x", batch, channels, sizes[2], sizes[3]);
  STD_TORCH_CHECK(channel_groups >= 1 && channels % channel_groups == 0, "channel_groups = ", channel_groups,
                  " must divide the channels ", channels);
  quincunx::check_weight(out_channels, channels / channel_groups, num_taps, channel_groups);
  const int64_t positions = quincunx::check_output(out_size, batch, out_channels);
  const auto& kernels = quincunx::kernels().binary;
  BinaryGemm g{};
  g.batch = batch;
  g.rows_in = sizes[2] * sizes[3];
  x = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  g.positions = positions;
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
