#include "runtime/cores.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace haomiao {
namespace {

// CPUs permitted by one cgroup folder, or 0. v2: "max 100000" or "200000 100000"; v1: quota -1 means none.
double quota_of(const std::string& folder, bool v2) {
  double quota = 0, period = 0;
  if (v2) {
    std::ifstream file(folder + "/cpu.max");
    std::string first;
    if (!(file >> first >> period) || first == "max") return 0;
    std::istringstream(first) >> quota;
  } else {
    std::ifstream quota_file(folder + "/cpu.cfs_quota_us"), period_file(folder + "/cpu.cfs_period_us");
    if (!(quota_file >> quota) || !(period_file >> period)) return 0;
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

double lesser(double a, double b) { return a == 0 ? b : b == 0 ? a : std::min(a, b); }

// The least quota from `path` up to the root of the hierarchy mounted at `mount`.
double quota_along(const std::string& mount, std::string path, bool v2) {
  double least = 0;
  for (;;) {
    least = lesser(least, quota_of(mount + path, v2));
    const size_t slash = path.rfind('/');
    if (slash == std::string::npos || path.empty()) return least;
    path.resize(slash);
  }
}

// The first thread of a core's siblings ("0,8" or "0-1"), or the core itself if unknown.
int first_sibling(int core) {
  std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(core) + "/topology/thread_siblings_list");
  int first = core;
  return file >> first ? first : core;
}

}  // namespace

std::vector<int> allowed_cores() {
  std::vector<int> cores;
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    for (int core = 0; core < CPU_SETSIZE; ++core) {
      if (CPU_ISSET(core, &set)) cores.push_back(core);
    }
  }
#endif
  if (cores.empty()) {
    const int n = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    for (int core = 0; core < n; ++core) cores.push_back(core);
  }
  return cores;
}

double cpu_quota(const std::string& root) {
  std::ifstream file(root + "/proc/self/cgroup");
  double least = 0;
  for (std::string line; std::getline(file, line);) {  // "id:controllers:path"
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::string controllers(1, ',');
    controllers.append(line, first + 1, second - first - 1).push_back(',');
    const std::string path = line.substr(second + 1);
    if (controllers == ",,") {
      least = lesser(least, quota_along(root + "/sys/fs/cgroup", path, true));
    } else if (controllers.find(",cpu,") != std::string::npos) {
      least = lesser(least, quota_along(root + "/sys/fs/cgroup/cpu", path, false));
    }
  }
  return least;
}

std::vector<int> choose_cores(int threads) {
  const std::vector<int> allowed = allowed_cores();
  std::vector<int> cores, siblings;
  std::set<int> taken;
  for (const int core : allowed) (taken.insert(first_sibling(core)).second ? cores : siblings).push_back(core);
  if (threads <= 0) {
    const double quota = cpu_quota();
    threads = static_cast<int>(cores.size());
    if (quota > 0) threads = std::min(threads, std::max(1, static_cast<int>(std::floor(quota + 0.5))));
  }
  cores.insert(cores.end(), siblings.begin(), siblings.end());
  const size_t distinct = cores.size();
  for (size_t i = 0; cores.size() < static_cast<size_t>(threads); ++i) cores.push_back(cores[i % distinct]);
  cores.resize(static_cast<size_t>(threads));
  return cores;
}

bool pin_to(const std::vector<int>& cores) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int core : cores) {
    if (core >= 0 && core < CPU_SETSIZE) CPU_SET(core, &set);
  }
  return sched_setaffinity(0, sizeof(set), &set) == 0;
#else
  (void)cores;
  return false;
#endif
}

}  // namespace haomiao
