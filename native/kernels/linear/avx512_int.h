// Int points of AVX-512 VNNI. Included by avx512.cc only.
//
// Int points: up to 8 tokens share one pass over a tile, its bytes unpacked in registers; for many tokens a part of the
// tile is unpacked once, to unsigned bytes in `scratch`. Either way every output is the same sum in the same order
// (docs/ARCHITECTURE.md, section 6), so that a token's bits do not depend on its company.
#pragma once
#include "kernels/linear/avx512_target.h"

namespace haomiao {
namespace {

constexpr int kMostShared = 8;     // tokens that share one pass over a tile
constexpr int kBestShared = 6;     // most whose accumulators all stay in registers: 2 x 6 integer and 2 x 6 float
constexpr int kFewTokens = 24;     // up to so many tokens unpacking a tile does not pay
constexpr int kPartBlocks = 12;    // unpacked, 14 KiB; a multiple of every group / 32
constexpr int kPanelTokens = 192;  // a multiple of kBestShared
constexpr int kPrefetchBytes = 4608;

// How 32 columns x 32 rows of weights are stored; each becomes unsigned bytes code + zero.
enum class Form {
  hi,            // nibbles
  both,          // two planes of nibbles, lo_shift 4
  shifted,       // two planes of nibbles, lo_shift 0..3
  bytes,         // one byte each
  unpacked_hi,   // bytes made by unpack_tile<hi>, with f32 scales
  unpacked_both  // bytes made by unpack_tile<both> or <shifted>, with f32 scales
};

// A run of groups of one tile; those that it stores lie one after the other.
struct Part {
  const uint8_t *hi, *lo;
  StoredGroups groups;
  int blocks_per_scale;  // group / 32
  int shift;             // lo_shift
  bool first, last;      // of the tile
};

constexpr int kUnpackedScales = kTileRows * 4, kUnpackedBlock = kUnpackedScales + kByteBytes;

constexpr bool is_unpacked(Form f) { return f == Form::unpacked_hi || f == Form::unpacked_both; }
constexpr bool has_lo(Form f) { return f == Form::both || f == Form::shifted; }
constexpr bool has_bytes(Form f) { return f == Form::bytes || is_unpacked(f); }
constexpr int block_bytes(Form f) { return has_bytes(f) ? kByteBytes : kNibbleBytes; }
constexpr Zero zero_of(Form f) {
  return f == Form::bytes ? kZero128 : f == Form::hi || f == Form::unpacked_hi ? kZero8 : kZero136;
}

// Unsigned bytes of columns 8j..8j+3 (`left`) and 8j+4..8j+7 (`right`), rows 0..15 and 16..31, in ascending addresses.
template <Form F>
HAOMIAO_INLINE void load_columns(const uint8_t* hi, const uint8_t* lo, int j, int shift, __m512i left[2],
                                 __m512i right[2]) {
  if constexpr (has_bytes(F)) {
    for (int r = 0; r < 2; ++r) left[r] = _mm512_loadu_si512(hi + j * 256 + r * 64);
    for (int r = 0; r < 2; ++r) right[r] = _mm512_loadu_si512(hi + j * 256 + 128 + r * 64);
    return;
  }
  const __m512i low = _mm512_set1_epi8(15);
  for (int r = 0; r < 2; ++r) {
    const __m512i h = _mm512_loadu_si512(hi + (2 * j + r) * 64);
    if constexpr (!has_lo(F)) {
      left[r] = _mm512_and_si512(h, low);
      right[r] = _mm512_and_si512(_mm512_srli_epi16(h, 4), low);
      continue;
    }
    const __m512i l = _mm512_loadu_si512(lo + (2 * j + r) * 64);
    if constexpr (F == Form::both) {  // 0xca: where `low` take the second, else the third
      left[r] = _mm512_ternarylogic_epi32(low, l, _mm512_slli_epi16(h, 4), 0xca);
      right[r] = _mm512_ternarylogic_epi32(low, _mm512_srli_epi16(l, 4), h, 0xca);
    } else {
      const __m128i count = _mm_cvtsi32_si128(shift);
      const __m512i offset = _mm512_set1_epi8(static_cast<char>(128 - (8 << shift)));  // makes the zero 136
      const __m512i h_left = _mm512_and_si512(h, low), h_right = _mm512_and_si512(_mm512_srli_epi16(h, 4), low);
      const __m512i l_left = _mm512_and_si512(l, low), l_right = _mm512_and_si512(_mm512_srli_epi16(l, 4), low);
      left[r] = _mm512_add_epi8(_mm512_add_epi8(_mm512_sll_epi16(h_left, count), l_left), offset);
      right[r] = _mm512_add_epi8(_mm512_add_epi8(_mm512_sll_epi16(h_right, count), l_right), offset);
    }
  }
}

// Scales of rows 0..15 and 16..31; returns where the codes begin.
template <Form F>
HAOMIAO_INLINE const uint8_t* load_scales(const uint8_t* group, __m512 factor, __m512 scale[2]) {
  for (int r = 0; r < 2; ++r) {
    if constexpr (is_unpacked(F)) {
      scale[r] = _mm512_loadu_ps(group + r * 64);
    } else {
      scale[r] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + r * 32)));
      if constexpr (has_lo(F)) scale[r] = _mm512_mul_ps(scale[r], factor);
    }
  }
  return group + (is_unpacked(F) ? kUnpackedScales : kScaleBytes);
}

