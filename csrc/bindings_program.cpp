// Program files as a torch operator, through torch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "allocate.h"
#include "checks.h"
#include "program_file.h"
#include "schedule.h"

namespace {

using quincunx::BorderMap;
using quincunx::ProgramFile;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Programs that were read, by where their bytes are and what their header says, checksum included; the last used
// first. So a network's constants are read and packed at its first call alone.
std::shared_ptr<const ProgramFile> read(const void* bytes, size_t size) {
  struct Known {
    const void* bytes;
    std::string header;
    std::shared_ptr<const ProgramFile> program;
  };
  constexpr size_t kMost = 256;
  static std::mutex lock;
  static std::list<Known> known;
  const std::string header(static_cast<const char*>(bytes), std::min(size, sizeof(quincunx::Header)));
  const std::lock_guard<std::mutex> guard(lock);
  for (auto it = known.begin(); it != known.end(); ++it) {
    if (it->bytes == bytes && it->header == header) {
      known.splice(known.begin(), known, it);
      return it->program;
    }
  }
  known.push_front(Known{bytes, header, std::make_shared<const ProgramFile>(bytes, size)});
  if (known.size() > kMost) known.pop_back();
  return known.front().program;
}

std::vector<Tensor> run_program_file(std::vector<Tensor> inputs, const Tensor& program) {
  STD_TORCH_CHECK(program.is_cpu() && program.is_contiguous() && program.dim() == 1 &&
                      program.scalar_type() == ScalarType::Byte,
                  "program must be uint8 of one dimension, contiguous and on the CPU");
  STD_TORCH_CHECK(program.numel() > 0, "program must not be empty");
  const auto file = read(program.data_ptr(), static_cast<size_t>(program.numel()));
  const auto& shapes = file->inputs();
  STD_TORCH_CHECK(inputs.size() == shapes.size(), "the program has ", shapes.size(), " inputs, got ", inputs.size());
  std::vector<BorderMap> in, out;
  int64_t batch = -1;
  for (size_t i = 0; i < shapes.size(); ++i) {
    Tensor& map = inputs[i];
    const ScalarType type = map.scalar_type();
    STD_TORCH_CHECK(map.is_cpu() && map.dim() == 4 && type == inputs[0].scalar_type() &&
                        (type == ScalarType::Float || type == ScalarType::BFloat16),
                    "input ", i, " must be a map [N, C, H, W] on the CPU in float32 or bfloat16, like all inputs");
    const auto sizes = map.sizes();
    if (i == 0) batch = sizes[0];
    STD_TORCH_CHECK(sizes[0] == batch && sizes[1] == shapes[i].channels && sizes[2] == shapes[i].height &&
                        sizes[3] == shapes[i].width,
                    "input ", i, " must be [", batch, ", ", shapes[i].channels, ", ", shapes[i].height, ", ",
                    shapes[i].width, "], got [", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ", sizes[3], "]");
    const bool planar = map.is_contiguous();
    if (!planar) map = torch::stable::contiguous(map, MemoryFormat::ChannelsLast);
    in.push_back(BorderMap{map.data_ptr(), planar, type == ScalarType::BFloat16});
  }
  std::vector<Tensor> found;
  const ScalarType type = inputs[0].scalar_type();
  for (const ProgramFile::Shape& shape : file->outputs()) {
    const bool flat = shape.rank == 2;
    const std::vector<int64_t> sizes{batch, shape.channels, shape.height, shape.width};
    found.push_back(flat ? quincunx::empty({batch, shape.channels}, type)
                         : quincunx::empty(sizes, type, MemoryFormat::ChannelsLast));
    out.push_back(BorderMap{found.back().data_ptr(), false, type == ScalarType::BFloat16});
  }
  file->run(in.data(), out.data(), batch, quincunx::torch_host());
  return found;
}

// What an exported graph calls. A tracer has no bytes to read the results' sizes from, so the graph states them.
std::vector<Tensor> run_program_sized(std::vector<Tensor> inputs, const Tensor& program, std::vector<int64_t> sizes) {
  std::vector<Tensor> found = run_program_file(std::move(inputs), program);
  std::vector<int64_t> made;
  for (const Tensor& map : found) {
    const auto shape = map.sizes();
    made.push_back(static_cast<int64_t>(shape.size()) - 1);
    made.insert(made.end(), shape.begin() + 1, shape.end());
  }
  STD_TORCH_CHECK(made == sizes, "the program's results have other sizes than the graph says");
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(quincunx_native, m) {
  m.def("run_program_file(Tensor[] inputs, Tensor program) -> Tensor[]");
  m.def("run_program_sized(Tensor[] inputs, Tensor program, int[] sizes) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(quincunx_native, CPU, m) {
  m.impl("run_program_file", TORCH_BOX(&run_program_file));
  m.impl("run_program_sized", TORCH_BOX(&run_program_sized));
}
