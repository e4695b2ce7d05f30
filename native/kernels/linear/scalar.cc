// The scalar linear kernels: the rule of docs/ARCHITECTURE.md section 6 written out, portable and slow. Every other
// instruction set is tested against this file.
#include <float.h>

#include "kernels/linear/layout.h"
#include "kernels/linear/tables.h"

namespace haomiao {
namespace {

// ---- activations ----------------------------------------------------------------------------------------------------

size_t activation_bytes(Activation kind, int tokens, int padded_cols) {
  return activation_stride(kind, padded_cols) * static_cast<size_t>(tokens);
}

// A group that holds a NaN or an infinity gets the scale NaN and codes 0, so that its products are NaN. A group too
// small for 127 / max to be finite counts as zero.
void quantize_group(const float* x, int count, ActivationGroup* out) {
  uint32_t greatest = 0;  // as bits: NaN > infinity > every finite magnitude
  for (int i = 0; i < count; ++i) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
    if (magnitude > greatest) greatest = magnitude;
  }
  const float a = f32_from_bits(greatest), inverse = 127.0f / a;
  memset(out, 0, sizeof(*out));
  if (greatest >= 0x7f800000u) {
    out->scale = f32_from_bits(0x7fc00000u);
    return;
  }
  if (inverse > FLT_MAX) return;
  out->scale = a / 127.0f;
  int32_t sum = 0;
  for (int i = 0; i < count; ++i) {
    const int32_t q = static_cast<int32_t>(nearbyintf(x[i] * inverse));
    out->q[i] = static_cast<int8_t>(q);
    sum += q;
  }
  set_corrections(out, sum);
}

void prepare(Activation kind, const float* x, int64_t stride, int, int first, int last, int cols, int padded_cols,
             void* out) {
  const size_t bytes = activation_stride(kind, padded_cols);
  for (int t = first; t < last; ++t) {
    const float* row = x + t * stride;
    uint8_t* target = static_cast<uint8_t*>(out) + static_cast<size_t>(t) * bytes;
    if (kind == Activation::int8) {
      ActivationGroup* groups = reinterpret_cast<ActivationGroup*>(target);
      for (int c = 0; c < padded_cols; c += kGroup) {
        const int left = cols - c;
        quantize_group(row + c, left < 0 ? 0 : left < kGroup ? left : kGroup, groups + c / kGroup);
      }
      continue;
    }
    memset(target, 0, bytes);
    if (kind == Activation::f32) {
      memcpy(target, row, static_cast<size_t>(cols) * 4);
    } else {
      for (int c = 0; c < cols; ++c) {
        const uint16_t h = bf16_from_f32(row[c]);
        memcpy(target + c * 2, &h, 2);
      }
    }
  }
}

// ---- weights --------------------------------------------------------------------------------------------------------

// Code of (row in tile, column in group of 32) of one plane's 512 bytes, without the offset of 8.
int nibble(const uint8_t* plane, int row, int column) {
  const int j = column / 8, high = column / 4 % 2, k = column % 4, r = row / 16, i = row % 16;
  const uint8_t byte = plane[(2 * j + r) * 64 + 4 * i + k];
  return (high ? byte >> 4 : byte & 15) - 8;
}

// One group of a tile of an encoding with scales.
struct ScaledGroup {
  const Weight* weight;
  const uint8_t *hi, *lo;  // lo is nullptr unless both planes are read

  // The tile stores `before` groups ahead of this one.
  ScaledGroup(const Weight& w, int tile, int64_t before, bool both) : weight(&w) {
    const int64_t at = groups_before(w, tile) + before, blocks = w.group / kGroup;
    hi = w.hi + at * (kScaleBytes + blocks * block_bytes());
    lo = both ? w.lo + at * blocks * kNibbleBytes : nullptr;
  }

  int block_bytes() const { return weight->encoding == Encoding::int8 ? kByteBytes : kNibbleBytes; }

  float scale(int row) const {
    const float ws = f32_from_f16(load_u16(hi + row * 2));
    return lo ? ws * plane_factor(weight->lo_shift) : ws;
  }

