// parallel_for(n, f): f(0) .. f(n-1) on all cores. Callers split work by size alone, never by the number of
// threads, and combine in index order, so results do not depend on it. f must not throw.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace bulwark {
class Pool {
 public:
  static Pool& get() {
    static Pool* p = new Pool;  // never destroyed: stream threads outlive static destructors
    return *p;
  }

  void run(size_t n, const std::function<void(size_t)>& f) {
    if (n == 0) return;
    size_t helpers = std::min<size_t>(std::max<size_t>(limit, 1), n) - 1;
    auto job = std::make_shared<Job>(f, n);
    if (helpers) {
      std::lock_guard<std::mutex> l(m_);
      while (workers_.size() < helpers) workers_.emplace_back([this] { work(); });
      for (size_t i = 0; i < helpers; i++) queue_.push_back(job);
      wake_.notify_all();
    }
    job->take();  // the caller works too: several streams may be here at once without waiting on each other
    std::unique_lock<std::mutex> l(job->m);
    job->cv.wait(l, [&] { return job->done == n; });
  }

  std::atomic<size_t> limit{threads_from_environment()};

 private:
  struct Job {
    Job(const std::function<void(size_t)>& f, size_t n) : f(f), n(n) {}
    void take() {
      size_t mine = 0;
      for (size_t i; (i = next++) < n; mine++) f(i);
      std::lock_guard<std::mutex> l(m);
      if ((done += mine) == n) cv.notify_all();
    }
    const std::function<void(size_t)> f;
    const size_t n;
    std::atomic<size_t> next{0};
    size_t done = 0;
    std::mutex m;
    std::condition_variable cv;
  };

  static size_t threads_from_environment() {
    const char* e = std::getenv("BULWARK_NUM_THREADS");
    int n = e ? std::atoi(e) : 0;
    return n > 0 ? n : std::max(1u, std::thread::hardware_concurrency());
  }

  void work() {
    for (;;) {
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> l(m_);
        wake_.wait(l, [&] { return !queue_.empty(); });
        job = std::move(queue_.front());
        queue_.pop_front();
      }
      job->take();
    }
  }

  std::mutex m_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Job>> queue_;
  std::vector<std::thread> workers_;
};

inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

inline void parallel_for(size_t n, const std::function<void(size_t)>& f) { Pool::get().run(n, f); }
}  // namespace bulwark
