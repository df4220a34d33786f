#include "buffers.h"

#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <mutex>
#include <new>

namespace vig {
namespace {

constexpr int64_t kKeptFloats = 16 << 10;   // smaller buffers are left to the allocator
constexpr std::align_val_t kCacheLine{64};  // vectors that straddle two lines are read twice

// madvise() on the whole pages within; a wish: failure is harmless.
void advise(void* data, int64_t bytes, uintptr_t page, int advice) {
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
}

// Fresh memory is otherwise faulted in 4 KiB at a time.
void prefer_large_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  advise(data, bytes, 2 << 20, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

// The contents are no longer wanted; until the pages are written again the system may take them when it is short.
void let_go(void* data, int64_t bytes) {
#if defined(MADV_FREE)
  advise(data, bytes, 64 << 10, MADV_FREE);  // whole pages of any size
#else
  (void)data;
  (void)bytes;
#endif
}

void free_floats(float* data) { ::operator delete(data, kCacheLine); }

// Buffers given back, oldest first. Whoever finds it taken goes to the allocator instead: nothing waits, and a child
// forked while another thread held it is not stuck.
class KeptBuffers {
 public:
  explicit KeptBuffers(int64_t most) : most_(most) {}

  // A buffer of at least `floats` that wastes little, or null; then older ones make room for a new one of that size.
  float* take(int64_t& floats) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    for (size_t i = kept_.size(); i-- > 0;) {  // the latest is the likeliest to be there still
      const Kept found = kept_[i];
      if (found.floats < floats || found.floats > floats + floats / 4) continue;
      kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(i));
      floats = found.floats;
      return found.data;
    }
    make_room(floats);
    return nullptr;
  }

  bool keep(float* data, int64_t floats) {
    if (floats * 4 > most_) return false;
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return false;
    make_room(floats);
    kept_.push_back({data, floats});
    return true;
  }

 private:
  struct Kept {
    float* data;
    int64_t floats;
  };

  void make_room(int64_t floats) {
    int64_t held = floats;
    for (const Kept& kept : kept_) held += kept.floats;
    while (!kept_.empty() && held * 4 > most_) {
      held -= kept_.front().floats;
      free_floats(kept_.front().data);
      kept_.pop_front();
    }
  }

  const int64_t most_;
  std::mutex mutex_;
  std::deque<Kept> kept_;
};

KeptBuffers& kept_buffers(bool output) {  // leaked on purpose: threads may still work at exit
  static KeptBuffers* const work = new KeptBuffers(kKeptBytes);
  static KeptBuffers* const outputs = new KeptBuffers(kKeptOutputBytes);
  return output ? *outputs : *work;
}

Buffer make(int64_t floats, bool output) {
  floats = std::max<int64_t>(floats, 1);
  float* data = floats < kKeptFloats ? nullptr : kept_buffers(output).take(floats);
  if (data == nullptr) {
    data = static_cast<float*>(::operator new(static_cast<size_t>(floats) * 4, kCacheLine));
    prefer_large_pages(data, floats * 4);
  }
  return Buffer(data, GiveBack{floats, output});
}

}  // namespace

void GiveBack::operator()(float* data) const {
  if (output) let_go(data, floats * 4);  // before anybody can take it again
  if (floats < kKeptFloats || !kept_buffers(output).keep(data, floats)) free_floats(data);
}

Buffer make_buffer(int64_t floats) { return make(floats, false); }
Buffer make_output(int64_t floats) { return make(floats, true); }

}  // namespace vig
