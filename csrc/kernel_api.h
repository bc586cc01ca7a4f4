// The interface between the kernels and everything else: plain structs and one table of functions per
// instruction set. It uses neither torch nor functions of the standard library (see gather_gemm.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace quincunx {

// The same numbers as in fusion/epilogues.py. The first three are applied where the sums are.
enum Activation : int32_t {
  kNone, kRelu, kRelu6, kLeaky, kHardsigmoid, kHardswish, kSigmoid, kSilu, kGelu, kGeluTanh, kActivations
};

// What the numbers of a map are: uint8 q stands for scale (q - zero).
enum MapType : int32_t { kFloat32, kBfloat16, kUint8, kMapTypes };
struct MapGrid {
  int32_t type, zero;
  float scale;
};

// The maps of a step in eight bits. All but a pointwise step read uint8; other maps may be of any type.
struct Quantised {
  MapGrid x, residual, out, out2;
  const float* multiplier;  // [out_channels]: the scale of x times that of the channel's weights
};

// out[n, rows[p], o] = act(sum over t, c of x[n, index[p, t], c] W[o, c, taps[t]] + bias[o] + residual)
// out2 = max(out * scale2 + shift2, low2)
// Maps are rows of channels: [batch, rows, channels]. An index of -1 reads zeros. Either of out and
// out2 may be null, and either may lie exactly on the residual.
// Without a weight: out[n, rows[p], c] = the mean over t of x[n, index[p, t], c], over the existing rows.
// Then there is one group with every tap, as many output as input channels, and nothing else to add.
struct GatherGemm {
  const void* x;       // [batch, rows_in, in_channels]
  const void* weight;  // packed, or null
  const float* bias;   // [out_channels] or null
  const void* residual;  // [batch, residual_size, residual_channels] or null
  const int32_t* residual_rows;  // [rows_out]: the residual's row for each output row; null: the same row
  const float* scale2;
  const float* shift2;
  float low2;             // 0 for ReLU, minus infinity for no activation
  const float* slope;     // [out_channels], of kLeaky: what negative values are multiplied by
  const int32_t* index;   // group after group, [positions, taps]
  const int32_t* rows;    // group after group, [positions]
  const int32_t* taps;    // group after group, [taps]
  const int32_t* groups;  // [num_groups, 2]: positions, taps
  const int32_t* shifts;  // the same as lines (ops/shifts.py), or null; for kernels that gain from it
  void* out;   // [batch, rows_out, out_channels]
  void* out2;
  int64_t batch, rows_in, rows_out, residual_size;
  int32_t in_channels, out_channels, channel_groups, num_taps, num_groups;
  int32_t residual_channels;  // at most out_channels; the channels beyond add nothing
  int32_t activation;
  const Quantised* quantised;  // of the kernels in eight bits
};

// What a table of shifts may have at most, and how many numbers it begins with: classes, slots, slots from one output to
// the next.
constexpr int64_t kMostShiftClasses = 32, kMostShiftTaps = 64, kShiftHead = 3;

// [groups, out_channels / groups, channels, taps] with any strides, counted in elements
struct Weight {
  const void* data;
  int64_t groups, outputs, channels, taps;  // outputs and channels: of one group
  int64_t group_stride, output_stride, channel_stride, tap_stride;
  // channel c is at c / inner * channel_stride + c % inner * inner_stride
  int64_t inner = 1, inner_stride = 0;
  bool wide = false;  // float32 where the maps are bfloat16: rounded while it is packed
};

// grad[o, c, t] = sum over n, p of gy[n, p, o] x[n, index[p, t], c]
struct WeightGrad {
  const void* x;   // [batch, rows_in, in_channels]
  const void* gy;  // [batch, positions, out_channels]
  const int32_t* index;  // [positions, num_taps]
  float* grad;  // [out_channels, in_channels / channel_groups, num_taps], or with taps before channels
  float* partial;  // partial_floats() of them
  int64_t batch, rows_in, positions;
  int32_t in_channels, out_channels, channel_groups, num_taps;
  bool bf16;  // x and gy are bfloat16, else float32
  bool channels_last;  // of grad
};

// out[n, rows[q], o] = bias[o] + sum over taps t and subspaces m of
//     <codebooks[m, assignments[m, t, o]], x[n, slots[offsets[t] + q], m * width ...]>
// for each channel group with its own channels and subspaces. A slot of -1, or beyond the last one, reads
// zeros, and so do the channels that the last subspace lacks; a position whose row is -1 is not written.
struct LookupConv {
  const float* x;           // [batch, rows_in, in_channels]
  const float* codebooks;   // [channel_groups * subspaces, codewords, width]
  const void* assignments;  // [channel_groups * subspaces, num_taps, out_channels / channel_groups]
  const float* bias;        // [out_channels] or null
  const int32_t* slots;     // [num_slots]: input rows
  const int32_t* offsets;   // [num_taps]
  const int32_t* order;     // [num_taps]: the taps by ascending offset
  const int32_t* rows;      // [positions]: output rows
  float* out;               // [batch, rows_out, out_channels]
  float* scratch;           // scratch_floats() of them for each part
  int64_t batch, rows_in, rows_out, num_slots, positions;
  int32_t in_channels, out_channels, channel_groups, subspaces, codewords, width, num_taps;
  bool wide;  // assignments are int16, else uint8
};

