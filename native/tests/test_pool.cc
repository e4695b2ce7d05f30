// The pool and its barrier: every thread runs every job once, phases do not overlap, more threads than cores progress,
// fewer threads than there are work, a forked child works, affinity is given back, threads let go of their cores where
// one is long waited for; every piece of a phase is claimed once.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <thread>
#include <vector>

#include "check.h"
#include "runtime/claims.h"
#include "runtime/cores.h"
#include "runtime/pool.h"

using haomiao::Pool;

namespace {

struct Sums {
  Pool* pool;
  int phases;
  std::vector<int64_t> cells;   // plain memory: a missing barrier is a race that ThreadSanitizer sees
  std::vector<int64_t> totals;  // [thread]
};

void add_up(void* context, int thread) {
  Sums& s = *static_cast<Sums*>(context);
  for (int phase = 0; phase < s.phases; ++phase) {
    s.cells[static_cast<size_t>(thread)] = phase + thread;
    s.pool->barrier();
    for (const int64_t cell : s.cells) s.totals[static_cast<size_t>(thread)] += cell;
    s.pool->barrier();
  }
}

void check_sums(Pool& pool, int phases) {
  const int64_t n = pool.active();
  Sums sums = {&pool, phases, std::vector<int64_t>(static_cast<size_t>(n)),
               std::vector<int64_t>(static_cast<size_t>(n))};
  CHECK(pool.run(add_up, &sums));
  const int64_t expected = n * (int64_t{phases} * (phases - 1) / 2) + phases * n * (n - 1) / 2;
  for (const int64_t total : sums.totals) CHECK(total == expected);
}

void test_phases() {
  for (const int threads : {1, 2, 3, 4, 9}) {
    Pool pool(threads);
    CHECK(pool.threads() == threads);
    for (int job = 0; job < 20; ++job) check_sums(pool, 10);
    usleep(2000);  // let the workers fall asleep
    check_sums(pool, 10);
  }
}

// Any number of threads after any other, workers awake or asleep.
void test_fewer_threads() {
  for (const int threads : {2, 3, 5}) {
    Pool pool(threads);
    pool.set_active(1);
    check_sums(pool, 3);
    for (int job = 0, active = 1; job < 200; ++job, active = (active * 7 + job) % threads + 1) {
      pool.set_active(active);
      CHECK(pool.active() == active);
      check_sums(pool, 3);
      if (job % 20 == 0) usleep(1000);
    }
    pool.set_active(0);
    CHECK(pool.active() == 1);
    pool.set_active(threads + 9);
    CHECK(pool.active() == threads);
    check_sums(pool, 3);
    pool.set_active(1);  // destroyed while the others are left out
    check_sums(pool, 3);
  }
}

void test_default_threads() {
  Pool pool(0);
  CHECK(pool.threads() >= 1 && pool.threads() <= static_cast<int>(haomiao::allowed_cores().size()));
  check_sums(pool, 3);
}

struct Nested {
  Pool* pool;
  bool inner;
};

void call_again(void* context, int thread) {
  Nested& nested = *static_cast<Nested*>(context);
  if (thread == 0) nested.inner = nested.pool->run(call_again, context);
}

void test_busy_is_refused() {
  Pool pool(2);
  Nested nested = {&pool, true};
  CHECK(pool.run(call_again, &nested));
  CHECK(!nested.inner);
  check_sums(pool, 2);
}

void test_affinity_is_given_back() {
  const std::vector<int> before = haomiao::allowed_cores();
  Pool pool(2);
  check_sums(pool, 5);
  CHECK(haomiao::allowed_cores() == before);
}

struct Late {
  Pool* pool;
  bool late;
  std::vector<size_t> cores;  // [thread] that it might run on
};

void come_late(void* context, int thread) {
  Late& job = *static_cast<Late*>(context);
  job.cores[static_cast<size_t>(thread)] = haomiao::allowed_cores().size();
  if (job.late && thread == 1) usleep(20000);
  job.pool->barrier();
}

void test_threads_let_go_of_their_cores() {
  const std::vector<int> before = haomiao::allowed_cores();
  if (before.size() < 2) return;
  Pool pool(2);
  Late job = {&pool, true, std::vector<size_t>(2)};
  CHECK(pool.run(come_late, &job));
  CHECK(job.cores[0] == 1 && job.cores[1] == 1);
  CHECK(pool.run(come_late, &job));
  CHECK(job.cores[0] == before.size() && job.cores[1] == before.size());
  job.late = false;
  bool pinned = false;  // again, later; a busy machine may be late by itself
  for (int i = 0; i < 10000 && !pinned; ++i) {
    CHECK(pool.run(come_late, &job));
    pinned = job.cores[0] == 1 && job.cores[1] == 1;
  }
  CHECK(pinned);
  CHECK(haomiao::allowed_cores() == before);
}

struct Pieces {
  static constexpr int kPhases = 40, kCount = 23;
  Pool* pool;
  haomiao::Claims claims;
  std::vector<int64_t> done;  // [phase][owner][piece] how often; plain memory, as above
};

// As the runner does: the next phase's list is opened while this one runs.
void claim_all(void* context, int thread) {
  Pieces& p = *static_cast<Pieces*>(context);
  const int threads = p.pool->threads();
  for (int phase = 0; phase < Pieces::kPhases; ++phase) {
    p.claims.open(static_cast<size_t>(phase) + 1, thread);
    for (int k = 0; k < threads; ++k) {
      const int owner = (thread + k) % threads;
      for (int i; (i = p.claims.take(static_cast<size_t>(phase), owner, Pieces::kCount, k > 0)) >= 0;) {
        ++p.done[static_cast<size_t>((phase * threads + owner) * Pieces::kCount + i)];
        if (thread == 0 && i % 7 == 0) usleep(1);
      }
    }
    p.pool->barrier();
  }
}

void test_pieces_are_claimed_once() {
  for (const int threads : {1, 2, 3, 5}) {
    Pool pool(threads);
    Pieces p = {&pool, haomiao::Claims(threads),
                std::vector<int64_t>(static_cast<size_t>(Pieces::kPhases * threads * Pieces::kCount))};
    CHECK(pool.run(claim_all, &p));
    for (const int64_t times : p.done) CHECK(times == 1);
  }
}

#if !defined(__SANITIZE_THREAD__)  // ThreadSanitizer does not follow threads that are started after a fork
void test_fork() {
  Pool pool(3);
  check_sums(pool, 5);
  const pid_t child = fork();
  if (child == 0) {
    check_sums(pool, 5);
    check_sums(pool, 5);
    _exit(haomiao_test::failures ? 1 : 0);
  }
  int status = 1;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
  check_sums(pool, 5);
}
#endif

void write_file(const std::string& path, const std::string& text) { std::ofstream(path) << text; }

void test_quota() {
  char name[] = "/tmp/haomiao_quota_XXXXXX";
  CHECK(mkdtemp(name) != nullptr);
  const std::string root = name;
  for (const char* folder : {"/proc", "/proc/self", "/sys", "/sys/fs", "/sys/fs/cgroup", "/sys/fs/cgroup/a",
                             "/sys/fs/cgroup/a/b", "/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu/c"}) {
    CHECK(std::system(("mkdir -p " + root + folder).c_str()) == 0);
  }
  CHECK(haomiao::cpu_quota(root) == 0);
  write_file(root + "/proc/self/cgroup", "0::/a/b\n");
  CHECK(haomiao::cpu_quota(root) == 0);
  write_file(root + "/sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
  write_file(root + "/sys/fs/cgroup/a/cpu.max", "150000 100000\n");
  CHECK(haomiao::cpu_quota(root) == 1.5);
  write_file(root + "/proc/self/cgroup", "4:cpu,cpuacct:/c\n1:name=systemd:/x\n");
  write_file(root + "/sys/fs/cgroup/cpu/c/cpu.cfs_quota_us", "-1\n");
  write_file(root + "/sys/fs/cgroup/cpu/c/cpu.cfs_period_us", "100000\n");
  CHECK(haomiao::cpu_quota(root) == 0);
  write_file(root + "/sys/fs/cgroup/cpu/c/cpu.cfs_quota_us", "400000\n");
  CHECK(haomiao::cpu_quota(root) == 4);
  CHECK(std::system(("rm -r " + root).c_str()) == 0);
}

}  // namespace

int main() {
  test_phases();
  test_fewer_threads();
  test_default_threads();
  test_busy_is_refused();
  test_affinity_is_given_back();
  test_threads_let_go_of_their_cores();
  test_pieces_are_claimed_once();
#if !defined(__SANITIZE_THREAD__)
  test_fork();
#endif
  test_quota();
  return haomiao_test::failures != 0;
}
