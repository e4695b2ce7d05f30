// Linear kernels for ARM with the dot-product instructions (Armv8.2). One register holds 4 rows.
//
// Int points: the dot product is signed, so nibbles go in as 0..15, one or two planes of them, and bytes as they were
// before 128 was added; sums are exact in 32 bits.
#include <arm_neon.h>

#include "kernels/linear/layout.h"
#include "kernels/linear/tables.h"

#define HAOMIAO_INLINE inline __attribute__((always_inline))
#define HAOMIAO_UNROLL _Pragma("GCC unroll 8")

namespace haomiao {
namespace {

constexpr int kLanes = 4;

// The results of one tile.
struct Target {
  float* y;  // of the first token and row of the tile
  int64_t stride;
  const float* bias;  // of the tile's rows, or nullptr
  int rows;           // rows that exist

  // Rows 4 * quartet.. of one token.
  HAOMIAO_INLINE void store(int token, int quartet, float32x4_t value) const {
    const int row = quartet * kLanes, count = rows - row;
    float* out = y + token * stride + row;
    if (count >= kLanes) {
      vst1q_f32(out, bias ? vaddq_f32(value, vld1q_f32(bias + row)) : value);
      return;
    }
    float lanes[kLanes];
    vst1q_f32(lanes, value);
    for (int i = 0; i < count; ++i) out[i] = bias ? lanes[i] + bias[row + i] : lanes[i];
  }
};

Target target_of(const LinearCall& call, int tile, int token) {
  const int row = tile * kTileRows, left = call.weight->rows - row;
  return {call.out + token * call.out_stride + row, call.out_stride, call.bias ? call.bias + row : nullptr,
          left < kTileRows ? left : kTileRows};
}

// ---- int points -----------------------------------------------------------------------------------------------------

enum class Form { hi, both, bytes };

constexpr int planes_of(Form f) { return f == Form::both ? 2 : 1; }
constexpr int most_shared(Form f) { return f == Form::both ? 2 : 4; }  // 16 accumulators
constexpr int block_bytes(Form f) { return f == Form::bytes ? kByteBytes : kNibbleBytes; }

// One tile: its groups lie one after the other, those that it stores.
struct Tile {
  const uint8_t *hi, *lo;
  StoredGroups groups;
  int blocks_per_scale;
  int shift;
};

// Codes of columns 4 * quad.. and rows 16 * r + 4 * v..: plane 0 is the upper or only one.
template <Form F>
HAOMIAO_INLINE void load_codes(const uint8_t* hi, const uint8_t* lo, int quad, int r, int v,
                               int8x16_t codes[planes_of(F)]) {
  if constexpr (F == Form::bytes) {
    codes[0] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(hi + quad * 128 + r * 64 + v * 16), vdupq_n_u8(0x80)));
    return;
  }
  for (int p = 0; p < planes_of(F); ++p) {
    const uint8x16_t pair = vld1q_u8((p == 0 ? hi : lo) + (quad / 2 * 2 + r) * 64 + v * 16);
    codes[p] = vreinterpretq_s8_u8(quad % 2 ? vshrq_n_u8(pair, 4) : vandq_u8(pair, vdupq_n_u8(15)));
  }
}

HAOMIAO_INLINE const ActivationGroup& group_at(const uint8_t* x, size_t bytes) {
  return *reinterpret_cast<const ActivationGroup*>(x + bytes);
}

// One block of 32 columns, rows 16 * r..16 * r + 15, for M tokens `stride` bytes apart: y[m][v] += scale * sum.
template <Form F, int M>
HAOMIAO_INLINE void add_block(const uint8_t* hi, const uint8_t* lo, int r, int shift, const float32x4_t scale[4],
                              const uint8_t* x, size_t stride, float32x4_t y[M][8]) {
  __asm__("" : "+r"(x));  // or the compiler keeps all broadcasts of one half tile, on the stack, for the other
  constexpr int kPlanes = planes_of(F);
  int32x4_t sum[kPlanes][M][4];
  HAOMIAO_UNROLL
  for (int p = 0; p < kPlanes; ++p) {
    HAOMIAO_UNROLL
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < 4; ++v) sum[p][m][v] = vdupq_n_s32(0);
    }
  }
  HAOMIAO_UNROLL
  for (int quad = 0; quad < 8; ++quad) {
    HAOMIAO_UNROLL
    for (int v = 0; v < 4; ++v) {
      int8x16_t codes[kPlanes];
      load_codes<F>(hi, lo, quad, r, v, codes);
      HAOMIAO_UNROLL
      for (int m = 0; m < M; ++m) {
        int32_t four;
        memcpy(&four, group_at(x, m * stride).q + 4 * quad, 4);
        const int8x16_t q = vreinterpretq_s8_s32(vdupq_n_s32(four));
        for (int p = 0; p < kPlanes; ++p) sum[p][m][v] = vdotq_s32(sum[p][m][v], codes[p], q);
      }
    }
  }
  HAOMIAO_UNROLL
  for (int m = 0; m < M; ++m) {
    const ActivationGroup& group = group_at(x, m * stride);
    const int32_t zero8 = group.correction[kZero8];
    const int32_t correction = F == Form::bytes ? 0 : F == Form::hi ? zero8 : zero8 * ((1 << shift) + 1);
    for (int v = 0; v < 4; ++v) {
      int32x4_t total = vaddq_s32(sum[kPlanes - 1][m][v], vdupq_n_s32(correction));
      if constexpr (kPlanes == 2) total = vaddq_s32(total, vshlq_s32(sum[0][m][v], vdupq_n_s32(shift)));
      float32x4_t& sums = y[m][4 * r + v];
      sums = vfmaq_f32(sums, vmulq_n_f32(scale[v], group.scale), vcvtq_f32_s32(total));
    }
  }
}

