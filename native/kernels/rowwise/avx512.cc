// The rowwise kernels for AVX-512: body.h over the lanes of this instruction set.
#include "kernels/lanes/avx512.h"

#include "kernels/rowwise/body.h"
#include "kernels/rowwise/tables.h"

namespace haomiao {

const RowwiseKernels kAvx512Rowwise = rowwise_table("avx512");

}  // namespace haomiao
