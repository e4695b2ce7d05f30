// Rowwise work between the linear layers: norms, rotary embedding, activations, residuals, argmax.
// One row (or one range of a row) per call; every result depends on that row alone. Sums run in 16 fixed lanes
// (lane = index % 16, lanes then added pairwise 8, 4, 2, 1), in every instruction set, so that bits agree across them.
#pragma once
#include <stdint.h>

namespace haomiao {

enum class ActivationFunction : uint32_t { silu = 0, gelu = 1, gelu_tanh = 2, relu = 3 };

// Outputs may be the same memory as inputs, element for element.
struct RowwiseKernels {
  const char* isa;
  void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int n, float eps,
                     float* out);  // bias may be null
  // rotate `heads` heads of head_dim at x in place; cos_sin is [dim/2] cosines then [dim/2] sines
  void (*rope)(float* x, int heads, int head_dim, int dim, const float* cos_sin);
  void (*glu)(const float* gate, const float* up, int n, ActivationFunction f, float* out);
  void (*activate)(const float* x, int n, ActivationFunction f, float* out);
  void (*add)(float* target, const float* source, int n);
  void (*scale_softcap)(float* x, int n, float scale, float softcap);  // softcap 0: none
  int32_t (*argmax)(const float* x, int n);  // the lowest index among the greatest; NaN never wins; 0 if all are NaN
};

// The kernels of one instruction set ("scalar", "avx2", "avx512", "avx512_bf16", "neon"), or nullptr if not compiled
// in; an operation without a file of its own for an isa returns the next lower one. rowwise/select.cc.
const RowwiseKernels* rowwise_kernels(const char* isa);

}  // namespace haomiao
