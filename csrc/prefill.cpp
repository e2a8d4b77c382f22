// Many tokens at once: every weight is unpacked once per chunk of tokens and multiplied with int8 inputs.
#include <algorithm>
#include <cmath>

#include "engine.h"

namespace lowtide {

// Every token's input as int8, [block of kDepth channels][token][kDepth], and the plain x - mean, which outliers and
// exact channels are multiplied with, [kSide tokens][in][kSide].
void Engine::centre(int tid, const lt_group &g, const float *x, int64_t n) {
  const int64_t groups = (n + 15) / 16;
  float *const a = workers_[tid].centred.data();
  for (int64_t group = groups * tid / pool_.size(); group < groups * (tid + 1) / pool_.size(); ++group) {
    const int64_t first = group * 16, count = std::min<int64_t>(16, n - first);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = first + i;
      k_.quantise(g, x + token * g.in, kChunk, a + i * g.in, pquantised_.data() + token * kDepth,
                  pscale_.data() + token, psum_.data() + token);
    }
    k_.side_by_side(a, g.in, pacross_.data() + first / kSide * kSide * g.in + first % kSide);
  }
  pool_.barrier();
}

// One tile for all tokens: their products in w.block, [part of 64 rows][token][64].
void Engine::dense_tile(Worker &w, const lt_group &g, const lt_linear &l, int64_t tile, int64_t n) {
  const int64_t width = Tiling(l.out).width(tile), blocks = blocks_of(g.in);
  std::fill(w.block.begin(), w.block.begin() + n * width, 0.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    k_.unpack(g, l, tile, b * kDepth, w.panel.data());
    k_.multiply(g, pquantised_.data() + b * kChunk * kDepth, pscale_.data() + b * kChunk, psum_.data() + b * kChunk, n,
                width, w.panel.data(), w.block.data());
  }
}

void Engine::dense(int tid, int64_t group, const float *x, int64_t n, float *const *y, bool accumulate) {
  const lt_group &g = groups_[group];
  Worker &w = workers_[tid];
  centre(tid, g, x, n);
  const Share share = share_of(g, tid, pool_.size());
  int64_t index = 0;
  for (int64_t i = 0; i < g.linear_count; ++i) {
    const lt_linear &l = g.linear[i];
    const Tiling t(l.out);
    for (int64_t k = 0; k < t.count; ++k, ++index) {
      if (index < share.begin || index >= share.end) continue;
      dense_tile(w, g, l, k, n);
      for (int64_t r = 0; r < n; r += kSide)
        k_.finish(g, l, k, pacross_.data() + r * g.in, w.block.data() + r * 64, n * 64, std::min(kSide, n - r),
                  accumulate, y[i] + r * l.out + t.first(k));
    }
  }
  pool_.barrier();
}

