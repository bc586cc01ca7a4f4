// Batch norm with a shortcut and an activation as torch operators, through torch's stable ABI. All arguments of a
// caller are checked here, before memory is touched.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "maps.h"
#include "norm_sums.h"
#include "schedule.h"

namespace {

using quincunx::as_map;
using quincunx::ChannelSums;
using quincunx::Map;
using quincunx::NormAct;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLeastWork = 50000;  // values of a map that pay for another thread

// One number a channel, float32.
const float* channels_of(const Tensor& t, const char* name, int64_t count) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == ScalarType::Float && t.numel() == count, name,
                  " must be ", count, " contiguous float32 numbers on the CPU");
  return static_cast<const float*>(t.data_ptr());
}

// A pass over maps of one shape; holds the numbers of the channels.
class Pass {
 public:
  Pass(Tensor& x, double eps, int64_t activation) : type_(quincunx::map_type(x)), map_(as_map(x, "x", type_)) {
    STD_TORCH_CHECK(activation == quincunx::kNone || activation == quincunx::kRelu || activation == quincunx::kRelu6,
                    "activation must be 0, 1 or 2, got ", activation);
    STD_TORCH_CHECK(map_.batch * map_.rows() > 0 && map_.channels > 0, "x must not be empty");
    eps_ = eps;
    problem.activation = static_cast<int32_t>(activation);
    problem.x = map_.data;
    problem.rows = map_.batch * map_.rows();
    problem.channels = map_.channels;
    problem.chunk = quincunx::norm_chunk(map_.channels);
    for (auto* numbers : {&mean_, &scale_, &shift_, &slope_, &offset_}) numbers->resize(map_.channels);
    problem.mean = mean_.data();
    problem.scale = scale_.data();
    problem.shift = shift_.data();
    problem.slope = slope_.data();
    problem.offset = offset_.data();
    partial_.resize(2 * quincunx::norm_chunks(problem) * map_.channels);
    problem.partial = partial_.data();
  }

  const void* same(Tensor& t, const char* name) const {
    const Map other = as_map(t, name, type_);
    STD_TORCH_CHECK(other.batch == map_.batch && other.channels == map_.channels && other.height == map_.height &&
                        other.width == map_.width,
                    name, " must have the shape of x");
    return other.data;
  }

  Tensor fresh() const {
    return quincunx::empty_map({map_.batch, map_.channels, map_.height, map_.width}, type_, MemoryFormat::ChannelsLast);
  }

  Tensor numbers() const { return quincunx::empty({map_.channels}, ScalarType::Float); }

  void set(int64_t c, double mean, double variance, const float* weight, const float* bias) {
    mean_[c] = static_cast<float>(mean);
    scale_[c] = static_cast<float>((weight ? weight[c] : 1.0) / std::sqrt(variance + eps_));
    shift_[c] = bias ? bias[c] : 0.0f;
  }

  void set_return(int64_t c, double variance, double sum, double product) {
    const double rows = static_cast<double>(problem.rows);
    slope_[c] = static_cast<float>(-scale_[c] * product / rows / (variance + eps_));
    offset_[c] = static_cast<float>(-scale_[c] * sum / rows);
  }

  double deviation(double variance) const { return std::sqrt(variance + eps_); }

  template <class F>
  void run(F quincunx::NormKernels::*kernel) const {
    const auto& all = quincunx::kernels();
    const auto function = (type_ == ScalarType::Float ? all.norm_f32 : all.norm_bf16).*kernel;
    const int64_t parts = quincunx::parts_for(problem.rows * problem.channels, kLeastWork);
    quincunx::parallel(parts, [&](int64_t part) { function(&problem, part, parts); });
  }

  NormAct problem{};

 private:
  ScalarType type_;
  Map map_;
  double eps_ = 0;
  std::vector<float> mean_, scale_, shift_, slope_, offset_, partial_;
};

std::tuple<Tensor, Tensor, Tensor> norm_act(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                            std::optional<Tensor> residual, double eps, int64_t activation) {
  Pass pass(x, eps, activation);
  NormAct& g = pass.problem;
  const float* scales = weight ? channels_of(*weight, "weight", g.channels) : nullptr;
  const float* shifts = bias ? channels_of(*bias, "bias", g.channels) : nullptr;
  if (residual) g.residual = pass.same(*residual, "residual");
  Tensor y = pass.fresh(), mean = pass.numbers(), variance = pass.numbers();
  g.out = y.data_ptr();
  pass.run(&quincunx::NormKernels::sums);
  const ChannelSums moments = quincunx::join_moments(g);
  for (int64_t c = 0; c < g.channels; ++c) {
    static_cast<float*>(mean.data_ptr())[c] = static_cast<float>(moments.first[c]);
    static_cast<float*>(variance.data_ptr())[c] = static_cast<float>(moments.second[c]);
    pass.set(c, moments.first[c], moments.second[c], scales, shifts);
  }
  pass.run(&quincunx::NormKernels::apply);
  return {y, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_backward(Tensor grad, Tensor x, std::optional<Tensor> y,
                                                             const Tensor& mean, const Tensor& variance,
                                                             std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                             std::optional<Tensor> other, double eps,
                                                             int64_t activation) {
  Pass pass(x, eps, activation);
  NormAct& g = pass.problem;
  const float* scales = weight ? channels_of(*weight, "weight", g.channels) : nullptr;
  const float* shifts = bias ? channels_of(*bias, "bias", g.channels) : nullptr;
  const float* means = channels_of(mean, "mean", g.channels);
  const float* variances = channels_of(variance, "variance", g.channels);
  g.grad = pass.same(grad, "grad");
  Tensor joined = y ? pass.fresh() : quincunx::empty({0}, quincunx::map_type(x));
  if (y) {
    g.y = pass.same(*y, "y");
    g.joined = joined.data_ptr();
  }
  for (int64_t c = 0; c < g.channels; ++c) pass.set(c, means[c], variances[c], scales, shifts);
  pass.run(&quincunx::NormKernels::reduce);
  const ChannelSums sums = quincunx::join_sums(g);
  Tensor to_weight = pass.numbers(), to_bias = pass.numbers(), to_x = pass.fresh();
  for (int64_t c = 0; c < g.channels; ++c) {
    static_cast<float*>(to_bias.data_ptr())[c] = static_cast<float>(sums.first[c]);
    static_cast<float*>(to_weight.data_ptr())[c] = static_cast<float>(sums.second[c] / pass.deviation(variances[c]));
    pass.set_return(c, variances[c], sums.first[c], sums.second[c]);
  }
  if (other) g.residual = pass.same(*other, "other");
  g.out = to_x.data_ptr();
  pass.run(&quincunx::NormKernels::return_grad);
  return {to_x, to_weight, to_bias, joined};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(quincunx_native, m) {
  m.def(
      "norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, int activation) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "norm_act_backward(Tensor grad, Tensor x, Tensor? y, Tensor mean, Tensor variance, Tensor? weight, Tensor? bias, "
      "Tensor? other, float eps, int activation) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(quincunx_native, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward));
}
