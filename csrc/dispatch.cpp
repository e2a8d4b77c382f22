#include "dispatch.h"

#include <cstring>

namespace lowtide {

const std::vector<const Kernels *> &available_kernels() {
  static const std::vector<const Kernels *> table = [] {
    std::vector<const Kernels *> found;
    for (const Kernels *k : {
#if defined(__x86_64__)
             avx512_kernels(), avx2_kernels(),
#elif defined(__aarch64__)
             neondot_kernels(), neon_kernels(),
#endif
             portable_kernels()})
      if (k) found.push_back(k);
    return found;
  }();
  return table;
}

const Kernels *find_kernels(const char *name) {
  for (const Kernels *k : available_kernels())
    if (!name || !*name || !std::strcmp(k->name, name)) return k;
  return nullptr;
}

void Selection::reserve(int64_t max_in) {
  // Vector stores run up to 15 lanes over, and every class is padded to four entries.
  const size_t channels = (size_t)max_in + 16;
  const size_t most = (size_t)max_in * LT_MAX_SLICES;
  const size_t entries = most + most / 4 + most / 128 + 16 + 4 * LT_MAX_SLICES;  // kRange bounds those entered again
  a.resize(channels);
  score.resize(channels);
  rank.resize(channels);
  for (int l = 1; l <= LT_MAX_SLICES; ++l) {
    level_channel[l].resize(channels);
    level_value[l].resize(channels);
  }
  run.resize(entries);
  coef.resize(entries);
  offset.resize(entries + kAhead * kBlock);
}

void Selection::keep(int part, int parts) {
  int64_t to = 0;
  for (int k = 0; k < slices; ++k) {
    const int64_t first = class_begin[k], quads = (class_begin[k + 1] - first) / 4;
    const int64_t begin = first + quads * part / parts * 4, n = first + quads * (part + 1) / parts * 4 - begin;
    class_begin[k] = to;
    std::memmove(run.data() + to, run.data() + begin, (size_t)n * sizeof run[0]);
    std::memmove(coef.data() + to, coef.data() + begin, (size_t)n);
    to += n;
  }
  class_begin[slices] = to;
}

}  // namespace lowtide
