#include "runtime/plan.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace haomiao {
namespace {

constexpr int64_t kMostWidth = int64_t{1} << 24, kMostOps = 1 << 20, kMostLayers = 1 << 16;
constexpr int64_t kMostContext = int64_t{1} << 31;
constexpr int64_t kMostHeads = 4096, kMostHeadDim = 1024;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

void require(bool condition, const std::string& what) {
  if (!condition) refuse(what);
}

std::string quoted(const std::string& name) { return "'" + name + "'"; }

int checked(const char* what, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) {
    refuse(std::string(what) + " must be " + std::to_string(least) + " to " + std::to_string(most) + ", not " +
           std::to_string(value));
  }
  return static_cast<int>(value);
}

float finite(const char* what, float value) {
  require(std::isfinite(value), std::string(what) + " must be finite");
  return value;
}

float not_negative(const char* what, float value) {
  require(std::isfinite(value) && value >= 0, std::string(what) + " must not be negative");
  return value;
}

ActivationFunction function_of(const std::string& name) {
  if (name == "silu") return ActivationFunction::silu;
  if (name == "gelu") return ActivationFunction::gelu;
  if (name == "gelu_tanh") return ActivationFunction::gelu_tanh;
  require(name == "relu", "activation " + quoted(name) + " is unknown");
  return ActivationFunction::relu;
}

struct AccessVisitor {
  Access operator()(const EmbedOp& op) const { return {{}, {op.out}}; }
  Access operator()(const NormOp& op) const { return {{op.source}, {op.out}}; }
  Access operator()(const LinearOp& op) const { return {{op.source}, {op.out}}; }
  Access operator()(const HeadNormOp& op) const { return {{op.buffer}, {op.buffer}}; }
  Access operator()(const RopeOp& op) const { return {{op.buffer}, {op.buffer}}; }
  Access operator()(const AttentionOp& op) const { return {{op.qkv}, {op.out}}; }
  Access operator()(const AddOp& op) const { return {{op.target, op.source}, {op.target}}; }
  Access operator()(const GluOp& op) const { return {{op.source}, {op.out}}; }
  Access operator()(const ActivateOp& op) const { return {{op.source}, {op.out}}; }
  Access operator()(const HeadOp& op) const { return {{op.source}, {}}; }
};

bool contains(const std::vector<int>& list, int value) {
  return std::find(list.begin(), list.end(), value) != list.end();
}

}  // namespace

Access access_of(const Op& op) { return std::visit(AccessVisitor(), op); }

bool read_later(const Plan& plan, int buffer, size_t first) {
  for (size_t i = first; i < plan.ops.size(); ++i) {
    const Access access = access_of(plan.ops[i]);
    if (contains(access.reads, buffer)) return true;
    if (contains(access.writes, buffer)) return false;
  }
  return false;
}

PlanBuilder::PlanBuilder(int64_t vocab_size, int64_t max_context) {
  plan_.vocab_size = checked("vocab_size", vocab_size, 1, int64_t{1} << 28);
  checked("max_context", std::min(max_context, kMostContext - 1), 1, kMostContext);
  plan_.max_context = std::min(max_context, kMostContext);
}

// ---- what the operations refer to ---------------------------------------------------------------------------------

void PlanBuilder::layer(int64_t kv_heads, int64_t head_dim, int64_t window) {
  require(plan_.layers.size() < kMostLayers, "the plan has too many layers");
  plan_.layers.push_back({checked("kv_heads", kv_heads, 1, kMostHeads), checked("head_dim", head_dim, 1, kMostHeadDim),
                          checked("window", window, 0, INT32_MAX)});
  attended_.push_back(false);
}

void PlanBuilder::buffer(const std::string& name, int64_t width) {
  require(!name.empty() && buffers_.emplace(name, plan_.buffers.size()).second, "buffer " + quoted(name) + " twice");
  plan_.buffers.push_back({name, checked("a buffer's width", width, 1, kMostWidth)});
  written_.push_back(false);
}

void PlanBuilder::matrix(const std::string& name, const Weight& weight) {
  require(!name.empty() && matrices_.emplace(name, plan_.matrices.size()).second, "matrix " + quoted(name) + " twice");
  plan_.matrices.push_back({name, weight});
}

void PlanBuilder::vector(const std::string& name, const float* data, int64_t size) {
  require(!name.empty() && vectors_.emplace(name, plan_.vectors.size()).second, "vector " + quoted(name) + " twice");
  plan_.vectors.push_back({name, data, checked("a vector's size", size, 1, kMostWidth)});
}

