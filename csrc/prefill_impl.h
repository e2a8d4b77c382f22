// Prefill: products of int8 inputs with whole codes, unpacked once for many tokens.
// Included by kernels_impl.h only.
#pragma once
#include "kernels.h"
#include "select_impl.h"
#include "vec.h"

namespace LT_NS {

using lowtide::kDepth;
using lowtide::Tiling;

static void quantise(const lt_group &g, const float *x, float *a, int8_t *q, float *scale, int32_t *sum) {
  const f32x16 shrink = splat(g.shrink[g.slices - 1]), magic = splat(12582912.0f);
  for (int64_t j = 0; j < g.in; j += 16)
    store_part(a + j, load_part(x + j, g.in - j) - load_half_part(g.mean + j, g.in - j), g.in - j);
  for (int64_t from = 0; from < g.in; from += kDepth, ++scale, ++sum, q += kDepth) {
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
#if defined(__aarch64__)
static inline lanes mul_add(lanes a, lanes b, lanes c) {
  return (lanes)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
static inline lanes mul_add(lanes a, lanes b, lanes c) { return a * b + c; }
#endif
#endif
constexpr int kLanes = sizeof(lanes) / 4;
// Loads and stores anywhere, in one instruction (a memcpy goes through the stack here).
typedef lanes lanes_anywhere __attribute__((aligned(4), may_alias));

static void unpack(const lt_group &g, const lt_linear &l, int64_t index, int64_t row, int64_t from, void *panel) {
  const Tiling t(l.out);
  const int64_t bytes = t.width(index) / 4, run = t.run_bytes(), plane = run * g.in;
  float *to = (float *)panel;
  for (int64_t j = from; j < from + kDepth; ++j, to += 64)
    for (int64_t i = 0; i < 64; i += 16) {
      u8x16 code{};
      if (j < g.in)
        code = codes(l.weight + t.byte_offset(index) + j * run + (row + i) % bytes, plane, g.slices,
                     (int)((row + i) / bytes) * 2);
#if defined(__AVX2__)
      const __m128i byte = (__m128i)code;
      store(to + i, to_float({_mm256_cvtepu8_epi32(byte), _mm256_cvtepu8_epi32(_mm_srli_si128(byte, 8))}));
#else
      store(to + i, __builtin_convertvector(code, f32x16));
#endif
    }
}

template <int kRows>
static inline void multiply_rows(const int8_t *q, const float *scale, const int32_t *sum, int64_t blocks,
                                 int32_t middle, const float *panel, float *y) {
  constexpr int kVectors = 2;
  float x[kDepth][kRows];
  for (int i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < kDepth; ++j) x[j][i] = q[i * blocks * kDepth + j];
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
    multiply_rows<6>(q + i * blocks * kDepth, scale + i * blocks, sum + i * blocks, blocks, middle, p, y + i * 64);
  for (; i < m; ++i)
    multiply_rows<1>(q + i * blocks * kDepth, scale + i * blocks, sum + i * blocks, blocks, middle, p, y + i * 64);
}
#else
static void unpack(const lt_group &g, const lt_linear &l, int64_t index, int64_t row, int64_t from, void *panel);
static void multiply(const int8_t *q, const float *scale, const int32_t *sum, int64_t blocks, int64_t m,
                     int32_t middle, const void *panel, float *y);
#endif

}  // namespace LT_NS
