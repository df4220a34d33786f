#include "interrupt.h"

namespace vig {
namespace {

// Asking takes Python's lock, which another thread may hold for 5 ms: calls of the usual length never ask.
constexpr std::chrono::milliseconds kPollEvery{150};

thread_local Call* current = nullptr;

}  // namespace

Interruptible::Interruptible(bool (*poll)())
    : call_{.poll = poll, .caller = &current, .next = std::chrono::steady_clock::now() + kPollEvery} {
  current = poll == nullptr ? nullptr : &call_;
}

Interruptible::~Interruptible() { current = nullptr; }

Call* current_call() { return current; }
void join_call(Call* call) { current = call; }

bool interrupted() {
  Call* const call = current;
  if (call == nullptr) return false;
  if (call->stopped.load(std::memory_order_relaxed)) return true;
  if (call->caller != &current) return false;
  const auto now = std::chrono::steady_clock::now();
  if (now < call->next) return false;
  const bool stop = call->poll();
  call->next = std::chrono::steady_clock::now() + kPollEvery;
  if (stop) call->stopped.store(true, std::memory_order_relaxed);
  return stop;
}

void throw_if_interrupted() {
  if (current != nullptr && current->stopped.load(std::memory_order_relaxed)) throw Interrupted{};
}

}  // namespace vig
