// Every kernel but the digit product, in one source that each instruction set compiles for itself.
//
// The including file defines LT_NS (its namespace), and provides in it
//   digits(base, offset, coef, n, ahead, wide, narrow, acc)
// which sums coef * digit over n entries (a multiple of 4) for `wide` tiles of 256 rows and then `narrow` tiles of 64,
// asking memory for entries `ahead` places later as it goes; and
//   in_order(acc, tile, wide, out)
// which gives the 256 (64) sums of one of those tiles in the order of its rows.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "vec.h"

namespace LT_NS {

using lowtide::Kernels;
using lowtide::kAhead;
using lowtide::kAheadBytes;
using lowtide::kBlock;
using lowtide::padded_head;
using lowtide::Selection;
using lowtide::Tiling;

// ---- which channels are read -------------------------------------------------------------------------------

static void scores(const lt_group &g, const float *x, bool weighted, float *score) {
  for (int64_t j = 0; j < g.in; j += 16) {
    const int64_t n = g.in - j;
    f32x16 v = absolute(load_part(x + j, n) - load_half_part(g.mean + j, n));
    if (weighted) v = v * load_half_part(g.importance + j, n);
    store_part(score + j, v, n);
  }
  for (int64_t e = 0; e < g.exact_count; ++e) score[g.exact_channels[e]] = 0;
}

// Appends the lanes of each level to that level's list.
static inline void append(Selection &s, int64_t j, int64_t n, f32x16 value, f32x16 score, const float *thresholds) {
#if defined(__AVX512F__)
  const __m512i channel = _mm512_add_epi32(_mm512_set1_epi32((int)j), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9,
                                                                                       10, 11, 12, 13, 14, 15));
  __mmask16 above = n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1);
  for (int l = 0; l <= s.slices; ++l) {
    const __mmask16 next =
        l < s.slices ? _mm512_mask_cmp_ps_mask(above, (__m512)score, _mm512_set1_ps(thresholds[l]), _CMP_GT_OQ) : 0;
    const __mmask16 here = above & ~next;
    if (l && here) {
      int64_t &count = s.level_count[l];
      _mm512_storeu_si512(s.level_channel[l].data() + count, _mm512_maskz_compress_epi32(here, channel));
      _mm512_storeu_ps(s.level_value[l].data() + count, _mm512_maskz_compress_ps(here, (__m512)value));
      count += __builtin_popcount(here);
    }
    above = next;
  }
#else
  float sc[16], va[16];
  store(sc, score);
  store(va, value);
  for (int64_t i = 0; i < (n < 16 ? n : 16); ++i) {
    int l = 0;
    while (l < s.slices && sc[i] > thresholds[l]) ++l;
    if (!l) continue;
    int64_t &count = s.level_count[l];
    s.level_channel[l][count] = (uint32_t)(j + i);
    s.level_value[l][count] = va[i];
    ++count;
  }
#endif
}

static float largest(const float *v, int64_t n) {
  f32x16 m{};
  for (int64_t i = 0; i < n; i += 16) m = maximum(m, absolute(load_part(v + i, n - i)));
  return max_lanes(m);
}

// Quantises one (level, slice) list to int8 with its class' factor and adds it to the entries.
static int32_t emit(Selection &s, int level, int slice, float inv, int64_t entry) {
  const int64_t n = s.level_count[level];
  const float quarter = std::ldexp(1.0f, -2 * slice);
  const float *value = s.level_value[level].data();
  std::memcpy(s.channel.data() + entry, s.level_channel[level].data(), (size_t)n * 4);
  std::memset(s.slice.data() + entry, slice, (size_t)n);
  int8_t *coef = s.coef.data() + entry;
  const f32x16 magic = splat(12582912.0f);
  i32x16 total{};
  for (int64_t i = 0; i < n; i += 16) {
    const f32x16 u = load_part(value + i, n - i) * quarter;
    const i32x16 q = (i32x16)(u * inv + magic) - 0x4b400000;
    total += q;
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *)(coef + i), _mm512_cvtepi32_epi8((__m512i)q));
#else
    int32_t lanes[16];
    std::memcpy(lanes, &q, 64);
    for (int64_t k = 0; k < (n - i < 16 ? n - i : 16); ++k) coef[i + k] = (int8_t)lanes[k];
