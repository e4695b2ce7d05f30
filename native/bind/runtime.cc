// The plan runner: a plan is handed over operation by operation, then whole steps run with the GIL released. Names are
// resolved and everything is checked in native/runtime; what is wrong arrives in Python as a ValueError of one line.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/bind.h"
#include "kernels/linear/weight.h"
#include "runtime/cores.h"
#include "runtime/runner.h"
#include "runtime/tile_mask.h"

namespace nb = nanobind;

namespace haomiao {
namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntTable = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Flags = nb::ndarray<const bool, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutInts = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutFloats = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string& what) { throw nb::value_error(what.c_str()); }

// A plan being built, and the arrays that it points into.
struct BoundPlan {
  PlanBuilder builder;
  std::vector<Bytes> bytes;
  std::vector<Floats> floats;
  std::vector<OwnedTileMask> masks;

  BoundPlan(int64_t vocab_size, int64_t max_context) : builder(vocab_size, max_context) {}

  void matrix(const std::string& name, uint32_t encoding, int64_t rows, int64_t cols, int64_t group, int64_t lo_shift,
              Bytes hi, std::optional<Bytes> lo, std::optional<Bytes> kept) {
    OwnedTileMask mask;
    const char* wrong = kept ? mask.read(rows, cols, group, kept->data(), kept->size()) : nullptr;
    Weight weight;
    const TileMask view = mask.view();
    if (!wrong) {
      wrong = make_weight(encoding, rows, cols, group, lo_shift, hi.data(), hi.size(), lo ? lo->data() : nullptr,
                          lo ? lo->size() : 0, kept ? &view : nullptr, &weight);
    }
    if (wrong) refuse("matrix '" + name + "': " + wrong);
    builder.matrix(name, weight);
    if (kept) masks.push_back(std::move(mask));
    bytes.push_back(std::move(hi));
    if (lo) bytes.push_back(std::move(*lo));
  }

  void vector(const std::string& name, Floats values) {
    builder.vector(name, values.data(), static_cast<int64_t>(values.size()));
    floats.push_back(std::move(values));
  }
};

// (name, integer weights allowed, body reads both planes, head reads both, activations of bf16 weights are bf16)
using PointTuple = std::tuple<std::string, bool, bool, bool, bool>;

KvType kv_of(const std::string& name) {
  if (name == "f32") return KvType::f32;
  if (name == "bf16") return KvType::bf16;
  if (name != "int8") refuse("KV types are f32, bf16 and int8, not '" + name + "'");
  return KvType::int8;
}

struct BoundRunner {
  std::vector<Bytes> bytes;  // what the runner reads from; destroyed after it
  std::vector<Floats> floats;
  std::vector<OwnedTileMask> masks;
  std::unique_ptr<Runner> runner;
  int vocab_size = 0;

  BoundRunner(BoundPlan& plan, const std::string& isa, const std::string& kv, int64_t kv_blocks,
              int64_t max_step_tokens, int threads, bool pin, const std::vector<PointTuple>& points) {
    const char* error = nullptr;
    const KernelTable* kernels = select_kernels(isa.c_str(), &error);
    if (!kernels) refuse(error);
    std::vector<PointSpec> specs;
    for (const auto& [name, integer, body, head, bf16] : points) {
      specs.push_back({name, integer, body ? Planes::both : Planes::hi, head ? Planes::both : Planes::hi,
                       bf16 ? Activation::bf16 : Activation::f32});
    }
    Plan finished = plan.builder.finish();
    vocab_size = finished.vocab_size;
    runner =
        std::make_unique<Runner>(std::move(finished), *kernels,
                                 RunnerOptions{kv_of(kv), kv_blocks, max_step_tokens, threads, pin}, std::move(specs));
    bytes = std::move(plan.bytes);
    floats = std::move(plan.floats);
    masks = std::move(plan.masks);
  }

