// The split of a call's work over threads of OpenMP, and how a long call ends early when its user interrupts
// it.
#pragma once

#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "registry.h"

namespace mmfast {
inline namespace MMFAST_ISA_NAMESPACE {

// What the threads of a call share that may take longer than its user wants to wait. Whoever has one calls
// finish() once its threads are done.
struct Watch {
  std::atomic<bool> is_over{false};
  void finish() const {
    if (is_over.load(std::memory_order_relaxed)) throw Interrupted{};
  }
};

// A thread's part in it. Only the one that made the call may ask.
struct Watcher {
  Watch* watch;
  bool asks;
  int64_t operations, asked;  // done since the clock was read; when the answer was no, in ns
};
// In the block that every thread has from its start: a nanosecond to reach.
inline thread_local Watcher watcher __attribute__((tls_model("initial-exec"))) = {};

// Makes a thread work for a watch while this lives.
class Watching {
 public:
  Watching(Watch& watch, bool asks) : before_(watcher) { watcher.watch = &watch, watcher.asks = asks; }
  ~Watching() { watcher.watch = before_.watch, watcher.asks = before_.asks; }
  Watching(const Watching&) = delete;
  Watching& operator=(const Watching&) = delete;

 private:
  const Watcher before_;
};

// Whether the work is to end; `operations`, more or less, were done since the last time this was asked. A
// call that takes longer than a second asks this at least every few milliseconds of it, and does no more once
// it is true.
inline bool is_interrupted(int64_t operations) {
  constexpr int64_t kOperations = 1 << 20, kPeriod = 100'000'000;
  watcher.operations += operations;
  if (watcher.operations < kOperations) return false;
  watcher.operations = 0;
  if (watcher.watch == nullptr) return false;
  if (watcher.asks) {
#ifdef CLOCK_MONOTONIC_COARSE
    constexpr clockid_t clock = CLOCK_MONOTONIC_COARSE;
#else
    constexpr clockid_t clock = CLOCK_MONOTONIC;
#endif
    timespec time;
    clock_gettime(clock, &time);
    const int64_t now = time.tv_sec * int64_t{1'000'000'000} + time.tv_nsec;
    if (now - watcher.asked > kPeriod) {
      watcher.asked = now;
      if (ask_interrupted != nullptr && ask_interrupted()) watcher.watch->is_over = true;
    }
  }
  const bool is_over = watcher.watch->is_over.load(std::memory_order_relaxed);
  // Whoever asks on the way out hears it at once.
  if (is_over) watcher.operations = kOperations;
  return is_over;
}

// Calls function(begin, end) for parts of [0, num_items) of equal size, one per thread; fewer threads where a
// thread would get less than 64 KB or so to read, since waking one costs a few microseconds.
template <class Function>
void parallel_for(int64_t num_items, int64_t bytes_per_item, int64_t num_threads, Function&& function) {
  constexpr int64_t kMinBytes = 1 << 16;
  const int64_t useful = std::max<int64_t>(1, num_items * bytes_per_item / kMinBytes);
  const int64_t threads = std::max<int64_t>(1, std::min({num_threads, useful, num_items}));
  // One copy of the kernel, called from both places.
  const auto part = [&](int64_t t) __attribute__((noinline)) {
    function(num_items * t / threads, num_items * (t + 1) / threads);
  };
  Watch watch;
  const Watcher* const caller = &watcher;
  const auto watched_part = [&](int64_t t) {
    const Watching watching(watch, &watcher == caller);
    part(t);
  };
  if (threads == 1) {
    watched_part(0);
  } else {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < threads; ++t) watched_part(t);
  }
  watch.finish();
}

// Calls function() on each of so many threads; in it `omp for` and `omp barrier` divide what they do.
template <class Function>
void parallel_region(int64_t num_threads, Function&& function) {
  Watch watch;
  const Watcher* const caller = &watcher;
#pragma omp parallel num_threads(static_cast<int>(num_threads))
  {
    const Watching watching(watch, &watcher == caller);
    function();
  }
  watch.finish();
}

}  // namespace MMFAST_ISA_NAMESPACE
}  // namespace mmfast
