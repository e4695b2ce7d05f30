// The tables of the instruction sets that are compiled in; select.cc chooses. Private to native/kernels/attention.
#pragma once
#include "kernels/attention/attention.h"

namespace haomiao {

extern const AttentionKernels kScalarAttention;
#if defined(__x86_64__)
extern const AttentionKernels kAvx2Attention;
extern const AttentionKernels kAvx512Attention;
#elif defined(__aarch64__)
extern const AttentionKernels kNeonAttention;
#endif

}  // namespace haomiao
