// The screening kernels for AVX2 with FMA: body.h over the lanes of this instruction set.
#include "kernels/lanes/avx2.h"

#include "kernels/head/body.h"
#include "kernels/head/tables.h"

namespace haomiao {

const HeadKernels kAvx2Head = head_table("avx2");

}  // namespace haomiao
