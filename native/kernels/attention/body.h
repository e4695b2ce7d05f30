// The attention kernels over Lanes, compiled once per instruction set. Include one instruction set's lanes first.
//
// A row is one (query token, head). Up to kPassRows rows go through a split together, K and V loaded once for all of
// them: scores of the whole split, softmax, then values. A row's own arithmetic never depends on the others
// (attention.h states it).
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

// Scaled queries [rows][head_dim], the split's state, the merged state of the splits before it, and a pass's scores.
size_t scratch_bytes(int heads_per_kv, int head_dim, int tokens) {
  const size_t rows = static_cast<size_t>(heads_per_kv) * static_cast<size_t>(tokens);
  const size_t queries = (rows * static_cast<size_t>(head_dim) + 15) / 16 * 16;
  const size_t scores = static_cast<size_t>(kPassRows) * kKvSplit;
  return sizeof(float) * (queries + 2 * partial_floats(heads_per_kv, head_dim, tokens) + scores);
}

// The blocks of one split as the rows of a pass meet them. Keys count from the split's first position.
template <typename T>
struct Split {
  const AttentionCall& call;
  int64_t first_block;  // of the sequence

  BlockView<T> block(int index) const {
    const int64_t at = call.blocks[first_block + index] * call.block_stride;
    return BlockView<T>(const_cast<uint8_t*>(call.base) + at, call.head_dim);
  }
};

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
    for (int c = 0; c < C; ++c) store(s + r * kKvSplit + c * 16, sum[r][c]);
  }
}

// o[r][..] += p[r][key] v[key][..] over keys [low, high) ascending, for R rows and C x 16 dimensions from `d` on.
template <int R, int C, typename T>
inline void add_values(const Split<T>& split, const float* p, int d, int low, int high, float* o) {
  const int dim = padded_dim(split.call.head_dim);
  Lanes sum[R][C];
  HAOMIAO_UNROLL
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sum[r][c] = load(o + r * dim + c * 16);
  }
  for (int key = low; key < high;) {
    const T* v = split.block(key / kKvBlock).v + d;
    const int end = (key / kKvBlock + 1) * kKvBlock < high ? (key / kKvBlock + 1) * kKvBlock : high;
    for (; key < end; ++key) {
      Lanes values[C];
      for (int c = 0; c < C; ++c) values[c] = load(v + key % kKvBlock * dim + c * 16);
      HAOMIAO_UNROLL
      for (int r = 0; r < R; ++r) {
        const Lanes x = broadcast(p[r * kKvSplit + key]);
        for (int c = 0; c < C; ++c) sum[r][c] = multiply_add(x, values[c], sum[r][c]);
      }
    }
  }
  HAOMIAO_UNROLL
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) store(o + r * dim + c * 16, sum[r][c]);
  }
}

template <int R, typename T>
inline void add_all_values(const Split<T>& split, const float* p, int low, int high, float* o) {
  const int dim = padded_dim(split.call.head_dim);
  int d = 0;
  for (; d + 16 * kPassVectors <= dim; d += 16 * kPassVectors)
    add_values<R, kPassVectors>(split, p, d, low, high, o + d);
  for (; d < dim; d += 16) add_values<R, 1>(split, p, d, low, high, o + d);
}

