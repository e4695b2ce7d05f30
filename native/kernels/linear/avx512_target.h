// What AVX-512 kernels share: dot products, and where results go. Included by the avx512*.cc files only.
#pragma once
#include <immintrin.h>

#include "kernels/linear/layout.h"

#define HAOMIAO_INLINE inline __attribute__((always_inline))
#define HAOMIAO_UNROLL _Pragma("GCC unroll 16")

namespace haomiao {
namespace {

#ifdef HAOMIAO_EMULATE_AVX512
HAOMIAO_INLINE void add_dot(__m512i& sum, __m512i u, __m512i s) { emulated::dpbusd(sum, u, s); }
HAOMIAO_INLINE void add_pair(__m512& sum, __m512i a, __m512i b) { emulated::dpbf16(sum, a, b); }
#else
// Dot products as assembly: gcc 12 copies and spills the accumulators of the intrinsics.
HAOMIAO_INLINE void add_dot(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}
HAOMIAO_INLINE void add_pair(__m512& sum, __m512i a, __m512i b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
#endif

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
