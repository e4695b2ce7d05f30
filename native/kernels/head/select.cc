// Name -> table of screening kernels. Knows what is compiled in, not what the processor can run (cpu.cc).
#include <string.h>

#include "kernels/head/tables.h"

namespace haomiao {
namespace {

struct Entry {
  const char* isa;
  const HeadKernels* table;
};

constexpr Entry kEntries[] = {
#if defined(__x86_64__)
    {"avx512_bf16", &kAvx512Head},
    {"avx512", &kAvx512Head},
    {"avx2", &kAvx2Head},
#elif defined(__aarch64__)
    {"neon", &kNeonHead},
#endif
    {"scalar", &kScalarHead},
};

}  // namespace

const HeadKernels* head_kernels(const char* isa) {
  for (const Entry& entry : kEntries) {
    if (strcmp(entry.isa, isa) == 0) return entry.table;
  }
  return nullptr;
}

}  // namespace haomiao
