// The decoder around its linear layers: norms, rotary embedding, attention, activation, embedding rows.
// Included by kernels_impl.h only.
#pragma once
#include <cmath>

#include "kernels.h"
#include "select_impl.h"
#include "vec.h"

namespace LT_NS {

using lowtide::HeadCache;
using lowtide::padded_head;
using lowtide::Tiling;

static void rmsnorm(const float *x, const float *gain, int64_t n, float eps, float *y) {
  f32x16 squares{};
  for (int64_t i = 0; i < n; i += 16) {
    const f32x16 v = load_part(x + i, n - i);
    squares = squares + v * v;
  }
  const float scale = 1.0f / std::sqrt(sum_lanes(squares) / (float)n + eps);
  for (int64_t i = 0; i < n; i += 16)
    store_part(y + i, load_part(x + i, n - i) * scale * load_part(gain + i, n - i), n - i);
}

static void swiglu(const float *gate, const float *up, int64_t n, float *y) {
  for (int64_t i = 0; i < n; i += 16) {
    const f32x16 v = load_part(gate + i, n - i);
    store_part(y + i, v / (1.0f + exponential(-v)) * load_part(up + i, n - i), n - i);
  }
}

static void rope(float *head, const float *cosine, const float *sine, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t n = half - i;
    const f32x16 lo = load_part(head + i, n), hi = load_part(head + half + i, n);
    const f32x16 c = load_part(cosine + i, n), s = load_part(sine + i, n);
    store_part(head + i, lo * c - hi * s, n);
    store_part(head + half + i, hi * c + lo * s, n);
  }
}

// The KV cache of one head holds float16 or int8. Keys lie in blocks of 16 positions, [block][head_dim][16], so that 16
// scores are summed side by side; values in rows, [position][head_dim padded to 16]. int8 rows have a scale each.

static inline f32x16 load_cached(const uint16_t *p) { return load_half(p); }
static inline f32x16 load_cached(const int8_t *p) { return load_bytes(p); }

static inline void cache_row(const float *x, int64_t n, int64_t step, uint16_t *to) {
  for (int64_t d = 0; d < n; ++d) to[d * step] = float_to_half(x[d]);
}
// Returns the scale.
static inline float cache_row(const float *x, int64_t n, int64_t step, int8_t *to) {
  const float m = largest(x, n), inv = m > 0 ? 127.0f / m : 0.0f;
  for (int64_t d = 0; d < n; ++d) to[d * step] = (int8_t)((x[d] * inv + 12582912.0f) - 12582912.0f);
  return m / 127.0f;
}

static void store_kv(const float *k, const float *v, int64_t head_dim, int64_t position, const HeadCache &cache) {
  const int64_t key = position / 16 * 16 * head_dim + position % 16, value = position * padded_head(head_dim);
  if (cache.key_scale) {
    cache.key_scale[position] = cache_row(k, head_dim, 16, (int8_t *)cache.keys + key);
    cache.value_scale[position] = cache_row(v, head_dim, 1, (int8_t *)cache.values + value);
  } else {
    cache_row(k, head_dim, 16, (uint16_t *)cache.keys + key);
    cache_row(v, head_dim, 1, (uint16_t *)cache.values + value);
  }
}

// Softmax over n scores in place (scores beyond n, up to a multiple of 16, become 0); returns 1 / sum.
static float softmax(float *score, int64_t n) {
  for (int64_t i = n; i % 16; ++i) score[i] = -1e30f;
  f32x16 top = splat(-1e30f), total{};
  for (int64_t i = 0; i < n; i += 16) top = maximum(top, load(score + i));
  const f32x16 m = splat(max_lanes(top));
  for (int64_t i = 0; i < n; i += 16) {
    const f32x16 e = exponential(load(score + i) - m);
    store(score + i, e);
    total = total + e;
  }
  float lane[16];
  store(lane, total);
  for (int64_t i = n; i % 16; ++i) {
    lane[i % 16] = lane[i % 16] - score[i];
    score[i] = 0;
  }
  return 1.0f / sum_lanes(load(lane));
}

// The queries of several tokens and heads that share a cache: token i attends to the first n + i positions.
struct Queries {
  const float *queries;  // [tokens, stride] from the first of these heads on
  float *out;            // the same
  int64_t stride, heads, head_dim, n;
  int64_t offset(int64_t i) const { return i / heads * stride + i % heads * head_dim; }
  int64_t positions(int64_t i) const { return n + i / heads; }
};

