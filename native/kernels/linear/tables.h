// The tables of the instruction sets that are compiled in; select.cc chooses. Private to native/kernels/linear.
#pragma once
#include "kernels/linear/linear.h"

namespace haomiao {

extern const LinearKernels kScalarLinear;
#if defined(__x86_64__)
extern const LinearKernels kAvx2Linear;
extern const LinearKernels kAvx512Linear;
extern const LinearKernels kAvx512Bf16Linear;
#elif defined(__aarch64__)
extern const LinearKernels kNeonLinear;
#endif

}  // namespace haomiao
