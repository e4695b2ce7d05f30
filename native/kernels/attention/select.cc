// Name -> table of attention kernels. Knows what is compiled in, not what the processor can run (cpu.cc).
#include <string.h>

#include "kernels/attention/tables.h"

namespace haomiao {
namespace {

struct Entry {
  const char* isa;
  const AttentionKernels* table;
};

constexpr Entry kEntries[] = {
#if defined(__x86_64__)
    {"avx512_bf16", &kAvx512Attention},
    {"avx512", &kAvx512Attention},
    {"avx2", &kAvx2Attention},
#elif defined(__aarch64__)
    {"neon", &kNeonAttention},
#endif
    {"scalar", &kScalarAttention},
};

}  // namespace

const AttentionKernels* attention_kernels(const char* isa) {
  for (const Entry& entry : kEntries) {
    if (strcmp(entry.isa, isa) == 0) return entry.table;
  }
  return nullptr;
}

}  // namespace haomiao