// All columns of one tile for M tokens that start at x.
template <Form F, int M>
void multiply_tile(const Tile& tile, const uint8_t* x, size_t stride, const Target& target) {
  float32x4_t y[M][8];
  for (int m = 0; m < M; ++m) {
    for (int quartet = 0; quartet < 8; ++quartet) y[m][quartet] = vdupq_n_f32(0);
  }
  const float factor = F == Form::both ? plane_factor(tile.shift) : 1.0f;
  const uint8_t *hi = tile.hi, *lo = tile.lo;
  for (StoredGroups groups = tile.groups; any_left(&groups);) {
    float32x4_t scale[8];
    for (int quartet = 0; quartet < 8; ++quartet) {
      const float16x4_t halves = vreinterpret_f16_u8(vld1_u8(hi + quartet * 8));
      scale[quartet] = vmulq_n_f32(vcvt_f32_f16(halves), factor);
    }
    hi += kScaleBytes;
    const uint8_t* columns =
        x + static_cast<size_t>(take_group(&groups) * tile.blocks_per_scale) * sizeof(ActivationGroup);
    for (int block = 0; block < tile.blocks_per_scale; ++block) {
      for (int r = 0; r < 2; ++r) add_block<F, M>(hi, lo, r, tile.shift, scale + 4 * r, columns, stride, y);
      hi += block_bytes(F);
      if constexpr (F == Form::both) lo += kNibbleBytes;
      columns += sizeof(ActivationGroup);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int quartet = 0; quartet < 8; ++quartet) target.store(m, quartet, y[m][quartet]);
  }
}

using MultiplyTile = void (*)(const Tile&, const uint8_t*, size_t, const Target&);

template <Form F>
constexpr MultiplyTile kMultiply[] = {multiply_tile<F, 1>, multiply_tile<F, 2>, multiply_tile<F, 3>,
                                      multiply_tile<F, 4>};
template <>
constexpr MultiplyTile kMultiply<Form::both>[] = {multiply_tile<Form::both, 1>, multiply_tile<Form::both, 2>};

template <Form F>
void linear_int(const LinearCall& call) {
  const Weight& w = *call.weight;
  const size_t stride = activation_stride(Activation::int8, w.padded_cols);
  const uint8_t* x = static_cast<const uint8_t*>(call.activations);
  const int blocks = w.group / kGroup;
  for (int index = call.tile_begin; index < call.tile_end; ++index) {
    const int64_t before = groups_before(w, index);
    const Tile tile = {w.hi + before * (kScaleBytes + blocks * block_bytes(F)),
                       F == Form::both ? w.lo + before * blocks * kNibbleBytes : nullptr,
                       stored_groups(w, index, 0, w.padded_cols / w.group), blocks, w.lo_shift};
    for (int token = 0; token < call.tokens; token += most_shared(F)) {
      const int left = call.tokens - token, count = left < most_shared(F) ? left : most_shared(F);
      kMultiply<F>[count - 1](tile, x + token* stride, stride, target_of(call, index, token));
    }
  }
}

// ---- float points ---------------------------------------------------------------------------------------------------

constexpr int kMostFloat = 3;  // 24 accumulators

template <Activation A>
HAOMIAO_INLINE float value_at(const uint8_t* x, int64_t column) {
  if constexpr (A == Activation::f32) return load_f32(x + column * 4);
  return f32_from_bf16(load_u16(x + column * 2));
}

// Weights of one column (f32), or of the pair that holds it (bf16), rows 4 * quartet...
template <Encoding E>
HAOMIAO_INLINE float32x4_t load_column(const uint8_t* tile, int64_t column, int quartet) {
  if constexpr (E == Encoding::f32) {
    return vreinterpretq_f32_u8(vld1q_u8(tile + column * 128 + quartet * 16));
  } else {
    const uint32x4_t pair = vreinterpretq_u32_u8(vld1q_u8(tile + column / 2 * 128 + quartet * 16));
    return vreinterpretq_f32_u32(column % 2 ? vandq_u32(pair, vdupq_n_u32(0xffff0000u)) : vshlq_n_u32(pair, 16));
  }
}

