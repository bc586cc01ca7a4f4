// Programs in eight bits: what their maps are made of, and the checks of steps on such maps. Torch-free; everything
// else about a program is in program.h.
#pragma once

#include <cmath>
#include <vector>

#include "program.h"

namespace quincunx {

// of one sum, so that it fits 32 bits
constexpr int64_t kMostProducts = 65536;

inline int64_t bytes_of(int32_t type) { return type == kFloat32 ? 4 : type == kBfloat16 ? 2 : 1; }

// The types and grids of all maps of a program; those inside are uint8.
inline std::vector<MapGrid> read_grids(const Layout& layout, const int64_t* types, const int64_t* zeros,
                                       const float* scales) {
  std::vector<MapGrid> grids;
  for (size_t i = 0; i < layout.maps.size(); ++i) {
    require(types[i] >= 0 && types[i] < kMapTypes, "buffer ", i, ": the type must be 0 to ", kMapTypes - 1, ", got ",
            types[i]);
    const MapGrid grid{static_cast<int32_t>(types[i]), static_cast<int32_t>(zeros[i]), scales[i]};
    require(grid.type == kUint8 || layout.maps[i].kind != Flow::kScratch, "buffer ", i,
            ": a map inside a program must be uint8");
    if (grid.type == kUint8) {
      require(zeros[i] >= 0 && zeros[i] <= 255, "buffer ", i, ": the zero point must be 0 to 255, got ", zeros[i]);
      require(grid.scale > 1e-30f && grid.scale < 1e30f, "buffer ", i, ": the scale must be positive and finite, got ",
              grid.scale);
    }
    grids.push_back(grid);
  }
  return grids;
}

// Where the inputs and outputs of a program lie, whose numbers may be wider than those inside.
inline std::vector<Place> places_of(const Layout& layout, const std::vector<MapGrid>& grids) {
  std::vector<Place> places = layout.places(1);
  for (size_t i = 0; i < places.size(); ++i) places[i].image_bytes = layout.maps[i].values() * bytes_of(grids[i].type);
  return places;
}

// What steps know besides: `multipliers` has the number of a tensor for each step, -1 for none. The result has to live
// as long as the calls.
inline std::vector<Quantised> quantise_steps(std::vector<Call>& calls, const std::vector<MapGrid>& grids,
                                             const int64_t* multipliers, Operands& operands) {
  std::vector<Quantised> found(calls.size());
  const auto grid = [&](int64_t map) { return map < 0 ? MapGrid{kUint8, 0, 1.0f} : grids[map]; };
  for (size_t i = 0; i < calls.size(); ++i) {
    Call& call = calls[i];
    GatherGemm& g = call.problem;
    Quantised& maps = found[i];
    maps = Quantised{grid(call.maps.x), grid(call.maps.residual), grid(call.maps.out), grid(call.maps.out2), nullptr};
    const bool known = call.work == kConvolve || call.work == kWindowMax || call.work == kCopy || call.work == kPointwise;
    require(known, "step ", i, ": work ", int64_t{call.work}, " is not done in eight bits");
    require(call.work == kPointwise || maps.x.type == kUint8, "step ", i, " reads a map that is not uint8");
    const bool weighted = call.work == kConvolve && g.weight != nullptr;
    require(weighted == (multipliers[i] >= 0), "step ", i, ": a convolution, and nothing else, has multipliers");
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
