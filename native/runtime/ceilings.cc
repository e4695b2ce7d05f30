// The machine's ceilings, measured. Threads are pinned to the allowed cores, one each, or the scheduler may run two of
// them on one core while another idles.
#include "runtime/ceilings.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#include "kernels/cpu.h"

#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
#endif

namespace haomiao {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

void pin_to_allowed_core([[maybe_unused]] int index) {
#if defined(__linux__)
  cpu_set_t allowed, one;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
  index %= CPU_COUNT(&allowed);
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (!CPU_ISSET(core, &allowed) || index-- != 0) continue;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    sched_setaffinity(0, sizeof(one), &one);
    return;
  }
#endif
}

// Run `pass(thread)` on all threads at once, pass after pass for about `limit` seconds; the time of the fastest pass.
double fastest_pass(int threads, double limit, const std::function<void(int)>& pass) {
  std::atomic<int> round{0}, done{0};
  std::atomic<bool> stop{false};
  std::vector<std::thread> helpers;
  for (int id = 0; id < threads; ++id) {
    helpers.emplace_back([&, id] {
      pin_to_allowed_core(id);
      for (int seen = 0;;) {
        round.wait(seen);
        seen = round.load();
        if (stop.load()) return;
        pass(id);
        done.fetch_add(1);
        done.notify_one();
      }
    });
  }
  double best = 0;
  const Clock::time_point begin = Clock::now();
  for (int n = 0; n < 3 || seconds_since(begin) < limit; ++n) {
    done.store(0);
    const Clock::time_point start = Clock::now();
    round.fetch_add(1);
    round.notify_all();
    for (int seen = done.load(); seen < threads; seen = done.load()) done.wait(seen);
    const double elapsed = seconds_since(start);
    if (n > 0 && (best == 0 || elapsed < best)) best = elapsed;  // the first pass warms up
  }
  stop.store(true);
  round.fetch_add(1);
  round.notify_all();
  for (std::thread& helper : helpers) helper.join();
  return best;
}

std::atomic<uint64_t> sink;

// Eight independent registers: the loads never wait for the additions.
void read_all(const uint8_t* begin, size_t bytes) {
  typedef uint64_t Lane __attribute__((vector_size(16)));
  Lane sum[8] = {};
  for (size_t i = 0; i + 128 <= bytes; i += 128) {
    for (int k = 0; k < 8; ++k) {
      Lane lane;
      memcpy(&lane, begin + i + k * 16, 16);
      sum[k] |= lane;
    }
  }
  uint64_t total = 0;
  for (const Lane& lane : sum) total |= lane[0] | lane[1];
  sink.fetch_or(total);
}

// ---- registers only: 16 chains, more than latency times throughput of any dot product we know
// ------------------------

#ifdef HAOMIAO_EMULATE_AVX512
constexpr bool kHasRegisters512 = false;  // the kernels are emulated, the processor is not
#else
constexpr bool kHasRegisters512 = true;
#endif

constexpr int kChains = 16;
constexpr int64_t kRounds = 200000;

struct DotProduct {
  void (*run)();   // kRounds times kChains instructions
  int operations;  // multiplications and additions of one
};

#if defined(__x86_64__)

