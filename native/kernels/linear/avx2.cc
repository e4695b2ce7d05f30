// Linear kernels for AVX2 with FMA and F16C. One register holds 8 rows; half a tile (16 rows) is worked on at once.
//
// Int points: the byte products of vpmaddubsw saturate at 16 bits, so codes are multiplied as unsigned nibbles, one or
// two planes of them. 32 columns of 15 * 127 fit 16 bits: sums are widened once per block, and are exact.
#include <immintrin.h>

#include "kernels/linear/layout.h"
#include "kernels/linear/tables.h"

#define HAOMIAO_INLINE inline __attribute__((always_inline))
#define HAOMIAO_UNROLL _Pragma("GCC unroll 8")

namespace haomiao {
namespace {

constexpr int kLanes = 8;

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

Target target_of(const LinearCall& call, int tile, int token) {
  const int row = tile * kTileRows, left = call.weight->rows - row;
  return {call.out + token * call.out_stride + row, call.out_stride, call.bias ? call.bias + row : nullptr,
          left < kTileRows ? left : kTileRows};
}

HAOMIAO_INLINE __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// ---- int points -----------------------------------------------------------------------------------------------------

enum class Form { hi, both, bytes };

constexpr int planes_of(Form f) { return f == Form::hi ? 1 : 2; }
constexpr int most_shared(Form f) { return f == Form::hi ? 4 : 2; }  // 8 accumulators
constexpr int block_bytes(Form f) { return f == Form::bytes ? kByteBytes : kNibbleBytes; }

struct Tile {
  const uint8_t *hi, *lo;
  int blocks, blocks_per_scale;
  int shift;  // of the upper plane against the lower: lo_shift, or 4 for bytes
};

// Nibbles of columns 4 * quad.. and rows 16 * r + 8 * v..: plane 0 is the upper or only one.
template <Form F>
HAOMIAO_INLINE void load_nibbles(const uint8_t* hi, const uint8_t* lo, int quad, int r, int v,
                                 __m256i nibbles[planes_of(F)]) {
  const __m256i low = _mm256_set1_epi8(15);
  if constexpr (F == Form::bytes) {
    const __m256i u = load(hi + quad * 128 + r * 64 + v * 32);
    nibbles[0] = _mm256_and_si256(_mm256_srli_epi16(u, 4), low);
    nibbles[1] = _mm256_and_si256(u, low);
    return;
  }
  for (int p = 0; p < planes_of(F); ++p) {
    const __m256i pair = load((p == 0 ? hi : lo) + (quad / 2 * 2 + r) * 64 + v * 32);
    nibbles[p] = _mm256_and_si256(quad % 2 ? _mm256_srli_epi16(pair, 4) : pair, low);
  }
}

HAOMIAO_INLINE const ActivationGroup& group_at(const uint8_t* x, size_t bytes) {
  return *reinterpret_cast<const ActivationGroup*>(x + bytes);
}

template <Form F>
HAOMIAO_INLINE int32_t correction(const ActivationGroup& x, int shift) {
  if constexpr (F == Form::bytes) return x.correction[kZero128];
  if constexpr (F == Form::hi) return x.correction[kZero8];
  return x.correction[kZero8] * ((1 << shift) + 1);
}

// One block of 32 columns, rows 16 * r..16 * r + 15, for M tokens `stride` bytes apart: y[m][v] += scale * sum.
template <Form F, int M>
HAOMIAO_INLINE void add_block(const uint8_t* hi, const uint8_t* lo, int r, int shift, const __m256 scale[2],
                              const uint8_t* x, size_t stride, __m256 y[M][4]) {
  __asm__("" : "+r"(x));  // or the compiler keeps all broadcasts of one half tile, on the stack, for the other
  constexpr int kPlanes = planes_of(F);
  __m256i sum[kPlanes][M][2];
  HAOMIAO_UNROLL
  for (int p = 0; p < kPlanes; ++p) {
    HAOMIAO_UNROLL
    for (int m = 0; m < M; ++m) sum[p][m][0] = sum[p][m][1] = _mm256_setzero_si256();
  }
  HAOMIAO_UNROLL
  for (int quad = 0; quad < 8; ++quad) {
    __m256i nibbles[2][kPlanes];
    for (int v = 0; v < 2; ++v) load_nibbles<F>(hi, lo, quad, r, v, nibbles[v]);
    HAOMIAO_UNROLL
    for (int m = 0; m < M; ++m) {
      int32_t four;
      memcpy(&four, group_at(x, m * stride).q + 4 * quad, 4);
      const __m256i q = _mm256_set1_epi32(four);
      HAOMIAO_UNROLL
      for (int p = 0; p < kPlanes; ++p) {
        for (int v = 0; v < 2; ++v) {
          sum[p][m][v] = _mm256_add_epi16(sum[p][m][v], _mm256_maddubs_epi16(nibbles[v][p], q));
        }
      }
    }
  }
  const __m256i ones = _mm256_set1_epi16(1);
  const __m128i count = _mm_cvtsi32_si128(shift);
  HAOMIAO_UNROLL
  for (int m = 0; m < M; ++m) {
    const ActivationGroup& group = group_at(x, m * stride);
    const __m256i corrected = _mm256_set1_epi32(correction<F>(group, shift));
    const __m256 s = _mm256_set1_ps(group.scale);
    for (int v = 0; v < 2; ++v) {
      __m256i total = _mm256_madd_epi16(sum[0][m][v], ones);
      if constexpr (kPlanes == 2) {
        total = _mm256_add_epi32(_mm256_sll_epi32(total, count), _mm256_madd_epi16(sum[1][m][v], ones));
      }
      total = _mm256_add_epi32(total, corrected);
      __m256& sums = y[m][2 * r + v];
      sums = _mm256_fmadd_ps(_mm256_mul_ps(scale[v], s), _mm256_cvtepi32_ps(total), sums);
    }
  }
}

// All columns of one tile for M tokens that start at x.
template <Form F, int M>
void multiply_tile(const Tile& tile, const uint8_t* x, size_t stride, const Target& target) {
  __m256 y[M][4];
  for (int m = 0; m < M; ++m) {
    for (int octet = 0; octet < 4; ++octet) y[m][octet] = _mm256_setzero_ps();
  }
  const __m256 factor = _mm256_set1_ps(F == Form::both ? plane_factor(tile.shift) : 1.0f);
  const uint8_t *hi = tile.hi, *lo = tile.lo;
  for (int block = 0; block < tile.blocks;) {
    __m256 scale[4];
    for (int octet = 0; octet < 4; ++octet) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(hi + octet * 16));
      scale[octet] = _mm256_mul_ps(_mm256_cvtph_ps(halves), factor);
    }
    hi += kScaleBytes;
    for (int end = block + tile.blocks_per_scale; block < end; ++block) {
      for (int r = 0; r < 2; ++r) add_block<F, M>(hi, lo, r, tile.shift, scale + 2 * r, x, stride, y);
      hi += block_bytes(F);
      if constexpr (F == Form::both) lo += kNibbleBytes;
      x += sizeof(ActivationGroup);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int octet = 0; octet < 4; ++octet) target.store(m, octet, y[m][octet]);
  }
}