// Queries [first, first + kGroup), counted through the tokens' heads, share the cache's loads.
template <int kGroup, typename Cached>
static void attend(const Queries &q, int64_t first, const HeadCache &cache, float *scratch) {
  const Cached *keys = (const Cached *)cache.keys, *values = (const Cached *)cache.values;
  const int64_t head_dim = q.head_dim, common = q.positions(first), most = q.positions(first + kGroup - 1);
  const int64_t stride = (most + 15) / 16 * 16, row = padded_head(head_dim);
  const float scale = 1.0f / std::sqrt((float)head_dim);
  const float *query[kGroup];
  for (int g = 0; g < kGroup; ++g) query[g] = q.queries + q.offset(first + g);
  for (int64_t t = 0; t < most; t += 16) {
    f32x16 acc[kGroup] = {};
    for (int64_t d = 0; d < head_dim; ++d) {
      const f32x16 k = load_cached(keys + t * head_dim + d * 16);
      for (int g = 0; g < kGroup; ++g) acc[g] = acc[g] + k * query[g][d];
    }
    const f32x16 unit = cache.key_scale ? load(cache.key_scale + t) * scale : splat(scale);
    for (int g = 0; g < kGroup; ++g) store(scratch + g * stride + t, acc[g] * unit);
  }
  float inverse[kGroup];
  for (int g = 0; g < kGroup; ++g) {
    const int64_t n = q.positions(first + g);
    inverse[g] = softmax(scratch + g * stride, n);
    if (cache.value_scale)
      for (int64_t t = 0; t < n; t += 16)
        store(scratch + g * stride + t, load(scratch + g * stride + t) * load(cache.value_scale + t));
  }
  for (int64_t d = 0; d < head_dim; d += 16) {
    f32x16 acc[kGroup] = {};
    for (int64_t t = 0; t < common; ++t) {
      const f32x16 v = load_cached(values + t * row + d);
      for (int g = 0; g < kGroup; ++g) acc[g] = acc[g] + v * scratch[g * stride + t];
    }
    alignas(64) float sums[kGroup * 16];
    for (int g = 0; g < kGroup; ++g) store(sums + g * 16, acc[g]);
    for (int g = 0; g < kGroup; ++g) {
      f32x16 sum = load(sums + g * 16);
      for (int64_t t = common; t < q.positions(first + g); ++t)
        sum = sum + load_cached(values + t * row + d) * scratch[g * stride + t];
      store_part(q.out + q.offset(first + g) + d, sum * inverse[g], head_dim - d);
    }
  }
}

#if defined(__AVX512F__)
constexpr int kTogether = lowtide::kQueries;
#else
constexpr int kTogether = 4;  // as many sums as there are registers for
#endif

template <int kGroup, typename Cached>
static void attend_some(const Queries &q, int64_t first, int64_t count, const HeadCache &cache, float *scratch) {
  if (count == kGroup) return attend<kGroup, Cached>(q, first, cache, scratch);
  if constexpr (kGroup > 1) attend_some<kGroup - 1, Cached>(q, first, count, cache, scratch);
}

static void attention(const float *queries, int64_t tokens, int64_t stride, int64_t heads, int64_t head_dim,
                      const HeadCache &cache, int64_t n, float *scratch, float *out) {
  const Queries q{queries, out, stride, heads, head_dim, n};
  for (int64_t i = 0; i < tokens * heads; i += kTogether) {
    const int64_t count = tokens * heads - i < kTogether ? tokens * heads - i : kTogether;
    if (cache.key_scale) {
      attend_some<kTogether, int8_t>(q, i, count, cache, scratch);
    } else {
      attend_some<kTogether, uint16_t>(q, i, count, cache, scratch);
    }
  }
}

static void embed(const lt_group &g, const lt_linear &l, int64_t row, float *y) {
  const Tiling t(l.out);
  const int64_t index = row < t.wide * 256 ? row / 256 : t.wide + (row - t.wide * 256) / 64;
  const int64_t bytes = t.width(index) / 4, inside = row - t.first(index), run = t.run_bytes(), plane = run * g.in;
  const uint8_t *base = l.weight + t.byte_offset(index) + inside % bytes;
  const int shift = (int)(inside / bytes) * 2;
  const int64_t middle = lowtide::doubled_centre(g);
  const float unit = std::ldexp(1.0f, -2 * (int)(g.slices - 1)) * 0.5f, r = half_to_float(l.row_scale[row]);
  for (int64_t j = 0; j < g.in; ++j) {
    int64_t code = 0;
    for (int64_t s = 0; s < g.slices; ++s) code = code * 4 + ((base[s * plane + j * run] >> shift) & 3);
    y[j] = (float)(2 * code - middle) * unit * half_to_float(g.col_scale[j]) * r;
  }
  int64_t column = 0;
  for (int64_t e = l.outlier_ptr[index]; e < l.outlier_ptr[index + 1]; ++e) {
    column += l.outlier_gap[e];
    // A filler carries no weight: its value is 0, and a real outlier never is.
    if (l.outlier_row[e] == inside && l.outlier_value[e] & 0x7fff) y[column] = half_to_float(l.outlier_value[e]);
  }
  for (int64_t e = 0; e < g.exact_count; ++e) y[g.exact_channels[e]] = half_to_float(l.exact[e * l.out + row]);
}

}  // namespace LT_NS
