#include "bind/bind.h"

NB_MODULE(_core, m) {
  m.doc() = "The compiled core of Haomiao: kernels, the plan runner and the artifact header.";
  haomiao::bind_kernels(m);
  haomiao::bind_rowwise(m);
  haomiao::bind_runtime(m);
  haomiao::bind_artifact(m);
}
