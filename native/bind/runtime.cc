#include "bind/bind.h"

namespace haomiao {

void bind_runtime(nanobind::module_&) {}

}  // namespace haomiao
