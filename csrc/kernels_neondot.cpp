// AArch64 with the dot product instructions (Neoverse N1, Cortex-A76 and later).
#define LT_NS lowtide_neondot
#define LT_NAME "neondot"
#define LT_OWN_GEMM
#define LT_OWN_ORDER
#include <arm_neon.h>
#include <sys/auxv.h>

#include <cstring>

#include "kernels.h"

namespace LT_NS {

// Bytes of four runs become quads: byte k of run 0, 1, 2, 3 side by side, so that one sdot adds four entries; quad[z]
// holds bytes 4 z to 4 z + 3.
static inline void make_quads(const uint8x16_t *line, uint8x16_t *quad) {
  const uint16x8_t ab_lo = vreinterpretq_u16_u8(vzip1q_u8(line[0], line[1]));
  const uint16x8_t ab_hi = vreinterpretq_u16_u8(vzip2q_u8(line[0], line[1]));
  const uint16x8_t cd_lo = vreinterpretq_u16_u8(vzip1q_u8(line[2], line[3]));
  const uint16x8_t cd_hi = vreinterpretq_u16_u8(vzip2q_u8(line[2], line[3]));
  quad[0] = vreinterpretq_u8_u16(vzip1q_u16(ab_lo, cd_lo));
  quad[1] = vreinterpretq_u8_u16(vzip2q_u16(ab_lo, cd_lo));
  quad[2] = vreinterpretq_u8_u16(vzip1q_u16(ab_hi, cd_hi));
  quad[3] = vreinterpretq_u8_u16(vzip2q_u16(ab_hi, cd_hi));
}

// Digits 1 and 2 are not shifted down: the mask leaves d * 4^p, and in_order() shifts the sums. Digit 3 would reach the
// sign that way, and a shift by 6 takes no mask.
static inline int8x16_t digit(uint8x16_t byte, int p) {
  return vreinterpretq_s8_u8(p == 3 ? vshrq_n_u8(byte, 6) : vandq_u8(byte, vdupq_n_u8((uint8_t)(3 << (2 * p)))));
}

static inline int8x16_t four_coefficients(const int8_t *coef) {
  int32_t four;
  std::memcpy(&four, coef, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

// Loading and storing the sums costs as much as eight entries.
constexpr int64_t kStep = 64;

// 16 bytes of each run, out of the `bytes` that the tile takes; row p * bytes + b for byte b.
static inline void column(const uint8_t *base, const uint32_t *offset, const int8_t *coef, int64_t n, int64_t ahead,
                          bool prefetch, int64_t bytes, int32_t *acc) {
  int32x4_t sum[4][4];
  for (int p = 0; p < 4; ++p)
    for (int z = 0; z < 4; ++z) sum[p][z] = vld1q_s32(acc + p * bytes + z * 4);
  for (int64_t e = 0; e < n; e += 4) {
    uint8x16_t line[4], quad[4];
    for (int i = 0; i < 4; ++i) {
      line[i] = vld1q_u8(base + offset[e + i]);
      if (prefetch) __builtin_prefetch(base + offset[e + i + ahead]);
    }
    make_quads(line, quad);
    const int8x16_t c = four_coefficients(coef + e);
    for (int p = 0; p < 4; ++p)
      for (int z = 0; z < 4; ++z) sum[p][z] = vdotq_s32(sum[p][z], digit(quad[z], p), c);
  }
  for (int p = 0; p < 4; ++p)
    for (int z = 0; z < 4; ++z) vst1q_s32(acc + p * bytes + z * 4, sum[p][z]);
}

static void digits(const uint8_t *base, const uint32_t *offset, const int8_t *coef, int64_t n, int64_t ahead,
                   int64_t wide, int64_t narrow, int32_t *acc) {
  std::memset(acc, 0, (size_t)(wide * 256 + narrow * 64) * sizeof(int32_t));
  for (int64_t e = 0; e < n; e += kStep) {
    const int64_t step = n - e < kStep ? n - e : kStep;
    for (int64_t t = 0; t < wide; ++t)
      for (int b = 0; b < 64; b += 16)  // the four columns share a line: one of them asks for it
        column(base + t * 64 + b, offset + e, coef + e, step, ahead, b == 0, 64, acc + t * 256 + b);
    for (int64_t t = 0; t < narrow; ++t)
      column(base + wide * 64 + t * 16, offset + e, coef + e, step, ahead, true, 16, acc + wide * 256 + t * 64);
  }
}

static const int32_t *in_order(const int32_t *acc, int64_t tile, int64_t wide, int32_t *room) {
  const bool is_wide = tile < wide;
  const int32_t *sums = acc + (is_wide ? tile * 256 : wide * 256 + (tile - wide) * 64);
  const int64_t bytes = is_wide ? 64 : 16;
  for (int p = 0; p < 4; ++p) {
    const int32x4_t down = vdupq_n_s32(p == 3 ? 0 : -2 * p);
    for (int64_t i = p * bytes; i < (p + 1) * bytes; i += 4) vst1q_s32(room + i, vshlq_s32(vld1q_s32(sums + i), down));
  }
  return room;
}

}  // namespace LT_NS

#include "kernels_impl.h"

namespace LT_NS {

// ---- prefill: int8 products. The panel holds, for each four channels, 64 rows as quads. sdot takes signed bytes, so
// the panel holds code - 128, and multiply() adds 128 times the sum of the inputs.

static void unpack(const lt_group &g, const lt_linear &l, int64_t index, int64_t from, void *panel) {
  const Tiling t(l.out);
  const int64_t width = t.width(index), bytes = width / 4, run = t.run_bytes(), plane = run * g.in;
  const uint8_t *base = l.weight + t.byte_offset(index);
  for (int64_t j = from; j < from + kDepth; j += 4)
    for (int64_t r = 0; r < width; r += 16) {
      uint8_t *to = (uint8_t *)panel + r / 64 * 64 * kDepth + (j - from) * 64 + r % 64 * 4;
      uint8x16_t line[4], quad[4];
      for (int i = 0; i < 4; ++i) {
        u8x16 code{};
        if (j + i < g.in) code = codes(base + (j + i) * run + r % bytes, plane, g.slices, (int)(r / bytes) * 2);
        line[i] = veorq_u8((uint8x16_t)code, vdupq_n_u8(0x80));
      }
      make_quads(line, quad);
      for (int z = 0; z < 4; ++z) vst1q_u8(to + z * 16, quad[z]);
    }
}

// Quad kLane of 16 channels, for every token and kVectors * 4 rows.
template <int kLane, int kRows, int kVectors>
static inline void add_quad(int32x4_t (&acc)[kRows][kVectors], const int8x16_t *x, const int8_t *panel) {
  for (int v = 0; v < kVectors; ++v) {
    const int8x16_t code = vld1q_s8(panel + kLane * 256 + v * 16);
    for (int i = 0; i < kRows; ++i) acc[i][v] = vdotq_laneq_s32(acc[i][v], code, x[i], kLane);
  }
}

template <int kRows>
static inline void multiply_rows(const int8_t *q, const float *scale, const float *sum, float middle,
                                 const int8_t *panel, float *y) {
  constexpr int kVectors = kRows == 1 ? 8 : 2;  // sums and inputs of all tokens stay in registers
  for (int column = 0; column < 64; column += kVectors * 4) {
    int32x4_t acc[kRows][kVectors];
    for (auto &row : acc)
      for (auto &v : row) v = vdupq_n_s32(0);
    const int8_t *p = panel + column * 4;
    for (int64_t j = 0; j < kDepth; j += 16, p += 4 * 256) {
      int8x16_t x[kRows];
      for (int i = 0; i < kRows; ++i) x[i] = vld1q_s8(q + i * kDepth + j);
      add_quad<0>(acc, x, p);
      add_quad<1>(acc, x, p);
      add_quad<2>(acc, x, p);
      add_quad<3>(acc, x, p);
    }
    for (int i = 0; i < kRows; ++i) {
      const float32x4_t shift = vdupq_n_f32((128 - middle) * sum[i]);
      for (int v = 0; v < kVectors; ++v) {
        float *to = y + i * 64 + column + v * 4;
        const float32x4_t whole = vaddq_f32(vcvtq_f32_s32(acc[i][v]), shift);
        vst1q_f32(to, vaddq_f32(vld1q_f32(to), vmulq_n_f32(whole, scale[i])));
      }
    }
  }
}

static void multiply(const lt_group &g, const int8_t *q, const float *scale, const float *sum, int64_t m, int64_t width,
                     const void *panel, float *y) {
  const float middle = 0.5f * (float)lowtide::doubled_centre(g);
  for (int64_t part = 0; part < width; part += 64, y += m * 64) {
    const int8_t *p = (const int8_t *)panel + part * kDepth;
    int64_t i = 0;
    for (; i + 8 <= m; i += 8) multiply_rows<8>(q + i * kDepth, scale + i, sum + i, middle, p, y + i * 64);
    for (; i < m; ++i) multiply_rows<1>(q + i * kDepth, scale + i, sum + i, middle, p, y + i * 64);
  }
}

}  // namespace LT_NS

namespace lowtide {
const Kernels *neondot_kernels() {
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? &lowtide_neondot::kTable : nullptr;
}
}  // namespace lowtide
