// A pool of pinned threads that run one function together, with a barrier for its phases.
//
// The caller is thread 0: it is pinned to the first core while a job runs and gets its own affinity back afterwards, so
// that a user's Python thread stays free between steps. Between jobs the workers spin for at most 50 microseconds and
// then sleep. With more threads than cores nobody spins.
//
// A pinned thread cannot leave a core that another program holds, and everybody waits for it. So when a barrier has
// been slept at for as long as a scheduler's slice, the next jobs run unpinned, and the system moves the thread to a
// core that its mates leave idle while they sleep. Fewer threads than there are may also be asked to work: those that
// are left out sleep and meet nobody. Knows nothing about plans, nor how many threads are best.
#pragma once
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "runtime/barrier.h"

namespace haomiao {

inline constexpr int kMostThreads = 1024;

class Pool {
 public:
  using Job = void (*)(void* context, int thread);

  // `threads` 0: as many as cores.h chooses. `pin` false leaves placement to the system.
  explicit Pool(int threads, bool pin = true);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(cores_.size()); }
  // Threads that work on the jobs to come, 1..threads(); anything else is moved there. Only between jobs.
  void set_active(int threads);
  int active() const { return active_; }
  // True if a thread was waited for so long lately that something else must have had its core.
  bool crowded() const { return loose_ > 0; }

  // job(context, t) for t in [0, active()), t = 0 on the calling thread; returns when all have returned. False, and
  // nothing is run, if another thread is inside run(). In a forked child the workers are started anew.
  bool run(Job job, void* context);

  // Inside a job: wait for all its threads. What they wrote before is visible to all after.
  void barrier() {
    if (barrier_.wait() >= kSliceNs) crowded_.store(true, std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t kSliceNs = 1'000'000;  // shorter waits are differences in the work
  static constexpr int kLooseJobs = 256;          // without a pin before it is tried again
  static constexpr int kCountBits = 11;           // kMostThreads fits

  void start_workers();
  void work(int thread);
  bool wait_for_call(int thread, uint32_t& seen);
  void call_workers();

  std::vector<int> cores_;
  const std::vector<int> allowed_;
  const bool pin_;
  const int64_t spin_ns_;
  Barrier barrier_;
  std::atomic<bool> busy_{false}, crowded_{false};
  int loose_ = 0;        // jobs to go without a pin
  bool pinned_ = false;  // whether this job's threads are
  int active_;
  int called_ = 0;  // threads that the last call asked for
  // number << kCountBits | threads that work on it; its change is the call to work. A job for the caller alone is none.
  alignas(64) std::atomic<uint32_t> call_{0};
  std::atomic<uint32_t> resumed_{0};  // its change is the call to those that were left out to look at `call_` again
  std::atomic<int> sleepers_{0};
  Job job_ = nullptr;
  void* context_ = nullptr;
  std::atomic<bool> stop_{false};
  int owner_;  // process that started the workers
  std::vector<std::thread> workers_;
};

}  // namespace haomiao
