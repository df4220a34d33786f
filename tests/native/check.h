// A few lines instead of a test framework: the process ends at the first failure, naming it.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "isa.h"

#define CHECK(condition, ...)                                      \
  do {                                                             \
    if (!(condition)) {                                            \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);  \
      std::printf(__VA_ARGS__);                                    \
      std::printf("\n");                                           \
      std::exit(1);                                                \
    }                                                              \
  } while (false)

// Reproducible values in [-1, 1).
class Draw {
 public:
  explicit Draw(uint64_t seed) : state_(seed * 2654435761u + 1) {}
  uint32_t word() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state_ >> 33);
  }
  float value() { return static_cast<float>(word()) / 1073741824.0f - 1.0f; }
  std::vector<float> values(int64_t count) {
    std::vector<float> all(count);
    for (float& x : all) x = value();
    return all;
  }

 private:
  uint64_t state_;
};

// AVX512_BF16's and AMX's kernels in plain C++, for machines without them.
const vig::Kernels* kernels_emulated_avx512_bf16();
const vig::Kernels* kernels_emulated_amx();

// Every instruction set that this machine runs, and those that are emulated.
inline std::vector<const vig::Kernels*> all_kernels() {
  std::vector<const vig::Kernels*> found = {kernels_emulated_amx(), kernels_emulated_avx512_bf16()};
  for (const vig::Isa& isa : vig::isa_table()) {
    if (isa.why_not() == nullptr) found.push_back(isa.kernels());
  }
  return found;
}

void test_blur();
void test_heads();
void test_store();
void test_pool();
