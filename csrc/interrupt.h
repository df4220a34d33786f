// Ctrl-C in a long call. Whoever may be interrupted makes an Interruptible around its work; work that takes long asks
// interrupted() every few milliseconds and leaves off when told to. What it has made by then is not looked at.
#pragma once
#include <atomic>
#include <chrono>

namespace vig {

// A call that may be interrupted, shared by the threads that work on it.
struct Call {
  bool (*poll)();  // true: stop; asked by the calling thread alone, every kPollEvery
  const void* caller;
  std::chrono::steady_clock::time_point next;
  std::atomic<bool> stopped{false};
};

class Interruptible {
 public:
  explicit Interruptible(bool (*poll)());  // null: this call is not
  ~Interruptible();
  Interruptible(const Interruptible&) = delete;
  Interruptible& operator=(const Interruptible&) = delete;

 private:
  Call call_;
};

struct Interrupted {};  // thrown by parallel_for in the calling thread, once no thread works any more

Call* current_call();       // of this thread, or null
void join_call(Call* call); // what a worker works on
bool interrupted();         // a look at the clock
void throw_if_interrupted();

}  // namespace vig
