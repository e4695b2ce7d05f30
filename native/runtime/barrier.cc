#include "runtime/barrier.h"

#include <chrono>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace haomiao {
namespace {

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

constexpr int kPausesPerLook = 64;  // the clock is read once per so many pauses

}  // namespace

#if defined(__linux__)
void futex_wait(std::atomic<uint32_t>& word, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}
void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}
#else
void futex_wait(std::atomic<uint32_t>& word, uint32_t seen) { word.wait(seen); }
void futex_wake_all(std::atomic<uint32_t>& word) { word.notify_all(); }
#endif

bool spin_until_changed(const std::atomic<uint32_t>& word, uint32_t seen, int64_t spin_ns) {
  using Clock = std::chrono::steady_clock;
  if (word.load(std::memory_order_acquire) != seen) return true;
  if (spin_ns <= 0) return false;
  const auto end = Clock::now() + std::chrono::nanoseconds(spin_ns);
  do {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (word.load(std::memory_order_acquire) != seen) return true;
      pause_briefly();
    }
  } while (Clock::now() < end);
  return false;
}

int64_t Barrier::wait() {
  const int threads = threads_;  // before the others can leave, and expect another number
  const uint32_t seen = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
    arrived_.store(0, std::memory_order_relaxed);
    // Sequentially consistent with the sleeper's announcement: either it sees the new generation or we see it sleep.
    generation_.store(seen + 1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) futex_wake_all(generation_);
    return 0;
  }
  if (spin_until_changed(generation_, seen, spin_ns_)) return 0;
  using Clock = std::chrono::steady_clock;
  const auto began = Clock::now();
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (generation_.load(std::memory_order_seq_cst) == seen) futex_wait(generation_, seen);
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - began).count();
}

void Barrier::reset() {
  arrived_.store(0, std::memory_order_relaxed);
  sleepers_.store(0, std::memory_order_relaxed);
}

}  // namespace haomiao
