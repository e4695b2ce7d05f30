// One table of kernels for a process: chosen by what the processor can run, or forced by name.
#include "kernels/cpu.h"
#include "kernels/table.h"

namespace haomiao {
namespace {

constexpr int kMostIsas = 8;

}  // namespace

const KernelTable* select_kernels(const char* forced, const char** error) {
  static const struct Tables {
    KernelTable tables[kMostIsas] = {};
    int count = 0;

    Tables() {
      for (const char* const* isa = available_isas(); *isa && count < kMostIsas; ++isa) {
        const KernelTable table = {*isa, linear_kernels(*isa), rowwise_kernels(*isa), attention_kernels(*isa),
                                   head_kernels(*isa)};
        if (table.linear && table.rowwise && table.attention && table.head) tables[count++] = table;
      }
    }
  } all;
  if (!forced || !*forced) return &all.tables[0];
  for (int i = 0; i < all.count; ++i) {
    const char *a = all.tables[i].isa, *b = forced;
    while (*a && *a == *b) ++a, ++b;
    if (*a == *b) return &all.tables[i];
  }
  *error = "this machine cannot run that instruction set";
  return nullptr;
}

}  // namespace haomiao