using MultiplyTile = void (*)(const Tile&, const uint8_t*, size_t, const Target&);

template <Form F>
constexpr MultiplyTile kMultiply[] = {multiply_tile<F, 1>, multiply_tile<F, 2>, multiply_tile<F, 3>,
                                      multiply_tile<F, 4>};
template <>
constexpr MultiplyTile kMultiply<Form::both>[] = {multiply_tile<Form::both, 1>, multiply_tile<Form::both, 2>};
template <>
constexpr MultiplyTile kMultiply<Form::bytes>[] = {multiply_tile<Form::bytes, 1>, multiply_tile<Form::bytes, 2>};

template <Form F>
void linear_int(const LinearCall& call) {
  const Weight& w = *call.weight;
  const size_t stride = activation_stride(Activation::int8, w.padded_cols);
  const uint8_t* x = static_cast<const uint8_t*>(call.activations);
  for (int index = call.tile_begin; index < call.tile_end; ++index) {
    const Tile tile = {w.hi + index * w.hi_tile_bytes, F == Form::both ? w.lo + index * w.lo_tile_bytes : nullptr,
                       w.padded_cols / kGroup, w.group / kGroup, F == Form::bytes ? 4 : w.lo_shift};
    for (int token = 0; token < call.tokens; token += most_shared(F)) {
      const int left = call.tokens - token, count = left < most_shared(F) ? left : most_shared(F);
      kMultiply<F>[count - 1](tile, x + token* stride, stride, target_of(call, index, token));
    }
  }
}

