// What a token reads of a group: the rule's thresholds, the centroid its input is measured from, and the list of channels
// that both make.
#include <algorithm>
#include <cmath>
#include <functional>

#include "engine.h"

namespace lowtide {

// The rule turns its parameters into thresholds on a score; a null score means |x - mean| * the rule's importance.
void Engine::thresholds_of(int tid, Sequence &seq, int64_t row, const float *x, const lt_policy &policy, float *out,
                           const float **score) {
  const lt_group &g = groups_[row];
  Worker &w = workers_[tid];
  const float *params = policy.params + row * LT_MAX_SLICES;
  const float factor = (float)std::exp2(policy.log2_offset);
  float *sc = w.selections[0].score.data();
  *score = nullptr;
  for (int64_t s = 0; s < g.slices; ++s) out[s] = params[s] * factor;
  switch (policy.rule) {
    case LT_DENSE:
      std::fill(sc, sc + g.in, 1.0f);
      for (int64_t e = 0; e < g.exact_count; ++e) sc[g.exact_channels[e]] = 0;
      for (int64_t s = 0; s < g.slices; ++s) out[s] = 0.5f;
      *score = sc;
      break;
    case LT_CHANNEL_ABS:
      k_.scores(g, x, false, sc);
      *score = sc;
      break;
    case LT_GATE:
      if (row % 4 == kDown && row < head_group()) {
        k_.swiglu(seq.gate_up_.data(), ones_.data(), g.in, sc);
        for (int64_t j = 0; j < g.in; ++j) sc[j] = std::fabs(sc[j]);
      } else {  // elsewhere a static choice: finite thresholds are passed by every channel
        std::fill(sc, sc + g.in, INFINITY);
      }
      for (int64_t e = 0; e < g.exact_count; ++e) sc[g.exact_channels[e]] = -1;
      *score = sc;
      break;
    case LT_TOPK: {
      k_.scores(g, x, true, sc);
      float *rank = w.selections[0].rank.data();
      std::copy(sc, sc + g.in, rank);
      for (int64_t s = 0; s < g.slices; ++s) {  // the count-th largest score is the last one read
        const int64_t count = std::clamp<int64_t>((int64_t)std::ceil(params[s] / factor), 0, g.in);
        if (count == 0) {
          out[s] = INFINITY;
        } else if (count == g.in) {
          out[s] = -1;
        } else {
          std::nth_element(rank, rank + count, rank + g.in, std::greater<float>());
          out[s] = rank[count];
        }
      }
      for (int64_t e = 0; e < g.exact_count; ++e) sc[g.exact_channels[e]] = -INFINITY;
      *score = sc;
      break;
    }
    case LT_STATISTICAL_TOPK: {
      k_.scores(g, x, true, sc);
      double sum = 0, squares = 0;
      for (int64_t j = 0; j < g.in; ++j) sum += sc[j], squares += (double)sc[j] * sc[j];
      const double mean = sum / g.in, sd = std::sqrt(std::max(squares / g.in - mean * mean, 0.0));
      for (int64_t s = 0; s < g.slices; ++s) out[s] = (float)(mean + (params[s] + policy.log2_offset) * sd);
      for (int64_t e = 0; e < g.exact_count; ++e) sc[g.exact_channels[e]] = -INFINITY;
      *score = sc;
      break;
    }
    case LT_IPN: {
      float *features = seq.features_[tid].values;
      if (g.ipn_probe) k_.probe(g, x, features);
      if (!g.ipn_mix || !policy.gains) break;
      const float moved = k_.waterline(g, features, policy.gains[row]);
      for (int64_t s = 0; s < g.slices; ++s) out[s] = out[s] * moved;
      break;
    }
    default: break;
  }
}

// What the input is measured from: the group's mean, or under LT_IPN a centroid if there are any.
void Engine::locate(int tid, Sequence &seq, const lt_group &g, const float *x) {
  Worker &w = workers_[tid];
  int64_t code = kOwnMean;
  if (w.ipn && g.ipn_centroids) {
    int64_t &last = seq.features_[tid].code;
    if (g.ipn_keys) last = k_.code(g, x);
    code = last;
  }
  for (Selection &s : w.selections) {
    s.mean = code == kOwnMean ? g.mean : g.ipn_mean + code * g.in;
    s.code = code;
  }
}

// What this input reads of the group; the first thread notes how many bits that is.
void Engine::choose(int tid, Sequence &s, int64_t group, const float *x, const lt_policy &policy) {
  const lt_group &g = groups_[group];
  Worker &w = workers_[tid];
  float thresholds[LT_MAX_SLICES];
  const float *score;
  thresholds_of(tid, s, group, x, policy, thresholds, &score);
  const bool ipn = w.ipn = policy.rule == LT_IPN;
  const float *const factor = ipn ? g.ipn_factor : nullptr;
  locate(tid, s, g, x);
  for (int64_t i = 0; i < g.linear_count; ++i) {
    int64_t &which = w.which[i];
    which = 0;
    while (factor && which < i && factor[which] != factor[i]) ++which;
    if (which < i) continue;
    float own[LT_MAX_SLICES];
    for (int64_t k = 0; k < g.slices; ++k) own[k] = factor ? thresholds[k] * factor[i] : thresholds[k];
    k_.select(g, x, score, ipn ? g.ipn_importance : g.importance, own, w.selections[i]);
  }
  if (tid != 0) return;
  int64_t bits = ipn ? g.ipn_side_bits : g.side_bits;
  for (int64_t i = 0; i < g.linear_count; ++i) bits += 2 * w.selection(i).read_levels() * g.linear[i].out;
  s.bits_[group] = bits;
}

}  // namespace lowtide
