// The exact entropy code of graded weights: rANS under contexts of row and column. docs/entropy.md has every byte.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

namespace lowtide {
namespace entropy {

constexpr int kLanes = 16;                        // interleaved states of a chunk and slice, at most
constexpr int64_t kBytesPerState = 800;           // of words that each state asks for
constexpr int kContexts = 48;
constexpr int kBase = 40;                         // context = row class + column class - kBase, clipped
constexpr int kProbBits = 14;                     // frequencies of a table add up to 2^14
constexpr uint32_t kLow = 1u << 16;               // states lie in [2^16, 2^32)
constexpr int kLengthBits = 29;                   // of a chunk's entry; above them log2 of its states
constexpr int64_t kChunkWeights = int64_t{1} << 20;
constexpr int64_t kMostStateBytes = 4 * kLanes;

inline int64_t padded_rows(int64_t out) { return (out + 63) / 64 * 64; }

// Whole channels, at least one, and about as many in each chunk.
inline int64_t chunk_channels(int64_t out, int64_t in) {
  const int64_t most = kChunkWeights / out > 1 ? kChunkWeights / out : 1, count = (in + most - 1) / most;
  return (in + count - 1) / count;
}

inline int context_of(int row_class, int col_class) {
  const int c = row_class + col_class - kBase;
  return c < 0 ? 0 : c < kContexts ? c : kContexts - 1;
}

// A table holds where digits 1, 2 and 3 start and 2^14, 16 bits each, digit 1 lowest. The tables of slice s lie at
// [context, prefix of s digits].
inline uint32_t start_of(uint64_t table, int digit) { return (uint32_t)((table << 16) >> (16 * digit)) & 0xffff; }
inline uint32_t end_of(uint64_t table, int digit) { return (uint32_t)(table >> (16 * digit)) & 0xffff; }

// Lanes of each slice of a chunk whose slices have so many bytes of words: 1, 2, 4, 8 or 16, so that all states take
// about half a percent at most.
inline int lanes_for(int64_t bytes, int64_t slices) {
  int lanes = kLanes;
  while (lanes > 1 && bytes < lanes * slices * kBytesPerState) lanes /= 2;
  return lanes;
}

// Slice s of one chunk: `lanes` states and the 16-bit words.
struct Stream {
  const uint8_t *at, *end;
  int lanes;
};

struct DecodeJob {
  int64_t out, channels;
  int levels;                    // slices to decode, 1 to 4
  const uint8_t *row_class;      // [out]
  const uint8_t *col_class;      // [channels]
  const uint64_t *tables[4];     // [kContexts, 4^s] each
  Stream stream[4];
  int64_t rows;                  // of the result
  const uint32_t *source;        // [rows], each below out: the coded row that a row is; or null, rows being out
  uint8_t *packed[4];            // [channels, rows_pad / 4] each
};

// 0, or 1 + the slice whose stream does not decode. Throws std::bad_alloc.
using DecodeChunk = int (*)(const DecodeJob &);
int decode_chunk_portable(const DecodeJob &job);
int decode_chunk_avx512(const DecodeJob &job);

// The states of every slice, all of them within range; or which slice has none. Each file of an instruction set gets
// its own copy of these two, hence static.
[[maybe_unused]] static int load_states(const DecodeJob &job, Stream *stream, uint32_t (*state)[kLanes]) {
  for (int s = 0; s < job.levels; ++s) {
    stream[s] = job.stream[s];
    const int64_t size = 4 * stream[s].lanes;
    if (stream[s].end - stream[s].at < size) return s + 1;
    for (uint32_t &x : state[s]) x = kLow;
    std::memcpy(state[s], stream[s].at, (size_t)size);
    stream[s].at += size;
    for (uint32_t x : state[s])
      if (x < kLow) return s + 1;
  }
  return 0;
}

// All words read and every state back where the encoder began.
[[maybe_unused]] static int check_end(const DecodeJob &job, const Stream *stream, const uint32_t (*state)[kLanes]) {
  for (int s = 0; s < job.levels; ++s) {
    if (stream[s].at != stream[s].end) return s + 1;
    for (uint32_t x : state[s])
      if (x != kLow) return s + 1;
  }
  return 0;
}

// Digits u8 [out_pad] of one channel to out_pad / 4 bytes in the tiles of docs/format.md.
[[maybe_unused]] static void pack_channel(const uint8_t *digits, int64_t out_pad, uint8_t *packed) {
  const int64_t large = out_pad / 256 * 256;
  for (int64_t first = 0; first < out_pad;) {
    const int64_t wb = first < large ? 64 : 16;
    const uint8_t *d = digits + first;
    uint8_t *to = packed + first / 4;
    for (int64_t b = 0; b < wb; ++b)
      to[b] = (uint8_t)(d[b] | d[b + wb] << 2 | d[b + 2 * wb] << 4 | d[b + 3 * wb] << 6);
    first += 4 * wb;
  }
}

// One channel of slice s from the digits u8 [out_pad] of the coded rows. all: u8 [rows_pad] to work in, zero after rows.
[[maybe_unused]] static void put_channel(const DecodeJob &job, int s, int64_t channel, const uint8_t *digits, uint8_t *all) {
  const int64_t rows_pad = padded_rows(job.rows);
  if (job.source) {
    for (int64_t i = 0; i < job.rows; ++i) all[i] = digits[job.source[i]];
    digits = all;
  }
  pack_channel(digits, rows_pad, job.packed[s] + channel * (rows_pad / 4));
}

}  // namespace entropy
}  // namespace lowtide
