// Linear kernels for AVX-512 with VNNI. One register holds 16 rows, a tile is two registers wide.
#include "kernels/linear/avx512_int.h"
#include "kernels/linear/tables.h"

namespace haomiao {
namespace {

constexpr int kMostFloat = 8;  // tokens that share one pass over a tile

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
  const bool scaled = weight.encoding == Encoding::int8 || weight.encoding == Encoding::planes;
  return scaled ? int_scratch_bytes(tokens) : 0;
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
  set_corrections(out, _mm512_reduce_add_epi32(_mm512_add_epi32(qa, qb)));
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
