// The attention kernels over Lanes, compiled once per instruction set. Include one instruction set's lanes first.
//
// A row is one (query token, head). Rows that see the same keys of a chunk are worked off kPassRows at a time with K
// and V loaded once for all of them; a row's own arithmetic never depends on the others (attention.h states it).
#pragma once
#include <math.h>
#include <string.h>

#include "kernels/attention/attention.h"
#include "kernels/attention/layout.h"
#include "kernels/lanes/math.h"

#define HAOMIAO_UNROLL _Pragma("GCC unroll 8")

namespace haomiao {
namespace {

// Softmax state of every row: the greatest score m, the sum l of exp(score - m), and o [padded_dim].
struct State {
  float *m, *l, *o;

  void clear(int rows, int dim) const {
    for (int r = 0; r < rows; ++r) m[r] = -kInfinity;
    memset(l, 0, sizeof(float) * static_cast<size_t>(rows));
    memset(o, 0, sizeof(float) * static_cast<size_t>(rows) * static_cast<size_t>(dim));
  }
};

inline State state_at(float* p, int rows) { return {p, p + rows, p + 2 * rows}; }

size_t partial_floats(int heads_per_kv, int head_dim, int tokens) {
  const size_t rows = static_cast<size_t>(heads_per_kv) * static_cast<size_t>(tokens);
  return (rows * (2 + static_cast<size_t>(padded_dim(head_dim))) + 15) / 16 * 16;
}

// Scaled queries [rows][head_dim], the split's state, and the merged state of the splits before it.
size_t scratch_bytes(int heads_per_kv, int head_dim, int tokens) {
  const size_t rows = static_cast<size_t>(heads_per_kv) * static_cast<size_t>(tokens);
  const size_t queries = (rows * static_cast<size_t>(head_dim) + 15) / 16 * 16;
  return sizeof(float) * (queries + 2 * partial_floats(heads_per_kv, head_dim, tokens));
}

// s[r][key] = sum over d of q[r][d] k[d][key] for R rows and C x 16 keys.
template <int R, int C, typename T>
inline void score_keys(const float* q, int head_dim, const T* k, float* s) {
  Lanes sum[R][C];
  HAOMIAO_UNROLL
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sum[r][c] = broadcast(0.0f);
  }
  for (int d = 0; d < head_dim; ++d) {
    Lanes keys[C];
    for (int c = 0; c < C; ++c) keys[c] = load(k + d * kKvBlock + c * 16);
    HAOMIAO_UNROLL
    for (int r = 0; r < R; ++r) {
      const Lanes x = broadcast(q[r * head_dim + d]);
      for (int c = 0; c < C; ++c) sum[r][c] = multiply_add(x, keys[c], sum[r][c]);
    }
  }
  HAOMIAO_UNROLL
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) store(s + r * kKvBlock + c * 16, sum[r][c]);
  }
}

// o[r][..] = o[r][..] * a[r], then += p[r][key] v[key][..] over keys [low, high), for R rows and C x 16 dimensions.
template <int R, int C, typename T>
inline void add_values(const float* p, const T* v, int dim, int low, int high, const float* a, float* o) {
  Lanes sum[R][C];
  HAOMIAO_UNROLL
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sum[r][c] = multiply(load(o + r * dim + c * 16), broadcast(a[r]));
  }
  for (int key = low; key < high; ++key) {
    Lanes values[C];
    for (int c = 0; c < C; ++c) values[c] = load(v + key * dim + c * 16);
    HAOMIAO_UNROLL
    for (int r = 0; r < R; ++r) {
      const Lanes x = broadcast(p[r * kKvBlock + key]);
      for (int c = 0; c < C; ++c) sum[r][c] = multiply_add(x, values[c], sum[r][c]);
    }
  }
  HAOMIAO_UNROLL
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) store(o + r * dim + c * 16, sum[r][c]);
  }
}

// One chunk of keys as the rows of a pass meet it: keys [low, high) of 32 are seen.
template <typename T>
struct Chunk {
  BlockView<T> block;
  int head_dim, low, high;
  float softcap;
};

constexpr float kIndex[kKvBlock] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                    16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

