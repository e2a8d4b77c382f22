// AVX2 with FMA and F16C (Haswell, Zen and later).
#define LT_NS lowtide_avx2
#define LT_NAME "avx2"
#define LT_OWN_GEMM
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace LT_NS {

// Bytes of two runs become pairs for vpmaddubsw. A pair adds at most 3 * 127 * 2 = 762 to a 16-bit sum, so 42 pairs
// fit; after 40 the sums are added to those of 32 bits, which are kept in the order of the rows.
constexpr int64_t kStep = 2 * lowtide::kBlock;
static_assert(kStep / 2 * 762 <= 32767, "sums of 16 bits");

static inline __m256i two_coefficients(const int8_t *coef) {
  int16_t two;
  std::memcpy(&two, coef, 2);
  return _mm256_set1_epi16(two);
}

// 32 bytes of each run, half a wide tile: sum[2 p + h] for digit p of the pairs' lower (0) and upper (1) halves.
static inline void half_tile(const uint8_t *base, const uint32_t *offset, const int8_t *coef, int64_t n, int64_t ahead,
                             bool prefetch, __m256i *sums) {
  const __m256i three = _mm256_set1_epi8(3);
  __m256i sum[4][2];
  for (int p = 0; p < 4; ++p)
    for (int h = 0; h < 2; ++h) sum[p][h] = _mm256_load_si256(sums + 2 * p + h);
  for (int64_t e = 0; e < n; e += 2) {
    const __m256i a = _mm256_loadu_si256((const __m256i *)(base + offset[e]));
    const __m256i b = _mm256_loadu_si256((const __m256i *)(base + offset[e + 1]));
    if (prefetch) {
      _mm_prefetch((const char *)base + offset[e + ahead], _MM_HINT_T1);
      _mm_prefetch((const char *)base + offset[e + 1 + ahead], _MM_HINT_T1);
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
  for (int p = 0; p < 4; ++p)
    for (int h = 0; h < 2; ++h) _mm256_store_si256(sums + 2 * p + h, sum[p][h]);
}

// Two digits to a register, for 16 bytes are half of one: sum[2 q + h], digits 2 q and 2 q + 1.
static inline void narrow_tile(const uint8_t *base, const uint32_t *offset, const int8_t *coef, int64_t n,
                               int64_t ahead, __m256i *sums) {
  const __m256i three = _mm256_set1_epi8(3), shift = _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2);
  __m256i sum[4] = {_mm256_load_si256(sums), _mm256_load_si256(sums + 1), _mm256_load_si256(sums + 2),
                    _mm256_load_si256(sums + 3)};
  for (int64_t e = 0; e < n; e += 2) {
    const __m128i a = _mm_loadu_si128((const __m128i *)(base + offset[e]));
    const __m128i b = _mm_loadu_si128((const __m128i *)(base + offset[e + 1]));
    _mm_prefetch((const char *)base + offset[e + ahead], _MM_HINT_T1);
    _mm_prefetch((const char *)base + offset[e + 1 + ahead], _MM_HINT_T1);
    const __m256i c = two_coefficients(coef + e);
    // Bits that the shift brings over from the next byte are beyond the mask's.
    const __m256i lo = _mm256_srlv_epi32(_mm256_broadcastsi128_si256(_mm_unpacklo_epi8(a, b)), shift);
    const __m256i hi = _mm256_srlv_epi32(_mm256_broadcastsi128_si256(_mm_unpackhi_epi8(a, b)), shift);
    const __m256i digit[4] = {_mm256_and_si256(lo, three), _mm256_and_si256(hi, three),
                              _mm256_and_si256(_mm256_srli_epi16(lo, 4), three),
                              _mm256_and_si256(_mm256_srli_epi16(hi, 4), three)};
    for (int i = 0; i < 4; ++i) sum[i] = _mm256_add_epi16(sum[i], _mm256_maddubs_epi16(digit[i], c));
  }
  for (int i = 0; i < 4; ++i) _mm256_store_si256(sums + i, sum[i]);
}

// acc[0 .. 7] and acc[apart .. apart + 7] += the halves of `sums`, which become zero.
static inline void add_to(int32_t *acc, int64_t apart, __m256i *sums) {
  const __m256i v = _mm256_load_si256(sums);
  __m256i *lo = (__m256i *)acc, *hi = (__m256i *)(acc + apart);
  _mm256_storeu_si256(lo, _mm256_add_epi32(_mm256_loadu_si256(lo), _mm256_cvtepi16_epi32(_mm256_castsi256_si128(v))));
  _mm256_storeu_si256(
      hi, _mm256_add_epi32(_mm256_loadu_si256(hi), _mm256_cvtepi16_epi32(_mm256_extracti128_si256(v, 1))));
  _mm256_store_si256(sums, _mm256_setzero_si256());
}

static void digits(const uint8_t *base, const uint32_t *offset, const int8_t *coef, int64_t n, int64_t ahead,
                   int64_t wide, int64_t narrow, int32_t *acc) {
  std::memset(acc, 0, (size_t)(wide * 256 + narrow * 64) * sizeof(int32_t));
  __m256i sums[lowtide::kPassTiles * 16];  // a wide tile has 16, a narrow one 4
  __m256i *const narrow_sums = sums + wide * 16;
  std::memset(sums, 0, (size_t)(wide * 16 + narrow * 4) * sizeof sums[0]);
  for (int64_t group = 0; group < n; group += kStep) {
    const int64_t end = n - group < kStep ? n : group + kStep;
    for (int64_t e = group; e < end; e += lowtide::kBlock) {
      const int64_t step = end - e < lowtide::kBlock ? end - e : lowtide::kBlock;
      for (int64_t t = 0; t < wide; ++t) {
        half_tile(base + t * 64, offset + e, coef + e, step, ahead, true, sums + t * 16);
        half_tile(base + t * 64 + 32, offset + e, coef + e, step, ahead, false, sums + t * 16 + 8);
      }
      for (int64_t t = 0; t < narrow; ++t)
        narrow_tile(base + wide * 64 + t * 16, offset + e, coef + e, step, ahead, narrow_sums + t * 4);
    }
    // Row p * 64 + b of a wide tile for digit p of byte b, p * 16 + b of a narrow one. 128-bit lanes: of 32 bytes, sum 0
    // holds bytes 0-7 and 16-23, sum 1 bytes 8-15 and 24-31.
    for (int64_t i = 0; i < wide * 16; ++i)
      add_to(acc + i / 16 * 256 + i % 8 / 2 * 64 + i % 16 / 8 * 32 + i % 2 * 8, 16, sums + i);
    for (int64_t i = 0; i < narrow * 4; ++i)
      add_to(acc + wide * 256 + i / 4 * 64 + i % 4 / 2 * 32 + i % 2 * 8, 16, narrow_sums + i);
  }
}

}  // namespace LT_NS

#include "kernels_impl.h"
#include "prefill_avx2.h"

namespace lowtide {
const Kernels *avx2_kernels() {
  const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return runs ? &lowtide_avx2::kTable : nullptr;
}
}  // namespace lowtide
