#include "program_file.h"

#include <array>
#include <cstdlib>
#include <cstring>
#include <new>

#include "int8_program.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace quincunx {
namespace {

constexpr int64_t kLine = 64, kLargePage = 2 << 20;

int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

using CrcTables = std::array<std::array<uint32_t, 256>, 8>;

CrcTables make_crc_tables() {
  CrcTables tables{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) value = value & 1 ? 0xedb88320u ^ (value >> 1) : value >> 1;
    tables[0][i] = value;
  }
  for (size_t t = 1; t < 8; ++t) {
    for (size_t i = 0; i < 256; ++i) tables[t][i] = tables[0][tables[t - 1][i] & 255] ^ (tables[t - 1][i] >> 8);
  }
  return tables;
}

// reads records of numbers from the front of the bytes
class Front {
 public:
  Front(const char* data, size_t size) : data_(data), size_(size) {}
  template <class T>
  std::vector<T> take(uint64_t count, const char* what) {
    require(count <= (size_ - at_) / sizeof(T), "the program is damaged: its ", what, " end behind its ", size_,
            " bytes");
    std::vector<T> found(count);
    if (count > 0) std::memcpy(found.data(), data_ + at_, count * sizeof(T));
    at_ += count * sizeof(T);
    return found;
  }
  size_t at() const { return at_; }

 private:
  const char* data_;
  size_t size_, at_ = 0;
};

Header read_header(const char* bytes, size_t size) {
  Header header;
  require(size >= sizeof header && std::memcmp(bytes, kMagic, sizeof kMagic) == 0, "these ", size,
          " bytes are no program of quincunx");
  std::memcpy(&header, bytes, sizeof header);
  require(header.version >= 1 && header.version <= kInt8FileVersion, "the program has version ", header.version,
          "; this library reads versions 1 to ", kInt8FileVersion);
  require(header.size == size, "the program is incomplete: it should have ", header.size, " bytes, got ", size);
  const uint32_t found = crc32(crc32(0, bytes, offsetof(Header, checksum)), bytes + sizeof header, size - sizeof header);
  require(found == header.checksum, "the program is damaged: its checksum is wrong");
  bool zeros = header.reserved == 0;
  for (const char c : header.zeros) zeros = zeros && c == 0;
  require(zeros && header.dtype <= 1, "the program is damaged: its header names a type or a field that is unknown");
  return header;
}

// Steps of `fields` fields with those that later versions added.
std::vector<int64_t> with_later_fields(const std::vector<int64_t>& code, size_t steps, int64_t fields) {
  constexpr std::array<std::pair<StepField, int64_t>, 2> kLater{{{kShifts, -1}, {kActivation2, kRelu}}};
  std::vector<int64_t> whole;
  whole.reserve(steps * kStepFields);
  for (size_t i = 0; i < steps; ++i) {
    const auto own = code.begin() + static_cast<std::ptrdiff_t>(i) * fields;
    whole.insert(whole.end(), own, own + fields);
    for (const auto& [field, value] : kLater) {
      if (field >= fields) whole.push_back(value);
    }
    // their tables of shifts say less
    if (fields < kStepFields) whole[i * kStepFields + kShifts] = -1;
  }
  return whole;
}

std::vector<MapGrid> grids_of(const std::vector<GridEntry>& entries) {
  std::vector<int64_t> types, zeros;
  std::vector<float> scales;
  for (const GridEntry& entry : entries) {
    require(entry.reserved == 0, "the program is damaged: a grid has a field that is unknown");
    types.push_back(entry.type);
    zeros.push_back(entry.zero);
    scales.push_back(entry.scale);
  }
  return read_grids(entries.size(), types.data(), zeros.data(), scales.data());
}

}  // namespace

uint32_t crc32(uint32_t before, const void* data, size_t size) {
  static const CrcTables tables = make_crc_tables();
  const unsigned char* p = static_cast<const unsigned char*>(data);
  uint32_t crc = ~before;
  for (; size >= 8; size -= 8, p += 8) {
    uint32_t low, high;
    std::memcpy(&low, p, 4);
    std::memcpy(&high, p + 4, 4);
    low ^= crc;
    crc = tables[7][low & 255] ^ tables[6][low >> 8 & 255] ^ tables[5][low >> 16 & 255] ^ tables[4][low >> 24] ^
          tables[3][high & 255] ^ tables[2][high >> 8 & 255] ^ tables[1][high >> 16 & 255] ^ tables[0][high >> 24];
  }
  for (; size > 0; --size, ++p) crc = tables[0][(crc ^ *p) & 255] ^ (crc >> 8);
  return ~crc;
}

