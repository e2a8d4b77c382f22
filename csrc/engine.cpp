#include "engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>

namespace lowtide {

Engine::Engine(const lt_model &model, int threads, const Kernels *kernels)
    : model_(model), k_(*kernels), pool_(threads), workers_((size_t)threads) {
  const lt_model &m = model_;
  const int64_t groups = head_group() + (m.tied ? 1 : 2), blocks = (m.max_context + 15) / 16;
  groups_.assign(m.groups, m.groups + groups);
  norms_.assign(m.norms, m.norms + 2 * m.layers + 1);
  inv_freq_.assign(m.inv_freq, m.inv_freq + m.head_dim / 2);
  model_.groups = groups_.data();
  positions_ = blocks * 16;
  const size_t rows = (size_t)(m.layers * m.kv_heads * positions_), unit = m.cache_bits / 8;
  keys_.resize(rows * (size_t)m.head_dim * unit);
  values_.resize(rows * (size_t)padded_head(m.head_dim) * unit);
  if (m.cache_bits == 8) {
    key_scales_.resize(rows * sizeof(float));
    value_scales_.resize(rows * sizeof(float));
  }
  bits_.resize((size_t)groups);
  int64_t max_in = 0;
  for (const lt_group &g : groups_) max_in = std::max(max_in, g.in);
  const int64_t q_rows = m.heads * m.head_dim, kv_rows = m.kv_heads * m.head_dim;
  x_.resize((size_t)m.hidden);
  qkv_.resize((size_t)(q_rows + 2 * kv_rows));
  attended_.resize((size_t)q_rows);
  gate_up_.resize((size_t)(2 * m.intermediate));
  ones_.assign((size_t)m.intermediate, 1.0f);
  cosine_.resize((size_t)(m.head_dim / 2));
  sine_.resize((size_t)(m.head_dim / 2));
  for (Worker &w : workers_) {
    w.selection.reserve(max_in);
    w.normed.resize((size_t)m.hidden);
    w.hidden.resize((size_t)m.intermediate);
    w.scratch.resize((size_t)(4 * blocks * 16));
  }
}

HeadCache Engine::cache(int64_t layer, int64_t kv_head) {
  const int64_t row = (layer * model_.kv_heads + kv_head) * positions_, unit = model_.cache_bits / 8;
  const bool scaled = model_.cache_bits == 8;
  return {keys_.data() + row * model_.head_dim * unit, values_.data() + row * padded_head(model_.head_dim) * unit,
          scaled ? (float *)key_scales_.data() + row : nullptr, scaled ? (float *)value_scales_.data() + row : nullptr};
}

void Engine::set_angles(int64_t position, float *cosine, float *sine) const {
  for (size_t i = 0; i < inv_freq_.size(); ++i) {
    cosine[i] = (float)std::cos((double)position * inv_freq_[i]);
    sine[i] = (float)std::sin((double)position * inv_freq_[i]);
  }
}

double Engine::read_bandwidth(int64_t bytes, int repeats) {
  std::vector<char> data((size_t)bytes, 1);
  const int64_t part = bytes / pool_.size() / 256 * 256;
  std::atomic<int> sink{0};
  double best = 0;
  for (int r = 0; r < repeats; ++r) {
    const auto start = std::chrono::steady_clock::now();
    pool_.run([&](int tid) { sink += k_.sum(data.data() + tid * part, part) != 0; });
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::max(best, (double)(part * pool_.size()) / took.count());
  }
  return best;
}

}  // namespace lowtide
