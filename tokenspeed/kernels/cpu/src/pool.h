// Threads that wait for short pieces of parallel work: they spin briefly, then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace ts {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Call work(item) for every item in [0, items), on all threads, the caller's included; returns when all are done.
  // Items are taken one by one and only taken ones are waited for: a thread that is held up elsewhere delays nobody.
  void run(int64_t items, const std::function<void(int64_t)>& work);

  // What will be read next: threads that would only wait fetch it into their second-level cache meanwhile.
  void look_ahead(const uint8_t* from, int64_t bytes);

 private:
  void serve();
  bool take_one();
  void pass_time();

  // High half: items of the work at hand; low half: the next one to take. One word, so that a thread that comes late can
  // never take an item of one piece of work believing it to be of another.
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int64_t> done_{0};
  const std::function<void(int64_t)>* work_ = nullptr;
  std::atomic<uintptr_t> ahead_{0}, ahead_end_{0};
  std::atomic<int> asleep_{0};
  bool stop_ = false;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

}  // namespace ts