Memory::Memory(int64_t bytes) {
  if (bytes <= 0) return;
  const bool large = bytes >= 2 * kLargePage;
  require(bytes < (int64_t{1} << 60), "cannot allocate memory for ", bytes, " bytes");
  bytes_ = rounded_up(bytes, large ? kLargePage : kLine);
  void* found = nullptr;
  if (posix_memalign(&found, large ? kLargePage : kLine, bytes_) != 0) {
    require(false, "cannot allocate memory for ", bytes, " bytes");
  }
  data_ = static_cast<char*>(found);
#ifdef __linux__
  // small pages would cost a fault each
  if (large) madvise(found, bytes_, MADV_HUGEPAGE);
#endif
}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Memory::~Memory() { std::free(data_); }

// The tensors of a file while it is read: tables and floats copied, weights packed when a step first names them. Those of
// steps in eight bits are int8, all others of the program's type.
class ProgramFile::FileOperands final : public Operands {
 public:
  FileOperands(ProgramFile& program, const char* bytes, size_t size, const std::vector<Entry>& entries, size_t first,
               bool int8)
      : program_(program), kernels_(program.bf16_ ? kernels().bf16 : kernels().f32), bytes_(bytes) {
    int64_t behind = first, copied = 0;
    for (const Entry& entry : entries) {
      const size_t number = tensors_.size();
      require(entry.kind < (int8 ? kTensorKinds : kInt8Weights) && entry.reserved == 0, "the program is damaged: tensor ", number,
              " has the unknown kind ", entry.kind);
      require(countable({entry.sizes[0], entry.sizes[1], entry.sizes[2], entry.sizes[3]}),
              "the program is damaged: tensor ", number, " has an impossible size");
      int64_t count = 1;
      for (const int64_t value : entry.sizes) count *= value;
      const int64_t width = width_of(entry.kind);
      require(entry.offset >= behind && entry.offset % kLine == 0 && entry.offset <= static_cast<int64_t>(size) &&
                  count <= (static_cast<int64_t>(size) - entry.offset) / width,
              "the program is damaged: tensor ", number, " of ", count, " values does not lie inside it");
      behind = entry.offset + count * width;
      tensors_.push_back(Tensor{entry, count, nullptr, Table()});
      if (entry.kind < kWeights) copied += rounded_up(count * 4, kLine);
    }
    program.tables_ = Memory(copied);
    char* to = program.tables_.data();
    for (Tensor& tensor : tensors_) {
      if (tensor.entry.kind >= kWeights || tensor.count == 0) continue;
      std::memcpy(to, bytes + tensor.entry.offset, tensor.count * 4);
      tensor.data = to;
      tensor.table = Table(reinterpret_cast<const int32_t*>(to), tensor.count);
      to += rounded_up(tensor.count * 4, kLine);
    }
  }

  Table& table(int64_t number, const char* name) override { return at(number, name, kTable).table; }

  const float* floats(int64_t number, const char* name, int64_t count) override {
    const Tensor& tensor = at(number, name, kFloats);
    require(tensor.count == count, name, " must have ", count, " values, got ", tensor.count);
    return static_cast<const float*>(tensor.data);
  }

  int64_t first_size(int64_t number, const char* name) override { return at(number, name, kFloats).entry.sizes[0]; }

  const void* weight(int64_t number, int64_t outputs, int64_t channels, int64_t taps, int64_t groups,
                     bool bytes) override {
    Tensor& tensor = at(number, "weight", bytes ? kInt8Weights : kWeights);
    const int64_t* s = tensor.entry.sizes;
    require(s[0] == groups && s[1] * groups == outputs && s[2] == channels && s[3] == taps, "weight must be [", groups,
            ", ", outputs / groups, ", ", channels, ", ", taps, "], got [", s[0], ", ", s[1], ", ", s[2], ", ", s[3],
            "]");
    if (tensor.data == nullptr) tensor.data = pack(tensor, bytes ? kernels().int8.forward : kernels_, bytes);
    return tensor.data;
  }

 private:
  struct Tensor {
    Entry entry;
    int64_t count;
    const void* data;
    Table table;
  };

  Tensor& at(int64_t number, const char* name, TensorKind kind) {
    require(number >= 0 && number < static_cast<int64_t>(tensors_.size()), "code names a tensor ", number,
            " that does not exist");
    require(tensors_[number].entry.kind == kind, name, " is a tensor of kind ", tensors_[number].entry.kind,
            ", expected ", uint32_t{kind});
    return tensors_[number];
  }

