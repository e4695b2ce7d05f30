// Single kernels, for tests and measurements: shapes are checked here, the arithmetic is the kernels' own. A step of a
// model does not pass through this file.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind/bind.h"
#include "kernels/cpu.h"
#include "kernels/head/head.h"
#include "kernels/linear/weight.h"
#include "kernels/quantize/rtn.h"
#include "runtime/ceilings.h"
#include "runtime/tile_mask.h"

namespace nb = nanobind;

namespace haomiao {
namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutMatrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr size_t kAlignment = 64;
constexpr int64_t kMostTokens = 1 << 20;

struct FreeAligned {
  void operator()(uint8_t* p) const { std::free(p); }
};
using AlignedBytes = std::unique_ptr<uint8_t, FreeAligned>;

AlignedBytes allocate(size_t bytes) {
  void* p = std::aligned_alloc(kAlignment, (bytes + kAlignment) / kAlignment * kAlignment);
  if (!p) throw std::bad_alloc();
  return AlignedBytes(static_cast<uint8_t*>(p));
}

void require(bool condition, const char* message) {
  if (!condition) throw nb::value_error(message);
}

const LinearKernels& kernels_of(const std::string& isa) {
  const LinearKernels* kernels = cpu_supports(isa.c_str()) ? linear_kernels(isa.c_str()) : nullptr;
  require(kernels != nullptr, "this machine cannot run that instruction set");
  return *kernels;
}

Activation activation_of(const std::string& name) {
  if (name == "f32") return Activation::f32;
  if (name == "bf16") return Activation::bf16;
  require(name == "int8", "activations are 'f32', 'bf16' or 'int8'");
  return Activation::int8;
}

bool compatible(Encoding encoding, Activation activation) {
  switch (encoding) {
    case Encoding::f32:
      return activation == Activation::f32;
    case Encoding::bf16:
      return activation != Activation::int8;
    default:
      return activation == Activation::int8;
  }
}

// A weight and the arrays that it points into.
struct OwnedWeight {
  Bytes hi;
  std::optional<Bytes> lo;
  OwnedTileMask mask;
  Weight weight;

  OwnedWeight(uint32_t encoding, int64_t rows, int64_t cols, int64_t group, int64_t lo_shift, Bytes hi_bytes,
              std::optional<Bytes> lo_bytes, std::optional<Bytes> kept)
      : hi(std::move(hi_bytes)), lo(std::move(lo_bytes)) {
    const char* wrong = kept ? mask.read(rows, cols, group, kept->data(), kept->size()) : nullptr;
    if (wrong) throw nb::value_error(wrong);
    const TileMask view = mask.view();
    wrong = make_weight(encoding, rows, cols, group, lo_shift, hi.data(), hi.size(), lo ? lo->data() : nullptr,
                        lo ? lo->size() : 0, kept ? &view : nullptr, &weight);
    if (wrong) throw nb::value_error(wrong);
  }
};

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const char* const* name = available_isas(); *name; ++name) names.emplace_back(*name);
  return names;
}

nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> prepare(const std::string& isa, const std::string& activation, Matrix x,
                                                     int64_t padded_cols) {
  const LinearKernels& kernels = kernels_of(isa);
  const Activation kind = activation_of(activation);
  const int64_t tokens = x.shape(0), cols = x.shape(1);
  require(tokens <= kMostTokens && cols >= 1, "activations must be [tokens, columns]");
  require(padded_cols >= cols && padded_cols <= (int64_t{1} << 24), "padded_cols must be at least the columns");
  require(kind != Activation::int8 || padded_cols % kGroup == 0, "padded_cols must be a multiple of 32");
  require(kind != Activation::bf16 || padded_cols % 2 == 0, "padded_cols must be even");
  const size_t bytes = kernels.activation_bytes(kind, static_cast<int>(tokens), static_cast<int>(padded_cols));
  AlignedBytes out = allocate(bytes);
  {
    nb::gil_scoped_release release;
    kernels.prepare(kind, x.data(), cols, static_cast<int>(tokens), 0, static_cast<int>(tokens), static_cast<int>(cols),
                    static_cast<int>(padded_cols), out.get());
  }
  uint8_t* data = out.release();
  nb::capsule owner(data, [](void* p) noexcept { std::free(p); });
  return nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(data, {bytes}, owner);
}

