// Sixteen lanes in one register: a gather for the table, compares for the digit, an expanding load for the words.
#include <immintrin.h>

#include "entropy.h"

namespace lowtide {
namespace entropy {
namespace {

struct Lanes {
  __m512i x;
  const uint8_t *at, *end;
  int count;
};

// One digit of the active lanes, from tables[index]; 1 set in `failed` where words are lacking.
inline __m512i step(Lanes &lanes, __mmask16 active, __m512i index, const uint64_t *tables, bool &failed) {
  const __m512i low16 = _mm512_set1_epi32(0xffff), zero = _mm512_setzero_si512();
  // Low halves: where digits 1 and 2 start. High halves: where digit 3 starts, and 2^14.
  const __m512i low = _mm512_mask_i32gather_epi32(zero, active, index, tables, 8);
  const __m512i high = _mm512_mask_i32gather_epi32(zero, active, index, (const char *)tables + 4, 8);
  const __m512i c1 = _mm512_and_si512(low, low16), c2 = _mm512_srli_epi32(low, 16), c3 = _mm512_and_si512(high, low16);
  const __m512i slot = _mm512_and_si512(lanes.x, _mm512_set1_epi32((1 << kProbBits) - 1));
  const __mmask16 over1 = _mm512_cmpge_epu32_mask(slot, c1), over2 = _mm512_cmpge_epu32_mask(slot, c2),
                  over3 = _mm512_cmpge_epu32_mask(slot, c3);
  __m512i start = _mm512_maskz_mov_epi32(over1, c1);
  start = _mm512_mask_mov_epi32(start, over2, c2);
  start = _mm512_mask_mov_epi32(start, over3, c3);
  __m512i end = _mm512_mask_mov_epi32(c1, over1, c2);
  end = _mm512_mask_mov_epi32(end, over2, c3);
  end = _mm512_mask_mov_epi32(end, over3, _mm512_set1_epi32(1 << kProbBits));
  __m512i digit = _mm512_maskz_set1_epi32(over1, 1);
  digit = _mm512_mask_set1_epi32(digit, over2, 2);
  digit = _mm512_mask_set1_epi32(digit, over3, 3);
  const __m512i scaled = _mm512_mullo_epi32(_mm512_sub_epi32(end, start), _mm512_srli_epi32(lanes.x, kProbBits));
  __m512i x = _mm512_mask_add_epi32(lanes.x, active, scaled, _mm512_sub_epi32(slot, start));
  const __mmask16 refill = _mm512_mask_cmplt_epu32_mask(active, x, _mm512_set1_epi32(kLow));
  const int words = __builtin_popcount(refill);
  __m256i next;
  if (lanes.end - lanes.at >= 2 * kLanes) {
    next = _mm256_loadu_si256((const __m256i *)lanes.at);
  } else {
    const int left = (int)((lanes.end - lanes.at) / 2);
    if (words > left) {
      failed = true;
      return zero;
    }
    next = _mm256_maskz_loadu_epi16((__mmask16)((1u << left) - 1), lanes.at);
  }
  const __m512i spread = _mm512_maskz_expand_epi32(refill, _mm512_cvtepu16_epi32(next));
  lanes.x = _mm512_mask_or_epi32(x, refill, _mm512_slli_epi32(x, 16), spread);
  lanes.at += 2 * words;
  return digit;
}

// Sixteen rows of a slice with fewer lanes: as many steps as it takes, each on the lowest lanes.
inline __m512i small_steps(Lanes &lanes, __mmask16 active, __m512i index, const uint64_t *tables, bool &failed) {
  __m512i digits = _mm512_setzero_si512();
  for (int first = 0; first < kLanes && !failed; first += lanes.count) {
    const __mmask16 rows = (__mmask16)(((1u << lanes.count) - 1) << first);
    const __m512i digit = step(lanes, (__mmask16)((active & rows) >> first), _mm512_maskz_compress_epi32(rows, index),
                               tables, failed);
    digits = _mm512_mask_expand_epi32(digits, rows, digit);
  }
  return digits;
}

// All slices of sixteen rows at a time, so that the slices' chains of dependent steps overlap.
template <int kLevels>
int decode_channels(const DecodeJob &job, Stream *stream, uint32_t (*state)[kLanes], uint8_t *digits, int64_t out_pad, uint8_t *all) {
  Lanes lanes[kLevels];
  for (int s = 0; s < kLevels; ++s) 
    lanes[s] = {_mm512_loadu_si512(state[s]), stream[s].at, stream[s].end, stream[s].lanes};
  const __m512i top = _mm512_set1_epi32(kContexts - 1), zero = _mm512_setzero_si512();
  for (int64_t j = 0; j < job.channels; ++j) {
    const __m512i column = _mm512_set1_epi32((int)job.col_class[j] - kBase);
    for (int64_t i = 0; i < job.out; i += kLanes) {
      const int64_t rows = job.out - i;
      const __mmask16 active = rows >= kLanes ? (__mmask16)0xffff : (__mmask16)((1u << rows) - 1);
      const __m512i row = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(active, job.row_class + i));
      const __m512i context = _mm512_min_epi32(_mm512_max_epi32(_mm512_add_epi32(row, column), zero), top);
      __m512i index = context;
      for (int s = 0; s < kLevels; ++s) {
        bool failed = false;
        const __m512i digit = lanes[s].count == kLanes ? step(lanes[s], active, index, job.tables[s], failed)
                                                       : small_steps(lanes[s], active, index, job.tables[s], failed);
        if (failed) return s + 1;
        index = _mm512_or_si512(_mm512_slli_epi32(index, 2), digit);
        _mm_storeu_si128((__m128i *)(digits + s * out_pad + i), _mm512_maskz_cvtepi32_epi8(active, digit));
      }
    }
    for (int s = 0; s < kLevels; ++s) put_channel(job, s, j, digits + s * out_pad, all);
  }
  for (int s = 0; s < kLevels; ++s) {
    _mm512_storeu_si512(state[s], lanes[s].x);
    stream[s].at = lanes[s].at;
  }
  return check_end(job, stream, state);
}

}  // namespace

int decode_chunk_avx512(const DecodeJob &job) {
  // A chain of steps of so few lanes is shorter the plain way.
  if (job.stream[0].lanes < 8) return decode_chunk_portable(job);
  Stream stream[4];
  uint32_t state[4][kLanes];
  if (const int bad = load_states(job, stream, state)) return bad;
  const int64_t out_pad = padded_rows(job.out);
  std::vector<uint8_t> digits((size_t)(out_pad * job.levels)), all((size_t)padded_rows(job.rows));
  switch (job.levels) {
    case 1: return decode_channels<1>(job, stream, state, digits.data(), out_pad, all.data());
    case 2: return decode_channels<2>(job, stream, state, digits.data(), out_pad, all.data());
    case 3: return decode_channels<3>(job, stream, state, digits.data(), out_pad, all.data());
    default: return decode_channels<4>(job, stream, state, digits.data(), out_pad, all.data());
  }
}

}  // namespace entropy
}  // namespace lowtide
