// AVX2 with FMA and F16C (Haswell, Zen and later).
#define LT_NS lowtide_avx2
#define LT_NAME "avx2"
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace LT_NS {

// Bytes of two runs become pairs for vpmaddubsw. A pair adds at most 3 * 127 * 2 = 762 to a 16-bit sum, so 42 pairs
// fit; the 32-bit sums are updated every 16 pairs. Sums are kept in the order of the rows.
constexpr int64_t kStep = 32;

static inline __m256i two_coefficients(const int8_t *coef) {
  int16_t two;
  std::memcpy(&two, coef, 2);
  return _mm256_set1_epi16(two);
}

static inline void add_to(int32_t *acc, __m128i sums) {
  __m256i *to = (__m256i *)acc;
  _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), _mm256_cvtepi16_epi32(sums)));
}

// 32 bytes of each run, half a wide tile; row p * 64 + b for byte b.
static inline void half_tile(const uint8_t *base, const uint32_t *offset, const int8_t *coef, int64_t n, int64_t ahead,
                             bool prefetch, int32_t *acc) {
  const __m256i three = _mm256_set1_epi8(3);
  __m256i sum[4][2];
  for (auto &p : sum) p[0] = p[1] = _mm256_setzero_si256();
  for (int64_t e = 0; e < n; e += 2) {
    const __m256i a = _mm256_loadu_si256((const __m256i *)(base + offset[e]));
    const __m256i b = _mm256_loadu_si256((const __m256i *)(base + offset[e + 1]));
    if (prefetch) {
      _mm_prefetch((const char *)base + offset[e + ahead], _MM_HINT_T0);
      _mm_prefetch((const char *)base + offset[e + 1 + ahead], _MM_HINT_T0);
    }
    __m256i lo = _mm256_unpacklo_epi8(a, b), hi = _mm256_unpackhi_epi8(a, b);
    const __m256i c = two_coefficients(coef + e);
    for (int p = 0; p < 4; ++p) {
      sum[p][0] = _mm256_add_epi16(sum[p][0], _mm256_maddubs_epi16(_mm256_and_si256(lo, three), c));
      sum[p][1] = _mm256_add_epi16(sum[p][1], _mm256_maddubs_epi16(_mm256_and_si256(hi, three), c));
      lo = _mm256_srli_epi16(lo, 2);
      hi = _mm256_srli_epi16(hi, 2);
    }
  }
  for (int p = 0; p < 4; ++p) {  // 128-bit lanes: sum 0 holds bytes 0-7 and 16-23, sum 1 bytes 8-15 and 24-31
    int32_t *to = acc + p * 64;
    add_to(to, _mm256_castsi256_si128(sum[p][0]));
    add_to(to + 8, _mm256_castsi256_si128(sum[p][1]));
    add_to(to + 16, _mm256_extracti128_si256(sum[p][0], 1));
    add_to(to + 24, _mm256_extracti128_si256(sum[p][1], 1));
  }
}

static inline void narrow_tile(const uint8_t *base, const uint32_t *offset, const int8_t *coef, int64_t n,
                               int64_t ahead, int32_t *acc) {
  const __m128i three = _mm_set1_epi8(3);
  __m128i sum[4][2];
  for (auto &p : sum) p[0] = p[1] = _mm_setzero_si128();
  for (int64_t e = 0; e < n; e += 2) {
    const __m128i a = _mm_loadu_si128((const __m128i *)(base + offset[e]));
    const __m128i b = _mm_loadu_si128((const __m128i *)(base + offset[e + 1]));
    _mm_prefetch((const char *)base + offset[e + ahead], _MM_HINT_T0);
    _mm_prefetch((const char *)base + offset[e + 1 + ahead], _MM_HINT_T0);
    __m128i lo = _mm_unpacklo_epi8(a, b), hi = _mm_unpackhi_epi8(a, b);
    const __m128i c = _mm256_castsi256_si128(two_coefficients(coef + e));
    for (int p = 0; p < 4; ++p) {
      sum[p][0] = _mm_add_epi16(sum[p][0], _mm_maddubs_epi16(_mm_and_si128(lo, three), c));
      sum[p][1] = _mm_add_epi16(sum[p][1], _mm_maddubs_epi16(_mm_and_si128(hi, three), c));
      lo = _mm_srli_epi16(lo, 2);
      hi = _mm_srli_epi16(hi, 2);
    }
  }
  for (int p = 0; p < 4; ++p)
    for (int h = 0; h < 2; ++h) add_to(acc + p * 16 + h * 8, sum[p][h]);
}

static void digits(const uint8_t *base, const uint32_t *offset, const int8_t *coef, int64_t n, int64_t ahead,
                   int64_t wide, int64_t narrow, int32_t *acc) {
  std::memset(acc, 0, (size_t)(wide * 256 + narrow * 64) * sizeof(int32_t));
  for (int64_t e = 0; e < n; e += kStep) {
    const int64_t step = n - e < kStep ? n - e : kStep;
    for (int64_t t = 0; t < wide; ++t) {
      half_tile(base + t * 64, offset + e, coef + e, step, ahead, true, acc + t * 256);
      half_tile(base + t * 64 + 32, offset + e, coef + e, step, ahead, false, acc + t * 256 + 32);
    }
    for (int64_t t = 0; t < narrow; ++t)
      narrow_tile(base + wide * 64 + t * 16, offset + e, coef + e, step, ahead, acc + wide * 256 + t * 64);
  }
}

}  // namespace LT_NS

#include "kernels_impl.h"

namespace lowtide {
const Kernels *avx2_kernels() {
  const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return runs ? &lowtide_avx2::kTable : nullptr;
}
}  // namespace lowtide
