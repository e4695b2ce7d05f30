// Portable vectors (a GNU extension that clang has too); no library calls inside the loops.
#include "kernels/quantize/rtn.h"

#include <math.h>
#include <string.h>

namespace haomiao {
namespace {

constexpr int kLanes = 16;

// 16 floats in as many registers as the instruction set needs; the operators work lane by lane.
typedef float Lanes __attribute__((vector_size(64)));

typedef float Quad __attribute__((vector_size(16)));
typedef int32_t IntLanes __attribute__((vector_size(64)));

inline __attribute__((always_inline)) Lanes load(const float* x) {
  Lanes v;
  memcpy(&v, x, sizeof(v));
  return v;
}

// To the nearest integer, ties to even, for |x| < 2^22.
template <class T>
inline __attribute__((always_inline)) T round_even(T x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: no room for a fraction
  return (x + kShift) - kShift;
}

template <class V, class T>
inline __attribute__((always_inline)) V clamp(V x, T least, T greatest) {
  const V low = V{} + least, high = V{} + greatest;
  x = x < low ? low : x;
  return x > high ? high : x;
}

// Whole numbers.
inline __attribute__((always_inline)) IntLanes to_int(Lanes x) { return __builtin_convertvector(x, IntLanes); }

inline __attribute__((always_inline)) void store(IntLanes x, int8_t* out) {
  for (int i = 0; i < kLanes; ++i) out[i] = static_cast<int8_t>(x[i]);
}

inline float from_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

inline uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

// The magnitude rounded to float16, or to the next one up where that falls short by over 2^-10; infinite beyond 65504.
float half_of_magnitude(float a) {
  float half;
  if (a < 0x1p-14f) {  // subnormal: multiples of 2^-24
    half = round_even(a * 0x1p24f) * 0x1p-24f;
    if (half < a * (1.0f - 0x1p-10f)) half += 0x1p-24f;
    return half;
  }
  const uint32_t bits = bits_of(a);
  half = from_bits((bits + 0xfffu + ((bits >> 13) & 1u)) & ~0x1fffu);
  return half > 65504.0f ? INFINITY : half;
}

float half_of(float x) {
  const float half = half_of_magnitude(fabsf(x));
  return signbit(x) ? -half : half;
}

// Squared error of codes in [-8, 7]: summed in 16 lanes, which are then added 8, 4, 2, 1 apart.
float squared_error(const float* x, int group, float scale) {
  const float divisor = scale == 0 ? 1.0f : scale;
  Quad sums[4] = {};
  for (int begin = 0; begin < group; begin += kLanes) {
    for (int i = 0; i < 4; ++i) {
      Quad exact;
      memcpy(&exact, x + begin + 4 * i, sizeof(exact));
      exact = exact / divisor;
      const Quad error = exact - clamp(round_even(exact), -8.0f, 7.0f);
      sums[i] += error * error;
    }
  }
  const Quad fours = (sums[0] + sums[2]) + (sums[1] + sums[3]);  // lanes 8 apart, then 4 apart
  return ((fours[0] + fours[2]) + (fours[1] + fours[3])) * scale * scale;
}

struct Range {
  float top, bottom;
};

Range range_of(const float* x, int group) {
  Lanes top = load(x), bottom = top;
  for (int begin = kLanes; begin < group; begin += kLanes) {
    const Lanes v = load(x + begin);
    top = v > top ? v : top;
    bottom = v < bottom ? v : bottom;
  }
  Range range = {top[0], bottom[0]};
  for (int i = 1; i < kLanes; ++i) {
    range.top = top[i] > range.top ? top[i] : range.top;
    range.bottom = bottom[i] < range.bottom ? bottom[i] : range.bottom;
  }
  return range;
}

// The float16 scale base * i / 32, first <= i < last, of the least error; the first among equals.
float best_scale(const float* x, int group, float base, int first, int last) {
  float best = half_of(base * (static_cast<float>(first) / 32.0f));
  if (!isfinite(best)) return best;
  float least = squared_error(x, group, best);
  for (int i = first + 1; i < last; ++i) {
    const float scale = half_of(base * (static_cast<float>(i) / 32.0f));
    if (!isfinite(scale)) break;
    const float error = squared_error(x, group, scale);
    if (error < least) {
      least = error;
      best = scale;
    }
  }
  return best;
}

// For nested planes: the least scale at which no combined code clips, times 32/32..39/32.
float nested_scale(const float* x, int group, float step) {
  const Range range = range_of(x, group);
  const bool negative = range.top <= -range.bottom;  // the weight of greatest magnitude is: a positive scale
  const float outer = negative ? -range.bottom : range.top, inner = negative ? range.top : -range.bottom;
  const float below = outer / (8.0f * step + 8.0f), above = inner / (7.0f * step + 7.0f);
  const float cover = (below > above ? below : above) * step;
  return best_scale(x, group, negative ? cover : -cover, 32, 40);
}

// For a hi plane alone: the greatest magnitude / 8 times 24/32..35/32.
float single_scale(const float* x, int group) {
  const Range range = range_of(x, group);
  return best_scale(x, group, (range.top <= -range.bottom ? range.bottom : range.top) / -8.0f, 24, 36);
}

}  // namespace

bool quantize_planes(const float* x, int64_t groups, int group, int lo_shift, float* scales, int8_t* hi, int8_t* lo) {
  const int shift = lo ? lo_shift : 0;
  const float step = static_cast<float>(1 << shift);
  const float least = lo ? -8.0f * step - 8.0f : -8.0f, greatest = lo ? 7.0f * step + 7.0f : 7.0f;
  for (int64_t g = 0; g < groups; ++g) {
    const float scale = lo ? nested_scale(x, group, step) : single_scale(x, group);
    if (!isfinite(scale)) return false;
    scales[g] = scale;
    const float divisor = scale == 0 ? 1.0f : scale / step;
    for (int begin = 0; begin < group; begin += kLanes, x += kLanes, hi += kLanes) {
      const IntLanes code = to_int(clamp(round_even(load(x) / divisor), least, greatest));
      const IntLanes upper = clamp((code + (1 << shift) / 2) >> shift, -8, 7);
      store(upper, hi);
      if (!lo) continue;
      store(code - (upper << shift), lo);
      lo += kLanes;
    }
  }
  return true;
}

}  // namespace haomiao
