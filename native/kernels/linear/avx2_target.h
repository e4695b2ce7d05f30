// What the AVX2 kernels share: where results go, and how prepared activations of the int points lie. Included by
// avx2.cc and its parts only.
#pragma once
#include <immintrin.h>

#include "kernels/linear/layout.h"

#define HAOMIAO_INLINE inline __attribute__((always_inline))
#define HAOMIAO_UNROLL _Pragma("GCC unroll 16")

namespace haomiao {
namespace {

constexpr int kLanes = 8, kOctets = kTileRows / kLanes;

HAOMIAO_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
HAOMIAO_INLINE void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
HAOMIAO_INLINE __m256i broadcast_dword(const void* p) {
  int32_t value;
  memcpy(&value, p, 4);
  return _mm256_set1_epi32(value);
}
HAOMIAO_INLINE __m256 broadcast_float(const void* p) { return _mm256_broadcast_ss(static_cast<const float*>(p)); }

// The results of one tile.
struct Target {
  float* y;  // of the first token and row of the tile
  int64_t stride;
  const float* bias;  // of the tile's rows, or nullptr
  int rows;           // rows that exist

  // Rows 8 * octet.. of one token.
  HAOMIAO_INLINE void store(int token, int octet, __m256 value) const {
    const int row = octet * kLanes, count = rows - row;
    float* out = y + token * stride + row;
    if (count >= kLanes) {
      if (bias) value = _mm256_add_ps(value, _mm256_loadu_ps(bias + row));
      _mm256_storeu_ps(out, value);
      return;
    }
    float lanes[kLanes];
    _mm256_storeu_ps(lanes, value);
    for (int i = 0; i < count; ++i) out[i] = bias ? lanes[i] + bias[row + i] : lanes[i];
  }
};

HAOMIAO_INLINE Target target_of(const LinearCall& call, int tile, int token) {
  const int row = tile * kTileRows, left = call.weight->rows - row;
  return {call.out + token * call.out_stride + row, call.out_stride, call.bias ? call.bias + row : nullptr,
          left < kTileRows ? left : kTileRows};
}

// Rows become columns.
HAOMIAO_INLINE void transpose(__m256 v[kLanes]) {
  __m256 pairs[kLanes], quads[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    for (int k = 0; k < 2; ++k) {
      quads[i + 2 * k] = _mm256_shuffle_ps(pairs[i + k], pairs[i + 2 + k], 0x44);
      quads[i + 2 * k + 1] = _mm256_shuffle_ps(pairs[i + k], pairs[i + 2 + k], 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

// ---- activations of the int points ----------------------------------------------------------------------------------
//
// T tokens side by side, group after group of 32 columns. A step's tokens stand in blocks of 8; fewer that are left
// over stand in blocks of up to 4. Codes lie there twice: as bytes for vpmaddubsw, and as words for vpmaddwd, columns
// 4k, 4k + 2 of all quads k first, then columns 4k + 1, 4k + 3.

constexpr int kWide = 8, kNarrow = 4;

template <int T>
struct ActivationBlock {
  int32_t bytes[8][T];     // [quad]: 4 codes
  int32_t words[2][8][T];  // [parity][quad]: 2 codes; of up to 4 tokens the odd ones minus 256 times the even ones
  int32_t zero8[T];        // two words: -8 * (sum of the codes that vpmaddubsw adds to the lower, to the upper word)
  int32_t zero128[T], zero136[T];  // of up to 4 tokens: minus 128 or 136 * (even codes), 0 or 8 * (odd codes), summed
  float scale[T];
};

constexpr int64_t round_up_to_line(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Bytes between two blocks of 8 tokens. Eight of them are read side by side: a stride of 14 cache lines more than a
// multiple of 4 KiB keeps them out of each other's way in the first cache.
HAOMIAO_INLINE int64_t wide_stride(int padded_cols) {
  constexpr int64_t page = 4096, block = sizeof(ActivationBlock<kWide>);
  static_assert(block == 14 * 64);
  const int64_t bytes = padded_cols / kGroup * block;
  return bytes + ((block - bytes) % page + page) % page;
}

// Bytes of `tokens` prepared tokens; where `tokens` is a multiple of 4, also where the block that follows them begins.
HAOMIAO_INLINE int64_t int_activation_bytes(int tokens, int padded_cols) {
  const int rest = tokens % kWide, groups = padded_cols / kGroup;
  int64_t bytes = tokens / kWide * wide_stride(padded_cols);
  for (int done = 0; done < rest; done += kNarrow) {
    const int count = rest - done < kNarrow ? rest - done : kNarrow;
    bytes += round_up_to_line(int64_t{groups} * count * static_cast<int64_t>(sizeof(ActivationBlock<1>)));
  }
  return bytes;
}

}  // namespace
}  // namespace haomiao