// ---- float points ---------------------------------------------------------------------------------------------------

constexpr int kMostFloat = 3;  // 12 accumulators

// Columns 2 * pair and 2 * pair + 1 of rows 8 * octet...
template <Encoding E>
HAOMIAO_INLINE void load_pair(const uint8_t* tile, int64_t pair, int octet, __m256 w[2]) {
  if constexpr (E == Encoding::f32) {
    for (int c = 0; c < 2; ++c) w[c] = _mm256_castsi256_ps(load(tile + (2 * pair + c) * 128 + octet * 32));
  } else {
    const __m256i v = load(tile + pair * 128 + octet * 32);
    w[0] = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
    w[1] = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
}

template <Activation A>
HAOMIAO_INLINE __m256 broadcast_value(const uint8_t* x, int64_t column) {
  if constexpr (A == Activation::f32) return _mm256_set1_ps(load_f32(x + column * 4));
  return _mm256_set1_ps(f32_from_bf16(load_u16(x + column * 2)));
}

template <Encoding E, Activation A, int M>
void multiply_tile_float(const uint8_t* tile, int cols, const uint8_t* x, size_t stride, const Target& target) {
  __m256 y[M][4];
  for (int m = 0; m < M; ++m) {
    for (int octet = 0; octet < 4; ++octet) y[m][octet] = _mm256_setzero_ps();
  }
  for (int column = 0; column < cols; column += 2) {
    const int count = cols - column < 2 ? 1 : 2;  // an odd last column: f32 only, bf16 columns are padded to pairs
    HAOMIAO_UNROLL
    for (int octet = 0; octet < 4; ++octet) {
      __m256 w[2];
      if (E == Encoding::f32 && count == 1) {
        w[0] = _mm256_castsi256_ps(load(tile + int64_t{column} * 128 + octet * 32));
      } else {
        load_pair<E>(tile, column / 2, octet, w);
      }
      for (int c = 0; c < count; ++c) {
        HAOMIAO_UNROLL
        for (int m = 0; m < M; ++m) {
          y[m][octet] = _mm256_fmadd_ps(w[c], broadcast_value<A>(x + m * stride, column + c), y[m][octet]);
        }
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int octet = 0; octet < 4; ++octet) target.store(m, octet, y[m][octet]);
  }
}

template <Encoding E, Activation A>
void linear_float(const LinearCall& call) {
  constexpr decltype(&multiply_tile_float<E, A, 1>) kernels[] = {
      multiply_tile_float<E, A, 1>, multiply_tile_float<E, A, 2>, multiply_tile_float<E, A, 3>};
  const Weight& w = *call.weight;
  const size_t stride = activation_stride(A, w.padded_cols);
  const uint8_t* x = static_cast<const uint8_t*>(call.activations);
  for (int index = call.tile_begin; index < call.tile_end; ++index) {
    for (int token = 0; token < call.tokens; token += kMostFloat) {
      const int count = call.tokens - token < kMostFloat ? call.tokens - token : kMostFloat;
      kernels[count - 1](w.hi + index * w.hi_tile_bytes, w.padded_cols, x + token * stride, stride,
                         target_of(call, index, token));
    }
  }
}

void linear(const LinearCall& call) {
  switch (call.weight->encoding) {
    case Encoding::f32:
      return linear_float<Encoding::f32, Activation::f32>(call);
    case Encoding::bf16:
      if (call.activation == Activation::f32) return linear_float<Encoding::bf16, Activation::f32>(call);
      return linear_float<Encoding::bf16, Activation::bf16>(call);
    case Encoding::int8:
      return linear_int<Form::bytes>(call);
    case Encoding::planes:
      return reads_both(call) ? linear_int<Form::both>(call) : linear_int<Form::hi>(call);
  }
}

size_t scratch_bytes(const Weight&, int) { return 0; }

// ---- activations ----------------------------------------------------------------------------------------------------

HAOMIAO_INLINE uint32_t greatest_magnitude(const float* x) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i greatest = _mm256_setzero_si256();
  for (int i = 0; i < kGroup; i += kLanes) {
    const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + i));
    greatest = _mm256_max_epi32(greatest, _mm256_and_si256(bits, magnitude));
  }
  uint32_t lanes[kLanes], result = 0;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), greatest);
  for (uint32_t lane : lanes) result = lane > result ? lane : result;
  return result;
}

