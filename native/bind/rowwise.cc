// Single rowwise and attention kernels, for tests and measurements: shapes are checked here, the arithmetic is the
// kernels' own. A step of a model does not pass through this file.
#include "kernels/rowwise/rowwise.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "kernels/attention/attention.h"
#include "kernels/cpu.h"

namespace nb = nanobind;

namespace haomiao {
namespace {

using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutVector = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutMatrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char* message) {
  if (!condition) throw nb::value_error(message);
}

const RowwiseKernels& rowwise_of(const std::string& isa) {
  const RowwiseKernels* kernels = cpu_supports(isa.c_str()) ? rowwise_kernels(isa.c_str()) : nullptr;
  require(kernels != nullptr, "this machine cannot run that instruction set");
  return *kernels;
}

const AttentionKernels& attention_of(const std::string& isa) {
  const AttentionKernels* kernels = cpu_supports(isa.c_str()) ? attention_kernels(isa.c_str()) : nullptr;
  require(kernels != nullptr, "this machine cannot run that instruction set");
  return *kernels;
}

ActivationFunction function_of(const std::string& name) {
  const char* const names[] = {"silu", "gelu", "gelu_tanh", "relu"};
  for (uint32_t i = 0; i < 4; ++i) {
    if (name == names[i]) return static_cast<ActivationFunction>(i);
  }
  throw nb::value_error("activations are 'silu', 'gelu', 'gelu_tanh' or 'relu'");
}

KvType kv_of(const std::string& name) {
  if (name == "f32") return KvType::f32;
  if (name == "bf16") return KvType::bf16;
  require(name == "int8", "KV types are 'f32', 'bf16' or 'int8'");
  return KvType::int8;
}

int size_of(size_t n) {
  require(n >= 1 && n <= size_t{1} << 28, "a row holds 1 to 2^28 elements");
  return static_cast<int>(n);
}

void norm(const std::string& isa, Vector x, Vector weight, std::optional<Vector> bias, float eps, bool rms,
          OutVector out) {
  const int n = size_of(x.size());
  require(weight.size() == x.size() && out.size() == x.size() && (!bias || bias->size() == x.size()), "sizes differ");
  if (rms) return rowwise_of(isa).rms_norm(x.data(), weight.data(), n, eps, out.data());
  rowwise_of(isa).layer_norm(x.data(), weight.data(), bias ? bias->data() : nullptr, n, eps, out.data());
}

void rope(const std::string& isa, OutMatrix x, int dim, Vector cos_sin) {
  const int heads = size_of(x.shape(0)), head_dim = size_of(x.shape(1));
  require(dim >= 2 && dim % 2 == 0 && dim <= head_dim, "dim must be even and at most the head's");
  require(cos_sin.size() == static_cast<size_t>(dim), "cos_sin must be [dim]");
  rowwise_of(isa).rope(x.data(), heads, head_dim, dim, cos_sin.data());
}

void glu(const std::string& isa, Vector gate, Vector up, const std::string& function, OutVector out) {
  require(gate.size() == up.size() && out.size() == up.size(), "sizes differ");
  rowwise_of(isa).glu(gate.data(), up.data(), size_of(up.size()), function_of(function), out.data());
}

void activate(const std::string& isa, Vector x, const std::string& function, OutVector out) {
  require(out.size() == x.size(), "sizes differ");
  rowwise_of(isa).activate(x.data(), size_of(x.size()), function_of(function), out.data());
}

void add(const std::string& isa, OutVector target, Vector source) {
  require(target.size() == source.size(), "sizes differ");
  rowwise_of(isa).add(target.data(), source.data(), size_of(source.size()));
}

void scale_softcap(const std::string& isa, OutVector x, float scale, float softcap) {
  rowwise_of(isa).scale_softcap(x.data(), size_of(x.size()), scale, softcap);
}

int32_t argmax(const std::string& isa, Vector x) { return rowwise_of(isa).argmax(x.data(), size_of(x.size())); }

struct FreeBytes {
  void operator()(uint8_t* p) const { std::free(p); }
};

std::unique_ptr<uint8_t, FreeBytes> allocate(size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 64) / 64 * 64);
  if (!p) throw std::bad_alloc();
  return std::unique_ptr<uint8_t, FreeBytes>(static_cast<uint8_t*>(p));
}

