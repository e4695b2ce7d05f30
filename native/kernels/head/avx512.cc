// The screening kernels for AVX-512: body.h over the lanes of this instruction set.
#include "kernels/lanes/avx512.h"

#include "kernels/head/body.h"
#include "kernels/head/tables.h"

namespace haomiao {

const HeadKernels kAvx512Head = head_table("avx512");

}  // namespace haomiao
