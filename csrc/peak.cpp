#include "peak.h"

#include <chrono>
#include <vector>

#include "pool.h"

namespace vig {

double measure_peak(const Kernels& kernels, bool pairs, int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto elapsed = [](Clock::time_point from) { return std::chrono::duration<double>(Clock::now() - from).count(); };
  constexpr int64_t kSteps = 1 << 14;
  kernels.peak(pairs, kSteps);  // wakes the wide units up
  const auto trial = Clock::now();
  kernels.peak(pairs, kSteps);
  const int64_t rounds = 1 + static_cast<int64_t>(seconds / (elapsed(trial) + 1e-9));
  std::vector<double> done(threads, 0.0);
  const auto start = Clock::now();
  parallel_for(threads, threads, [&](int64_t task, int) {
    for (int64_t i = 0; i < rounds; ++i) done[task] += kernels.peak(pairs, kSteps);
  });
  double total = 0;
  for (double operations : done) total += operations;
  return total / elapsed(start);
}

}  // namespace vig
