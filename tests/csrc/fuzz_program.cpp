// Reads mutated program files, and runs those that are still programs, under AddressSanitizer: each is refused by one
// sentence or answers, and touches no memory outside. Torch-free:
// make fuzz
//   fuzz_program COUNT SEED FILE...
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"
#include "program.h"
#include "program_file.h"

namespace {

using namespace quincunx;
using Bytes = std::vector<char>;

std::mt19937_64 generator;
int64_t pick(int64_t below) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(below)); }

Bytes read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

// what sizes, offsets and numbers are most easily wrong at
int64_t odd_number() {
  const int64_t some[] = {0, -1, 1, 2, 3, 31, 32, 63, 64, 65, 255, 4096, 0x7fffffff, 0x80000000, 0xffffffff,
                          int64_t{1} << 40, INT64_MAX, INT64_MIN, INT64_MAX / 8, INT64_MAX / 64 * 64};
  return some[pick(sizeof some / sizeof *some)];
}

// The tables at the front decide about memory, so most changes are there.
void mutate(Bytes& bytes, size_t front) {
  for (int64_t changes = 1 + pick(3); changes > 0 && !bytes.empty(); --changes) {
    const size_t part = pick(4) > 0 ? std::min(front, bytes.size()) : bytes.size();
    const size_t at = pick(part);
    const auto put = [&](int64_t value, size_t width) {
      const size_t to = at / width * width;
      if (to + width <= bytes.size()) std::memcpy(bytes.data() + to, &value, width);
    };
    const auto get = [&](size_t width) {
      int64_t value = 0;
      const size_t from = at / width * width;
      if (from + width <= bytes.size()) std::memcpy(&value, bytes.data() + from, width);
      return value;
    };
    const uint64_t old = static_cast<uint64_t>(get(8));  // its products wrap around
    switch (pick(8)) {
      case 0: bytes[at] ^= static_cast<char>(1 << pick(8)); break;
      case 1: bytes[at] = static_cast<char>(pick(256)); break;
      case 2: put(odd_number(), 8); break;
      case 3: put(odd_number(), 4); break;
      case 4: put(static_cast<int64_t>(old + pick(5) - 2), 8); break;
      case 5: put(get(4) + pick(5) - 2, 4); break;
      case 6: {  // one record over another
        const size_t from = pick(part), count = 8 * (1 + pick(8));
        if (std::max(from, at) + count <= bytes.size()) std::memmove(bytes.data() + at, bytes.data() + from, count);
        break;
      }
      default:
        if (pick(4) == 0) bytes.resize(pick(bytes.size()));
        else put(static_cast<int64_t>(pick(2) ? 2 * old : 0 - old), 8);
    }
  }
}

void repair(Bytes& bytes) {
  if (bytes.size() < sizeof(Header)) return;
  Header header;
  std::memcpy(&header, bytes.data(), sizeof header);
  if (pick(50) > 0) {
    std::memcpy(header.magic, kMagic, sizeof kMagic);
    // of the two, nearly always the one that it has
    if (header.version != kInt8FileVersion || pick(20) == 0) header.version = kFileVersion;
    header.size = bytes.size();
  }
  std::memcpy(bytes.data(), &header, sizeof header);
  header.checksum = crc32(crc32(0, bytes.data(), offsetof(Header, checksum)), bytes.data() + sizeof header,
                          bytes.size() - sizeof header);
  std::memcpy(bytes.data(), &header, sizeof header);
}

// whether it ran; false if the batch was too large for this test
bool answer(const ProgramFile& program, int64_t batch) {
  std::vector<std::unique_ptr<char[]>> memory;
  std::vector<BorderMap> maps[2];
  for (const int side : {0, 1}) {
    for (const auto& shape : side ? program.outputs() : program.inputs()) {
      const int64_t values = batch * shape.channels * shape.height * shape.width;
      if (!countable({batch, shape.channels, shape.height, shape.width}) || values > (1 << 22)) return false;
      const bool bf16 = pick(2) != 0;
      memory.emplace_back(new char[values * (bf16 ? 2 : 4)]());
      maps[side].push_back(BorderMap{memory.back().get(), pick(2) != 0, bf16});
    }
  }
  program.run(maps[0].data(), maps[1].data(), batch, Host{});
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return std::puts("fuzz_program COUNT SEED FILE..."), 2;
  generator.seed(std::strtoull(argv[2], nullptr, 10));
  std::vector<Bytes> seeds;
  for (int i = 3; i < argc; ++i) {
    seeds.push_back(read(argv[i]));
    const ProgramFile program(seeds.back().data(), seeds.back().size());
    if (!answer(program, 2)) return std::printf("%s: too large\n", argv[i]), 1;
  }
  int64_t refused = 0, damaged = 0, ran = 0;
  for (int64_t i = 0, count = std::atoll(argv[1]); i < count; ++i) {
    const Bytes& seed = seeds[i % seeds.size()];
    Header header;
    std::memcpy(&header, seed.data(), sizeof header);
    size_t front = sizeof header + 8 * header.outputs + 8 * kBufferFields * header.maps + 48 * header.tensors;
    front += 8 * step_fields(header.version) * header.steps;
    if (has_int8(header.version)) front += sizeof(GridEntry) * header.maps + 8 * header.steps;
    Bytes bytes = seed;
    mutate(bytes, front);
    const bool sound = pick(10) > 0;  // else its checksum tells
    const bool same = bytes == seed;
    if (sound) repair(bytes);
    // a block of exactly its size, so that reading behind it is seen
    const std::unique_ptr<char[]> exact(new char[bytes.size()]);
    std::memcpy(exact.get(), bytes.data(), bytes.size());
    try {
      const ProgramFile program(exact.get(), bytes.size());
      if (!sound && !same) return std::printf("%lld: a wrong checksum was accepted\n", static_cast<long long>(i)), 1;
      ran += answer(program, 1 + pick(3));
    } catch (const std::runtime_error& error) {
      const std::string sentence = error.what();
      if (sentence.size() < 10 || sentence.find('\n') != std::string::npos) {
        return std::printf("%lld: no sentence: %s\n", static_cast<long long>(i), sentence.c_str()), 1;
      }
      ++(sound ? refused : damaged);
    }
  }
  std::printf("%lld refused, %lld by their checksum, %lld ran\n", static_cast<long long>(refused),
              static_cast<long long>(damaged), static_cast<long long>(ran));
}
