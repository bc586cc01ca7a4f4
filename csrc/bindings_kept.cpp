// Fused programs as torch operators, through torch's stable ABI. A program is checked when it is kept and has its own
// copies of all tables, so that its calls are made of little more than their arithmetic.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "checks.h"
#include "dispatch.h"
#include "int8_program.h"
#include "kept.h"
#include "maps.h"
#include "program_file.h"
#include "schedule.h"

namespace {

using quincunx::Border;
using quincunx::Engine;
using quincunx::Flow;
using quincunx::ForwardKernels;
using quincunx::Layout;
using quincunx::MapGrid;
using quincunx::Memory;
using quincunx::Place;
using quincunx::Table;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLine = 64;  // bytes

ScalarType type_of(const MapGrid& grid) {
  return grid.type == quincunx::kFloat32    ? ScalarType::Float
         : grid.type == quincunx::kBfloat16 ? ScalarType::BFloat16
                                            : ScalarType::Byte;
}

// the values of a contiguous tensor
const void* values_of(const Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), name, " must be contiguous and on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == type, name, " must be ", torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  return t.data_ptr();
}

int64_t storage_bytes(const Tensor& t) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  return bytes;
}

// A map [N, C, H, W] in channels_last. A small one is made without torch's dispatcher, which takes longer than a small
// convolution.
Tensor new_map(int64_t batch, const Layout::Size& size, ScalarType type) {
  const std::vector<int64_t> sizes{batch, size.channels, size.height, size.width};
  constexpr int64_t kSmall = 1 << 20;
  if (batch * size.values() <= kSmall) {
    const int64_t row = size.width * size.channels;
    const int64_t strides[] = {size.height * row, 1, row, size.channels};
    const int32_t code = type == ScalarType::Float      ? aoti_torch_dtype_float32()
                         : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                        : aoti_torch_dtype_uint8();
    AtenTensorHandle fresh;
    if (aoti_torch_empty_strided(4, sizes.data(), strides, code, aoti_torch_device_type_cpu(), 0, &fresh) == 0) {
      return Tensor(fresh);
    }
  }
  return quincunx::empty_map(sizes, type, MemoryFormat::ChannelsLast);
}

Tensor new_bytes(int64_t bytes) { return new_map(1, Layout::Size{0, bytes, 1, 1, 0}, ScalarType::Byte); }

// What programs in eight bits have besides: grids of all maps, and for each step the number of its multipliers or -1.
struct EightBits {
  std::vector<MapGrid> grids;
  std::vector<int64_t> multipliers;
};

class Program {
 public:
  // `bf16`: the type of all maps without `eight`. Throws std::runtime_error of one sentence.
  Program(const std::vector<Tensor>& tensors, const std::vector<int64_t>& buffers, const std::vector<int64_t>& code,
          bool bf16, const EightBits* eight)
      : engine_{quincunx::kernels(), bf16} {
    constexpr int64_t kBuffer = quincunx::kBufferFields, kStep = quincunx::kStepFields;
    STD_TORCH_CHECK(buffers.size() % kBuffer == 0, "buffers must have ", kBuffer, " integers each");
    STD_TORCH_CHECK(code.size() % kStep == 0, "code must have ", kStep, " integers for each step");
    const int64_t count = buffers.size() / kBuffer, steps = code.size() / kStep;
    while (inputs_ < count && buffers[inputs_ * kBuffer + quincunx::kKind] == Flow::kInput) ++inputs_;
    STD_TORCH_CHECK(inputs_ > 0, "a program needs an input [N, C, H, W]");
    Layout layout = quincunx::read_layout(buffers.data(), count, inputs_, 1, eight ? eight->grids.data() : nullptr);
    places_ = eight ? quincunx::places_of(layout, eight->grids) : layout.places(engine_.real_bytes());
    arena_ = layout.arena * (eight ? 1 : engine_.real_bytes());
    largest_ = layout.arena;
    for (int64_t i = 0; i < count; ++i) {
      largest_ = std::max(largest_, layout.maps[i].values());
      types_.push_back(eight ? type_of(eight->grids[i]) : bf16 ? ScalarType::BFloat16 : ScalarType::Float);
    }
    Operands operands(*this, tensors);
    const auto in_bytes = [eight](const quincunx::Places&) { return eight != nullptr; };
    calls_ = quincunx::read_steps(code.data(), steps, layout, operands, 1, in_bytes);
    if (eight) {
      quantised_ =
          quincunx::quantise_steps(calls_, layout, eight->grids, eight->multipliers.data(), operands, in_bytes);
    }
    maps_ = std::move(layout.maps);
  }

  Program(const Program&) = delete;

