#include "engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>

namespace lowtide {

Sequence::Sequence(const lt_model &m, int threads)
    : kv_heads_(m.kv_heads), head_dim_(m.head_dim), cache_bits_(m.cache_bits), positions_((m.max_context + 15) / 16 * 16) {
  const size_t rows = (size_t)(m.layers * m.kv_heads * positions_), unit = (size_t)(m.cache_bits / 8);
  keys_.resize(rows * (size_t)m.head_dim * unit);
  values_.resize(rows * (size_t)padded_head(m.head_dim) * unit);
  if (m.cache_bits == 8) {
    key_scales_.resize(rows * sizeof(float));
    value_scales_.resize(rows * sizeof(float));
  }
  const int64_t q_rows = m.heads * m.head_dim, kv_rows = m.kv_heads * m.head_dim;
  x_.resize((size_t)m.hidden);
  qkv_.resize((size_t)(q_rows + 2 * kv_rows));
  attended_.resize((size_t)q_rows);
  gate_up_.resize((size_t)(2 * m.intermediate));
  cosine_.resize((size_t)(m.head_dim / 2));
  sine_.resize((size_t)(m.head_dim / 2));
  bits_.resize((size_t)(m.layers * 4 + 1));
  leading_.resize((size_t)Tiling(m.vocab).count);
  features_.resize((size_t)threads);
}

HeadCache Sequence::cache(int64_t layer, int64_t kv_head) {
  const int64_t row = (layer * kv_heads_ + kv_head) * positions_, unit = cache_bits_ / 8;
  const bool scaled = cache_bits_ == 8;
  return {keys_.data() + row * head_dim_ * unit, values_.data() + row * padded_head(head_dim_) * unit,
          scaled ? (float *)key_scales_.data() + row : nullptr, scaled ? (float *)value_scales_.data() + row : nullptr};
}

int64_t Sequence::group_bits(int64_t *out) const {
  std::copy(bits_.begin(), bits_.end(), out);
  return (int64_t)bits_.size();
}

Engine::Engine(const lt_model &model, int threads, const Kernels *kernels)
    : model_(model), k_(*kernels), pool_(threads), workers_((size_t)threads) {
  const lt_model &m = model_;
  const int64_t groups = head_group() + (m.tied ? 1 : 2);
  groups_.assign(m.groups, m.groups + groups);
  norms_.assign(m.norms, m.norms + 2 * m.layers + 1);
  inv_freq_.assign(m.inv_freq, m.inv_freq + m.head_dim / 2);
  model_.groups = groups_.data();
  int64_t max_in = 0;
  for (const lt_group &g : groups_) max_in = std::max(max_in, g.in);
  ones_.assign((size_t)m.intermediate, 1.0f);
  int64_t sums = 0;  // of the largest group whose entries are shared out
  for (const lt_group &g : groups_) {
    by_entries_.push_back(shares_entries(g, threads));
    int64_t tiles = 0;
    for (int64_t i = 0; i < g.linear_count; ++i) tiles += Tiling(g.linear[i].out).count;
    if (by_entries_.back()) sums = std::max(sums, g.slices * tiles * 256);
  }
  for (Worker &w : workers_) {
    for (Selection &s : w.selections) s.reserve(max_in);
    for (auto &buffer : w.partial) buffer.resize(sums ? (size_t)sums + 16 : 0);
    w.normed.resize((size_t)m.hidden);
    w.hidden.resize((size_t)m.intermediate);
    w.scratch.resize((size_t)(kQueries * ((m.max_context + 15) / 16 * 16)));
  }
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
