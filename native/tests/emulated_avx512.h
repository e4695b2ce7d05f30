// The AVX-512 intrinsics that the kernels use, each as two AVX2 halves, so that a machine without AVX-512 tests the
// kernels written with them (CMake option HAOMIAO_EMULATE_AVX512, which includes this file before anything else).
// Meanings are those of the Intel intrinsics guide; only what is used is here, and a new intrinsic fails to compile
// until it is added. Slow, and not for use.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace haomiao::emulated {

struct Floats {
  __m256 half[2];
};
struct Integers {
  __m256i half[2];
};
using Mask = uint16_t;

template <class Result, class Operation, class... Operands>
static inline Result halves(Operation operation, const Operands&... operands) {
  return {{operation(operands.half[0]...), operation(operands.half[1]...)}};
}

// ---- moving ---------------------------------------------------------------------------------------------------------

static inline Floats setzero_ps() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
static inline Integers setzero_si512() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
static inline Floats set1_ps(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
static inline Integers set1_epi32(int x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
static inline Integers set1_epi8(char x) { return {{_mm256_set1_epi8(x), _mm256_set1_epi8(x)}}; }

template <class Register>
static inline Register load(const void* from) {
  Register whole;
  memcpy(&whole, from, sizeof(whole));
  return whole;
}
template <class Register>
static inline void store(void* to, Register whole) {
  memcpy(to, &whole, sizeof(whole));
}
static inline Floats maskz_loadu_ps(Mask mask, const void* from) {  // what is masked is not read
  float lanes[16] = {};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) memcpy(lanes + i, static_cast<const char*>(from) + 4 * i, 4);
  }
  return load<Floats>(lanes);
}
static inline void mask_storeu_ps(void* to, Mask mask, Floats x) {
  float lanes[16];
  store(lanes, x);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) memcpy(static_cast<char*>(to) + 4 * i, lanes + i, 4);
  }
}

static inline Floats castsi512_ps(Integers x) { return halves<Floats>(_mm256_castsi256_ps, x); }
static inline Integers castps_si512(Floats x) { return halves<Integers>(_mm256_castps_si256, x); }
static inline __m256 castps512_ps256(Floats x) { return x.half[0]; }
template <int Half>
static inline __m256 extractf32x8_ps(Floats x) {
  return x.half[Half];
}
static inline float cvtss_f32(Floats x) { return _mm256_cvtss_f32(x.half[0]); }

// ---- floats ---------------------------------------------------------------------------------------------------------

static inline Floats add_ps(Floats a, Floats b) { return halves<Floats>(_mm256_add_ps, a, b); }
static inline Floats sub_ps(Floats a, Floats b) { return halves<Floats>(_mm256_sub_ps, a, b); }
static inline Floats mul_ps(Floats a, Floats b) { return halves<Floats>(_mm256_mul_ps, a, b); }
static inline Floats div_ps(Floats a, Floats b) { return halves<Floats>(_mm256_div_ps, a, b); }
static inline Floats max_ps(Floats a, Floats b) { return halves<Floats>(_mm256_max_ps, a, b); }
static inline Floats fmadd_ps(Floats a, Floats b, Floats c) { return halves<Floats>(_mm256_fmadd_ps, a, b, c); }
static inline Floats fnmadd_ps(Floats a, Floats b, Floats c) { return halves<Floats>(_mm256_fnmadd_ps, a, b, c); }
static inline Floats abs_ps(Floats a) {
  return halves<Floats>([](__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }, a);
}
template <int Predicate>
static inline Mask cmp_ps_mask(Floats a, Floats b) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(a.half[0], b.half[0], Predicate));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(a.half[1], b.half[1], Predicate));
  return static_cast<Mask>(low | high << 8);
}
static inline Floats mask_blend_ps(Mask mask, Floats unset, Floats set) {
  mask_storeu_ps(&unset, mask, set);
  return unset;
}

// ---- integers -------------------------------------------------------------------------------------------------------

