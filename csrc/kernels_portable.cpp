// Any machine: plain C++ that the compiler vectorises as it can.
#define LT_NS lowtide_portable
#define LT_NAME "portable"
#include <cstdint>
#include <cstring>

namespace LT_NS {

template <int kBytes>
static void one_tile(const uint8_t *base, const uint32_t *offset, const int8_t *coef, int64_t n, int32_t *acc) {
  std::memset(acc, 0, kBytes * 4 * sizeof(int32_t));
  for (int64_t e = 0; e < n; ++e) {
    const uint8_t *run = base + offset[e];
    const int32_t c = coef[e];
    for (int p = 0; p < 4; ++p)
      for (int b = 0; b < kBytes; ++b) acc[p * kBytes + b] += c * ((run[b] >> (2 * p)) & 3);
  }
}

static void digits(const uint8_t *base, const uint32_t *offset, const int8_t *coef, int64_t n, int64_t /* ahead */,
                   int64_t wide, int64_t narrow, int32_t *acc) {
  for (int64_t t = 0; t < wide; ++t) one_tile<64>(base + t * 64, offset, coef, n, acc + t * 256);
  for (int64_t t = 0; t < narrow; ++t)
    one_tile<16>(base + wide * 64 + t * 16, offset, coef, n, acc + wide * 256 + t * 64);
}

}  // namespace LT_NS

#include "kernels_impl.h"

namespace lowtide {
const Kernels *portable_kernels() { return &lowtide_portable::kTable; }
}  // namespace lowtide
