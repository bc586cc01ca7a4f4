// Maps as torch tensors on the CPU: arguments in channels_last, and new ones.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <vector>

#include "allocate.h"
#include "checks.h"

namespace quincunx {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t size_of(ScalarType type) {
  return type == ScalarType::Float ? 4 : type == ScalarType::Byte ? 1 : 2;
}

inline Tensor empty_map(const std::vector<int64_t>& sizes, ScalarType type,
                        MemoryFormat format = MemoryFormat::Contiguous) {
  Tensor fresh = empty(sizes, type, format);
#ifdef __linux__
  // a large map consists of new pages, and small pages would cost a fault each
  constexpr int64_t kLarge = 4 << 20, kPage = 4096;
  const int64_t bytes = fresh.numel() * size_of(type);
  if (bytes >= kLarge) {
    const uintptr_t from = (reinterpret_cast<uintptr_t>(fresh.data_ptr()) + kPage - 1) / kPage * kPage;
    madvise(reinterpret_cast<void*>(from), bytes - kPage, MADV_HUGEPAGE);
  }
#endif
  return fresh;
}

struct Map {  // [batch, channels, height, width] in channels_last
  char* data = nullptr;
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  int64_t rows() const { return height * width; }
};

inline bool is_channels_last(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (sizes[d] == 0) return true;
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// replaces the tensor by a channels_last copy if it has another format
inline Map as_map(Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions [N, C, H, W], got ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == type, name, " must be ", torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  // before it is copied
  const auto claimed = t.sizes();
  check_map(name, claimed[0], claimed[1], claimed[2], claimed[3]);
  if (!is_channels_last(t)) t = torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
  const auto sizes = t.sizes();
  return Map{static_cast<char*>(t.data_ptr()), sizes[0], sizes[1], sizes[2], sizes[3]};
}

inline ScalarType map_type(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "maps must be float32 or bfloat16, got ", torch::headeronly::toString(type));
  return type;
}

}  // namespace quincunx