#endif
  }
  int32_t lanes[16], sum = 0;
  std::memcpy(lanes, &total, 64);
  for (int k = 0; k < 16; ++k) sum += lanes[k];
  return sum;
}

static void make_classes(Selection &s) {
  int64_t entry = 0;
  for (int k = 0; k < s.slices; ++k) {
    float m = 0;
    for (int slice = 0; k + slice < s.slices; ++slice) {
      const int level = k + slice + 1;
      const float v = largest(s.level_value[level].data(), s.level_count[level]) * std::ldexp(1.0f, -2 * slice);
      m = v > m ? v : m;
    }
    s.class_begin[k] = entry;
    s.class_sum[k] = 0;
    s.class_scale[k] = 0;
    if (m > 0) {
      const float inv = 127.0f / m;
      s.class_scale[k] = m / 127.0f * 0.5f;
      for (int slice = 0; k + slice < s.slices; ++slice) {
        s.class_sum[k] += emit(s, k + slice + 1, slice, inv, entry);
        entry += s.level_count[k + slice + 1];
      }
      for (; entry % 4; ++entry) {  // padding reads a line that is read anyway and adds nothing
        s.channel[entry] = s.channel[entry - 1];
        s.slice[entry] = s.slice[entry - 1];
        s.coef[entry] = 0;
      }
    }
  }
  s.class_begin[s.slices] = entry;
}

static void select(const lt_group &g, const float *x, const float *score, const float *thresholds, Selection &s) {
  s.in = g.in;
  s.slices = g.slices;
  std::memset(s.level_count, 0, sizeof s.level_count);
  f32x16 shrink[LT_MAX_SLICES + 1];
  for (int l = 1; l <= g.slices; ++l) shrink[l] = splat(g.shrink[l - 1]);
  for (int64_t j = 0; j < g.in; j += 16) {
    const int64_t n = g.in - j;
    const f32x16 a = load_part(x + j, n) - load_half_part(g.mean + j, n);
    store_part(s.a.data() + j, a, n);
    const f32x16 sc = score ? load_part(score + j, n) : absolute(a) * load_half_part(g.importance + j, n);
    f32x16 factor{};
    for (int l = 1; l <= g.slices; ++l) factor = sc > splat(thresholds[l - 1]) ? shrink[l] : factor;
    append(s, j, n, a * load_half_part(g.col_scale + j, n) * factor, sc, thresholds);
  }
  make_classes(s);
}

// ---- the graded product ------------------------------------------------------------------------------------

static void add(const float *x, int64_t n, float *y) {
  for (int64_t i = 0; i < n; i += 16) store_part(y + i, load_part(y + i, n - i) + load_part(x + i, n - i), n - i);
}

static void outliers(const lt_linear &l, int64_t tile, const float *a, float *y) {
  int64_t column = 0;
  const int64_t end = l.outlier_ptr[tile + 1];
  for (int64_t e = l.outlier_ptr[tile]; e < end; e += 16) {
    const int64_t n = end - e < 16 ? end - e : 16;
    float value[16];
    store(value, load_half_part(l.outlier_value + e, n));
    for (int64_t i = 0; i < n; ++i) {
      column += l.outlier_gap[e + i];
      float &out = y[l.outlier_row[e + i]];
      out = out + value[i] * a[column];
    }
  }
}

static void scale_and_correct(const lt_group &g, const lt_linear &l, int64_t tile, const float *a, float *y) {
  const Tiling t(l.out);
  const int64_t first = t.first(tile), rows = t.rows(tile);
  for (int64_t i = 0; i < rows; i += 16)
    store_part(y + i, load_part(y + i, rows - i) * load_half_part(l.row_scale + first + i, rows - i) +
                          load_half_part(l.bias + first + i, rows - i), rows - i);
  outliers(l, tile, a, y);
  for (int64_t e = 0; e < g.exact_count; ++e) {
    const float x = a[g.exact_channels[e]];
    const uint16_t *column = l.exact + e * l.out + first;
    for (int64_t i = 0; i < rows; i += 16)
      store_part(y + i, load_part(y + i, rows - i) + load_half_part(column + i, rows - i) * x, rows - i);
  }
}

