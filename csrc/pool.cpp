#include "pool.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "interrupt.h"

namespace vig {
namespace {

// The next task of a call mostly comes within microseconds, far sooner than a sleeping thread is woken.
constexpr int kSpins = 500;
constexpr std::chrono::milliseconds kLookEvery{50};  // whether the call was interrupted, while workers end
// A sleep without an end is GLIBCXX_3.4.30 when GCC 12 builds it, and RHEL 9 has 3.4.29; one with an end is in headers.
constexpr std::chrono::hours kSleep{1};

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

template <class Ready>
bool spin_until(Ready ready) {
  for (int i = 0; i < kSpins; ++i) {
    if (ready()) return true;
    relax();
  }
  return false;
}

// A call waits for the workers that have joined it, not for one that the system has yet to wake: other pools' threads
// may spin on its core.
class Pool {
 public:
  void run(int64_t count, int threads, const std::function<void(int64_t, int)>& task) {
    while (static_cast<int>(workers_.size()) < threads - 1 && start_worker()) {
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      count_ = count;
      call_ = current_call();
      next_.store(0, std::memory_order_relaxed);
      invited_ = threads - 1;
      generation_.fetch_add(1, std::memory_order_release);
    }
    start_.notify_all();
    work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    invited_ = 0;  // nothing is left to take
    if (joined_.load(std::memory_order_acquire) == 0) return;
    const auto done = [this] { return joined_.load(std::memory_order_acquire) == 0; };
    lock.unlock();
    if (spin_until(done)) return;
    lock.lock();
    while (!done_.wait_for(lock, kLookEvery, done)) {
      lock.unlock();
      interrupted();  // one that is stops the workers
      lock.lock();
    }
  }

 private:
  // False where the system refuses (limits on processes or address space): the next call tries again.
  bool start_worker() {
    const int id = static_cast<int>(workers_.size()) + 1;
    try {
      workers_.emplace_back([this, id, seen = generation_.load()] { wait_and_work(id, seen); });
    } catch (const std::system_error&) {
      return false;
    } catch (const std::bad_alloc&) {
      return false;
    }
    workers_.back().detach();  // lives as long as the process: nothing to join at exit
    return true;
  }

  void work(int worker) {
    while (!interrupted()) {
      const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= count_) return;
      (*task_)(index, worker);
    }
  }

  void wait_and_work(int id, uint64_t seen) {
    for (;;) {
      const auto called = [&] { return generation_.load(std::memory_order_acquire) != seen; };
      spin_until(called);
      {
        std::unique_lock<std::mutex> lock(mutex_);  // the call's other fields are read under it
        while (!start_.wait_for(lock, kSleep, called)) {
        }
        seen = generation_.load(std::memory_order_relaxed);
        if (id > invited_) continue;
        join_call(call_);
        joined_.fetch_add(1, std::memory_order_relaxed);
      }
      work(id);
      if (joined_.fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
      std::lock_guard<std::mutex> lock(mutex_);  // or the caller could miss it between its look and its sleep
      done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable start_, done_;
  const std::function<void(int64_t, int)>* task_ = nullptr;
  Call* call_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  int invited_ = 0;             // workers that may join, by number; 0 between calls
  std::atomic<int> joined_{0};  // workers at work
  std::atomic<uint64_t> generation_{0};
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
      return throw_if_interrupted();
    }
  }
  for (int64_t index = 0; index < count && !interrupted(); ++index) task(index, 0);
  throw_if_interrupted();
}

}  // namespace vig
