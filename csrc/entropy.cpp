#include "entropy.h"

#include <algorithm>
#include <new>

#include "dispatch.h"
#include "lowtide.h"

namespace lowtide {
namespace entropy {
namespace {

// One digit off state x, which stays below 2^16 where a word has to follow.
inline int step(uint32_t &x, uint64_t table) {
  const uint32_t slot = x & ((1u << kProbBits) - 1);
  const int digit = (int)(slot >= (table & 0xffff)) + (int)(slot >= (table >> 16 & 0xffff)) + (int)(slot >= (table >> 32 & 0xffff));
  const uint32_t start = start_of(table, digit);
  x = (end_of(table, digit) - start) * (x >> kProbBits) + slot - start;
  return digit;
}

// Slice s of one channel. prefix: digits known so far of each row, as one integer; gains one more.
bool decode_rows(int64_t rows, const uint8_t *context, const uint64_t *tables, int s, Stream &stream, uint32_t *state,
                 uint8_t *prefix, uint8_t *digits) {
  const uint8_t *at = stream.at;
  for (int64_t first = 0; first < rows; first += stream.lanes) {
    const int lanes = (int)std::min<int64_t>(stream.lanes, rows - first);
    const uint8_t *c = context + first;
    uint8_t *p = prefix + first, *d = digits + first;
    if (lanes == kLanes && stream.end - at >= 2 * kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        uint32_t x = state[lane];
        const int digit = step(x, tables[((size_t)c[lane] << 2 * s) + p[lane]]);
        uint16_t word;
        std::memcpy(&word, at, 2);
        const bool refill = x < kLow;
        state[lane] = refill ? x << 16 | word : x;
        at += 2 * refill;
        d[lane] = (uint8_t)digit;
        p[lane] = (uint8_t)(p[lane] << 2 | digit);
      }
      continue;
    }
    for (int lane = 0; lane < lanes; ++lane) {
      uint32_t x = state[lane];
      const int digit = step(x, tables[((size_t)c[lane] << 2 * s) + p[lane]]);
      if (x < kLow) {
        if (stream.end - at < 2) return false;
        x = x << 16 | at[0] | (uint32_t)at[1] << 8;
        at += 2;
      }
      state[lane] = x;
      d[lane] = (uint8_t)digit;
      p[lane] = (uint8_t)(p[lane] << 2 | digit);
    }
  }
  stream.at = at;
  return true;
}

// The chunk's channels of q [out, in], turned to [channels, out].
std::vector<uint8_t> transposed(const uint8_t *q, int64_t out, int64_t in, int64_t first, int64_t channels) {
  constexpr int64_t kBlock = 32;
  std::vector<uint8_t> turned((size_t)(channels * out));
  for (int64_t i0 = 0; i0 < out; i0 += kBlock)
    for (int64_t j0 = 0; j0 < channels; j0 += kBlock)
      for (int64_t i = i0; i < std::min(out, i0 + kBlock); ++i)
        for (int64_t j = j0; j < std::min(channels, j0 + kBlock); ++j) turned[(size_t)(j * out + i)] = q[i * in + first + j];
  return turned;
}

// Slice s of one chunk, last weight first, so that the decoder meets the first one first. States and words grow down
// from `top`; their place, or null where a digit has no frequency.
uint8_t *encode_slice(const std::vector<uint8_t> &q, int64_t out, int64_t channels, int slices, int s, int lanes,
                      const uint8_t *row_class, const uint8_t *col_class, const uint64_t *tables, uint8_t *top) {
  uint32_t state[kLanes];
  std::fill(state, state + kLanes, kLow);
  const int shift = 2 * (slices - 1 - s);
  for (int64_t j = channels - 1; j >= 0; --j) {
    const uint8_t *column = q.data() + j * out;
    for (int64_t i = out - 1; i >= 0; --i) {
      const int known = column[i] >> shift, digit = known & 3;
      const uint64_t table = tables[((size_t)context_of(row_class[i], col_class[j]) << 2 * s) + (size_t)(known >> 2)];
      const uint32_t start = start_of(table, digit), frequency = end_of(table, digit) - start;
      if (!frequency) return nullptr;
      uint32_t &lane = state[i & (lanes - 1)], x = lane;
      if (x >= (uint64_t)frequency << (32 - kProbBits)) {
        *--top = (uint8_t)(x >> 8);
        *--top = (uint8_t)x;
        x >>= 16;
      }
      lane = (x / frequency << kProbBits) + x % frequency + start;
    }
  }
  top -= 4 * lanes;
  std::memcpy(top, state, (size_t)(4 * lanes));
  return top;
}

DecodeChunk find_decoder(const char *isa) {
  const Kernels *kernels = find_kernels(isa);
  if (!kernels) return nullptr;
#if defined(__x86_64__)
  if (!std::strcmp(kernels->name, "avx512")) return decode_chunk_avx512;
#endif
  return decode_chunk_portable;
}

uint32_t read32(const uint8_t *at) { return at[0] | at[1] << 8 | at[2] << 16 | (uint32_t)at[3] << 24; }

// Where chunk `index` of a slice lies. False where the stream's head does not fit the shape or its length.
bool find_chunk(const uint8_t *data, int64_t size, int64_t count, int64_t index, Stream &found) {
  if (size < 4 + 4 * count || read32(data) != (uint64_t)count) return false;
  int64_t at = 4 + 4 * count;
  for (int64_t n = 0; n < count; ++n) {
    const uint32_t entry = read32(data + 4 + 4 * n);
    const int64_t length = entry & ((1u << kLengthBits) - 1);
    if (length > size - at || entry >> kLengthBits > 4) return false;
    if (n == index) found = {data + at, data + at + length, 1 << (entry >> kLengthBits)};
    at += length;
  }
  return at == size;
}

}  // namespace

int decode_chunk_portable(const DecodeJob &job) {
  Stream stream[4];
  uint32_t state[4][kLanes];
  if (const int bad = load_states(job, stream, state)) return bad;
  const int64_t out_pad = padded_rows(job.out);
  std::vector<uint8_t> context((size_t)job.out), prefix((size_t)job.out), digits((size_t)out_pad), all((size_t)padded_rows(job.rows));
  for (int64_t j = 0; j < job.channels; ++j) {
    for (int64_t i = 0; i < job.out; ++i) context[(size_t)i] = (uint8_t)context_of(job.row_class[i], job.col_class[j]);
    std::fill(prefix.begin(), prefix.end(), 0);
    for (int s = 0; s < job.levels; ++s) {
      if (!decode_rows(job.out, context.data(), job.tables[s], s, stream[s], state[s], prefix.data(), digits.data())) return s + 1;
      put_channel(job, s, j, digits.data(), all.data());
    }
  }
  return check_end(job, stream, state);
}

}  // namespace entropy
}  // namespace lowtide

