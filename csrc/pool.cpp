#include "pool.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace vig {
namespace {

class Pool {
 public:
  void run(int64_t count, int threads, const std::function<void(int64_t, int)>& task) {
    while (static_cast<int>(workers_.size()) < threads - 1) {
      const int id = static_cast<int>(workers_.size()) + 1;
      workers_.emplace_back([this, id, seen = generation_] { wait_and_work(id, seen); });
      workers_.back().detach();  // lives as long as the process: nothing to join at exit
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      invited_ = threads - 1;
      busy_ = threads - 1;
      ++generation_;
    }
    start_.notify_all();
    work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void work(int worker) {
    for (;;) {
      const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= count_) return;
      (*task_)(index, worker);
    }
  }

  void wait_and_work(int id, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (id > invited_) continue;
      lock.unlock();
      work(id);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable start_, done_;
  const std::function<void(int64_t, int)>* task_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  int invited_ = 0, busy_ = 0;
  uint64_t generation_ = 0;
};

// Both are leaked on purpose: threads may still sleep in them at exit, and a forked child must not touch its parent's.
struct Owner {
  pid_t pid;
  Pool pool;
  std::atomic<bool> in_use{false};
};
std::atomic<Owner*> owner{nullptr};

Owner& owner_of_this_process() {
  Owner* known = owner.load(std::memory_order_acquire);
  const pid_t pid = getpid();
  if (known != nullptr && known->pid == pid) return *known;
  Owner* fresh = new Owner{};
  fresh->pid = pid;
  if (owner.compare_exchange_strong(known, fresh, std::memory_order_acq_rel)) return *fresh;
  delete fresh;  // another thread of this process was first
  return *known;
}

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t, int)>& task) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads > 1) {
    Owner& mine = owner_of_this_process();
    if (!mine.in_use.exchange(true, std::memory_order_acquire)) {
      mine.pool.run(count, threads, task);
      mine.in_use.store(false, std::memory_order_release);
      return;
    }
  }
  for (int64_t index = 0; index < count; ++index) task(index, 0);
}

}  // namespace vig
