// Activations as the AVX2 kernels read them (avx2_target.h). Included by avx2.cc only.
#pragma once
#include "kernels/linear/avx2_target.h"

namespace haomiao {
namespace {

// Up to 8 tokens' 32 columns, quantized; tokens that are not there are zero.
struct QuantizedGroup {
  __m256i q[kWide];  // 32 codes each
  float scale[kWide];
};

HAOMIAO_INLINE uint32_t greatest_magnitude(const float* x) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i greatest = _mm256_setzero_si256();
  for (int i = 0; i < kGroup; i += kLanes) {
    greatest = _mm256_max_epi32(greatest, _mm256_and_si256(load(x + i), magnitude));
  }
  __m128i most = _mm_max_epi32(_mm256_castsi256_si128(greatest), _mm256_extracti128_si256(greatest, 1));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(most));
}

// See quantize_group() of scalar.cc: the same values. All 32 floats are read.
HAOMIAO_INLINE __m256i quantize_group(const float* x, float* scale) {
  const uint32_t greatest = greatest_magnitude(x);
  const float a = f32_from_bits(greatest), inverse = 127.0f / a;
  const bool finite = greatest < 0x7f800000u;
  *scale = finite ? 0.0f : f32_from_bits(0x7fc00000u);
  if (!finite || inverse > 0x1.fffffep127f) return _mm256_setzero_si256();
  *scale = a / 127.0f;
  __m256i q[4];
  for (int i = 0; i < 4; ++i) {
    q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i * kLanes), _mm256_set1_ps(inverse)));
  }
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// Columns [column, column + 32) of `count` rows; those from `cols` on count as zero.
HAOMIAO_INLINE void quantize_rows(const float* x, int64_t stride, int count, int column, int cols,
                                  QuantizedGroup* out) {
  for (int t = 0; t < count; ++t) {
    const float* row = x + t * stride + column;
    float rest[kGroup] = {};
    if (column + kGroup > cols) {
      if (column < cols) memcpy(rest, row, static_cast<size_t>(cols - column) * sizeof(float));
      row = rest;
    }
    out->q[t] = quantize_group(row, &out->scale[t]);
  }
}

HAOMIAO_INLINE __m256i even_codes(__m256i bytes) { return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8); }
HAOMIAO_INLINE __m256i odd_codes(__m256i bytes) { return _mm256_srai_epi16(bytes, 8); }

// A dword: the sums of the codes that vpmaddubsw adds to its lower and to its upper word. 16-bit sums in pairs of
// words.
HAOMIAO_INLINE __m256i sum_of_pairs(__m256i codes) { return _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes); }

// What makes up for the 8 that was added to nibbles, from the pairs of sums.
HAOMIAO_INLINE __m256i correction8(__m256i pairs) {
  return _mm256_slli_epi16(_mm256_sub_epi16(_mm256_setzero_si256(), pairs), 3);
}

HAOMIAO_INLINE void store_wide(const QuantizedGroup& group, ActivationBlock<kWide>* out) {
  __m256 quads[kLanes];
  for (int t = 0; t < kWide; ++t) quads[t] = _mm256_castsi256_ps(group.q[t]);
  transpose(quads);  // of dwords: whatever they mean
  __m256i pairs = _mm256_setzero_si256();
  for (int quad = 0; quad < 8; ++quad) {
    const __m256i codes = _mm256_castps_si256(quads[quad]);
    store(out->bytes[quad], codes);
    store(out->words[0][quad], even_codes(codes));
    store(out->words[1][quad], odd_codes(codes));
    pairs = _mm256_add_epi16(pairs, sum_of_pairs(codes));
  }
  store(out->zero8, correction8(pairs));
  memcpy(out->scale, group.scale, sizeof(out->scale));
}

HAOMIAO_INLINE int32_t sum_of_lanes(__m256i v) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

template <int T>
HAOMIAO_INLINE void store_narrow(const QuantizedGroup& group, ActivationBlock<T>* out) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int t = 0; t < T; ++t) {
    const __m256i even = even_codes(group.q[t]), odd = odd_codes(group.q[t]);
    alignas(32) int32_t bytes[8], words[2][8];
    store(bytes, group.q[t]);
    store(words[0], even);
    store(words[1], _mm256_sub_epi16(odd, _mm256_slli_epi16(even, 8)));
    for (int quad = 0; quad < 8; ++quad) {
      out->bytes[quad][t] = bytes[quad];
      for (int parity = 0; parity < 2; ++parity) out->words[parity][quad][t] = words[parity][quad];
    }
    __m256i pairs = sum_of_pairs(group.q[t]);
    pairs = _mm256_add_epi16(pairs, _mm256_permute2x128_si256(pairs, pairs, 1));
    pairs = _mm256_add_epi16(pairs, _mm256_shuffle_epi32(pairs, 0x4e));
    pairs = _mm256_add_epi16(pairs, _mm256_shuffle_epi32(pairs, 0xb1));
    out->zero8[t] = _mm256_cvtsi256_si32(correction8(pairs));
    const int32_t evens = sum_of_lanes(_mm256_madd_epi16(even, ones)),
                  odds = sum_of_lanes(_mm256_madd_epi16(odd, ones));
    out->zero128[t] = -128 * evens;
    out->zero136[t] = -136 * evens - 8 * odds;
    out->scale[t] = group.scale[t];
  }
}

// All groups of T tokens.
template <int T>
void prepare_block(const float* x, int64_t stride, int cols, int padded_cols, uint8_t* out) {
  ActivationBlock<T>* block = reinterpret_cast<ActivationBlock<T>*>(out);
  for (int column = 0; column < padded_cols; column += kGroup, ++block) {
    QuantizedGroup group;
    quantize_rows(x, stride, T, column, cols, &group);
    if constexpr (T == kWide) {
      store_wide(group, block);
    } else {
      store_narrow(group, block);
    }
  }
}

void prepare_int(const float* x, int64_t stride, int first, int last, int cols, int padded_cols, uint8_t* out) {
  constexpr decltype(&prepare_block<1>) narrow[] = {prepare_block<1>, prepare_block<2>, prepare_block<3>,
                                                    prepare_block<4>};
  for (int token = first; token < last;) {
    const float* row = x + token * stride;
    uint8_t* at = out + int_activation_bytes(token, padded_cols);
    const int left = last - token, count = left >= kWide ? kWide : left < kNarrow ? left : kNarrow;
    (count == kWide ? prepare_block<kWide> : narrow[count - 1])(row, stride, cols, padded_cols, at);
    token += count;
  }
}

// Round to bf16 and back, as bf16_from_f32().
HAOMIAO_INLINE __m256 rounded_to_bf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
  const __m256 result = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), is_nan);
  return _mm256_and_ps(result, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

void prepare_float(Activation kind, const float* x, int64_t stride, int first, int last, int cols, int padded_cols,
                   float* out) {
  for (int token = first; token < last; ++token) {
    const float* row = x + token * stride;
    float* target = out + int64_t{token} * padded_cols;
    memcpy(target, row, static_cast<size_t>(cols) * sizeof(float));
    memset(target + cols, 0, static_cast<size_t>(padded_cols - cols) * sizeof(float));
    if (kind == Activation::f32) continue;
    int c = 0;
    for (; c + kLanes <= cols; c += kLanes) {
      _mm256_storeu_ps(target + c, rounded_to_bf16(_mm256_loadu_ps(target + c)));
    }
    for (; c < cols; ++c) target[c] = f32_from_bf16(bf16_from_f32(target[c]));
  }
}

}  // namespace
}  // namespace haomiao
