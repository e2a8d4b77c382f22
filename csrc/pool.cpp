#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lowtide {
namespace {

constexpr int kSpinsBeforeYield = 1024;
constexpr int kSpinsBeforeSleep = 30000;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads) : size_(threads) {
  try {
    for (int i = 1; i < size_; ++i) threads_.emplace_back([this, i] { worker(i); });
  } catch (...) {  // the system gives no more threads: end those there are before telling
    stop();
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto &t : threads_) t.join();
}

void Pool::run(const std::function<void(int)> &work) {
  if (size_ == 1) {
    work(0);
    return;
  }
  work_ = &work;
  {
    // The lock makes a worker that is about to sleep see either the new generation or the notification.
    std::lock_guard<std::mutex> lock(mutex_);
    generation_.fetch_add(1, std::memory_order_release);
  }
  if (asleep_.load(std::memory_order_relaxed) > 0) wake_.notify_all();
  work(0);
  barrier();
}

void Pool::barrier() {
  if (size_ == 1) return;
  const unsigned phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; phase_.load(std::memory_order_acquire) == phase;) {
    if (++spins < kSpinsBeforeYield) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

void Pool::worker(int index) {
  unsigned seen = 0;
  for (;;) {
    int spins = 0;
    while (generation_.load(std::memory_order_acquire) == seen && !stop_.load(std::memory_order_relaxed)) {
      if (++spins < kSpinsBeforeSleep) {
        relax();
        continue;
      }
      std::unique_lock<std::mutex> lock(mutex_);
      ++asleep_;
      wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen || stop_; });
      --asleep_;
    }
    if (stop_) return;
    seen = generation_.load(std::memory_order_acquire);
    (*work_)(index);
    barrier();
  }
}

}  // namespace lowtide
