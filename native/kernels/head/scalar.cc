// The screening kernels in plain C++, portable and slow: body.h over the lanes of this instruction set.
#include "kernels/lanes/scalar.h"

#include "kernels/head/body.h"
#include "kernels/head/tables.h"

namespace haomiao {

const HeadKernels kScalarHead = head_table("scalar");

}  // namespace haomiao
