#include "runtime/pool.h"

#include <unistd.h>

#include <algorithm>
#include <set>

#include "runtime/cores.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace haomiao {
namespace {

constexpr int64_t kSpinNs = 50'000;

// Spinning helps only while every thread has a core of its own.
int64_t spin_for(const std::vector<int>& cores) {
  const std::set<int> distinct(cores.begin(), cores.end());
  return distinct.size() == cores.size() ? kSpinNs : 0;
}

// Pins the calling thread for as long as it lives, then gives back what was.
class PinnedScope {
 public:
  PinnedScope(bool pin, int core) {
#if defined(__linux__)
    if (!pin || sched_getaffinity(0, sizeof(before_), &before_) != 0) return;
    changed_ = !(CPU_COUNT(&before_) == 1 && CPU_ISSET(core, &before_)) && pin_to({core});
#else
    (void)pin, (void)core;
#endif
  }
  ~PinnedScope() {
#if defined(__linux__)
    if (changed_) sched_setaffinity(0, sizeof(before_), &before_);
#endif
  }
  PinnedScope(const PinnedScope&) = delete;
  PinnedScope& operator=(const PinnedScope&) = delete;

 private:
#if defined(__linux__)
  cpu_set_t before_;
  bool changed_ = false;
#endif
};

}  // namespace

Pool::Pool(int threads, bool pin)
    : cores_(choose_cores(std::min(threads, kMostThreads))),
      allowed_(allowed_cores()),
      pin_(pin),
      spin_ns_(spin_for(cores_)),
      barrier_(static_cast<int>(cores_.size()), spin_ns_),
      active_(static_cast<int>(cores_.size())),
      owner_(getpid()) {
  start_workers();
}

Pool::~Pool() {
  if (owner_ != getpid()) {  // a forked child: these threads live in the parent only
    for (std::thread& worker : workers_) new std::thread(std::move(worker));  // never joined, never destroyed
    return;
  }
  stop_ = true;
  call_.fetch_add(1u << kCountBits, std::memory_order_seq_cst);
  resumed_.fetch_add(1, std::memory_order_seq_cst);
  futex_wake_all(call_);
  futex_wake_all(resumed_);
  for (std::thread& worker : workers_) worker.join();
}

void Pool::start_workers() {
  const int n = threads();
  workers_.reserve(static_cast<size_t>(n));
  for (int t = 1; t < n; ++t) workers_.emplace_back(&Pool::work, this, t);
}

void Pool::work(int thread) {
  bool pinned = false;
  uint32_t seen = 0;
  for (;;) {
    if (!wait_for_call(thread, seen)) return;
    if (pinned != pinned_) {
      pinned = pinned_;
      pinned ? pin_to({cores_[static_cast<size_t>(thread)]}) : pin_to(allowed_);
    }
    job_(context_, thread);
    barrier();
  }
}

// False if there will be no more.
bool Pool::wait_for_call(int thread, uint32_t& seen) {
  constexpr uint32_t kCount = (1u << kCountBits) - 1;
  const auto included = [&] {
    return static_cast<int>((seen = call_.load(std::memory_order_seq_cst)) & kCount) > thread;
  };
  if (!spin_until_changed(call_, seen, spin_ns_)) {
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    while (call_.load(std::memory_order_seq_cst) == seen) futex_wait(call_, seen);
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
  }
  // A job that includes this thread waits for it, so the present call is the one to follow, however many passed by.
  while (!included() && !stop_) {
    const uint32_t resumed = resumed_.load(std::memory_order_seq_cst);
    if (included() || stop_) break;  // after `resumed` was read: it changes after the call
    futex_wait(resumed_, resumed);
  }
  return !stop_;
}

void Pool::call_workers() {
  const uint32_t number = (call_.load(std::memory_order_relaxed) >> kCountBits) + 1;
  call_.store(number << kCountBits | static_cast<uint32_t>(active_), std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) futex_wake_all(call_);
  if (active_ > called_ && called_ > 0) {
    resumed_.fetch_add(1, std::memory_order_seq_cst);
    futex_wake_all(resumed_);
  }
  called_ = active_;
}

void Pool::set_active(int threads) { active_ = std::clamp(threads, 1, this->threads()); }

bool Pool::run(Job job, void* context) {
  if (owner_ != getpid()) {
    for (std::thread& worker : workers_) new std::thread(std::move(worker));
    workers_.clear();
    barrier_.reset();
    sleepers_.store(0);
    call_.store(0);
    called_ = 0;
    busy_.store(false);
    owner_ = getpid();
    start_workers();
  }
  if (busy_.exchange(true, std::memory_order_acquire)) return false;
  {
    pinned_ = pin_ && active_ > 1 && loose_ == 0;
    crowded_.store(false, std::memory_order_relaxed);
    const PinnedScope pinned(pinned_, cores_[0]);
    job_ = job, context_ = context;
    barrier_.expect(active_);
    if (active_ > 1) call_workers();
    job(context, 0);
    barrier();
  }
  loose_ = crowded_.load(std::memory_order_relaxed) ? kLooseJobs : std::max(0, loose_ - 1);
  busy_.store(false, std::memory_order_release);
  return true;
}

}  // namespace haomiao