void linear(const std::string& isa, const OwnedWeight& owned, bool both, const std::string& activation, Bytes prepared,
            OutMatrix out, std::optional<Vector> bias, int64_t tile_begin, int64_t tile_end) {
  const LinearKernels& kernels = kernels_of(isa);
  const Weight& weight = owned.weight;
  const Activation kind = activation_of(activation);
  const int64_t tokens = out.shape(0), tiles = (int64_t{weight.rows} + kTileRows - 1) / kTileRows;
  require(compatible(weight.encoding, kind), "these weights do not take these activations");
  require(tokens <= kMostTokens && out.shape(1) == static_cast<size_t>(weight.rows), "out must be [tokens, rows]");
  require(0 <= tile_begin && tile_begin <= tile_end && tile_end <= tiles, "the tile range is outside the matrix");
  require(!bias || bias->size() == static_cast<size_t>(weight.rows), "bias must be [rows]");
  require(prepared.size() == kernels.activation_bytes(kind, static_cast<int>(tokens), weight.padded_cols),
          "the activations were prepared for another shape");
  require(reinterpret_cast<uintptr_t>(prepared.data()) % kAlignment == 0, "prepared activations must be aligned");
  const AlignedBytes scratch = allocate(kernels.scratch_bytes(weight, static_cast<int>(tokens)));
  const LinearCall call = {&weight,
                           both ? Planes::both : Planes::hi,
                           kind,
                           prepared.data(),
                           static_cast<int>(tokens),
                           static_cast<int>(tile_begin),
                           static_cast<int>(tile_end),
                           out.data(),
                           weight.rows,
                           bias ? bias->data() : nullptr,
                           scratch.get()};
  nb::gil_scoped_release release;
  kernels.linear(call);
}

void read_row(const std::string& isa, const OwnedWeight& owned, int64_t row,
              nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu> out) {
  require(0 <= row && row < owned.weight.rows, "the row is outside the matrix");
  require(out.size() == static_cast<size_t>(owned.weight.cols), "out must be [cols]");
  kernels_of(isa).read_row(owned.weight, static_cast<int32_t>(row), out.data());
}

using OutVector = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

const HeadKernels& head_of(const std::string& isa) {
  const HeadKernels* kernels = cpu_supports(isa.c_str()) ? head_kernels(isa.c_str()) : nullptr;
  require(kernels != nullptr, "this machine cannot run that instruction set");
  return *kernels;
}

// Checks what all screening kernels need, and returns the groups of 32 columns.
size_t groups_of(const OwnedWeight& owned, int64_t tile) {
  require(owned.weight.encoding == Encoding::planes && !owned.weight.mask.bits, "screening needs planes, whole");
  require(0 <= tile && tile < (int64_t{owned.weight.rows} + kTileRows - 1) / kTileRows, "the tile is outside");
  return static_cast<size_t>(owned.weight.padded_cols) / kGroup;
}

void lo_norms(const std::string& isa, const OwnedWeight& owned, int64_t tile, OutVector norms) {
  require(norms.size() == groups_of(owned, tile) && owned.weight.lo, "norms must be [padded_cols / 32], of two planes");
  head_of(isa).lo_norms(owned.weight, static_cast<int>(tile), norms.data());
}

void sketch(const std::string& isa, const OwnedWeight& owned, int64_t tile,
            nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> hi, OutVector norms) {
  const Weight& w = owned.weight;
  require(w.encoding == Encoding::int8 && !w.mask.bits, "a sketch is made of one-byte codes, whole");
  require(0 <= tile && tile < (int64_t{w.rows} + kTileRows - 1) / kTileRows, "the tile is outside");
  const int groups = w.padded_cols / w.group, bytes = groups * (kTileRows * 2 + w.group * kTileRows / 2);
  require(hi.size() == static_cast<size_t>(bytes) && norms.size() == static_cast<size_t>(w.padded_cols) / kGroup,
          "hi must be [bytes of a tile of planes], norms [padded_cols / 32]");
  head_of(isa).sketch(w, static_cast<int>(tile), hi.data(), norms.data());
}

void lengths(const std::string& isa, Vector x, OutVector out) {
  require(x.size() >= 1 && x.size() <= size_t{1} << 24, "a row has 1 to 2^24 columns");
  const size_t padded = (x.size() + kGroup - 1) / kGroup * kGroup;
  require(out.size() * kGroup >= padded && out.size() * kGroup <= padded + 96, "lengths must be [padded_cols / 32]");
  head_of(isa).lengths(x.data(), static_cast<int>(x.size()), static_cast<int>(out.size()) * kGroup, out.data());
}

std::pair<float, float> bound(const std::string& isa, const OwnedWeight& owned, int64_t tile, Vector norms,
                              Vector lengths, Vector h) {
  const size_t groups = groups_of(owned, tile);
  require(norms.size() == groups && lengths.size() == groups && h.size() == kTileRows, "sizes differ");
  const TileBound found =
      head_of(isa).bound(owned.weight, static_cast<int>(tile), norms.data(), lengths.data(), h.data());
  return {found.upper, found.seen};
}

