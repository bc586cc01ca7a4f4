// The border between the kernels and everything else: plain structs and one table of functions per
// instruction set. Torch-free, and free of the standard library's functions (see gather_gemm.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace quincunx {

enum Activation : int32_t { kNone = 0, kRelu = 1, kRelu6 = 2 };

// out[n, rows[p], o] = act(sum over t, c of x[n, index[p, t], c] W[o, c, taps[t]] + bias[o] + residual)
// out2 = relu(out * scale2 + shift2), where out2 is not null
// Maps are rows of channels: [batch, rows, channels]. An index of -1 reads zeros.
struct GatherGemm {
  const void* x;       // [batch, rows_in, in_channels] in the kernel's input type
  const void* weight;  // packed
  const float* bias;   // [out_channels] or null
  const void* residual;  // like out, or null
  const float* scale2;
  const float* shift2;
  const int32_t* index;   // group after group, [positions, taps]
  const int32_t* rows;    // group after group, [positions]
  const int32_t* taps;    // group after group, [taps]
  const int32_t* groups;  // [num_groups, 2]: positions, taps
  void* out;   // [batch, rows_out, out_channels] in the kernel's output type
  void* out2;  // like out, or null
  int64_t batch, rows_in, rows_out;
  int32_t in_channels, out_channels, channel_groups, num_taps, num_groups;
  int32_t activation;
};

// grad[o, c, t] = sum over n, p of gy[n, p, o] x[n, index[p, t], c]
struct WeightGrad {
  const float* x;   // [batch, rows_in, in_channels]
  const float* gy;  // [batch, positions, out_channels]
  const int32_t* index;  // [positions, num_taps]
  float* grad;  // [out_channels, in_channels / channel_groups, num_taps]
  float* partial;  // partial_floats() of them
  int64_t batch, rows_in, positions;
  int32_t in_channels, out_channels, channel_groups, num_taps;
};

// A call is cut in `parts`, which may run in any order and at the same time; a part needs its own
// scratch, 64-byte aligned. Results do not depend on the number of parts, except weight_grad's.
struct ForwardKernels {
  int64_t (*packed_size)(int64_t out_channels, int64_t channels_per_group, int64_t taps, int64_t groups);
  // weight [O, C / groups, taps]
  void (*pack)(const void* weight, void* packed, int64_t out_channels, int64_t channels_per_group,
               int64_t taps, int64_t groups, int64_t part, int64_t parts);
  int64_t (*scratch_bytes)(const GatherGemm*);
  void (*run)(const GatherGemm*, int64_t part, int64_t parts, void* scratch);
};

struct GradKernels {
  int64_t (*partial_floats)(const WeightGrad*, int64_t parts);
  int64_t (*scratch_bytes)(const WeightGrad*);
  void (*run)(const WeightGrad*, int64_t part, int64_t parts, void* scratch);
  // after every part of run: adds the partial sums in a fixed order and writes grad
  void (*finish)(const WeightGrad*, int64_t part, int64_t parts, int64_t run_parts);
};

struct Kernels {
  ForwardKernels f32;
  ForwardKernels bf16;  // stores bfloat16; reads bfloat16 if bf16_native, else x widened to float32
  bool bf16_native;
  GradKernels grad;
  void (*widen)(const uint16_t* from, float* to, int64_t count);  // bfloat16 to float32
};

}  // namespace quincunx