static void tiles(const lt_group &g, const lt_linear &l, const Selection &s, int64_t begin, int64_t end,
                  bool accumulate, int32_t *acc, float *y) {
  const Tiling t(l.out);
  const int64_t wide = (end < t.wide ? end : t.wide) - begin > 0 ? (end < t.wide ? end : t.wide) - begin : 0;
  const int64_t narrow = end - begin - wide, bytes = wide * 64 + narrow * 16;
  const uint8_t *base = l.weight + t.byte_offset(begin);
  int64_t ahead = kAheadBytes / (bytes * kBlock) + 1;
  if (ahead > kAhead) ahead = kAhead;
  alignas(64) float sum[lowtide::kPassTiles * 256];
  std::memset(sum, 0, (size_t)bytes * 16);
  for (int k = 0; k < s.slices; ++k) {
    const int64_t first = s.class_begin[k], n = s.class_begin[k + 1] - first;
    if (!n) continue;
    digits(base, s.offset.data() + first, s.coef.data() + first, n, ahead * kBlock, wide, narrow, acc);
    const i32x16 shift = splat_int(3 * s.class_sum[k]);
    const f32x16 scale = splat(s.class_scale[k]);
    float *to = sum;
    for (int64_t i = 0; i < end - begin; ++i) {
      const int64_t width = i < wide ? 256 : 64;
      alignas(64) int32_t rows[256];
      in_order(acc, i, wide, rows);
      for (int64_t r = 0; r < width; r += 16) {
        i32x16 v;
        std::memcpy(&v, rows + r, 64);
        store(to + r, load(to + r) + __builtin_convertvector(2 * v - shift, f32x16) * scale);
      }
      to += width;
    }
  }
  float *from = sum;
  for (int64_t i = begin; i < end; ++i) {
    scale_and_correct(g, l, i, s.a.data(), from);
    float *to = y + t.first(i) - t.first(begin);
    if (accumulate) {
      add(from, t.rows(i), to);
    } else {
      std::memcpy(to, from, (size_t)t.rows(i) * 4);
    }
    from += t.width(i);
  }
}

// ---- the rest of the decoder -------------------------------------------------------------------------------

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

