// Sixteen-lane float vectors, in the compiler's own vector extension or, for AVX2, as two registers.
//
// Every instruction set compiles this same source without fused multiply-add, so float results are
// the same bits everywhere. Include only from a file that is compiled for one instruction set; all
// names live in that file's own namespace LT_NS.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
#include "vec_avx2.h"
#else
namespace LT_NS {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));

static inline f32x16 load(const float *p) {
  f32x16 v;
  std::memcpy(&v, p, 64);
  return v;
}
static inline void store(float *p, f32x16 v) { std::memcpy(p, &v, 64); }
static inline i32x16 load_int(const int32_t *p) {
  i32x16 v;
  std::memcpy(&v, p, 64);
  return v;
}
static inline void store_int(int32_t *p, i32x16 v) { std::memcpy(p, &v, 64); }
static inline f32x16 splat(float x) { return x - f32x16{}; }
static inline i32x16 splat_int(int32_t x) { return x - i32x16{}; }

static inline f32x16 absolute(f32x16 v) { return (f32x16)((i32x16)v & 0x7fffffff); }
// The second one where either is not a number.
static inline f32x16 maximum(f32x16 a, f32x16 b) { return a > b ? a : b; }
static inline f32x16 minimum(f32x16 a, f32x16 b) { return a < b ? a : b; }

static inline i32x16 bits_of(f32x16 v) { return (i32x16)v; }
static inline f32x16 float_of_bits(i32x16 v) { return (f32x16)v; }
static inline f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }

}  // namespace LT_NS
#endif

namespace LT_NS {

static inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#elif defined(__aarch64__)
  __fp16 half;
  std::memcpy(&half, &h, 2);
  return half;
#else
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = (uint32_t)(h & 0x7fff) << 13;
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals exactly.
  uint32_t bits = magnitude;
  float f;
  std::memcpy(&f, &bits, 4);
  f *= 5.192296858534828e33f;
  if ((h & 0x7c00) == 0x7c00) {
    bits = magnitude | 0x7f800000;
    std::memcpy(&f, &bits, 4);
  }
  std::memcpy(&bits, &f, 4);
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

// Round to nearest, ties to even; too large becomes infinite.
static inline uint16_t float_to_half(float f) {
#if defined(__F16C__)
  return (uint16_t)_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  const __fp16 half = (__fp16)f;
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
#else
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;
  if (bits < 0x38800000) {  // subnormal half: adding 0.5 lets the hardware round at 2^-24
    float g;
    std::memcpy(&g, &bits, 4);
    g += 0.5f;
    std::memcpy(&bits, &g, 4);
    return sign | (uint16_t)(bits - 0x3f000000);
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return sign | (uint16_t)((bits - 0x38000000) >> 13);
#endif
}

static inline f32x16 load_half(const uint16_t *p) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
#elif defined(__aarch64__)
  const float16x8_t lo = vreinterpretq_f16_u16(vld1q_u16(p)), hi = vreinterpretq_f16_u16(vld1q_u16(p + 8));
  const float32x4_t part[4] = {vcvt_f32_f16(vget_low_f16(lo)), vcvt_high_f32_f16(lo), vcvt_f32_f16(vget_low_f16(hi)),
                               vcvt_high_f32_f16(hi)};
  f32x16 v;
  std::memcpy(&v, part, 64);
  return v;
#else
  float f[16];
  for (int i = 0; i < 16; ++i) f[i] = half_to_float(p[i]);
  return load(f);
#endif
}

// Lanes beyond n are zero; nothing beyond n is read.
static inline f32x16 load_part(const float *p, int64_t n) {
  if (n >= 16) return load(p);
  float t[16] = {};
  std::memcpy(t, p, (size_t)n * 4);
  return load(t);
}
static inline f32x16 load_half_part(const uint16_t *p, int64_t n) {
  if (n >= 16) return load_half(p);
  uint16_t t[16] = {};
  std::memcpy(t, p, (size_t)n * 2);
  return load_half(t);
}
static inline void store_part(float *p, f32x16 v, int64_t n) {
  if (n >= 16) return store(p, v);
  float t[16];
  store(t, v);
  std::memcpy(p, t, (size_t)n * 4);
}

// Signed bytes as floats.
#if defined(__AVX2__)
static inline __m256 eight_bytes(const int8_t *p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
#endif
static inline f32x16 load_bytes(const int8_t *p) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
  return {eight_bytes(p), eight_bytes(p + 8)};
#else
  typedef int8_t i8x16 __attribute__((vector_size(16)));
  i8x16 v;
  std::memcpy(&v, p, 16);
  return __builtin_convertvector(v, f32x16);
#endif
}
static inline f32x16 load_bytes_part(const int8_t *p, int64_t n) {
  if (n >= 16) return load_bytes(p);
  int8_t t[16] = {};
  std::memcpy(t, p, (size_t)n);
  return load_bytes(t);
}

// Fixed order of additions, whatever the instruction set.
static inline float sum_lanes(f32x16 v) {
#if defined(__AVX2__)
  __m256 half[2];
  std::memcpy(half, &v, 64);
  const __m256 eight = _mm256_add_ps(half[0], half[1]);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  float f[16];
  store(f, v);
  for (int w = 8; w; w >>= 1)
    for (int i = 0; i < w; ++i) f[i] += f[i + w];
  return f[0];
#endif
}
static inline float max_lanes(f32x16 v) {
#if defined(__AVX2__)
  __m256 half[2];
  std::memcpy(half, &v, 64);
  const __m256 eight = _mm256_max_ps(half[0], half[1]);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  float f[16];
  store(f, v);
  for (int w = 8; w; w >>= 1)
    for (int i = 0; i < w; ++i) f[i] = f[i] > f[i + w] ? f[i] : f[i + w];
  return f[0];
#endif
}
static inline int32_t sum_lanes_int(i32x16 v) {
  int32_t q[16];
  store_int(q, v);
  for (int w = 8; w; w >>= 1)
    for (int i = 0; i < w; ++i) q[i] += q[i + w];
  return q[0];
}

// e^x, relative error below 3e-7 on [-87, 88]: range reduction to |r| <= ln2/2 and a Taylor polynomial of degree 7.
static inline f32x16 exponential(f32x16 x) {
  x = minimum(splat(88.0f), maximum(splat(-87.0f), x));
  const f32x16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32x16 k = (x * 1.44269504088896341f + magic) - magic;
  const f32x16 r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
  f32x16 p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const i32x16 e = (bits_of(k + magic) - splat_int(0x4b400000 - 127)) << 23;
  return p * float_of_bits(e);
}

}  // namespace LT_NS
