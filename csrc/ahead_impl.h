// Asking memory for weights before their turn (docs/architecture.md: Asking ahead). Included by kernels_impl.h only.
#pragma once
#include "kernels.h"

namespace LT_NS {

using lowtide::Pass;
using lowtide::Selection;
using lowtide::Tiling;

// How many entries ahead the digit product asks for, where `bytes` of each run are read.
static int64_t ahead_of(int64_t bytes) {
  const int64_t ahead = lowtide::kAheadBytes / (bytes * lowtide::kBlock) + 1;
  return (ahead < lowtide::kAhead ? ahead : lowtide::kAhead) * lowtide::kBlock;
}

// Asks for what a pass reads, a few lines at a time: all at once they would block other loads. First the short tensors
// that choosing its entries needs, if that is still to be done, and those that follow its digits (of outliers the
// beginning: the processor itself finds out how they go on), then runs of digits in order. Nothing by default.
class Requests {
 public:
  Requests() = default;
  explicit Requests(const Pass &p) {
    const lt_linear &l = *p.layer;
    const Tiling t(l.out);
    const int64_t first = t.first(p.begin), rows = t.first(p.end - 1) + t.rows(p.end - 1) - first;
    run_bytes_ = t.run_bytes();
    bytes_ = t.byte_offset(p.end - 1) + t.width(p.end - 1) / 4 - t.byte_offset(p.begin);
    base_ = l.weight + t.byte_offset(p.begin);
    const Selection *const s = p.selection;
    run_ = s ? s->run.data() : nullptr;  // a guess: every channel's coarsest digits
    entries_ = s ? s->class_begin[s->slices] : p.guess->in;
    if (!s)
      for (const lowtide::Span &span : p.guess->side) add(span.from, span.bytes);
    add(l.row_scale + first, 2 * rows);
    if (const uint16_t *bias = lowtide::bias_of(l, s ? s->code : p.guess->code)) add(bias + first, 2 * rows);
    const int64_t outlier = l.outlier_ptr[p.begin], count = l.outlier_ptr[p.end] - outlier;
    const int64_t few = count < 1024 ? count : 1024;
    add(l.outlier_row + outlier, few);
    add(l.outlier_gap + outlier, few);
    add(l.outlier_value + outlier, few);
  }
  inline __attribute__((always_inline)) void lines(int count) {
    for (; count; --count, at_ += 64) {
      if (at_ >= end_ && !turn()) return;
      __builtin_prefetch(at_, 0, 2);  // 2: the second-level cache
    }
  }
  // As much as the digit product would look ahead, unless that was asked for already.
  void beginning() {
    if (!entries_) return;
    const int64_t ahead = ahead_of(bytes_), entries = entries_ < ahead ? entries_ : ahead;
    while (at_ < end_ || span_ < spans_ || entry_ < entries) lines(1);
  }

 private:
  void add(const void *from, int64_t bytes) {
    if (from && bytes) span_of_[spans_++] = {from, bytes};
  }
  // To the next tensor or run; false after the last one.
  bool turn() {
    if (span_ < spans_) {
      at_ = (const uint8_t *)span_of_[span_].from;
      end_ = at_ + span_of_[span_++].bytes;
    } else if (entry_ < entries_) {
      at_ = base_ + (run_ ? run_[entry_] : entry_) * run_bytes_;
      end_ = at_ + bytes_;
      ++entry_;
    } else {
      return false;
    }
    at_ = (const uint8_t *)((uintptr_t)at_ & ~(uintptr_t)63);  // from its line's beginning, or the last is left out
    return true;
  }

  lowtide::Span span_of_[lowtide::kSides + 5];
  const uint8_t *base_ = nullptr, *at_ = nullptr, *end_ = nullptr;
  const uint32_t *run_ = nullptr;
  int64_t run_bytes_ = 0, bytes_ = 0;
  int64_t spans_ = 0, span_ = 0, entries_ = 0, entry_ = 0;
};

}  // namespace LT_NS
