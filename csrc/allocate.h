// New tensors on the CPU; without memory for one, the error says how much was requested.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <exception>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace quincunx {

inline torch::stable::Tensor empty(
    const std::vector<int64_t>& sizes, torch::headeronly::ScalarType type,
    torch::headeronly::MemoryFormat format = torch::headeronly::MemoryFormat::Contiguous) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  try {
    return torch::stable::empty(sizes, type, std::nullopt, cpu, std::nullopt, format);
  } catch (const std::exception&) {
    // torch's own reason is lost in its stable ABI
    std::ostringstream sentence;
    sentence << "cannot allocate memory for " << torch::headeronly::toString(type) << " [";
    for (size_t i = 0; i < sizes.size(); ++i) sentence << (i > 0 ? ", " : "") << sizes[i];
    sentence << "]";
    throw std::runtime_error(sentence.str());
  }
}

}  // namespace quincunx
