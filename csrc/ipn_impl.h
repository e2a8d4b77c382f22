// The importance prediction network's small part at run time (docs/architecture.md: Importance prediction).
// Included by kernels_impl.h only.
#pragma once
#include <cmath>

#include "kernels.h"
#include "vec.h"

namespace LT_NS {

// kRows features at once share the loads of x; each sums in its own sixteen lanes. Whole vectors only.
template <int kRows>
static inline void probe_sums(const int8_t *row, const float *x, int64_t n, f32x16 (&acc)[kRows]) {
  for (auto &a : acc) a = f32x16{};
  for (int64_t j = 0; j + 16 <= n; j += 16) {
    const f32x16 v = load(x + j);
    for (int k = 0; k < kRows; ++k) acc[k] = acc[k] + load_bytes(row + k * n + j) * v;
  }
}

template <int kRows>
static inline void probe_rows(const lt_group &g, const float *x, int64_t first, float *features) {
  const int8_t *row = g.ipn_probe + first * g.in;
  const int64_t j = g.in / 16 * 16;
  f32x16 acc[kRows];
  probe_sums(row, x, g.in, acc);
  if (const int64_t left = g.in - j) {
    const f32x16 v = load_part(x + j, left);
    for (int k = 0; k < kRows; ++k) acc[k] = acc[k] + load_bytes_part(row + k * g.in + j, left) * v;
  }
  for (int k = 0; k < kRows; ++k) {
    const float value = sum_lanes(acc[k]) * g.ipn_scale[first + k] + g.ipn_bias[first + k];
    features[first + k] = value > 0 ? value : 0.0f;
  }
}

static void probe(const lt_group &g, const float *x, float *features) {
  int64_t k = 0;
  for (; k + 4 <= g.ipn_features; k += 4) probe_rows<4>(g, x, k, features);
  for (; k < g.ipn_features; ++k) probe_rows<1>(g, x, k, features);
}

// How well keys fit, from the first one on: kVectors times sixteen, or with `part` the n that are left of sixteen. The
// channels' parts are added one after the other, every key in a lane of its own: nothing is to be summed over lanes.
template <int kVectors, bool kPart>
static inline void fits(const lt_group &g, const float *picked, int64_t first, int64_t n, float *fit) {
  f32x16 acc[kVectors];
  for (auto &a : acc) a = f32x16{};
  const int8_t *row = g.ipn_keys + first;
  for (int64_t c = 0; c < g.ipn_key_channels; ++c, row += g.ipn_centroids) {
    const f32x16 v = splat(picked[c]);
    for (int k = 0; k < kVectors; ++k)
      acc[k] = acc[k] + (kPart ? load_bytes_part(row, n) : load_bytes(row + k * 16)) * v;
  }
  for (int k = 0; k < kVectors; ++k) {
    const int64_t at = first + k * 16, left = kPart ? n : 16;
    store(fit + k * 16, acc[k] * load_part(g.ipn_key_scale + at, left) + load_part(g.ipn_key_bias + at, left));
  }
}

// The first of the largest; what is not a number counts as the smallest.
static int64_t code(const lt_group &g, const float *x) {
  alignas(64) float picked[LT_MAX_KEY_CHANNELS], fit[64];
  for (int64_t c = 0; c < g.ipn_key_channels; ++c) picked[c] = x[g.ipn_channels[c]];
  float best = -INFINITY;
  int64_t found = 0;
  for (int64_t k = 0, n = 0; k < g.ipn_centroids; k += n) {
    const int64_t left = g.ipn_centroids - k;
    n = left >= 64 ? 64 : left >= 16 ? 16 : left;
    if (n == 64) {
      fits<4, false>(g, picked, k, n, fit);
    } else if (n == 16) {
      fits<1, false>(g, picked, k, n, fit);
    } else {
      fits<1, true>(g, picked, k, n, fit);
      for (int64_t i = n; i < 16; ++i) fit[i] = -INFINITY;
    }
    f32x16 top = splat(-INFINITY);
    for (int64_t i = 0; i < n; i += 16) top = maximum(load(fit + i), top);
    const float most = max_lanes(top);
    if (!(most > best)) continue;  // most blocks: their keys are not looked at one by one
    best = most;
    for (found = k; fit[found - k] != most; ++found) {
    }
  }
  return found;
}

// 2^(-gain * o), o the group's offset.
static float waterline(const lt_group &g, const float *features, float gain) {
  const float limit = 4.0f;
  const int64_t n = g.ipn_features;
  f32x16 acc{};
  for (int64_t k = 0; k < n; k += 16) acc = acc + load_part(g.ipn_mix + k, n - k) * load_part(features + k, n - k);
  float o = sum_lanes(acc) + g.ipn_mix[n];
  o = o > limit ? limit : o;
  o = o < -limit ? -limit : o;
  return exponential(splat(gain * o * -0.6931471805599453f))[0];
}

}  // namespace LT_NS
