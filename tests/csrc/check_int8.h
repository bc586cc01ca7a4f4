// Checks the kernels in eight bits against plain loops in 64-bit integers, to the bit. Included by test_kernel.cpp, whose
// cases and generator it uses.
#pragma once

// a product that is rounded before anything is added to it, whatever the compiler may join
float apart(float product) {
  volatile float kept = product;
  return kept;
}

struct Bytes {
  explicit Bytes(int64_t count) : count(count), data(exactly<uint8_t>(count)) {}
  void randomise(int low = 0) {
    for (int64_t i = 0; i < count; ++i) data[i] = uint8_t(generator() % 8 == 0 ? (generator() % 2 ? 255 : low) : generator());
  }
  int64_t count;
  Exactly<uint8_t> data;
};

MapGrid random_grid(bool bytes) {
  if (!bytes) return MapGrid{generator() % 2 ? kFloat32 : kBfloat16, 0, 1.0f};
  return MapGrid{kUint8, int32_t(pick({0, 0, 1, 100, 128, 255})), 0.01f + float(generator() % 1000) / 1000};
}

float real_of(const Bytes& map, const MapGrid& grid, int64_t at) {
  if (grid.type == kUint8) return apart(float(map.data[at] - grid.zero) * grid.scale);
  if (grid.type == kFloat32) {
    float value;
    std::memcpy(&value, map.data.get() + at * 4, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, map.data.get() + at * 2, 2);
  return widen(half);
}

// what has to stand in a map, as the number stored there; a NaN is stored as the lowest
double stored(float value, const MapGrid& grid) {
  if (grid.type == kFloat32) return value;
  if (grid.type == kBfloat16) return widen(narrow(value));
  const float scaled = value * (1.0f / grid.scale), low = float(-grid.zero), high = float(255 - grid.zero);
  if (!(scaled > low)) return 0;
  return (scaled < high ? std::nearbyint(scaled) : high) + grid.zero;
}
double found(const Bytes& map, const MapGrid& grid, int64_t at) {
  return grid.type == kUint8 ? map.data[at] : real_of(map, grid, at);
}
int64_t bytes_of_map(const MapGrid& grid) { return grid.type == kUint8 ? 1 : grid.type == kBfloat16 ? 2 : 4; }

Bytes random_map(int64_t values, const MapGrid& grid) {
  Bytes map(values * bytes_of_map(grid));
  map.randomise();
  for (int64_t i = 0; i < values && grid.type != kUint8; ++i) {
    const float value = normal();
    const uint16_t half = narrow(value);
    if (grid.type == kFloat32) std::memcpy(map.data.get() + i * 4, &value, 4);
    else std::memcpy(map.data.get() + i * 2, &half, 2);
  }
  return map;
}
// what has to be overwritten: a pattern that is a NaN in both wider types
Bytes poisoned(int64_t values, const MapGrid& grid) {
  Bytes map(values * bytes_of_map(grid));
  std::memset(map.data.get(), 0xff, map.count);
  return map;
}

void check_bytes(const std::string& name, const Int8Kernels& int8, const Case& c) {
  const ForwardKernels& kernels = int8.forward;
  const int64_t out = c.out(), rows_out = c.rows.size();
  const bool all = generator() % 2;  // maps of bytes alone, which are finished in registers
  Quantised maps{random_grid(true), random_grid(all || generator() % 2), random_grid(all || generator() % 2),
                 random_grid(all || generator() % 2), nullptr};
  Bytes x(c.batch * c.rows_in * c.in()), weight(out * c.in_per * c.taps);
  x.randomise();
  weight.randomise(128);  // -128, too
  Array bias(out, false), scale(out, false), shift(out, false), slope(out, false), multiplier(out, false);
  for (int64_t o = 0; o < out; ++o) multiplier.set(o, (0.5f + float(generator() % 100) / 100) * 1e-4f);
  maps.multiplier = multiplier.floats();
  const Bytes residual = random_map(c.batch * c.residual_size * c.residual_channels, maps.residual);
  const int64_t values = c.batch * rows_out * out;
  Bytes result = poisoned(values, maps.out), result2 = poisoned(values, maps.out2);
  Bytes packed(kernels.packed_size(out, c.in_per, c.taps, c.groups));
  const int64_t output = c.in_per * c.taps;
  const Weight w{weight.data.get(), c.groups, c.out_per, c.in_per, c.taps, c.out_per * output, output, c.taps, 1};
  const int64_t pack_parts = pick({1, 3});
  for (int64_t part = 0; part < pack_parts; ++part) kernels.pack(&w, packed.data.get(), part, pack_parts);

  GatherGemm g{};
  g.x = x.data.get();
  g.weight = packed.data.get();
  g.bias = generator() % 2 ? bias.floats() : nullptr;
  g.residual = c.residual_channels ? residual.data.get() : nullptr;
  g.residual_rows = c.residual_table();
  g.index = c.index.data();
  g.rows = c.rows.data();
  g.taps = c.tap_list.data();
  g.groups = c.sizes.data();
  g.shifts = c.shifts.empty() ? nullptr : c.shifts.data();
  const bool first = generator() % 4, second = !first || generator() % 2;
  g.out = first ? result.data.get() : nullptr;
  g.out2 = second ? result2.data.get() : nullptr;
  g.scale2 = scale.floats();
  g.shift2 = shift.floats();
  g.low2 = generator() % 2 ? 0 : -INFINITY;
  g.batch = c.batch;
  g.rows_in = c.rows_in;
  g.rows_out = rows_out;
  g.residual_size = c.residual_size;
  g.in_channels = c.in();
  g.out_channels = out;
  g.channel_groups = c.groups;
  g.num_taps = c.taps;
  g.num_groups = c.sizes.size() / 2;
  g.residual_channels = c.residual_channels;
  g.activation = pick({kNone, kRelu, kRelu6, kLeaky});
  g.slope = g.activation == kLeaky ? slope.floats() : nullptr;
  g.quantised = &maps;
  Cut cut = kernels.cut(&g, pick({1, 2, 16}));
  if (generator() % 2) cut = Cut{pick({1, 2, 7}), pick({1, 3, 50})};
  run_parts(kernels, g, cut);

  const int32_t *index = g.index, *row = g.rows, *taps = g.taps;
  for (int64_t group = 0; group < g.num_groups; ++group) {
    const int64_t positions = g.groups[2 * group], used = g.groups[2 * group + 1];
    for (int64_t i = 0; i < c.batch * positions * out; ++i) {
      const int64_t n = i / (positions * out), p = i / out % positions, o = i % out;
      int64_t sum = 0;
      for (int64_t t = 0; t < used; ++t) {
        const int64_t from = index[p * used + t];
        for (int64_t k = 0; from >= 0 && k < c.in_per; ++k) {
          const int64_t value = x.data[(n * c.rows_in + from) * c.in() + o / c.out_per * c.in_per + k];
          sum += (value - maps.x.zero) * int8_t(weight.data[o * output + k * c.taps + taps[t]]);
        }
      }
      float value = apart(float(sum) * multiplier[o]);
      if (g.bias) value += bias[o];
      if (o < c.residual_channels) {
        value += real_of(residual, maps.residual,
                         (n * c.residual_size + c.residual_row(row[p])) * c.residual_channels + o);
      }
      if (g.activation == kLeaky) value = value > 0 ? value : value * slope[o];
      else if (g.activation != kNone && value < 0) value = 0;
      if (g.activation == kRelu6 && value > 6) value = 6;
      const int64_t at = (n * rows_out + row[p]) * out + o;
      if (first) compare(name + " out", found(result, maps.out, at), stored(value, maps.out), 0, 0);
      float value2 = apart(value * scale[o]);
      value2 += shift[o];
      if (value2 < g.low2) value2 = g.low2;
      if (second) compare(name + " out2", found(result2, maps.out2, at), stored(value2, maps.out2), 0, 0);
    }
    index += positions * used;
    row += positions;
    taps += used;
  }
}

void check_bytes_mean(const std::string& name, const ForwardKernels& kernels) {
  const int64_t channels = pick({1, 3, 16, 17, 64, 100}), batch = pick({0, 1, 3}), rows_in = 30;
  const int32_t taps = int32_t(pick({1, 4, 9})), positions = int32_t(pick({1, 5, 40}));
  Quantised maps{random_grid(true), random_grid(true), random_grid(generator() % 2), random_grid(true), nullptr};
  Bytes x(batch * rows_in * channels), result = poisoned(batch * positions * channels, maps.out);
  x.randomise();
  std::vector<int32_t> index(positions * taps), rows(positions), tap_list(taps), sizes{positions, taps};
  for (int32_t& row : index) row = int32_t(generator() % (rows_in + 1)) - 1;
  std::iota(rows.rbegin(), rows.rend(), 0);
  GatherGemm g{};
  g.x = x.data.get();
  g.out = result.data.get();
  g.index = index.data();
  g.rows = rows.data();
  g.taps = tap_list.data();
  g.groups = sizes.data();
  g.batch = batch;
  g.rows_in = rows_in;
  g.rows_out = positions;
  g.in_channels = g.out_channels = int32_t(channels);
  g.channel_groups = g.num_groups = 1;
  g.num_taps = taps;
  g.quantised = &maps;
  const Cut cut{1, pick({1, 3})};
  for (int64_t part = cut.positions; part-- > 0;) kernels.run(&g, cut, part);
  for (int64_t i = 0; i < batch * positions * channels; ++i) {
    const int64_t n = i / channels / positions, p = i / channels % positions, ch = i % channels;
    int64_t sum = 0, count = 0;
    for (int32_t t = 0; t < taps; ++t) {
      const int32_t from = index[p * taps + t];
      if (from >= 0) sum += x.data[(n * rows_in + from) * channels + ch] - maps.x.zero, ++count;
    }
    const float share = maps.x.scale / float(std::max<int64_t>(1, count));
    const int64_t at = (n * positions + rows[p]) * channels + ch;
    compare(name + " mean", found(result, maps.out, at), stored(float(sum) * share, maps.out), 0, 0);
  }
}

void check_bytes_around(const std::string& name, const Int8Kernels& int8) {
  // maxima of windows
  const int64_t channels = pick({1, 15, 16, 33, 64, 130}), batch = pick({0, 1, 3}), rows_in = 20;
  const int64_t windows = pick({1, 6, 30}), parts = pick({1, 2, 5});
  std::vector<int32_t> starts{0}, index;
  for (int64_t p = 0; p < windows; ++p) {
    for (int64_t k = pick({0, 1, 4, 9}); k > 0; --k) index.push_back(int32_t(generator() % rows_in));
    starts.push_back(int32_t(index.size()));
  }
  index.shrink_to_fit();
  Bytes x(batch * rows_in * channels), most(batch * windows * channels);
  x.randomise();
  std::memset(most.data.get(), 0xff, most.count);
  const Windows w{x.data.get(), index.data(), starts.data(), most.data.get(), batch, rows_in, windows, channels};
  for (int64_t part = parts; part-- > 0;) int8.max(&w, part, parts);
  for (int64_t i = 0; i < most.count; ++i) {
    const int64_t n = i / channels / windows, p = i / channels % windows;
    int want = 0;
    for (int32_t e = starts[p]; e < starts[p + 1]; ++e) {
      want = std::max<int>(want, x.data[(n * rows_in + index[e]) * channels + i % channels]);
    }
    compare(name + " max", most.data[i], want, 0, 0);
  }
  // each value by itself, between maps of any types
  const int64_t rows = pick({0, 1, 7}), added = pick({0, 1, (channels + 1) / 2, channels});
  Quantised maps{random_grid(generator() % 2), random_grid(generator() % 2), random_grid(generator() % 2),
                 random_grid(true), nullptr};
  const Bytes from = random_map(batch * rows * channels, maps.x), other = random_map(batch * rows * added, maps.residual);
  Bytes to = poisoned(batch * rows * channels, maps.out);
  Array scale(channels, false), shift(channels, false);
  GatherGemm g{};
  g.x = from.data.get();
  g.out = to.data.get();
  g.residual = added ? other.data.get() : nullptr;
  g.residual_channels = int32_t(added);
  g.scale2 = generator() % 2 ? scale.floats() : nullptr;
  g.shift2 = generator() % 2 ? shift.floats() : nullptr;
  g.batch = batch;
  g.rows_in = g.rows_out = rows;
  g.in_channels = g.out_channels = int32_t(channels);
  g.activation = pick({kNone, kRelu});
  g.quantised = &maps;
  for (int64_t part = parts; part-- > 0;) int8.pointwise(&g, part, parts);
  for (int64_t i = 0; i < batch * rows * channels; ++i) {
    const int64_t ch = i % channels;
    float value = real_of(from, maps.x, i);
    if (g.scale2) value = apart(value * scale[ch]);
    if (g.shift2) value += shift[ch];
    if (ch < added) value += real_of(other, maps.residual, i / channels * added + ch);
    if (g.activation == kRelu && value < 0) value = 0;
    compare(name + " pointwise", found(to, maps.out, i), stored(value, maps.out), 0, 0);
  }
}

void check_bytes_fill(const std::string& name, const Int8Kernels& int8) {
  const int64_t batch = pick({0, 1, 3}), rows_in = pick({1, 7, 40}), positions = pick({0, 1, 5, 30});
  const int64_t channels = pick({1, 3, 15, 16, 17, 64, 100, 260}), taps = pick({0, 1, 2, 5}), count = pick({1, 3});
  const int64_t stride = std::max<int64_t>(taps, 1), parts = pick({1, 2, 5});
  const int64_t added = pick({0, (channels + 1) / 2, channels}), rows_added = pick({1, 9, 30});
  Quantised maps{random_grid(true), random_grid(generator() % 2), random_grid(generator() % 4), random_grid(generator() % 2),
                 nullptr};
  Bytes x(batch * rows_in * channels);
  x.randomise();
  Array weight(count * taps * channels, false), bias(count * channels, false), slope(channels, false);
  Array scale(channels, false), shift(channels, false);
  const Bytes residual = random_map(batch * rows_added * added, maps.residual);
  Bytes result = poisoned(batch * positions * channels, maps.out), result2 = poisoned(batch * positions * channels, maps.out2);
  std::vector<int32_t> index, kinds, from;
  for (int64_t p = 0; p < positions; ++p) {
    kinds.push_back(int32_t(generator() % (count + 1)) - 1);
    from.push_back(int32_t(generator() % rows_added));
    for (int64_t t = 0; t < stride; ++t) index.push_back(int32_t(generator() % (rows_in + 1)) - 1);
    if (kinds.back() < 0) index[p * stride] = generator() % rows_in;
  }
  index = exact(index), kinds = exact(kinds), from = exact(from);
  GatherGemm g{};
  g.x = x.data.get();
  g.weight = weight.floats();
  g.bias = generator() % 2 ? bias.floats() : nullptr;
  g.residual = added ? residual.data.get() : nullptr;
  g.residual_rows = from.data();
  g.residual_size = rows_added;
  g.residual_channels = int32_t(added);
  g.index = index.data();
  g.rows = kinds.data();
  const bool first = generator() % 4, second = !first || generator() % 2;
  g.out = first ? result.data.get() : nullptr;
  g.out2 = second ? result2.data.get() : nullptr;
  g.scale2 = scale.floats();
  g.shift2 = shift.floats();
  g.low2 = generator() % 2 ? 0 : -INFINITY;
  g.batch = batch;
  g.rows_in = rows_in;
  g.rows_out = positions;
  g.in_channels = g.out_channels = int32_t(channels);
  g.num_taps = int32_t(taps);
  g.activation = pick({kNone, kRelu, kRelu6, kLeaky});
  g.slope = g.activation == kLeaky ? slope.floats() : nullptr;
  g.quantised = &maps;
  for (int64_t part = parts; part-- > 0;) int8.fill(&g, part, parts);
  for (int64_t i = 0; i < batch * positions * channels; ++i) {
    const int64_t c = i % channels, p = i / channels % positions, n = i / channels / positions;
    const auto at = [&](int64_t t) {
      return float(x.data[(n * rows_in + index[p * stride + t]) * channels + c] - maps.x.zero);
    };
    float value = 0;
    if (kinds[p] < 0) value = apart(at(0) * maps.x.scale);
    else {
      if (g.bias) value = bias[kinds[p] * channels + c];
      for (int64_t t = 0; t < taps; ++t) {
        if (index[p * stride + t] >= 0) value += apart(float(weight[(kinds[p] * taps + t) * channels + c]) * at(t));
      }
    }
    if (c < added) value += real_of(residual, maps.residual, (n * rows_added + from[p]) * added + c);
    if (g.activation == kLeaky) value = value > 0 ? value : apart(value * slope[c]);
    else if (g.activation != kNone && value < 0) value = 0;
    if (g.activation == kRelu6 && value > 6) value = 6;
    if (first) compare(name + " out", found(result, maps.out, i), stored(value, maps.out), 0, 0);
    float value2 = apart(value * scale[c]);
    value2 += shift[c];
    if (value2 < g.low2) value2 = g.low2;
    if (second) compare(name + " out2", found(result2, maps.out2, i), stored(value2, maps.out2), 0, 0);
  }
}
