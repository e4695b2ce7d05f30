// Where AVX-512 kernels put their results. Included by the avx512*.cc files only.
#pragma once
#include <immintrin.h>

#include "kernels/linear/layout.h"

#define HAOMIAO_INLINE inline __attribute__((always_inline))
#define HAOMIAO_UNROLL _Pragma("GCC unroll 16")

namespace haomiao {
namespace {

// The results of one tile.
struct Target {
  float* y;  // of the first token and row of the tile
  int64_t stride;
  const float* bias;  // of the tile's rows, or nullptr
  __mmask16 rows[2];  // rows that exist

  HAOMIAO_INLINE void store(int token, int half, __m512 value) const {
    if (bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(rows[half], bias + half * 16));
    _mm512_mask_storeu_ps(y + token * stride + half * 16, rows[half], value);
  }
};

HAOMIAO_INLINE Target target_of(const LinearCall& call, int tile, int token) {
  const int row = tile * kTileRows, left = call.weight->rows - row;
  const uint32_t rows = left >= kTileRows ? 0xffffffffu : (1u << left) - 1u;
  return {call.out + token * call.out_stride + row,
          call.out_stride,
          call.bias ? call.bias + row : nullptr,
          {static_cast<__mmask16>(rows), static_cast<__mmask16>(rows >> 16)}};
}

}  // namespace
}  // namespace haomiao