  int64_t width_of(uint32_t kind) const { return kind == kInt8Weights ? 1 : kind == kWeights && program_.bf16_ ? 2 : 4; }

  const void* pack(const Tensor& tensor, const ForwardKernels& by, bool bytes) {
    const int64_t *s = tensor.entry.sizes, width = width_of(tensor.entry.kind);
    const char* from = bytes_ + tensor.entry.offset;
    std::vector<char> aligned;
    if (reinterpret_cast<uintptr_t>(from) % width != 0) {
      aligned.assign(from, from + tensor.count * width);
      from = aligned.data();
    }
    const Weight weight{from, s[0], s[1], s[2], s[3], s[1] * s[2] * s[3], s[2] * s[3], s[3], 1};
    const int64_t values = by.packed_size(s[0] * s[1], s[2], s[3], s[0]);
    require(values < (int64_t{1} << 58), "the weight is too large");
    Memory packed(values * (bytes ? 1 : by.packs_bf16 ? 2 : 4));
    by.pack(&weight, packed.data(), 0, 1);
    program_.packed_.push_back(std::move(packed));
    return program_.packed_.back().data();
  }

  ProgramFile& program_;
  const ForwardKernels& kernels_;
  const char* bytes_;
  std::vector<Tensor> tensors_;
};

ProgramFile::ProgramFile(const void* data, size_t size) {
  const char* bytes = static_cast<const char*>(data);
  require(bytes != nullptr, "a program of no bytes");
  const Header header = read_header(bytes, size);
  bf16_ = header.dtype == 1;
  Front front(bytes, size);
  front.take<Header>(1, "header");
  const auto ranks = front.take<int64_t>(header.outputs, "outputs");
  const auto buffers = front.take<int64_t>(uint64_t{header.maps} * kBufferFields, "maps");
  const int64_t fields = step_fields(header.version);
  const auto code = with_later_fields(front.take<int64_t>(uint64_t{header.steps} * fields, "steps"), header.steps, fields);
  const bool int8 = has_int8(header.version);
  const auto grid_entries = front.take<GridEntry>(int8 ? header.maps : 0, "grids");
  const auto multipliers = front.take<int64_t>(int8 ? header.steps : 0, "multipliers");
  const auto entries = front.take<Entry>(header.tensors, "tensors");
  require(header.inputs >= 1 && header.outputs >= 1, "a program needs an input and an output");
  const int32_t real = bf16_ ? kBfloat16 : kFloat32;
  const std::vector<MapGrid> grids = int8 ? grids_of(grid_entries) : std::vector<MapGrid>(header.maps, {real, 0, 1.0f});
  // where all maps have one type, offsets are numbers of values
  Layout layout = read_layout(buffers.data(), header.maps, header.inputs, 1, int8 ? grids.data() : nullptr);
  FileOperands operands(*this, bytes, size, entries, front.at(), int8);
  const auto in_bytes = [&](const Places& maps) {
    for (const int64_t map : {maps.x, maps.residual, maps.out, maps.out2}) {
      if (map >= 0 && grids[map].type != real) return true;
    }
    return false;
  };
  calls_ = read_steps(code.data(), header.steps, layout, operands, 1, in_bytes);
  if (int8) quantised_ = quantise_steps(calls_, layout, grids, multipliers.data(), operands, in_bytes);
  places_ = int8 ? places_of(layout, grids) : layout.places(bf16_ ? 2 : 4);
  std::vector<char> written(layout.maps.size(), 0);
  for (const Call& call : calls_) {
    if (call.maps.out >= 0) written[call.maps.out] = 1;
    if (call.maps.out2 >= 0) written[call.maps.out2] = 1;
  }
  int64_t scratch = 0;
  for (size_t i = 0; i < layout.maps.size(); ++i) {
    const Layout::Size& map = layout.maps[i];
    rows_.push_back(map.rows());
    channels_.push_back(map.channels);
    largest_ = std::max(largest_, map.values());
    halves_.push_back(grids[i].type == kBfloat16);
    require(map.kind == Flow::kScratch || grids[i].type != kUint8, "the program is damaged: map ", i,
            " is an input or output and not of real numbers");
    const Shape shape{map.channels, map.height, map.width, 4};
    if (map.kind == Flow::kInput) inputs_.push_back(shape);
    if (map.kind == Flow::kScratch) {
      require(written[i], "the program is damaged: no step writes map ", i);
      scratch += rounded_up(map.values() * (int8 ? bytes_of(grids[i].type) : 1), 32);
      require(countable({scratch, 8}), "the program is damaged: its maps are too large");
    }
    if (map.kind == Flow::kOutput) {
      output_maps_.push_back(i);
      outputs_.push_back(shape);
    }
  }
  // an arena with gaps would be memory that nobody uses
  require(layout.arena <= scratch, "the program is damaged: its maps lie too far apart");
  require(outputs_.size() == ranks.size(), "the program is damaged: it has ", outputs_.size(), " outputs and ",
          ranks.size(), " ranks");
  for (size_t i = 0; i < ranks.size(); ++i) {
    require(ranks[i] == 4 || (ranks[i] == 2 && rows_[output_maps_[i]] == 1 && outputs_[i].height == 1),
            "the program is damaged: output ", i, " cannot have the rank ", ranks[i]);
    outputs_[i].rank = ranks[i];
  }
  largest_ = std::max(largest_, layout.arena);
  arena_ = layout.arena * (int8 ? 1 : bf16_ ? 2 : 4);
}