static inline Integers and_si512(Integers a, Integers b) { return halves<Integers>(_mm256_and_si256, a, b); }
static inline Integers add_epi32(Integers a, Integers b) { return halves<Integers>(_mm256_add_epi32, a, b); }
static inline Integers add_epi8(Integers a, Integers b) { return halves<Integers>(_mm256_add_epi8, a, b); }
static inline Integers max_epi32(Integers a, Integers b) { return halves<Integers>(_mm256_max_epi32, a, b); }
static inline Integers slli_epi32(Integers a, int n) {
  return halves<Integers>([n](__m256i x) { return _mm256_slli_epi32(x, n); }, a);
}
static inline Integers slli_epi16(Integers a, int n) {
  return halves<Integers>([n](__m256i x) { return _mm256_slli_epi16(x, n); }, a);
}
static inline Integers srli_epi16(Integers a, int n) {
  return halves<Integers>([n](__m256i x) { return _mm256_srli_epi16(x, n); }, a);
}
static inline Integers sll_epi16(Integers a, __m128i n) {
  return halves<Integers>([n](__m256i x) { return _mm256_sll_epi16(x, n); }, a);
}
template <int Table>
static inline Integers ternarylogic_epi32(Integers a, Integers b, Integers c) {
  static_assert(Table == 0xca, "only the selection a ? b : c is emulated");
  return halves<Integers>([](__m256i x, __m256i y,
                             __m256i z) { return _mm256_or_si256(_mm256_and_si256(x, y), _mm256_andnot_si256(x, z)); },
                          a, b, c);
}
template <class Choose>
static inline int reduce_epi32(Integers x, Choose choose) {
  int lanes[16], result;
  store(lanes, x);
  result = lanes[0];
  for (int i = 1; i < 16; ++i) result = choose(result, lanes[i]);
  return result;
}
static inline int reduce_max_epi32(Integers x) {
  return reduce_epi32(x, [](int a, int b) { return a > b ? a : b; });
}
static inline int reduce_add_epi32(Integers x) {
  return reduce_epi32(x, [](int a, int b) { return a + b; });
}

// ---- conversions ----------------------------------------------------------------------------------------------------

static inline Floats cvtepi32_ps(Integers x) { return halves<Floats>(_mm256_cvtepi32_ps, x); }
static inline Integers cvtps_epi32(Floats x) { return halves<Integers>(_mm256_cvtps_epi32, x); }
static inline Integers cvtepi8_epi32(__m128i x) {
  return {{_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))}};
}
static inline Integers cvtepi8_epi16(__m256i x) {
  return {{_mm256_cvtepi8_epi16(_mm256_castsi256_si128(x)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(x, 1))}};
}
static inline __m256i cvtepi32_epi16(Integers x) {  // the lower half of each
  int32_t lanes[16];
  uint16_t words[16];
  store(lanes, x);
  for (int i = 0; i < 16; ++i) words[i] = static_cast<uint16_t>(lanes[i]);
  return load<__m256i>(words);
}
static inline Integers cvtepu16_epi32(__m256i x) {
  return {{_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))}};
}
static inline Floats cvtph_ps(__m256i x) {
  return {{_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))}};
}
static inline __m128i cvtepi32_epi8(Integers x) {  // the lowest byte of each
  int32_t lanes[16];
  uint8_t bytes[16];
  store(lanes, x);
  for (int i = 0; i < 16; ++i) bytes[i] = static_cast<uint8_t>(lanes[i]);
  return load<__m128i>(bytes);
}

// ---- dot products (Intel SDM vol. 2, VPDPBUSD and VDPBF16PS) --------------------------------------------------------

static inline void dpbusd(Integers& sum, Integers unsigned_bytes, Integers signed_bytes) {
  int32_t sums[16];
  uint8_t u[64];
  int8_t s[64];
  store(sums, sum), store(u, unsigned_bytes), store(s, signed_bytes);
  for (int i = 0; i < 64; ++i) sums[i / 4] += int32_t{u[i]} * s[i];
  sum = load<Integers>(sums);
}
static inline Integers dpwssd_epi32(Integers sum, Integers a, Integers b) {
  return halves<Integers>([](__m256i s, __m256i x, __m256i y) { return _mm256_add_epi32(s, _mm256_madd_epi16(x, y)); },
                          sum, a, b);
}
static inline void dpbf16(Floats& sum, Integers a, Integers b) {
  const auto odd = [](__m256i x) {
    return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  };
  const auto even = [](__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); };
  sum = halves<Floats>([&](__m256 s, __m256i x,
                           __m256i y) { return _mm256_fmadd_ps(even(x), even(y), _mm256_fmadd_ps(odd(x), odd(y), s)); },
                       sum, a, b);
}

}  // namespace haomiao::emulated