void PlanBuilder::rope_table(int64_t dim, std::vector<float> inv_freq, float attention_factor) {
  const int even = checked("rope dim", dim, 2, kMostHeadDim);
  require(even % 2 == 0 && inv_freq.size() == static_cast<size_t>(even) / 2, "rope needs dim / 2 inverse frequencies");
  for (const float f : inv_freq) finite("an inverse frequency", f);
  plan_.ropes.push_back({even, std::move(inv_freq), finite("attention_factor", attention_factor)});
}

int PlanBuilder::find(const Names& names, const char* kind, const std::string& name) const {
  const auto found = names.find(name);
  require(found != names.end(), std::string("the plan names no ") + kind + " " + quoted(name));
  return found->second;
}

int PlanBuilder::vector_of(const std::string& name, int size) const {
  if (name.empty()) return kNone;
  const int index = find(vectors_, "vector", name), has = plan_.vectors[static_cast<size_t>(index)].size;
  require(has == size, "vector " + quoted(name) + " has " + std::to_string(has) + " elements where " +
                           std::to_string(size) + " are needed");
  return index;
}

int PlanBuilder::readable(const std::string& name) const {
  const int index = find(buffers_, "buffer", name);
  require(written_[static_cast<size_t>(index)], "buffer " + quoted(name) + " is read before anything is in it");
  return index;
}

int PlanBuilder::writable(const std::string& name) {
  const int index = find(buffers_, "buffer", name);
  written_[static_cast<size_t>(index)] = true;
  return index;
}

void PlanBuilder::section(int buffer, int64_t offset, int64_t heads, int64_t head_dim) const {
  checked("heads", heads, 1, kMostHeads);
  checked("head_dim", head_dim, 1, kMostHeadDim);
  require(offset >= 0 && offset <= kMostWidth && offset + heads * head_dim <= width(buffer),
          "heads lie outside buffer " + quoted(plan_.buffers[static_cast<size_t>(buffer)].name));
}

void PlanBuilder::push(Op op) {
  require(plan_.ops.size() < kMostOps, "the plan has too many operations");
  require(plan_.ops.empty() || !std::holds_alternative<HeadOp>(plan_.ops.back()), "an operation follows the head");
  plan_.ops.push_back(op);
}

// ---- operations -----------------------------------------------------------------------------------------------------

void PlanBuilder::embed(const std::string& out, const std::string& table, float scale, const std::string& positions) {
  const int target = writable(out), matrix = find(matrices_, "matrix", table);
  const int added = positions.empty() ? kNone : find(matrices_, "matrix", positions);
  const Weight& rows = plan_.matrices[static_cast<size_t>(matrix)].weight;
  require(rows.cols == width(target), "embedding " + quoted(table) + " is not as wide as buffer " + quoted(out));
  require(rows.rows >= plan_.vocab_size, "embedding " + quoted(table) + " has fewer rows than the vocabulary");
  if (added != kNone) {
    const Weight& more = plan_.matrices[static_cast<size_t>(added)].weight;
    require(more.cols == width(target), "positions " + quoted(positions) + " are not as wide as buffer " + quoted(out));
    plan_.max_context = std::min<int64_t>(plan_.max_context, more.rows);
  }
  push(EmbedOp{target, matrix, finite("scale", scale), added});
}

void PlanBuilder::norm(const std::string& out, const std::string& source, const std::string& weight, float eps,
                       const std::string& kind, const std::string& bias) {
  require(kind == "rms" || kind == "layer", "norm kind " + quoted(kind) + " is unknown");
  require(kind == "layer" || bias.empty(), "an rms norm has no bias");
  const int from = readable(source), to = writable(out), n = width(from);
  require(width(to) == n, "norm: buffers " + quoted(source) + " and " + quoted(out) + " differ in width");
  require(!weight.empty(), "a norm needs a weight");
  push(NormOp{to, from, vector_of(weight, n), vector_of(bias, n), not_negative("eps", eps), kind == "rms"});
}

void PlanBuilder::linear(const std::string& out, const std::string& source, const std::string& weight,
                         const std::string& bias) {
  const int from = readable(source), to = writable(out), matrix = find(matrices_, "matrix", weight);
  const Weight& w = plan_.matrices[static_cast<size_t>(matrix)].weight;
  require(from != to, "linear " + quoted(weight) + " writes the buffer that it reads");
  require(w.cols == width(from) && w.rows == width(to),
          "matrix " + quoted(weight) + " is [" + std::to_string(w.rows) + ", " + std::to_string(w.cols) +
              "] between buffers of " + std::to_string(width(from)) + " and " + std::to_string(width(to)));
  push(LinearOp{to, from, matrix, vector_of(bias, w.rows)});
}

