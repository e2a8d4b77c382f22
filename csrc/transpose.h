// Sixteen vectors of sixteen floats, turned. Included by prefill_impl.h only.
#pragma once
#include <cstring>

#include "vec.h"

namespace LT_NS {

// to[j * to_stride + i] = from[i * stride + j] for i < 16 and j < min(16, n). Rows of `from` are read whole.
#if defined(__AVX512F__)
static inline void transpose(const float *from, int64_t stride, int64_t n, float *to, int64_t to_stride) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  // a[4 q + c], 128-bit lane l: column 4 l + c of rows 4 q to 4 q + 3.
#pragma GCC unroll 4
  for (int q = 0; q < 16; q += 4)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      a[q + 2 * h] = (__m512)_mm512_unpacklo_pd((__m512d)b[q + h], (__m512d)b[q + 2 + h]);
      a[q + 2 * h + 1] = (__m512)_mm512_unpackhi_pd((__m512d)b[q + h], (__m512d)b[q + 2 + h]);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 lo01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x44), hi01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xee);
    const __m512 lo23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x44);
    const __m512 hi23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xee);
    const __m512 row[4] = {_mm512_shuffle_f32x4(lo01, lo23, 0x88), _mm512_shuffle_f32x4(lo01, lo23, 0xdd),
                           _mm512_shuffle_f32x4(hi01, hi23, 0x88), _mm512_shuffle_f32x4(hi01, hi23, 0xdd)};
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l)
      if (4 * l + c < n) _mm512_storeu_ps(to + (4 * l + c) * to_stride, row[l]);
  }
}
#elif defined(__AVX2__)
// Eight columns of eight rows.
static inline void transpose_eight(const float *from, int64_t stride, int64_t n, float *to, int64_t to_stride) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  // a[4 q + c], 128-bit lane l: column 4 l + c of rows 4 q to 4 q + 3.
#pragma GCC unroll 2
  for (int q = 0; q < 8; q += 4)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      a[q + 2 * h] = (__m256)_mm256_unpacklo_pd((__m256d)b[q + h], (__m256d)b[q + 2 + h]);
      a[q + 2 * h + 1] = (__m256)_mm256_unpackhi_pd((__m256d)b[q + h], (__m256d)b[q + 2 + h]);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    if (c < n) _mm256_storeu_ps(to + c * to_stride, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
    if (4 + c < n) _mm256_storeu_ps(to + (4 + c) * to_stride, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
  }
}
static inline void transpose(const float *from, int64_t stride, int64_t n, float *to, int64_t to_stride) {
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 16; j += 8)
      transpose_eight(from + i * stride + j, stride, n - j, to + j * to_stride + i, to_stride);
}
#else
static inline void transpose(const float *from, int64_t stride, int64_t n, float *to, int64_t to_stride) {
  for (int64_t j = 0; j < 16 && j < n; ++j)
    for (int64_t i = 0; i < 16; ++i) to[j * to_stride + i] = from[i * stride + j];
}
#endif

}  // namespace LT_NS
