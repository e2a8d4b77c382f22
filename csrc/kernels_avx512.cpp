// AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later).
#define LT_NS lowtide_avx512
#define LT_NAME "avx512"
#define LT_OWN_GEMM
#define LT_OWN_ORDER
#include <immintrin.h>

#include "kernels.h"

namespace LT_NS {

// Bytes of four runs become quads: byte k of run 0, 1, 2, 3 side by side, so that one vpdpbusd adds four entries.
// The digits of a byte are not shifted down: the mask leaves digit p as d * 4^p, and the sums are shifted at the end.
// sum[p][z], 128-bit lane i, holds bytes 16 i + 4 z of the tile; in_order() puts that right.

static inline __m512i digit_mask(int p) { return _mm512_set1_epi8((char)(3 << (2 * p))); }

static inline __m512i four_coefficients(const int8_t *coef) {
  int32_t four;
  __builtin_memcpy(&four, coef, 4);
  return _mm512_set1_epi32(four);
}

static inline void wide_tile(const uint8_t *base, const uint32_t *offset, const int8_t *coef, int64_t n, int64_t ahead,
                             __m512i *acc) {
  __m512i sum[16], mask[4];
  for (int p = 0; p < 4; ++p) mask[p] = digit_mask(p);
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) sum[k] = _mm512_load_si512(acc + k);
  for (int64_t e = 0; e < n; e += 4) {
    __m512i line[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      line[i] = _mm512_loadu_si512(base + offset[e + i]);
      _mm_prefetch((const char *)base + offset[e + i + ahead], _MM_HINT_T0);
    }
    const __m512i ab_lo = _mm512_unpacklo_epi8(line[0], line[1]), ab_hi = _mm512_unpackhi_epi8(line[0], line[1]);
    const __m512i cd_lo = _mm512_unpacklo_epi8(line[2], line[3]), cd_hi = _mm512_unpackhi_epi8(line[2], line[3]);
    const __m512i quad[4] = {_mm512_unpacklo_epi16(ab_lo, cd_lo), _mm512_unpackhi_epi16(ab_lo, cd_lo),
                             _mm512_unpacklo_epi16(ab_hi, cd_hi), _mm512_unpackhi_epi16(ab_hi, cd_hi)};
    const __m512i c = four_coefficients(coef + e);
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) sum[k] = _mm512_dpbusd_epi32(sum[k], _mm512_and_si512(quad[k % 4], mask[k / 4]), c);
  }
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) _mm512_store_si512(acc + k, sum[k]);
}

static inline void narrow_tile(const uint8_t *base, const uint32_t *offset, const int8_t *coef, int64_t n,
                               int64_t ahead, __m512i quads, __m512i *acc) {
  __m512i sum[4] = {_mm512_load_si512(acc), _mm512_load_si512(acc + 1), _mm512_load_si512(acc + 2),
                    _mm512_load_si512(acc + 3)};
  for (int64_t e = 0; e < n; e += 4) {
    const auto part = [&](int i) { return _mm_loadu_si128((const __m128i *)(base + offset[e + i])); };
    __m512i v = _mm512_inserti32x4(_mm512_castsi128_si512(part(0)), part(1), 1);
    v = _mm512_inserti32x4(_mm512_inserti32x4(v, part(2), 2), part(3), 3);
    for (int i = 0; i < 4; ++i) _mm_prefetch((const char *)base + offset[e + i + ahead], _MM_HINT_T0);
    v = _mm512_permutexvar_epi8(quads, v);
    const __m512i c = four_coefficients(coef + e);
    for (int p = 0; p < 4; ++p) sum[p] = _mm512_dpbusd_epi32(sum[p], _mm512_and_si512(v, digit_mask(p)), c);
  }
  for (int p = 0; p < 4; ++p) _mm512_store_si512(acc + p, sum[p]);
}

