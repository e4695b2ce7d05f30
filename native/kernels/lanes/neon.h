// Sixteen float lanes as four NEON registers. The meaning of each operation stands in scalar.h.
#pragma once
#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

namespace haomiao {
namespace {

struct Lanes {
  float32x4_t v[4];  // lanes 4 i .. 4 i + 3
};

constexpr int kPassRows = 5, kPassVectors = 1;

template <typename F>
inline __attribute__((always_inline)) Lanes map_quads(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}

inline Lanes broadcast(float x) {
  return map_quads([&](int) { return vdupq_n_f32(x); });
}
inline Lanes load(const float* p) {
  return map_quads([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline Lanes load_some(const float* p, int n) {
  float whole[16] = {};
  memcpy(whole, p, static_cast<size_t>(n) * 4);
  return load(whole);
}
inline Lanes load(const uint16_t* p) {
  return map_quads([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
inline Lanes load(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
inline Lanes load_halves(const uint16_t* p) {
  return map_quads([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
inline void store(float* p, const Lanes& a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
inline void store_some(float* p, const Lanes& a, int n) {
  float whole[16];
  store(whole, a);
  memcpy(p, whole, static_cast<size_t>(n) * 4);
}

inline Lanes add(const Lanes& a, const Lanes& b) {
  return map_quads([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline Lanes subtract(const Lanes& a, const Lanes& b) {
  return map_quads([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline Lanes multiply(const Lanes& a, const Lanes& b) {
  return map_quads([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline Lanes divide(const Lanes& a, const Lanes& b) {
  return map_quads([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline Lanes multiply_add(const Lanes& a, const Lanes& b, const Lanes& c) {
  return map_quads([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
inline Lanes subtract_product(const Lanes& a, const Lanes& b, const Lanes& c) {
  return map_quads([&](int i) { return vfmsq_f32(c.v[i], a.v[i], b.v[i]); });
}
inline Lanes select_less(const Lanes& a, const Lanes& b, const Lanes& x, const Lanes& y) {
  return map_quads([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), x.v[i], y.v[i]); });
}
inline Lanes select_nan(const Lanes& a, const Lanes& x, const Lanes& y) {
  return map_quads([&](int i) { return vbslq_f32(vceqq_f32(a.v[i], a.v[i]), y.v[i], x.v[i]); });
}
inline Lanes greater(const Lanes& a, const Lanes& b) {
  return map_quads([&](int i) { return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
}
inline Lanes absolute(const Lanes& a) {
  return map_quads([&](int i) { return vabsq_f32(a.v[i]); });
}
inline Lanes add_exponent(const Lanes& y, const Lanes& z) {
  return map_quads([&](int i) {
    const uint32x4_t n = vshlq_n_u32(vreinterpretq_u32_f32(z.v[i]), 23);
    return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(y.v[i]), n));
  });
}
// Sixteen lanes of two 16-bit integers, and of one 32-bit integer.
struct Pairs {
  int16x8_t v[4];  // lanes 4 i .. 4 i + 3
};
struct Ints {
  int32x4_t v[4];
};
inline Ints no_ints() { return {{vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}}; }
inline Pairs load_pairs(const int8_t* p) {
  const int8x16_t low = vld1q_s8(p), high = vld1q_s8(p + 16);
  return {{vmovl_s8(vget_low_s8(low)), vmovl_s8(vget_high_s8(low)), vmovl_s8(vget_low_s8(high)),
           vmovl_s8(vget_high_s8(high))}};
}
inline Pairs broadcast_pair(const int16_t* p) {
  int32_t both;
  memcpy(&both, p, 4);
  const int16x8_t v = vreinterpretq_s16_s32(vdupq_n_s32(both));
  return {{v, v, v, v}};
}
inline Ints add_dot(const Pairs& x, const Pairs& y, const Ints& z) {
  Ints r;
  for (int i = 0; i < 4; ++i) {
    const int32x4_t low = vmull_s16(vget_low_s16(x.v[i]), vget_low_s16(y.v[i]));
    const int32x4_t high = vmull_high_s16(x.v[i], y.v[i]);
    r.v[i] = vaddq_s32(z.v[i], vpaddq_s32(low, high));
  }
  return r;
}
inline Lanes to_lanes(const Ints& x) {
  return map_quads([&](int i) { return vcvtq_f32_s32(x.v[i]); });
}
inline void store_rounded(int16_t* p, const Lanes& a) {
  for (int i = 0; i < 4; ++i) vst1_s16(p + 4 * i, vmovn_s32(vcvtnq_s32_f32(a.v[i])));
}
inline float sum(const Lanes& a) {
  const float32x4_t four = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline float greatest(const Lanes& a) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[2]), vmaxq_f32(a.v[1], a.v[3])));
}
inline float first(const Lanes& a) { return vgetq_lane_f32(a.v[0], 0); }

}  // namespace
}  // namespace haomiao
