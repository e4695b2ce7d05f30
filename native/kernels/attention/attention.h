// Attention over paged K/V, read as stored. One (query token, kv head) at a time is the unit whose bits are fixed:
// scores of 32-key blocks in ascending absolute position, online softmax inside splits of 512 positions, splits merged
// in order.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace haomiao {

inline constexpr int kKvBlock = 32;   // tokens of a KV block = keys of one attention chunk
inline constexpr int kKvSplit = 512;  // absolute positions per split

enum class KvType : uint32_t { f32 = 0, bf16 = 1, int8 = 2 };

// K and V of one (block, kv head). The layout inside is the kernels' own: `bytes` says how much.
struct AttentionCall {
  KvType kv;
  int heads_per_kv, head_dim;
  float scale, softcap;
  int window;      // 0 = all
  const float* q;  // q[token * q_stride + head * head_dim], heads of this kv head
  int64_t q_stride;
  float* out;  // out[token * out_stride + head * head_dim]
  int64_t out_stride;
  int tokens;  // queries; token i has position first_position + i
  int64_t first_position;
  const uint8_t* const* blocks;  // blocks[b]: storage of (layer, block b of the sequence, this kv head)
  void* scratch;                 // scratch_bytes(), 64-byte aligned
};

struct AttentionKernels {
  const char* isa;
  size_t (*block_bytes)(KvType kv, int head_dim);  // storage of K and V (and scales) of 32 tokens of one kv head
  // Store k, v [head_dim] as token `slot` (0..31) of a block. int8: one scale per token and head, max|x| / 127.
  void (*write)(KvType kv, int head_dim, const float* k, const float* v, int slot, uint8_t* block);
  size_t (*scratch_bytes)(int heads_per_kv, int head_dim, int tokens);
  void (*attend)(const AttentionCall& call);
};

// The kernels of one instruction set ("scalar", "avx2", "avx512", "avx512_bf16", "neon"), or nullptr if not compiled
// in; an operation without a file of its own for an isa returns the next lower one. attention/select.cc.
const AttentionKernels* attention_kernels(const char* isa);

}  // namespace haomiao
