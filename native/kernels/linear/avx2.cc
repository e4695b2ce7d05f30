// Linear kernels for AVX2 with FMA and F16C: what is done where. One register holds 8 rows or 8 tokens.
#include "kernels/linear/avx2_float.h"
#include "kernels/linear/avx2_int.h"
#include "kernels/linear/avx2_prepare.h"
#include "kernels/linear/tables.h"

namespace haomiao {
namespace {

void linear(const LinearCall& call) {
  const Weight& w = *call.weight;
  switch (w.encoding) {
    case Encoding::f32:
      return linear_float<Encoding::f32>(call);
    case Encoding::bf16:
      return linear_float<Encoding::bf16>(call);
    case Encoding::int8:
      return linear_int<Form::bytes>(call);
    case Encoding::planes:
      if (!reads_both(call)) return linear_int<Form::hi>(call);
      if (w.lo_shift == 4) return linear_int<Form::both>(call);
      return linear_int<Form::shifted>(call);
  }
}

size_t scratch_bytes(const Weight& weight, int tokens) {
  const bool scaled = weight.encoding == Encoding::int8 || weight.encoding == Encoding::planes;
  return scaled ? int_scratch_bytes(tokens) : float_scratch_bytes(tokens);
}

size_t activation_bytes(Activation kind, int tokens, int padded_cols) {
  if (kind == Activation::int8) return static_cast<size_t>(int_activation_bytes(tokens, padded_cols));
  return sizeof(float) * static_cast<size_t>(tokens) * static_cast<size_t>(padded_cols);
}

void prepare(Activation kind, const float* x, int64_t stride, int, int first, int last, int cols, int padded_cols,
             void* out) {
  if (kind == Activation::int8) {
    prepare_int(x, stride, first, last, cols, padded_cols, static_cast<uint8_t*>(out));
  } else {
    prepare_float(kind, x, stride, first, last, cols, padded_cols, static_cast<float*>(out));
  }
}

void read_row(const Weight& weight, int32_t row, float* out) { kScalarLinear.read_row(weight, row, out); }

}  // namespace

const LinearKernels kAvx2Linear = {"avx2", activation_bytes, prepare, scratch_bytes, linear, read_row};

}  // namespace haomiao
