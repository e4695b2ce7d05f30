#include "runtime/artifact.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include "bind/bind.h"

namespace nb = nanobind;

namespace haomiao {
namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// One dict per section that this version knows, in the file's order. ValueError carries the reason of a refusal.
nb::list parse(const Bytes& head, uint64_t file_bytes) {
  ArtifactHeader header;
  const std::string wrong = parse_artifact(head.data(), head.size(), file_bytes, &header);
  if (!wrong.empty()) throw nb::value_error(wrong.c_str());
  nb::list sections;
  for (const ArtifactSection& s : header.sections) {
    if (!s.known) continue;
    nb::dict d;
    d["kind"] = s.kind;
    d["name"] = nb::str(s.name.data(), s.name.size());
    d["offset"] = s.offset;
    d["bytes"] = s.bytes;
    d["crc"] = s.crc;
    d["encoding"] = s.encoding;
    d["plane"] = s.plane;
    d["group"] = s.group;
    d["lo_shift"] = s.lo_shift;
    d["rows"] = s.rows;
    d["cols"] = s.cols;
    d["stored"] = s.stored;
    sections.append(d);
  }
  return sections;
}

}  // namespace

void bind_artifact(nb::module_& m) {
  m.def("parse_artifact", &parse, nb::arg("head"), nb::arg("file_bytes"),
        "Check the header of model.haomiao (uint8 array of its first bytes) and return its sections as dicts.");
}

}  // namespace haomiao
