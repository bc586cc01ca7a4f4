// Checks of the emulated tiles themselves: their arithmetic against scalar code, and that each misuse is a fault.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>

#include "tiles_emulated.h"

namespace tile_checks {

using namespace quincunx;

struct Fault {
  std::string what;
};
[[noreturn]] inline void throw_fault(const char* what) { throw Fault{what}; }

inline bool faults(const std::function<void()>& act) {
  const TileFault before = tile_fault;
  tile_fault = &throw_fault;
  bool faulted = false;
  try {
    act();
  } catch (const Fault&) {
    faulted = true;
  }
  tile_fault = before;
  return faulted;
}

inline Area of(const void* data, int64_t bytes) {
  return Area{static_cast<const char*>(data), static_cast<const char*>(data) + bytes};
}

inline float widen(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float flush(float v) { return std::abs(v) < std::numeric_limits<float>::min() ? std::copysign(0.0f, v) : v; }

// report(what, got, expected) is called for each difference
template <class Report>
void check_arithmetic(std::mt19937& generator, const Report& report) {
  const TileConfig config = TileConfig::full();
  uint16_t inputs[16][32], weights[16][16][2];
  float sums[16][16], got[16][16];
  for (int round = 0; round < 12; ++round) {
    // moderate numbers, then any bits at all: denormals, infinities, NaN
    const auto any = [&](bool wild) -> uint16_t {
      if (wild) return uint16_t(generator());
      return uint16_t((generator() & 0x807f) | (uint32_t(120 + generator() % 16) << 7));
    };
    for (auto& row : inputs)
      for (auto& v : row) v = any(round % 3 == 1);
    for (auto& row : weights)
      for (auto& pair : row)
        for (auto& v : pair) v = any(round % 3 == 1);
    if (round % 3 == 2) {  // products near the smallest normal number
      for (auto& row : inputs)
        for (auto& v : row) v = uint16_t((v & 0x807f) | (uint32_t(55 + generator() % 20) << 7));
      for (auto& row : weights)
        for (auto& pair : row)
          for (auto& v : pair) v = uint16_t((v & 0x807f) | (uint32_t(55 + generator() % 20) << 7));
    }
    for (auto& row : sums)
      for (auto& v : row) v = round % 3 == 2 ? 0.0f : widen(any(false));
    TileUnit::configure(config);
    TileUnit::load<0>(reinterpret_cast<char*>(sums), 64, of(sums, sizeof sums));
    TileUnit::load<1>(reinterpret_cast<char*>(inputs), 64, of(inputs, sizeof inputs));
    TileUnit::load<2>(reinterpret_cast<char*>(weights), 64, of(weights, sizeof weights));
    TileUnit::dot<0, 1, 2>();
    TileUnit::store<0>(&got[0][0], 64);
    TileUnit::release();
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 16; ++n) {
        float part[2] = {0, 0};
        for (int k = 0; k < 16; ++k) {
          for (int half = 0; half < 2; ++half) {
            part[half] = flush(std::fma(flush(widen(inputs[m][2 * k + half])), flush(widen(weights[k][n][half])),
                                        part[half]));
          }
        }
        const float want = flush(sums[m][n] + flush(part[0] + part[1]));
        const bool same = got[m][n] == want || (std::isnan(got[m][n]) && std::isnan(want));
        if (!same) report("a dot product of tiles", got[m][n], want);
      }
    }
  }
  // bytes: the ends of both kinds, and sums that wrap around
  uint8_t bytes[16][64];
  int8_t factors[16][16][4];
  int32_t totals[16][16], found[16][16];
  for (int round = 0; round < 12; ++round) {
    const auto any = [&] { return round % 3 == 0 ? generator() % 2 * 0x7f + generator() % 2 * 0x80 : generator(); };
    for (auto& row : bytes)
      for (auto& v : row) v = uint8_t(any());
    for (auto& row : factors)
      for (auto& quad : row)
        for (auto& v : quad) v = int8_t(any());
    for (auto& row : totals)
      for (auto& v : row) v = round % 2 ? int32_t(generator()) : std::numeric_limits<int32_t>::max();
    TileUnit::configure(config);
    TileUnit::load<3>(reinterpret_cast<char*>(totals), 64, of(totals, sizeof totals));
    TileUnit::load<6>(reinterpret_cast<char*>(bytes), 64, of(bytes, sizeof bytes));
    TileUnit::load<7>(reinterpret_cast<char*>(factors), 64, of(factors, sizeof factors));
    TileUnit::dot_bytes<3, 6, 7>();
    TileUnit::store<3>(&found[0][0], 64);
    TileUnit::release();
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 16; ++n) {
        int64_t want = totals[m][n];
        for (int k = 0; k < 64; ++k) want += int64_t{bytes[m][k]} * factors[k / 4][n][k % 4];
        const int32_t wrapped = static_cast<int32_t>(static_cast<uint32_t>(want));
        if (found[m][n] != wrapped) report("a dot product of bytes", found[m][n], wrapped);
      }
    }
  }
  // a stride, and a load of the last bytes of its memory
  alignas(64) char wide[16 * 96 - 32];
  for (size_t i = 0; i < sizeof wide; ++i) wide[i] = char(i * 7);
  char narrow[16][64];
  TileUnit::configure(config);
  TileUnit::load<3>(wide, 96, of(wide, sizeof wide));
  TileUnit::store<3>(reinterpret_cast<float*>(narrow), 64);
  TileUnit::release();
  for (int r = 0; r < 16; ++r) {
    if (std::memcmp(narrow[r], wide + r * 96, 64) != 0) report("a row of a strided load", r, -1);
  }
}

