// Int points of AVX2. Included by avx2.cc only.
//
// Zen 3 starts at most four vector operations in a cycle, two of them multiplications, and sustains about three: what
// counts is how many operations a product costs.
//
// Nibbles 0..15 are multiplied as bytes: 32 columns of 15 * 127 fit the 16-bit sums of vpmaddubsw, which are widened
// once per block. Codes of eight bits would saturate there, so that they are multiplied as words (vpmaddwd, 32-bit
// sums): as many operations as two planes of nibbles, and fewer at the end of a block. A few tokens take the four bytes
// of a quad as they are for the words of columns 0 and 2, columns 1 and 3 still in their upper halves: w0 + 256 w1.
// What that adds, 256 w1 x0, the activations of columns 1 and 3 take off again: they are x1 - 256 x0, which fits 16
// bits.
//
// A few tokens: a register holds 8 rows, activations are broadcast, the tile streams through the registers. Eight
// tokens and more: a register holds 8 tokens and weights are broadcast, so that the activations are operands in memory
// and a broadcast serves up to 64 tokens; 32 columns of the tile are unpacked first. Either way every output is the
// same sum in the same order (docs/ARCHITECTURE.md, section 6): a token's bits do not depend on its company.
#pragma once
#include "kernels/linear/avx2_target.h"

namespace haomiao {
namespace {

// How 32 columns x 32 rows of weights are stored; all but `hi` become bytes: code + zero, unsigned, in even columns,
// code + zero - 128, signed, in odd ones.
enum class Form {
  hi,       // nibbles
  both,     // two planes of nibbles, lo_shift 4
  shifted,  // two planes of nibbles, lo_shift 0..3
  bytes     // one byte each
};

constexpr int kPrefetchBytes = 2304;  // a tile is read so far ahead: the processor alone sees one block

constexpr bool has_lo(Form f) { return f == Form::both || f == Form::shifted; }
constexpr int block_bytes(Form f) { return f == Form::bytes ? kByteBytes : kNibbleBytes; }

// One tile: its groups lie one after the other, those that it stores.
struct Tile {
  const uint8_t *hi, *lo;
  StoredGroups groups;
  int blocks_per_scale;
  int shift;
};

template <Form F>
HAOMIAO_INLINE Tile tile_of(const Weight& w, int index) {
  const int blocks = w.group / kGroup;
  const int64_t before = groups_before(w, index);
  return {w.hi + before * (kScaleBytes + blocks * block_bytes(F)),
          has_lo(F) ? w.lo + before * blocks * kNibbleBytes : nullptr,
          stored_groups(w, index, 0, w.padded_cols / w.group), blocks, w.lo_shift};
}

constexpr int zero_of(Form f) { return f == Form::bytes ? 128 : 136; }

// Nibbles, or bytes, of columns 8j..8j+3 (`left`) and 8j+4..8j+7 (`right`), rows 8 * octet...
template <Form F>
HAOMIAO_INLINE void load_columns(const uint8_t* hi, const uint8_t* lo, int j, int octet, int shift, __m256i& left,
                                 __m256i& right) {
  const __m256i low = _mm256_set1_epi8(15);
  const int at = j * 128 + octet * 32;
  if constexpr (F == Form::bytes) {
    const __m256i flip = _mm256_set1_epi16(-0x8000);
    left = _mm256_xor_si256(load(hi + 2 * j * 128 + octet * 32), flip);
    right = _mm256_xor_si256(load(hi + (2 * j + 1) * 128 + octet * 32), flip);
    return;
  }
  const __m256i h = load(hi + at);
  if constexpr (F == Form::hi) {
    left = _mm256_and_si256(h, low);
    right = _mm256_and_si256(_mm256_srli_epi16(h, 4), low);
    return;
  }
  const __m256i l = load(lo + at);
  if constexpr (F == Form::both) {  // the lower nibbles of h and the upper ones of l change places
    const __m256i flipped = _mm256_xor_si256(h, _mm256_set1_epi16(-0x7800));
    const __m256i differ = _mm256_and_si256(_mm256_xor_si256(_mm256_srli_epi16(l, 4), flipped), low);
    right = _mm256_xor_si256(flipped, differ);
    left = _mm256_xor_si256(l, _mm256_slli_epi16(differ, 4));
  } else {
    const __m256i l_left = _mm256_and_si256(l, low), l_right = _mm256_and_si256(_mm256_srli_epi16(l, 4), low);
    const __m128i count = _mm_cvtsi32_si128(shift);
    const int even = (128 - (8 << shift)) & 255;  // makes the zero 136
    const __m256i offset = _mm256_set1_epi16(static_cast<short>(even | (even ^ 128) << 8));
    const __m256i h_left = _mm256_and_si256(h, low), h_right = _mm256_and_si256(_mm256_srli_epi16(h, 4), low);
    left = _mm256_add_epi8(_mm256_add_epi8(_mm256_sll_epi16(h_left, count), l_left), offset);
    right = _mm256_add_epi8(_mm256_add_epi8(_mm256_sll_epi16(h_right, count), l_right), offset);
  }
}

// The bytes of columns 1 and 3 of a quad as words.
HAOMIAO_INLINE __m256i odd_words(__m256i bytes) { return _mm256_srai_epi16(bytes, 8); }

// f32 scales of one octet of rows.
template <Form F>
HAOMIAO_INLINE __m256 load_scale(const uint8_t* group, int octet, __m256 factor) {
  const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group + octet * 16)));
  return has_lo(F) ? _mm256_mul_ps(scale, factor) : scale;
}