// Scores of one row to probabilities (times the values' scales); returns the factor for what was summed before.
template <typename T>
inline float soften(const Chunk<T>& chunk, float* s, float* m, float* l) {
  Lanes score[2];
  for (int c = 0; c < 2; ++c) {
    score[c] = load(s + c * 16);
    if constexpr (sizeof(T) == 1) score[c] = multiply(score[c], load(chunk.block.key_scales + c * 16));
    if (chunk.softcap > 0) {
      const Lanes cap = broadcast(chunk.softcap);
      score[c] = multiply(cap, tanh_lanes(divide(score[c], cap)));
    }
    if (chunk.low > 0 || chunk.high < kKvBlock) {
      const Lanes index = load(kIndex + c * 16), none = broadcast(-kInfinity);
      score[c] = select_less(index, broadcast(static_cast<float>(chunk.low)), none, score[c]);
      score[c] = select_less(index, broadcast(static_cast<float>(chunk.high)), score[c], none);
    }
  }
  const float top = greatest(select_less(score[0], score[1], score[1], score[0]));
  const float before = *m, now = top > before ? top : before;
  const float factor = now == before ? 1.0f : first(exp_lanes(broadcast(before - now)));
  Lanes p[2];
  for (int c = 0; c < 2; ++c) p[c] = exp_lanes(subtract(score[c], broadcast(now)));
  *m = now;
  *l = fmaf(*l, factor, sum(add(p[0], p[1])));
  for (int c = 0; c < 2; ++c) {
    if constexpr (sizeof(T) == 1) p[c] = multiply(p[c], load(chunk.block.value_scales + c * 16));
    store(s + c * 16, p[c]);
  }
  return factor;
}

template <int R, typename T>
void attend_pass(const Chunk<T>& chunk, const float* q, const State& state) {
  alignas(64) float s[R * kKvBlock];
  float factor[R];
  for (int key = 0; key < kKvBlock; key += 16 * kPassVectors) {
    score_keys<R, kPassVectors>(q, chunk.head_dim, chunk.block.k + key, s + key);
  }
  for (int r = 0; r < R; ++r) factor[r] = soften(chunk, s + r * kKvBlock, state.m + r, state.l + r);
  const int dim = padded_dim(chunk.head_dim);
  int d = 0;
  for (; d + 16 * kPassVectors <= dim; d += 16 * kPassVectors) {
    add_values<R, kPassVectors>(s, chunk.block.v + d, dim, chunk.low, chunk.high, factor, state.o + d);
  }
  for (; d < dim; d += 16) add_values<R, 1>(s, chunk.block.v + d, dim, chunk.low, chunk.high, factor, state.o + d);
}

// Rows [0, rows) of q and state, in passes of at most R rows and nearly equal size.
template <int R, typename T>
inline void dispatch(int count, const Chunk<T>& chunk, const float* q, const State& state) {
  if (count == R) return attend_pass<R>(chunk, q, state);
  if constexpr (R > 1) dispatch<R - 1>(count, chunk, q, state);
}

template <typename T>
void attend_rows(const Chunk<T>& chunk, const float* q, State state, int rows) {
  for (int passes = (rows + kPassRows - 1) / kPassRows; passes > 0; --passes) {
    const int count = (rows + passes - 1) / passes;
    dispatch<kPassRows>(count, chunk, q, state);
    q += count * chunk.head_dim;
    state = {state.m + count, state.l + count, state.o + count * padded_dim(chunk.head_dim)};
    rows -= count;
  }
}

inline int clamp_key(int64_t key) { return static_cast<int>(key < 0 ? 0 : key > kKvBlock ? kKvBlock : key); }

// All rows of the call against block `index` of the sequence.
template <typename T>
void attend_chunk(const AttentionCall& call, int64_t index, const float* q, const State& state) {
  uint8_t* block = const_cast<uint8_t*>(call.base) + call.blocks[index] * call.block_stride;
  Chunk<T> chunk = {BlockView<T>(block, call.head_dim), call.head_dim, 0, kKvBlock, call.softcap};
  const int heads = call.heads_per_kv, dim = padded_dim(call.head_dim);
  int whole = 0;  // tokens before `token` that see the whole chunk and wait for their pass
  for (int token = 0; token <= call.tokens; ++token) {
    const int64_t last = call.first_position + token - index * kKvBlock;  // the query's own position in the chunk
    const bool end = token == call.tokens;
    const int low = end || call.window == 0 ? 0 : clamp_key(last - call.window + 1),
              high = end ? 0 : clamp_key(last + 1);
    if (!end && low == 0 && high == kKvBlock) {
      ++whole;
      continue;
    }
    const auto run = [&](int first, int count, int from, int to) {
      const int row = first * heads;
      chunk.low = from, chunk.high = to;
      attend_rows(chunk, q + static_cast<int64_t>(row) * call.head_dim,
                  State{state.m + row, state.l + row, state.o + static_cast<int64_t>(row) * dim}, count * heads);
    };
    if (whole) run(token - whole, whole, 0, kKvBlock);
    if (low < high) run(token, 1, low, high);
    whole = 0;
  }
}