// Writes k, v [keys, head_dim] into blocks that held something else (every bit set: NaN in each type), then lets the
// last queries.shape(0) positions attend, `tokens_per_call` at a time; `splits_per_call` > 0 works in ranges of splits
// joined at the end.
void attend(const std::string& isa, const std::string& kv_name, Matrix queries, Matrix k, Matrix v, float scale,
            int64_t window, float softcap, int tokens_per_call, int64_t splits_per_call, OutMatrix out) {
  const AttentionKernels& kernels = attention_of(isa);
  const KvType kv = kv_of(kv_name);
  const int keys = size_of(k.shape(0)), head_dim = size_of(k.shape(1)), tokens = size_of(queries.shape(0));
  require(head_dim <= 1024 && keys <= 1 << 20, "at most 1,024 dimensions and 2^20 keys");
  require(v.shape(0) == k.shape(0) && v.shape(1) == k.shape(1), "k and v must have the same shape");
  require(tokens <= keys && queries.shape(1) % k.shape(1) == 0, "queries must be [tokens <= keys, heads * head_dim]");
  require(out.shape(0) == queries.shape(0) && out.shape(1) == queries.shape(1), "out must have the queries' shape");
  require(tokens_per_call >= 1 && window >= 0 && splits_per_call >= 0, "a count is negative");
  const int64_t count = (keys + kKvBlock - 1) / kKvBlock, width = static_cast<int64_t>(queries.shape(1));
  const int heads = size_of(queries.shape(1) / k.shape(1));
  require(heads <= 1024, "at most 1,024 heads");
  const size_t bytes = kernels.block_bytes(kv, head_dim);
  const auto pool = allocate(bytes * static_cast<size_t>(count));
  std::memset(pool.get(), 0xff, bytes * static_cast<size_t>(count));
  std::vector<int32_t> blocks(static_cast<size_t>(count));
  for (int64_t b = 0; b < count; ++b) blocks[static_cast<size_t>(b)] = static_cast<int32_t>(count - 1 - b);
  for (int key = 0; key < keys; ++key) {
    uint8_t* block = pool.get() + bytes * static_cast<size_t>(blocks[static_cast<size_t>(key / kKvBlock)]);
    kernels.write_key(kv, head_dim, k.data() + static_cast<int64_t>(key) * head_dim, key % kKvBlock, block);
    kernels.write_value(kv, head_dim, v.data() + static_cast<int64_t>(key) * head_dim, key % kKvBlock, block);
  }
  const int64_t splits = (keys + kKvSplit - 1) / kKvSplit;
  const int most = std::min(tokens_per_call, tokens);
  const auto scratch = allocate(kernels.scratch_bytes(heads, head_dim, most));
  const size_t partial = kernels.partial_floats(heads, head_dim, most);
  const auto partials = allocate(splits_per_call ? partial * sizeof(float) * static_cast<size_t>(splits) : 0);
  nb::gil_scoped_release release;
  for (int first = 0; first < tokens; first += most) {
    const int n = std::min(most, tokens - first);
    AttentionCall call = {kv,
                          heads,
                          head_dim,
                          scale,
                          softcap,
                          window,
                          queries.data() + first * width,
                          width,
                          out.data() + first * width,
                          width,
                          n,
                          keys - tokens + first,
                          pool.get(),
                          static_cast<int64_t>(bytes),
                          blocks.data(),
                          0,
                          0,
                          nullptr,
                          scratch.get()};
    if (splits_per_call == 0) {
      kernels.attend(call);
      continue;
    }
    float* const states = reinterpret_cast<float*>(partials.get());
    for (int64_t split = 0; split < splits; split += splits_per_call) {
      call.split_begin = split, call.split_end = std::min(splits, split + splits_per_call);
      call.partials = states + kernels.partial_floats(heads, head_dim, n) * static_cast<size_t>(split);
      kernels.attend(call);
    }
    call.partials = states;
    kernels.merge(call, splits);
  }
}

}  // namespace

void bind_rowwise(nb::module_& m) {
  using namespace nb::literals;
  m.def("norm", norm, "isa"_a, "x"_a, "weight"_a, "bias"_a.none(), "eps"_a, "rms"_a, "out"_a, "One row's norm.");
  m.def("rope", rope, "isa"_a, "x"_a, "dim"_a, "cos_sin"_a, "Rotate heads [heads, head_dim] in place.");
  m.def("glu", glu, "isa"_a, "gate"_a, "up"_a, "function"_a, "out"_a, "function(gate) * up.");
  m.def("activate", activate, "isa"_a, "x"_a, "function"_a, "out"_a, "function(x).");
  m.def("add", add, "isa"_a, "target"_a, "source"_a, "target += source.");
  m.def("scale_softcap", scale_softcap, "isa"_a, "x"_a, "scale"_a, "softcap"_a, "As for logits, in place.");
  m.def("argmax", argmax, "isa"_a, "x"_a, "The lowest index among the greatest; NaN never wins.");
  m.def("attend", attend, "isa"_a, "kv"_a, "queries"_a, "k"_a, "v"_a, "scale"_a, "window"_a, "softcap"_a,
        "tokens_per_call"_a, "splits_per_call"_a, "out"_a, "One kv head's attention of the last tokens over all keys.");
}

}  // namespace haomiao