static void digits(const uint8_t *base, const uint32_t *offset, const int8_t *coef, int64_t n, int64_t ahead,
                   int64_t wide, int64_t narrow, int32_t *acc) {
  alignas(64) uint8_t order[64];
  for (int i = 0; i < 64; ++i) order[i] = (uint8_t)(i % 4 * 16 + i / 4);
  const __m512i quads = _mm512_load_si512(order);
  __m512i *sums = (__m512i *)acc;
  for (int64_t i = 0; i < wide * 16 + narrow * 4; ++i) sums[i] = _mm512_setzero_si512();
  // Blocks keep the runs of several tiles together; a single tile's sums stay in registers all the way.
  const int64_t block = wide + narrow > 1 ? lowtide::kBlock : n;
  for (int64_t e = 0; e < n; e += block) {
    const int64_t step = n - e < block ? n - e : block;
    for (int64_t t = 0; t < wide; ++t) wide_tile(base + t * 64, offset + e, coef + e, step, ahead, sums + t * 16);
    for (int64_t t = 0; t < narrow; ++t)
      narrow_tile(base + wide * 64 + t * 16, offset + e, coef + e, step, ahead, quads, sums + wide * 16 + t * 4);
  }
}

static void in_order(const int32_t *acc, int64_t tile, int64_t wide, int32_t *out) {
  if (tile >= wide) {
    const int32_t *sums = acc + wide * 256 + (tile - wide) * 64;
    for (int p = 0; p < 4; ++p)
      _mm512_store_si512(out + p * 16, _mm512_sra_epi32(_mm512_load_si512(sums + p * 16), _mm_cvtsi32_si128(2 * p)));
    return;
  }
  const __m512i *sums = (const __m512i *)(acc + tile * 256);
  for (int p = 0; p < 4; ++p) {  // a 4 x 4 transposition of 128-bit lanes
    const __m512i *z = sums + p * 4;
    const __m512i lo01 = _mm512_shuffle_i32x4(z[0], z[1], 0x44), hi01 = _mm512_shuffle_i32x4(z[0], z[1], 0xee);
    const __m512i lo23 = _mm512_shuffle_i32x4(z[2], z[3], 0x44), hi23 = _mm512_shuffle_i32x4(z[2], z[3], 0xee);
    const __m512i row[4] = {_mm512_shuffle_i32x4(lo01, lo23, 0x88), _mm512_shuffle_i32x4(lo01, lo23, 0xdd),
                            _mm512_shuffle_i32x4(hi01, hi23, 0x88), _mm512_shuffle_i32x4(hi01, hi23, 0xdd)};
    for (int i = 0; i < 4; ++i)
      _mm512_store_si512(out + p * 64 + i * 16, _mm512_sra_epi32(row[i], _mm_cvtsi32_si128(2 * p)));
  }
}

}  // namespace LT_NS

#include "kernels_impl.h"

