// Pieces of a phase's work, taken by whoever is free: every thread has a list of its own, works it off from the front,
// and then helps others from the back of theirs. So a thread that lost its core for a while, or whose core is slower,
// is waited for no longer than one piece takes. Knows the number of pieces, not what they are.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace haomiao {

class Claims {
 public:
  explicit Claims(int threads) : threads_(threads), lists_(new List[2 * static_cast<size_t>(threads)]) {}

  // Nothing of this thread's list is taken. For the phase after the one that is running: its lists were last used by
  // the phase before that one, which everybody has left.
  void open(size_t phase, int thread) { list(phase, thread).store(0, std::memory_order_relaxed); }

  // A piece of `owner`'s list of `count`, from the front or the back; -1 if all are taken. Pieces may be worked on in
  // any order: what they read was written before the last barrier.
  int take(size_t phase, int owner, int count, bool back) {
    std::atomic<uint64_t>& taken = list(phase, owner);
    uint64_t seen = taken.load(std::memory_order_relaxed);
    for (;;) {
      const int front = static_cast<int>(seen & 0xffffffffu), rear = static_cast<int>(seen >> 32);
      if (front + rear >= count) return -1;
      const uint64_t next = seen + (back ? uint64_t{1} << 32 : 1);
      if (taken.compare_exchange_weak(seen, next, std::memory_order_relaxed)) return back ? count - 1 - rear : front;
    }
  }

 private:
  struct alignas(64) List {
    std::atomic<uint64_t> taken{0};  // from the back << 32 | from the front
  };
  std::atomic<uint64_t>& list(size_t phase, int thread) {
    return lists_[phase % 2 * static_cast<size_t>(threads_) + static_cast<size_t>(thread)].taken;
  }

  const int threads_;
  std::unique_ptr<List[]> lists_;
};

}  // namespace haomiao
