// The C++ tests: every instruction set of this machine against double precision. Built with -DVIG_TESTS=ON, and with
// AddressSanitizer and UndefinedBehaviorSanitizer by -DVIG_SANITIZE=ON.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>

#include "check.h"
#include "pool.h"

void test_pool() {
  for (int threads : {1, 2, 5}) {
    for (int64_t count : {0, 1, 3, 1000}) {
      std::vector<std::atomic<int>> seen(count);
      vig::parallel_for(count, threads, [&](int64_t i, int worker) {
        CHECK(worker >= 0 && worker < threads, "worker %d of %d", worker, threads);
        ++seen[i];
      });
      for (const auto& times : seen) CHECK(times == 1, "an index ran %d times", times.load());
    }
  }
  const pid_t child = fork();  // the parent's threads do not exist in here
  if (child == 0) {
    std::atomic<int64_t> sum{0};
    vig::parallel_for(100, 3, [&](int64_t i, int) { sum += i; });
    _exit(sum == 4950 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the pool does not survive fork()");
}

int main() {
  test_pool();
  test_blur();
  test_store();
  test_heads();
  std::printf("native tests passed on:");
  for (const vig::Kernels* kernels : all_kernels()) std::printf(" %s", kernels->name);
  std::printf("\n");
}