  int64_t step(int64_t point, Ints token_ids, Ints span_starts, Ints past, IntTable block_tables, Ints logit_rows,
               std::optional<Flags> greedy, std::optional<IntTable> copies, OutFloats logits, OutInts argmax,
               std::optional<Ints> hidden_rows, std::optional<OutFloats> hidden) {
    const Batch batch = {token_ids.data(),
                         static_cast<int64_t>(token_ids.size()),
                         span_starts.data(),
                         static_cast<int64_t>(span_starts.size()),
                         past.data(),
                         static_cast<int64_t>(past.size()),
                         block_tables.data(),
                         static_cast<int64_t>(block_tables.shape(0)),
                         static_cast<int64_t>(block_tables.shape(1)),
                         logit_rows.data(),
                         static_cast<int64_t>(logit_rows.size()),
                         greedy ? greedy->data() : nullptr,
                         copies ? copies->data() : nullptr,
                         copies ? static_cast<int64_t>(copies->shape(0)) : 0,
                         hidden_rows ? hidden_rows->data() : nullptr,
                         hidden_rows ? static_cast<int64_t>(hidden_rows->size()) : 0};
    if (logits.shape(0) != logit_rows.size() || logits.shape(1) != static_cast<size_t>(vocab_size) ||
        argmax.size() != logit_rows.size()) {
      refuse("logits must be [rows, vocab] and argmax [rows]");
    }
    if (greedy && greedy->size() != logit_rows.size()) refuse("greedy must be [rows]");
    if (copies && copies->shape(1) != 2) refuse("copies must be [n, 2]");
    if (batch.hidden_count && !(hidden && hidden->shape(0) == hidden_rows->size() &&
                                hidden->shape(1) == static_cast<size_t>(runner->hidden_size()))) {
      refuse("hidden must be [hidden rows, hidden size]");
    }
    int64_t elapsed = 0;
    std::string wrong;
    {
      nb::gil_scoped_release release;
      wrong = runner->step(point, batch, logits.data(), argmax.data(), &elapsed, hidden ? hidden->data() : nullptr);
    }
    if (!wrong.empty()) refuse(wrong);
    return elapsed;
  }

  void copy_blocks(IntTable pairs) {
    if (pairs.shape(1) != 2) refuse("pairs must be [n, 2]");
    std::string wrong;
    {
      nb::gil_scoped_release release;
      wrong = runner->copy_blocks(pairs.data(), static_cast<int64_t>(pairs.shape(0)));
    }
    if (!wrong.empty()) refuse(wrong);
  }

  std::vector<std::pair<std::string, int64_t>> last_step_profile() const {
    std::vector<std::pair<std::string, int64_t>> list;
    for (size_t i = 0; i < runner->phases().size(); ++i) {
      list.emplace_back(runner->phases()[i].name, runner->phase_ns()[i]);
    }
    return list;
  }
};

