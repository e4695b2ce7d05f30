// The tables of the instruction sets that are compiled in; select.cc chooses. Private to native/kernels/rowwise.
#pragma once
#include "kernels/rowwise/rowwise.h"

namespace haomiao {

extern const RowwiseKernels kScalarRowwise;
#if defined(__x86_64__)
extern const RowwiseKernels kAvx2Rowwise;
extern const RowwiseKernels kAvx512Rowwise;
#elif defined(__aarch64__)
extern const RowwiseKernels kNeonRowwise;
#endif

}  // namespace haomiao
