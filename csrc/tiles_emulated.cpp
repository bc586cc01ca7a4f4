#include "tiles_emulated.h"

namespace quincunx {
namespace {

void stop(const char* what) {
  fprintf(stderr, "quincunx: a tile instruction would fault: %s\n", what);
  abort();
}

thread_local EmulatedTiles tiles;

constexpr float kSmallest = 1.17549435e-38f;  // that is normal

float widen(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// a number below the smallest normal one counts as zero, before and after each operation
float flushed(float v) { return fabsf(v) < kSmallest ? copysignf(0.0f, v) : v; }

// whether products of two such numbers are exact in float32, so that a product and a sum round like one operation
bool moderate(float v) { return v == 0.0f || (fabsf(v) >= 0x1p-60f && fabsf(v) <= 0x1p60f); }

}  // namespace

TileFault tile_fault = &stop;

EmulatedTiles& EmulatedTiles::own() { return tiles; }

bool emulated_tiles_in_use() { return tiles.configured; }

void EmulatedTiles::configure(const TileConfig& config) {
  const auto any = [](const auto& reserved) {
    int set = 0;
    for (const auto value : reserved) set |= value;
    return set != 0;
  };
  if (config.palette != 1) return tile_fault("the palette is not 1");
  if (config.start_row != 0 || any(config.reserved) || any(config.reserved_bytes) || any(config.reserved_rows)) {
    return tile_fault("reserved bytes of the configuration are not 0");
  }
  for (int t = 0; t < kTiles; ++t) {
    const bool none = config.rows[t] == 0 && config.row_bytes[t] == 0;
    const bool some = config.rows[t] >= 1 && config.rows[t] <= kTileHeight && config.row_bytes[t] >= 1 &&
                      config.row_bytes[t] <= kTileBytes;
    if (!none && !some) return tile_fault("a tile has an impossible size");
  }
  memcpy(row_bytes, config.row_bytes, sizeof row_bytes);
  memcpy(rows, config.rows, sizeof rows);
  memset(data, 0, sizeof data);
  configured = true;
}

void EmulatedTiles::release() {
  memset(data, 0, sizeof data);
  configured = false;
}

bool EmulatedTiles::usable(int t) {
  if (configured && rows[t] > 0) return true;
  tile_fault("a tile is used that is not configured");
  return false;
}

void EmulatedTiles::zero(int t) {
  if (usable(t)) memset(data[t], 0, sizeof data[t]);
}

void EmulatedTiles::load(int t, const char* from, int64_t stride, const Area& area) {
  if (!usable(t)) return;
  memset(data[t], 0, sizeof data[t]);
  for (int r = 0; r < rows[t]; ++r) {
    const char* row = from + r * stride;
    if (row < area.first || area.last - row < row_bytes[t]) return tile_fault("a load outside of its memory");
    memcpy(data[t][r], row, row_bytes[t]);
  }
}

void EmulatedTiles::store(int t, char* to, int64_t stride) {
  if (!usable(t)) return;
  for (int r = 0; r < rows[t]; ++r) memcpy(to + r * stride, data[t][r], row_bytes[t]);
}

bool EmulatedTiles::fitting(int c, int a, int b) {
  if (!usable(c) || !usable(a) || !usable(b)) return false;
  if (c == a || c == b || a == b) {
    tile_fault("a dot product of the same tile twice");
    return false;
  }
  const bool fit = rows[c] == rows[a] && row_bytes[c] == row_bytes[b] && row_bytes[a] == rows[b] * 4 &&
                   row_bytes[c] % 4 == 0;
  if (!fit) tile_fault("a dot product of tiles that do not fit");
  return fit;
}

void EmulatedTiles::dot_bytes(int c, int a, int b) {
  if (!fitting(c, a, b)) return;
  constexpr int kOutputs = kTileBytes / 4;
  const int quads = row_bytes[a] / 4, outputs = row_bytes[c] / 4;
  int32_t weights[kTileHeight][4][kOutputs] = {};
  for (int k = 0; k < quads; ++k) {
    for (int n = 0; n < outputs; ++n) {
      for (int i = 0; i < 4; ++i) weights[k][i][n] = static_cast<int8_t>(data[b][k][n * 4 + i]);
    }
  }
  for (int m = 0; m < rows[c]; ++m) {
    uint32_t sums[kOutputs] = {};  // modulo 2^32, as the processor's
    memcpy(sums, data[c][m], row_bytes[c]);
    for (int k = 0; k < quads; ++k) {
      for (int i = 0; i < 4; ++i) {
        const int32_t input = static_cast<uint8_t>(data[a][m][k * 4 + i]);
        for (int n = 0; n < kOutputs; ++n) sums[n] += static_cast<uint32_t>(input * weights[k][i][n]);
      }
    }
    memcpy(data[c][m], sums, row_bytes[c]);
  }
}

// Even and odd channels are summed apart, each product and sum rounded once; then both sums are added, and that to c.
void EmulatedTiles::dot(int c, int a, int b) {
  if (!fitting(c, a, b)) return;
  constexpr int kOutputs = kTileBytes / 4;
  const int pairs = row_bytes[a] / 4, outputs = row_bytes[c] / 4;
  alignas(64) float weights[kTileHeight][2][kOutputs] = {}, inputs[kTileHeight][2];
  bool exact = true;
  for (int k = 0; k < pairs; ++k) {
    for (int n = 0; n < outputs; ++n) {
      for (int half = 0; half < 2; ++half) {
        uint16_t value;
        memcpy(&value, data[b][k] + n * 4 + half * 2, 2);
        weights[k][half][n] = flushed(widen(value));
        exact &= moderate(weights[k][half][n]);
      }
    }
  }
  for (int m = 0; m < rows[c]; ++m) {
    bool row_exact = exact;
    for (int k = 0; k < pairs; ++k) {
      for (int half = 0; half < 2; ++half) {
        uint16_t value;
        memcpy(&value, data[a][m] + k * 4 + half * 2, 2);
        inputs[k][half] = flushed(widen(value));
        row_exact &= moderate(inputs[k][half]);
      }
    }
    alignas(64) float sums[2][kOutputs] = {};
    for (int k = 0; k < pairs; ++k) {
      for (int half = 0; half < 2; ++half) {
        const float input = inputs[k][half];
        float* sum = sums[half];
        const float* weight = weights[k][half];
        if (row_exact) {
          for (int n = 0; n < kOutputs; ++n) sum[n] = flushed(sum[n] + input * weight[n]);
        } else {
          for (int n = 0; n < kOutputs; ++n) sum[n] = flushed(fmaf(input, weight[n], sum[n]));
        }
      }
    }
    for (int n = 0; n < outputs; ++n) {
      float value;
      memcpy(&value, data[c][m] + n * 4, 4);
      value = flushed(flushed(value) + flushed(sums[0][n] + sums[1][n]));
      memcpy(data[c][m] + n * 4, &value, 4);
    }
  }
}

}  // namespace quincunx
