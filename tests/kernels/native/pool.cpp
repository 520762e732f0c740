// The thread pool: every item once, whatever the workers are doing, and ends of life at any moment.
#include "pool.h"

#include <chrono>
#include <numeric>

#include "cases.h"

namespace native {
namespace {

int64_t items_of(int round) { return round * 7919 % 61; }

// Plain counters, each touched by one item: a race shows under ThreadSanitizer, a lost or doubled item in the counts.
bool each_once(ts::Pool& pool, int64_t items) {
  std::vector<int> seen(static_cast<size_t>(items));
  pool.run(items, [&](int64_t i) { ++seen[static_cast<size_t>(i)]; });
  return std::accumulate(seen.begin(), seen.end(), int64_t{0}) == items && (items == 0 || *std::max_element(seen.begin(), seen.end()) == 1);
}

}  // namespace

void pool_cases(Report& report) {
  for (const int threads : {1, 2, 3, 7}) {
    const std::string name = std::to_string(threads) + " threads: ";
    ts::Pool pool(threads);
    report.check(pool.threads() == threads, name + "another number of threads");
    for (int round = 0; round < 3000; ++round) report.check(each_once(pool, items_of(round)), name + "one run after the other");
    for (int round = 0; round < 30; ++round) {  // workers asleep, or just falling asleep
      std::this_thread::sleep_for(std::chrono::microseconds(100 * (round % 10)));
      report.check(each_once(pool, 5), name + "after a pause");
    }
    std::vector<int64_t> chain(64, 1);  // what one run wrote the next reads
    for (int round = 0; round < 500; ++round) {
      pool.run(63, [&](int64_t i) { chain[static_cast<size_t>(63 - i)] = chain[static_cast<size_t>(63 - i)] % 1000 + round; });
    }
    report.check(chain[1] == chain[63], name + "the last run's writes are not seen");
  }
  for (int round = 0; round < 50; ++round) {  // ends while the workers spin, sleep or have not begun
    ts::Pool pool(1 + round % 4);
    if (round % 3 == 1) report.check(each_once(pool, 9), "a short life");
    if (round % 3 == 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace native