HAOMIAO_INLINE const ActivationGroup& group_at(const uint8_t* x, size_t bytes) {
  return *reinterpret_cast<const ActivationGroup*>(x + bytes);
}

HAOMIAO_INLINE __m512i broadcast_columns(const ActivationGroup& x, int quad) {
  int32_t four;
  memcpy(&four, x.q + 4 * quad, 4);
  return _mm512_set1_epi32(four);
}

HAOMIAO_INLINE void prefetch_lines(const uint8_t* begin, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(begin + i), _MM_HINT_T0);
}

// One block of 32 columns: y[m] += scale * (sum over its columns), for M tokens `stride` bytes apart. `Keep` also
// writes the block to `kept`, unpacked: [32 f32 scales][8 x 128 bytes].
template <Form F, int M, bool Keep>
HAOMIAO_INLINE void add_block(const uint8_t* hi, const uint8_t* lo, int shift, const __m512 scale[2], const uint8_t* x,
                              size_t stride, __m512 y[M][2], uint8_t* kept) {
  if constexpr (Keep) {
    for (int r = 0; r < 2; ++r) _mm512_store_ps(kept + r * 64, scale[r]);
  }
  __m512i sum[M][2];
  HAOMIAO_UNROLL
  for (int m = 0; m < M; ++m) {
    sum[m][0] = sum[m][1] = _mm512_set1_epi32(group_at(x, m * stride).correction[zero_of(F)]);
  }
  HAOMIAO_UNROLL
  for (int j = 0; j < 4; ++j) {
    __m512i columns[2][2];
    load_columns<F>(hi, lo, j, shift, columns[0], columns[1]);
    if constexpr (Keep) {
      for (int i = 0; i < 4; ++i) _mm512_store_si512(kept + kUnpackedScales + j * 256 + i * 64, columns[i / 2][i % 2]);
    }
    HAOMIAO_UNROLL
    for (int half = 0; half < 2; ++half) {
      HAOMIAO_UNROLL
      for (int m = 0; m < M; ++m) {
        const __m512i q = broadcast_columns(group_at(x, m * stride), 2 * j + half);
        add_dot(sum[m][0], columns[half][0], q);
        add_dot(sum[m][1], columns[half][1], q);
      }
    }
  }
  HAOMIAO_UNROLL
  for (int m = 0; m < M; ++m) {
    const __m512 s = _mm512_set1_ps(group_at(x, m * stride).scale);
    for (int r = 0; r < 2; ++r) {
      y[m][r] = _mm512_fmadd_ps(_mm512_mul_ps(scale[r], s), _mm512_cvtepi32_ps(sum[m][r]), y[m][r]);
    }
  }
}

// The groups of `part` for M tokens whose first column is at x. What earlier blocks of the row added up to lies in
// `sums` [M][32 rows] unless `part` is the first; there it goes unless `part` is the last. `Keep` leaves the blocks
// unpacked at `kept`.
template <Form F, int M, bool Keep = false>
void multiply_part(const Part& part, const uint8_t* x, size_t stride, float* sums, const Target& target,
                   uint8_t* kept = nullptr) {
  __m512 y[M][2];
  HAOMIAO_UNROLL
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < 2; ++r) y[m][r] = part.first ? _mm512_setzero_ps() : _mm512_load_ps(sums + m * 32 + r * 16);
  }
  const __m512 factor = _mm512_set1_ps(plane_factor(part.shift));
  const uint8_t *hi = part.hi, *lo = part.lo;
  for (StoredGroups groups = part.groups; any_left(&groups);) {
    __m512 scale[2];
    if constexpr (!is_unpacked(F)) hi = load_scales<F>(hi, factor, scale);
    const uint8_t* columns =
        x + static_cast<size_t>(take_group(&groups) * part.blocks_per_scale) * sizeof(ActivationGroup);
    for (int block = 0; block < part.blocks_per_scale; ++block) {
      if constexpr (is_unpacked(F)) hi = load_scales<F>(hi, factor, scale);
      if constexpr (F == Form::hi && M > 4) prefetch_lines(hi + kPrefetchBytes, kNibbleBytes + kScaleBytes);
      add_block<F, M, Keep>(hi, lo, part.shift, scale, columns, stride, y, kept);
      if constexpr (Keep) kept += kUnpackedBlock;
      hi += block_bytes(F);
      if constexpr (has_lo(F)) lo += kNibbleBytes;
      columns += sizeof(ActivationGroup);
    }
  }
  HAOMIAO_UNROLL
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < 2; ++r) {
      if (part.last) {
        target.store(m, r, y[m][r]);
      } else {
        _mm512_store_ps(sums + m * 32 + r * 16, y[m][r]);
      }
    }
  }
}