void Engine::prefill_chunk(int tid, Sequence &seq, const int32_t *tokens, int64_t n, int64_t position) {
  const lt_model &m = model_;
  const int64_t hd = m.head_dim, half = hd / 2, q_rows = m.heads * hd, kv_rows = m.kv_heads * hd;
  const int64_t per = m.heads / m.kv_heads, threads = pool_.size();
  float *q = pqkv_.data(), *k = q + kChunk * q_rows, *v = k + kChunk * kv_rows;
  const lt_group &e = embed_group();
  for (int64_t i = tid; i < n; i += threads) {
    k_.embed(e, e.linear[0], tokens[i], px_.data() + i * m.hidden);
    set_angles(position + i, pcos_.data() + i * half, psin_.data() + i * half);
  }
  pool_.barrier();
  const auto norm = [&](int64_t which) {
    for (int64_t i = tid; i < n; i += threads)
      k_.rmsnorm(px_.data() + i * m.hidden, norms_[which], m.hidden, (float)m.rms_eps, pnormed_.data() + i * m.hidden);
    pool_.barrier();
  };
  for (int64_t layer = 0; layer < m.layers; ++layer) {
    const int64_t group = layer * 4;
    norm(2 * layer);
    float *const qkv[3] = {q, k, v};
    dense(tid, group + kQkv, pnormed_.data(), n, qkv, false);
    for (int64_t i = 0; i < n; ++i) {
      const float *c = pcos_.data() + i * half, *s = psin_.data() + i * half;
      for (int64_t h = tid; h < m.heads; h += threads) k_.rope(q + i * q_rows + h * hd, c, s, hd);
      for (int64_t h = tid; h < m.kv_heads; h += threads) {
        float *kh = k + i * kv_rows + h * hd;
        k_.rope(kh, c, s, hd);
        k_.store_kv(kh, v + i * kv_rows + h * hd, hd, position + i, seq.cache(layer, h));
      }
    }
    pool_.barrier();
    for (int64_t i = tid * kQueries; i < n; i += threads * kQueries)  // whole groups of queries, whatever the heads
      for (int64_t h = 0; h < m.kv_heads; ++h)
        k_.attention(q + i * q_rows + h * per * hd, std::min(kQueries, n - i), q_rows, per, hd, seq.cache(layer, h),
                     position + i + 1, workers_[tid].scratch.data(), pattended_.data() + i * q_rows + h * per * hd);
    pool_.barrier();
    float *const residual[1] = {px_.data()};
    dense(tid, group + kO, pattended_.data(), n, residual, true);
    norm(2 * layer + 1);
    float *const pair[2] = {pgate_up_.data(), pgate_up_.data() + kChunk * m.intermediate};
    dense(tid, group + kGateUp, pnormed_.data(), n, pair, false);
    for (int64_t i = tid; i < n; i += threads)
      k_.swiglu(pair[0] + i * m.intermediate, pair[1] + i * m.intermediate, m.intermediate,
                phidden_.data() + i * m.intermediate);
    pool_.barrier();
    dense(tid, group + kDown, phidden_.data(), n, residual, true);
  }
  norm(2 * m.layers);
}

// Logits of rows [first, first + n) of the chunk.
void Engine::head(int tid, int64_t first, int64_t n, float *logits) {
  float *const out[1] = {logits};
  dense(tid, head_group(), pnormed_.data() + first * model_.hidden, n, out, false);
}

void Engine::reserve_prefill() {
  const lt_model &m = model_;
  const int64_t q_rows = m.heads * m.head_dim, kv_rows = m.kv_heads * m.head_dim;
  int64_t max_in = 0;
  for (const lt_group &g : groups_) max_in = std::max(max_in, g.in);
  px_.resize((size_t)(kChunk * m.hidden));
  pnormed_.resize((size_t)(kChunk * m.hidden));
  pquantised_.resize((size_t)(kChunk * blocks_of(max_in) * kDepth));
  pscale_.resize((size_t)(kChunk * blocks_of(max_in)));
  psum_.resize((size_t)(kChunk * blocks_of(max_in)));
  pacross_.resize((size_t)(kChunk * max_in));
  for (Worker &w : workers_) {
    w.block.resize((size_t)(kChunk * 256));
    w.centred.resize((size_t)(16 * max_in + 16));
  }
  pqkv_.resize((size_t)(kChunk * (q_rows + 2 * kv_rows)));
  pattended_.resize((size_t)(kChunk * q_rows));
  pgate_up_.resize((size_t)(kChunk * 2 * m.intermediate));
  phidden_.resize((size_t)(kChunk * m.intermediate));
  pcos_.resize((size_t)(kChunk * m.head_dim / 2));
  psin_.resize((size_t)(kChunk * m.head_dim / 2));
}

void Engine::prefill(Sequence &s, const int32_t *tokens, int64_t n, int64_t position, bool all_logits, float *logits) {
  reserve_prefill();
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t count = std::min(kChunk, n - begin);
    pool_.run([&](int tid) {
      prefill_chunk(tid, s, tokens + begin, count, position + begin);
      if (all_logits) {
        head(tid, 0, count, logits + begin * model_.vocab);
      } else if (begin + count == n) {
        head(tid, count - 1, 1, logits);
      }
    });
  }
}

}  // namespace lowtide
