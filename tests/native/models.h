// Random models of awkward shapes, and policies to read them by. Made of integers and of float operations that are exact
// or correctly rounded, so every machine starts from the same bits.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lowtide.h"

namespace {

struct Random {  // splitmix64
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return (int64_t)(next() % (uint64_t)n); }
  float within(float limit) { return (float)(below(1 << 24) - (1 << 23)) * 0x1p-23f * limit; }
  // A float16 of magnitude [2^(low - 15), 2^(high - 15)); below an exponent of 1 it is subnormal.
  // (One call to a statement: compilers differ in the order they evaluate operands and arguments in.)
  uint16_t half(int low, int high) {
    const int64_t exponent = low + below(high - low);
    return (uint16_t)(exponent << 10 | below(1024));
  }
  uint16_t signed_half(int low, int high) {
    const uint16_t magnitude = half(low, high);
    return (uint16_t)(magnitude | below(2) << 15);
  }
};

struct Shape {
  const char *name;
  int64_t hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, slices, exact;
  int64_t spread;  // mean distance of a tile's outliers, in columns; 0 is none
  bool tied;
  int64_t cache_bits, prompt, centroids;
  bool largest = false;  // digits, coefficients and codes all as large as they get: no sum may overflow
};

// Tiles wide and narrow, matrices of more tiles than one pass takes, gaps between outliers that need fillers, one head
// to ten on one cache, prompts that are no multiple of anything and one over the border of a chunk.
const Shape kShapes[] = {
    {"default", 48, 80, 2, 4, 2, 12, 130, 3, 2, 2, true, 16, 21, 5},
    {"odd", 41, 67, 1, 3, 1, 10, 101, 3, 3, 3, false, 8, 13, 64},
    {"one-slice", 40, 70, 2, 4, 2, 12, 130, 1, 1, 5, false, 16, 21, 1},
    {"two-slices", 33, 300, 1, 2, 1, 16, 259, 2, 0, 1, true, 8, 9, 0},
    {"four-slices", 48, 80, 2, 4, 2, 12, 130, 4, 0, 0, true, 16, 131, 7},
    {"wide-tiles", 320, 700, 1, 5, 1, 64, 577, 3, 2, 400, true, 8, 19, 64},
    {"many-tiles", 20, 24, 1, 2, 1, 10, 6500, 4, 2, 4, true, 16, 3, 3},
    {"grouped-heads", 60, 80, 2, 10, 1, 6, 130, 2, 1, 3, false, 16, 17, 0},
    {"largest", 256, 200, 1, 2, 1, 20, 400, 4, 0, 0, true, 16, 14, 0, true},
};

struct Linear {
  int64_t out;
  std::vector<uint8_t> weight, outlier_row, outlier_gap;
  std::vector<uint16_t> row_scale, bias, exact, outlier_value, base;
  std::vector<uint32_t> outlier_ptr;
  lt_linear view() const {
    return {out,          weight.data(),      row_scale.data(),   bias.data(),         exact.data(),
            outlier_ptr.data(), outlier_row.data(), outlier_gap.data(), outlier_value.data(),
            base.empty() ? nullptr : base.data()};
  }
};

struct Group {
  int64_t in, slices;
  std::vector<uint16_t> mean, col_scale, importance;
  std::vector<float> shrink;
  std::vector<int32_t> exact_channels;
  std::vector<Linear> linear;
  // The importance prediction network: a mix but in the head, a probe in qkv and gate_up.
  int64_t features = 0;
  std::vector<uint16_t> learned;
  std::vector<float> mix, scale, bias, factor;
  std::vector<int8_t> probe;
  // Centroids, and keys that find them in qkv, gate_up and the head.
  int64_t centroids = 0;
  std::vector<uint16_t> middles;
  std::vector<int32_t> channels;
  std::vector<int8_t> keys;
  std::vector<float> key_scale, key_bias;
  lt_group view() const {
    lt_group g{};
    g.in = in, g.slices = slices, g.linear_count = (int64_t)linear.size();
    g.exact_count = (int64_t)exact_channels.size(), g.side_bits = 1000, g.ipn_side_bits = 1100;
    for (auto &centre : g.centre) centre = 3;
    g.mean = mean.data(), g.col_scale = col_scale.data(), g.importance = importance.data();
    g.shrink = shrink.data(), g.exact_channels = exact_channels.data();
    g.ipn_features = features, g.ipn_importance = learned.data();
    if (!mix.empty()) g.ipn_mix = mix.data();
    if (!probe.empty()) g.ipn_probe = probe.data(), g.ipn_scale = scale.data(), g.ipn_bias = bias.data();
    if (!factor.empty()) g.ipn_factor = factor.data();
    g.ipn_centroids = centroids, g.ipn_key_channels = (int64_t)channels.size();
    if (centroids) g.ipn_mean = middles.data();
    if (!keys.empty()) {
      g.ipn_channels = channels.data(), g.ipn_keys = keys.data();
      g.ipn_key_scale = key_scale.data(), g.ipn_key_bias = key_bias.data();
    }
    for (size_t i = 0; i < linear.size(); ++i) g.linear[i] = linear[i].view();
    return g;
  }
};

