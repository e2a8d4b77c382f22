// The table of functions that every instruction set provides, and the data they pass around.
#pragma once
#include <cstdint>
#include <vector>

#include "lowtide.h"

namespace lowtide {

// The digit product takes entries in blocks of this many, tile after tile; a tile's sums are loaded and stored once a
// block.
constexpr int64_t kBlock = 40;
// It asks memory for the block this many bytes ahead, at most kAhead blocks: into the second-level cache, which can
// wait for more lines at once than the first.
constexpr int64_t kAheadBytes = 6144;
constexpr int64_t kAhead = 4;
// Prefill quantises inputs in blocks of this many channels; a block's sums of products stay exact in a float.
constexpr int64_t kDepth = 128;
// Attention takes at most this many queries at once.
constexpr int64_t kQueries = 8;
// Adding outliers leaves memory idle: every 16 of them ask for this many lines of what comes next.
constexpr int kLines = 8;
// Outliers and exact channels take this many tokens side by side.
constexpr int64_t kSide = 32;
// An int8 coefficient reaches this many times as far as the mean of its class; larger ones are entered several times.
// Their entries are at most 1 / kRange + 1 / 254 of the class.
constexpr float kRange = 4.0f;
// A class whose mean magnitude is less than this counts as zero.
constexpr float kLeast = 1e-30f;
// Tiles that one pass sums up: their accumulators stay in the first-level cache.
constexpr int64_t kPassTiles = 24;

// In place of a centroid's number: the group's own mean and bias, or one that is still to be found.
constexpr int64_t kOwnMean = -1, kUnknown = -2;

// The channels of one input that are read, and with which coefficients (docs/architecture.md: Score and level,
// Coefficients). Entries are grouped by class, each class padded to a multiple of four with zero coefficients.
struct Selection {
  int64_t in = 0, slices = 0;
  const uint16_t *mean = nullptr;                     // f16 [in] that the input is measured from
  int64_t code = kOwnMean;                            // the centroid that this is
  std::vector<float> a;                               // [in] centred input
  std::vector<float> score, rank;                     // [in] scratch for rules
  std::vector<uint32_t> level_channel[LT_MAX_SLICES + 1];  // channels by level
  std::vector<float> level_value[LT_MAX_SLICES + 1];       // a * c * gamma of the same channels, then zeros
  int64_t level_count[LT_MAX_SLICES + 1] = {};
  std::vector<uint32_t> run;                          // [entries] slice * in + channel
  std::vector<int8_t> coef;                           // [entries]
  std::vector<uint32_t> offset;                       // [entries + kAhead * kBlock] scratch: byte offsets into one matrix
  int64_t class_begin[LT_MAX_SLICES + 1] = {};        // entry where each class begins
  float class_scale[LT_MAX_SLICES] = {};              // S_k
  int32_t class_sum[LT_MAX_SLICES] = {};              // sum of the coefficients, each times its slice's centre
  void reserve(int64_t max_in);
  void keep(int part, int parts);  // leaves this part of every class' entries; scales and sums stay those of all
  int64_t read_levels() const {                       // sum over channels of the level
    int64_t n = 0;
    for (int l = 1; l <= slices; ++l) n += l * level_count[l];
    return n;
  }
};

// Keys and values of one KV head: float16, or int8 where the scales f32 [positions] are given.
struct HeadCache {
  void *keys, *values;
  float *key_scale, *value_scale;
};

// Tiles [begin, end) of a linear layer, at most kPassTiles: what is summed up at once.
struct Pass {
  const lt_linear *layer;
  int64_t begin, end;
  const Selection *selection;  // what the layer reads; null where that is not known yet,
  const struct Guess *guess;   // which this takes the place of
};

struct Span {
  const void *from;
  int64_t bytes;
};
constexpr int kSides = 12;
// Of a layer whose selection is not known yet: its inputs, its centroid, and what choosing reads (null: there is no such
// tensor).
struct Guess {
  int64_t in, code;
  Span side[kSides];
};

struct Kernels {
  const char *name;
  // Levels from thresholds[slices] and from `score` (or |x - s.mean| * importance f16 [in] where score is null).
  void (*select)(const lt_group &g, const float *x, const float *score, const uint16_t *importance,
                 const float *thresholds, Selection &s);
  // Byte offsets of the entries in this matrix, to s.offset.
  void (*offsets)(const lt_linear &l, Selection &s);
  // score_j = |x_j - mean_j| (* importance_j); exact channels get 0.
  void (*scores)(const lt_group &g, const float *x, bool weighted, float *score);
  // LT_IPN: features f32 [H] of the group's probe for the input x, and the factor that features of a probe move the
  // group's thresholds by.
  void (*probe)(const lt_group &g, const float *x, float *features);
  float (*waterline)(const lt_group &g, const float *features, float gain);
  // LT_IPN: which centroid the group's keys find for the input x.
  int64_t (*code)(const lt_group &g, const float *x);
  // Asks memory for what a pass begins with.
  void (*ask)(const Pass &p);
  // A pass over one linear layer: y f32 points to its first tile's first row. Its selection's `offset` must hold this
  // matrix' offsets; acc is scratch, i32 [kPassTiles * 256]. Asks for `next`, where there is one, once its own weights
  // have come.
  void (*tiles)(const lt_group &g, const Pass &p, bool accumulate, int32_t *acc, float *y, const Pass *next);
  // The same in two steps, for a matrix of at most kPassTiles tiles whose entries threads share out (Selection::keep).
  // First the digit sums of the entries in s, acc i32 [slices, tiles * 256]; s.offset must hold this matrix' offsets.
  void (*partial)(const lt_linear &l, const Selection &s, int32_t *acc);
  // Then a pass over the sums of all threads, which are whole numbers: their order makes no difference.
  void (*combine)(const lt_group &g, const Pass &p, bool accumulate, const int32_t *const *sums, int threads, float *y,
                  const Pass *next);
  void (*rmsnorm)(const float *x, const float *gain, int64_t n, float eps, float *y);
  void (*swiglu)(const float *gate, const float *up, int64_t n, float *y);
  void (*rope)(float *head, const float *cosine, const float *sine, int64_t head_dim);
  // queries [tokens, heads, head_dim], tokens `stride` floats apart (so is the output), against the cache of the KV head
  // they share: n positions for the first token, one more for each further one; scratch f32 [kQueries, n of the last
  // token rounded up to 16].
  void (*attention)(const float *queries, int64_t tokens, int64_t stride, int64_t heads, int64_t head_dim,
                    const HeadCache &cache, int64_t n, float *scratch, float *out);
  void (*store_kv)(const float *k, const float *v, int64_t head_dim, int64_t position, const HeadCache &cache);
  // One embedding row.
  void (*embed)(const lt_group &g, const lt_linear &l, int64_t row, float *y);
  // Prefill: one token's input x [in] becomes a = x - mean, f32 [in], and int8 values q [blocks of kDepth channels]
  // [kDepth], zero beyond in, with a scale and the sum of the q for each block; blocks are `stride` tokens apart.
  // value_j = a_j * c_j * gamma_S; exact channels count as 0.
  void (*quantise)(const lt_group &g, const float *x, int64_t stride, float *a, int8_t *q, float *scale, float *sum);
  // Prefill: 16 tokens' a [16, in] side by side, to [in, kSide]; a may be read up to 15 floats beyond its end.
  void (*side_by_side)(const float *a, int64_t in, float *to);
  // Prefill: the codes of one tile for channels [from, from + kDepth), in the order that multiply() of the same
  // instruction set wants; panel holds kDepth * 256 floats.
  void (*unpack)(const lt_group &g, const lt_linear &l, int64_t tile, int64_t from, void *panel);
  // Prefill: y[part of 64 rows][t][64] += scale[t] * (sum_j q[t][j] code[j][row] - middle / 2 * sum[t]) for tokens t < m
  // and the tile's `width` rows.
  void (*multiply)(const lt_group &g, const int8_t *q, const float *scale, const float *sum, int64_t m, int64_t width,
                   const void *panel, float *y);
  // Prefill: the rest for up to kSide tokens of one tile: row scales, bias, outliers and exact channels. Centred inputs
  // a [in, kSide]; products [part of 64 rows][token][64], parts `stride` floats apart; y [token][out] from the tile's
  // first row on is set, or added to.
  void (*finish)(const lt_group &g, const lt_linear &l, int64_t tile, const float *a, const float *products,
                 int64_t stride, int64_t n, bool accumulate, float *y);
  float (*sum)(const void *p, int64_t bytes);  // reads every line once
};

const Kernels *portable_kernels();
// Null where the machine cannot run them.
const Kernels *avx2_kernels();     // these two in builds for x86-64 only
const Kernels *avx512_kernels();
const Kernels *neon_kernels();     // these two in builds for AArch64 only
const Kernels *neondot_kernels();

// Tiles of a matrix of `out` rows: 256 wide, then 64 wide (docs/architecture.md).
struct Tiling {
  int64_t out, pad, wide, count;
  explicit Tiling(int64_t rows) : out(rows), pad((rows + 63) / 64 * 64), wide(pad / 256), count(wide + pad % 256 / 64) {}
  int64_t first(int64_t t) const { return t < wide ? t * 256 : wide * 256 + (t - wide) * 64; }
  int64_t width(int64_t t) const { return t < wide ? 256 : 64; }
  int64_t rows(int64_t t) const { return out - first(t) < width(t) ? out - first(t) : width(t); }
  int64_t run_bytes() const { return pad / 4; }            // one channel of one slice
  int64_t byte_offset(int64_t t) const { return first(t) / 4; }  // of a tile within a run
};

// Twice the whole code that means a weight of zero.
inline int32_t doubled_centre(const lt_group &g) {
  int32_t centre = 0;
  for (int64_t s = 0; s < g.slices; ++s) centre = 4 * centre + (int32_t)g.centre[s];
  return centre;
}

// f16 [out] that a layer adds for an input of this centroid; null where that is not known.
inline const uint16_t *bias_of(const lt_linear &l, int64_t code) {
  return code == kOwnMean ? l.bias : code == kUnknown ? nullptr : l.ipn_base + code * l.out;
}

// A row of the value cache.
inline int64_t padded_head(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

}  // namespace lowtide
