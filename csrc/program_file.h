// A fused program as bytes, and the program that was read from them. Torch-free.
//
// The bytes, all numbers little-endian:
//   header     64 bytes, Header below
//   interface  an int64 for each output: its rank, 4 for [N, C, H, W], 2 for [N, C] of a map of one position
//   maps       kBufferFields int64 each: first the inputs, then the others; outputs in their order
//   steps      kStepFields int64 each
//   grids      of an even version: GridEntry below for each map, whose offsets are bytes then
//   factors    of an even version: for each step the number of the tensor of its multipliers as an int64, -1 for none
//   tensors    Entry below each
//   data       at multiples of 64; tables int32, float32, weights [groups, O / groups, C / groups, taps] in the
//              program's type or int8 and unpacked, so that any processor packs them as its kernels want
// An odd version is a program in one type of real numbers. An even one has maps and steps in eight bits too: a step is in
// eight bits where one of its maps is not of the program's type (int8_program.h). Versions 5 and 6 are written. Steps of
// 3 and 4 lack the last field, the activation of the second output, which was ReLU, and their tables of shifts, which are
// another way to say what the others do, are not used; those of 1 and 2 also lack the field of these tables.
// Nothing in it depends on the batch, the number of threads or the instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "program.h"
#include "runner.h"

namespace quincunx {

constexpr char kMagic[8] = {'Q', 'U', 'I', 'N', 'C', 'U', 'N', 'X'};
constexpr uint32_t kFileVersion = 5, kInt8FileVersion = 6;

// Whether a version has eight bits, and how many fields of kStepFields its steps have.
constexpr bool has_int8(uint32_t version) { return version % 2 == 0; }
constexpr int64_t step_fields(uint32_t version) { return kStepFields - (kInt8FileVersion - version) / 2; }

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t dtype;  // of weights and maps that are not in eight bits: 0 float32, 1 bfloat16
  uint32_t inputs, outputs, maps, steps, tensors;
  uint32_t reserved;  // 0
  uint64_t size;      // of all bytes
  char zeros[12];
  uint32_t checksum;  // CRC-32 as zlib has it, of all other bytes
};
static_assert(sizeof(Header) == 64, "no gaps");

struct GridEntry {
  int32_t type, zero;  // MapType
  float scale;
  uint32_t reserved;  // 0
};
static_assert(sizeof(GridEntry) == 16, "no gaps");

enum TensorKind : uint32_t { kTable, kFloats, kWeights, kInt8Weights, kTensorKinds };

struct Entry {
  uint32_t kind, reserved;  // 0
  int64_t sizes[4];         // unused ones at the end are 1
  int64_t offset;
};
static_assert(sizeof(Entry) == 48, "no gaps");

// Memory for maps and weights, on large pages where there is much of it.
class Memory {
 public:
  Memory() = default;
  // Throws std::runtime_error, which says how much was requested.
  explicit Memory(int64_t bytes);
  Memory(Memory&& other) noexcept { *this = static_cast<Memory&&>(other); }
  Memory& operator=(Memory&& other) noexcept;
  ~Memory();
  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

// A map of the caller: [N, C, H, W] with the channels outside (planar) or inside, in float32 or bfloat16.
struct BorderMap {
  void* data = nullptr;
  bool planar = true;
  bool bf16 = false;
};

class ProgramFile {
 public:
  struct Shape {
    int64_t channels, height, width, rank;
  };

  // Checks every byte that is used and packs the weights; the bytes are not needed afterwards.
  // Throws std::runtime_error of one sentence.
  ProgramFile(const void* bytes, size_t size);

  bool bf16() const { return bf16_; }
  const std::vector<Shape>& inputs() const { return inputs_; }
  const std::vector<Shape>& outputs() const { return outputs_; }
  // held for as long as the program, without the scratch memory of calls
  int64_t memory() const;

  // Any number of threads may call this at the same time. Outputs overlap neither each other nor inputs.
  void run(const BorderMap* inputs, const BorderMap* outputs, int64_t batch, const Host& host) const;

 private:
  class FileOperands;
  Memory take(int64_t bytes) const;
  void give(Memory memory) const;

  bool bf16_ = false;  // the type of steps that are not in eight bits
  std::vector<Call> calls_;
  std::vector<Quantised> quantised_;  // of the steps in eight bits
  std::vector<Place> places_;
  std::vector<int64_t> rows_, channels_;  // of the maps
  std::vector<char> halves_;  // whether a map is bfloat16
  std::vector<size_t> output_maps_;
  int64_t arena_ = 0;   // bytes per image
  int64_t largest_ = 0;  // values per image of the largest map, and units of the arena
  Memory tables_;
  std::vector<Memory> packed_;
  std::vector<Shape> inputs_, outputs_;
  mutable std::mutex lock_;
  mutable std::vector<Memory> spare_;  // of earlier calls
};

// As zlib's crc32, so that Python writes it with its own.
uint32_t crc32(uint32_t before, const void* data, size_t size);

}  // namespace quincunx