// Digits of rows that exist; the others stay zero.
std::vector<uint8_t> random_digits(Random &random, const Shape &shape, int64_t in, int64_t out) {
  const int64_t pad = (out + 63) / 64 * 64, wide = pad / 256 * 256;
  std::vector<uint8_t> weight((size_t)(shape.slices * in * pad / 4));
  for (int64_t channel = 0; channel < shape.slices * in; ++channel)
    for (int64_t row = 0; row < out; ++row) {
      const int64_t width = row < wide ? 256 : 64, first = row < wide ? row / 256 * 256 : wide + (row - wide) / 64 * 64;
      const int64_t bytes = width / 4, inside = row - first;
      weight[(size_t)(channel * pad / 4 + first / 4 + inside % bytes)] |=
          (uint8_t)((shape.largest ? 3 : random.below(4)) << (inside / bytes * 2));
    }
  return weight;
}

void add_outliers(Random &random, const Shape &shape, const Group &g, Linear &l) {
  const int64_t pad = (l.out + 63) / 64 * 64, wide = pad / 256, tiles = wide + pad % 256 / 64;
  l.outlier_ptr.push_back(0);
  const auto entry = [&](int64_t row, int64_t gap, uint16_t value) {
    l.outlier_row.push_back((uint8_t)row);
    l.outlier_gap.push_back((uint8_t)gap);
    l.outlier_value.push_back(value);
  };
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile < wide ? tile * 256 : wide * 256 + (tile - wide) * 64, width = tile < wide ? 256 : 64;
    const int64_t rows = l.out - first < width ? l.out - first : width;
    int64_t last = 0;
    for (int64_t column = 0; shape.spread && column < g.in; column += 1 + random.below(2 * shape.spread)) {
      bool exact = false;
      for (int32_t e : g.exact_channels) exact = exact || e == column;
      if (exact) continue;
      for (; column - last > 255; last += 255) entry(0, 255, 0);
      const int64_t row = random.below(rows);
      entry(row, column - last, random.signed_half(10, 14));
      last = column;
    }
    l.outlier_ptr.push_back((uint32_t)l.outlier_row.size());
  }
}

Linear random_linear(Random &random, const Shape &shape, const Group &g, int64_t out) {
  Linear l;
  l.out = out;
  l.weight = random_digits(random, shape, g.in, out);
  for (int64_t i = 0; i < out; ++i) {
    l.row_scale.push_back(random.half(10, 12));
    l.bias.push_back(random.signed_half(9, 13));
  }
  for (size_t i = 0; i < g.exact_channels.size() * (size_t)out; ++i) l.exact.push_back(random.signed_half(10, 14));
  add_outliers(random, shape, g, l);
  return l;
}

Group random_group(Random &random, const Shape &shape, int64_t in, const std::vector<int64_t> &outs) {
  Group g;
  g.in = in;
  g.slices = shape.slices;
  for (int64_t j = 0; j < in; ++j) {
    const bool tiny = j % 13 == 5;
    g.mean.push_back(tiny ? random.signed_half(0, 1) : random.signed_half(8, 12));
    g.col_scale.push_back(random.half(14, 16));
    g.importance.push_back(tiny ? random.half(0, 1) : random.half(13, 16));
    if (shape.largest) g.mean.back() = 0, g.col_scale.back() = 0x3c00;
  }
  for (int64_t e = 0; e < shape.exact; ++e) {
    const int64_t j = e * in / shape.exact + random.below(in / shape.exact);
    g.exact_channels.push_back((int32_t)j);
    g.mean[(size_t)j] = g.importance[(size_t)j] = 0;
    g.col_scale[(size_t)j] = 0x3c00;
  }
  for (int64_t s = 0; s < g.slices; ++s) g.shrink.push_back(1.0f - 0.03125f * (float)(g.slices - 1 - s));
  for (int64_t out : outs) g.linear.push_back(random_linear(random, shape, g, out));
  return g;
}

// Offsets of some units of log2, a few of them beyond the limit.
void add_ipn(Random &random, int64_t kind, int64_t features, Group &g) {
  for (uint16_t importance : g.importance) g.learned.push_back(importance ? random.half(12, 16) : 0);
  if (kind > 3) return;
  g.features = features;
  if (kind == 0 && features % 2) g.factor = {1.75f, 1.0f, 0.625f};  // q, k and v apart, in some models
  for (int64_t k = 0; k <= features; ++k) g.mix.push_back(random.within(1.0f));
  for (int64_t k = 0; k < features && kind % 2 == 0; ++k) {
    for (int64_t j = 0; j < g.in; ++j) g.probe.push_back((int8_t)(random.below(256) - 128));
    g.scale.push_back(0.0009765625f + random.within(0.0009765625f));
    g.bias.push_back(random.within(0.5f));
  }
}

