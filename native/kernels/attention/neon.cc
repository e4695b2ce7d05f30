// The attention kernels for NEON: body.h over the lanes of this instruction set.
#include "kernels/lanes/neon.h"

#include "kernels/attention/body.h"
#include "kernels/attention/tables.h"

namespace haomiao {

const AttentionKernels kNeonAttention = attention_table("neon");

}  // namespace haomiao
