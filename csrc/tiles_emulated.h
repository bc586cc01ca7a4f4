// The tiles of tiles.h in plain C++. What would be an undefined instruction or read memory that nobody gave is a fault.
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tiles.h"

namespace quincunx {

// What happens at a fault; the kernels' test puts another function here.
typedef void (*TileFault)(const char* what);
extern TileFault tile_fault;
// whether the calling thread's tiles are configured
bool emulated_tiles_in_use();

struct EmulatedTiles {
  uint16_t row_bytes[kTiles];
  uint8_t rows[kTiles];
  bool configured;
  alignas(64) char data[kTiles][kTileHeight][kTileBytes];

  static EmulatedTiles& own();

  void configure(const TileConfig& config);
  void release();
  void zero(int t);
  void load(int t, const char* from, int64_t stride, const Area& area);
  void store(int t, char* to, int64_t stride);
  void dot(int c, int a, int b);
  void dot_bytes(int c, int a, int b);

 private:
  bool usable(int t);
  bool fitting(int c, int a, int b);
};

struct TileUnit {
  static void configure(const TileConfig& config) { EmulatedTiles::own().configure(config); }
  static void release() { EmulatedTiles::own().release(); }
  template <int T>
  static void zero() {
    EmulatedTiles::own().zero(T);
  }
  template <int T>
  static void load(const char* from, int64_t stride, const Area& area) {
    EmulatedTiles::own().load(T, from, stride, area);
  }
  template <int T>
  static void store(void* to, int64_t stride) {
    EmulatedTiles::own().store(T, static_cast<char*>(to), stride);
  }
  template <int C, int A, int B>
  static void dot() {
    EmulatedTiles::own().dot(C, A, B);
  }
  template <int C, int A, int B>
  static void dot_bytes() {
    EmulatedTiles::own().dot_bytes(C, A, B);
  }
};

}  // namespace quincunx