  // `crossing`: real maps outside have the other one of float32 and bfloat16
  std::vector<Tensor> run(std::vector<Tensor>& given, bool crossing) const {
    STD_TORCH_CHECK(static_cast<int64_t>(given.size()) == inputs_, "the program has ", inputs_, " inputs, got ",
                    given.size());
    STD_TORCH_CHECK(given[0].dim() == 4, "a program needs an input [N, C, H, W]");
    for (const Held& held : held_) {
      STD_TORCH_CHECK(held.tensor.data_ptr() == held.data && storage_bytes(held.tensor) == held.bytes,
                      "a packed weight was moved after the program was checked");
    }
    const int64_t batch = given[0].sizes()[0];
    STD_TORCH_CHECK(quincunx::countable({batch + 1, largest_, 16}), "the maps are too large for a batch of ", batch);
    const quincunx::Host host = quincunx::torch_host();
    std::vector<Place> places = places_;
    std::vector<Border> borders;
    std::vector<size_t> crossed;  // the map of each border
    for (int64_t i = 0; i < inputs_; ++i) {
      const Layout::Size& size = maps_[i];
      const ScalarType type = outside(i, crossing);
      Tensor& t = given[i];
      STD_TORCH_CHECK(t.is_cpu() && t.dim() == 4 && t.scalar_type() == type, "input ", i,
                      " must be a map [N, C, H, W] of ", torch::headeronly::toString(type), " on the CPU");
      const auto sizes = t.sizes();
      STD_TORCH_CHECK(sizes[0] == batch && sizes[1] == size.channels && sizes[2] == size.height &&
                          sizes[3] == size.width,
                      "input ", i, " must be [", batch, ", ", size.channels, ", ", size.height, ", ", size.width, "]");
      bool turn = !quincunx::is_channels_last(t);
      if (turn && (type == ScalarType::Byte || !t.is_contiguous())) {
        t = torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
        turn = false;
      }
      places[i].base = static_cast<char*>(t.data_ptr());
      if (!turn && type == types_[i]) continue;
      borders.push_back(Border{t.data_ptr(), nullptr, batch, size.channels, size.rows(), turn,
                               type == ScalarType::BFloat16, types_[i] == ScalarType::BFloat16});
      crossed.push_back(i);
    }
    const size_t entering = borders.size();
    std::vector<Tensor> found;
    for (size_t i = inputs_; i < maps_.size(); ++i) {
      const Layout::Size& size = maps_[i];
      if (size.kind != Flow::kOutput) continue;
      const ScalarType type = outside(i, crossing);
      found.push_back(new_map(batch, size, type));
      places[i].base = static_cast<char*>(found.back().data_ptr());
      if (type == types_[i]) continue;
      borders.push_back(Border{nullptr, found.back().data_ptr(), batch, size.channels, size.rows(), false,
                               types_[i] == ScalarType::BFloat16, type == ScalarType::BFloat16});
      crossed.push_back(i);
    }
    // the maps inside of those that cross, one behind the other
    std::optional<Tensor> inside, arena;
    if (!borders.empty()) {
      int64_t bytes = 0;
      for (const size_t i : crossed) bytes += (batch * places[i].image_bytes + kLine - 1) / kLine * kLine;
      inside = new_bytes(bytes);
      char* at = static_cast<char*>(inside->data_ptr());
      for (size_t b = 0; b < borders.size(); ++b) {
        Place& place = places[crossed[b]];
        place.base = at;
        if (b < entering) borders[b].to = at;
        if (b >= entering) borders[b].from = at;
        at += (batch * place.image_bytes + kLine - 1) / kLine * kLine;
      }
    }
    for (size_t b = 0; b < entering; ++b) cross(borders[b], host);
    quincunx::run_calls(calls_, places, arena_, batch, engine_, host, [&](int64_t bytes) {
      arena = new_bytes(bytes);
      return static_cast<char*>(arena->data_ptr());
    });
    for (size_t b = entering; b < borders.size(); ++b) cross(borders[b], host);
    return found;
  }

 private:
  struct Held {
    Tensor tensor;
    const void* data;
    int64_t bytes;  // of its storage
  };

  // The tensors as a program is read from them: tables and numbers are copied, so that what was checked stays as it is;
  // packed weights are held.
  class Operands final : public quincunx::Operands {
   public:
    Operands(Program& program, const std::vector<Tensor>& tensors)
        : program_(program), tensors_(tensors), tables_(tensors.size()), floats_(tensors.size(), nullptr) {}

    Table& table(int64_t number, const char* name) override {
      const void* data = values_of(at(number), name, ScalarType::Int);
      if (tables_[number].data == nullptr) {
        const int64_t count = at(number).numel();
        tables_[number] = Table(static_cast<const int32_t*>(copied(data, 4 * count)), count);
      }
      return tables_[number];
    }

