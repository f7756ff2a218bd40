#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

namespace wireframe {
namespace {

struct Job {
  const std::function<void(int64_t)>* body;
  int64_t chunks;
  std::atomic<int64_t> next{0};
  // Guarded by `mutex`.
  std::mutex mutex;
  std::condition_variable finished;
  int64_t done = 0;
  std::exception_ptr failure;

  void work() {
    int64_t mine = 0;
    for (int64_t chunk; (chunk = next.fetch_add(1)) < chunks; ++mine) {
      try {
        (*body)(chunk);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex);
        if (!failure) failure = std::current_exception();
      }
    }
    std::lock_guard<std::mutex> lock(mutex);
    done += mine;
    if (done == chunks) finished.notify_all();
  }
};

class Pool {
 public:
  void run(const std::shared_ptr<Job>& job, int helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (started_ < helpers && start_one()) {
      }
      // No more than there are to take them: the rest would wait for ever.
      waiting_.insert(waiting_.end(), size_t(std::min(helpers, started_)), job);
    }
    wake_.notify_all();
    job->work();
    std::unique_lock<std::mutex> lock(job->mutex);
    job->finished.wait(lock, [&] { return job->done == job->chunks; });
  }

 private:
  bool start_one() {
    try {
      std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      return false;  // No more threads to be had: the caller does the work.
    }
    ++started_;
    return true;
  }

  void serve() {
    for (;;) {
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return !waiting_.empty(); });
        job = std::move(waiting_.front());
        waiting_.pop_front();
      }
      job->work();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Job>> waiting_;
  int started_ = 0;
};

// Made when the module is loaded, never destroyed: helpers may still wait on it while the process ends.
Pool* pool = new Pool;

// The helpers, and whatever locks they held, stay behind in the parent.
void forget_pool() { pool = new Pool; }

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forget_pool);

}  // namespace

void parallel_for(int threads, int64_t chunks, const std::function<void(int64_t)>& body) {
  if (threads <= 1 || chunks <= 1) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk);
    return;
  }
  auto job = std::make_shared<Job>();
  job->body = &body;
  job->chunks = chunks;
  pool->run(job, int(std::min<int64_t>(std::min(threads, 256), chunks)) - 1);
  if (job->failure) std::rethrow_exception(job->failure);
}

}  // namespace wireframe
