/* The C interface of liblowtide: plain structs of pointers, no Python, no torch.
 *
 * The caller owns every buffer it passes and keeps it alive while the engine lives; the engine
 * never writes to them. Shapes and layouts are those of docs/architecture.md and must have been
 * validated by the caller: this library trusts them.
 */
#ifndef LOWTIDE_H
#define LOWTIDE_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LT_MAX_SLICES 4
#define LT_MAX_FEATURES 64
#define LT_MAX_KEY_CHANNELS 128
#define LT_ABI_VERSION 8

/* One linear layer. f16 values are IEEE half precision bit patterns. */
typedef struct {
  int64_t out;                  /* rows */
  const uint8_t *weight;        /* [slices, in * out_pad / 4] */
  const uint16_t *row_scale;    /* f16 [out] */
  const uint16_t *bias;         /* f16 [out] */
  const uint16_t *exact;        /* f16 [exact_count, out] */
  const uint32_t *outlier_ptr;  /* [tiles + 1] */
  const uint8_t *outlier_row;   /* [outliers] */
  const uint8_t *outlier_gap;   /* [outliers] */
  const uint16_t *outlier_value; /* f16 [outliers] */
  const uint16_t *ipn_base;     /* f16 [ipn_centroids, out], null where the group has none */
} lt_linear;

/* Linear layers that share one input. */
typedef struct {
  int64_t in;
  int64_t slices;
  int64_t linear_count;          /* 1 to 3 */
  int64_t exact_count;
  int64_t side_bits;             /* bits read whatever the mask is */
  int64_t centre[LT_MAX_SLICES]; /* twice the digit that means nothing, slice by slice: 3, or 4 and 2 in turn */
  const uint16_t *mean;          /* f16 [in] */
  const uint16_t *col_scale;     /* f16 [in] */
  const uint16_t *importance;    /* f16 [in] */
  const float *shrink;           /* [slices] */
  const int32_t *exact_channels; /* [exact_count] */
  /* The importance prediction network of the rule LT_IPN; all null and 0 in artifacts without one. */
  int64_t ipn_side_bits;         /* side_bits under this rule */
  int64_t ipn_features;          /* H, at most LT_MAX_FEATURES */
  const uint16_t *ipn_importance; /* f16 [in] */
  const float *ipn_mix;          /* [H + 1], null for the head */
  const int8_t *ipn_probe;       /* [H, in], null but for qkv and gate_up, as are the next two */
  const float *ipn_scale;        /* [H] */
  const float *ipn_bias;         /* [H] */
  const float *ipn_factor;       /* [linear_count], of the thresholds of each layer; null: one selection for all */
  /* Centroids of the inputs, under LT_IPN only; all null and 0 in artifacts without. A token's centroid takes the place
   * of the mean, and its row of ipn_base that of the bias. */
  int64_t ipn_centroids;         /* K */
  int64_t ipn_key_channels;      /* C, a multiple of 16, at most LT_MAX_KEY_CHANNELS */
  const uint16_t *ipn_mean;      /* f16 [K, in] */
  const int32_t *ipn_channels;   /* [C], null but for qkv, gate_up and head, as are the next three */
  const int8_t *ipn_keys;        /* [C, K] */
  const float *ipn_key_scale;    /* [K] */
  const float *ipn_key_bias;     /* [K] */
  lt_linear linear[3];
} lt_group;

/* A decoder of the Llama family. groups: layer 0 qkv, o, gate_up, down, layer 1 qkv, ..., head[, embed]. */
typedef struct {
  int64_t abi_version;
  int64_t vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, max_context;
  int64_t tied;
  int64_t cache_bits;            /* of keys and values: 16 (float16) or 8 (int8 with a scale for each row) */
  double rms_eps;
  const double *inv_freq;        /* [head_dim / 2] */
  const float *const *norms;     /* f32 [hidden] each: layer 0 input, layer 0 post-attention, layer 1 ..., final */
  const lt_group *groups;
} lt_model;

/* Mask rules, see lowtide.rules. */
enum {
  LT_DENSE = 0,
  LT_CHANNEL_NORM = 1,
  LT_CHANNEL_ABS = 2,
  LT_GATE = 3,
  LT_TOPK = 4,
  LT_STATISTICAL_TOPK = 5,
  LT_IPN = 6
};

typedef struct {
  int64_t rule;
  const float *params;           /* [layers * 4 + 1, LT_MAX_SLICES]; the head's row comes last */
  double log2_offset;            /* thresholds are multiplied by 2^offset, counts divided, z-scores moved by it */
  const float *gains;            /* LT_IPN: [layers * 4 + 1], or null for zeros */
  double head_offset;            /* not 0: the head is read twice, first with thresholds moved by this as well, then as */
  float head_margin;             /* log2_offset says, in tiles whose largest logit is within this of the largest */
} lt_policy;