    const float* floats(int64_t number, const char* name, int64_t count) override {
      const Tensor& tensor = at(number);
      STD_TORCH_CHECK(tensor.numel() == count, name, " must have ", count, " values, got ", tensor.numel());
      const void* data = values_of(tensor, name, ScalarType::Float);
      if (floats_[number] == nullptr) floats_[number] = copied(data, 4 * count);
      return static_cast<const float*>(floats_[number]);
    }

    int64_t first_size(int64_t number, const char* name) override {
      STD_TORCH_CHECK(at(number).dim() > 0, name, " must have a size");
      return at(number).sizes()[0];
    }

    const void* weight(int64_t number, int64_t outputs, int64_t channels, int64_t taps, int64_t groups,
                       bool bytes) override {
      const Engine& engine = program_.engine_;
      const ForwardKernels& kernels = bytes ? engine.all.int8.forward : engine.forward();
      const Tensor& tensor = at(number);
      const void* data = values_of(tensor, "packed weight",
                                   bytes                ? ScalarType::Byte
                                   : kernels.packs_bf16 ? ScalarType::BFloat16
                                                        : ScalarType::Float);
      const int64_t size = kernels.packed_size(outputs, channels, taps, groups);
      STD_TORCH_CHECK(tensor.numel() == size, "packed weight must have ", size, bytes ? " bytes" : " values", ", got ",
                      tensor.numel(), "; was it packed for these channels, taps and groups?");
      program_.held_.push_back(Held{tensor, data, storage_bytes(tensor)});
      return data;
    }

   private:
    const Tensor& at(int64_t number) const {
      STD_TORCH_CHECK(number >= 0 && number < static_cast<int64_t>(tensors_.size()), "code names a tensor ", number,
                      " that does not exist");
      return tensors_[number];
    }

    const void* copied(const void* data, int64_t bytes) {
      program_.copies_.emplace_back(std::max<int64_t>(bytes, 1));
      if (bytes > 0) std::memcpy(program_.copies_.back().data(), data, bytes);
      return program_.copies_.back().data();
    }

    Program& program_;
    const std::vector<Tensor>& tensors_;
    std::vector<Table> tables_;
    std::vector<const void*> floats_;
  };

  ScalarType outside(int64_t map, bool crossing) const {
    const ScalarType type = types_[map];
    if (!crossing || type == ScalarType::Byte) return type;
    return type == ScalarType::Float ? ScalarType::BFloat16 : ScalarType::Float;
  }

  void cross(const Border& border, const quincunx::Host& host) const {
    const int64_t values = border.batch * border.rows * border.columns, least = 30000;
    const int64_t parts = std::clamp<int64_t>(values / least, 1, 4 * host.threads);
    quincunx::parallel(host, parts, [&](int64_t part) { engine_.all.cross_border(&border, part, parts); });
  }

  const Engine engine_;
  int64_t inputs_ = 0;
  std::vector<Layout::Size> maps_;
  std::vector<ScalarType> types_;  // of the maps
  std::vector<Place> places_;
  std::vector<quincunx::Call> calls_;
  std::vector<quincunx::Quantised> quantised_;  // of the steps in eight bits
  int64_t arena_ = 0;                           // bytes per image
  int64_t largest_ = 0;  // values per image of the largest map, and units of the arena
  std::vector<Memory> copies_;
  std::vector<Held> held_;
};

// ---------------------------------------------------------------- programs by number

class Registry {
 public:
  static Registry& all() {
    // never destroyed: at exit, torch may be gone before
    static Registry& registry = *new Registry;
    return registry;
  }

  int64_t add(std::shared_ptr<const Program> program) {
    const std::lock_guard<std::mutex> guard(lock_);
    programs_.emplace(++last_, std::move(program));
    return last_;
  }

  std::shared_ptr<const Program> find(int64_t number) {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto found = programs_.find(number);
    STD_TORCH_CHECK(found != programs_.end(), "there is no program ", number);
    return found->second;
  }

  void drop(int64_t number) {
    // freed after the lock, since this frees tensors
    std::shared_ptr<const Program> last;
    const std::lock_guard<std::mutex> guard(lock_);
    const auto found = programs_.find(number);
    if (found == programs_.end()) return;
    last = std::move(found->second);
    programs_.erase(found);
  }

 private:
  Registry() {
#if defined(__unix__) || defined(__APPLE__)
    // a process that forks while another thread holds the lock would have it locked for ever
    pthread_atfork([] { all().lock_.lock(); }, [] { all().lock_.unlock(); }, [] { all().lock_.unlock(); });
#endif
  }

