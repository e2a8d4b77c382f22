// The step for one token of each of several texts: five waits a layer, everything between them is done by all threads
// at once. Texts take turns within a group, so weights that one of them has read are in the processor's cache for the
// next; each is computed as if it were alone.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine.h"

namespace lowtide {

namespace {

// In four lanes, which every compiler makes one instruction of.
float largest_of(const float *x, int64_t n) {
  float lane[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int k = 0; k < 4; ++k) lane[k] = x[i + k] > lane[k] ? x[i + k] : lane[k];
  for (; i < n; ++i) lane[0] = x[i] > lane[0] ? x[i] : lane[0];
  return std::max(std::max(lane[0], lane[1]), std::max(lane[2], lane[3]));
}

}  // namespace

Share share_of(const lt_group &g, int tid, int threads) {
  int64_t total = 0;
  for (int64_t i = 0; i < g.linear_count; ++i) total += Tiling(g.linear[i].out).pad / 64;
  const int64_t low = total * tid / threads, high = total * (tid + 1) / threads;
  Share share{0, 0};
  int64_t weight = 0, unit = 0;
  for (int64_t i = 0; i < g.linear_count; ++i) {
    const Tiling t(g.linear[i].out);
    for (int64_t k = 0; k < t.count; ++k, ++unit) {
      const int64_t middle = 2 * weight + t.width(k) / 64;  // a unit belongs to the thread that its middle falls to
      if (middle < 2 * low) share.begin = unit + 1;
      if (middle < 2 * high) share.end = unit + 1;
      weight += t.width(k) / 64;
    }
  }
  share.end = std::max(share.end, share.begin);
  return share;
}

bool shares_entries(const lt_group &g, int threads) {
  if (threads == 1 || threads > kMaxSharers) return false;
  bool cut = false;
  int64_t unit = 0;
  for (int64_t i = 0; i < g.linear_count; ++i) {
    const Tiling t(g.linear[i].out);
    if (t.count > kPassTiles) return false;
    for (int tid = 0; tid < threads; ++tid) {
      const Share share = share_of(g, tid, threads);
      const int64_t begin = std::max<int64_t>(share.begin - unit, 0), end = std::min(share.end - unit, t.count);
      if (begin >= end || (begin == 0 && end == t.count)) continue;
      const int64_t bytes = t.byte_offset(end - 1) + t.width(end - 1) / 4 - t.byte_offset(begin);
      cut = cut || bytes < kShortRun;
    }
    unit += t.count;
  }
  return cut;
}

bool Passes::next(Pass &pass) {
  for (; linear_ < group_.linear_count; ++linear_) {
    const lt_linear &l = group_.linear[linear_];
    const int64_t count = Tiling(l.out).count;
    const int64_t begin = share_.begin - before_, end = std::min(share_.end - before_, count);
    if (begin < end) {
      const Selection *const selection = worker_ ? &worker_->selection(linear_) : nullptr;
      pass = {&l, begin, std::min(end, begin + kPassTiles), selection, nullptr};
      share_.begin = before_ + pass.end;
      return true;
    }
    before_ += count;
  }
  return false;
}

// This thread's first pass over a group whose input is not known yet, and what choosing will read.
bool Engine::guess(int tid, int64_t group, Pass &pass, Guess &guess) const {
  if (group > head_group()) return false;
  const lt_group &g = groups_[group];
  const bool ipn = workers_[tid].ipn;
  const int64_t half = 2 * g.in, features = ipn ? 4 * g.ipn_features : 0;
  const int64_t centroids = ipn ? g.ipn_centroids : 0, keys = g.ipn_key_channels;
  // Without keys the centroid is that of the group before.
  const int64_t code = !centroids ? kOwnMean : g.ipn_keys ? kUnknown : workers_[tid].selections[0].code;
  const uint16_t *const mean = !centroids ? g.mean : code < 0 ? nullptr : g.ipn_mean + code * g.in;
  guess = {by_entries_[group] ? 0 : g.in,  // there the threads' channels, not rows, are still to be shared out
           code,
           {{group % 2 ? nullptr : norms_[group / 2], 4 * g.in},
            {g.ipn_channels, centroids ? 4 * keys : 0},
            {g.ipn_keys, centroids * keys},
            {g.ipn_key_scale, 4 * centroids},
            {g.ipn_key_bias, 4 * centroids},
            {mean, half},
            {g.col_scale, half},
            {ipn ? g.ipn_importance : g.importance, half},
            {g.ipn_probe, features / 4 * g.in},
            {g.ipn_scale, features},
            {g.ipn_bias, features},
            {g.ipn_mix, features}}};
  const bool any = Passes(g, tid, pool_.size(), nullptr).next(pass);
  pass.guess = &guess;
  return any;
}

// This thread's tiles of every linear layer of the group.
void Engine::product(int tid, int64_t group, float *const *y, bool accumulate) {
  if (by_entries_[group]) return share_entries(tid, group, y, accumulate);
  const lt_group &g = groups_[group];
  Worker &w = workers_[tid];
  Passes passes(g, tid, pool_.size(), &w);
  Pass pass{}, next{};
  Guess after;
  bool more = passes.next(pass);
  if (more) k_.ask(pass);
  for (const lt_linear *listed = nullptr; more; pass = next) {
    float *to = y[passes.linear()] + Tiling(pass.layer->out).first(pass.begin);
    if (pass.layer != listed) k_.offsets(*pass.layer, w.selection(passes.linear()));
    listed = pass.layer;
    more = passes.next(next);
    const bool ask = more || guess(tid, group + 1, next, after);
    k_.tiles(g, pass, accumulate, w.acc.data(), to, ask ? &next : nullptr);
  }
}

// The same, but every thread reads whole runs of its part of the channels, and then adds up all threads' sums for its
// tiles. Sums lie in two buffers in turn: a thread may begin the next product while another still adds up this one.
void Engine::share_entries(int tid, int64_t group, float *const *y, bool accumulate) {
  const lt_group &g = groups_[group];
  const int threads = pool_.size();
  Worker &w = workers_[tid];
  const int turn = w.turn;
  w.turn ^= 1;
  for (int64_t i = 0; i < g.linear_count; ++i)
    if (w.which[i] == i) w.selections[i].keep(tid, threads);
  int32_t *to = w.sums(turn);
  for (int64_t i = 0; i < g.linear_count; ++i) {
    Selection &selection = w.selection(i);
    k_.ask({&g.linear[i], 0, Tiling(g.linear[i].out).count, &selection, nullptr});
    k_.offsets(g.linear[i], selection);
    k_.partial(g.linear[i], selection, to);
    to += g.slices * Tiling(g.linear[i].out).count * 256;
  }
  pool_.barrier();
  const Share share = share_of(g, tid, threads);
  Pass after{};
  Guess guessed;
  bool ask = guess(tid, group + 1, after, guessed);
  int64_t unit = 0, place = 0;
  for (int64_t i = 0; i < g.linear_count; ++i) {
    const lt_linear &l = g.linear[i];
    const Tiling t(l.out);
    const int64_t begin = std::max<int64_t>(share.begin - unit, 0), end = std::min(share.end - unit, t.count);
    const int32_t *sums[kMaxSharers];
    for (int p = 0; p < threads; ++p) sums[p] = workers_[p].sums(turn) + place;
    if (begin < end) {
      k_.combine(g, {&l, begin, end, &w.selection(i), nullptr}, accumulate, sums, threads, y[i] + t.first(begin),
                 ask ? &after : nullptr);
      ask = false;  // once is enough
    }
    unit += t.count;
    place += g.slices * t.count * 256;
  }
}

// The largest logit of each of this thread's tiles of the head.
void Engine::leading(int tid, Sequence &s, const float *logits) {
  const lt_group &g = groups_[head_group()];
  const Tiling t(g.linear[0].out);
  const Share share = share_of(g, tid, pool_.size());
  for (int64_t k = share.begin; k < share.end; ++k)
    s.leading_[k] = largest_of(logits + t.first(k), t.rows(k));
}

// Reads tiles that hold leading candidates again, with the policy's own thresholds; the threads take turns, for
// frequent tokens have neighbouring numbers.
void Engine::refine(int tid, Sequence &s, const lt_step &step) {
  const int64_t group = head_group(), coarse = s.bits_[group];
  const lt_linear &l = groups_[group].linear[0];
  const Tiling t(l.out);
  Worker &w = workers_[tid];
  const float least = largest_of(s.leading_.data(), t.count) - step.policy->head_margin;
  int64_t found = 0, rows = 0;
  for (int64_t k = 0; k < t.count; ++k) {
    if (!(s.leading_[k] >= least)) continue;
    if (!rows) {
      choose(tid, s, group, w.normed.data(), *step.policy);
      k_.offsets(l, w.selection());
    }
    rows += t.rows(k);
    if (found++ % pool_.size() != tid) continue;
    const Pass pass{&l, k, k + 1, &w.selection(), nullptr};
    k_.tiles(groups_[group], pass, false, w.acc.data(), step.logits + t.first(k), nullptr);
  }
  if (tid == 0) s.bits_[group] = coarse + 2 * w.selection().read_levels() * rows;
}

// Keys and values of this token go into the cache.
void Engine::rotate(int tid, Sequence &s, int64_t layer, int64_t position) {
  const int64_t hd = model_.head_dim, threads = pool_.size();
  float *q = s.qkv_.data(), *k = q + model_.heads * hd, *v = k + model_.kv_heads * hd;
  for (int64_t h = model_.heads * tid / threads; h < model_.heads * (tid + 1) / threads; ++h)
    k_.rope(q + h * hd, s.cosine_.data(), s.sine_.data(), hd);
  for (int64_t h = tid; h < model_.kv_heads; h += threads) {
    k_.rope(k + h * hd, s.cosine_.data(), s.sine_.data(), hd);
    k_.store_kv(k + h * hd, v + h * hd, hd, position, s.cache(layer, h));
  }
}

void Engine::attend(int tid, Sequence &s, int64_t layer, int64_t position) {
  const int64_t hd = model_.head_dim, per = model_.heads / model_.kv_heads;
  const int64_t begin = model_.heads * tid / pool_.size(), end = model_.heads * (tid + 1) / pool_.size();
  for (int64_t h = begin; h < end;) {
    const int64_t kv = h / per, stop = std::min(end, (kv + 1) * per);
    k_.attention(s.qkv_.data() + h * hd, 1, 0, stop - h, hd, s.cache(layer, kv), position + 1,
                 workers_[tid].scratch.data(), s.attended_.data() + h * hd);
    h = stop;
  }
}

void Engine::decode_thread(int tid, const lt_step *steps, int64_t n) {
  const lt_model &m = model_;
  Worker &w = workers_[tid];
  const auto each = [&](auto &&work) {
    for (int64_t i = 0; i < n; ++i) work(steps[i], steps[i].sequence->sequence);
  };
  const auto wait_each = [&](auto &&work) {
    each(work);
    pool_.barrier();
  };
  const auto normed = [&](const Sequence &s, int64_t which) {
    k_.rmsnorm(s.x_.data(), norms_[which], m.hidden, (float)m.rms_eps, w.normed.data());
    return (const float *)w.normed.data();
  };
  const lt_group &e = embed_group();
  if (tid == 0) each([&](const lt_step &step, Sequence &s) {
    k_.embed(e, e.linear[0], step.token, s.x_.data());
    set_angles(step.position, s.cosine_.data(), s.sine_.data());
  });
  pool_.barrier();
  for (int64_t layer = 0; layer < m.layers; ++layer) {
    const int64_t group = layer * 4;
    wait_each([&](const lt_step &step, Sequence &s) {
      choose(tid, s, group + kQkv, normed(s, 2 * layer), *step.policy);
      float *const q = s.qkv_.data(), *const k = q + m.heads * m.head_dim;
      float *const qkv[3] = {q, k, k + m.kv_heads * m.head_dim};
      product(tid, group + kQkv, qkv, false);
    });
    wait_each([&](const lt_step &step, Sequence &s) { rotate(tid, s, layer, step.position); });
    wait_each([&](const lt_step &step, Sequence &s) { attend(tid, s, layer, step.position); });
    wait_each([&](const lt_step &step, Sequence &s) {
      choose(tid, s, group + kO, s.attended_.data(), *step.policy);
      float *const residual[1] = {s.x_.data()};
      product(tid, group + kO, residual, true);
    });
    wait_each([&](const lt_step &step, Sequence &s) {
      choose(tid, s, group + kGateUp, normed(s, 2 * layer + 1), *step.policy);
      float *const pair[2] = {s.gate_up_.data(), s.gate_up_.data() + m.intermediate};
      product(tid, group + kGateUp, pair, false);
    });
    // Every thread needs all of it to choose channels, and computing it is cheaper than waiting once more.
    wait_each([&](const lt_step &step, Sequence &s) {
      k_.swiglu(s.gate_up_.data(), s.gate_up_.data() + m.intermediate, m.intermediate, w.hidden.data());
      choose(tid, s, group + kDown, w.hidden.data(), *step.policy);
      float *const residual[1] = {s.x_.data()};
      product(tid, group + kDown, residual, true);
    });
  }
  const auto twice = [](const lt_step &step) {
    return step.logits && step.policy->head_offset != 0 && step.policy->rule != LT_DENSE;
  };
  bool wait = false;
  each([&](const lt_step &step, Sequence &s) {
    if (!step.logits) return;
    lt_policy policy = *step.policy;
    if (twice(step)) policy.log2_offset += policy.head_offset;
    choose(tid, s, head_group(), normed(s, 2 * m.layers), policy);
    float *const out[1] = {step.logits};
    product(tid, head_group(), out, false);
    if (!twice(step)) return;
    leading(tid, s, step.logits);
    wait = true;
  });
  if (!wait) return;
  pool_.barrier();
  each([&](const lt_step &step, Sequence &s) {
    if (!twice(step)) return;
    normed(s, 2 * m.layers);
    refine(tid, s, step);
  });
}

void Engine::decode(const lt_step *steps, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    Sequence &s = steps[i].sequence->sequence;
    std::fill(s.bits_.begin(), s.bits_.end(), 0);
  }
  pool_.run([&](int tid) { decode_thread(tid, steps, n); });
  const lt_group &e = embed_group();
  for (int64_t i = 0; i < n; ++i) {
    lt_stats *stats = steps[i].stats;
    if (!stats) continue;
    const Sequence &s = steps[i].sequence->sequence;
    *stats = {};
    for (int64_t g = 0; g < head_group(); ++g) stats->body_bits += s.bits_[g];
    stats->head_bits = s.bits_[head_group()];
    stats->embed_bits = 2 * e.slices * e.in + 16 * e.in + 16;
    stats->cache_bytes = model_.layers * model_.kv_heads * (steps[i].position + 1) *
                         (model_.head_dim * model_.cache_bits / 4 + (model_.cache_bits == 8 ? 8 : 0));
  }
}

int64_t Engine::group_product(Sequence &s, int64_t group, const float *x, const lt_policy &policy, float *const *y) {
  pool_.run([&](int tid) {
    choose(tid, s, group, x, policy);
    product(tid, group, y, false);
  });
  return s.bits_[group];
}

}  // namespace lowtide
