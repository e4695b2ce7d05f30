// The tables of the instruction sets that are compiled in; select.cc chooses. Private to native/kernels/head.
#pragma once
#include "kernels/head/head.h"

namespace haomiao {

extern const HeadKernels kScalarHead;
#if defined(__x86_64__)
extern const HeadKernels kAvx2Head;
extern const HeadKernels kAvx512Head;
#elif defined(__aarch64__)
extern const HeadKernels kNeonHead;
#endif

}  // namespace haomiao
