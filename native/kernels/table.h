// Dispatch once, at load: one table per process, chosen by cpuid (and what the OS enables) or forced by HAOMIAO_ISA.
#pragma once
#include "kernels/attention/attention.h"
#include "kernels/head/head.h"
#include "kernels/linear/linear.h"
#include "kernels/rowwise/rowwise.h"

namespace haomiao {

struct KernelTable {
  const char* isa;  // "scalar", "avx2", "avx512", "avx512_bf16", "neon"
  const LinearKernels* linear;
  const RowwiseKernels* rowwise;
  const AttentionKernels* attention;
  const HeadKernels* head;
};

// The table for this machine. `forced` (or nullptr) is an isa name; returns nullptr and sets *error to one line if it
// is unknown or this machine cannot run it.
const KernelTable* select_kernels(const char* forced, const char** error);
}  // namespace haomiao
