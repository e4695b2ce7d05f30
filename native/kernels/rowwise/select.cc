// Name -> table of rowwise kernels. Knows what is compiled in, not what the processor can run (cpu.cc).
#include <string.h>

#include "kernels/rowwise/tables.h"

namespace haomiao {
namespace {

struct Entry {
  const char* isa;
  const RowwiseKernels* table;
};

constexpr Entry kEntries[] = {
#if defined(__x86_64__)
    {"avx512_bf16", &kAvx512Rowwise},
    {"avx512", &kAvx512Rowwise},
    {"avx2", &kAvx2Rowwise},
#elif defined(__aarch64__)
    {"neon", &kNeonRowwise},
#endif
    {"scalar", &kScalarRowwise},
};

}  // namespace

const RowwiseKernels* rowwise_kernels(const char* isa) {
  for (const Entry& entry : kEntries) {
    if (strcmp(entry.isa, isa) == 0) return entry.table;
  }
  return nullptr;
}

}  // namespace haomiao