using MultiplyPart = void (*)(const Part&, const uint8_t*, size_t, float*, const Target&, uint8_t*);

template <Form F>
constexpr MultiplyPart kMultiply[] = {multiply_part<F, 1>, multiply_part<F, 2>, multiply_part<F, 3>,
                                      multiply_part<F, 4>, multiply_part<F, 5>, multiply_part<F, 6>,
                                      multiply_part<F, 7>, multiply_part<F, 8>};

// Groups [begin, end) of a tile.
template <Form F>
Part part_of(const Weight& w, int tile, int begin, int end) {
  const int blocks = w.group / kGroup;
  const int64_t at = groups_before(w, tile) + stored_before(w, tile, begin);
  return {w.hi + at * (kScaleBytes + blocks * block_bytes(F)),
          has_lo(F) ? w.lo + at * blocks * kNibbleBytes : nullptr,
          stored_groups(w, tile, begin, end),
          blocks,
          w.lo_shift,
          begin == 0,
          end == w.padded_cols / w.group};
}

// A few tokens: the tile streams through the registers, once for each pass of up to 8 tokens.
template <Form F>
void multiply_few(const LinearCall& call, int tile) {
  const Weight& w = *call.weight;
  const size_t stride = activation_stride(Activation::int8, w.padded_cols);
  const uint8_t* x = static_cast<const uint8_t*>(call.activations);
  const Part whole = part_of<F>(w, tile, 0, w.padded_cols / w.group);
  int passes = (call.tokens + kMostShared - 1) / kMostShared;
  for (int token = 0, count; token < call.tokens; token += count, --passes) {
    count = (call.tokens - token + passes - 1) / passes;
    kMultiply<F>[count - 1](whole, x + token* stride, stride, nullptr, target_of(call, tile, token), nullptr);
  }
}

// Many tokens: a part of the tile that fits the first cache, unpacked, serves a whole panel of tokens. The first pass
// unpacks it on the way, so that reading memory overlaps with arithmetic.
template <Form F>
void multiply_panel(const LinearCall& call, int tile, int first, int last) {
  constexpr Form unpacked = F == Form::bytes ? Form::bytes : F == Form::hi ? Form::unpacked_hi : Form::unpacked_both;
  const Weight& w = *call.weight;
  const size_t stride = activation_stride(Activation::int8, w.padded_cols);
  const uint8_t* x = static_cast<const uint8_t*>(call.activations);
  float* sums = static_cast<float*>(call.scratch);
  uint8_t* kept = static_cast<uint8_t*>(call.scratch) + kPanelTokens * kTileRows * 4;
  const int groups = w.padded_cols / w.group, most = kPartBlocks * kGroup / w.group;
  for (int begin = 0; begin < groups; begin += most) {
    Part part = part_of<F>(w, tile, begin, groups - begin < most ? groups : begin + most);
    int token = first;
    if (F != Form::bytes && last - first > kBestShared) {
      multiply_part<F, kBestShared, true>(part, x + token * stride, stride, sums, target_of(call, tile, token), kept);
      part.hi = kept;
      token += kBestShared;
    }
    for (; token < last; token += kBestShared) {
      const int count = last - token < kBestShared ? last - token : kBestShared;
      const MultiplyPart multiply = part.hi == kept ? kMultiply<unpacked>[count - 1] : kMultiply<F>[count - 1];
      multiply(part, x + token * stride, stride, sums + (token - first) * kTileRows, target_of(call, tile, token),
               nullptr);
    }
  }
}

template <Form F>
void linear_int(const LinearCall& call) {
  for (int tile = call.tile_begin; tile < call.tile_end; ++tile) {
    if (call.tokens <= kFewTokens) {
      multiply_few<F>(call, tile);
      continue;
    }
    for (int token = 0; token < call.tokens; token += kPanelTokens) {
      multiply_panel<F>(call, tile, token, call.tokens - token < kPanelTokens ? call.tokens : token + kPanelTokens);
    }
  }
}

HAOMIAO_INLINE size_t int_scratch_bytes(int tokens) {
  return tokens <= kFewTokens ? 0 : static_cast<size_t>(kPanelTokens) * kTileRows * 4 + kPartBlocks * kUnpackedBlock;
}

}  // namespace
}  // namespace haomiao
