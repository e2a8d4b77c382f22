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
      _mm_prefetch((const char *)base + offset[e + i + ahead], _MM_HINT_T1);
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
    for (int i = 0; i < 4; ++i) _mm_prefetch((const char *)base + offset[e + i + ahead], _MM_HINT_T1);
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

static const int32_t *in_order(const int32_t *acc, int64_t tile, int64_t wide, int32_t *room) {
  if (tile >= wide) {
    const int32_t *sums = acc + wide * 256 + (tile - wide) * 64;
    for (int p = 0; p < 4; ++p)
      _mm512_store_si512(room + p * 16, _mm512_sra_epi32(_mm512_load_si512(sums + p * 16), _mm_cvtsi32_si128(2 * p)));
    return room;
  }
  const __m512i *sums = (const __m512i *)(acc + tile * 256);
  for (int p = 0; p < 4; ++p) {  // a 4 x 4 transposition of 128-bit lanes
    const __m512i *z = sums + p * 4;
    const __m512i lo01 = _mm512_shuffle_i32x4(z[0], z[1], 0x44), hi01 = _mm512_shuffle_i32x4(z[0], z[1], 0xee);
    const __m512i lo23 = _mm512_shuffle_i32x4(z[2], z[3], 0x44), hi23 = _mm512_shuffle_i32x4(z[2], z[3], 0xee);
    const __m512i row[4] = {_mm512_shuffle_i32x4(lo01, lo23, 0x88), _mm512_shuffle_i32x4(lo01, lo23, 0xdd),
                            _mm512_shuffle_i32x4(hi01, hi23, 0x88), _mm512_shuffle_i32x4(hi01, hi23, 0xdd)};
    for (int i = 0; i < 4; ++i)
      _mm512_store_si512(room + p * 64 + i * 16, _mm512_sra_epi32(row[i], _mm_cvtsi32_si128(2 * p)));
  }
  return room;
}

}  // namespace LT_NS

#include "kernels_impl.h"

namespace LT_NS {

// ---- prefill: int8 products. For each part of 64 rows the panel holds, for each four channels, the rows' quads of
// codes, 4 vectors.

template <int kShift>
static inline __m512i shifted(__m512i v) {
  if constexpr (kShift > 0) return _mm512_slli_epi16(v, kShift);
  if constexpr (kShift < 0) return _mm512_srli_epi16(v, -kShift);
  return v;
}

// Digit kDigit of all slices' bytes, put together. What a shift brings over from the next byte the masks take away.
template <int kSlices, int kDigit>
static inline __m512i whole_code(const __m512i *byte) {
  constexpr int kTop = 2 * (kSlices - 1), kRight = 2 * kDigit;
  __m512i code = _mm512_and_si512(shifted<kTop - kRight>(byte[0]), _mm512_set1_epi8((char)(3 << kTop)));
  const auto add = [&](__m512i v, int mask) {
    code = _mm512_ternarylogic_epi32(code, v, _mm512_set1_epi8((char)mask), 0xf8);  // code | (v & mask)
  };
  if constexpr (kSlices > 1) add(shifted<kTop - 2 - kRight>(byte[1]), 3 << (kTop - 2));
  if constexpr (kSlices > 2) add(shifted<kTop - 4 - kRight>(byte[2]), 3 << (kTop - 4));
  if constexpr (kSlices > 3) add(shifted<kTop - 6 - kRight>(byte[3]), 3 << (kTop - 6));
  return code;
}

// A tile's channels from `base` on, `run` bytes apart; there are `left` of them, and what stands in place of those
// beyond makes no difference, for their inputs are zero. Asks memory for the bytes `ahead` of each.
template <int kSlices>
static void unpack_wide(const uint8_t *base, int64_t run, int64_t plane, int64_t left, int64_t ahead, __m512i *to) {
  constexpr int64_t kPart = lowtide::kDepth;  // vectors of 64 rows
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t j = 0; j < lowtide::kDepth; j += 4, to += 4) {
    const uint8_t *channel[4];
    for (int i = 0; i < 4; ++i) channel[i] = base + (j + i < left ? j + i : left - 1) * run;
    __m512i quad[4][kSlices];
#pragma GCC unroll 4
    for (int s = 0; s < kSlices; ++s) {
      __m512i line[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        line[i] = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(channel[i] + s * plane));
        _mm_prefetch((const char *)channel[i] + s * plane + ahead, _MM_HINT_T1);
      }
      const __m512i ab_lo = _mm512_unpacklo_epi8(line[0], line[1]), ab_hi = _mm512_unpackhi_epi8(line[0], line[1]);
      const __m512i cd_lo = _mm512_unpacklo_epi8(line[2], line[3]), cd_hi = _mm512_unpackhi_epi8(line[2], line[3]);
      quad[0][s] = _mm512_unpacklo_epi16(ab_lo, cd_lo);
      quad[1][s] = _mm512_unpackhi_epi16(ab_lo, cd_lo);
      quad[2][s] = _mm512_unpacklo_epi16(ab_hi, cd_hi);
      quad[3][s] = _mm512_unpackhi_epi16(ab_hi, cd_hi);
    }
#pragma GCC unroll 4
    for (int z = 0; z < 4; ++z) {
      to[z] = whole_code<kSlices, 0>(quad[z]);
      to[z + kPart] = whole_code<kSlices, 1>(quad[z]);
      to[z + 2 * kPart] = whole_code<kSlices, 2>(quad[z]);
      to[z + 3 * kPart] = whole_code<kSlices, 3>(quad[z]);
    }
  }
}

