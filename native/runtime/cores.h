// Which cores a process may use: its affinity mask, its cgroup's CPU quota (v1 and v2), one thread per physical core.
#pragma once
#include <string>
#include <vector>

namespace haomiao {

// Cores of the calling thread's affinity mask, ascending; 0..n-1 where the system has no masks.
std::vector<int> allowed_cores();

// CPUs that the quota of this process's cgroup and of its ancestors permits; 0 if there is no quota. `root` is where
// the pseudo file systems are mounted ("" on a real system; tests use a folder of their own).
double cpu_quota(const std::string& root = "");

// Cores to pin threads to. `threads` 0: one per physical core that is allowed, as many as the quota permits, at least
// one. Otherwise exactly as many, taking cores again when there are not enough.
std::vector<int> choose_cores(int threads);

// Bind the calling thread to these cores; false where that is not possible.
bool pin_to(const std::vector<int>& cores);

}  // namespace haomiao
