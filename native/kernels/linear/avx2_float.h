// Float points of AVX2. Included by avx2.cc only. Activations are f32 [tokens][padded_cols] at either kind: bf16 was
// rounded before, so that a broadcast needs no conversion. A register holds 8 rows. Columns are
// taken in parts that stay in the first cache while all tokens of a panel pass; what a part added up to waits in
// `scratch`.
#pragma once
#include "kernels/linear/avx2_target.h"

namespace haomiao {
namespace {

// Tokens that share one pass, and up to how many of them a pass takes all rows of a tile at once, not half of them: as
// many sums as the registers hold beside the weights, which for bf16 need two registers.
template <Encoding E>
constexpr int kMostFloat = E == Encoding::f32 ? 3 : 4;
template <Encoding E>
constexpr int kWholeTile = E == Encoding::f32 ? 3 : 2;

constexpr int kPanelTokens = 192;       // a multiple of both
constexpr int kFloatPartBytes = 16384;  // of weights; every column has 64 or 128

constexpr int column_bytes(Encoding e) { return e == Encoding::f32 ? kTileRows * 4 : kTileRows * 2; }

alignas(32) constexpr uint32_t kUpperHalves[kLanes] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                                       0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};

// Weights of one column (f32), or of one of a pair (bf16), rows 8 * octet...
template <Encoding E>
HAOMIAO_INLINE __m256 load_weights(const uint8_t* columns, int odd, int octet) {
  if constexpr (E == Encoding::f32) {
    return _mm256_castsi256_ps(load(columns + odd * 128 + octet * 32));
  } else {
    __m256i pair = load(columns + octet * 32);
    if (!odd) return _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
    __asm__("vpand %1, %0, %0" : "+x"(pair) : "m"(kUpperHalves));  // from memory: sums and values need all registers
    return _mm256_castsi256_ps(pair);
  }
}

template <Encoding E, int M, int R>
HAOMIAO_INLINE void add_column(const uint8_t* columns, int odd, const float* x, int64_t stride, __m256 y[M][R]) {
  __m256 value[M];
  HAOMIAO_UNROLL
  for (int m = 0; m < M; ++m) value[m] = broadcast_float(x + m * stride + odd);
  HAOMIAO_UNROLL
  for (int r = 0; r < R; ++r) {
    const __m256 w = load_weights<E>(columns, odd, r);
    HAOMIAO_UNROLL
    for (int m = 0; m < M; ++m) y[m][r] = _mm256_fmadd_ps(w, value[m], y[m][r]);
  }
}

struct ColumnRange {
  int begin, end;
  bool first, last;  // of the tile
};

// Columns of a range, which begins at an even one and ends at an even or the last one, and R octets of rows that start
// at `octet`, for M tokens. y[m][r] is stored in `sums` [M][32 rows] or, if the range is the last, in the target.
template <Encoding E, int M, int R>
HAOMIAO_INLINE void multiply_octets(const uint8_t* columns, const ColumnRange& range, int octet, const float* x,
                                    int64_t stride, float* sums, const Target& target) {
  __m256 y[M][R];
  sums += octet * kLanes;
  HAOMIAO_UNROLL
  for (int m = 0; m < M; ++m) {
    HAOMIAO_UNROLL
    for (int r = 0; r < R; ++r) {
      y[m][r] = range.first ? _mm256_setzero_ps() : _mm256_load_ps(sums + m * kTileRows + r * kLanes);
    }
  }
  columns += int64_t{range.begin} * column_bytes(E) + octet * 32;
  x += range.begin;
  int column = range.begin;
  for (; column + 2 <= range.end; column += 2, x += 2, columns += 2 * column_bytes(E)) {
    add_column<E, M, R>(columns, 0, x, stride, y);
    __asm__("" : "+r"(columns));  // or the compiler keeps the pairs of the first column, on the stack, for the second
    add_column<E, M, R>(columns, 1, x, stride, y);
  }
  if (column < range.end) add_column<E, M, R>(columns, 0, x, stride, y);  // f32 only: bf16 has pairs of columns
  HAOMIAO_UNROLL
  for (int m = 0; m < M; ++m) {
    HAOMIAO_UNROLL
    for (int r = 0; r < R; ++r) {
      if (range.last) {
        target.store(m, octet + r, y[m][r]);
      } else {
        _mm256_store_ps(sums + m * kTileRows + r * kLanes, y[m][r]);
      }
    }
  }
}

template <Encoding E, int M>
void multiply_columns(const uint8_t* tile, const ColumnRange& range, const float* x, int64_t stride, float* sums,
                      const Target& target) {
  constexpr int R = M <= kWholeTile<E> ? kOctets : kOctets / 2;
  for (int octet = 0; octet < kOctets; octet += R) {
    multiply_octets<E, M, R>(tile, range, octet, x, stride, sums, target);
  }
}

template <Encoding E>
void linear_float(const LinearCall& call) {
  constexpr decltype(&multiply_columns<E, 1>) kernels[] = {multiply_columns<E, 1>, multiply_columns<E, 2>,
                                                           multiply_columns<E, 3>, multiply_columns<E, 4>};
  const Weight& w = *call.weight;
  const int64_t stride = w.padded_cols;
  const int part = call.tokens <= kWholeTile<E> ? w.padded_cols : kFloatPartBytes / column_bytes(E);
  float* sums = static_cast<float*>(call.scratch);
  for (int index = call.tile_begin; index < call.tile_end; ++index) {
    for (int first = 0; first < call.tokens; first += kPanelTokens) {
      const int panel = call.tokens - first < kPanelTokens ? call.tokens - first : kPanelTokens;
      for (int begin = 0; begin < w.padded_cols; begin += part) {
        const int end = w.padded_cols - begin < part ? w.padded_cols : begin + part;
        const ColumnRange range = {begin, end, begin == 0, end == w.padded_cols};
        int passes = (panel + kMostFloat<E> - 1) / kMostFloat<E>;
        for (int token = 0, count; token < panel; token += count, --passes) {
          count = (panel - token + passes - 1) / passes;
          kernels[count - 1](w.hi + index * w.hi_tile_bytes, range,
                             static_cast<const float*>(call.activations) + (first + token) * stride, stride,
                             sums + token * kTileRows, target_of(call, index, first + token));
        }
      }
    }
  }
}

HAOMIAO_INLINE size_t float_scratch_bytes(int tokens) {
  return tokens <= 2 ? 0 : sizeof(float) * kTileRows * kPanelTokens;
}

}  // namespace
}  // namespace haomiao