HAOMIAO_INLINE void prefetch_lines(const uint8_t* begin, int bytes) {
  for (int i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(begin + i), _MM_HINT_T0);
}

template <Form F>
HAOMIAO_INLINE void prefetch_block(const uint8_t* hi, const uint8_t* lo) {
  prefetch_lines(hi + kPrefetchBytes, block_bytes(F) + kScaleBytes);
  if constexpr (has_lo(F)) prefetch_lines(lo + kPrefetchBytes, kNibbleBytes);
}

// Sums plus the products of unsigned bytes (nibbles) or of words. The empty assembly fixes the order of additions: the
// compiler reassociates integers, which makes it hold all products at once, on the stack.
template <Form F>
HAOMIAO_INLINE void add_products(__m256i& sum, __m256i w, __m256i q) {
  sum = F == Form::hi ? _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, q))
                      : _mm256_add_epi32(sum, _mm256_madd_epi16(w, q));
  __asm__("" : "+x"(sum));
}

// ---- a few tokens ---------------------------------------------------------------------------------------------------

// Sums over one block of 32 columns, octets `first`.. of rows, as 32-bit integers.
template <Form F, int M, int R>
HAOMIAO_INLINE void sum_block(const uint8_t* hi, const uint8_t* lo, int first, int shift, const ActivationBlock<M>& x,
                              __m256i sum[M][R]) {
  HAOMIAO_UNROLL
  for (int m = 0; m < M; ++m) {
    const int32_t* start = F == Form::hi ? x.zero8 : F == Form::bytes ? x.zero128 : x.zero136;
    HAOMIAO_UNROLL
    for (int r = 0; r < R; ++r) sum[m][r] = broadcast_dword(start + m);
  }
  HAOMIAO_UNROLL
  for (int j = 0; j < 4; ++j) {
    __m256i columns[2][R];
    HAOMIAO_UNROLL
    for (int r = 0; r < R; ++r) load_columns<F>(hi, lo, j, first + r, shift, columns[0][r], columns[1][r]);
    HAOMIAO_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int quad = 2 * j + half;
      HAOMIAO_UNROLL
      for (int parity = 0; parity < (F == Form::hi ? 1 : 2); ++parity) {
        __m256i w[R];
        HAOMIAO_UNROLL
        for (int r = 0; r < R; ++r) {
          w[r] = parity ? odd_words(columns[half][r]) : columns[half][r];
        }
        HAOMIAO_UNROLL
        for (int m = 0; m < M; ++m) {
          const __m256i q = broadcast_dword(F == Form::hi ? &x.bytes[quad][m] : &x.words[parity][quad][m]);
          HAOMIAO_UNROLL
          for (int r = 0; r < R; ++r) add_products<F>(sum[m][r], w[r], q);
        }
      }
    }
  }
  if constexpr (F == Form::hi) {  // the pairs of words were sums modulo 2^16 of what fits 16 bits: |code| <= 8
    HAOMIAO_UNROLL
    for (int m = 0; m < M; ++m) {
      HAOMIAO_UNROLL
      for (int r = 0; r < R; ++r) sum[m][r] = _mm256_madd_epi16(sum[m][r], _mm256_set1_epi16(1));
    }
  }
}

