// The attention kernels in plain C++, portable and slow: body.h over the lanes of this instruction set.
#include "kernels/lanes/scalar.h"

#include "kernels/attention/body.h"
#include "kernels/attention/tables.h"

namespace haomiao {

const AttentionKernels kScalarAttention = attention_table("scalar");

}  // namespace haomiao