using namespace lowtide::entropy;

extern "C" {

int64_t lt_entropy_chunk_channels(int64_t out, int64_t in) { return chunk_channels(out, in); }

void lt_entropy_histogram(const uint8_t *q, int64_t out, int64_t in, int64_t slices, const uint8_t *row_class,
                          const uint8_t *col_class, int64_t *counts) {
  const int bits = (int)(2 * slices);
  for (int64_t i = 0; i < out; ++i)
    for (int64_t j = 0; j < in; ++j) ++counts[((size_t)context_of(row_class[i], col_class[j]) << bits) + q[i * in + j]];
}

int lt_entropy_encode(const uint8_t *q, int64_t out, int64_t in, int64_t slices, const uint8_t *row_class,
                      const uint8_t *col_class, const uint64_t *const *tables, int64_t chunk, uint8_t *const *buffers,
                      int64_t *entries) {
  const int64_t width = chunk_channels(out, in), first = chunk * width, channels = std::min(width, in - first);
  try {
    const std::vector<uint8_t> turned = transposed(q, out, in, first, channels);
    // Once with all lanes for the size, and again with fewer where that is too small for so many states.
    for (int lanes = kLanes, fitting = kLanes;; lanes = fitting) {
      int64_t bytes = 0;
      for (int s = 0; s < slices; ++s) {
        uint8_t *top = buffers[s] + 2 * out * channels + kMostStateBytes;
        const uint8_t *at =
            encode_slice(turned, out, channels, (int)slices, s, lanes, row_class, col_class + first, tables[s], top);
        if (!at) return LT_ENTROPY_NO_FREQUENCY;
        bytes += top - at - 4 * lanes;
        entries[s] = (top - at) | int64_t{__builtin_ctz((unsigned)lanes)} << kLengthBits;
        std::memmove(buffers[s], at, (size_t)(top - at));
      }
      if (lanes == kLanes) fitting = lanes_for(bytes, slices);
      if (fitting == lanes) break;
    }
  } catch (const std::bad_alloc &) {
    return LT_ENTROPY_NO_MEMORY;
  }
  return 0;
}

int lt_entropy_decode(const uint8_t *const *streams, const int64_t *sizes, int64_t levels, int64_t out, int64_t in,
                      const uint8_t *row_class, const uint8_t *col_class, const uint64_t *const *tables, int64_t chunk,
                      int64_t rows, const uint32_t *source, uint8_t *const *packed, const char *isa) {
  const DecodeChunk decode = find_decoder(isa);
  if (!decode) return LT_ENTROPY_NO_ISA;
  const int64_t width = chunk_channels(out, in), first = chunk * width;
  DecodeJob job{};
  job.out = out;
  job.rows = rows;
  job.source = source;
  job.channels = std::min(width, in - first);
  job.levels = (int)levels;
  job.row_class = row_class;
  job.col_class = col_class + first;
  for (int s = 0; s < levels; ++s) {
    job.tables[s] = tables[s];
    job.packed[s] = packed[s] + first * (padded_rows(rows) / 4);
    if (!find_chunk(streams[s], sizes[s], (in + width - 1) / width, chunk, job.stream[s])) return s + 1;
  }
  try {
    return decode(job);
  } catch (const std::bad_alloc &) {
    return LT_ENTROPY_NO_MEMORY;
  }
}

}  // extern "C"
