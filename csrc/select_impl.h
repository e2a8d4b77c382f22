// Which channels are read, and with which int8 coefficients (docs/architecture.md: Score and level, Coefficients).
// Included by kernels_impl.h only.
#pragma once
#include <cfloat>
#include <cmath>

#include "kernels.h"
#include "vec.h"

namespace LT_NS {

using lowtide::Selection;

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

static float magnitudes(const float *v, int64_t n) {
  f32x16 total{};
  for (int64_t i = 0; i < n; i += 16) total = total + absolute(load_part(v + i, n - i));
  return sum_lanes(total);
}

static inline i32x16 within_int8(i32x16 q) {
  q = q > 127 ? splat_int(127) : q;
  return q < -127 ? splat_int(-127) : q;
}

// Enters what is left of one entry's coefficient in further entries of at most 127 each; returns the next free entry.
static int64_t emit_rest(Selection &s, uint32_t channel, int slice, int32_t rest, int64_t entry) {
  while (rest) {
    const int32_t part = rest > 127 ? 127 : rest < -127 ? -127 : rest;
    s.channel[entry] = channel;
    s.slice[entry] = (uint8_t)slice;
    s.coef[entry++] = (int8_t)part;
    rest -= part;
  }
  return entry;
}

// Quantises one (level, slice) list with its class' factor and adds it to the entries, from `entry` on; channels beyond
// the range of int8 come again after the list. Returns the sum of the coefficients.
static int32_t emit(Selection &s, int level, int slice, float inv, int64_t &entry) {
  const int64_t n = s.level_count[level];
  const float quarter = std::ldexp(1.0f, -2 * slice);
  const float *value = s.level_value[level].data();
  const uint32_t *channel = s.level_channel[level].data();
  std::memcpy(s.channel.data() + entry, channel, (size_t)n * 4);
  std::memset(s.slice.data() + entry, slice, (size_t)n);
  int8_t *coef = s.coef.data() + entry;
  entry += n;
  const f32x16 magic = splat(12582912.0f);
  i32x16 total{};
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t lanes = n - i < 16 ? n - i : 16;
    const f32x16 u = load_part(value + i, n - i) * quarter;
    const i32x16 q = (i32x16)(u * inv + magic) - 0x4b400000;
    const i32x16 kept = within_int8(q);
    total += q;
#if defined(__AVX512F__)
    const __mmask16 here = (__mmask16)((1u << lanes) - 1);
    _mm512_mask_cvtepi32_storeu_epi8(coef + i, here, (__m512i)kept);
    const bool beyond = _mm512_cmpneq_epi32_mask((__m512i)kept, (__m512i)q) != 0;
#else
    bool beyond = false;
    for (int64_t k = 0; k < lanes; ++k) {
      coef[i + k] = (int8_t)kept[k];
      beyond |= kept[k] != q[k];
    }
#endif
    for (int64_t k = 0; beyond && k < lanes; ++k) entry = emit_rest(s, channel[i + k], slice, q[k] - kept[k], entry);
  }
  int32_t sum = 0;
  for (int k = 0; k < 16; ++k) sum += total[k];
  return sum;
}

// What 127 stands for in class k: its largest value, or kRange times the mean of their magnitudes if that is less, for
// then the few beyond it are entered several times. 0 for a class that is empty, next to nothing or not finite: what
// emit() makes of such values has no bound.
static float range_of(const Selection &s, int k) {
  float top = 0, total = 0;
  int64_t count = 0;
  for (int slice = 0; k + slice < s.slices; ++slice) {
    const int level = k + slice + 1;
    const int64_t n = s.level_count[level];
    const float *value = s.level_value[level].data(), quarter = std::ldexp(1.0f, -2 * slice);
    const float v = largest(value, n) * quarter;
    top = v > top ? v : top;
    total = total + magnitudes(value, n) * quarter;
    count += n;
  }
  const float mean = total / (float)count, range = mean * lowtide::kRange;
  if (!(mean >= lowtide::kLeast && range <= FLT_MAX)) return 0;
  return range < top ? range : top;
}

static void make_classes(const lt_group &g, Selection &s) {
  int64_t entry = 0;
  for (int k = 0; k < s.slices; ++k) {
    const float m = range_of(s, k);
    s.class_begin[k] = entry;
    s.class_sum[k] = 0;
    s.class_scale[k] = 0;
    if (m > 0) {
      const float inv = 127.0f / m;
      s.class_scale[k] = m / 127.0f * 0.5f;
      for (int slice = 0; k + slice < s.slices; ++slice)
        s.class_sum[k] += (int32_t)g.centre[slice] * emit(s, k + slice + 1, slice, inv, entry);
      for (; entry % 4; ++entry) {  // padding reads a line that is read anyway and adds nothing
        s.channel[entry] = s.channel[entry - 1];
        s.slice[entry] = s.slice[entry - 1];
        s.coef[entry] = 0;
      }
    }
  }
  s.class_begin[s.slices] = entry;
}

static void select(const lt_group &g, const float *x, const float *score, const uint16_t *importance,
                   const float *thresholds, Selection &s) {
  s.in = g.in;
  s.slices = g.slices;
  std::memset(s.level_count, 0, sizeof s.level_count);
  f32x16 shrink[LT_MAX_SLICES + 1];
  for (int l = 1; l <= g.slices; ++l) shrink[l] = splat(g.shrink[l - 1]);
  for (int64_t j = 0; j < g.in; j += 16) {
    const int64_t n = g.in - j;
    const f32x16 a = load_part(x + j, n) - load_half_part(g.mean + j, n);
    store_part(s.a.data() + j, a, n);
    const f32x16 sc = score ? load_part(score + j, n) : absolute(a) * load_half_part(importance + j, n);
    f32x16 factor{};
    for (int l = 1; l <= g.slices; ++l) factor = sc > splat(thresholds[l - 1]) ? shrink[l] : factor;
    append(s, j, n, a * load_half_part(g.col_scale + j, n) * factor, sc, thresholds);
  }
  make_classes(g, s);
}

}  // namespace LT_NS
