// bf16 weights times bf16 activations with the AVX-512 BF16 dot product, which adds pairs of columns in its own way
// (docs/ARCHITECTURE.md, section 6). Everything else is avx512.cc.
#include "kernels/linear/avx512_target.h"
#include "kernels/linear/tables.h"

namespace haomiao {
namespace {

constexpr int kMostShared = 12;  // tokens that share one pass over a tile: 24 accumulators

template <int M>
void multiply_tile(const uint8_t* tile, int pairs, const uint8_t* x, size_t stride, const Target& target) {
  __m512 y[M][2];
  HAOMIAO_UNROLL
  for (int m = 0; m < M; ++m) y[m][0] = y[m][1] = _mm512_setzero_ps();
  for (int pair = 0; pair < pairs; ++pair, tile += 128, x += 4) {
    const __m512i upper = _mm512_loadu_si512(tile), lower = _mm512_loadu_si512(tile + 64);
    HAOMIAO_UNROLL
    for (int m = 0; m < M; ++m) {
      int32_t two;
      memcpy(&two, x + m * stride, 4);
      const __m512i value = _mm512_set1_epi32(two);
      add_pair(y[m][0], upper, value);
      add_pair(y[m][1], lower, value);
    }
  }
  HAOMIAO_UNROLL
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < 2; ++r) target.store(m, r, y[m][r]);
  }
}

constexpr decltype(&multiply_tile<1>) kMultiply[] = {
    multiply_tile<1>, multiply_tile<2>, multiply_tile<3>, multiply_tile<4>,  multiply_tile<5>,  multiply_tile<6>,
    multiply_tile<7>, multiply_tile<8>, multiply_tile<9>, multiply_tile<10>, multiply_tile<11>, multiply_tile<12>};

void linear(const LinearCall& call) {
  const Weight& w = *call.weight;
  if (w.encoding != Encoding::bf16 || call.activation != Activation::bf16) {
    kAvx512Linear.linear(call);
    return;
  }
  const size_t stride = activation_stride(Activation::bf16, w.padded_cols);
  const uint8_t* x = static_cast<const uint8_t*>(call.activations);
  for (int tile = call.tile_begin; tile < call.tile_end; ++tile) {
    int passes = (call.tokens + kMostShared - 1) / kMostShared;
    for (int token = 0, count; token < call.tokens; token += count, --passes) {
      count = (call.tokens - token + passes - 1) / passes;
      kMultiply[count - 1](w.hi + tile * w.hi_tile_bytes, w.padded_cols / 2, x + token * stride, stride,
                           target_of(call, tile, token));
    }
  }
}

size_t activation_bytes(Activation kind, int tokens, int padded_cols) {
  return kAvx512Linear.activation_bytes(kind, tokens, padded_cols);
}

void prepare(Activation kind, const float* x, int64_t stride, int tokens, int first, int last, int cols,
             int padded_cols, void* out) {
  kAvx512Linear.prepare(kind, x, stride, tokens, first, last, cols, padded_cols, out);
}

size_t scratch_bytes(const Weight& weight, int tokens) { return kAvx512Linear.scratch_bytes(weight, tokens); }

void read_row(const Weight& weight, int32_t row, float* out) { kAvx512Linear.read_row(weight, row, out); }

}  // namespace

const LinearKernels kAvx512Bf16Linear = {"avx512_bf16", activation_bytes, prepare, scratch_bytes, linear, read_row};

}  // namespace haomiao