  std::mutex lock_;
  std::unordered_map<int64_t, std::shared_ptr<const Program>> programs_;
  int64_t last_ = 0;
};

bool is_bf16(ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "maps must be float32 or bfloat16, got ",
                  torch::headeronly::toString(type));
  return type == ScalarType::BFloat16;
}

// types, zeros: of each buffer; scales: float32, likewise; multipliers: a tensor's number for each step, or -1
EightBits eight_bits(const std::vector<int64_t>& buffers, const std::vector<int64_t>& code,
                     const std::vector<int64_t>& types, const std::vector<int64_t>& zeros, const Tensor& scales,
                     std::vector<int64_t> multipliers) {
  const size_t count = buffers.size() / quincunx::kBufferFields, steps = code.size() / quincunx::kStepFields;
  STD_TORCH_CHECK(types.size() == count && zeros.size() == count && scales.numel() == static_cast<int64_t>(count) &&
                      multipliers.size() == steps,
                  "types, zeros and scales must have ", count, " entries and multipliers ", steps);
  const auto* values = static_cast<const float*>(values_of(scales, "scales", ScalarType::Float));
  return EightBits{quincunx::read_grids(count, types.data(), zeros.data(), values), std::move(multipliers)};
}

int64_t keep_program(std::vector<Tensor> tensors, std::vector<int64_t> buffers, std::vector<int64_t> code, bool bf16) {
  return Registry::all().add(std::make_shared<const Program>(tensors, buffers, code, bf16, nullptr));
}

int64_t keep_int8_program(std::vector<Tensor> tensors, std::vector<int64_t> buffers, std::vector<int64_t> code,
                          std::vector<int64_t> types, std::vector<int64_t> zeros, const Tensor& scales,
                          std::vector<int64_t> multipliers) {
  const EightBits eight = eight_bits(buffers, code, types, zeros, scales, std::move(multipliers));
  return Registry::all().add(std::make_shared<const Program>(tensors, buffers, code, false, &eight));
}

std::vector<Tensor> run_kept(std::vector<Tensor> inputs, int64_t program, bool crossing) {
  return Registry::all().find(program)->run(inputs, crossing);
}

// ---------------------------------------------------------------- programs of one call

std::vector<Tensor> run_program(std::vector<Tensor> inputs, std::vector<Tensor> tensors,
                                std::vector<int64_t> buffers, std::vector<int64_t> code) {
  STD_TORCH_CHECK(!inputs.empty(), "a program needs an input [N, C, H, W]");
  return Program(tensors, buffers, code, is_bf16(inputs[0].scalar_type()), nullptr).run(inputs, false);
}

std::vector<Tensor> run_int8_program(std::vector<Tensor> inputs, std::vector<Tensor> tensors,
                                     std::vector<int64_t> buffers, std::vector<int64_t> code,
                                     std::vector<int64_t> types, std::vector<int64_t> zeros, const Tensor& scales,
                                     std::vector<int64_t> multipliers) {
  const EightBits eight = eight_bits(buffers, code, types, zeros, scales, std::move(multipliers));
  return Program(tensors, buffers, code, false, &eight).run(inputs, false);
}

}  // namespace

void quincunx::drop_program(int64_t number) { Registry::all().drop(number); }

STABLE_TORCH_LIBRARY_FRAGMENT(quincunx_native, m) {
  m.def("keep_program(Tensor[] tensors, int[] buffers, int[] code, bool bf16) -> int");
  m.def(
      "keep_int8_program(Tensor[] tensors, int[] buffers, int[] code, int[] types, int[] zeros, Tensor scales, "
      "int[] multipliers) -> int");
  m.def("run_kept(Tensor[] inputs, int program, bool crossing) -> Tensor[]");
  m.def("run_program(Tensor[] inputs, Tensor[] tensors, int[] buffers, int[] code) -> Tensor[]");
  m.def(
      "run_int8_program(Tensor[] inputs, Tensor[] tensors, int[] buffers, int[] code, int[] types, int[] zeros, "
      "Tensor scales, int[] multipliers) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(quincunx_native, CPU, m) {
  m.impl("run_kept", TORCH_BOX(&run_kept));
  m.impl("run_program", TORCH_BOX(&run_program));
  m.impl("run_int8_program", TORCH_BOX(&run_int8_program));
}

// a program may have no tensors, which say whose operator this is
STABLE_TORCH_LIBRARY_IMPL(quincunx_native, CompositeExplicitAutograd, m) {
  m.impl("keep_program", TORCH_BOX(&keep_program));
  m.impl("keep_int8_program", TORCH_BOX(&keep_int8_program));
}
