// Which channels are read, and with which int8 coefficients (docs/architecture.md: Score and level, Coefficients).
// Included by kernels_impl.h only.
#pragma once
#include <cfloat>
#include <cstring>

#include "kernels.h"
#include "vec.h"

namespace LT_NS {

using lowtide::Selection;
using lowtide::Tiling;

static void scores(const lt_group &g, const float *x, bool weighted, float *score) {
  for (int64_t j = 0; j < g.in; j += 16) {
    const int64_t n = g.in - j;
    f32x16 v = absolute(load_part(x + j, n) - load_half_part(g.mean + j, n));
    if (weighted) v = v * load_half_part(g.importance + j, n);
    store_part(score + j, v, n);
  }
  for (int64_t e = 0; e < g.exact_count; ++e) score[g.exact_channels[e]] = 0;
}

constexpr float kQuarter[] = {1.0f, 0.25f, 0.0625f, 0.015625f};  // 4^-slice
static_assert(sizeof kQuarter / sizeof kQuarter[0] == LT_MAX_SLICES, "one for each slice");

// The lists of channels by level while they grow, and the thresholds.
struct Lists {
  uint32_t *channel[LT_MAX_SLICES + 1];
  float *value[LT_MAX_SLICES + 1];
  int64_t count[LT_MAX_SLICES + 1];
  float threshold[LT_MAX_SLICES];
};

// append<kSlices>(): adds each of the channels j, j + 1, ... (the lanes before n) to the list of its level. What a list
// has no use for is written behind its end.
#if defined(__AVX512F__)
template <int kSlices>
static inline void append(Lists &to, int64_t j, int64_t n, f32x16 value, f32x16 score) {
  const __m512i channel = _mm512_add_epi32(_mm512_set1_epi32((int)j), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9,
                                                                                       10, 11, 12, 13, 14, 15));
  const __mmask16 lanes = n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1);
  __mmask16 above[kSlices + 1];
  for (int l = 0; l < kSlices; ++l)
    above[l] = _mm512_mask_cmp_ps_mask(l ? above[l - 1] : lanes, (__m512)score, _mm512_set1_ps(to.threshold[l]),
                                       _CMP_GT_OQ);
  above[kSlices] = 0;
  for (int l = 1; l <= kSlices; ++l) {
    const __mmask16 here = above[l - 1] & ~above[l];
    _mm512_storeu_si512(to.channel[l] + to.count[l], _mm512_maskz_compress_epi32(here, channel));
    _mm512_storeu_ps(to.value[l] + to.count[l], _mm512_maskz_compress_ps(here, (__m512)value));
    to.count[l] += __builtin_popcount(here);
  }
}
#elif defined(__AVX2__)
// Row m: the places of the bits set in m, then zeros.
struct Places {
  uint8_t of[256][8] = {};
  constexpr Places() {
    for (int m = 0; m < 256; ++m)
      for (int i = 0, k = 0; i < 8; ++i)
        if (m >> i & 1) of[m][k++] = (uint8_t)i;
  }
};
alignas(64) static constexpr Places kPlaces;

template <int kSlices>
static inline void append_half(Lists &to, int64_t j, int lanes, __m256 value, __m256 score) {
  const __m256i channel = _mm256_set1_epi32((int)j);
  int above[kSlices + 1];
  for (int l = 0; l < kSlices; ++l) {
    const __m256 more = _mm256_cmp_ps(score, _mm256_broadcast_ss(&to.threshold[l]), _CMP_GT_OQ);
    above[l] = _mm256_movemask_ps(more) & (l ? above[l - 1] : lanes);
  }
  above[kSlices] = 0;
  for (int l = 1; l <= kSlices; ++l) {
    const int here = above[l - 1] & ~above[l];
    const __m256i place = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)kPlaces.of[here]));
    _mm256_storeu_si256((__m256i *)(to.channel[l] + to.count[l]), _mm256_add_epi32(channel, place));
    _mm256_storeu_ps(to.value[l] + to.count[l], _mm256_permutevar8x32_ps(value, place));
    to.count[l] += __builtin_popcount((unsigned)here);
  }
}

template <int kSlices>
static inline void append(Lists &to, int64_t j, int64_t n, f32x16 value, f32x16 score) {
  const int lanes = n >= 16 ? 0xffff : (1 << n) - 1;
  append_half<kSlices>(to, j, lanes & 0xff, value.lo, score.lo);
  append_half<kSlices>(to, j + 8, lanes >> 8, value.hi, score.hi);
}
#else
template <int kSlices>
static inline void append(Lists &to, int64_t j, int64_t n, f32x16 value, f32x16 score) {
  float sc[16], va[16];
  store(sc, score);
  store(va, value);
  for (int64_t i = 0; i < (n < 16 ? n : 16); ++i) {
    int l = 0;
    while (l < kSlices && sc[i] > to.threshold[l]) ++l;
    if (!l) continue;
    to.channel[l][to.count[l]] = (uint32_t)(j + i);
    to.value[l][to.count[l]++] = va[i];
  }
}
#endif

