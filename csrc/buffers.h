// Large memory that outlives a call. Where memory is touched for the first time, the system clears it page by page (and
// in a virtual machine may have to ask the host for it), which can cost as much as a pass of the work itself.
#pragma once
#include <cstdint>
#include <memory>

namespace vig {

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Kept for later calls once given back, oldest dropped first, up to so many bytes in the whole process:
constexpr int64_t kKeptBytes = 192 << 20;               // what calls work in
constexpr int64_t kKeptOutputBytes = int64_t{2} << 30;  // what callers were given; the system may take it meanwhile

struct GiveBack {
  int64_t floats = 0;
  bool output = false;
  void operator()(float* data) const;
};
using Buffer = std::unique_ptr<float[], GiveBack>;

// Floats that are left as they come, aligned to a cache line.
Buffer make_buffer(int64_t floats);
// The same for results that the caller holds as long as it likes.
Buffer make_output(int64_t floats);

}  // namespace vig