template <int kSlices>
static void unpack_narrow(const uint8_t *base, int64_t run, int64_t plane, int64_t left, int64_t ahead, __m512i *to) {
  alignas(64) uint8_t order[64];
  for (int i = 0; i < 64; ++i) order[i] = (uint8_t)(i % 4 * 16 + i / 4);
  const __m512i quads = _mm512_load_si512(order);
  for (int64_t j = 0; j < lowtide::kDepth; j += 4, to += 4) {
    __m512i quad[kSlices];
    for (int s = 0; s < kSlices; ++s) {
      const auto part = [&](int i) {
        const uint8_t *channel = base + (j + i < left ? j + i : left - 1) * run + s * plane;
        _mm_prefetch((const char *)channel + ahead, _MM_HINT_T1);
        return _mm_loadu_si128((const __m128i *)channel);
      };
      __m512i v = _mm512_inserti32x4(_mm512_castsi128_si512(part(0)), part(1), 1);
      v = _mm512_inserti32x4(_mm512_inserti32x4(v, part(2), 2), part(3), 3);
      quad[s] = _mm512_permutexvar_epi8(quads, v);
    }
    to[0] = whole_code<kSlices, 0>(quad);
    to[1] = whole_code<kSlices, 1>(quad);
    to[2] = whole_code<kSlices, 2>(quad);
    to[3] = whole_code<kSlices, 3>(quad);
  }
}

static void unpack(const lt_group &g, const lt_linear &l, int64_t index, int64_t from, void *panel) {
  static constexpr decltype(&unpack_wide<1>) kUnpack[][LT_MAX_SLICES] = {
      {unpack_narrow<1>, unpack_narrow<2>, unpack_narrow<3>, unpack_narrow<4>},
      {unpack_wide<1>, unpack_wide<2>, unpack_wide<3>, unpack_wide<4>}};
  const Tiling t(l.out);
  const int64_t bytes = t.width(index) / 4, run = t.run_bytes(), left = g.in - from;
  // The next channels of this tile, or else the first ones of the next.
  const int64_t ahead = left > lowtide::kDepth ? lowtide::kDepth * run : bytes - from * run;
  kUnpack[bytes == 64][g.slices - 1](l.weight + t.byte_offset(index) + from * run, run, run * g.in, left, ahead,
                                     (__m512i *)panel);
}

// kRows tokens' products with 64 rows, out i32 [kRows, 64]. One loop over all sums, stores to a pointer that was given
// and a length that the compiler does not know: GCC 12 keeps the sums in registers then, and only then.
template <int kRows>
__attribute__((noinline)) static void products(const int8_t *q, const int8_t *end, const __m512i *panel,
                                               int32_t *out) {
  __m512i acc[kRows * 4];
#pragma GCC unroll 32
  for (int k = 0; k < kRows * 4; ++k) acc[k] = _mm512_setzero_si512();
  for (; q < end; q += 4, panel += 4) {
#pragma GCC unroll 32
    for (int k = 0; k < kRows * 4; ++k)
      acc[k] = _mm512_dpbusd_epi32(acc[k], panel[k % 4], four_coefficients(q + k / 4 * lowtide::kDepth));
  }
#pragma GCC unroll 32
  for (int k = 0; k < kRows * 4; ++k) _mm512_store_si512(out + 16 * k, acc[k]);
}

template <int kRows>
static inline void multiply_rows(const int8_t *q, const float *scale, const float *sum, float middle,
                                 const __m512i *panel, float *y) {
  alignas(64) int32_t sums[kRows * 64];
  products<kRows>(q, q + lowtide::kDepth, panel, sums);
  for (int i = 0; i < kRows; ++i) {
    const f32x16 shift = splat(middle * sum[i]), unit = splat(scale[i]);
    for (int k = i * 64; k < i * 64 + 64; k += 16)
      store(y + k, load(y + k) + (to_float(load_int(sums + k)) - shift) * unit);
  }
}

static void multiply(const lt_group &g, const int8_t *q, const float *scale, const float *sum, int64_t m, int64_t width,
                     const void *panel, float *y) {
  constexpr int kRows = 6;
  const float middle = 0.5f * (float)lowtide::doubled_centre(g);
  const __m512i *p = (const __m512i *)panel;
  for (int64_t part = 0; part < width; part += 64, p += lowtide::kDepth, y += m * 64) {
    int64_t i = 0;
    for (; i + kRows <= m; i += kRows)
      multiply_rows<kRows>(q + i * lowtide::kDepth, scale + i, sum + i, middle, p, y + i * 64);
    for (; i + 2 <= m; i += 2)
      multiply_rows<2>(q + i * lowtide::kDepth, scale + i, sum + i, middle, p, y + i * 64);
    for (; i < m; ++i) multiply_rows<1>(q + i * lowtide::kDepth, scale + i, sum + i, middle, p, y + i * 64);
  }
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
