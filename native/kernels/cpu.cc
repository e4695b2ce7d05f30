// Detection by cpuid and XGETBV (Intel SDM vol. 1, 13.3 and 15.2: a feature counts only if the operating system saves
// its registers), or by the auxiliary vector on ARM Linux. Knows nothing about kernels.
#include "kernels/cpu.h"

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace haomiao {
namespace {

struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, neon = false;
};

#if defined(__x86_64__)

bool bit(uint32_t word, int index) { return (word >> index) & 1; }

// XCR0: which register files the operating system saves and restores.
uint64_t enabled_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

Features detect() {
  Features found;
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return found;
  const bool osxsave = bit(ecx, 27), avx = bit(ecx, 28), fma = bit(ecx, 12), f16c = bit(ecx, 29);
  if (!osxsave || !avx || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return found;
  const uint64_t state = enabled_state();
  const bool ymm = (state & 0x06) == 0x06;  // XMM, upper YMM
  const bool zmm = (state & 0xe6) == 0xe6;  // and opmask, upper ZMM, ZMM16-31
  found.avx2 = ymm && fma && f16c && bit(ebx, 5);
  const bool f = bit(ebx, 16), dq = bit(ebx, 17), bw = bit(ebx, 30), vl = bit(ebx, 31), vnni = bit(ecx, 11);
  found.avx512 = found.avx2 && zmm && f && dq && bw && vl && vnni;
  const uint32_t subleaves = eax;
  if (found.avx512 && subleaves >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) {
    found.avx512_bf16 = bit(eax, 5);
  }
#ifdef HAOMIAO_EMULATE_AVX512
  found.avx512 = found.avx512_bf16 = found.avx2;
#endif
  return found;
}

#elif defined(__aarch64__)

Features detect() {
  Features found;
#if defined(__linux__)
  found.neon = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
  found.neon = true;  // every Apple processor that runs macOS has the dot-product instructions
#endif
  return found;
}

#else

Features detect() { return Features(); }

#endif

struct Table {
  const char* names[6] = {};
  Table() {
    const Features found = detect();
    int n = 0;
    if (found.avx512_bf16) names[n++] = "avx512_bf16";
    if (found.avx512) names[n++] = "avx512";
    if (found.avx2) names[n++] = "avx2";
    if (found.neon) names[n++] = "neon";
    names[n] = "scalar";
  }
};

}  // namespace

const char* const* available_isas() {
  static const Table table;
  return table.names;
}

bool cpu_supports(const char* isa) {
  for (const char* const* name = available_isas(); *name; ++name) {
    if (strcmp(*name, isa) == 0) return true;
  }
  return false;
}

}  // namespace haomiao
