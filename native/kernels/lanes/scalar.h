// Sixteen float lanes in plain C++: the meaning of every operation that the other files of this folder implement.
// Everything is in an anonymous namespace, so that code compiled for one instruction set cannot leak into another.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace haomiao {
namespace {

struct Lanes {
  float v[16];
};

// Rows and vectors of 16 columns that one pass of the attention kernels keeps in registers.
constexpr int kPassRows = 4, kPassVectors = 1;

template <typename F>
inline Lanes map_lanes(F f) {
  Lanes r;
  for (int i = 0; i < 16; ++i) r.v[i] = f(i);
  return r;
}

inline Lanes broadcast(float x) {
  return map_lanes([&](int) { return x; });
}
inline Lanes load(const float* p) {
  return map_lanes([&](int i) { return p[i]; });
}
// The first n of 16 (0 <= n <= 16); the other lanes are 0 and their memory is not touched.
inline Lanes load_some(const float* p, int n) {
  return map_lanes([&](int i) { return i < n ? p[i] : 0.0f; });
}
inline Lanes load(const uint16_t* p) {  // bf16
  return map_lanes([&](int i) {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  });
}
inline Lanes load(const int8_t* p) {
  return map_lanes([&](int i) { return static_cast<float>(p[i]); });
}
inline Lanes load_halves(const uint16_t* p) {  // IEEE binary16
  return map_lanes([&](int i) {
    const uint32_t sign = (p[i] & 0x8000u) << 16, exponent = (p[i] >> 10) & 31u, fraction = p[i] & 0x3ffu;
    const uint32_t bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (fraction << 13);
    const float small = static_cast<float>(fraction) * 0x1p-24f;  // zero and subnormals
    float f;
    memcpy(&f, &bits, 4);
    return exponent != 0 ? f : sign ? -small : small;
  });
}
inline void store(float* p, const Lanes& a) {
  for (int i = 0; i < 16; ++i) p[i] = a.v[i];
}
inline void store_some(float* p, const Lanes& a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}

inline Lanes add(const Lanes& a, const Lanes& b) {
  return map_lanes([&](int i) { return a.v[i] + b.v[i]; });
}
inline Lanes subtract(const Lanes& a, const Lanes& b) {
  return map_lanes([&](int i) { return a.v[i] - b.v[i]; });
}
inline Lanes multiply(const Lanes& a, const Lanes& b) {
  return map_lanes([&](int i) { return a.v[i] * b.v[i]; });
}
inline Lanes divide(const Lanes& a, const Lanes& b) {
  return map_lanes([&](int i) { return a.v[i] / b.v[i]; });
}
// a * b + c and c - a * b, rounded once
inline Lanes multiply_add(const Lanes& a, const Lanes& b, const Lanes& c) {
  return map_lanes([&](int i) { return fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline Lanes subtract_product(const Lanes& a, const Lanes& b, const Lanes& c) {
  return map_lanes([&](int i) { return fmaf(-a.v[i], b.v[i], c.v[i]); });
}
// a < b ? x : y (false where either is NaN); a is NaN ? x : y
inline Lanes select_less(const Lanes& a, const Lanes& b, const Lanes& x, const Lanes& y) {
  return map_lanes([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
}
inline Lanes select_nan(const Lanes& a, const Lanes& x, const Lanes& y) {
  return map_lanes([&](int i) { return a.v[i] != a.v[i] ? x.v[i] : y.v[i]; });
}
// a > b ? a : b (b where either is NaN)
inline Lanes greater(const Lanes& a, const Lanes& b) {
  return map_lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Lanes absolute(const Lanes& a) {
  return map_lanes([&](int i) { return fabsf(a.v[i]); });
}
// bits(y) + (bits(z) << 23): y * 2^n for z = 1.5 * 2^23 + n, as long as the result is a normal number
inline Lanes add_exponent(const Lanes& y, const Lanes& z) {
  return map_lanes([&](int i) {
    uint32_t a, b;
    memcpy(&a, &y.v[i], 4);
    memcpy(&b, &z.v[i], 4);
    a += b << 23;
    float f;
    memcpy(&f, &a, 4);
    return f;
  });
}
// Sixteen lanes of two 16-bit integers, and of one 32-bit integer.
struct Pairs {
  int16_t v[16][2];
};
struct Ints {
  int32_t v[16];
};
inline Ints no_ints() { return {}; }
inline Pairs load_pairs(const int8_t* p) {  // 32 bytes
  Pairs r;
  for (int i = 0; i < 32; ++i) r.v[i / 2][i % 2] = p[i];
  return r;
}
inline Pairs broadcast_pair(const int16_t* p) {
  Pairs r;
  for (int i = 0; i < 32; ++i) r.v[i / 2][i % 2] = p[i % 2];
  return r;
}
// z + x[0] y[0] + x[1] y[1], which must fit
inline Ints add_dot(const Pairs& x, const Pairs& y, const Ints& z) {
  Ints r;
  for (int i = 0; i < 16; ++i) r.v[i] = z.v[i] + x.v[i][0] * y.v[i][0] + x.v[i][1] * y.v[i][1];
  return r;
}
inline Lanes to_lanes(const Ints& x) {
  return map_lanes([&](int i) { return static_cast<float>(x.v[i]); });
}
// To the nearest 16-bit integer, ties to even, which must fit.
inline void store_rounded(int16_t* p, const Lanes& a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int16_t>(rintf(a.v[i]));
}
// Lanes added 8, 4, 2, 1: lane i takes lane i + 8, then i + 4, ...
inline float sum(const Lanes& a) {
  Lanes r = a;
  for (int step = 8; step >= 1; step /= 2) {
    for (int i = 0; i < step; ++i) r.v[i] += r.v[i + step];
  }
  return r.v[0];
}
// The greatest lane; unspecified if a lane is NaN.
inline float greatest(const Lanes& a) {
  float m = a.v[0];
  for (int i = 1; i < 16; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
inline float first(const Lanes& a) { return a.v[0]; }

}  // namespace
}  // namespace haomiao
