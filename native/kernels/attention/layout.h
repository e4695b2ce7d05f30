// How K and V of one (block, kv head) are stored: K transposed, so that 16 keys fill a vector, V in rows.
//   f32, bf16: K [head_dim][32 keys], V [32 keys][padded_dim].
//   int8: K [head_dim / 2][32 keys][2], V [16][padded_dim][2], two dimensions or two keys side by side for products of
//   16-bit pairs; then f32 key scales [32] and value scales [32].
// Private to native/kernels/attention; internal linkage, as every header that a kernel file includes.
#pragma once
#include <math.h>
#include <string.h>

#include "kernels/attention/attention.h"

namespace haomiao {
namespace {

constexpr float kGreatest = 0x1.fffffep127f;
// Greatest code of 16 bits: 1,024 products with codes of 8 bits fit 32 bits.
constexpr float kCodes16 = 16383.0f;

inline int padded_dim(int head_dim) { return (head_dim + 15) / 16 * 16; }

inline size_t element_bytes(KvType kv) { return kv == KvType::f32 ? 4 : kv == KvType::bf16 ? 2 : 1; }

inline int even_dim(int head_dim) { return (head_dim + 1) / 2 * 2; }

size_t block_bytes(KvType kv, int head_dim) {
  const size_t elements =
      static_cast<size_t>(kKvBlock) * (static_cast<size_t>(even_dim(head_dim)) + padded_dim(head_dim));
  const size_t scales = kv == KvType::int8 ? 2 * kKvBlock * sizeof(float) : 0;
  return (elements * element_bytes(kv) + scales + 63) / 64 * 64;
}

// A block seen as elements of type T; the scales are only there for int8.
template <typename T>
struct BlockView {
  T *k, *v;
  float *key_scales, *value_scales;

  BlockView(uint8_t* block, int head_dim)
      : BlockView(block, kKvBlock * even_dim(head_dim), kKvBlock * padded_dim(head_dim)) {}
  // The same from the elements of K and of V.
  BlockView(uint8_t* block, int64_t keys, int64_t values)
      : k(reinterpret_cast<T*>(block)),
        v(k + keys),
        key_scales(reinterpret_cast<float*>(v + values)),
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

// The factor codes / max|x| and the scale max|x| / codes, `codes` being the greatest code. As for activations: too
// small counts as zero, and a NaN or an infinity makes the scale NaN.
inline float quantization(const float* x, int n, float codes, float* scale) {
  uint32_t greatest = 0;  // as bits: NaN > infinity > every finite magnitude
  for (int i = 0; i < n; ++i) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
    greatest = magnitude > greatest ? magnitude : greatest;
  }
  float a;
  memcpy(&a, &greatest, 4);
  const float factor = codes / a;
  *scale = greatest >= 0x7f800000u ? __builtin_nanf("") : factor > kGreatest ? 0.0f : a / codes;
  return *scale > 0 ? factor : 0.0f;
}

// x as codes of 8 bits and their scale.
void quantize_row(int head_dim, const float* x, float* scale, int8_t* codes) {
  const float factor = quantization(x, head_dim, 127.0f, scale);
  for (int d = 0; d < head_dim; ++d) codes[d] = static_cast<int8_t>(factor > 0 ? rintf(x[d] * factor) : 0.0f);
}

constexpr int kMostDim = 1024;  // of a head; plan.cc refuses more

// x[d] to target[d * stride] as stored in type T.
void write_floats(int head_dim, const float* x, float* target, int stride) {
  for (int d = 0; d < head_dim; ++d) target[d * stride] = x[d];
}
void write_floats(int head_dim, const float* x, uint16_t* target, int stride) {
  for (int d = 0; d < head_dim; ++d) target[d * stride] = bf16_from_f32(x[d]);
}

template <typename T>
void write_key_as(int head_dim, const float* k, int slot, uint8_t* block) {
  const BlockView<T> view(block, head_dim);
  if constexpr (sizeof(T) == 1) {
    int8_t codes[kMostDim];
    quantize_row(head_dim, k, view.key_scales + slot, codes);
    for (int d = 0; d < head_dim; ++d) view.k[(d / 2 * kKvBlock + slot) * 2 + d % 2] = codes[d];
  } else {
    write_floats(head_dim, k, view.k + slot, kKvBlock);
  }
}

template <typename T>
void write_value_as(int head_dim, const float* v, int slot, uint8_t* block) {
  const BlockView<T> view(block, head_dim);
  if constexpr (sizeof(T) == 1) {
    int8_t codes[kMostDim];
    quantize_row(head_dim, v, view.value_scales + slot, codes);
    T* pair = view.v + slot / 2 * 2 * padded_dim(head_dim) + slot % 2;
    for (int d = 0; d < head_dim; ++d) pair[2 * d] = codes[d];
  } else {
    write_floats(head_dim, v, view.v + slot * padded_dim(head_dim), 1);
  }
}

void write_key(KvType kv, int head_dim, const float* k, int slot, uint8_t* block) {
  if (kv == KvType::f32) return write_key_as<float>(head_dim, k, slot, block);
  if (kv == KvType::bf16) return write_key_as<uint16_t>(head_dim, k, slot, block);
  return write_key_as<int8_t>(head_dim, k, slot, block);
}

void write_value(KvType kv, int head_dim, const float* v, int slot, uint8_t* block) {
  if (kv == KvType::f32) return write_value_as<float>(head_dim, v, slot, block);
  if (kv == KvType::bf16) return write_value_as<uint16_t>(head_dim, v, slot, block);
  return write_value_as<int8_t>(head_dim, v, slot, block);
}

}  // namespace
}  // namespace haomiao
