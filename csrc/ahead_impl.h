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

// Asks for the weights of a pass in the order in which they will be read, a few lines at a time: all at once they would
// block other loads. None by default.
class Requests {
 public:
  Requests() = default;
  Requests(const Pass &p, const Selection &s) {
    const Tiling t(p.layer->out);
    run_bytes_ = t.run_bytes();
    bytes_ = t.byte_offset(p.end - 1) + t.width(p.end - 1) / 4 - t.byte_offset(p.begin);
    base_ = p.layer->weight + t.byte_offset(p.begin);
    run_ = p.guessed ? nullptr : s.run.data();  // a guess: every channel's coarsest slice, in order
    entries_ = p.guessed ? p.guessed : s.class_begin[s.slices];
  }
  inline __attribute__((always_inline)) void lines(int count) {
    for (; count && entry_ < entries_; --count) {
      __builtin_prefetch(base_ + (run_ ? run_[entry_] : entry_) * run_bytes_ + byte_, 0, 2);  // 2: the second cache
      if ((byte_ += 64) >= bytes_) byte_ = 0, ++entry_;
    }
  }
  // As much as the digit product would look ahead, unless that was asked for already.
  void beginning() {
    if (!entries_) return;
    for (const int64_t ahead = ahead_of(bytes_); entry_ < entries_ && entry_ < ahead;) lines(1);
  }

 private:
  const uint8_t *base_ = nullptr;
  const uint32_t *run_ = nullptr;
  int64_t run_bytes_ = 0, bytes_ = 0, entries_ = 0;
  int64_t entry_ = 0, byte_ = 0;  // the next line
};

}  // namespace LT_NS
