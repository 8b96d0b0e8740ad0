// Fork-join over independent tasks with plain threads: no OpenMP, whose runtime may not be torch's, and no pool that a
// fork() would break.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace lcdd {

// Calls task(i) once for every i in [0, count), on the caller and up to threads - 1 others. A task must not throw, and
// what it computes must not depend on the thread; which thread takes which task is left open.
template <class Task>
void parallel_for(int64_t count, int threads, const Task& task) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
  };
  const int64_t helpers = std::min<int64_t>(threads, count) - 1;
  std::vector<std::thread> others;
  others.reserve(size_t(std::max<int64_t>(helpers, 0)));
  try {
    for (int64_t t = 0; t < helpers; ++t) others.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those that started, and this one, do it all.
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace lcdd