template <class Report>
void check_faults(const Report& report) {
  alignas(64) static char memory[1024] = {};
  const Area all = of(memory, sizeof memory);
  const auto must = [&](const char* what, const std::function<void()>& act) {
    if (!faults(act)) report(std::string("no fault: ") + what, 0, 1);
    TileUnit::release();
  };
  const auto configured = [](const std::function<void(TileConfig&)>& change) {
    TileConfig config = TileConfig::full();
    change(config);
    TileUnit::configure(config);
  };
  const auto as_is = [](TileConfig&) {};
  TileUnit::release();
  must("tiles before their configuration", [] { TileUnit::zero<0>(); });
  must("a load before", [&] { TileUnit::load<0>(memory, 64, all); });
  must("a store before", [&] { TileUnit::store<0>(reinterpret_cast<float*>(memory), 64); });
  must("a product before", [] { TileUnit::dot<0, 1, 2>(); });
  must("palette", [&] { configured([](TileConfig& c) { c.palette = 2; }); });
  must("start row", [&] { configured([](TileConfig& c) { c.start_row = 1; }); });
  must("reserved bytes", [&] { configured([](TileConfig& c) { c.reserved[13] = 1; }); });
  must("reserved rows", [&] { configured([](TileConfig& c) { c.reserved_rows[0] = 1; }); });
  must("17 rows", [&] { configured([](TileConfig& c) { c.rows[7] = 17; }); });
  must("65 bytes", [&] { configured([](TileConfig& c) { c.row_bytes[0] = 65; }); });
  must("no rows of some bytes", [&] { configured([](TileConfig& c) { c.rows[3] = 0; }); });
  must("an unused tile", [&] {
    configured([](TileConfig& c) { c.rows[3] = 0, c.row_bytes[3] = 0; });
    TileUnit::zero<3>();
  });
  must("a product of bytes before", [] { TileUnit::dot_bytes<0, 1, 2>(); });
  must("the same tile twice", [&] { configured(as_is), TileUnit::dot<0, 1, 1>(); });
  must("the same tile twice, of bytes", [&] { configured(as_is), TileUnit::dot_bytes<0, 1, 0>(); });
  must("quads that do not fit", [&] {
    configured([](TileConfig& c) { c.rows[2] = 8; });
    TileUnit::dot_bytes<0, 1, 2>();
  });
  must("rows that do not fit", [&] {
    configured([](TileConfig& c) { c.rows[1] = 8; });
    TileUnit::dot<0, 1, 2>();
  });
  must("pairs that do not fit", [&] {
    configured([](TileConfig& c) { c.row_bytes[1] = 32; });
    TileUnit::dot<0, 1, 2>();
  });
  must("outputs that do not fit", [&] {
    configured([](TileConfig& c) { c.row_bytes[2] = 32; });
    TileUnit::dot<0, 1, 2>();
  });
  must("a load behind its memory", [&] { configured(as_is), TileUnit::load<0>(memory, 65, all); });
  must("a load before its memory", [&] { configured(as_is), TileUnit::load<0>(memory, -64, all); });
  must("tiles after their release", [&] { configured(as_is), TileUnit::release(), TileUnit::zero<0>(); });
  if (faults([&] { configured(as_is), TileUnit::load<0>(memory, 64, all), TileUnit::release(); })) {
    report("a fault without a reason", 1, 0);
  }
}

}  // namespace tile_checks