void add_centroids(Random &random, int64_t kind, int64_t count, Group &g) {
  g.centroids = count;
  for (int64_t k = 0; k < count; ++k)
    for (int64_t j = 0; j < g.in; ++j) {
      const uint16_t mean = random.signed_half(10, 15);
      g.middles.push_back(g.mean[(size_t)j] ? mean : 0);
    }
  for (Linear &l : g.linear)
    for (int64_t i = 0; i < count * l.out; ++i) l.base.push_back(random.signed_half(9, 13));
  if (!count || kind % 2) return;
  const int64_t size = g.in < 80 ? 16 : 64;
  for (int64_t c = 0; c < size; ++c) g.channels.push_back((int32_t)(c * g.in / size));
  for (int64_t i = 0; i < count * size; ++i) g.keys.push_back((int8_t)(random.below(256) - 128));
  for (int64_t k = 0; k < count; ++k) {
    g.key_scale.push_back(0.015625f + random.within(0.0078125f));
    g.key_bias.push_back(random.within(0.5f));
  }
}

struct Model {
  std::vector<Group> groups;
  std::vector<lt_group> views;
  std::vector<std::vector<float>> norms;
  std::vector<const float *> norm_views;
  std::vector<double> inv_freq;
  lt_model model;
  explicit Model(const Shape &s) {
    Random random{(uint64_t)s.hidden * 1000 + (uint64_t)s.slices};
    const int64_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
    for (int64_t layer = 0; layer < s.layers; ++layer) {
      groups.push_back(random_group(random, s, s.hidden, {q, kv, kv}));
      groups.push_back(random_group(random, s, q, {s.hidden}));
      groups.push_back(random_group(random, s, s.hidden, {s.intermediate, s.intermediate}));
      groups.push_back(random_group(random, s, s.intermediate, {s.hidden}));
    }
    for (int i = 0; i < (s.tied ? 1 : 2); ++i) groups.push_back(random_group(random, s, s.hidden, {s.vocab}));
    for (size_t i = 0; i < groups.size(); ++i) {
      const int64_t kind = (int64_t)i < 4 * s.layers ? (int64_t)i % 4 : 4;
      add_ipn(random, kind, 5 + s.hidden % 60, groups[i]);
      if ((int64_t)i <= 4 * s.layers) add_centroids(random, kind, s.centroids, groups[i]);
    }
    for (const Group &g : groups) views.push_back(g.view());
    norms.resize((size_t)(2 * s.layers + 1));
    for (auto &norm : norms)
      for (int64_t i = 0; i < s.hidden; ++i) norm.push_back(s.largest ? 1.0f : 1.0f + random.within(0.25f));
    for (const auto &norm : norms) norm_views.push_back(norm.data());
    for (int64_t i = 0; i < s.head_dim / 2; ++i) inv_freq.push_back(1.0 / (double)(1 + 5 * i * i));
    model = {};
    model.abi_version = LT_ABI_VERSION;
    model.vocab = s.vocab, model.hidden = s.hidden, model.intermediate = s.intermediate, model.layers = s.layers;
    model.heads = s.heads, model.kv_heads = s.kv_heads, model.head_dim = s.head_dim, model.max_context = 160;
    model.tied = s.tied, model.cache_bits = s.cache_bits, model.rms_eps = 0x1p-17;
    model.inv_freq = inv_freq.data(), model.norms = norm_views.data(), model.groups = views.data();
  }
};

constexpr int64_t kRules[] = {LT_CHANNEL_NORM, LT_DENSE, LT_CHANNEL_ABS, LT_TOPK,
                              LT_STATISTICAL_TOPK, LT_GATE, LT_IPN};

struct Policy {
  std::vector<float> params, gains;
  lt_policy policy;
  Policy(int64_t rule, int64_t layers) {
    const float score[4] = {0.125f, 0.5f, 1.125f, 1.875f}, count[4] = {21.5f, 12, 5, 2};
    for (int64_t i = 0; i < (layers * 4 + 1) * LT_MAX_SLICES; ++i) {
      const int64_t s = i % LT_MAX_SLICES;
      params.push_back(rule == LT_TOPK ? count[s] : rule == LT_STATISTICAL_TOPK ? score[s] - 1 : score[s]);
    }
    for (int64_t i = 0; i <= layers * 4; ++i) gains.push_back(0.75f - 0.25f * (float)(i % 4));
    policy = {rule, params.data(), rule == LT_CHANNEL_NORM ? 0.25 : 0.0, gains.data(), 0.5, 1.5f};  // the head twice
  }
};

}  // namespace
