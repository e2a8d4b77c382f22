// A team of threads that stays awake while tokens come.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace lowtide {

// Runs one function on every thread of the team (the caller is thread 0). Within it, barrier() waits for all.
// Waiting spins, since phases last microseconds, and yields after a while so that a busy machine is not blocked;
// between runs the workers spin for about a millisecond and then sleep.
class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;

  int size() const { return size_; }
  void run(const std::function<void(int)> &work);
  void barrier();

 private:
  void worker(int index);
  void stop();

  const int size_;
  std::vector<std::thread> threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> phase_{0};
  alignas(64) std::atomic<unsigned> generation_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int> asleep_{0};
  const std::function<void(int)> *work_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace lowtide
