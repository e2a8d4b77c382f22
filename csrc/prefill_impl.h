// Prefill: products of int8 inputs with whole codes, unpacked once for many tokens.
// Included by kernels_impl.h only.
#pragma once
#include <cmath>

#include "kernels.h"
#include "select_impl.h"
#include "transpose.h"
#include "vec.h"

namespace LT_NS {

using lowtide::kDepth;
using lowtide::kSide;
using lowtide::Tiling;

static void quantise(const lt_group &g, const float *x, int64_t stride, float *a, int8_t *q, float *scale, float *sum) {
  const f32x16 shrink = splat(g.shrink[g.slices - 1]), magic = splat(12582912.0f);
  for (int64_t j = 0; j < g.in; j += 16)
    store_part(a + j, load_part(x + j, g.in - j) - load_half_part(g.mean + j, g.in - j), g.in - j);
  for (int64_t from = 0; from < g.in; from += kDepth, scale += stride, sum += stride, q += stride * kDepth) {
    alignas(64) float value[kDepth];
    for (int64_t i = 0; i < kDepth; i += 16) {
      const int64_t j = from + i, n = g.in - j;
      store(value + i, n > 0 ? load_part(a + j, n) * load_half_part(g.col_scale + j, n) * shrink : f32x16{});
    }
    for (int64_t e = 0; e < g.exact_count; ++e) {
      const int64_t i = g.exact_channels[e] - from;
      if (i >= 0 && i < kDepth) value[i] = 0;
    }
    const float m = largest(value, kDepth), inv = m > 0 ? 127.0f / m : 0.0f;
    int32_t rounded[kDepth], total = 0;
    for (int64_t i = 0; i < kDepth; i += 16) {
      store_int(rounded + i, bits_of(load(value + i) * inv + magic) - splat_int(0x4b400000));
    }
    for (int64_t i = 0; i < kDepth; ++i) q[i] = (int8_t)rounded[i], total += rounded[i];
    *scale = m / 127.0f;
    *sum = (float)total;
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
typedef float lanes __attribute__((vector_size(16)));
#if defined(__aarch64__)
static inline lanes mul_add(lanes a, lanes b, lanes c) {
  return (lanes)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
static inline lanes mul_add(lanes a, lanes b, lanes c) { return a * b + c; }
#endif
constexpr int kLanes = sizeof(lanes) / 4;
// Loads and stores anywhere, in one instruction (a memcpy goes through the stack here).
typedef lanes lanes_anywhere __attribute__((aligned(4), may_alias));

static void unpack(const lt_group &g, const lt_linear &l, int64_t index, int64_t from, void *panel) {
  const Tiling t(l.out);
  const int64_t width = t.width(index), bytes = width / 4, run = t.run_bytes(), plane = run * g.in;
  for (int64_t j = from; j < from + kDepth; ++j)
    for (int64_t i = 0; i < width; i += 16) {
      u8x16 code{};
      if (j < g.in)
        code = codes(l.weight + t.byte_offset(index) + j * run + i % bytes, plane, g.slices, (int)(i / bytes) * 2);
      float *to = (float *)panel + (i / 64 * kDepth + j - from) * 64 + i % 64;
      store(to, __builtin_convertvector(code, f32x16));
    }
}

template <int kRows>
static inline void multiply_rows(const int8_t *q, const float *scale, const float *sum, float middle,
                                 const float *panel, float *y) {
  constexpr int kVectors = 2;
  float x[kDepth][kRows];
  for (int i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < kDepth; ++j) x[j][i] = q[i * kDepth + j];
  for (int column = 0; column < 64; column += kVectors * kLanes) {
    lanes acc[kRows][kVectors] = {};
    for (int64_t j = 0; j < kDepth; ++j) {
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
      const float shift = middle * sum[i];
      for (int v = 0; v < kVectors; ++v) to[v] = to[v] + (acc[i][v] - shift) * scale[i];
    }
  }
}

static void multiply(const lt_group &g, const int8_t *q, const float *scale, const float *sum, int64_t m, int64_t width,
                     const void *panel, float *y) {
  const float middle = 0.5f * (float)lowtide::doubled_centre(g);
  for (int64_t part = 0; part < width; part += 64, y += m * 64) {
    const float *p = (const float *)panel + part * kDepth;
    int64_t i = 0;
    for (; i + 6 <= m; i += 6) multiply_rows<6>(q + i * kDepth, scale + i, sum + i, middle, p, y + i * 64);
    for (; i < m; ++i) multiply_rows<1>(q + i * kDepth, scale + i, sum + i, middle, p, y + i * 64);
  }
}
#else
static void unpack(const lt_group &g, const lt_linear &l, int64_t index, int64_t from, void *panel);
static void multiply(const lt_group &g, const int8_t *q, const float *scale, const float *sum, int64_t m, int64_t width,
                     const void *panel, float *y);
#endif

static void side_by_side(const float *a, int64_t in, float *to) {
  for (int64_t j = 0; j < in; j += 16)
    transpose(a + j, in, in - j, to + j * kSide, kSide);
}

// What the tile's outliers add to kSide tokens: a [in, kSide], y [rows, kSide].
static void outliers_of_many(const lt_linear &l, int64_t tile, const float *a, float *y) {
  constexpr int64_t kBatch = 32;  // whose inputs are asked for at once
  const int64_t end = l.outlier_ptr[tile + 1];
  const float *from = a;
  for (int64_t e = l.outlier_ptr[tile]; e < end; e += kBatch) {
    const int64_t n = end - e < kBatch ? end - e : kBatch;
    const float *input[kBatch];
    float value[kBatch];
    for (int64_t i = 0; i < n; ++i) {
      input[i] = from += l.outlier_gap[e + i] * kSide;
      for (int64_t k = 0; k < kSide; k += 16) __builtin_prefetch(from + k);
    }
    for (int64_t i = 0; i < n; i += 16) store(value + i, load_half_part(l.outlier_value + e + i, n - i));
    for (int64_t i = 0; i < n; ++i) {
      float *to = y + l.outlier_row[e + i] * kSide;
      for (int64_t k = 0; k < kSide; k += 16) store(to + k, load(to + k) + load(input[i] + k) * value[i]);
    }
  }
}

static void finish(const lt_group &g, const lt_linear &l, int64_t tile, const float *a, const float *products,
                   int64_t stride, int64_t n, bool accumulate, float *y) {
  const Tiling t(l.out);
  const int64_t first = t.first(tile), rows = t.rows(tile);
  // The code is a whole number; its unit in the last slice is 4^-(S-1).
  const float unit = std::ldexp(1.0f, -2 * (int)(g.slices - 1));
  alignas(64) float corrections[256 * kSide], added[16 * 16];
  std::memset(corrections, 0, (size_t)(t.width(tile) * kSide) * sizeof(float));
  outliers_of_many(l, tile, a, corrections);
  for (int64_t from = 0; from < n; from += 16)
    for (int64_t r = 0; r < rows; r += 16) {
      const int64_t left = rows - r, tokens = n - from < 16 ? n - from : 16;
      const f32x16 scale = load_half_part(l.row_scale + first + r, left);
      const f32x16 bias = load_half_part(l.bias + first + r, left);
      const float *block = products + r / 64 * stride + from * 64 + r % 64;
      float *to = y + from * l.out + r;
      transpose(corrections + r * kSide + from, kSide, 16, added, 16);
      for (int64_t i = 0; i < tokens; ++i, block += 64, to += l.out) {
        f32x16 v = load(block) * unit * scale + bias + load(added + i * 16);
        for (int64_t e = 0; e < g.exact_count; ++e)
          v = v + load_half_part(l.exact + e * l.out + first + r, left) * a[g.exact_channels[e] * kSide + from + i];
        store_part(to, accumulate ? load_part(to, left) + v : v, left);
      }
    }
}

}  // namespace LT_NS
