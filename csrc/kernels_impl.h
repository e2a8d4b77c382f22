// Every kernel but the digit product, in one source that each instruction set compiles for itself.
//
// The including file defines LT_NS (its namespace), and provides in it
//   digits(base, offset, coef, n, ahead, wide, narrow, acc)
// which sums coef * digit over n entries (a multiple of 4) for `wide` tiles of 256 rows and then `narrow` tiles of 64,
// asking memory for entries `ahead` places later as it goes; and
//   in_order(acc, tile, wide, room)
// which returns the 256 (64) sums of one of those tiles in the order of its rows, put into room, and then defines
// LT_OWN_ORDER; without it the sums are taken as they lie.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "ahead_impl.h"
#include "decoder_impl.h"
#include "ipn_impl.h"
#include "kernels.h"
#include "prefill_impl.h"
#include "select_impl.h"
#include "vec.h"

namespace LT_NS {

using lowtide::Kernels;
using lowtide::Pass;
using lowtide::Selection;
using lowtide::Tiling;

#if !defined(LT_OWN_ORDER)  // digits() left the sums in the order of the rows
static const int32_t *in_order(const int32_t *acc, int64_t tile, int64_t wide, int32_t * /* room */) {
  return acc + (tile < wide ? tile * 256 : wide * 256 + (tile - wide) * 64);
}
#endif

static void add(const float *x, int64_t n, float *y) {
  for (int64_t i = 0; i < n; i += 16) store_part(y + i, load_part(y + i, n - i) + load_part(x + i, n - i), n - i);
}

// Entries [e, e + n) of at most 16; returns the last one's column.
static inline __attribute__((always_inline)) int64_t outliers_at(const lt_linear &l, int64_t e, int64_t n,
                                                                 int64_t column, const float *a, float *y) {
  float value[16];
  store(value, load_half_part(l.outlier_value + e, n));
#pragma GCC unroll 16
  for (int64_t i = 0; i < n; ++i) {
    column += l.outlier_gap[e + i];
    float &out = y[l.outlier_row[e + i]];
    out = out + value[i] * a[column];
  }
  return column;
}

static void outliers(const lt_linear &l, int64_t tile, const float *a, float *y, Requests &requests) {
  int64_t column = 0, e = l.outlier_ptr[tile];
  const int64_t end = l.outlier_ptr[tile + 1];
  for (; e + 16 <= end; e += 16) {  // a fixed length: a fifth faster
    column = outliers_at(l, e, 16, column, a, y);
    requests.lines(lowtide::kLines);
  }
  if (e < end) outliers_at(l, e, end - e, column, a, y);
}

// Row scales, bias and exact channels of one tile, and between them, as the specification orders it, its outliers.
static void scale_and_correct(const lt_group &g, const lt_linear &l, const uint16_t *bias, int64_t tile, const float *a,
                              float *y, Requests &requests) {
  const Tiling t(l.out);
  const int64_t first = t.first(tile), rows = t.rows(tile);
  for (int64_t i = 0; i < rows; i += 16)
    store_part(y + i, load_part(y + i, rows - i) * load_half_part(l.row_scale + first + i, rows - i) +
                          load_half_part(bias + first + i, rows - i), rows - i);
  outliers(l, tile, a, y, requests);
  for (int64_t e = 0; e < g.exact_count; ++e) {
    const float x = a[g.exact_channels[e]];
    const uint16_t *column = l.exact + e * l.out + first;
    for (int64_t i = 0; i < rows; i += 16)
      store_part(y + i, load_part(y + i, rows - i) + load_half_part(column + i, rows - i) * x, rows - i);
  }
}

// sum [rows] += class k's digit sums of `width` rows, scaled; the first class' are just stored, for none of them is -0.
static void add_class(const Selection &s, int k, const int32_t *rows, int64_t width, bool first, float *sum) {
  const i32x16 shift = splat_int(s.class_sum[k]);
  const f32x16 scale = splat(s.class_scale[k]);
  for (int64_t r = 0; r < width; r += 16) {
    const i32x16 v = load_int(rows + r);
    const f32x16 part = to_float(v + v - shift) * scale;
    store(sum + r, first ? part : load(sum + r) + part);
  }
}

// Everything after the digits for a pass' tiles, whose sums lie one after the other in `sum`, which may be y; meanwhile
// memory is asked for what comes next.
static void write_tiles(const lt_group &g, const Pass &p, bool accumulate, float *sum, float *y, const Pass *next) {
  const Tiling t(p.layer->out);
  const Selection &s = *p.selection;
  Requests requests = next ? Requests(*next) : Requests();
  const uint16_t *const bias = lowtide::bias_of(*p.layer, s.code);
  for (int64_t i = p.begin; i < p.end; ++i) {
    scale_and_correct(g, *p.layer, bias, i, s.a.data(), sum, requests);
    float *to = y + t.first(i) - t.first(p.begin);
    if (accumulate) {
      add(sum, t.rows(i), to);
    } else if (to != sum) {
      std::memcpy(to, sum, (size_t)t.rows(i) * 4);
    }
    sum += t.width(i);
  }
  requests.beginning();
}

static void ask(const Pass &p) { Requests(p).beginning(); }

static void tiles(const lt_group &g, const Pass &p, bool accumulate, int32_t *acc, float *y, const Pass *next) {
  const lt_linear &l = *p.layer;
  const Selection &s = *p.selection;
  const int64_t begin = p.begin, end = p.end;
  const Tiling t(l.out);
  const int64_t wide = (end < t.wide ? end : t.wide) - begin > 0 ? (end < t.wide ? end : t.wide) - begin : 0;
  const int64_t narrow = end - begin - wide, bytes = wide * 64 + narrow * 16;
  const uint8_t *base = l.weight + t.byte_offset(begin);
  alignas(64) float other[lowtide::kPassTiles * 256];
  // Sums of padding rows have no room in y.
  float *const sum = !accumulate && t.first(end - 1) + t.width(end - 1) <= l.out ? y : other;
  bool first_class = true;
  for (int k = 0; k < s.slices; ++k) {
    const int64_t first = s.class_begin[k], n = s.class_begin[k + 1] - first;
    if (!n) continue;
    digits(base, s.offset.data() + first, s.coef.data() + first, n, ahead_of(bytes), wide, narrow, acc);
    float *to = sum;
    for (int64_t i = 0; i < end - begin; ++i) {
      const int64_t width = i < wide ? 256 : 64;
      alignas(64) int32_t room[256];
      add_class(s, k, in_order(acc, i, wide, room), width, first_class, to);
      to += width;
    }
    first_class = false;
  }
  if (first_class) std::memset(sum, 0, (size_t)bytes * 16);
  write_tiles(g, p, accumulate, sum, y, next);
}

static void partial(const lt_linear &l, const Selection &s, int32_t *acc) {
  const Tiling t(l.out);
  for (int k = 0; k < s.slices; ++k, acc += t.count * 256) {
    if (s.class_scale[k] == 0) continue;  // empty in all parts
    const int64_t first = s.class_begin[k], n = s.class_begin[k + 1] - first;
    digits(l.weight, s.offset.data() + first, s.coef.data() + first, n, ahead_of(t.run_bytes()), t.wide,
           t.count - t.wide, acc);
  }
}

static void combine(const lt_group &g, const Pass &p, bool accumulate, const int32_t *const *sums, int threads,
                    float *y, const Pass *next) {
  const lt_linear &l = *p.layer;
  const Selection &s = *p.selection;
  const int64_t begin = p.begin, end = p.end;
  const Tiling t(l.out);
  alignas(64) float sum[lowtide::kPassTiles * 256];
  float *to = sum;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t width = t.width(i);
    std::memset(to, 0, (size_t)width * 4);
    for (int k = 0; k < s.slices; ++k) {
      if (s.class_scale[k] == 0) continue;
      alignas(64) int32_t rows[256] = {}, room[256];
      for (int thread = 0; thread < threads; ++thread) {
        const int32_t *more = in_order(sums[thread] + k * t.count * 256, i, t.wide, room);
        for (int64_t r = 0; r < width; ++r) rows[r] += more[r];
      }
      add_class(s, k, rows, width, false, to);
    }
    to += width;
  }
  write_tiles(g, p, accumulate, sum, y, next);
}

static float sum(const void *p, int64_t bytes) {
  const char *c = (const char *)p;
  i32x16 acc[4] = {};
  for (int64_t i = 0; i + 256 <= bytes; i += 256)
    for (int k = 0; k < 4; ++k) acc[k] = acc[k] ^ load_int((const int32_t *)(c + i + k * 64));
  return to_float(acc[0] ^ acc[1] ^ acc[2] ^ acc[3])[0];
}

static const Kernels kTable = {LT_NAME, select,  offsets, scores, probe,    waterline, code,         ask,    tiles,
                               partial, combine, rmsnorm, swiglu, rope,     attention, store_kv,     embed,  quantise,
                               side_by_side, unpack, multiply, finish, sum};

}  // namespace LT_NS
