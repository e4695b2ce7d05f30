// The plan as the runner reads it: names resolved to indices, every width and shape checked (models/plan.py states what
// each operation computes). Knows nothing about phases, threads or batches.
#pragma once
#include <cstdint>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "kernels/linear/linear.h"
#include "kernels/rowwise/rowwise.h"

namespace haomiao {

// Buffers, matrices, vectors and ropes are named by their index; kNone where there is none.
inline constexpr int kNone = -1;

struct EmbedOp {
  int out, table;
  float scale;
  int positions;  // matrix or kNone
};
struct NormOp {
  int out, source, weight, bias;  // bias: vector or kNone
  float eps;
  bool rms;
};
struct LinearOp {
  int out, source, weight, bias;
};
struct HeadNormOp {
  int buffer, offset, heads, head_dim, weight;
  float eps;
};
struct RopeOp {
  int buffer, offset, heads, head_dim, rope;
};
struct AttentionOp {
  int out, qkv, layer, heads, kv_heads, head_dim, k_offset, v_offset;
  float scale;
  int window;
  float softcap;
};
struct AddOp {
  int target, source;
};
struct GluOp {
  int out, source;
  ActivationFunction function;
};
struct ActivateOp {
  int out, source;
  ActivationFunction function;
};
struct HeadOp {
  int source, weight, bias;
  float scale, softcap;
};

using Op = std::variant<EmbedOp, NormOp, LinearOp, HeadNormOp, RopeOp, AttentionOp, AddOp, GluOp, ActivateOp, HeadOp>;

struct Buffer {
  std::string name;
  int width;
};
struct Matrix {
  std::string name;
  Weight weight;
};
struct Vector {
  std::string name;
  const float* data;
  int size;
};
struct Rope {
  int dim;
  std::vector<float> inv_freq;  // [dim / 2]
  float attention_factor;
};
struct Layer {
  int kv_heads, head_dim, window;
};

struct Plan {
  int vocab_size = 0;
  int64_t max_context = 0;
  std::vector<Layer> layers;
  std::vector<Buffer> buffers;
  std::vector<Matrix> matrices;
  std::vector<Vector> vectors;
  std::vector<Rope> ropes;
  std::vector<Op> ops;
};

// Buffers that an operation reads and writes; an operation in place does both.
struct Access {
  std::vector<int> reads, writes;
};
Access access_of(const Op& op);

// True if some operation from `first` on reads `buffer` before another overwrites all of it.
bool read_later(const Plan& plan, int buffer, size_t first);

// Builds a plan from names. Every method throws std::invalid_argument with one line if what it is told contradicts
// itself or what came before; pointers must outlive the plan.
class PlanBuilder {
 public:
  PlanBuilder(int64_t vocab_size, int64_t max_context);
  void layer(int64_t kv_heads, int64_t head_dim, int64_t window);
  void buffer(const std::string& name, int64_t width);
  void matrix(const std::string& name, const Weight& weight);
  void vector(const std::string& name, const float* data, int64_t size);
  void rope_table(int64_t dim, std::vector<float> inv_freq, float attention_factor);

  void embed(const std::string& out, const std::string& table, float scale, const std::string& positions);
  void norm(const std::string& out, const std::string& source, const std::string& weight, float eps,
            const std::string& kind, const std::string& bias);
  void linear(const std::string& out, const std::string& source, const std::string& weight, const std::string& bias);
  void head_norm(const std::string& buffer, int64_t offset, int64_t heads, int64_t head_dim, const std::string& weight,
                 float eps);
  void rope(const std::string& buffer, int64_t offset, int64_t heads, int64_t head_dim, int64_t rope);
  void attention(const std::string& out, const std::string& qkv, int64_t layer, int64_t heads, int64_t kv_heads,
                 int64_t head_dim, int64_t k_offset, int64_t v_offset, float scale, int64_t window, float softcap);
  void add(const std::string& target, const std::string& source);
  void glu(const std::string& out, const std::string& source, const std::string& function);
  void activate(const std::string& out, const std::string& source, const std::string& function);
  void head(const std::string& source, const std::string& weight, const std::string& bias, float scale, float softcap);

  Plan finish();  // checks the whole; the builder is spent

 private:
  using Names = std::unordered_map<std::string, int>;
  int find(const Names& names, const char* kind, const std::string& name) const;
  int vector_of(const std::string& name, int size) const;  // kNone for the empty name
  int readable(const std::string& name) const;             // a buffer that something has written
  int writable(const std::string& name);
  int width(int buffer) const { return plan_.buffers[static_cast<size_t>(buffer)].width; }
  void section(int buffer, int64_t offset, int64_t heads, int64_t head_dim) const;
  void push(Op op);

  Plan plan_;
  Names buffers_, matrices_, vectors_;
  std::vector<bool> written_, attended_;
};

}  // namespace haomiao
