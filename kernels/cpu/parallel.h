// Threads, handed to the algorithms, which know no other way to use several.
//
// They are those of the OpenMP runtime that PyTorch has loaded, libgomp or libomp: others would fight them for the cores.
// Its functions, which OpenMP's pragmas stand for, are called by name: Apple's compiler knows neither pragmas nor omp.h.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

extern "C" {
void GOMP_parallel(void (*work)(void*), void* argument, unsigned threads, unsigned flags);
void GOMP_barrier();
int omp_get_thread_num();
int omp_get_num_threads();
int omp_in_parallel();
}

namespace gpt_faster {

struct Range {
  int64_t begin, end;
};

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t step) { return divide_up(n, step) * step; }

// Share number `thread` of 0 .. n - 1 in `threads` shares, whose lengths are multiples of `unit`.
inline Range share_of(int64_t n, int64_t unit, int thread, int threads) {
  const int64_t each = round_up(divide_up(n, threads), unit);
  return {std::min(n, thread * each), std::min(n, (thread + 1) * each)};
}

struct Threads {
  int count;

  // Every thread calls work(thread, threads). Inside another region that is one thread, the caller.
  template <class Work>
  void region(const Work& work) const {
    const auto call = [](void* work) { (*static_cast<Work*>(work))(omp_get_thread_num(), omp_get_num_threads()); };
    GOMP_parallel(call, const_cast<Work*>(&work), omp_in_parallel() ? 1 : count, 0);
  }

  // Calls work(share) for shares of 0 .. n - 1, one a thread. It uses fewer threads if shares would be below `grain`.
  template <class Work>
  void for_shares(int64_t n, int64_t grain, const Work& work) const {
    const int used = std::min<int64_t>(count, divide_up(n, grain));
    if (used <= 1 || omp_in_parallel()) {
      if (n > 0) work(Range{0, n});
      return;
    }
    region([&](int thread, int threads) {
      const Range share = share_of(n, 1, thread, std::min(used, threads));
      if (share.begin < share.end) work(share);
    });
  }

  // Calls work(own, i) for i = 0 .. n - 1: a thread that is free takes the next i. Each thread has its own result of
  // prepare().
  template <class Prepare, class Work>
  void for_each(int64_t n, const Prepare& prepare, const Work& work) const {
    std::atomic<int64_t> next = 0;
    region([&](int, int) {
      auto own = prepare();
      for (int64_t i; (i = next++) < n;) work(own, i);
    });
  }
};

// Waits until every thread of the region has come here.
inline void wait_for_all() { GOMP_barrier(); }

}  // namespace gpt_faster
