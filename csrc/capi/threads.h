// Threads that wait for work, for hosts that have none of their own.
#pragma once

#include <unistd.h>
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../runner.h"

namespace quincunx {

#if defined(__linux__)
// The processors that a thread may use, as the library was loaded.
inline const cpu_set_t kProcessors = [] {
  cpu_set_t found;
  if (pthread_getaffinity_np(pthread_self(), sizeof found, &found) != 0) CPU_ZERO(&found);
  return found;
}();
#endif

// Engines tie their threads to one processor each, and a thread that is made by such a one inherits that: all of a
// team would take turns on it. Threads that share too few processors get those of the time of loading.
inline void spread([[maybe_unused]] std::vector<std::thread>& made) {
#if defined(__linux__)
  cpu_set_t mine;
  if (pthread_getaffinity_np(pthread_self(), sizeof mine, &mine) != 0) return;
  const auto count = static_cast<size_t>(CPU_COUNT(&mine));
  if (count > made.size() || CPU_COUNT(&kProcessors) <= CPU_COUNT(&mine)) return;
  for (std::thread& thread : made) pthread_setaffinity_np(thread.native_handle(), sizeof kProcessors, &kProcessors);
#endif
}

class Threads {
 public:
  explicit Threads(int64_t count) : count_(count), team_(new Team(count)) {}
  ~Threads() {
    // threads of the parent are not in a forked child, where nothing may wait for them
    if (team_->process != getpid()) (void)team_.release();
  }

  int64_t count() const { return count_; }

  void parallel_for(int64_t count, void (*body)(void*, int64_t), void* argument) {
    Team& team = here();
    const std::unique_lock<std::mutex> turn(team.turn, std::try_to_lock);
    if (!turn.owns_lock()) {
      // a second caller, or a body that asks for threads itself
      for (int64_t i = 0; i < count; ++i) body(argument, i);
      return;
    }
    team.run(count, body, argument);
  }

 private:
  struct Team {
    explicit Team(int64_t count) : process(getpid()) {
      for (int64_t i = 1; i < count; ++i) workers.emplace_back([this] { work(); });
      spread(workers);
    }
    ~Team() {
      {
        const std::lock_guard<std::mutex> guard(lock);
        stop = true;
        ++round;
      }
      wake.notify_all();
      for (std::thread& worker : workers) worker.join();
    }

    // A thread that comes late finds a job that is done; nobody waits for it.
    struct Job {
      int64_t count;
      void (*body)(void*, int64_t);
      void* argument;
      std::atomic<int64_t> next{0}, done{0};
      void work() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
          body(argument, i);
          done.fetch_add(1, std::memory_order_release);
        }
      }
    };

    void run(int64_t count, void (*body)(void*, int64_t), void* argument) {
      const auto job = std::make_shared<Job>();
      job->count = count;
      job->body = body;
      job->argument = argument;
      {
        const std::lock_guard<std::mutex> guard(lock);
        current = job;
        ++round;
      }
      wake.notify_all();
      job->work();
      for (int64_t turn = 0; job->done.load(std::memory_order_acquire) < count; ++turn) relax(turn);
    }

    void work() {
      uint64_t seen = 0;
      for (;;) {
        // the next program often comes at once; a sleeping thread would take long to wake
        for (int64_t turn = 0; turn < 1000 && round.load(std::memory_order_acquire) == seen; ++turn) relax(turn);
        std::shared_ptr<Job> job;
        {
          std::unique_lock<std::mutex> guard(lock);
          wake.wait(guard, [&] { return round.load() != seen; });
          seen = round.load();
          if (stop) return;
          job = current;
        }
        job->work();
      }
    }

    const pid_t process;
    std::mutex turn, lock;
    std::condition_variable wake;
    std::atomic<uint64_t> round{0};
    std::shared_ptr<Job> current;
    bool stop = false;
    std::vector<std::thread> workers;
  };

  Team& here() {
    const std::lock_guard<std::mutex> guard(lock_);
    if (team_->process != getpid()) {
      // the parent's threads are not here, and its locks may be held for ever
      (void)team_.release();
      team_.reset(new Team(count_));
    }
    return *team_;
  }

  const int64_t count_;
  std::mutex lock_;
  std::unique_ptr<Team> team_;
};

}  // namespace quincunx
