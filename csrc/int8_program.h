// Programs in eight bits: what their maps are made of, and the checks of steps on such maps. Torch-free; everything
// else about a program is in program.h.
#pragma once

#include <cmath>
#include <vector>

#include "program.h"

namespace quincunx {

// of one sum, so that it fits 32 bits
constexpr int64_t kMostProducts = 65536;

// The types and grids of all maps of a program.
inline std::vector<MapGrid> read_grids(int64_t count, const int64_t* types, const int64_t* zeros, const float* scales) {
  std::vector<MapGrid> grids;
  for (int64_t i = 0; i < count; ++i) {
    require(types[i] >= 0 && types[i] < kMapTypes, "buffer ", i, ": the type must be 0 to ", kMapTypes - 1, ", got ",
            types[i]);
    if (types[i] == kUint8) {
      require(zeros[i] >= 0 && zeros[i] <= 255, "buffer ", i, ": the zero point must be 0 to 255, got ", zeros[i]);
      require(scales[i] > 1e-30f && scales[i] < 1e30f, "buffer ", i, ": the scale must be positive and finite, got ",
              scales[i]);
    }
    grids.push_back(MapGrid{static_cast<int32_t>(types[i]), static_cast<int32_t>(zeros[i]), scales[i]});
  }
  return grids;
}

// Where the maps of a program lie; offsets are bytes.
inline std::vector<Place> places_of(const Layout& layout, const std::vector<MapGrid>& grids) {
  std::vector<Place> places = layout.places(1);
  for (size_t i = 0; i < places.size(); ++i) places[i].image_bytes = layout.maps[i].values() * bytes_of(grids[i].type);
  return places;
}

// What steps know besides: `multipliers` has the number of a tensor for each step, -1 for none, and `in_bytes` is as for
// read_steps. The result has to live as long as the calls.
template <class InBytes>
std::vector<Quantised> quantise_steps(std::vector<Call>& calls, const Layout& layout, const std::vector<MapGrid>& grids,
                                      const int64_t* multipliers, Operands& operands, const InBytes& in_bytes) {
  std::vector<Quantised> found(calls.size());
  const auto grid = [&](int64_t map) { return map < 0 ? MapGrid{kUint8, 0, 1.0f} : grids[map]; };
  // a map that takes the place of another must have its type: others are read while it is written
  const auto apart = [&](int64_t map, int64_t residual) {
    if (map < 0 || residual < 0 || map == residual) return true;
    const Layout::Size &a = layout.maps[map], &b = layout.maps[residual];
    return a.kind != Flow::kScratch || b.kind != Flow::kScratch || a.offset != b.offset ||
           grids[map].type == grids[residual].type;
  };
  for (size_t i = 0; i < calls.size(); ++i) {
    Call& call = calls[i];
    GatherGemm& g = call.problem;
    const bool weighted = call.work == kConvolve && g.weight != nullptr;
    if (!in_bytes(call.maps)) {
      require(multipliers[i] < 0, "step ", i, ": only a convolution in eight bits has multipliers");
      continue;
    }
    Quantised& maps = found[i];
    maps = Quantised{grid(call.maps.x), grid(call.maps.residual), grid(call.maps.out), grid(call.maps.out2), nullptr};
    require(call.work == kPointwise || maps.x.type == kUint8, "step ", i, " reads a map that is not uint8");
    require(weighted == (multipliers[i] >= 0), "step ", i, ": a convolution, and nothing else, has multipliers");
    require(apart(call.maps.out, call.maps.residual) && apart(call.maps.out2, call.maps.residual), "step ", i,
            ": a result of another type lies where its residual does");
    if (weighted) {
      require(int64_t{g.num_taps} * (g.in_channels / g.channel_groups) <= kMostProducts, "step ", i,
              ": sums of more than ", kMostProducts, " products do not fit 32 bits");
      maps.multiplier = operands.floats(multipliers[i], "multiplier", g.out_channels);
    }
    if (call.work == kConvolve && !weighted) {
      require(g.num_taps <= kMostProducts, "step ", i, ": a mean of more than ", kMostProducts, " numbers");
    }
    if (call.work == kWindowMax || call.work == kCopy) {
      const MapGrid &x = maps.x, &out = maps.out;
      require(out.type == kUint8 && out.zero == x.zero && out.scale == x.scale, "step ", i,
              ": a maximum or copy keeps the grid of its input");
    }
    g.quantised = &maps;
  }
  return found;
}

}  // namespace quincunx