void bind_plan(nb::module_& m) {
  using namespace nb::literals;
  using Name = const std::string&;
  nb::class_<BoundPlan>(m, "Plan", "A plan under construction (models/plan.py); keeps the arrays it is told of.")
      .def(nb::init<int64_t, int64_t>(), "vocab_size"_a, "max_context"_a)
      .def("matrix", &BoundPlan::matrix, "name"_a, "encoding"_a, "rows"_a, "cols"_a, "group"_a, "lo_shift"_a,
           nb::arg("hi").noconvert(), nb::arg("lo").noconvert().none(), nb::arg("kept").noconvert() = nb::none())
      .def("vector", &BoundPlan::vector, "name"_a, nb::arg("values").noconvert())
      .def("layer",
           [](BoundPlan& p, int64_t heads, int64_t dim, int64_t window) { p.builder.layer(heads, dim, window); })
      .def("buffer", [](BoundPlan& p, Name name, int64_t width) { p.builder.buffer(name, width); })
      .def("rope_table", [](BoundPlan& p, int64_t dim, std::vector<float> inv_freq,
                            float factor) { p.builder.rope_table(dim, std::move(inv_freq), factor); })
      .def("embed", [](BoundPlan& p, Name out, Name table, float scale,
                       Name positions) { p.builder.embed(out, table, scale, positions); })
      .def("norm", [](BoundPlan& p, Name out, Name source, Name weight, float eps, Name kind,
                      Name bias) { p.builder.norm(out, source, weight, eps, kind, bias); })
      .def("linear", [](BoundPlan& p, Name out, Name source, Name weight,
                        Name bias) { p.builder.linear(out, source, weight, bias); })
      .def("head_norm", [](BoundPlan& p, Name buffer, int64_t offset, int64_t heads, int64_t dim, Name weight,
                           float eps) { p.builder.head_norm(buffer, offset, heads, dim, weight, eps); })
      .def("rope", [](BoundPlan& p, Name buffer, int64_t offset, int64_t heads, int64_t dim,
                      int64_t rope) { p.builder.rope(buffer, offset, heads, dim, rope); })
      .def("attention",
           [](BoundPlan& p, Name out, Name qkv, int64_t layer, int64_t heads, int64_t kv_heads, int64_t dim, int64_t k,
              int64_t v, float scale, int64_t window, float softcap) {
             p.builder.attention(out, qkv, layer, heads, kv_heads, dim, k, v, scale, window, softcap);
           })
      .def("add", [](BoundPlan& p, Name target, Name source) { p.builder.add(target, source); })
      .def("glu", [](BoundPlan& p, Name out, Name source, Name f) { p.builder.glu(out, source, f); })
      .def("activate", [](BoundPlan& p, Name out, Name source, Name f) { p.builder.activate(out, source, f); })
      .def("head", [](BoundPlan& p, Name source, Name weight, Name bias, float scale, float softcap) {
        p.builder.head(source, weight, bias, scale, softcap);
      });
}

}  // namespace

void bind_runtime(nb::module_& m) {
  using namespace nb::literals;
  bind_plan(m);
  nb::class_<BoundRunner>(m, "Runner", "Runs a plan, one whole step per call.")
      .def(nb::init<BoundPlan&, const std::string&, const std::string&, int64_t, int64_t, int, bool,
                    const std::vector<PointTuple>&>(),
           "plan"_a, "isa"_a, "kv"_a, "kv_blocks"_a, "max_step_tokens"_a, "threads"_a, "pin"_a, "points"_a)
      .def("step", &BoundRunner::step, "point"_a, nb::arg("token_ids").noconvert(), nb::arg("span_starts").noconvert(),
           nb::arg("past").noconvert(), nb::arg("block_tables").noconvert(), nb::arg("logit_rows").noconvert(),
           nb::arg("greedy").noconvert().none(), nb::arg("copies").noconvert().none(), nb::arg("logits").noconvert(),
           nb::arg("argmax").noconvert(), nb::arg("hidden_rows").noconvert() = nb::none(),
           nb::arg("hidden").noconvert() = nb::none())
      .def("copy_blocks", &BoundRunner::copy_blocks, nb::arg("pairs").noconvert())
      .def(
          "profile", [](BoundRunner& r, bool on) { r.runner->profile(on); }, "on"_a)
      .def("last_step_profile", &BoundRunner::last_step_profile)
      .def_prop_ro("rescored", [](const BoundRunner& r) { return r.runner->rescored(); })
      .def_prop_ro("threads", [](const BoundRunner& r) { return r.runner->threads(); })
      .def_prop_rw(
          "active", [](const BoundRunner& r) { return r.runner->active(); },
          [](BoundRunner& r, int threads) { r.runner->set_active(threads); })
      .def_prop_ro("crowded", [](const BoundRunner& r) { return r.runner->crowded(); })
      .def_prop_ro("isa", [](const BoundRunner& r) { return std::string(r.runner->isa()); })
      .def_prop_ro("max_context", [](const BoundRunner& r) { return r.runner->max_context(); })
      .def_prop_ro("hidden_size", [](const BoundRunner& r) { return r.runner->hidden_size(); })
      .def_prop_ro("kv_bytes_per_block", [](const BoundRunner& r) { return r.runner->kv_bytes_per_block(); })
      .def_prop_ro("buffer_bytes", [](const BoundRunner& r) { return r.runner->buffer_bytes(); });
  m.def(
      "default_threads", [] { return choose_cores(0).size(); },
      "Threads that affinity mask and cgroup quota permit, one per physical core.");
}

}  // namespace haomiao