static void store_kv(const float *k, const float *v, int64_t head_dim, int64_t position, uint16_t *keys,
                     uint16_t *values) {
  uint16_t *block = keys + position / 16 * 16 * head_dim + position % 16;
  uint16_t *row = values + position * padded_head(head_dim);
  for (int64_t d = 0; d < head_dim; ++d) {
    block[d * 16] = float_to_half(k[d]);
    row[d] = float_to_half(v[d]);
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
  for (int64_t i = n; i % 16; ++i) {
    total[i % 16] = total[i % 16] - score[i];
    score[i] = 0;
  }
  return 1.0f / sum_lanes(total);
}

template <int kGroup>
static void attend(const float *queries, int64_t head_dim, const uint16_t *keys, const uint16_t *values, int64_t n,
                   float *scratch, float *out) {
  const int64_t stride = (n + 15) / 16 * 16, row = padded_head(head_dim);
  const float scale = 1.0f / std::sqrt((float)head_dim);
  for (int64_t t = 0; t < n; t += 16) {
    f32x16 acc[kGroup] = {};
    for (int64_t d = 0; d < head_dim; ++d) {
      const f32x16 k = load_half(keys + t * head_dim + d * 16);
      for (int g = 0; g < kGroup; ++g) acc[g] = acc[g] + k * queries[g * head_dim + d];
    }
    for (int g = 0; g < kGroup; ++g) store(scratch + g * stride + t, acc[g] * scale);
  }
  float inverse[kGroup];
  for (int g = 0; g < kGroup; ++g) inverse[g] = softmax(scratch + g * stride, n);
  for (int64_t d = 0; d < head_dim; d += 16) {
    f32x16 acc[kGroup] = {};
    for (int64_t t = 0; t < n; ++t) {
      const f32x16 v = load_half(values + t * row + d);
      for (int g = 0; g < kGroup; ++g) acc[g] = acc[g] + v * scratch[g * stride + t];
    }
    for (int g = 0; g < kGroup; ++g) store_part(out + g * head_dim + d, acc[g] * inverse[g], head_dim - d);
  }
}

static void attention(const float *queries, int64_t group, int64_t head_dim, const uint16_t *keys,
                      const uint16_t *values, int64_t n, float *scratch, float *out) {
  while (group > 0) {  // heads that share a cache share its loads, up to four at a time
    const int64_t step = group >= 4 ? 4 : group;
    switch (step) {
      case 1: attend<1>(queries, head_dim, keys, values, n, scratch, out); break;
      case 2: attend<2>(queries, head_dim, keys, values, n, scratch, out); break;
      case 3: attend<3>(queries, head_dim, keys, values, n, scratch, out); break;
      default: attend<4>(queries, head_dim, keys, values, n, scratch, out);
    }
    queries += step * head_dim;
    out += step * head_dim;
    group -= step;
  }
}

static void embed(const lt_group &g, const lt_linear &l, int64_t row, float *y) {
  const Tiling t(l.out);
  const int64_t index = row < t.wide * 256 ? row / 256 : t.wide + (row - t.wide * 256) / 64;
  const int64_t bytes = t.width(index) / 4, inside = row - t.first(index), run = t.run_bytes(), plane = run * g.in;
  const uint8_t *base = l.weight + t.byte_offset(index) + inside % bytes;
  const int shift = (int)(inside / bytes) * 2;
  const int64_t middle = (((int64_t)1 << (2 * g.slices)) - 1);
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

// ---- prefill -----------------------------------------------------------------------------------------------

static void quantise(const lt_group &g, const float *x, float *a, int8_t *q, float *scale, int32_t *sum) {
  const f32x16 shrink = splat(g.shrink[g.slices - 1]), magic = splat(12582912.0f);
  for (int64_t j = 0; j < g.in; j += 16)
    store_part(a + j, load_part(x + j, g.in - j) - load_half_part(g.mean + j, g.in - j), g.in - j);
  for (int64_t from = 0; from < g.in; from += lowtide::kDepth, ++scale, ++sum, q += lowtide::kDepth) {
    alignas(64) float value[lowtide::kDepth];
    for (int64_t i = 0; i < lowtide::kDepth; i += 16) {
      const int64_t j = from + i, n = g.in - j;
      store(value + i, n > 0 ? load_part(a + j, n) * load_half_part(g.col_scale + j, n) * shrink : f32x16{});
    }
    for (int64_t e = 0; e < g.exact_count; ++e) {
      const int64_t i = g.exact_channels[e] - from;
      if (i >= 0 && i < lowtide::kDepth) value[i] = 0;
    }
    const float m = largest(value, lowtide::kDepth), inv = m > 0 ? 127.0f / m : 0.0f;
    int32_t rounded[lowtide::kDepth], total = 0;
    for (int64_t i = 0; i < lowtide::kDepth; i += 16) {
      const i32x16 v = (i32x16)(load(value + i) * inv + magic) - 0x4b400000;
      std::memcpy(rounded + i, &v, 64);
    }
    for (int64_t i = 0; i < lowtide::kDepth; ++i) q[i] = (int8_t)rounded[i], total += rounded[i];
    *scale = m / 127.0f * 0.5f;
    *sum = total;
  }
}

// 16 codes, one for each row: all slices of one channel put together.
typedef uint8_t u8x16 __attribute__((vector_size(16)));
static inline u8x16 codes(const uint8_t *channel, int64_t plane, int64_t slices, int shift) {
  u8x16 code{};
  for (int64_t s = 0; s < slices; ++s) {
    u8x16 byte;
    std::memcpy(&byte, channel + s * plane, 16);
    code = (code << 2) | ((byte >> shift) & 3);
  }
  return code;
}

#if !defined(LT_OWN_GEMM)
// Products of small integers summed in f32 are exact: any order gives the same bits.
#if defined(__FMA__)
typedef float lanes __attribute__((vector_size(32)));
static inline lanes mul_add(lanes a, lanes b, lanes c) { return (lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
typedef float lanes __attribute__((vector_size(16)));
static inline lanes mul_add(lanes a, lanes b, lanes c) { return a * b + c; }
#endif
constexpr int kLanes = sizeof(lanes) / 4;
// Loads and stores anywhere, in one instruction (a memcpy goes through the stack here).
typedef lanes lanes_anywhere __attribute__((aligned(4), may_alias));

static void unpack(const lt_group &g, const lt_linear &l, int64_t index, int64_t row, int64_t from, void *panel) {
  const Tiling t(l.out);
  const int64_t bytes = t.width(index) / 4, run = t.run_bytes(), plane = run * g.in;
  float *to = (float *)panel;
  for (int64_t j = from; j < from + lowtide::kDepth; ++j, to += 64)
    for (int64_t i = 0; i < 64; i += 16) {
      u8x16 code{};
      if (j < g.in)
        code = codes(l.weight + t.byte_offset(index) + j * run + (row + i) % bytes, plane, g.slices,
                     (int)((row + i) / bytes) * 2);
      store(to + i, __builtin_convertvector(code, f32x16));
    }
}

template <int kRows>
static inline void multiply_rows(const int8_t *q, const float *scale, const int32_t *sum, int64_t blocks,
                                 int32_t middle, const float *panel, float *y) {
  constexpr int kVectors = 2;
  float x[lowtide::kDepth][kRows];
  for (int i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < lowtide::kDepth; ++j) x[j][i] = q[i * blocks * lowtide::kDepth + j];
  for (int column = 0; column < 64; column += kVectors * kLanes) {
    lanes acc[kRows][kVectors] = {};
    for (int64_t j = 0; j < lowtide::kDepth; ++j) {
      const lanes_anywhere *b = (const lanes_anywhere *)(panel + j * 64 + column);
      const lanes b0 = b[0], b1 = b[1];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const lanes broadcast = x[j][i] - lanes{};
        acc[i][0] = mul_add(broadcast, b0, acc[i][0]);
        acc[i][1] = mul_add(broadcast, b1, acc[i][1]);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      lanes_anywhere *to = (lanes_anywhere *)(y + i * 64 + column);
      const float shift = (float)middle * (float)sum[i * blocks];
      for (int v = 0; v < kVectors; ++v) to[v] = to[v] + (2.0f * acc[i][v] - shift) * scale[i * blocks];
    }
  }
}

static void multiply(const int8_t *q, const float *scale, const int32_t *sum, int64_t blocks, int64_t m,
                     int32_t middle, const void *panel, float *y) {
  const float *p = (const float *)panel;
  int64_t i = 0;
  for (; i + 6 <= m; i += 6)
    multiply_rows<6>(q + i * blocks * lowtide::kDepth, scale + i * blocks, sum + i * blocks, blocks, middle, p, y + i * 64);
  for (; i < m; ++i)
    multiply_rows<1>(q + i * blocks * lowtide::kDepth, scale + i * blocks, sum + i * blocks, blocks, middle, p, y + i * 64);
}
#else
static void unpack(const lt_group &g, const lt_linear &l, int64_t index, int64_t row, int64_t from, void *panel);
static void multiply(const int8_t *q, const float *scale, const int32_t *sum, int64_t blocks, int64_t m,
                     int32_t middle, const void *panel, float *y);
#endif

static float sum(const void *p, int64_t bytes) {
  const char *c = (const char *)p;
  i32x16 acc[4] = {};
  for (int64_t i = 0; i + 256 <= bytes; i += 256)
    for (int k = 0; k < 4; ++k) {
      i32x16 v;
      std::memcpy(&v, c + i + k * 64, 64);
      acc[k] = acc[k] ^ v;
    }
  const i32x16 all = acc[0] ^ acc[1] ^ acc[2] ^ acc[3];
  return (float)all[0];
}

static const Kernels kTable = {LT_NAME,   select,   scores, tiles,  rmsnorm, swiglu,            add,      rope,
                               attention, store_kv, embed,  quantise, unpack, multiply, scale_and_correct, sum};

}  // namespace LT_NS
