// The attention kernels for AVX-512: body.h over the lanes of this instruction set.
#include "kernels/lanes/avx512.h"

#include "kernels/attention/body.h"
#include "kernels/attention/tables.h"

namespace haomiao {

const AttentionKernels kAvx512Attention = attention_table("avx512");

}  // namespace haomiao