int64_t ProgramFile::memory() const {
  int64_t total = tables_.bytes();
  for (const Memory& memory : packed_) total += memory.bytes();
  return total;
}

Memory ProgramFile::take(int64_t bytes) const {
  {
    const std::lock_guard<std::mutex> guard(lock_);
    auto best = spare_.end();
    for (auto it = spare_.begin(); it != spare_.end(); ++it) {
      if (it->bytes() >= bytes && (best == spare_.end() || it->bytes() < best->bytes())) best = it;
    }
    if (best != spare_.end()) {
      Memory found = std::move(*best);
      spare_.erase(best);
      return found;
    }
  }
  return Memory(bytes);
}

void ProgramFile::give(Memory memory) const {
  constexpr size_t kMost = 16;
  if (memory.bytes() == 0) return;
  const std::lock_guard<std::mutex> guard(lock_);
  spare_.push_back(std::move(memory));
  if (spare_.size() > kMost) spare_.erase(spare_.begin());
}

void ProgramFile::run(const BorderMap* inputs, const BorderMap* outputs, int64_t batch, const Host& given) const {
  require(batch >= 0 && countable({batch + 1, largest_, 16}), "the batch ", batch, " is impossible");
  if (batch == 0) return;
  Host host = given;
  host.threads = std::clamp<int64_t>(host.threads, 1, 4096);
  const Engine engine{kernels(), bf16_};
  std::vector<Place> places = places_;
  std::vector<Memory> borrowed;

  const auto borrow = [&](int64_t bytes) {
    borrowed.push_back(take(bytes));
    return borrowed.back().data();
  };
  // whether a map of the caller can serve as it is
  const auto serves = [&](const BorderMap& map, size_t number) {
    const bool turned = map.planar && rows_[number] > 1 && channels_[number] > 1;
    return !turned && map.bf16 == static_cast<bool>(halves_[number]);
  };
  const auto cross = [&](const Border& border) {
    const int64_t values = border.batch * border.rows * border.columns, least = 30000;
    const int64_t parts = std::clamp<int64_t>(values / least, 1, 4 * host.threads);
    parallel(host, parts, [&](int64_t part) { engine.all.cross_border(&border, part, parts); });
  };

  for (size_t i = 0; i < inputs_.size(); ++i) {
    const BorderMap& map = inputs[i];
    places[i].base = static_cast<char*>(map.data);
    if (serves(map, i)) continue;
    places[i].base = borrow(batch * places[i].image_bytes);
    const bool turn = map.planar && rows_[i] > 1 && channels_[i] > 1;
    cross(Border{map.data, places[i].base, batch, channels_[i], rows_[i], turn, map.bf16, halves_[i] != 0});
  }
  for (size_t i = 0; i < output_maps_.size(); ++i) {
    const size_t number = output_maps_[i];
    places[number].base = serves(outputs[i], number) ? static_cast<char*>(outputs[i].data)
                                                     : borrow(batch * places[number].image_bytes);
  }
  run_calls(calls_, places, arena_, batch, engine, host, borrow);
  for (size_t i = 0; i < output_maps_.size(); ++i) {
    const size_t number = output_maps_[i];
    if (serves(outputs[i], number)) continue;
    const bool turn = outputs[i].planar && rows_[number] > 1 && channels_[number] > 1;
    cross(Border{places[number].base, outputs[i].data, batch, rows_[number], channels_[number], turn,
                 halves_[number] != 0, outputs[i].bf16});
  }
  for (Memory& memory : borrowed) give(std::move(memory));
}

}  // namespace quincunx
