// The attention kernels for AVX2 with FMA: body.h over the lanes of this instruction set.
#include "kernels/lanes/avx2.h"

#include "kernels/attention/body.h"
#include "kernels/attention/tables.h"

namespace haomiao {

const AttentionKernels kAvx2Attention = attention_table("avx2");

}  // namespace haomiao