void PlanBuilder::head_norm(const std::string& buffer, int64_t offset, int64_t heads, int64_t head_dim,
                            const std::string& weight, float eps) {
  const int index = readable(buffer);
  section(index, offset, heads, head_dim);
  require(!weight.empty(), "a head norm needs a weight");
  const int n = static_cast<int>(head_dim);
  push(HeadNormOp{index, static_cast<int>(offset), static_cast<int>(heads), n, vector_of(weight, n),
                  not_negative("eps", eps)});
}

void PlanBuilder::rope(const std::string& buffer, int64_t offset, int64_t heads, int64_t head_dim, int64_t rope) {
  const int index = readable(buffer);
  section(index, offset, heads, head_dim);
  require(rope >= 0 && rope < static_cast<int64_t>(plan_.ropes.size()), "the plan has no such rope");
  require(plan_.ropes[static_cast<size_t>(rope)].dim <= head_dim, "rope rotates more than a head");
  push(RopeOp{index, static_cast<int>(offset), static_cast<int>(heads), static_cast<int>(head_dim),
              static_cast<int>(rope)});
}

void PlanBuilder::attention(const std::string& out, const std::string& qkv, int64_t layer, int64_t heads,
                            int64_t kv_heads, int64_t head_dim, int64_t k_offset, int64_t v_offset, float scale,
                            int64_t window, float softcap) {
  const int from = readable(qkv), to = writable(out);
  require(from != to, "attention writes the buffer that it reads");
  require(layer >= 0 && layer < static_cast<int64_t>(plan_.layers.size()),
          "attention: the plan has no layer " + std::to_string(layer));
  const Layer& known = plan_.layers[static_cast<size_t>(layer)];
  require(!attended_[static_cast<size_t>(layer)], "layer " + std::to_string(layer) + " attends twice");
  attended_[static_cast<size_t>(layer)] = true;
  section(from, 0, heads, head_dim);
  section(from, k_offset, kv_heads, head_dim);
  section(from, v_offset, kv_heads, head_dim);
  require(kv_heads == known.kv_heads && head_dim == known.head_dim && window == known.window,
          "attention of layer " + std::to_string(layer) + " contradicts the plan's layer");
  require(k_offset % head_dim == 0 && v_offset % head_dim == 0, "attention: k and v must begin at whole heads");
  require(heads % kv_heads == 0, "attention heads must be a multiple of kv heads");
  require(width(to) == heads * head_dim, "attention's output is not heads * head_dim wide");
  push(AttentionOp{to, from, static_cast<int>(layer), static_cast<int>(heads), static_cast<int>(kv_heads),
                   static_cast<int>(head_dim), static_cast<int>(k_offset), static_cast<int>(v_offset),
                   finite("scale", scale), static_cast<int>(window), not_negative("softcap", softcap)});
}

void PlanBuilder::add(const std::string& target, const std::string& source) {
  const int from = readable(source), to = readable(target);
  require(width(from) == width(to), "add: buffers " + quoted(target) + " and " + quoted(source) + " differ in width");
  push(AddOp{to, from});
}

void PlanBuilder::glu(const std::string& out, const std::string& source, const std::string& function) {
  const int from = readable(source), to = writable(out);
  require(from != to, "glu writes the buffer that it reads");
  require(width(from) % 64 == 0 && (width(to) + 31) / 32 == width(from) / 64,
          "glu: buffer " + quoted(source) + " is not two tile-interleaved halves of " + quoted(out));
  push(GluOp{to, from, function_of(function)});
}

void PlanBuilder::activate(const std::string& out, const std::string& source, const std::string& function) {
  const int from = readable(source), to = writable(out);
  require(width(from) == width(to), "activate: buffers " + quoted(source) + " and " + quoted(out) + " differ in width");
  push(ActivateOp{to, from, function_of(function)});
}

void PlanBuilder::head(const std::string& source, const std::string& weight, const std::string& bias, float scale,
                       float softcap) {
  const int from = readable(source), matrix = find(matrices_, "matrix", weight);
  const Weight& w = plan_.matrices[static_cast<size_t>(matrix)].weight;
  require(w.cols == width(from) && w.rows == plan_.vocab_size,
          "head " + quoted(weight) + " does not lead from buffer " + quoted(source) + " to the vocabulary");
  push(HeadOp{from, matrix, vector_of(bias, w.rows), finite("scale", scale), not_negative("softcap", softcap)});
}

Plan PlanBuilder::finish() {
  require(!plan_.ops.empty() && std::holds_alternative<HeadOp>(plan_.ops.back()), "the plan does not end with a head");
  for (size_t layer = 0; layer < attended_.size(); ++layer) {
    require(attended_[layer], "layer " + std::to_string(layer) + " never attends");
  }
  return std::move(plan_);
}

}  // namespace haomiao