#define __m512 haomiao::emulated::Floats
#define __m512i haomiao::emulated::Integers
#define _mm512_abs_ps haomiao::emulated::abs_ps
#define _mm512_add_epi32 haomiao::emulated::add_epi32
#define _mm512_add_epi8 haomiao::emulated::add_epi8
#define _mm512_add_ps haomiao::emulated::add_ps
#define _mm512_and_si512 haomiao::emulated::and_si512
#define _mm512_castps512_ps256 haomiao::emulated::castps512_ps256
#define _mm512_castps_si512 haomiao::emulated::castps_si512
#define _mm512_castsi512_ps haomiao::emulated::castsi512_ps
#define _mm512_cmp_ps_mask(a, b, predicate) haomiao::emulated::cmp_ps_mask<predicate>(a, b)
#define _mm512_cvtepi32_epi8 haomiao::emulated::cvtepi32_epi8
#define _mm512_cvtepi32_ps haomiao::emulated::cvtepi32_ps
#define _mm512_cvtepi32_epi16 haomiao::emulated::cvtepi32_epi16
#define _mm512_cvtepi8_epi16 haomiao::emulated::cvtepi8_epi16
#define _mm512_cvtepi8_epi32 haomiao::emulated::cvtepi8_epi32
#define _mm512_cvtepu16_epi32 haomiao::emulated::cvtepu16_epi32
#define _mm512_cvtph_ps haomiao::emulated::cvtph_ps
#define _mm512_cvtps_epi32 haomiao::emulated::cvtps_epi32
#define _mm512_cvtss_f32 haomiao::emulated::cvtss_f32
#define _mm512_dpwssd_epi32 haomiao::emulated::dpwssd_epi32
#define _mm512_div_ps haomiao::emulated::div_ps
#define _mm512_extractf32x8_ps(a, half) haomiao::emulated::extractf32x8_ps<half>(a)
#define _mm512_fmadd_ps haomiao::emulated::fmadd_ps
#define _mm512_fnmadd_ps haomiao::emulated::fnmadd_ps
#define _mm512_load_ps haomiao::emulated::load<haomiao::emulated::Floats>
#define _mm512_loadu_ps haomiao::emulated::load<haomiao::emulated::Floats>
#define _mm512_loadu_si512 haomiao::emulated::load<haomiao::emulated::Integers>
#define _mm512_mask_blend_ps haomiao::emulated::mask_blend_ps
#define _mm512_mask_storeu_ps haomiao::emulated::mask_storeu_ps
#define _mm512_maskz_loadu_ps haomiao::emulated::maskz_loadu_ps
#define _mm512_max_epi32 haomiao::emulated::max_epi32
#define _mm512_max_ps haomiao::emulated::max_ps
#define _mm512_mul_ps haomiao::emulated::mul_ps
#define _mm512_reduce_add_epi32 haomiao::emulated::reduce_add_epi32
#define _mm512_reduce_max_epi32 haomiao::emulated::reduce_max_epi32
#define _mm512_set1_epi32 haomiao::emulated::set1_epi32
#define _mm512_set1_epi8 haomiao::emulated::set1_epi8
#define _mm512_set1_ps haomiao::emulated::set1_ps
#define _mm512_setzero_ps haomiao::emulated::setzero_ps
#define _mm512_setzero_si512 haomiao::emulated::setzero_si512
#define _mm512_sll_epi16 haomiao::emulated::sll_epi16
#define _mm512_slli_epi16 haomiao::emulated::slli_epi16
#define _mm512_slli_epi32 haomiao::emulated::slli_epi32
#define _mm512_srli_epi16 haomiao::emulated::srli_epi16
#define _mm512_store_ps haomiao::emulated::store
#define _mm512_store_si512 haomiao::emulated::store
#define _mm512_storeu_ps haomiao::emulated::store
#define _mm512_sub_ps haomiao::emulated::sub_ps
#define _mm512_ternarylogic_epi32(a, b, c, table) haomiao::emulated::ternarylogic_epi32<table>(a, b, c)
