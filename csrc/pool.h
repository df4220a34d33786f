// A small pool of threads that sleep while they wait, and survive fork().
#pragma once
#include <cstdint>
#include <functional>

namespace vig {

// Runs task(index, worker) for every index in [0, count) on up to `threads` threads (the caller is one of them), in no
// fixed order: results must not depend on which worker runs what. `worker` is in [0, threads). Tasks must not throw.
// A call made while another thread of the process uses the pool runs on the caller alone, and one made while the system
// has no more threads to give on those that there are. Throws Interrupted where a task was (interrupt.h).
void parallel_for(int64_t count, int threads, const std::function<void(int64_t index, int worker)>& task);

}  // namespace vig