void run_avx512() {
  for (int64_t i = 0; i < kRounds; ++i) {
#define HAOMIAO_DOT(n) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #n "\n\t"
    __asm__ volatile(HAOMIAO_DOT(16) HAOMIAO_DOT(17) HAOMIAO_DOT(18) HAOMIAO_DOT(19) HAOMIAO_DOT(20) HAOMIAO_DOT(21)
                         HAOMIAO_DOT(22) HAOMIAO_DOT(23) HAOMIAO_DOT(0) HAOMIAO_DOT(1) HAOMIAO_DOT(2) HAOMIAO_DOT(3)
                             HAOMIAO_DOT(4) HAOMIAO_DOT(5) HAOMIAO_DOT(6) HAOMIAO_DOT(7)
                     :
                     :
                     : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7");
#undef HAOMIAO_DOT
  }
  __asm__ volatile("vzeroupper");
}

// AVX2 has no dot product of bytes; a multiply-add of bytes and an addition of words stand for it.
void run_avx2() {
  for (int64_t i = 0; i < kRounds; ++i) {
#define HAOMIAO_DOT(t, n) "vpmaddubsw %%ymm15, %%ymm14, %%ymm" #t "\n\tvpaddw %%ymm" #t ", %%ymm" #n ", %%ymm" #n "\n\t"
    __asm__ volatile(HAOMIAO_DOT(8, 0) HAOMIAO_DOT(9, 1) HAOMIAO_DOT(10, 2) HAOMIAO_DOT(11, 3) HAOMIAO_DOT(12, 4)
                         HAOMIAO_DOT(13, 5) HAOMIAO_DOT(8, 6) HAOMIAO_DOT(9, 7) HAOMIAO_DOT(10, 0) HAOMIAO_DOT(11, 1)
                             HAOMIAO_DOT(12, 2) HAOMIAO_DOT(13, 3) HAOMIAO_DOT(8, 4) HAOMIAO_DOT(9, 5)
                                 HAOMIAO_DOT(10, 6) HAOMIAO_DOT(11, 7)
                     :
                     :
                     : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                       "xmm12", "xmm13");
#undef HAOMIAO_DOT
  }
  __asm__ volatile("vzeroupper");
}

// Fused multiply-adds of f32: more chains than latency (4) times throughput (2).

void run_avx512_f32() {
  for (int64_t i = 0; i < kRounds; ++i) {
#define HAOMIAO_FMA(n) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" #n "\n\t"
    __asm__ volatile(HAOMIAO_FMA(16) HAOMIAO_FMA(17) HAOMIAO_FMA(18) HAOMIAO_FMA(19) HAOMIAO_FMA(20) HAOMIAO_FMA(21)
                         HAOMIAO_FMA(22) HAOMIAO_FMA(23) HAOMIAO_FMA(0) HAOMIAO_FMA(1) HAOMIAO_FMA(2) HAOMIAO_FMA(3)
                             HAOMIAO_FMA(4) HAOMIAO_FMA(5) HAOMIAO_FMA(6) HAOMIAO_FMA(7)
                     :
                     :
                     : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7");
#undef HAOMIAO_FMA
  }
  __asm__ volatile("vzeroupper");
}

void run_avx2_f32() {
  for (int64_t i = 0; i < kRounds; ++i) {
#define HAOMIAO_FMA(n) "vfmadd231ps %%ymm15, %%ymm14, %%ymm" #n "\n\t"
    __asm__ volatile(HAOMIAO_FMA(0) HAOMIAO_FMA(1) HAOMIAO_FMA(2) HAOMIAO_FMA(3) HAOMIAO_FMA(4) HAOMIAO_FMA(5)
                         HAOMIAO_FMA(6) HAOMIAO_FMA(7) HAOMIAO_FMA(8) HAOMIAO_FMA(9) HAOMIAO_FMA(10) HAOMIAO_FMA(11)
                             HAOMIAO_FMA(12) HAOMIAO_FMA(0) HAOMIAO_FMA(1) HAOMIAO_FMA(2)
                     :
                     :
                     : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                       "xmm12");
#undef HAOMIAO_FMA
  }
  __asm__ volatile("vzeroupper");
}

#elif defined(__aarch64__)

#if defined(__linux__)
#define HAOMIAO_ARCH ".arch armv8.2-a+dotprod\n\t"  // this file is compiled for the plain architecture
#else
#define HAOMIAO_ARCH
#endif

void run_neon() {
  for (int64_t i = 0; i < kRounds; ++i) {
#define HAOMIAO_DOT(n) "sdot v" #n ".4s, v30.16b, v31.16b\n\t"
    __asm__ volatile(HAOMIAO_ARCH HAOMIAO_DOT(0) HAOMIAO_DOT(1) HAOMIAO_DOT(2) HAOMIAO_DOT(3) HAOMIAO_DOT(4)
                         HAOMIAO_DOT(5) HAOMIAO_DOT(6) HAOMIAO_DOT(7) HAOMIAO_DOT(16) HAOMIAO_DOT(17) HAOMIAO_DOT(18)
                             HAOMIAO_DOT(19) HAOMIAO_DOT(20) HAOMIAO_DOT(21) HAOMIAO_DOT(22) HAOMIAO_DOT(23)
                     :
                     :
                     : "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v16", "v17", "v18", "v19", "v20", "v21", "v22",
                       "v23");
#undef HAOMIAO_DOT
  }
}

void run_neon_f32() {
  for (int64_t i = 0; i < kRounds; ++i) {
#define HAOMIAO_FMA(n) "fmla v" #n ".4s, v30.4s, v31.4s\n\t"
    __asm__ volatile(HAOMIAO_FMA(0) HAOMIAO_FMA(1) HAOMIAO_FMA(2) HAOMIAO_FMA(3) HAOMIAO_FMA(4) HAOMIAO_FMA(5)
                         HAOMIAO_FMA(6) HAOMIAO_FMA(7) HAOMIAO_FMA(16) HAOMIAO_FMA(17) HAOMIAO_FMA(18) HAOMIAO_FMA(19)
                             HAOMIAO_FMA(20) HAOMIAO_FMA(21) HAOMIAO_FMA(22) HAOMIAO_FMA(23)
                     :
                     :
                     : "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v16", "v17", "v18", "v19", "v20", "v21", "v22",
                       "v23");
#undef HAOMIAO_FMA
  }
}

#endif

void run_scalar() {
  uint32_t sum[kChains] = {}, x = 3, y = 5;
  for (int64_t i = 0; i < kRounds; ++i) {
    __asm__ volatile("" : "+r"(x), "+r"(y));
    for (int k = 0; k < kChains; ++k) sum[k] += x * y;
  }
  for (uint32_t s : sum) sink.fetch_or(s);
}

void run_scalar_f32() {
  float sum[kChains] = {}, x = 3, y = 5;
  for (int64_t i = 0; i < kRounds; ++i) {
    __asm__ volatile("" : "+g"(x), "+g"(y));
    for (int k = 0; k < kChains; ++k) sum[k] += x * y;
  }
  for (float total : sum) sink.fetch_or(total != 0);
}

DotProduct best_f32_product() {
#if defined(__x86_64__)
  if (kHasRegisters512 && cpu_supports("avx512")) return {run_avx512_f32, 32};
  if (cpu_supports("avx2")) return {run_avx2_f32, 16};
#elif defined(__aarch64__)
  if (cpu_supports("neon")) return {run_neon_f32, 8};
#endif
  return {run_scalar_f32, 2};
}

DotProduct best_dot_product() {
#if defined(__x86_64__)
  if (kHasRegisters512 && cpu_supports("avx512")) return {run_avx512, 128};
  if (cpu_supports("avx2")) return {run_avx2, 64};
#elif defined(__aarch64__)
  if (cpu_supports("neon")) return {run_neon, 32};
#endif
  return {run_scalar, 2};
}

double peak_of(const DotProduct& dot, int threads, double seconds) {
  const double best = fastest_pass(threads, seconds, [&](int) { dot.run(); });
  return static_cast<double>(dot.operations) * kChains * kRounds * threads / best * 1e-9;
}

}  // namespace

double read_bandwidth(int threads, int megabytes, double seconds) {
  const size_t share = static_cast<size_t>(megabytes) * 1000000 / threads / 4096 * 4096, bytes = share * threads;
  const size_t alignment = size_t{2} << 20;
  if (share == 0) return 0;
  uint8_t* buffer = static_cast<uint8_t*>(aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment));
  if (!buffer) return 0;
#if defined(__linux__)
  madvise(buffer, bytes, MADV_HUGEPAGE);
#endif
  memset(buffer, 1, bytes);  // untouched pages would all be the one zero page
  const double best = fastest_pass(threads, seconds, [&](int id) { read_all(buffer + id * share, share); });
  free(buffer);
  return static_cast<double>(bytes) / best * 1e-9;
}

double int8_peak(int threads, double seconds) { return peak_of(best_dot_product(), threads, seconds); }

double f32_peak(int threads, double seconds) { return peak_of(best_f32_product(), threads, seconds); }

}  // namespace haomiao