// See quantize_group() of scalar.cc: the same values. All 32 floats are read.
void quantize_group(const float* x, ActivationGroup* out) {
  const uint32_t greatest = greatest_magnitude(x);
  const float a = f32_from_bits(greatest), inverse = 127.0f / a;
  memset(out, 0, sizeof(*out));
  if (greatest >= 0x7f800000u) out->scale = f32_from_bits(0x7fc00000u);
  if (greatest >= 0x7f800000u || inverse > 0x1.fffffep127f) return;
  out->scale = a / 127.0f;
  int32_t sum = 0;
  for (int i = 0; i < kGroup; i += 2 * kLanes) {
    __m256i q[2];
    for (int v = 0; v < 2; ++v) {
      q[v] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + v * kLanes), _mm256_set1_ps(inverse)));
    }
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xd8);
    const __m128i lower = _mm256_castsi256_si128(words), upper = _mm256_extracti128_si256(words, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out->q + i), _mm_packs_epi16(lower, upper));
    int32_t lanes[kLanes];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi32(q[0], q[1]));
    for (int32_t lane : lanes) sum += lane;
  }
  set_corrections(out, sum);
}

void prepare(Activation kind, const float* x, int64_t stride, int tokens, int first, int last, int cols,
             int padded_cols, void* out) {
  if (kind != Activation::int8) {
    kScalarLinear.prepare(kind, x, stride, tokens, first, last, cols, padded_cols, out);
    return;
  }
  const size_t bytes = activation_stride(kind, padded_cols);
  for (int t = first; t < last; ++t) {
    const float* row = x + t * stride;
    ActivationGroup* groups = reinterpret_cast<ActivationGroup*>(static_cast<uint8_t*>(out) + t * bytes);
    int c = 0;
    for (; c + kGroup <= cols; c += kGroup) quantize_group(row + c, groups++);
    for (; c < padded_cols; c += kGroup) {
      float rest[kGroup] = {};
      if (c < cols) memcpy(rest, row + c, (cols - c) * sizeof(float));
      quantize_group(rest, groups++);
    }
  }
}

size_t activation_bytes(Activation kind, int tokens, int padded_cols) {
  return activation_stride(kind, padded_cols) * static_cast<size_t>(tokens);
}

void read_row(const Weight& weight, int32_t row, float* out) { kScalarLinear.read_row(weight, row, out); }

}  // namespace

const LinearKernels kAvx2Linear = {"avx2", activation_bytes, prepare, scratch_bytes, linear, read_row};

}  // namespace haomiao
