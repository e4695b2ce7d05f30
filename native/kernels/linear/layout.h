// Byte layouts that every instruction set shares: weight tiles (docs/ARCHITECTURE.md, section 4) and prepared
// activations. Private to native/kernels/linear. Only constants, plain structs and `static` functions: a file compiled
// for one instruction set must not lend its code to another through a shared inline function.
#pragma once
#include <math.h>
#include <string.h>

#include "kernels/linear/linear.h"

namespace haomiao {

inline constexpr int kScaleBytes = kTileRows * 2;            // the f16 scales of one weight group
inline constexpr int kNibbleBytes = kTileRows * kGroup / 2;  // one plane of 32 rows x 32 columns
inline constexpr int kByteBytes = kTileRows * kGroup;        // int8 codes of 32 rows x 32 columns

// What is added to a code to make an unsigned byte, as the dot products of x86 want one operand: nibbles are stored +
// 8, bytes + 128, and both planes together are + 136 once they are unpacked, whatever their lo_shift.
enum Zero { kZero8 = 0, kZero128 = 1, kZero136 = 2 };

// One token's 32 columns at an int point: x ~ scale * q. A token's groups lie side by side, tokens one after the other,
// so that where a token stands depends on nothing but its index.
struct ActivationGroup {
  int8_t q[kGroup];
  int32_t correction[3];  // -zero * sum(q) for the three zeros
  float scale;
};
static_assert(sizeof(ActivationGroup) == 48);

static inline void set_corrections(ActivationGroup* group, int32_t sum) {
  group->correction[kZero8] = -8 * sum;
  group->correction[kZero128] = -128 * sum;
  group->correction[kZero136] = -136 * sum;
}

// Bytes between two tokens of prepared activations.
static inline size_t activation_stride(Activation kind, int padded_cols) {
  switch (kind) {
    case Activation::f32:
      return static_cast<size_t>(padded_cols) * 4;
    case Activation::bf16:
      return (static_cast<size_t>(padded_cols) + 1) / 2 * 4;
    case Activation::int8:
      return static_cast<size_t>(padded_cols) / kGroup * sizeof(ActivationGroup);
  }
  return 0;
}

static inline float load_f32(const void* p) {
  float f;
  memcpy(&f, p, 4);
  return f;
}

static inline uint16_t load_u16(const void* p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return h;
}

static inline float f32_from_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static inline uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

static inline float f32_from_bf16(uint16_t h) { return f32_from_bits(static_cast<uint32_t>(h) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
static inline uint16_t bf16_from_f32(float f) {
  const uint32_t bits = bits_of(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// IEEE binary16 to binary32, exact.
static inline float f32_from_f16(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  if (exponent == 31) return f32_from_bits(sign | 0x7f800000u | (fraction << 13));
  return f32_from_bits(sign | ((exponent + 112u) << 23) | (fraction << 13));
}

// 2^-shift, the factor between the scale of `hi` and that of both planes.
static inline float plane_factor(int shift) { return f32_from_bits(static_cast<uint32_t>(127 - shift) << 23); }

// ---- groups that a tile stores --------------------------------------------------------------------------------------

// Where the groups of a tile begin, counted in groups.
static inline int64_t groups_before(const Weight& w, int tile) {
  return w.mask.first ? w.mask.first[tile] : int64_t{tile} * (w.padded_cols / w.group);
}

// Some groups of one tile, ascending.
struct StoredGroups {
  const uint64_t* words;  // of the tile, or nullptr: all groups
  int end;
  int first;      // the group of bit 0
  uint64_t bits;  // those that are still to come
};

static inline uint64_t stored_bits(const uint64_t* words, int first, int end) {
  const int left = end - first;
  const uint64_t exist = left >= 64 ? ~uint64_t{0} : left <= 0 ? 0 : (uint64_t{1} << left) - 1;
  return words ? words[first / 64] & exist : exist;
}

// Of groups [begin, end), which exist.
static inline StoredGroups stored_groups(const Weight& w, int tile, int begin, int end) {
  const uint64_t* words = w.mask.bits ? w.mask.bits + tile * w.mask.words : nullptr;
  const int first = begin / 64 * 64;
  return {words, end, first, stored_bits(words, first, end) & ~uint64_t{0} << begin % 64};
}

// Moves on to where groups are left; false if there are none.
static inline bool any_left(StoredGroups* groups) {
  while (groups->bits == 0) {
    groups->first += 64;
    if (groups->first >= groups->end) return false;
    groups->bits = stored_bits(groups->words, groups->first, groups->end);
  }
  return true;
}

// The next group, after any_left().
static inline int take_group(StoredGroups* groups) {
  const int group = groups->first + __builtin_ctzll(groups->bits);
  groups->bits &= groups->bits - 1;
  return group;
}

// How many of [0, group) the tile stores.
static inline int64_t stored_before(const Weight& w, int tile, int group) {
  if (!w.mask.bits) return group;
  const uint64_t* words = w.mask.bits + tile * w.mask.words;
  int64_t count = 0;
  for (int i = 0; i < group / 64; ++i) count += __builtin_popcountll(words[i]);
  const uint64_t below = (uint64_t{1} << group % 64) - 1;
  return below ? count + __builtin_popcountll(words[group / 64] & below) : count;
}

static inline bool reads_both(const LinearCall& call) {
  return call.weight->encoding == Encoding::planes && call.planes == Planes::both && call.weight->lo != nullptr;
}

}  // namespace haomiao
