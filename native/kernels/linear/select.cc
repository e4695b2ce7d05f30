// Name -> table of linear kernels. Knows what is compiled in, not what the processor can run (cpu.cc).
#include <string.h>

#include "kernels/linear/tables.h"

namespace haomiao {
namespace {

struct Entry {
  const char* isa;
  const LinearKernels* table;
};

constexpr Entry kEntries[] = {
#if defined(__x86_64__)
    {"avx512_bf16", &kAvx512Bf16Linear},
    {"avx512", &kAvx512Linear},
    {"avx2", &kAvx2Linear},
#elif defined(__aarch64__)
    {"neon", &kNeonLinear},
#endif
    {"scalar", &kScalarLinear},
};

}  // namespace

const LinearKernels* linear_kernels(const char* isa) {
  for (const Entry& entry : kEntries) {
    if (strcmp(entry.isa, isa) == 0) return entry.table;
  }
  return nullptr;
}

}  // namespace haomiao