typedef struct {
  int64_t body_bits;             /* read for the decoder's linear layers, side data included */
  int64_t head_bits;             /* read for the output head, side data included */
  int64_t embed_bits;            /* read for the embedding row */
  int64_t cache_bytes;           /* read from the KV cache */
} lt_stats;

typedef struct lt_engine lt_engine;
/* One text: a KV cache and what its last token read. It belongs to the engine that made it. */
typedef struct lt_sequence lt_sequence;

/* One token of one text. */
typedef struct {
  lt_sequence *sequence;
  int64_t token, position;
  const lt_policy *policy;
  float *logits;                 /* f32 [vocab], or NULL */
  lt_stats *stats;               /* or NULL */
} lt_step;

/* Names of the instruction sets this machine can run, best first, separated by commas. */
const char *lt_available_isas(void);

/* isa: a name out of lt_available_isas, or NULL for the best. Returns NULL and fills error on failure. */
lt_engine *lt_engine_new(const lt_model *model, int threads, const char *isa, char *error, int error_size);
void lt_engine_free(lt_engine *engine);
const char *lt_engine_isa(const lt_engine *engine);

/* NULL where memory is lacking. Free sequences before their engine, or after it: they share nothing. */
lt_sequence *lt_sequence_new(const lt_engine *engine);
void lt_sequence_free(lt_sequence *sequence);

/* One token of each of n different texts through all layers. Texts take turns group by group, so weights come out of
 * memory once for those that fit the processor's cache; every text gets the bits that it would get alone. */
void lt_decode(lt_engine *engine, const lt_step *steps, int64_t n);

/* Many tokens at once, all slices read. logits: f32 [vocab] of the last token, or [n, vocab] if all_logits.
 * Returns 0, or 1 where memory for it was lacking. */
int lt_prefill(lt_engine *engine, lt_sequence *sequence, const int32_t *tokens, int64_t n, int64_t position,
               int all_logits, float *logits);

/* Bits that the text's last token decoded read of each group, side data included: out i64 [layers * 4 + 1], the head
 * last. Returns their number. */
int64_t lt_group_bits(const lt_sequence *sequence, int64_t *out);

/* One group on one input, for tests: x f32 [in], y: one f32 [out] buffer per linear layer. Returns bits read. Under
 * LT_IPN a group without a probe uses the features of the sequence's last group that had one, and a group without keys
 * the centroid. */
int64_t lt_group_product(lt_engine *engine, lt_sequence *sequence, int64_t group, const float *x,
                         const lt_policy *policy, float *const *y);

/* Bytes per second read from memory by the engine's threads: a probe to hold figures against. */
double lt_read_bandwidth(lt_engine *engine, int64_t bytes, int repeats);

/* The entropy code of graded weights, docs/entropy.md. q: u8 [out, in] below 4^slices. row_class u8 [out], col_class
 * u8 [in]. tables: for slice s u64 [48, 4^s], each the three starts of digits 1 to 3 and 2^14, 16 bits each, digit 1
 * lowest; starts never fall. Chunks are chunk_channels whole channels, the last maybe fewer. */
enum { LT_ENTROPY_NO_FREQUENCY = 100, LT_ENTROPY_NO_MEMORY = 101, LT_ENTROPY_NO_ISA = 102 };

int64_t lt_entropy_chunk_channels(int64_t out, int64_t in);

/* Adds to counts, i64 [48, 4^slices]. */
void lt_entropy_histogram(const uint8_t *q, int64_t out, int64_t in, int64_t slices, const uint8_t *row_class,
                          const uint8_t *col_class, int64_t *counts);

/* One chunk, all slices: buffers[s] holds at least 2 * weights of the chunk + 64 bytes. entries[s] becomes the chunk's
 * entry in the head of the slice's stream: in bits 0 to 28 how many bytes were written, above them log2 of the states.
 * Returns 0, LT_ENTROPY_NO_MEMORY, or LT_ENTROPY_NO_FREQUENCY where a digit occurs that its table gives none. */
int lt_entropy_encode(const uint8_t *q, int64_t out, int64_t in, int64_t slices, const uint8_t *row_class,
                      const uint8_t *col_class, const uint64_t *const *tables, int64_t chunk, uint8_t *const *buffers,
                      int64_t *entries);

/* One chunk of the first `levels` slices. streams: one for each slice, head and chunks, sizes in bytes. packed[s]: the
 * whole slice, u8 [in * rows_pad / 4], of which the chunk's channels are written. Row i of `rows` is row source[i] of
 * those coded; source is NULL where rows is out. isa as for lt_engine_new. The streams
 * need not be valid: returns 0, or 1 + the slice whose stream does not fit, LT_ENTROPY_NO_MEMORY or _NO_ISA. */
int lt_entropy_decode(const uint8_t *const *streams, const int64_t *sizes, int64_t levels, int64_t out, int64_t in,
                      const uint8_t *row_class, const uint8_t *col_class, const uint64_t *const *tables, int64_t chunk,
                      int64_t rows, const uint32_t *source, uint8_t *const *packed, const char *isa);

#ifdef __cplusplus
}
#endif
#endif
