// How K and V of one (block, kv head) are stored: K transposed, so that 16 keys fill a vector, V in rows.
//   K [head_dim][32 keys], V [32 keys][padded_dim], int8: then f32 key scales [32] and value scales [32].
// Private to native/kernels/attention; internal linkage, as every header that a kernel file includes.
#pragma once
#include <math.h>
#include <string.h>

#include "kernels/attention/attention.h"

namespace haomiao {
namespace {

constexpr float kGreatest = 0x1.fffffep127f;

inline int padded_dim(int head_dim) { return (head_dim + 15) / 16 * 16; }

inline size_t element_bytes(KvType kv) { return kv == KvType::f32 ? 4 : kv == KvType::bf16 ? 2 : 1; }

size_t block_bytes(KvType kv, int head_dim) {
  const size_t elements = static_cast<size_t>(kKvBlock) * (static_cast<size_t>(head_dim) + padded_dim(head_dim));
  const size_t scales = kv == KvType::int8 ? 2 * kKvBlock * sizeof(float) : 0;
  return (elements * element_bytes(kv) + scales + 63) / 64 * 64;
}

// A block seen as elements of type T; the scales are only there for int8.
template <typename T>
struct BlockView {
  T *k, *v;
  float *key_scales, *value_scales;

  BlockView(uint8_t* block, int head_dim)
      : k(reinterpret_cast<T*>(block)),
        v(k + kKvBlock * head_dim),
        key_scales(reinterpret_cast<float*>(v + kKvBlock * padded_dim(head_dim))),
        value_scales(key_scales + kKvBlock) {}
};

inline uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t bf16_from_f32(float f) {
  const uint32_t bits = bits_of(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The factor 127 / max|x| and the scale max|x| / 127. As for activations: too small counts as zero, and a NaN or an
// infinity makes the scale NaN.
inline float quantization(const float* x, int n, float* scale) {
  uint32_t greatest = 0;  // as bits: NaN > infinity > every finite magnitude
  for (int i = 0; i < n; ++i) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
    greatest = magnitude > greatest ? magnitude : greatest;
  }
  float a;
  memcpy(&a, &greatest, 4);
  const float factor = 127.0f / a;
  *scale = greatest >= 0x7f800000u ? __builtin_nanf("") : factor > kGreatest ? 0.0f : a / 127.0f;
  return *scale > 0 ? factor : 0.0f;
}

// x[d] to target[d * stride] in the KV type; `scale` is this token's place for int8.
void write_row(KvType kv, int head_dim, const float* x, void* target, int stride, float* scale) {
  if (kv == KvType::f32) {
    for (int d = 0; d < head_dim; ++d) static_cast<float*>(target)[d * stride] = x[d];
  } else if (kv == KvType::bf16) {
    for (int d = 0; d < head_dim; ++d) static_cast<uint16_t*>(target)[d * stride] = bf16_from_f32(x[d]);
  } else {
    const float factor = quantization(x, head_dim, scale);
    for (int d = 0; d < head_dim; ++d) {
      const float q = factor > 0 ? rintf(x[d] * factor) : 0.0f;
      static_cast<int8_t*>(target)[d * stride] = static_cast<int8_t>(q);
    }
  }
}

template <typename T>
void write_key_as(KvType kv, int head_dim, const float* k, int slot, uint8_t* block) {
  const BlockView<T> view(block, head_dim);
  write_row(kv, head_dim, k, view.k + slot, kKvBlock, view.key_scales + slot);
}

template <typename T>
void write_value_as(KvType kv, int head_dim, const float* v, int slot, uint8_t* block) {
  const BlockView<T> view(block, head_dim);
  write_row(kv, head_dim, v, view.v + slot * padded_dim(head_dim), 1, view.value_scales + slot);
}

void write_key(KvType kv, int head_dim, const float* k, int slot, uint8_t* block) {
  if (kv == KvType::f32) return write_key_as<float>(kv, head_dim, k, slot, block);
  if (kv == KvType::bf16) return write_key_as<uint16_t>(kv, head_dim, k, slot, block);
  return write_key_as<int8_t>(kv, head_dim, k, slot, block);
}

void write_value(KvType kv, int head_dim, const float* v, int slot, uint8_t* block) {
  if (kv == KvType::f32) return write_value_as<float>(kv, head_dim, v, slot, block);
  if (kv == KvType::bf16) return write_value_as<uint16_t>(kv, head_dim, v, slot, block);
  return write_value_as<int8_t>(kv, head_dim, v, slot, block);
}

}  // namespace
}  // namespace haomiao
