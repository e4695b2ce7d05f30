// Sixteen float lanes as two AVX2 registers. The meaning of each operation stands in scalar.h.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace haomiao {
namespace {

struct Lanes {
  __m256 a, b;  // lanes 0..7, 8..15
};

constexpr int kPassRows = 6, kPassVectors = 1;

inline Lanes broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Lanes load_some(const float* p, int n) {
  alignas(32) float whole[16] = {};
  memcpy(whole, p, static_cast<size_t>(n) * 4);
  return load(whole);
}
inline __m256 widen(__m128i halves) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline Lanes load(const uint16_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {widen(_mm_loadu_si128(q)), widen(_mm_loadu_si128(q + 1))};
}
inline __m256 widen_bytes(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Lanes load(const int8_t* p) { return {widen_bytes(p), widen_bytes(p + 8)}; }
inline Lanes load_halves(const uint16_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline void store(float* p, Lanes x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline void store_some(float* p, Lanes x, int n) {
  alignas(32) float whole[16];
  store(whole, x);
  memcpy(p, whole, static_cast<size_t>(n) * 4);
}

inline Lanes add(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Lanes subtract(Lanes x, Lanes y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Lanes multiply(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Lanes divide(Lanes x, Lanes y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Lanes multiply_add(Lanes x, Lanes y, Lanes z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Lanes subtract_product(Lanes x, Lanes y, Lanes z) {
  return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
inline Lanes select_less(Lanes x, Lanes y, Lanes yes, Lanes no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
inline Lanes select_nan(Lanes x, Lanes yes, Lanes no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q))};
}
inline Lanes greater(Lanes x, Lanes y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Lanes absolute(Lanes x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline __m256 add_exponent(__m256 y, __m256 z) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(z), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), n));
}
inline Lanes add_exponent(Lanes y, Lanes z) { return {add_exponent(y.a, z.a), add_exponent(y.b, z.b)}; }
// Sixteen lanes of two 16-bit integers, and of one 32-bit integer.
struct Pairs {
  __m256i a, b;
};
struct Ints {
  __m256i a, b;
};
inline Ints no_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline __m256i widen_pairs(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Pairs load_pairs(const int8_t* p) { return {widen_pairs(p), widen_pairs(p + 16)}; }
inline Pairs broadcast_pair(const int16_t* p) {
  int32_t both;
  memcpy(&both, p, 4);
  return {_mm256_set1_epi32(both), _mm256_set1_epi32(both)};
}
// Additions in assembly, in place: the compiler reassociates integers, and then copies or spills sums.
inline Ints add_dot(Pairs x, Pairs y, Ints z) {
  __asm__("vpaddd %1, %0, %0" : "+x"(z.a) : "x"(_mm256_madd_epi16(x.a, y.a)));
  __asm__("vpaddd %1, %0, %0" : "+x"(z.b) : "x"(_mm256_madd_epi16(x.b, y.b)));
  return z;
}
inline Lanes to_lanes(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline void store_rounded(int16_t* p, Lanes x) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(words, 0xd8));
}
inline float sum(Lanes x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float greatest(Lanes x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline float first(Lanes x) { return _mm256_cvtss_f32(x.a); }

}  // namespace
}  // namespace haomiao