// y[m][octet] += scale * (sum over one block of 32 columns), for M tokens.
template <Form F, int M>
HAOMIAO_INLINE void add_block(const uint8_t* hi, const uint8_t* lo, int shift, const __m256 scale[kOctets],
                              const uint8_t* x, __m256 y[M][kOctets]) {
  constexpr int R = M <= 2 ? 4 : 2;  // octets at once: 8 sums at most
  HAOMIAO_UNROLL
  for (int first = 0; first < kOctets; first += R) {
    __asm__("" : "+r"(x));  // or the compiler keeps broadcasts of one half tile, on the stack, for the other
    const ActivationBlock<M>& group = *reinterpret_cast<const ActivationBlock<M>*>(x);
    __m256i sum[M][R];
    sum_block<F, M, R>(hi, lo, first, shift, group, sum);
    HAOMIAO_UNROLL
    for (int m = 0; m < M; ++m) {
      const __m256 s = broadcast_float(&group.scale[m]);
      HAOMIAO_UNROLL
      for (int r = 0; r < R; ++r) {
        __m256& total = y[m][first + r];
        total = _mm256_fmadd_ps(_mm256_mul_ps(scale[first + r], s), _mm256_cvtepi32_ps(sum[m][r]), total);
      }
    }
  }
}

// All columns of one tile for a block of M tokens.
template <Form F, int M>
void multiply_tile(const Tile& tile, const uint8_t* x, const Target& target) {
  __m256 y[M][kOctets];
  HAOMIAO_UNROLL
  for (int m = 0; m < M; ++m) {
    HAOMIAO_UNROLL
    for (int octet = 0; octet < kOctets; ++octet) y[m][octet] = _mm256_setzero_ps();
  }
  constexpr int64_t kBlock = sizeof(ActivationBlock<M>);
  const __m256 factor = _mm256_set1_ps(plane_factor(tile.shift));
  const uint8_t *hi = tile.hi, *lo = tile.lo;
  for (StoredGroups groups = tile.groups; any_left(&groups);) {
    __m256 scale[kOctets];
    HAOMIAO_UNROLL
    for (int octet = 0; octet < kOctets; ++octet) scale[octet] = load_scale<F>(hi, octet, factor);
    hi += kScaleBytes;
    const uint8_t* columns = x + int64_t{take_group(&groups)} * tile.blocks_per_scale * kBlock;
    for (int block = 0; block < tile.blocks_per_scale; ++block) {
      prefetch_block<F>(hi, lo);
      add_block<F, M>(hi, lo, tile.shift, scale, columns, y);
      columns += kBlock;
      hi += block_bytes(F);
      if constexpr (has_lo(F)) lo += kNibbleBytes;
    }
  }
  HAOMIAO_UNROLL
  for (int m = 0; m < M; ++m) {
    HAOMIAO_UNROLL
    for (int octet = 0; octet < kOctets; ++octet) target.store(m, octet, y[m][octet]);
  }
}

