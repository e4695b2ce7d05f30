// One bind_<room>() per binding file; module.cc calls them and does nothing else.
#pragma once
#include <nanobind/nanobind.h>

namespace haomiao {

void bind_kernels(nanobind::module_& m);   // kernels.cc: single kernels, for tests and for measuring ceilings
void bind_rowwise(nanobind::module_& m);   // rowwise.cc: single rowwise and attention kernels, likewise
void bind_runtime(nanobind::module_& m);   // runtime.cc: the plan runner
void bind_artifact(nanobind::module_& m);  // artifact.cc: the header of model.haomiao

}  // namespace haomiao