// The numbers of parts of a gather GEMM along its outputs and its positions. The results do not
// depend on them.
struct Cut {
  int64_t outputs, positions;
};

// Bytes of one core's second-level cache, read once; QUINCUNX_L2 says otherwise.
int64_t level2_bytes();

// Parts may run in any order and at the same time.
struct ForwardKernels {
  bool packs_bf16;  // packed weights are bfloat16, else float32
  int64_t (*packed_size)(int64_t out_channels, int64_t channels_per_group, int64_t taps, int64_t groups);
  void (*pack)(const Weight*, void* packed, int64_t part, int64_t parts);
  Cut (*cut)(const GatherGemm*, int64_t threads);
  void (*run)(const GatherGemm*, Cut, int64_t part);
};

// The same on maps in eight bits (int8_gemm.h): sizes of packed weights are bytes. A maximum is that of bytes.
struct Windows;
struct Int8Kernels {
  ForwardKernels forward;
  void (*max)(const Windows*, int64_t part, int64_t parts);
  void (*pointwise)(const GatherGemm*, int64_t part, int64_t parts);  // x, scale2, shift2, residual, activation
  // FittedFill with an epilogue, rows being its kinds; its weights are multiplied by the scale of x
  void (*fill)(const GatherGemm*, int64_t part, int64_t parts);
};

// The gradient depends on the number of parts only in its rounding.
struct GradKernels {
  int64_t (*least_part)(const WeightGrad*);  // multiply-adds that pay for another thread
  int64_t (*partial_floats)(const WeightGrad*, int64_t parts);
  void (*run)(const WeightGrad*, int64_t part, int64_t parts);
  // after every part of run: adds the partial sums in a fixed order and writes grad
  void (*finish)(const WeightGrad*, int64_t part, int64_t parts, int64_t run_parts);
};

// The sums do not depend on the number of parts.
struct LookupKernels {
  int64_t (*scratch_floats)(const LookupConv*, int64_t parts);
  void (*run)(const LookupConv*, int64_t part, int64_t parts);
};

// one-bit weights, 1 for +1 and 0 for -1: bit (c taps + t) % 8 of byte (c taps + t) / 8 of an output's row
struct BinaryWeight {
  const uint8_t* bits;  // [groups outputs, row_bytes]
  int64_t row_bytes, groups, outputs, channels, taps;  // outputs and channels: of one group
};

// out[n, p, o] = scale[o] * sum over t, c of x[n, index[p, t], c] W[o, c, t] + bias[o], W being +1 and -1
struct BinaryGemm {
  const float* x;          // [batch, rows_in, in_channels]
  const uint32_t* packed;
  const float* scale;      // [out_channels] or null
  const float* bias;       // [out_channels] or null
  const int32_t* index;    // [positions, num_taps], -1 reads zeros
  float* out;              // [batch, positions, out_channels]
  int64_t batch, rows_in, positions;
  int64_t window;          // of BinaryKernels
  int32_t in_channels, out_channels, channel_groups, num_taps;
};

// Parts may run in any order and at the same time, each with its own scratch. The outputs do not
// depend on their number.
struct BinaryKernels {
  int64_t (*packed_words)(int64_t out_channels, int64_t channels_per_group, int64_t taps, int64_t groups);
  void (*pack)(const BinaryWeight*, uint32_t* packed);
  int64_t (*window)(const BinaryGemm*);  // determines the scratch size
  int64_t (*scratch_floats)(const BinaryGemm*);
  int64_t (*parts)(const BinaryGemm*, int64_t threads);
  void (*run)(const BinaryGemm*, float* scratch, int64_t part, int64_t parts);
};

// out[n, p, c] = max or sum over e in [starts[p], starts[p + 1]) of x[n, index[e], c]; of no rows -infinity, -0
struct Windows {
  const void* x;          // [batch, rows_in, channels]
  const int32_t* index;   // input rows
  const int32_t* starts;  // [positions + 1]
  void* out;              // [batch, positions, channels]
  int64_t batch, rows_in, positions, channels;
};

// Parts may run in any order and at the same time.
struct WindowKernels {
  void (*f32)(const Windows*, int64_t part, int64_t parts);
  void (*bf16)(const Windows*, int64_t part, int64_t parts);
};

