// Attention over paged K/V, read as stored. One (query token, kv head) at a time is the unit whose bits are fixed:
// softmax inside splits of 512 absolute positions, splits merged in ascending order. However tokens are grouped into
// calls, and calls into ranges of splits, every output has the same bits, in every instruction set:
//   q' = q * scale; score = sum over d ascending of fma(q'[d], k[key][d], score);
//   int8 K: q' = sq * codes of 16 bits, sq = max|q'| / 16383, codes rint(q' * (16383 / max|q'|)), as for activations;
//   score = f32(exact sum of codes[d] k[key][d]) * (sq * the key's scale);
//   softcap: cap * tanh(score / cap); masked keys take no part;
//   per split: m = greatest score, p = exp(score - m), l = sum of p in 16 lanes (key mod 16, ascending, lanes added
//   8, 4, 2, 1), o[d] = fma(p, v[key][d], o[d]) over keys ascending from 0;
//   int8 V: p * the value's scale = sp * codes of 16 bits, likewise, per row and split; o[d] = f32(exact sum) * sp;
//   splits, ascending: M' = max(M, m), L = fma(L, exp(M - M'), l * exp(m - M')), O likewise; out = O / L.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace haomiao {

inline constexpr int kKvBlock = 32;   // tokens of a KV block
inline constexpr int kKvSplit = 512;  // absolute positions per split

enum class KvType : uint32_t { f32 = 0, bf16 = 1, int8 = 2 };

// K and V of one (block, kv head) are the kernels' own business: block_bytes() says how much, write_*() how.
struct AttentionCall {
  KvType kv;
  int heads_per_kv, head_dim;
  float scale, softcap;  // softcap 0: none
  int64_t window;        // keys with position > query position - window; 0 = all
  const float* q;        // q[token * q_stride + head * head_dim], heads of this kv head
  int64_t q_stride;
  float* out;  // out[token * out_stride + head * head_dim]
  int64_t out_stride;
  int tokens;              // queries; token i has position first_position + i
  int64_t first_position;  // up to 2^31
  const uint8_t* base;     // block b of the sequence lies at base + blocks[b] * block_stride (this layer, this kv head)
  int64_t block_stride;
  const int32_t* blocks;
  int64_t split_begin, split_end;  // only these splits, for merge() to join later; {0, 0}: all, and `out` is written
  float* partials;                 // [split_end - split_begin][partial_floats()], or nullptr when all
  void* scratch;                   // scratch_bytes(), 64-byte aligned
};

struct AttentionKernels {
  const char* isa;
  size_t (*block_bytes)(KvType kv, int head_dim);  // storage of K and V (and scales) of 32 tokens of one kv head
  // Store k or v [head_dim] as token `slot` (0..31) of a block. int8: one scale per token and head, max|x| / 127.
  void (*write_key)(KvType kv, int head_dim, const float* k, int slot, uint8_t* block);
  void (*write_value)(KvType kv, int head_dim, const float* v, int slot, uint8_t* block);
  size_t (*scratch_bytes)(int heads_per_kv, int head_dim, int tokens);
  void (*attend)(const AttentionCall& call);
  // One split's state of a call: m, l and o of every row.
  size_t (*partial_floats)(int heads_per_kv, int head_dim, int tokens);
  // out from the states of splits [0, splits), ascending; reads partials, out and the sizes of the call.
  void (*merge)(const AttentionCall& call, int64_t splits);
};

// The kernels of one instruction set ("scalar", "avx2", "avx512", "avx512_bf16", "neon"), or nullptr if not compiled
// in; an operation without a file of its own for an isa returns the next lower one. attention/select.cc.
const AttentionKernels* attention_kernels(const char* isa);

}  // namespace haomiao
