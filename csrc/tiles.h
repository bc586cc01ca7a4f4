// Eight tiles of 16 rows of 64 bytes and the dot products of bfloat16 pairs and of quads of bytes on them: Intel's AMX,
// and the same in plain C++ for every processor. Both have one interface, so that a kernel is tested where there is no
// AMX. Tile numbers are template arguments. A tile of sums holds [16, 16] float32 or int32, a tile of inputs [16 rows,
// 32 channels] bfloat16 or [16, 64] uint8, a tile of weights [16 pairs of channels, 16 outputs, 2] or [16 quads, 16, 4].
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS, TDPBUSD and LDTILECFG.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quincunx {

constexpr int kTiles = 8, kTileHeight = 16, kTileBytes = 64, kTileSize = kTileHeight * kTileBytes;

// The operand of LDTILECFG.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[kTiles] = {}, reserved_bytes[8] = {};
  uint8_t rows[kTiles] = {}, reserved_rows[8] = {};

  static constexpr TileConfig full() {
    TileConfig config;
    for (int t = 0; t < kTiles; ++t) {
      config.row_bytes[t] = kTileBytes;
      config.rows[t] = kTileHeight;
    }
    return config;
  }
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");

// The memory that a load may read; the processor does not check it, the emulation does.
struct Area {
  const char *first, *last;
};

}  // namespace quincunx

#ifdef QX_HARDWARE_TILES

namespace quincunx {
namespace QX_ISA {
namespace {

// GCC's intrinsics do not tell the compiler which memory the instructions read and write, so it may move a store
// behind the load that needs it. These do.
struct TileUnit {
  static QX_INLINE void configure(const TileConfig& config) {
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  // Other code of the thread finds no tiles in use, and the system does not save them.
  static QX_INLINE void release() { asm volatile("tilerelease" ::: "memory"); }
  template <int T>
  static QX_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  static QX_INLINE void load(const char* from, int64_t stride, const Area&) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static QX_INLINE void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
  }
  // sums C += inputs A times weights B
  template <int C, int A, int B>
  static QX_INLINE void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
  // likewise of inputs without and weights with a sign; sums are modulo 2^32
  template <int C, int A, int B>
  static QX_INLINE void dot_bytes() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

}  // namespace
}  // namespace QX_ISA
}  // namespace quincunx

#else

#include "tiles_emulated.h"

#endif
