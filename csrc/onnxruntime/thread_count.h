// How many threads a host has that does not say it.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <set>
#include <thread>

#include "../runner.h"

namespace quincunx {

// Threads that take part in one parallel loop, in which each waits for the others as long as somebody new comes.
// A thread that sleeps or has no processor for longer than that is not counted.
inline int64_t count_present(const Host& host, int64_t most) {
  struct Meeting {
    std::mutex lock;
    std::condition_variable came;
    std::set<std::thread::id> here;
    size_t most;
    bool over = false;
  } meeting;
  meeting.most = static_cast<size_t>(most);
  const auto wait = [](void* argument, int64_t) {
    Meeting& all = *static_cast<Meeting*>(argument);
    std::unique_lock<std::mutex> guard(all.lock);
    all.here.insert(std::this_thread::get_id());
    if (all.here.size() >= all.most) all.over = true;
    all.came.notify_all();
    while (!all.over) {
      const size_t seen = all.here.size();
      const bool somebody = all.came.wait_for(guard, std::chrono::milliseconds(1),
                                              [&] { return all.over || all.here.size() != seen; });
      if (!somebody) all.over = true;
    }
    all.came.notify_all();
  };
  host.parallel_for(host.context, 2 * most, wait, &meeting);
  return std::max<int64_t>(1, static_cast<int64_t>(meeting.here.size()));
}

// The count over the calls of one program. Since threads come late to a first call, and to any call on a machine that is
// busy, it is taken again at the calls 2, 3, 5, 9 and so on up to 65, and is the largest of them.
class ThreadCount {
 public:
  explicit ThreadCount(int64_t most = std::thread::hardware_concurrency()) : most_(std::max<int64_t>(1, most)) {}

  int64_t at_call(const Host& host) {
    const int64_t call = calls_.fetch_add(1, std::memory_order_relaxed);
    if (call <= 64 && (call & (call - 1)) == 0 && count_.load() < most_) {
      const int64_t found = count_present(host, most_);
      for (int64_t known = count_.load(); known < found && !count_.compare_exchange_weak(known, found);) continue;
    }
    return count_.load();
  }

 private:
  const int64_t most_;
  std::atomic<int64_t> calls_{0}, count_{1};
};

}  // namespace quincunx
