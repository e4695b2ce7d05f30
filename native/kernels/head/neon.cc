// The screening kernels for NEON: body.h over the lanes of this instruction set.
#include "kernels/lanes/neon.h"

#include "kernels/head/body.h"
#include "kernels/head/tables.h"

namespace haomiao {

const HeadKernels kNeonHead = head_table("neon");

}  // namespace haomiao