bool quantize(Matrix x, int lo_shift, nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu> scales, Codes hi,
              std::optional<Codes> lo) {
  const int64_t groups = x.shape(0), group = x.shape(1);
  require(group == 32 || group == 64 || group == 128, "a group has 32, 64 or 128 weights");
  require(lo_shift >= 0 && lo_shift <= 4, "lo_shift must be 0 to 4");
  const auto fits = [&](const Codes& codes) { return codes.shape(0) == x.shape(0) && codes.shape(1) == x.shape(1); };
  require(scales.size() == x.shape(0) && fits(hi) && (!lo || fits(*lo)), "scales are [groups], planes [groups, group]");
  nb::gil_scoped_release release;
  return quantize_planes(x.data(), groups, static_cast<int>(group), lo_shift, scales.data(), hi.data(),
                         lo ? lo->data() : nullptr);
}

double checked_bandwidth(int threads, int megabytes, double seconds) {
  require(threads >= 1 && threads <= 1024, "threads must be 1 to 1024");
  require(megabytes >= 1 && megabytes <= 1 << 16, "megabytes must be 1 to 65536");
  require(seconds >= 0 && seconds <= 60, "seconds must be 0 to 60");
  nb::gil_scoped_release release;
  return read_bandwidth(threads, megabytes, seconds);
}

template <double (*Peak)(int, double)>
double checked_peak(int threads, double seconds) {
  require(threads >= 1 && threads <= 1024, "threads must be 1 to 1024");
  require(seconds >= 0 && seconds <= 60, "seconds must be 0 to 60");
  nb::gil_scoped_release release;
  return Peak(threads, seconds);
}

}  // namespace

void bind_kernels(nb::module_& m) {
  using namespace nb::literals;
  m.def("isas", isas, "Instruction sets that this machine can run, best first.");
  nb::class_<OwnedWeight>(m, "Weight", "A matrix in kernel layout; keeps the arrays it was made of.")
      .def(nb::init<uint32_t, int64_t, int64_t, int64_t, int64_t, Bytes, std::optional<Bytes>, std::optional<Bytes>>(),
           "encoding"_a, "rows"_a, "cols"_a, "group"_a, "lo_shift"_a, "hi"_a, "lo"_a.none(), "kept"_a = nb::none())
      .def_prop_ro("rows", [](const OwnedWeight& w) { return w.weight.rows; })
      .def_prop_ro("cols", [](const OwnedWeight& w) { return w.weight.cols; })
      .def_prop_ro("padded_cols", [](const OwnedWeight& w) { return w.weight.padded_cols; });
  m.def("prepare", prepare, "isa"_a, "activation"_a, "x"_a, "padded_cols"_a,
        "Activations [tokens, cols] as the linear kernels of `isa` read them.");
  m.def("linear", linear, "isa"_a, "weight"_a, "both"_a, "activation"_a, "prepared"_a, "out"_a, "bias"_a.none(),
        "tile_begin"_a, "tile_end"_a, "out[t, row] for the rows of tiles [tile_begin, tile_end).");
  m.def("read_row", read_row, "isa"_a, "weight"_a, "row"_a, "out"_a, "One row as float32, every stored plane used.");
  m.def("lo_norms", lo_norms, "isa"_a, "weight"_a, "tile"_a, "norms"_a, "kernels/head: bounds of a tile's lo plane.");
  m.def("head_sketch", sketch, "isa"_a, "weight"_a, "tile"_a, "hi"_a, "norms"_a,
        "kernels/head: the hi plane of a tile of one-byte codes, and bounds of what it leaves out.");
  m.def("lengths", lengths, "isa"_a, "x"_a, "lengths"_a, "kernels/head: lengths of a row's groups of 32 columns.");
  m.def("head_bound", bound, "isa"_a, "weight"_a, "tile"_a, "norms"_a, "lengths"_a, "h"_a,
        "kernels/head: (no logit of the tile exceeds this, the greatest by the hi plane).");
  m.def("quantize_planes", quantize, "x"_a, "lo_shift"_a, "scales"_a, "hi"_a, "lo"_a.none(),
        "Round finite groups [groups, group] to codes of planes; False if a scale overflows.");
  m.def("read_bandwidth", checked_bandwidth, "threads"_a, "megabytes"_a, "seconds"_a, "Streaming read, GB/s.");
  m.def("int8_peak", checked_peak<int8_peak>, "threads"_a, "seconds"_a, "8-bit dot products on registers, GOPS.");
  m.def("f32_peak", checked_peak<f32_peak>, "threads"_a, "seconds"_a, "f32 multiply-adds on registers, GFLOPS.");
}

}  // namespace haomiao
