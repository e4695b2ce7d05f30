// From a plan to phases: [prologue | one partitioned operation | epilogue], one barrier after each. Five for the usual
// layer: norm + QKV + rope and KV write | attention | output + residual | norm + gate/up + activation | down +
// residual. What no rule fuses runs as rowwise work over tokens. Knows nothing about threads' work or memory.
#pragma once
#include <string>
#include <variant>
#include <vector>

#include "runtime/plan.h"

namespace haomiao {

// What is done to one run of heads of a buffer, in place: a norm (rope is kNone) or a rotation.
struct HeadTransform {
  int first_head, heads;
  int weight;  // vector, or kNone
  float eps;
  int rope;  // or kNone
};

// Everything between a layer's QKV and its attention: transforms of heads, in order, then K and V are written.
struct HeadWork {
  AttentionOp attention;
  std::vector<HeadTransform> transforms;

  int first_key_head() const { return attention.k_offset / attention.head_dim; }
  int first_value_head() const { return attention.v_offset / attention.head_dim; }
};

enum class Epilogue { none, add, glu, activate, heads };

struct RowwisePhase {
  std::vector<Op> ops;  // embed, norm, add, glu, activate, head_norm, rope: each token by itself
};
struct LinearPhase {
  LinearOp linear;
  int norm_source, normed_by;  // the buffer that is normed first and the index of the NormOp in the plan, or kNone
  Epilogue epilogue;
  int target;  // what the epilogue writes; linear.out where there is none
  ActivationFunction function;
  int unit;  // tiles that one thread must own together
  HeadWork work;
};
struct HeadsPhase {
  HeadWork work;
};
struct AttentionPhase {
  AttentionOp attention;
};
struct LogitsPhase {
  HeadOp head;
  int norm_source, normed_by;
};

struct Phase {
  std::string name;
  std::variant<RowwisePhase, LinearPhase, HeadsPhase, AttentionPhase, LogitsPhase> work;
};

// `threads` decides only whether QKV may be divided by heads without leaving a thread idle.
std::vector<Phase> lower(const Plan& plan, int threads);

}  // namespace haomiao
