// The screening kernels over Lanes, compiled once per instruction set. Include one instruction set's lanes first.
#pragma once
#include <math.h>
#include <string.h>

#include "kernels/head/head.h"
#include "kernels/lanes/math.h"

namespace haomiao {
namespace {

constexpr int kScaleBytes = kTileRows * 2;  // as in linear/layout.h
constexpr int kNibbleBytes = kTileRows * kGroup / 2, kByteBytes = kTileRows * kGroup;

// What is added to |lo| so that the bound covers rounding, in units of |w_g| / 2^shift |s_g q|. With n groups a float
// sum of products is off by at most gamma = (n + 2) 2^-24 of the sum of magnitudes. Magnitudes: of a logit (8 2^shift +
// 8) |q|_1, by the hi plane 8 2^shift |q|_1, of the bound |lo| <= 46, of a sketch 85; |q|_1 <= sqrt(32) |q|. Together,
// at shift 4, 1,580 gamma; 1,650 and n + 4 leave room for gamma's own second order.
inline float rounding_room(int groups) { return 1650.0f * 0x1p-24f * static_cast<float>(groups + 4); }

constexpr float kUp = 1.0f + 0x1p-18f;  // more than any few roundings

// The greatest sum of four squares that lie side by side.
inline int most_of_rows(const uint16_t* squares, int rows) {
  int most = 0;
  for (int i = 0; i < 4 * rows; i += 4) {
    const int total = squares[i] + squares[i + 1] + squares[i + 2] + squares[i + 3];
    most = total > most ? total : most;
  }
  return most;
}

void lo_norms(const Weight& weight, int tile, float* norms) {
  const int groups = weight.padded_cols / kGroup;
  const float room = rounding_room(groups), unit = 1.0f / static_cast<float>(1 << weight.lo_shift);
  const uint8_t* lo = weight.lo + static_cast<int64_t>(tile) * weight.lo_tile_bytes;
  for (int g = 0; g < groups; ++g, lo += kNibbleBytes) {
    int most = 0;
    for (int half = 0; half < 2; ++half) {  // rows 16 half ..
      uint16_t squares[64] = {};            // of columns 4 k' + k, row i at 4 i + k: at most 8 x 64
      for (int j = 0; j < 4; ++j) {
        const uint8_t* run = lo + (2 * j + half) * 64;
        for (int x = 0; x < 64; ++x) {
          const int16_t low = static_cast<int16_t>((run[x] & 15) - 8), high = static_cast<int16_t>((run[x] >> 4) - 8);
          squares[x] = static_cast<uint16_t>(squares[x] + low * low + high * high);
        }
      }
      const int total = most_of_rows(squares, 16);
      most = total > most ? total : most;
    }
    norms[g] = (sqrtf(static_cast<float>(most)) * kUp + room) * unit;
  }
}

// 16 times an f16 number, in f16: exact, or infinite.
inline uint16_t times16(uint16_t half) {
  const uint16_t sign = half & 0x8000u, exponent = half >> 10 & 31, fraction = half & 0x3ffu;
  if (exponent == 31) return half;
  if (exponent != 0) return exponent + 4 < 31 ? static_cast<uint16_t>(half + (4 << 10)) : sign | 0x7c00u;
  unsigned value = unsigned{fraction} << 4, normal = 0;  // in units of 2^-24; at 1,024 numbers become normal
  for (; value >= 2048; value >>= 1) ++normal;           // only zeros are lost
  return static_cast<uint16_t>(sign | ((normal << 10) + value));
}

void sketch(const Weight& weight, int tile, uint8_t* hi, float* norms) {
  const int groups = weight.padded_cols / kGroup, blocks = weight.group / kGroup;
  const float room = rounding_room(groups);
  const uint8_t* codes = weight.hi + static_cast<int64_t>(tile) * weight.hi_tile_bytes;
  for (int g = 0; g < groups; ++g, codes += kByteBytes, hi += kNibbleBytes) {
    if (g % blocks == 0) {
      uint16_t scales[kTileRows];
      memcpy(scales, codes, kScaleBytes);
      for (uint16_t& scale : scales) scale = times16(scale);
      memcpy(hi, scales, kScaleBytes);
      codes += kScaleBytes, hi += kScaleBytes;
    }
    constexpr int kQuad = 4 * kTileRows;  // bytes of four columns
    uint16_t squares[kQuad] = {};         // of columns 4 k' + k, row i at 4 i + k: at most 8 x 225
    for (int j = 0; j < 4; ++j) {
      const uint8_t *left = codes + 2 * j * kQuad, *right = left + kQuad;
      for (int x = 0; x < kQuad; ++x) {
        const int16_t a = left[x], b = right[x];  // codes + 128
        const int16_t above_a = static_cast<int16_t>((a + 8) >> 4), above_b = static_cast<int16_t>((b + 8) >> 4);
        const int16_t hi_a = above_a < 15 ? above_a : 15, hi_b = above_b < 15 ? above_b : 15;
        const int16_t rest_a = static_cast<int16_t>(a - 16 * hi_a), rest_b = static_cast<int16_t>(b - 16 * hi_b);
        squares[x] = static_cast<uint16_t>(squares[x] + rest_a * rest_a + rest_b * rest_b);
        hi[j * kQuad + x] = static_cast<uint8_t>(hi_a | hi_b << 4);
      }
    }
    norms[g] = (sqrtf(static_cast<float>(most_of_rows(squares, kTileRows))) * kUp + room) / 16;
  }
}

// |s q| <= |x| + sqrt(32) s / 2, for a code is off by half at most; 1e-18 covers squares that underflow. A NaN or an
// infinity in the group makes the length so.
void lengths(const float* x, int cols, int padded_cols, float* lengths) {
  for (int c = 0; c < padded_cols; c += kGroup) {
    Lanes v[2];
    for (int i = 0; i < 2; ++i) {
      const int left = cols - c - 16 * i;
      v[i] = left >= 16 ? load(x + c + 16 * i) : left > 0 ? load_some(x + c + 16 * i, left) : broadcast(0.0f);
    }
    const Lanes a = absolute(v[0]), b = absolute(v[1]);
    const float most = greatest(select_less(a, b, b, a));
    const float squares = sum(multiply_add(v[0], v[0], multiply(v[1], v[1])));
    lengths[c / kGroup] = (sqrtf(squares) + 0x1.6a09e8p+2f / 254.0f * most) * kUp + 1e-18f;
  }
}

constexpr float kIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

TileBound bound(const Weight& weight, int tile, const float* norms, const float* lengths, const float* h) {
  const int blocks = weight.group / kGroup;
  const uint8_t* scales = weight.hi + static_cast<int64_t>(tile) * weight.hi_tile_bytes;
  Lanes reach[2] = {broadcast(0.0f), broadcast(0.0f)};
  for (int g = 0; g < weight.padded_cols / kGroup; g += blocks) {
    float length = 0;
    for (int b = 0; b < blocks; ++b) length = fmaf(norms[g + b], lengths[g + b], length);
    const Lanes factor = broadcast(length * kUp);
    for (int r = 0; r < 2; ++r) {
      uint16_t halves[16];
      memcpy(halves, scales + r * 32, sizeof(halves));
      reach[r] = multiply_add(absolute(load_halves(halves)), factor, reach[r]);
    }
    scales += kScaleBytes + blocks * kNibbleBytes;
  }
  const int rows = weight.rows - tile * kTileRows < kTileRows ? weight.rows - tile * kTileRows : kTileRows;
  const Lanes none = broadcast(-kInfinity);
  Lanes upper = none, seen = none;
  for (int r = 0; r < 2 && 16 * r < rows; ++r) {
    const Lanes hi = load(h + 16 * r), sum = add(hi, reach[r]);
    const Lanes exists = broadcast(static_cast<float>(rows - 16 * r)), index = load(kIndex);
    const Lanes most = select_less(index, exists, select_nan(sum, broadcast(kInfinity), sum), none);
    const Lanes hint = select_less(index, exists, select_nan(hi, none, hi), none);
    upper = select_less(upper, most, most, upper), seen = select_less(seen, hint, hint, seen);
  }
  return {greatest(upper), greatest(seen)};
}

constexpr HeadKernels head_table(const char* isa) { return {isa, lo_norms, sketch, lengths, bound}; }

}  // namespace
}  // namespace haomiao
