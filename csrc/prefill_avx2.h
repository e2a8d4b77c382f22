// Prefill's int8 products with vpmaddubsw. Included by kernels_avx2.cpp only, after kernels_impl.h.
//
// For each part of 64 rows the panel holds, for each eight channels, 8 times (for 8 rows each) the quads of the first
// four channels' codes and those of the other four. A code of three slices is at most 63, so a pair of products is at
// most 2 * 63 * 127 = 16002 and two of them fit 16 bits. A code of four slices is cut in two numbers of two slices,
// and the panel holds the upper ones of all kDepth channels and then the lower ones.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "kernels.h"
#include "vec.h"

namespace LT_NS {

constexpr int64_t kPanelVectors = kDepth * 2;  // of 64 rows

template <int kShift>
static inline __m256i shifted(__m256i v) {
  if constexpr (kShift > 0) return _mm256_slli_epi16(v, kShift);
  if constexpr (kShift < 0) return _mm256_srli_epi16(v, -kShift);
  return v;
}

// Digit kDigit of the slices' bytes, put together. What a shift brings over from the next byte the masks take away.
template <int kSlices, int kDigit>
static inline __m256i whole_code(const __m256i *byte) {
  constexpr int kTop = 2 * (kSlices - 1), kRight = 2 * kDigit;
  const auto part = [](__m256i v, int mask) { return _mm256_and_si256(v, _mm256_set1_epi8((char)mask)); };
  __m256i code = part(shifted<kTop - kRight>(byte[0]), 3 << kTop);
  if constexpr (kSlices > 1) code = _mm256_or_si256(code, part(shifted<kTop - 2 - kRight>(byte[1]), 3 << (kTop - 2)));
  if constexpr (kSlices > 2) code = _mm256_or_si256(code, part(shifted<kTop - 4 - kRight>(byte[2]), 3 << (kTop - 4)));
  return code;
}

template <int kSlices, int kDigit>
static inline void store_code(const __m256i *byte, __m256i *to) {
  if constexpr (kSlices == 4) {
    _mm256_store_si256(to, whole_code<2, kDigit>(byte));
    _mm256_store_si256(to + kPanelVectors, whole_code<2, kDigit>(byte + 2));
  } else {
    _mm256_store_si256(to, whole_code<kSlices, kDigit>(byte));
  }
}

// A tile's channels from `base` on, `run` bytes apart; there are `left` of them, and what stands in place of those
// beyond makes no difference, for their inputs are zero. Asks memory for the bytes `ahead` of each.
template <int kSlices>
static void unpack_wide(const uint8_t *base, int64_t run, int64_t plane, int64_t left, int64_t ahead, __m256i *panel) {
  constexpr int64_t kPart = kPanelVectors * (kSlices == 4 ? 2 : 1);
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  for (int64_t j = 0; j < kDepth; j += 4) {
    const uint8_t *channel[4];
    for (int i = 0; i < 4; ++i) {
      channel[i] = base + (j + i < left ? j + i : left - 1) * run;
      for (int s = 0; s < kSlices; ++s) _mm_prefetch((const char *)channel[i] + s * plane + ahead, _MM_HINT_T1);
    }
    for (int half = 0; half < 2; ++half) {
      __m256i quad[4][kSlices];
#pragma GCC unroll 4
      for (int s = 0; s < kSlices; ++s) {
        __m256i line[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          line[i] = _mm256_permutevar8x32_epi32(
              _mm256_loadu_si256((const __m256i *)(channel[i] + s * plane + half * 32)), order);
        const __m256i ab_lo = _mm256_unpacklo_epi8(line[0], line[1]), ab_hi = _mm256_unpackhi_epi8(line[0], line[1]);
        const __m256i cd_lo = _mm256_unpacklo_epi8(line[2], line[3]), cd_hi = _mm256_unpackhi_epi8(line[2], line[3]);
        quad[0][s] = _mm256_unpacklo_epi16(ab_lo, cd_lo);
        quad[1][s] = _mm256_unpackhi_epi16(ab_lo, cd_lo);
        quad[2][s] = _mm256_unpacklo_epi16(ab_hi, cd_hi);
        quad[3][s] = _mm256_unpackhi_epi16(ab_hi, cd_hi);
      }
      __m256i *to = panel + j / 8 * 16 + half * 8 + j % 8 / 4;
#pragma GCC unroll 4
      for (int z = 0; z < 4; ++z, to += 2) {
        store_code<kSlices, 0>(quad[z], to);
        store_code<kSlices, 1>(quad[z], to + kPart);
        store_code<kSlices, 2>(quad[z], to + 2 * kPart);
        store_code<kSlices, 3>(quad[z], to + 3 * kPart);
      }
    }
  }
}

template <int kSlices>
static void unpack_narrow(const uint8_t *base, int64_t run, int64_t plane, int64_t left, int64_t ahead,
                          __m256i *panel) {
  for (int64_t j = 0; j < kDepth; j += 4) {
    __m256i quad[2][kSlices];  // rows 0 to 7 and 8 to 15 of each digit
#pragma GCC unroll 4
    for (int s = 0; s < kSlices; ++s) {
      __m128i line[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const uint8_t *channel = base + (j + i < left ? j + i : left - 1) * run + s * plane;
        _mm_prefetch((const char *)channel + ahead, _MM_HINT_T1);
        line[i] = _mm_loadu_si128((const __m128i *)channel);
      }
      const __m128i ab_lo = _mm_unpacklo_epi8(line[0], line[1]), ab_hi = _mm_unpackhi_epi8(line[0], line[1]);
      const __m128i cd_lo = _mm_unpacklo_epi8(line[2], line[3]), cd_hi = _mm_unpackhi_epi8(line[2], line[3]);
      quad[0][s] = _mm256_set_m128i(_mm_unpackhi_epi16(ab_lo, cd_lo), _mm_unpacklo_epi16(ab_lo, cd_lo));
      quad[1][s] = _mm256_set_m128i(_mm_unpackhi_epi16(ab_hi, cd_hi), _mm_unpacklo_epi16(ab_hi, cd_hi));
    }
    __m256i *to = panel + j / 8 * 16 + j % 8 / 4;
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h, to += 2) {
      store_code<kSlices, 0>(quad[h], to);
      store_code<kSlices, 1>(quad[h], to + 4);
      store_code<kSlices, 2>(quad[h], to + 8);
      store_code<kSlices, 3>(quad[h], to + 12);
    }
  }
}

static void unpack(const lt_group &g, const lt_linear &l, int64_t index, int64_t from, void *panel) {
  static constexpr decltype(&unpack_wide<1>) kUnpack[][LT_MAX_SLICES] = {
      {unpack_narrow<1>, unpack_narrow<2>, unpack_narrow<3>, unpack_narrow<4>},
      {unpack_wide<1>, unpack_wide<2>, unpack_wide<3>, unpack_wide<4>}};
  const Tiling t(l.out);
  const int64_t bytes = t.width(index) / 4, run = t.run_bytes(), left = g.in - from;
  // The next channels of this tile, or else the first ones of the next.
  const int64_t ahead = left > kDepth ? kDepth * run : bytes - from * run;
  kUnpack[bytes == 64][g.slices - 1](l.weight + t.byte_offset(index) + from * run, run, run * g.in, left, ahead,
                                     (__m256i *)panel);
}

// kRows tokens' products with 16 rows, out i32 [kRows, 16]; kMore: 16 times what is there is added. One loop over all
// sums, stores to a pointer that was given and a length that the compiler does not know: GCC 12 keeps the sums in
// registers then, and only then.
template <int kRows, bool kMore>
__attribute__((noinline)) static void products(const int8_t *q, const int8_t *end, const __m256i *panel, __m256i *out) {
  __m256i acc[kRows * 2];
#pragma GCC unroll 8
  for (int k = 0; k < kRows * 2; ++k)
    acc[k] = kMore ? _mm256_slli_epi32(_mm256_load_si256(out + k), 4) : _mm256_setzero_si256();
  const __m256i ones = _mm256_set1_epi16(1);
  for (; q < end; q += 8, panel += 16) {
#pragma GCC unroll 8
    for (int k = 0; k < kRows * 2; ++k) {
      int32_t four[2];
      std::memcpy(four, q + k / 2 * kDepth, 8);
      const __m256i pair = _mm256_add_epi16(_mm256_maddubs_epi16(panel[k % 2 * 2], _mm256_set1_epi32(four[0])),
                                            _mm256_maddubs_epi16(panel[k % 2 * 2 + 1], _mm256_set1_epi32(four[1])));
      acc[k] = _mm256_add_epi32(acc[k], _mm256_madd_epi16(pair, ones));
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kRows * 2; ++k) _mm256_store_si256(out + k, acc[k]);
}

template <int kRows>
static inline void multiply_rows(const int8_t *q, const float *scale, const float *sum, float middle, bool halves,
                                 const __m256i *panel, float *y) {
  for (int column = 0; column < 64; column += 16, panel += 4) {
    alignas(64) int32_t sums[kRows * 16];
    products<kRows, false>(q, q + kDepth, panel, (__m256i *)sums);
    if (halves) products<kRows, true>(q, q + kDepth, panel + kPanelVectors, (__m256i *)sums);
    for (int i = 0; i < kRows; ++i) {
      float *to = y + i * 64 + column;
      store(to, load(to) + (to_float(load_int(sums + i * 16)) - splat(middle * sum[i])) * scale[i]);
    }
  }
}

static void multiply(const lt_group &g, const int8_t *q, const float *scale, const float *sum, int64_t m, int64_t width,
                     const void *panel, float *y) {
  constexpr int kRows = 4;
  const bool halves = g.slices == 4;
  const float middle = 0.5f * (float)lowtide::doubled_centre(g);
  const __m256i *p = (const __m256i *)panel;
  for (int64_t part = 0; part < width; part += 64, p += kPanelVectors * (halves ? 2 : 1), y += m * 64) {
    int64_t i = 0;
    for (; i + kRows <= m; i += kRows)
      multiply_rows<kRows>(q + i * kDepth, scale + i, sum + i, middle, halves, p, y + i * 64);
    for (; i < m; ++i) multiply_rows<1>(q + i * kDepth, scale + i, sum + i, middle, halves, p, y + i * 64);
  }
}

}  // namespace LT_NS