namespace LT_NS {

// ---- prefill: int8 products. The panel holds, for each four channels, 64 rows as quads: 4 vectors, rows in the order
// 16 i + 4 z for 128-bit lane i of vector z (as in the digit product).

static void unpack(const lt_group &g, const lt_linear &l, int64_t index, int64_t row, int64_t from, void *panel) {
  const Tiling t(l.out);
  const int64_t bytes = t.width(index) / 4, run = t.run_bytes(), plane = run * g.in;
  const uint8_t *base = l.weight + t.byte_offset(index);
  const __m512i three = _mm512_set1_epi8(3);
  __m512i *to = (__m512i *)panel;
  for (int64_t j = from; j < from + lowtide::kDepth; j += 4, to += 4) {
    __m512i line[4];
    for (int i = 0; i < 4; ++i) {
      line[i] = _mm512_setzero_si512();
      if (j + i >= g.in) continue;
      const uint8_t *channel = base + (j + i) * run;
      if (bytes == 64) {
        const __m128i shift = _mm_cvtsi32_si128((int)(row / 64) * 2);
        for (int64_t s = 0; s < g.slices; ++s) {
          const __m512i byte = _mm512_srl_epi16(_mm512_loadu_si512(channel + s * plane), shift);
          line[i] = _mm512_or_si512(_mm512_slli_epi16(line[i], 2), _mm512_and_si512(byte, three));
        }
      } else {
        u8x16 part[4];
        for (int p = 0; p < 4; ++p) part[p] = codes(channel, plane, g.slices, 2 * p);
        std::memcpy(&line[i], part, 64);
      }
    }
    const __m512i ab_lo = _mm512_unpacklo_epi8(line[0], line[1]), ab_hi = _mm512_unpackhi_epi8(line[0], line[1]);
    const __m512i cd_lo = _mm512_unpacklo_epi8(line[2], line[3]), cd_hi = _mm512_unpackhi_epi8(line[2], line[3]);
    to[0] = _mm512_unpacklo_epi16(ab_lo, cd_lo);
    to[1] = _mm512_unpackhi_epi16(ab_lo, cd_lo);
    to[2] = _mm512_unpacklo_epi16(ab_hi, cd_hi);
    to[3] = _mm512_unpackhi_epi16(ab_hi, cd_hi);
  }
}

// kRows tokens' products with a panel, out i32 [kRows * 64]. One loop over all sums, stores to a pointer that was given
// and a length that the compiler does not know: GCC 12 keeps the sums in registers then, and only then.
template <int kRows>
__attribute__((noinline)) static void products(const int8_t *q, const int8_t *end, int64_t stride,
                                               const __m512i *panel, int32_t *out) {
  __m512i acc[kRows * 4];
#pragma GCC unroll 16
  for (int k = 0; k < kRows * 4; ++k) acc[k] = _mm512_setzero_si512();
  for (; q < end; q += 4, panel += 4) {
#pragma GCC unroll 16
    for (int k = 0; k < kRows * 4; ++k)
      acc[k] = _mm512_dpbusd_epi32(acc[k], panel[k % 4], four_coefficients(q + k / 4 * stride));
  }
#pragma GCC unroll 16
  for (int k = 0; k < kRows * 4; ++k) _mm512_store_si512(out + 16 * k, acc[k]);
}

template <int kRows>
static inline void multiply_rows(const int8_t *q, const float *scale, const int32_t *sum, int64_t blocks,
                                 int32_t middle, const __m512i *panel, float *y) {
  alignas(64) int32_t sums[kRows * 64];
  products<kRows>(q, q + lowtide::kDepth, blocks * lowtide::kDepth, panel, sums);
  for (int i = 0; i < kRows; ++i) {
    const __m512i *z = (const __m512i *)sums + 4 * i;
    const __m512i lo01 = _mm512_shuffle_i32x4(z[0], z[1], 0x44), hi01 = _mm512_shuffle_i32x4(z[0], z[1], 0xee);
    const __m512i lo23 = _mm512_shuffle_i32x4(z[2], z[3], 0x44), hi23 = _mm512_shuffle_i32x4(z[2], z[3], 0xee);
    const __m512i row[4] = {_mm512_shuffle_i32x4(lo01, lo23, 0x88), _mm512_shuffle_i32x4(lo01, lo23, 0xdd),
                            _mm512_shuffle_i32x4(hi01, hi23, 0x88), _mm512_shuffle_i32x4(hi01, hi23, 0xdd)};
    const f32x16 shift = splat((float)middle * (float)sum[i * blocks]);
    for (int v = 0; v < 4; ++v) {
      float *to = y + i * 64 + v * 16;
      store(to, load(to) + (2.0f * __builtin_convertvector((i32x16)row[v], f32x16) - shift) * scale[i * blocks]);
    }
  }
}

static void multiply(const int8_t *q, const float *scale, const int32_t *sum, int64_t blocks, int64_t m,
                     int32_t middle, const void *panel, float *y) {
  const __m512i *p = (const __m512i *)panel;
  int64_t i = 0;
  for (; i + 4 <= m; i += 4)
    multiply_rows<4>(q + i * blocks * lowtide::kDepth, scale + i * blocks, sum + i * blocks, blocks, middle, p, y + i * 64);
  for (; i < m; ++i)
    multiply_rows<1>(q + i * blocks * lowtide::kDepth, scale + i * blocks, sum + i * blocks, blocks, middle, p, y + i * 64);
}

}  // namespace LT_NS

namespace lowtide {
const Kernels *avx512_kernels() {
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
  return runs ? &lowtide_avx512::kTable : nullptr;
}
}  // namespace lowtide
