// The decoder: state, the step for one token of each of several texts, and prefill.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "pool.h"

namespace lowtide {

enum GroupKind { kQkv = 0, kO = 1, kGateUp = 2, kDown = 3 };

// Vectors are stored whole, so accumulators start on a cache line.
struct AlignedInts {
  alignas(64) int32_t values[kPassTiles * 256];
  int32_t *data() { return values; }
};

// Memory of vectors that starts on a cache line: no load or store of 64 bytes then straddles two, and threads that write
// different lines do not share one.
template <typename T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <typename U>
  LineAllocator(const LineAllocator<U> &) {}
  T *allocate(size_t n) { return (T *)::operator new(n * sizeof(T), std::align_val_t(64)); }
  void deallocate(T *p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const LineAllocator &) const { return true; }
  bool operator!=(const LineAllocator &) const { return false; }
};
template <typename T>
using Lines = std::vector<T, LineAllocator<T>>;

struct AlignedPanel {
  alignas(64) float values[kDepth * 256];
  float *data() { return values; }
};

// Zeroed memory that takes up room only where it is written to: a short text in a long context stays small.
struct ZeroedMemory {
  std::unique_ptr<char, void (*)(void *)> memory{nullptr, std::free};
  void resize(size_t bytes) {
    memory.reset((char *)std::calloc(bytes + 64, 1));
    if (!memory) throw std::bad_alloc();
  }
  char *data() { return memory.get(); }
};

// What one thread needs for itself.
struct Worker {
  Selection selections[3];       // of the group at hand; layers with the same thresholds share one
  int64_t which[3] = {};         // of them is each layer's: the first layer's that reads the same
  Selection &selection(int64_t layer = 0) { return selections[which[layer]]; }
  std::vector<float> normed;     // [hidden]
  std::vector<float> hidden;     // [intermediate] activated FFN neurons
  std::vector<int32_t> partial[2];  // digit sums of this thread's entries, for two products in turn; 64 bytes to align
  int turn = 0;
  bool ipn = false;              // the rule of the last choice; the next one's is likely the same
  int32_t *sums(int which) {
    return (int32_t *)(((uintptr_t)partial[which].data() + 63) / 64 * 64);
  }
  AlignedInts acc;               // [kPassTiles * 256] sums of the digit product
  Lines<float> scratch;          // attention scores
  AlignedPanel panel;            // prefill: unpacked weights
  Lines<float> block;            // prefill: one tile of the output
  Lines<float> centred;          // prefill: [16, in] of 16 tokens
};

// One text: its KV cache, and what one of its tokens is on its way through the layers.
class Sequence {
 public:
  Sequence(const lt_model &model, int threads);
  int64_t group_bits(int64_t *out) const;

 private:
  friend class Engine;
  struct Features {
    float values[LT_MAX_FEATURES] = {};
    int64_t code = 0;
  };
  HeadCache cache(int64_t layer, int64_t kv_head);

  const int64_t kv_heads_, head_dim_, cache_bits_;
  const int64_t positions_;                         // of the cache, a multiple of 16
  ZeroedMemory keys_, values_, key_scales_, value_scales_;
  std::vector<float> x_, qkv_, attended_, gate_up_, cosine_, sine_;
  std::vector<float> leading_;                      // [tiles of the head] largest logit of each
  std::vector<int64_t> bits_;                       // [layers * 4 + 1] of the last token
  std::vector<Features> features_;                  // [threads] of the last probe and keys: o and down use qkv's and
                                                    // gate_up's
};

class Engine {
 public:
  Engine(const lt_model &model, int threads, const Kernels *kernels);

  Sequence new_sequence() const { return Sequence(model_, pool_.size()); }
  void decode(const lt_step *steps, int64_t n);
  void prefill(Sequence &s, const int32_t *tokens, int64_t n, int64_t position, bool all_logits, float *logits);
  int64_t group_product(Sequence &s, int64_t group, const float *x, const lt_policy &policy, float *const *y);
  double read_bandwidth(int64_t bytes, int repeats);
  const Kernels &kernels() const { return k_; }

 private:
  // choose.cpp
  void choose(int tid, Sequence &s, int64_t group, const float *x, const lt_policy &policy);
  void thresholds_of(int tid, Sequence &s, int64_t row, const float *x, const lt_policy &policy, float *out,
                     const float **score);
  void locate(int tid, Sequence &s, const lt_group &g, const float *x);
  // decode.cpp
  void decode_thread(int tid, const lt_step *steps, int64_t n);
  void product(int tid, int64_t group, float *const *y, bool accumulate);
  bool guess(int tid, int64_t group, Pass &pass, Guess &guess) const;
  void share_entries(int tid, int64_t group, float *const *y, bool accumulate);
  void leading(int tid, Sequence &s, const float *logits);
  void refine(int tid, Sequence &s, const lt_step &step);
  void rotate(int tid, Sequence &s, int64_t layer, int64_t position);
  void attend(int tid, Sequence &s, int64_t layer, int64_t position);
  // prefill.cpp
  void reserve_prefill();
  void prefill_chunk(int tid, Sequence &s, const int32_t *tokens, int64_t n, int64_t position);
  void dense(int tid, int64_t group, const float *x, int64_t n, float *const *y, bool accumulate);
  void centre(int tid, const lt_group &g, const float *x, int64_t n);
  void dense_tile(Worker &w, const lt_group &g, const lt_linear &l, int64_t tile, int64_t n);
  void head(int tid, int64_t first, int64_t n, float *logits);

  void set_angles(int64_t position, float *cosine, float *sine) const;
  int64_t head_group() const { return model_.layers * 4; }
  const lt_group &embed_group() const { return model_.groups[head_group() + (model_.tied ? 0 : 1)]; }

  lt_model model_;
  std::vector<lt_group> groups_;
  std::vector<const float *> norms_;
  std::vector<double> inv_freq_;
  const Kernels &k_;
  Pool pool_;
  std::vector<Worker> workers_;
  std::vector<float> ones_;                         // [intermediate]
  std::vector<char> by_entries_;                    // [groups] whether threads share out entries and not rows
  // Prefill buffers, [chunk, ...]
  Lines<float> px_, pnormed_, pacross_, pscale_, psum_, pqkv_, pattended_, pgate_up_, phidden_, pcos_, psin_;
  Lines<int8_t> pquantised_;
};

// A run of the group's tiles, counted through all its linear layers, for each thread; near equal in rows.
struct Share {
  int64_t begin, end;
};
Share share_of(const lt_group &g, int tid, int threads);

// A thread's tiles of a group, pass by pass.
class Passes {
 public:
  Passes(const lt_group &g, int tid, int threads, Worker *w)  // w: has the selections; null: they are not known yet
      : group_(g), share_(share_of(g, tid, threads)), worker_(w) {}
  bool next(Pass &pass);  // false after the last one
  int64_t linear() const { return linear_; }  // which of the group's the last pass belongs to

 private:
  const lt_group &group_;
  Share share_;              // what is left
  Worker *const worker_;
  int64_t linear_ = 0, before_ = 0;  // tiles of the layers before this one
};

// Threads share out the entries of matrices whose runs they would cut to pieces shorter than this, in bytes.
constexpr int64_t kShortRun = 256;
constexpr int kMaxSharers = 64;
bool shares_entries(const lt_group &g, int threads);

constexpr int64_t kChunk = 128;  // prefill: tokens per pass over the weights, a multiple of kSide
inline int64_t blocks_of(int64_t in) { return (in + kDepth - 1) / kDepth; }

}  // namespace lowtide

struct lt_sequence {
  lowtide::Sequence sequence;
};
