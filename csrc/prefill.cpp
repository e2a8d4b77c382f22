// Many tokens at once: every weight is unpacked once per chunk of tokens and multiplied with int8 inputs.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine.h"

namespace lowtide {

// Every token's input as int8 in blocks of kDepth channels, and the plain x - mean, which outliers and exact channels
// are multiplied with.
void Engine::centre(int tid, const lt_group &g, const float *x, int64_t n) {
  const int64_t begin = n * tid / pool_.size(), end = n * (tid + 1) / pool_.size(), blocks = blocks_of(g.in);
  for (int64_t i = begin; i < end; ++i)
    k_.quantise(g, x + i * g.in, pcentred_.data() + i * g.in, pquantised_.data() + i * blocks * kDepth,
                pscale_.data() + i * blocks, psum_.data() + i * blocks);
  for (int64_t j = 0; j < g.in; ++j)  // tokens side by side, for the outliers
    for (int64_t i = begin; i < end; ++i) pacross_[(size_t)(j * kChunk + i)] = pcentred_[(size_t)(i * g.in + j)];
  pool_.barrier();
}

// One tile for all tokens: `rows` tokens' products in w.block, [part of 64 rows][token][64].
void Engine::dense_tile(Worker &w, const lt_group &g, const lt_linear &l, int64_t tile, int64_t n) {
  const int64_t width = Tiling(l.out).width(tile), blocks = blocks_of(g.in);
  const int32_t middle = doubled_centre(g);
  std::fill(w.block.begin(), w.block.begin() + n * width, 0.0f);
  for (int64_t part = 0; part < width; part += 64)
    for (int64_t b = 0; b < blocks; ++b) {
      k_.unpack(g, l, tile, part, b * kDepth, w.panel.data());
      k_.multiply(pquantised_.data() + b * kDepth, pscale_.data() + b, psum_.data() + b, blocks, n, middle,
                  w.panel.data(), w.block.data() + part * n);
    }
}

void Engine::dense(int tid, int64_t group, const float *x, int64_t n, float *const *y, bool accumulate) {
  const lt_group &g = groups_[group];
  Worker &w = workers_[tid];
  centre(tid, g, x, n);
  // The code is a whole number; its unit in the last slice is 4^-(S-1).
  const float unit = std::ldexp(1.0f, -2 * (int)(g.slices - 1));
  const Share share = share_of(g, tid, pool_.size());
  int64_t index = 0;
  for (int64_t i = 0; i < g.linear_count; ++i) {
    const lt_linear &l = g.linear[i];
    const Tiling t(l.out);
    for (int64_t k = 0; k < t.count; ++k, ++index) {
      if (index < share.begin || index >= share.end) continue;
      const int64_t width = t.width(k);
      dense_tile(w, g, l, k, n);
      std::fill(w.corrections.begin(), w.corrections.begin() + t.rows(k) * kChunk, 0.0f);
      k_.outliers(l, k, pacross_.data(), n, kChunk, w.corrections.data());
      alignas(64) float row[256];
      for (int64_t r = 0; r < n; ++r) {
        for (int64_t part = 0; part < width; part += 64)
          for (int64_t c = 0; c < 64; ++c) row[part + c] = w.block[(size_t)(part * n + r * 64 + c)] * unit;
        k_.finish(g, l, k, pcentred_.data() + r * g.in, w.corrections.data() + r, kChunk, row);
        float *to = y[i] + r * l.out + t.first(k);
        if (accumulate) {
          k_.add(row, t.rows(k), to);
        } else {
          std::memcpy(to, row, (size_t)t.rows(k) * 4);
        }
      }
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
    for (int64_t i = tid; i < n; i += threads)
      for (int64_t h = 0; h < m.kv_heads; ++h)
        k_.attention(q + i * q_rows + h * per * hd, per, hd, seq.cache(layer, h), position + i + 1,
                     workers_[tid].scratch.data(), pattended_.data() + i * q_rows + h * per * hd);
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
  pcentred_.resize((size_t)(kChunk * max_in));
  pquantised_.resize((size_t)(kChunk * blocks_of(max_in) * kDepth));
  pscale_.resize((size_t)(kChunk * blocks_of(max_in)));
  psum_.resize((size_t)(kChunk * blocks_of(max_in)));
  pacross_.resize((size_t)(kChunk * max_in));
  for (Worker &w : workers_) {
    w.block.resize((size_t)(kChunk * 256));
    w.corrections.resize((size_t)(kChunk * 256));
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