template <Form F>
constexpr void (*kMultiplyTile[])(const Tile&, const uint8_t*, const Target&) = {
    multiply_tile<F, 1>, multiply_tile<F, 2>, multiply_tile<F, 3>, multiply_tile<F, 4>};

// ---- eight tokens and more ------------------------------------------------------------------------------------------

constexpr int kMostWide = 8;  // blocks of 8 tokens that share a broadcast

// 32 columns of a tile: nibbles as [quad][row][4] bytes, or codes as [parity][quad][row][2] words.
struct Unpacked {
  float scale[kTileRows];
  uint8_t codes[2 * kByteBytes];
};

template <Form F>
HAOMIAO_INLINE void unpack_block(const uint8_t* hi, const uint8_t* lo, int shift, Unpacked* out) {
  const __m256i even_zero = _mm256_set1_epi16(zero_of(F)), odd_zero = _mm256_set1_epi16(zero_of(F) - 128);
  for (int j = 0; j < 4; ++j) {
    for (int octet = 0; octet < kOctets; ++octet) {
      __m256i columns[2];
      load_columns<F>(hi, lo, j, octet, shift, columns[0], columns[1]);
      for (int half = 0; half < 2; ++half) {
        uint8_t* at = out->codes + (2 * j + half) * 128 + octet * 32;
        if constexpr (F == Form::hi) {
          store(at, columns[half]);
        } else {
          const __m256i even = _mm256_and_si256(columns[half], _mm256_set1_epi16(255));
          store(at, _mm256_sub_epi16(even, even_zero));
          store(at + kByteBytes, _mm256_sub_epi16(odd_words(columns[half]), odd_zero));
        }
      }
    }
  }
}

// y[row][v] += scale * sum over the 32 columns, for V blocks of 8 tokens that begin at x.
template <Form F, int V>
void add_rows(const Unpacked& w, const uint8_t* x, int64_t stride, float* y) {
  constexpr int R = V == 1 ? 8 : V == 2 ? 4 : V <= 4 ? 2 : 1;  // rows at once: 8 sums at most
  const ActivationBlock<kWide>* group[V];
  HAOMIAO_UNROLL
  for (int v = 0; v < V; ++v) group[v] = reinterpret_cast<const ActivationBlock<kWide>*>(x + v * stride);
  for (int row = 0; row < kTileRows; row += R, y += R * V * kLanes) {
    const uint8_t* codes = w.codes + row * 4;
    __m256i sum[R][V];
    HAOMIAO_UNROLL
    for (int v = 0; v < V; ++v) {
      const __m256i start = F == Form::hi ? load(group[v]->zero8) : _mm256_setzero_si256();
      HAOMIAO_UNROLL
      for (int r = 0; r < R; ++r) sum[r][v] = start;
    }
    HAOMIAO_UNROLL
    for (int i = 0; i < (F == Form::hi ? 8 : 16); ++i) {
      __m256i code[R];
      HAOMIAO_UNROLL
      for (int r = 0; r < R; ++r) code[r] = broadcast_dword(codes + i * 128 + r * 4);
      HAOMIAO_UNROLL
      for (int v = 0; v < V; ++v) {
        const __m256i q = load(F == Form::hi ? group[v]->bytes[i % 8] : group[v]->words[i / 8][i % 8]);
        HAOMIAO_UNROLL
        for (int r = 0; r < R; ++r) add_products<F>(sum[r][v], code[r], q);
      }
    }
    HAOMIAO_UNROLL
    for (int v = 0; v < V; ++v) {
      const __m256 s = _mm256_loadu_ps(group[v]->scale);
      HAOMIAO_UNROLL
      for (int r = 0; r < R; ++r) {
        if constexpr (F == Form::hi) sum[r][v] = _mm256_madd_epi16(sum[r][v], _mm256_set1_epi16(1));
        float* total = y + (r * V + v) * kLanes;
        const __m256 scale = _mm256_mul_ps(broadcast_float(w.scale + row + r), s);
        _mm256_store_ps(total, _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(sum[r][v]), _mm256_load_ps(total)));
      }
    }
  }
}

