#include "bind/bind.h"

namespace haomiao {

void bind_artifact(nanobind::module_&) {}

}  // namespace haomiao
