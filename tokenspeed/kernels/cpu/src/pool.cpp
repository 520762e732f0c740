#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ts {
namespace {

constexpr uintptr_t kFetch = 512;  // bytes fetched between two looks for work
constexpr int kSpins = 4000;  // some tens of microseconds: longer than the gap between two ops, shorter than a time slice

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { serve(); });
}

Pool::~Pool() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

bool Pool::take_one() {
  const auto open = [](uint64_t t) { return (t & 0xffffffffu) < t >> 32; };
  if (!open(ticket_.load(std::memory_order_acquire))) return false;
  const uint64_t mine = ticket_.fetch_add(1, std::memory_order_acq_rel);
  if (!open(mine)) return false;
  (*work_)(static_cast<int64_t>(mine & 0xffffffffu));  // our item is not done, so this is still the work it belongs to
  done_.fetch_add(1, std::memory_order_release);
  return true;
}

void Pool::look_ahead(const uint8_t* from, int64_t bytes) {
  ahead_end_.store(0, std::memory_order_relaxed);
  ahead_.store(reinterpret_cast<uintptr_t>(from), std::memory_order_relaxed);
  ahead_end_.store(reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(bytes), std::memory_order_relaxed);
}

// Loads, since a processor may drop prefetches. The cursor never passes the end it was given, so whatever of a change is
// seen, what is read has been announced.
void Pool::pass_time() {
  uintptr_t from = ahead_.load(std::memory_order_relaxed);
  if (from >= ahead_end_.load(std::memory_order_relaxed)) return relax();
  if (!ahead_.compare_exchange_weak(from, from + kFetch, std::memory_order_relaxed)) return;
  for (uintptr_t at = 0; at < kFetch; at += 64) static_cast<void>(*reinterpret_cast<const volatile uint8_t*>(from + at));
}

void Pool::run(int64_t items, const std::function<void(int64_t)>& work) {
  if (workers_.empty() || items <= 1) {
    for (int64_t i = 0; i < items; ++i) work(i);
    return;
  }
  work_ = &work;
  done_.store(0, std::memory_order_relaxed);
  ticket_.store(static_cast<uint64_t>(items) << 32, std::memory_order_seq_cst);
  if (asleep_.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard lock(mutex_);
    wake_.notify_all();
  }
  while (take_one()) {}
  for (int spins = 0; done_.load(std::memory_order_acquire) < items; ++spins) {
    if (spins < kSpins) pass_time();
    else std::this_thread::yield();  // a worker lost its core in the middle of an item: let it have this one
  }
}

void Pool::serve() {
  for (int spins = 0;;) {
    if (take_one()) {
      spins = 0;
    } else if (++spins < kSpins) {
      pass_time();
    } else {
      std::unique_lock lock(mutex_);
      asleep_.fetch_add(1, std::memory_order_seq_cst);
      const auto ready = [&] {
        const uint64_t t = ticket_.load(std::memory_order_seq_cst);
        return stop_ || (t & 0xffffffffu) < t >> 32;
      };
      wake_.wait(lock, ready);
      asleep_.fetch_sub(1, std::memory_order_seq_cst);
      if (stop_) return;
      spins = 0;
    }
  }
}

}  // namespace ts
