// The rowwise kernels for AVX2 with FMA: body.h over the lanes of this instruction set.
#include "kernels/lanes/avx2.h"

#include "kernels/rowwise/body.h"
#include "kernels/rowwise/tables.h"

namespace haomiao {

const RowwiseKernels kAvx2Rowwise = rowwise_table("avx2");

}  // namespace haomiao
