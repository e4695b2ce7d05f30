// Sixteen float lanes as one AVX-512 register. The meaning of each operation stands in scalar.h.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // false alarms inside gcc 12's avx512 headers
#endif
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace haomiao {
namespace {

struct Lanes {
  __m512 v;
};

constexpr int kPassRows = 8, kPassVectors = 2;

inline __mmask16 some(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Lanes broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Lanes load_some(const float* p, int n) { return {_mm512_maskz_loadu_ps(some(n), p)}; }
inline Lanes load(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline Lanes load(const int8_t* p) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b))};
}
inline Lanes load_halves(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
inline void store_some(float* p, Lanes a, int n) { _mm512_mask_storeu_ps(p, some(n), a.v); }

inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes subtract(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes multiply(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes divide(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes subtract_product(Lanes a, Lanes b, Lanes c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline Lanes select_less(Lanes a, Lanes b, Lanes x, Lanes y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
inline Lanes select_nan(Lanes a, Lanes x, Lanes y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), y.v, x.v)};
}
inline Lanes greater(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes absolute(Lanes a) { return {_mm512_abs_ps(a.v)}; }
inline Lanes add_exponent(Lanes y, Lanes z) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(z.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y.v), n))};
}
// Sixteen lanes of two 16-bit integers, and of one 32-bit integer.
struct Pairs {
  __m512i v;
};
struct Ints {
  __m512i v;
};
inline Ints no_ints() { return {_mm512_setzero_si512()}; }
inline Pairs load_pairs(const int8_t* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Pairs broadcast_pair(const int16_t* p) {
  int32_t both;
  memcpy(&both, p, 4);
  return {_mm512_set1_epi32(both)};
}
inline Ints add_dot(Pairs x, Pairs y, Ints z) { return {_mm512_dpwssd_epi32(z.v, x.v, y.v)}; }
inline Lanes to_lanes(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }
inline void store_rounded(int16_t* p, Lanes x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x.v)));
}
inline float sum(Lanes a) {
  const __m256 low = _mm512_castps512_ps256(a.v), high = _mm512_extractf32x8_ps(a.v, 1);
  const __m256 eight = _mm256_add_ps(low, high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float greatest(Lanes a) {
  const __m256 low = _mm512_castps512_ps256(a.v), high = _mm512_extractf32x8_ps(a.v, 1);
  const __m256 eight = _mm256_max_ps(low, high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline float first(Lanes a) { return _mm512_cvtss_f32(a.v); }

}  // namespace
}  // namespace haomiao