template <Form F>
constexpr void (*kAddRows[])(const Unpacked&, const uint8_t*, int64_t, float*) = {
    add_rows<F, 1>, add_rows<F, 2>, add_rows<F, 3>, add_rows<F, 4>,
    add_rows<F, 5>, add_rows<F, 6>, add_rows<F, 7>, add_rows<F, 8>};

struct WideScratch {
  alignas(64) float y[kTileRows * kMostWide * kLanes];  // [row][token]
  alignas(64) Unpacked weights;
};

// All columns of one tile for `count` blocks of 8 tokens.
template <Form F>
void multiply_wide(const Tile& tile, const uint8_t* x, int64_t stride, int count, const Target& target,
                   WideScratch* scratch) {
  constexpr int64_t kBlock = sizeof(ActivationBlock<kWide>);
  memset(scratch->y, 0, sizeof(float) * kTileRows * kLanes * static_cast<size_t>(count));
  const __m256 factor = _mm256_set1_ps(plane_factor(tile.shift));
  const uint8_t *hi = tile.hi, *lo = tile.lo;
  for (StoredGroups groups = tile.groups; any_left(&groups);) {
    for (int octet = 0; octet < kOctets; ++octet) {
      _mm256_store_ps(scratch->weights.scale + octet * kLanes, load_scale<F>(hi, octet, factor));
    }
    hi += kScaleBytes;
    const uint8_t* columns = x + int64_t{take_group(&groups)} * tile.blocks_per_scale * kBlock;
    for (int block = 0; block < tile.blocks_per_scale; ++block) {
      prefetch_block<F>(hi, lo);
      unpack_block<F>(hi, lo, tile.shift, &scratch->weights);
      kAddRows<F>[count - 1](scratch->weights, columns, stride, scratch->y);
      hi += block_bytes(F);
      if constexpr (has_lo(F)) lo += kNibbleBytes;
      columns += kBlock;
    }
  }
  for (int v = 0; v < count; ++v) {
    for (int octet = 0; octet < kOctets; ++octet) {
      __m256 lanes[kLanes];
      const float* y = scratch->y + (octet * kLanes * count + v) * kLanes;
      for (int i = 0; i < kLanes; ++i) lanes[i] = _mm256_load_ps(y + i * count * kLanes);
      transpose(lanes);
      for (int i = 0; i < kLanes; ++i) target.store(v * kLanes + i, octet, lanes[i]);
    }
  }
}

// ---- all ------------------------------------------------------------------------------------------------------------

template <Form F>
void linear_int(const LinearCall& call) {
  const Weight& w = *call.weight;
  const int64_t stride = wide_stride(w.padded_cols);
  const uint8_t* x = static_cast<const uint8_t*>(call.activations);
  const int blocks = call.tokens / kWide;
  for (int index = call.tile_begin; index < call.tile_end; ++index) {
    const Tile tile = tile_of<F>(w, index);
    int passes = (blocks + kMostWide - 1) / kMostWide;
    for (int block = 0, count; block < blocks; block += count, --passes) {
      count = (blocks - block + passes - 1) / passes;
      multiply_wide<F>(tile, x + block * stride, stride, count, target_of(call, index, block * kWide),
                       static_cast<WideScratch*>(call.scratch));
    }
    for (int token = blocks * kWide; token < call.tokens; token += kNarrow) {
      const int left = call.tokens - token, count = left < kNarrow ? left : kNarrow;
      kMultiplyTile<F>[count - 1](tile, x + int_activation_bytes(token, w.padded_cols), target_of(call, index, token));
    }
  }
}

HAOMIAO_INLINE size_t int_scratch_bytes(int tokens) { return tokens < kWide ? 0 : sizeof(WideScratch); }

}  // namespace
}  // namespace haomiao