// out[n, p, c] = act(v + residual[n, p, c]), where v is x[n, index[p, 0], c] if kinds[p] < 0 (a computed position),
// else bias[kinds[p], c] + sum over t of weight[kinds[p], t, c] x[n, index[p, t], c]. An index of -1 adds nothing.
struct FittedFill {
  const void* x;         // [batch, rows_in, channels]
  const float* weight;   // [kinds, num_taps, channels]
  const float* bias;     // [kinds, channels] or null
  const void* residual;  // [batch, positions, channels] or null
  const int32_t* index;  // [positions, at least 1 and num_taps]
  const int32_t* kinds;  // [positions]
  void* out;             // [batch, positions, channels]
  int64_t batch, rows_in, positions, channels, num_taps;
  int32_t activation;
};

// The derivative of a fitted fill by its weight: partial[s, k, t, c] = sum of x[n, index[p, t], c] z[n, p, c] over the
// share s of all images n and positions p of kind k. An index of -1 adds nothing.
struct FillGrad {
  const void* x;          // [batch, rows_in, channels]
  const void* z;          // [batch, positions, channels]
  const int32_t* index;   // [positions, at least 1 and num_taps]
  const int32_t* order;   // positions of the first kind, then of the next one
  const int32_t* starts;  // [kinds + 1], where each kind begins in order
  float* partial;         // [shares, kinds, num_taps, channels]
  int64_t batch, rows_in, positions, channels, num_taps, kinds, shares;
};

// Parts may run in any order and at the same time.
struct FillKernels {
  void (*f32)(const FittedFill*, int64_t part, int64_t parts);
  void (*bf16)(const FittedFill*, int64_t part, int64_t parts);
  void (*grad_f32)(const FillGrad*, int64_t part, int64_t parts);
  void (*grad_bf16)(const FillGrad*, int64_t part, int64_t parts);
};

// out[r, c] = act(x[r, c] scale[c] + shift[c] + residual[r, c])
struct Pointwise {
  const void* x;         // [rows, channels]
  const float* scale;    // [channels] or null
  const float* shift;    // [channels] or null
  const float* slope;    // [channels], of kLeaky
  const void* residual;  // [rows, residual_channels] or null; the channels beyond add nothing
  void* out;             // [rows, channels]
  int64_t rows, channels, residual_channels;
  int32_t activation;
};

// Parts may run in any order and at the same time.
struct PointwiseKernels {
  void (*f32)(const Pointwise*, int64_t part, int64_t parts);
  void (*bf16)(const Pointwise*, int64_t part, int64_t parts);
};

// Batch norm of a training step: y = act((x - mean) scale + shift + residual) for rows of channels, scale being
// weight / sqrt(variance + eps), and its gradient, d being grad where the activation is not constant:
// d scale + (x - mean) slope + offset. Sums are made chunk by chunk, so that they do not depend on the parts.
struct NormAct {
  const void* x;         // [rows, channels], as all maps here
  const void* residual;  // of apply: the shortcut, or null; of return_grad: a gradient to be added, or null
  const void* grad;      // of y
  const void* y;         // where there is `joined`
  void* joined;          // d, or null: then what the activation let pass is computed again from x
  void* out;
  const float *mean, *scale, *shift, *slope, *offset;  // [channels]
  float* partial;        // [chunks, 2, channels]: see each kernel
  int64_t rows, channels, chunk;  // chunk: rows of one
  int32_t activation;    // none, ReLU or ReLU6
};

// Parts may run in any order and at the same time.
struct NormKernels {
  void (*sums)(const NormAct*, int64_t part, int64_t parts);    // partial: mean, sum of squares around it
  void (*apply)(const NormAct*, int64_t part, int64_t parts);   // out: y
  void (*reduce)(const NormAct*, int64_t part, int64_t parts);  // partial: sums of d and d (x - mean); joined: d
  void (*return_grad)(const NormAct*, int64_t part, int64_t parts);  // out: the gradient of x
};

// A map that enters or leaves a program: each image [rows, columns], turned to [columns, rows] where asked for.
struct Border {
  const void* from;
  void* to;
  int64_t batch, rows, columns;
  bool turn, from_bf16, to_bf16;  // else float32
};

struct Kernels {
  ForwardKernels f32;
  ForwardKernels bf16;
  GradKernels grad;
  LookupKernels lookup;
  // the least and greatest of the values and 0
  void (*extremes)(const int32_t* values, int64_t count, int32_t* low, int32_t* high);
  BinaryKernels binary;
  WindowKernels max;
  WindowKernels sum;
  FillKernels fill;
  PointwiseKernels pointwise;
  void (*cross_border)(const Border*, int64_t part, int64_t parts);
  NormKernels norm_f32;
  NormKernels norm_bf16;
  // set by dispatch.cpp, from files of its own
  Int8Kernels int8;
};

}  // namespace quincunx
