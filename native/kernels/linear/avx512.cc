// Linear kernels for AVX-512 with VNNI. One register holds 16 rows, a tile is two registers wide.
//
// Int points: up to 6 tokens share one pass over a tile, its bytes unpacked in registers; for more tokens the tile is
// unpacked once to unsigned bytes in `scratch` and used for all of them. Either way every output is the same sum in the
// same order (docs/ARCHITECTURE.md, section 6), so that a token's bits do not depend on its company.
#include <immintrin.h>

#include "kernels/linear/layout.h"
#include "kernels/linear/tables.h"

#define HAOMIAO_INLINE inline __attribute__((always_inline))
#define HAOMIAO_UNROLL _Pragma("GCC unroll 16")

namespace haomiao {
namespace {

constexpr int kMostShared = 6;  // tokens that share one pass: 2 x 6 integer and 2 x 6 float accumulators in registers
constexpr int kDirectTokens = 12;  // up to so many tokens a tile is read again rather than unpacked
constexpr int kMostFloat = 8;      // tokens that share one pass of the float kernels
constexpr int kPrefetchBytes = 4608;

// The dot product as assembly: gcc 12 copies and spills the accumulators of the intrinsic.
HAOMIAO_INLINE void add_dot(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

HAOMIAO_INLINE void add_word_dot(__m512i& sum, __m512i a, __m512i b) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

HAOMIAO_INLINE __m512 scales_at(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Where the results of one tile go.
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

Target target_of(const LinearCall& call, int tile, int token) {
  const int row = tile * kTileRows, left = call.weight->rows - row;
  const uint32_t rows = left >= kTileRows ? 0xffffffffu : (1u << left) - 1u;
  return {call.out + token * call.out_stride + row,
          call.out_stride,
          call.bias ? call.bias + row : nullptr,
          {static_cast<__mmask16>(rows), static_cast<__mmask16>(rows >> 16)}};
}

// ---- int points -----------------------------------------------------------------------------------------------------

// How 32 columns x 32 rows of weights are stored; each becomes unsigned bytes code + zero.
enum class Form {
  hi,        // nibbles, zero = 8
  both,      // two planes of nibbles, lo_shift 4, zero = 136
  shifted,   // two planes of nibbles, lo_shift 0..3, zero = 8 * 2^lo_shift + 8
  bytes,     // one byte each, zero = 128
  unpacked,  // bytes made by unpack_tile(), with f32 scales
};

struct Tile {
  const uint8_t *hi, *lo;
  int blocks;            // of 32 columns
  int blocks_per_scale;  // group / 32
  int shift;             // lo_shift
  int zero_over_8;
  float scale_factor;
};

constexpr int kUnpackedScales = kTileRows * 4;

template <Form F>
constexpr int kBlockBytes = F == Form::bytes || F == Form::unpacked ? kByteBytes : kNibbleBytes;

template <Form F>
constexpr int kGroupScaleBytes = F == Form::unpacked ? kUnpackedScales : kScaleBytes;

// Unsigned bytes of columns 8j..8j+3 (`left`) and 8j+4..8j+7 (`right`), rows 0..15 and 16..31, in ascending addresses.
template <Form F>
HAOMIAO_INLINE void load_columns(const uint8_t* hi, const uint8_t* lo, int j, __m128i shift, __m512i left[2],
                                 __m512i right[2]) {
  if constexpr (F == Form::bytes || F == Form::unpacked) {
    for (int r = 0; r < 2; ++r) left[r] = _mm512_loadu_si512(hi + j * 256 + r * 64);
    for (int r = 0; r < 2; ++r) right[r] = _mm512_loadu_si512(hi + j * 256 + 128 + r * 64);
    return;
  }
  const __m512i low = _mm512_set1_epi8(15);
  for (int r = 0; r < 2; ++r) {
    const __m512i h = _mm512_loadu_si512(hi + (2 * j + r) * 64);
    if constexpr (F == Form::hi) {
      left[r] = _mm512_and_si512(h, low);
      right[r] = _mm512_and_si512(_mm512_srli_epi16(h, 4), low);
      continue;
    }
    const __m512i l = _mm512_loadu_si512(lo + (2 * j + r) * 64);
    if constexpr (F == Form::both) {  // 0xca: where `low` take the second, else the third
      left[r] = _mm512_ternarylogic_epi32(low, l, _mm512_slli_epi16(h, 4), 0xca);
      right[r] = _mm512_ternarylogic_epi32(low, _mm512_srli_epi16(l, 4), h, 0xca);
    } else {
      const __m512i h_left = _mm512_and_si512(h, low), h_right = _mm512_and_si512(_mm512_srli_epi16(h, 4), low);
      const __m512i l_left = _mm512_and_si512(l, low), l_right = _mm512_and_si512(_mm512_srli_epi16(l, 4), low);
      left[r] = _mm512_add_epi8(_mm512_sll_epi16(h_left, shift), l_left);
      right[r] = _mm512_add_epi8(_mm512_sll_epi16(h_right, shift), l_right);
    }
  }
}

HAOMIAO_INLINE __m512i broadcast_columns(const ActivationGroup& x, int quad) {
  int32_t four;
  memcpy(&four, x.q + 4 * quad, 4);
  return _mm512_set1_epi32(four);
}

// y[m] = sum over blocks for M tokens that start at x, `stride` bytes apart.
template <Form F, int M>
void multiply_tile(const Tile& tile, const uint8_t* x, size_t stride, const Target& target) {
  __m512 y[M][2];
  HAOMIAO_UNROLL
  for (int m = 0; m < M; ++m) y[m][0] = y[m][1] = _mm512_setzero_ps();
  const uint8_t *hi = tile.hi, *lo = tile.lo;
  const __m128i shift = _mm_cvtsi32_si128(tile.shift);
  const __m512i zero_over_8 = _mm512_set1_epi32(tile.zero_over_8);  // one word; the word above it is 0
  const __m512 factor = _mm512_set1_ps(tile.scale_factor);
  for (int block = 0; block < tile.blocks;) {
    __m512 weight_scale[2];
    for (int r = 0; r < 2; ++r) {
      if constexpr (F == Form::unpacked) {
        weight_scale[r] = _mm512_loadu_ps(hi + r * 64);
      } else {
        weight_scale[r] = scales_at(hi + r * 32);
        if constexpr (F == Form::both || F == Form::shifted) weight_scale[r] = _mm512_mul_ps(weight_scale[r], factor);
      }
    }
    hi += kGroupScaleBytes<F>;
    for (int end = block + tile.blocks_per_scale; block < end; ++block) {
      __m512i sum[M][2];
      HAOMIAO_UNROLL
      for (int m = 0; m < M; ++m) {
        const ActivationGroup& group = *reinterpret_cast<const ActivationGroup*>(x + m * stride);
        const __m512i minus8_sum = _mm512_set1_epi32(group.minus8_sum);
        if constexpr (F == Form::hi) {
          sum[m][0] = minus8_sum;
        } else {
          sum[m][0] = _mm512_setzero_si512();
          add_word_dot(sum[m][0], zero_over_8, minus8_sum);
        }
        sum[m][1] = sum[m][0];
      }
      HAOMIAO_UNROLL
      for (int j = 0; j < 4; ++j) {
        __m512i left[2], right[2];
        load_columns<F>(hi, lo, j, shift, left, right);
        if constexpr (M >= 3 && F != Form::unpacked) {
          for (int line = 0; line < kBlockBytes<F> / 64; line += 4) {
            _mm_prefetch(reinterpret_cast<const char*>(hi + (line + j) * 64 + kPrefetchBytes), _MM_HINT_T0);
            if (F == Form::both || F == Form::shifted) {
              _mm_prefetch(reinterpret_cast<const char*>(lo + (line + j) * 64 + kPrefetchBytes), _MM_HINT_T0);
            }
          }
        }
        HAOMIAO_UNROLL
        for (int m = 0; m < M; ++m) {
          const __m512i q = broadcast_columns(*reinterpret_cast<const ActivationGroup*>(x + m * stride), 2 * j);
          add_dot(sum[m][0], left[0], q);
          add_dot(sum[m][1], left[1], q);
        }
        HAOMIAO_UNROLL
        for (int m = 0; m < M; ++m) {
          const __m512i q = broadcast_columns(*reinterpret_cast<const ActivationGroup*>(x + m * stride), 2 * j + 1);
          add_dot(sum[m][0], right[0], q);
          add_dot(sum[m][1], right[1], q);
        }
      }
      HAOMIAO_UNROLL
      for (int m = 0; m < M; ++m) {
        const __m512 s = _mm512_set1_ps(reinterpret_cast<const ActivationGroup*>(x + m * stride)->scale);
        for (int r = 0; r < 2; ++r) {
          y[m][r] = _mm512_fmadd_ps(_mm512_mul_ps(weight_scale[r], s), _mm512_cvtepi32_ps(sum[m][r]), y[m][r]);
        }
      }
      hi += kBlockBytes<F>;
      lo += kNibbleBytes;
      x += sizeof(ActivationGroup);
    }
  }
  HAOMIAO_UNROLL
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < 2; ++r) target.store(m, r, y[m][r]);
  }
}

// Blocks of [32 f32 scales][8 x 128 bytes], as multiply_tile<Form::unpacked> reads them.
template <Form F>
Tile unpack_tile(const Tile& tile, uint8_t* out) {
  const uint8_t *hi = tile.hi, *lo = tile.lo, *begin = out;
  const __m128i shift = _mm_cvtsi32_si128(tile.shift);
  const __m512 factor = _mm512_set1_ps(tile.scale_factor);
  for (int block = 0; block < tile.blocks;) {
    const __m512 upper = _mm512_mul_ps(scales_at(hi), factor), lower = _mm512_mul_ps(scales_at(hi + 32), factor);
    hi += kScaleBytes;
    for (int end = block + tile.blocks_per_scale; block < end; ++block) {
      _mm512_store_ps(out, upper);
      _mm512_store_ps(out + 64, lower);
      for (int j = 0; j < 4; ++j) {
        __m512i left[2], right[2];
        load_columns<F>(hi, lo, j, shift, left, right);
        uint8_t* columns = out + kUnpackedScales + j * 256;
        for (int r = 0; r < 2; ++r) _mm512_store_si512(columns + r * 64, left[r]);
        for (int r = 0; r < 2; ++r) _mm512_store_si512(columns + 128 + r * 64, right[r]);
      }
      hi += kBlockBytes<F>;
      lo += kNibbleBytes;
      out += kUnpackedScales + kByteBytes;
    }
  }
  return {begin, nullptr, tile.blocks, 1, 0, tile.zero_over_8, 1.0f};
}

template <Form F>
void multiply_tokens(const Tile& tile, const LinearCall& call, int index) {
  constexpr decltype(&multiply_tile<F, 1>) kernels[] = {multiply_tile<F, 1>, multiply_tile<F, 2>, multiply_tile<F, 3>,
                                                        multiply_tile<F, 4>, multiply_tile<F, 5>, multiply_tile<F, 6>};
  const size_t stride = activation_stride(Activation::int8, call.weight->padded_cols);
  const uint8_t* x = static_cast<const uint8_t*>(call.activations);
  int passes = (call.tokens + kMostShared - 1) / kMostShared;
  for (int token = 0, count; token < call.tokens; token += count, --passes) {
    count = (call.tokens - token + passes - 1) / passes;
    kernels[count - 1](tile, x + token * stride, stride, target_of(call, index, token));
  }
}

template <Form F>
void linear_int(const LinearCall& call) {
  const Weight& w = *call.weight;
  const bool with_lo = F == Form::both || F == Form::shifted;
  for (int index = call.tile_begin; index < call.tile_end; ++index) {
    const Tile tile = {w.hi + index * w.hi_tile_bytes,
                       with_lo ? w.lo + index * w.lo_tile_bytes : nullptr,
                       w.padded_cols / kGroup,
                       w.group / kGroup,
                       w.lo_shift,
                       F == Form::hi      ? 1
                       : F == Form::bytes ? 16
                                          : (1 << w.lo_shift) + 1,
                       with_lo ? plane_factor(w.lo_shift) : 1.0f};
    if (F == Form::bytes || call.tokens <= kDirectTokens) {
      multiply_tokens<F>(tile, call, index);
    } else {
      multiply_tokens<Form::unpacked>(unpack_tile<F>(tile, static_cast<uint8_t*>(call.scratch)), call, index);
    }
  }
}

// ---- float points ---------------------------------------------------------------------------------------------------

// Two columns of weights of rows 16 r..16 r + 15, and the same two columns of one token.
template <Encoding E>
HAOMIAO_INLINE void load_pair(const uint8_t* tile, int64_t pair, int r, __m512 w[2]) {
  if constexpr (E == Encoding::f32) {
    for (int c = 0; c < 2; ++c) w[c] = _mm512_loadu_ps(tile + (2 * pair + c) * 128 + r * 64);
  } else {
    const __m512i v = _mm512_loadu_si512(tile + pair * 128 + r * 64);
    w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    w[1] = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
}

template <Activation A>
HAOMIAO_INLINE __m512 broadcast_value(const uint8_t* x, int64_t column) {
  if constexpr (A == Activation::f32) return _mm512_set1_ps(load_f32(x + column * 4));
  return _mm512_set1_ps(f32_from_bf16(load_u16(x + column * 2)));
}

template <Encoding E, Activation A, int M>
void multiply_tile_float(const uint8_t* tile, int cols, const uint8_t* x, size_t stride, const Target& target) {
  __m512 y[M][2];
  HAOMIAO_UNROLL
  for (int m = 0; m < M; ++m) y[m][0] = y[m][1] = _mm512_setzero_ps();
  for (int pair = 0; pair < cols / 2; ++pair) {
    __m512 w[2][2];
    for (int r = 0; r < 2; ++r) load_pair<E>(tile, pair, r, w[r]);
    HAOMIAO_UNROLL
    for (int m = 0; m < M; ++m) {
      for (int c = 0; c < 2; ++c) {
        const __m512 value = broadcast_value<A>(x + m * stride, 2 * pair + c);
        for (int r = 0; r < 2; ++r) y[m][r] = _mm512_fmadd_ps(w[r][c], value, y[m][r]);
      }
    }
  }
  if (cols % 2) {  // f32 only: bf16 columns are padded to pairs
    HAOMIAO_UNROLL
    for (int m = 0; m < M; ++m) {
      const __m512 value = broadcast_value<A>(x + m * stride, cols - 1);
      for (int r = 0; r < 2; ++r) {
        y[m][r] = _mm512_fmadd_ps(_mm512_loadu_ps(tile + (cols - 1) * int64_t{128} + r * 64), value, y[m][r]);
      }
    }
  }
  HAOMIAO_UNROLL
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < 2; ++r) target.store(m, r, y[m][r]);
  }
}

template <Encoding E, Activation A>
void linear_float(const LinearCall& call) {
  constexpr decltype(&multiply_tile_float<E, A, 1>) kernels[] = {
      multiply_tile_float<E, A, 1>, multiply_tile_float<E, A, 2>, multiply_tile_float<E, A, 3>,
      multiply_tile_float<E, A, 4>, multiply_tile_float<E, A, 5>, multiply_tile_float<E, A, 6>,
      multiply_tile_float<E, A, 7>, multiply_tile_float<E, A, 8>};
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
  const Weight& w = *call.weight;
  switch (w.encoding) {
    case Encoding::f32:
      return linear_float<Encoding::f32, Activation::f32>(call);
    case Encoding::bf16:
      if (call.activation == Activation::f32) return linear_float<Encoding::bf16, Activation::f32>(call);
      return linear_float<Encoding::bf16, Activation::bf16>(call);
    case Encoding::int8:
      return linear_int<Form::bytes>(call);
    case Encoding::planes:
      if (!reads_both(call)) return linear_int<Form::hi>(call);
      if (w.lo_shift == 4) return linear_int<Form::both>(call);
      return linear_int<Form::shifted>(call);
  }
}

size_t scratch_bytes(const Weight& weight, int tokens) {
  if (weight.encoding != Encoding::planes || tokens <= kDirectTokens) return 0;
  return static_cast<size_t>(weight.padded_cols / kGroup) * (kUnpackedScales + kByteBytes);
}

// ---- activations ----------------------------------------------------------------------------------------------------

// See quantize_group() of scalar.cc: the same values, 32 at a time.
HAOMIAO_INLINE void quantize_group(const float* x, __mmask16 first, __mmask16 second, ActivationGroup* out) {
  const __m512 a = _mm512_maskz_loadu_ps(first, x), b = _mm512_maskz_loadu_ps(second, x + 16);
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const __m512i greater = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a), magnitude),
                                           _mm512_and_si512(_mm512_castps_si512(b), magnitude));
  const uint32_t greatest = static_cast<uint32_t>(_mm512_reduce_max_epi32(greater));
  const float inverse = 127.0f / f32_from_bits(greatest);
  const bool finite = greatest < 0x7f800000u, usable = finite && inverse <= 0x1.fffffep127f;
  const __m512 factor = _mm512_set1_ps(usable ? inverse : 0.0f);
  __m512i qa = _mm512_cvtps_epi32(_mm512_mul_ps(a, factor)), qb = _mm512_cvtps_epi32(_mm512_mul_ps(b, factor));
  if (!finite) qa = qb = _mm512_setzero_si512();
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out->q), _mm512_cvtepi32_epi8(qa));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out->q + 16), _mm512_cvtepi32_epi8(qb));
  out->minus8_sum = -8 * _mm512_reduce_add_epi32(_mm512_add_epi32(qa, qb));
  out->scale = usable ? f32_from_bits(greatest) / 127.0f : finite ? 0.0f : f32_from_bits(0x7fc00000u);
}

__mmask16 mask_of(int count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffffu : count <= 0 ? 0u : (1u << count) - 1u);
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
    for (; c + kGroup <= cols; c += kGroup) quantize_group(row + c, 0xffff, 0xffff, groups++);
    for (; c < padded_cols; c += kGroup) {
      quantize_group(c < cols ? row + c : row, mask_of(cols - c), mask_of(cols - c - 16), groups++);
    }
  }
}

size_t activation_bytes(Activation kind, int tokens, int padded_cols) {
  return activation_stride(kind, padded_cols) * static_cast<size_t>(tokens);
}

void read_row(const Weight& weight, int32_t row, float* out) { kScalarLinear.read_row(weight, row, out); }

}  // namespace

const LinearKernels kAvx512Linear = {"avx512", activation_bytes, prepare, scratch_bytes, linear, read_row};

}  // namespace haomiao
