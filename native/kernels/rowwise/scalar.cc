// The rowwise kernels in plain C++, portable and slow: body.h over the lanes of this instruction set.
#include "kernels/lanes/scalar.h"

#include "kernels/rowwise/body.h"
#include "kernels/rowwise/tables.h"

namespace haomiao {

const RowwiseKernels kScalarRowwise = rowwise_table("scalar");

}  // namespace haomiao