constexpr float kIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Scores of one row, keys [low, high) of the split, to probabilities (times the values' scales for int8). Lanes of the
// first and the last vector that are not seen become 0.
template <typename T>
inline void soften(const Split<T>& split, float* s, int low, int high, float* m, float* l) {
  const int begin = low / 16 * 16, end = (high + 15) / 16 * 16;
  const Lanes none = broadcast(-kInfinity), cap = broadcast(split.call.softcap);
  Lanes top = none;
  for (int key = begin; key < end; key += 16) {
    Lanes score = load(s + key);
    if constexpr (sizeof(T) == 1) {
      score = multiply(score, load(split.block(key / kKvBlock).key_scales + key % kKvBlock));
    }
    if (split.call.softcap > 0) score = multiply(cap, tanh_lanes(divide(score, cap)));
    if (key < low || key + 16 > high) {
      const Lanes index = add(load(kIndex), broadcast(static_cast<float>(key)));
      score = select_less(index, broadcast(static_cast<float>(low)), none, score);
      score = select_less(index, broadcast(static_cast<float>(high)), score, none);
    }
    top = select_less(top, score, score, top);
    store(s + key, score);
  }
  *m = greatest(top);
  const Lanes most = broadcast(*m);
  Lanes total = broadcast(0.0f);
  for (int key = begin; key < end; key += 16) {
    Lanes p = exp_lanes(subtract(load(s + key), most));
    total = add(total, p);
    if constexpr (sizeof(T) == 1) p = multiply(p, load(split.block(key / kKvBlock).value_scales + key % kKvBlock));
    store(s + key, p);
  }
  *l = sum(total);
}

// Keys of the split that a token sees: [low, high).
struct Seen {
  int low, high;
};

inline Seen seen_by(const AttentionCall& call, int token, int64_t first_key) {
  const int64_t own = call.first_position + token - first_key;  // the query's own place
  const int64_t low = call.window == 0 ? 0 : own - call.window + 1, high = own + 1;
  return {static_cast<int>(low < 0          ? 0
                           : low > kKvSplit ? kKvSplit
                                            : low),
          static_cast<int>(high < 0          ? 0
                           : high > kKvSplit ? kKvSplit
                                             : high)};
}

// R rows: `tokens` tokens from `token` on with R / tokens heads each; q, s and state begin at the first of them.
template <int R, typename T>
void attend_pass(const Split<T>& split, int token, int tokens, const float* q, float* s, const State& state) {
  const AttentionCall& call = split.call;
  const int heads = R / tokens, dim = padded_dim(call.head_dim);
  const int64_t first_key = split.first_block * kKvBlock;
  // Later tokens see later keys: all of them see [common.low, common.high).
  const Seen first = seen_by(call, token, first_key), last = seen_by(call, token + tokens - 1, first_key);
  for (int block = first.low / kKvBlock; block * kKvBlock < last.high; ++block) {
    const T* k = split.block(block).k;
    for (int key = 0; key < kKvBlock; key += 16 * kPassVectors) {
      score_keys<R, kPassVectors>(q, call.head_dim, k + key, s + block * kKvBlock + key);
    }
  }
  const Seen common = {last.low, first.high < last.low ? last.low : first.high};
  for (int t = 0, r = 0; t < tokens; ++t) {
    const Seen seen = seen_by(call, token + t, first_key);
    for (int head = 0; head < heads; ++head, ++r) {
      if (seen.low >= seen.high) continue;
      float* p = s + r * kKvSplit;
      soften(split, p, seen.low, seen.high, state.m + r, state.l + r);
      const int before = seen.high < common.low ? seen.high : common.low;
      if (seen.low < before) add_all_values<1>(split, p, seen.low, before, state.o + r * dim);
    }
  }
  if (common.low < common.high) add_all_values<R>(split, s, common.low, common.high, state.o);
  for (int t = 0, r = 0; t < tokens; ++t) {
    const Seen seen = seen_by(call, token + t, first_key);
    const int after = seen.low > common.high ? seen.low : common.high;
    for (int head = 0; head < heads && tokens > 1; ++head, ++r) {
      if (after < seen.high) add_all_values<1>(split, s + r * kKvSplit, after, seen.high, state.o + r * dim);
    }
  }
}

template <int R, typename T>
inline void dispatch(int rows, const Split<T>& split, int token, int tokens, const float* q, float* s,
                     const State& state) {
  if (rows == R) return attend_pass<R>(split, token, tokens, q, s, state);
  if constexpr (R > 1) dispatch<R - 1>(rows, split, token, tokens, q, s, state);
}

// All rows of the call against one split: several tokens in a pass, or one token's heads in several.
template <typename T>
void attend_split(const Split<T>& split, const float* q, float* s, const State& state) {
  const AttentionCall& call = split.call;
  const int heads = call.heads_per_kv, dim = padded_dim(call.head_dim);
  const int together = heads < kPassRows ? kPassRows / heads : 1;
  for (int token = 0; token < call.tokens; token += together) {
    const int tokens = call.tokens - token < together ? call.tokens - token : together;
    for (int head = 0; head < heads; head += kPassRows) {
      const int count = heads - head < kPassRows ? heads - head : kPassRows, row = token * heads + head;
      const State rows = {state.m + row, state.l + row, state.o + static_cast<int64_t>(row) * dim};
      const float* queries = q + static_cast<int64_t>(row) * call.head_dim;
      dispatch<kPassRows>(count * tokens, split, token, tokens, queries, s, rows);
    }
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
  float* scores = states + 2 * floats;
  scale_queries(call, q);
  const int64_t earliest = call.first_position - call.window + 1;
  const int64_t first_key = call.window == 0 || earliest < 0 ? 0 : earliest;
  const int64_t last_key = call.first_position + call.tokens - 1;
  const int64_t begin = call.partials ? call.split_begin : first_key / kKvSplit;
  const int64_t end = call.partials ? call.split_end : last_key / kKvSplit + 1;
  if (!call.partials) all.clear(rows, dim);
  for (int64_t split = begin; split < end; ++split) {
    float* place = call.partials ? call.partials + static_cast<size_t>(split - begin) * floats : states;
    const State state = state_at(place, rows);
    state.clear(rows, dim);
    attend_split(Split<T>{call, split * (kKvSplit / kKvBlock)}, q, scores, state);
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
