// AArch64 as every such machine has it.
#define LT_NS lowtide_neon
#define LT_NAME "neon"
#include <arm_neon.h>

#include <cstring>

#include "kernels.h"

namespace LT_NS {

// Products of bytes are added to 16-bit sums. An entry adds at most 3 * 127 = 381, so 86 of them fit; the 32-bit sums,
// kept in the order of the rows, are updated every 64.
constexpr int64_t kStep = 64;

static inline void add_to(int32_t *acc, int16x8_t sums) {
  vst1q_s32(acc, vaddw_s16(vld1q_s32(acc), vget_low_s16(sums)));
  vst1q_s32(acc + 4, vaddw_high_s16(vld1q_s32(acc + 4), sums));
}

// kVectors * 16 bytes of each run, out of the `bytes` that the tile takes; row p * bytes + b for byte b. Two vectors'
// sums take half the registers, so a wide tile is done in halves.
template <int kVectors>
static inline void part_of_tile(const uint8_t *base, const uint32_t *offset, const int8_t *coef, int64_t n,
                                int64_t ahead, bool prefetch, int64_t bytes, int32_t *acc) {
  const uint8x16_t three = vdupq_n_u8(3);
  int16x8_t sum[kVectors][4][2];
  for (auto &v : sum)
    for (auto &p : v) p[0] = p[1] = vdupq_n_s16(0);
  for (int64_t e = 0; e < n; ++e) {
    const uint8_t *run = base + offset[e];
    if (prefetch) __builtin_prefetch(base + offset[e + ahead]);
    const int8x16_t c = vld1q_dup_s8(coef + e);
    for (int v = 0; v < kVectors; ++v) {
      const uint8x16_t byte = vld1q_u8(run + v * 16);
      const uint8x16_t digit[4] = {vandq_u8(byte, three), vandq_u8(vshrq_n_u8(byte, 2), three),
                                   vandq_u8(vshrq_n_u8(byte, 4), three), vshrq_n_u8(byte, 6)};
      for (int p = 0; p < 4; ++p) {
        const int8x16_t d = vreinterpretq_s8_u8(digit[p]);
        sum[v][p][0] = vmlal_s8(sum[v][p][0], vget_low_s8(d), vget_low_s8(c));
        sum[v][p][1] = vmlal_high_s8(sum[v][p][1], d, c);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v)
    for (int p = 0; p < 4; ++p)
      for (int h = 0; h < 2; ++h) add_to(acc + p * bytes + v * 16 + h * 8, sum[v][p][h]);
}

static void digits(const uint8_t *base, const uint32_t *offset, const int8_t *coef, int64_t n, int64_t ahead,
                   int64_t wide, int64_t narrow, int32_t *acc) {
  std::memset(acc, 0, (size_t)(wide * 256 + narrow * 64) * sizeof(int32_t));
  for (int64_t e = 0; e < n; e += kStep) {
    const int64_t step = n - e < kStep ? n - e : kStep;
    for (int64_t t = 0; t < wide; ++t) {
      part_of_tile<2>(base + t * 64, offset + e, coef + e, step, ahead, true, 64, acc + t * 256);
      part_of_tile<2>(base + t * 64 + 32, offset + e, coef + e, step, ahead, false, 64, acc + t * 256 + 32);
    }
    for (int64_t t = 0; t < narrow; ++t)
      part_of_tile<1>(base + wide * 64 + t * 16, offset + e, coef + e, step, ahead, true, 16,
                      acc + wide * 256 + t * 64);
  }
}

}  // namespace LT_NS

#include "kernels_impl.h"

namespace lowtide {
const Kernels *neon_kernels() { return &lowtide_neon::kTable; }
}  // namespace lowtide