template <Encoding E, Activation A, int M>
void multiply_tile_float(const uint8_t* tile, int cols, const uint8_t* x, size_t stride, const Target& target) {
  float32x4_t y[M][8];
  for (int m = 0; m < M; ++m) {
    for (int quartet = 0; quartet < 8; ++quartet) y[m][quartet] = vdupq_n_f32(0);
  }
  for (int column = 0; column < cols; ++column) {
    HAOMIAO_UNROLL
    for (int quartet = 0; quartet < 8; ++quartet) {
      const float32x4_t w = load_column<E>(tile, column, quartet);
      HAOMIAO_UNROLL
      for (int m = 0; m < M; ++m) {
        y[m][quartet] = vfmaq_n_f32(y[m][quartet], w, value_at<A>(x + m * stride, column));
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int quartet = 0; quartet < 8; ++quartet) target.store(m, quartet, y[m][quartet]);
  }
}

template <Encoding E, Activation A>
void linear_float(const LinearCall& call) {
  constexpr decltype(&multiply_tile_float<E, A, 1>) kernels[] = {
      multiply_tile_float<E, A, 1>, multiply_tile_float<E, A, 2>, multiply_tile_float<E, A, 3>};
  const Weight& w = *call.weight;
  const size_t stride = activation_stride(A, w.padded_cols);
  const uint8_t* x = static_cast<const uint8_t*>(call.activations);
  for (int index = call.tile_begin; index < call.tile_end; ++index) {
    for (int token = 0; token < call.tokens; token += kMostFloat) {
      const int count = call.tokens - token < kMostFloat ? call.tokens - token : kMostFloat;
      kernels[count - 1](w.hi + index * w.hi_tile_bytes, w.padded_cols, x + token * stride, stride,
                         target_of(call, index, token));
    }
  }
}

void linear(const LinearCall& call) {
  switch (call.weight->encoding) {
    case Encoding::f32:
      return linear_float<Encoding::f32, Activation::f32>(call);
    case Encoding::bf16:
      if (call.activation == Activation::f32) return linear_float<Encoding::bf16, Activation::f32>(call);
      return linear_float<Encoding::bf16, Activation::bf16>(call);
    case Encoding::int8:
      return linear_int<Form::bytes>(call);
    case Encoding::planes:
      return reads_both(call) ? linear_int<Form::both>(call) : linear_int<Form::hi>(call);
  }
}

size_t scratch_bytes(const Weight&, int) { return 0; }

// ---- activations ----------------------------------------------------------------------------------------------------

// See quantize_group() of scalar.cc: the same values. All 32 floats are read.
void quantize_group(const float* x, ActivationGroup* out) {
  uint32x4_t greater = vdupq_n_u32(0);
  for (int i = 0; i < kGroup; i += kLanes) {
    const uint32x4_t bits = vreinterpretq_u32_f32(vld1q_f32(x + i));
    greater = vmaxq_u32(greater, vandq_u32(bits, vdupq_n_u32(0x7fffffffu)));
  }
  const uint32_t greatest = vmaxvq_u32(greater);
  const float a = f32_from_bits(greatest), inverse = 127.0f / a;
  memset(out, 0, sizeof(*out));
  if (greatest >= 0x7f800000u) out->scale = f32_from_bits(0x7fc00000u);
  if (greatest >= 0x7f800000u || inverse > 0x1.fffffep127f) return;
  out->scale = a / 127.0f;
  int32x4_t sum = vdupq_n_s32(0);
  for (int i = 0; i < kGroup; i += 2 * kLanes) {
    const int32x4_t q0 = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), inverse));
    const int32x4_t q1 = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + kLanes), inverse));
    sum = vaddq_s32(sum, vaddq_s32(q0, q1));
    vst1_s8(out->q + i, vmovn_s16(vcombine_s16(vmovn_s32(q0), vmovn_s32(q1))));
  }
  set_corrections(out, vaddvq_s32(sum));
}

void prepare(Activation kind, const float* x, int64_t stride, int tokens, int first, int last, int cols,
             int padded_cols, void* out) {
  if (kind != Activation::int8) {
    kScalarLinear.prepare(kind, x, stride, tokens, first, last, cols, padded_cols, out);
    return;
  }
  const size_t bytes = activation_stride(kind, padded_cols);
  for (int t = first; t < last; ++t) {
    const float* row = x + t * stride;
    ActivationGroup* groups = reinterpret_cast<ActivationGroup*>(static_cast<uint8_t*>(out) + t * bytes);
    int c = 0;
    for (; c + kGroup <= cols; c += kGroup) quantize_group(row + c, groups++);
    for (; c < padded_cols; c += kGroup) {
      float rest[kGroup] = {};
      if (c < cols) memcpy(rest, row + c, (cols - c) * sizeof(float));
      quantize_group(rest, groups++);
    }
  }
}

size_t activation_bytes(Activation kind, int tokens, int padded_cols) {
  return activation_stride(kind, padded_cols) * static_cast<size_t>(tokens);
}

void read_row(const Weight& weight, int32_t row, float* out) { kScalarLinear.read_row(weight, row, out); }

}  // namespace

const LinearKernels kNeonLinear = {"neon", activation_bytes, prepare, scratch_bytes, linear, read_row};

}  // namespace haomiao