static float largest(const float *v, int64_t n) {
  f32x16 m{};
  for (int64_t i = 0; i < n; i += 16) m = maximum(m, absolute(load_part(v + i, n - i)));
  return max_lanes(m);
}

// Of the magnitudes in a level's list.
struct Extent {
  float top, total;
};

// Finishes one level's list: every value times `shrink`, and zeros behind them that fill the last vector.
static Extent finish_list(float *value, int64_t n, float shrink) {
  store(value + n, f32x16{});
  const f32x16 factor = splat(shrink);
  f32x16 top{}, total{};
  for (int64_t i = 0; i < n; i += 16) {
    const f32x16 v = load(value + i) * factor, size = absolute(v);
    store(value + i, v);
    top = maximum(top, size);
    total = total + size;
  }
  return {max_lanes(top), sum_lanes(total)};
}

// Sixteen coefficients within -127 .. 127 to bytes; returns a bit for each that was beyond.
static inline uint32_t to_bytes(i32x16 q, int8_t *coef) {
#if defined(__AVX512F__)
  const __m512i most = _mm512_set1_epi32(127), v = (__m512i)q;
  const __m512i kept = _mm512_max_epi32(_mm512_min_epi32(v, most), _mm512_sub_epi32(_mm512_setzero_si512(), most));
  _mm_storeu_si128((__m128i *)coef, _mm512_cvtepi32_epi8(kept));
  return _mm512_cmpneq_epi32_mask(kept, v);
#elif defined(__AVX2__)
  const __m256i most = _mm256_set1_epi32(127), least = _mm256_set1_epi32(-127);
  const __m256i lo = _mm256_max_epi32(_mm256_min_epi32(q.lo, most), least);
  const __m256i hi = _mm256_max_epi32(_mm256_min_epi32(q.hi, most), least);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
  _mm_storeu_si128((__m128i *)coef,
                   _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  const __m256i same_lo = _mm256_cmpeq_epi32(lo, q.lo), same_hi = _mm256_cmpeq_epi32(hi, q.hi);
  return 0xffffu ^ ((uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(same_lo)) |
                    (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(same_hi)) << 8);
#else
  int32_t v[16];
  store_int(v, q);
  uint32_t beyond = 0;
  for (int k = 0; k < 16; ++k) {
    const int32_t kept = v[k] > 127 ? 127 : v[k] < -127 ? -127 : v[k];
    coef[k] = (int8_t)kept;
    beyond |= (uint32_t)(kept != v[k]) << k;
  }
  return beyond;
#endif
}

// Enters what is left of coefficients beyond 127 in further entries of at most 127 each; returns the next free entry.
static int64_t emit_rests(Selection &s, i32x16 q, uint32_t beyond, const uint32_t *run, int64_t entry) {
  int32_t v[16];
  store_int(v, q);
  for (; beyond; beyond &= beyond - 1) {
    const int k = __builtin_ctz(beyond);
    int32_t rest = v[k] > 0 ? v[k] - 127 : v[k] + 127;
    while (rest) {
      const int32_t part = rest > 127 ? 127 : rest < -127 ? -127 : rest;
      s.run[entry] = run[k];
      s.coef[entry++] = (int8_t)part;
      rest -= part;
    }
  }
  return entry;
}

// Quantises one (level, slice) list with its class' factor and adds it to the entries, from `entry` on; channels beyond
// the range of int8 come again after the list. Returns the sum of the coefficients.
static int32_t emit(Selection &s, int level, int slice, float inv, int64_t &entry) {
  const int64_t n = s.level_count[level], first = entry;
  const float *value = s.level_value[level].data();
  const int32_t *channel = (const int32_t *)s.level_channel[level].data();
  const f32x16 quarter = splat(kQuarter[slice]), factor = splat(inv), magic = splat(12582912.0f);
  const i32x16 plane = splat_int((int32_t)(slice * s.in)), zero = splat_int(0x4b400000);
  i32x16 total{};
  entry += n;
  const auto quantise_at = [&](int64_t i) {
    uint32_t *run = s.run.data() + first + i;
    store_int((int32_t *)run, load_int(channel + i) + plane);
    const i32x16 q = bits_of(load(value + i) * quarter * factor + magic) - zero;
    total = total + q;
    if (const uint32_t beyond = to_bytes(q, s.coef.data() + first + i)) entry = emit_rests(s, q, beyond, run, entry);
  };
  // The last vector, which is not whole, comes first: what lies behind it is written over again.
  const int64_t whole = n / 16 * 16;
  if (whole < n) quantise_at(whole);
  for (int64_t i = 0; i < whole; i += 16) quantise_at(i);
  return sum_lanes_int(total);
}

// What 127 stands for in class k: its largest value, or kRange times the mean of their magnitudes if that is less, for
// then the few beyond it are entered several times. 0 for a class that is empty, next to nothing or not finite: what
// emit() makes of such values has no bound.
static float range_of(const Selection &s, const Extent *extent, int k) {
  float top = 0, total = 0;
  int64_t count = 0;
  for (int slice = 0; k + slice < s.slices; ++slice) {
    const int level = k + slice + 1;
    const float v = extent[level].top * kQuarter[slice];
    top = v > top ? v : top;
    total = total + extent[level].total * kQuarter[slice];
    count += s.level_count[level];
  }
  const float mean = total / (float)count, range = mean * lowtide::kRange;
  if (!(mean >= lowtide::kLeast && range <= FLT_MAX)) return 0;
  return range < top ? range : top;
}

static void make_classes(const lt_group &g, Selection &s) {
  Extent extent[LT_MAX_SLICES + 1];
  for (int l = 1; l <= s.slices; ++l)
    extent[l] = finish_list(s.level_value[l].data(), s.level_count[l], g.shrink[l - 1]);
  int64_t entry = 0;
  for (int k = 0; k < s.slices; ++k) {
    const float m = range_of(s, extent, k);
    s.class_begin[k] = entry;
    s.class_sum[k] = 0;
    s.class_scale[k] = 0;
    if (m > 0) {
      const float inv = 127.0f / m;
      s.class_scale[k] = m / 127.0f * 0.5f;
      for (int slice = 0; k + slice < s.slices; ++slice)
        s.class_sum[k] += (int32_t)g.centre[slice] * emit(s, k + slice + 1, slice, inv, entry);
      for (; entry % 4; ++entry) {  // padding reads a line that is read anyway and adds nothing
        s.run[entry] = s.run[entry - 1];
        s.coef[entry] = 0;
      }
    }
  }
  s.class_begin[s.slices] = entry;
}

template <int kSlices>
static void list_channels(const lt_group &g, const float *x, const float *score, const uint16_t *importance,
                          const float *thresholds, Selection &s) {
  Lists lists;
  for (int l = 1; l <= kSlices; ++l) {
    lists.channel[l] = s.level_channel[l].data();
    lists.value[l] = s.level_value[l].data();
    lists.count[l] = 0;
    lists.threshold[l - 1] = thresholds[l - 1];
  }
  const uint16_t *const mean = s.mean;
  for (int64_t j = 0; j < g.in; j += 16) {
    const int64_t n = g.in - j;
    const f32x16 a = load_part(x + j, n) - load_half_part(mean + j, n);
    store_part(s.a.data() + j, a, n);
    const f32x16 sc = score ? load_part(score + j, n) : absolute(a) * load_half_part(importance + j, n);
    append<kSlices>(lists, j, n, a * load_half_part(g.col_scale + j, n), sc);
  }
  for (int l = 1; l <= kSlices; ++l) s.level_count[l] = lists.count[l];
}

static void select(const lt_group &g, const float *x, const float *score, const uint16_t *importance,
                   const float *thresholds, Selection &s) {
  s.in = g.in;
  s.slices = g.slices;
  std::memset(s.level_count, 0, sizeof s.level_count);
  switch (g.slices) {
    case 1: list_channels<1>(g, x, score, importance, thresholds, s); break;
    case 2: list_channels<2>(g, x, score, importance, thresholds, s); break;
    case 3: list_channels<3>(g, x, score, importance, thresholds, s); break;
    default: list_channels<LT_MAX_SLICES>(g, x, score, importance, thresholds, s);
  }
  make_classes(g, s);
}

// Byte offsets of the selected entries in one matrix. The list goes on with its last entry, so that looking ahead asks
// for a line that is there already.
static void offsets(const lt_linear &l, Selection &s) {
  const int64_t n = s.class_begin[s.slices];
  if (!n) return;
  const uint32_t bytes = (uint32_t)Tiling(l.out).run_bytes();
  const uint32_t *run = s.run.data();
  uint32_t *offset = s.offset.data();
  for (int64_t e = 0; e < n; ++e) offset[e] = run[e] * bytes;
  for (int64_t e = n; e < n + lowtide::kAhead * lowtide::kBlock; ++e) offset[e] = offset[n - 1];
}

}  // namespace LT_NS
