// The pool and its barrier: every thread runs every job once, phases do not overlap, more threads than cores progress,
// a forked child works, affinity is given back.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <thread>
#include <vector>

#include "check.h"
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
  const int64_t n = pool.threads();
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
  test_default_threads();
  test_busy_is_refused();
  test_affinity_is_given_back();
#if !defined(__SANITIZE_THREAD__)
  test_fork();
#endif
  test_quota();
  return haomiao_test::failures != 0;
}