// Join the state of the next split to that of the splits before it.
void join(const State& all, const State& split, int rows, int dim) {
  for (int r = 0; r < rows; ++r) {
    const float m = split.m[r], before = all.m[r];
    if (m == -kInfinity && split.l[r] == 0) continue;  // nothing was seen in this split
    float *o = all.o + static_cast<int64_t>(r) * dim, *next = split.o + static_cast<int64_t>(r) * dim;
    if (before == -kInfinity && all.l[r] == 0) {
      all.m[r] = m, all.l[r] = split.l[r];
      memcpy(o, next, sizeof(float) * static_cast<size_t>(dim));
      continue;
    }
    const float now = m > before ? m : before;
    const float a = first(exp_lanes(broadcast(before - now))), b = first(exp_lanes(broadcast(m - now)));
    all.m[r] = now;
    all.l[r] = fmaf(all.l[r], a, split.l[r] * b);
    for (int d = 0; d < dim; d += 16) {
      store(o + d, multiply_add(load(o + d), broadcast(a), multiply(load(next + d), broadcast(b))));
    }
  }
}

// out = o / l
void finish(const AttentionCall& call, const State& all) {
  const int dim = padded_dim(call.head_dim);
  for (int token = 0, r = 0; token < call.tokens; ++token) {
    for (int head = 0; head < call.heads_per_kv; ++head, ++r) {
      const float* o = all.o + static_cast<int64_t>(r) * dim;
      float* out = call.out + token * call.out_stride + static_cast<int64_t>(head) * call.head_dim;
      for (int d = 0; d < call.head_dim; d += 16) {
        const int n = call.head_dim - d < 16 ? call.head_dim - d : 16;
        store_some(out + d, divide(load(o + d), broadcast(all.l[r])), n);
      }
    }
  }
}

void scale_queries(const AttentionCall& call, float* q) {
  const int width = call.heads_per_kv * call.head_dim;
  for (int token = 0; token < call.tokens; ++token, q += width) {
    const float* source = call.q + token * call.q_stride;
    for (int i = 0; i < width; i += 16) {
      const int n = width - i < 16 ? width - i : 16;
      store_some(q + i, multiply(load_some(source + i, n), broadcast(call.scale)), n);
    }
  }
}

template <typename T>
void attend_as(const AttentionCall& call) {
  const int rows = call.heads_per_kv * call.tokens, dim = padded_dim(call.head_dim);
  const size_t floats = partial_floats(call.heads_per_kv, call.head_dim, call.tokens);
  float* q = static_cast<float*>(call.scratch);
  float* states = q + (static_cast<size_t>(rows) * static_cast<size_t>(call.head_dim) + 15) / 16 * 16;
  const State all = state_at(states + floats, rows);
  scale_queries(call, q);
  const int64_t earliest = call.first_position - call.window + 1;
  const int64_t first_key = call.window == 0 || earliest < 0 ? 0 : earliest;
  const int64_t chunks = (call.first_position + call.tokens - 1) / kKvBlock + 1;
  constexpr int64_t kChunks = kKvSplit / kKvBlock;
  if (!call.partials) all.clear(rows, dim);
  const int64_t begin = call.partials ? call.split_begin : first_key / kKvSplit;
  const int64_t end = call.partials ? call.split_end : (chunks + kChunks - 1) / kChunks;
  for (int64_t split = begin; split < end; ++split) {
    float* place = call.partials ? call.partials + static_cast<size_t>(split - begin) * floats : states;
    const State state = state_at(place, rows);
    state.clear(rows, dim);
    const int64_t stop = (split + 1) * kChunks < chunks ? (split + 1) * kChunks : chunks;
    const int64_t start = first_key / kKvBlock > split * kChunks ? first_key / kKvBlock : split * kChunks;
    for (int64_t index = start; index < stop; ++index) attend_chunk<T>(call, index, q, state);
    if (!call.partials) join(all, state, rows, dim);
  }
  if (!call.partials) finish(call, all);
}

void attend(const AttentionCall& call) {
  if (call.kv == KvType::f32) return attend_as<float>(call);
  if (call.kv == KvType::bf16) return attend_as<uint16_t>(call);
  return attend_as<int8_t>(call);
}

void merge(const AttentionCall& call, int64_t splits) {
  const int rows = call.heads_per_kv * call.tokens, dim = padded_dim(call.head_dim);
  const size_t floats = partial_floats(call.heads_per_kv, call.head_dim, call.tokens);
  const State all = state_at(static_cast<float*>(call.scratch), rows);
  all.clear(rows, dim);
  for (int64_t split = 0; split < splits; ++split) {
    join(all, state_at(call.partials + static_cast<size_t>(split) * floats, rows), rows, dim);
  }
  finish(call, all);
}

constexpr AttentionKernels attention_table(const char* isa) {
  return {isa, block_bytes, write_key, write_value, scratch_bytes, attend, partial_floats, merge};
}

}  // namespace
}  // namespace haomiao
