// Weights of programs in eight bits as a torch operator, through torch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>

#include "allocate.h"
#include "checks.h"
#include "dispatch.h"
#include "schedule.h"

namespace {

using quincunx::ForwardKernels;
using quincunx::kInt32Max;
using quincunx::Weight;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(quincunx_native, m) {
  m.def("pack_int8(Tensor weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(quincunx_native, CPU, m) {
  m.impl("pack_int8", TORCH_BOX(&pack_int8));
}
