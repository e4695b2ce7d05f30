// A sense-reversing barrier for a number of threads that changes only while nobody waits: spin with pause, then sleep
// on a futex.
// Knows nothing about what the threads do between two waits.
#pragma once
#include <atomic>
#include <cstdint>

namespace haomiao {

// Sleep while `word` holds `seen`, and wake everyone who sleeps on it. Spurious returns are allowed.
void futex_wait(std::atomic<uint32_t>& word, uint32_t seen);
void futex_wake_all(std::atomic<uint32_t>& word);

// Spin until `word` differs from `seen`, for at most `spin_ns`; true if it does.
bool spin_until_changed(const std::atomic<uint32_t>& word, uint32_t seen, int64_t spin_ns);

class Barrier {
 public:
  Barrier(int threads, int64_t spin_ns) : threads_(threads), spin_ns_(spin_ns) {}

  // Returns when all threads have called it; what they wrote before is visible to all after. Nanoseconds for which this
  // thread slept, 0 if spinning was enough.
  int64_t wait();
  // Forget threads that no longer exist (a forked child). Only while nobody waits.
  void reset();
  // So many threads take part from now on. Only while nobody waits; whoever comes must have been told so since.
  void expect(int threads) { threads_ = threads; }

 private:
  int threads_;
  const int64_t spin_ns_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};  // the sense: its change lets everyone go
  std::atomic<int> sleepers_{0};
};

}  // namespace haomiao
