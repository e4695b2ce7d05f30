#include "bind/bind.h"

namespace haomiao {

void bind_kernels(nanobind::module_&) {}

}  // namespace haomiao