  // Of a column of one of the group's blocks of 32.
  int code(int block, int row, int column) const {
    const uint8_t* bytes = hi + kScaleBytes + block * block_bytes();
    if (weight->encoding == Encoding::int8) return bytes[(column / 4 * kTileRows + row) * 4 + column % 4] - 128;
    const int code = nibble(bytes, row, column);
    return lo ? code * (1 << weight->lo_shift) + nibble(lo + block * kNibbleBytes, row, column) : code;
  }
};

// Weight of an encoding without scales.
float plain_weight(const Weight& w, int row, int column) {
  const uint8_t* tile = w.hi + static_cast<int64_t>(row / kTileRows) * w.hi_tile_bytes;
  const int64_t r = row % kTileRows;
  if (w.encoding == Encoding::f32) return load_f32(tile + (int64_t{column} * kTileRows + r) * 4);
  return f32_from_bf16(load_u16(tile + ((int64_t{column} / 2 * kTileRows + r) * 2 + column % 2) * 2));
}

// ---- products -------------------------------------------------------------------------------------------------------

float scaled_dot(const Weight& w, int row, bool both, const ActivationGroup* x) {
  const int tile = row / kTileRows, r = row % kTileRows, blocks = w.group / kGroup;
  float y = 0;
  StoredGroups groups = stored_groups(w, tile, 0, w.padded_cols / w.group);
  for (int64_t before = 0; any_left(&groups); ++before) {
    const ScaledGroup group(w, tile, before, both);
    const ActivationGroup* columns = x + take_group(&groups) * blocks;
    for (int block = 0; block < blocks; ++block) {
      int32_t sum = 0;
      for (int c = 0; c < kGroup; ++c) sum += group.code(block, r, c) * columns[block].q[c];
      y = fmaf(group.scale(r) * columns[block].scale, static_cast<float>(sum), y);
    }
  }
  return y;
}

float plain_dot(const Weight& w, int row, const float* x) {
  float y = 0;
  for (int c = 0; c < w.padded_cols; ++c) y = fmaf(plain_weight(w, row, c), x[c], y);
  return y;
}

float bf16_dot(const Weight& w, int row, const uint16_t* x) {
  float y = 0;
  for (int c = 0; c < w.padded_cols; ++c) y = fmaf(plain_weight(w, row, c), f32_from_bf16(x[c]), y);
  return y;
}

void linear(const LinearCall& call) {
  const Weight& w = *call.weight;
  const size_t stride = activation_stride(call.activation, w.padded_cols);
  const bool both = reads_both(call);
  for (int row = call.tile_begin * kTileRows; row < call.tile_end * kTileRows && row < w.rows; ++row) {
    for (int t = 0; t < call.tokens; ++t) {
      const uint8_t* x = static_cast<const uint8_t*>(call.activations) + static_cast<size_t>(t) * stride;
      float y;
      if (call.activation == Activation::int8) {
        y = scaled_dot(w, row, both, reinterpret_cast<const ActivationGroup*>(x));
      } else if (call.activation == Activation::bf16) {
        y = bf16_dot(w, row, reinterpret_cast<const uint16_t*>(x));
      } else {
        y = plain_dot(w, row, reinterpret_cast<const float*>(x));
      }
      call.out[t * call.out_stride + row] = call.bias ? y + call.bias[row] : y;
    }
  }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

void read_row(const Weight& w, int32_t row, float* out) {
  if (w.encoding == Encoding::f32 || w.encoding == Encoding::bf16) {
    for (int c = 0; c < w.cols; ++c) out[c] = plain_weight(w, row, c);
    return;
  }
  const int tile = row / kTileRows, r = row % kTileRows;
  for (int c = 0; c < w.cols; ++c) out[c] = 0;
  StoredGroups groups = stored_groups(w, tile, 0, w.padded_cols / w.group);
  for (int64_t before = 0; any_left(&groups); ++before) {
    const ScaledGroup group(w, tile, before, w.lo != nullptr);
    const int begin = take_group(&groups) * w.group;
    for (int c = begin; c < begin + w.group && c < w.cols; ++c) {
      out[c] = group.scale(r) * static_cast<float>(group.code((c - begin) / kGroup, r, c % kGroup));
    }
  }
}

size_t scratch_bytes(const Weight&, int) { return 0; }

}  // namespace

const LinearKernels kScalarLinear = {"scalar", activation_bytes, prepare, scratch_bytes, linear, read_row};

}  // namespace haomiao
