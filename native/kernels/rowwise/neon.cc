// The rowwise kernels for NEON: body.h over the lanes of this instruction set.
#include "kernels/lanes/neon.h"

#include "kernels/rowwise/body.h"
#include "kernels/rowwise/tables.h"

namespace haomiao {

const RowwiseKernels kNeonRowwise = rowwise_table("neon");

}  // namespace haomiao
