// The attention kernels over Lanes, compiled once per instruction set. Include one instruction set's lanes first.
//
// A row is one (query token, head), tokens one after the other. Up to kPassRows rows go through a split together, K and
// V loaded once for all of them: scores of the whole split, softmax, then values. A row's own arithmetic never depends
// on the others (attention.h states it). int8 K and V meet queries and probabilities of 16 bits in exact integer sums,
// in which what is masked counts zero.
#pragma once
#include <math.h>
#include <string.h>

#include "kernels/attention/attention.h"
#include "kernels/attention/layout.h"
#include "kernels/attention/products.h"
#include "kernels/lanes/math.h"

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

inline size_t whole_vectors(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Sections of a call's scratch memory, in bytes.
struct Scratch {
  size_t queries, codes, scales, state, all, scores, probabilities, end;

  Scratch(int heads_per_kv, int head_dim, int tokens) {
    const size_t rows = static_cast<size_t>(heads_per_kv) * static_cast<size_t>(tokens);
    const size_t states = sizeof(float) * partial_floats(heads_per_kv, head_dim, tokens);
    const size_t pass = static_cast<size_t>(kPassRows) * kKvSplit;
    queries = 0;
    codes = queries + whole_vectors(rows * static_cast<size_t>(head_dim) * sizeof(float));
    scales = codes + whole_vectors(rows * static_cast<size_t>(even_dim(head_dim)) * sizeof(int16_t));
    state = scales + whole_vectors((rows + kPassRows) * sizeof(float));
    all = state + states, scores = all + states;
    probabilities = scores + pass * sizeof(float);
    end = probabilities + pass * sizeof(int16_t);
  }
};

size_t scratch_bytes(int heads_per_kv, int head_dim, int tokens) { return Scratch(heads_per_kv, head_dim, tokens).end; }

constexpr float kIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Lanes of the keys from `key` on that lie in [low, high), the others `none`.
inline Lanes seen_only(Lanes x, int key, int low, int high, Lanes none) {
  if (key >= low && key + 16 <= high) return x;
  const Lanes index = add(load(kIndex), broadcast(static_cast<float>(key)));
  x = select_less(index, broadcast(static_cast<float>(low)), none, x);
  return select_less(index, broadcast(static_cast<float>(high)), x, none);
}

// What probabilities times the values' scales add up to, and the greatest of them (int8).
struct Weighed {
  float greatest, sum;
};

// Scores of one row, keys [low, high) of the split, to probabilities, for int8 times the values' scales; `scale` is the
// query's (int8). Lanes of the first and the last vector that are not seen become 0.
template <typename T>
inline Weighed soften(const Split<T>& of, float* s, float scale, int low, int high, float* m, float* l) {
  const Split<T> split = of;  // what nobody else can change stays in registers
  const int begin = low / 16 * 16, end = (high + 15) / 16 * 16;
  const Lanes none = broadcast(-kInfinity), cap = broadcast(split.call.softcap);
  Lanes top = none;
  for (int key = begin; key < end; key += 16) {
    Lanes score = load(s + key);
    if constexpr (sizeof(T) == 1) {
      const Lanes keys = load(split.block(key / kKvBlock).key_scales + key % kKvBlock);
      score = multiply(score, multiply(broadcast(scale), keys));
    }
    if (split.call.softcap > 0) score = multiply(cap, tanh_lanes(divide(score, cap)));
    score = seen_only(score, key, low, high, none);
    top = greater(score, top);
    store(s + key, score);
  }
  *m = greatest(top);
  const Lanes most = broadcast(*m), zero = broadcast(0.0f);
  Lanes total = zero, weighed = zero;
  top = zero;
  for (int key = begin; key < end; key += 16) {
    Lanes p = exp_to_one(subtract(load(s + key), most));
    total = add(total, p);
    if constexpr (sizeof(T) == 1) {
      p = multiply(p, load(split.block(key / kKvBlock).value_scales + key % kKvBlock));
      p = seen_only(p, key, low, high, zero);  // stale scales
      top = greater(p, top), weighed = add(weighed, p);
    }
    store(s + key, p);
  }
  *l = sum(total);
  return {greatest(top), sum(weighed)};
}

// Probabilities times the values' scales as codes of 16 bits; zero outside the keys [low, high) that are seen, in the
// whole range [first, last) of the pass.
inline void quantize_probabilities(const float* s, const Weighed& weighed, int low, int high, int first, int last,
                                   int16_t* codes, float* scale) {
  const float factor = kCodes16 / weighed.greatest;
  const bool finite = weighed.sum < kInfinity, any = finite && low < high && !(factor > kGreatest);
  *scale = !finite ? __builtin_nanf("") : any ? weighed.greatest / kCodes16 : 0.0f;  // a NaN or an infinity among them
  const int from = first / 16 * 16, to = (last + 15) / 16 * 16;
  const int begin = any ? low / 16 * 16 : to, end = any ? (high + 15) / 16 * 16 : to;
  memset(codes + from, 0, sizeof(int16_t) * static_cast<size_t>(begin - from));
  for (int key = begin; key < end; key += 16) store_rounded(codes + key, multiply(load(s + key), broadcast(factor)));
  memset(codes + end, 0, sizeof(int16_t) * static_cast<size_t>(to - end));
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

// Blocks lie apart and are short, which the processor's own prefetching does not follow. Of a split that Ahead did not
// see coming, the first pass asks for a block's values and for the keys of one further on while it scores the block.
template <typename T>
inline void prefetch_for(const Split<T>& split, int block, int last) {
  constexpr int kAhead = 2;
  const int dim = split.call.head_dim;
  const BlockView<T> here = split.block(block);
  const char* values = reinterpret_cast<const char*>(here.v);
  const int64_t value_bytes = kKvBlock * (padded_dim(dim) * static_cast<int64_t>(sizeof(T)) + (sizeof(T) == 1 ? 8 : 0));
  for (int64_t i = 0; i < value_bytes; i += 64) __builtin_prefetch(values + i, 0, 2);
  if (block + kAhead >= last) return;
  const char* keys = reinterpret_cast<const char*>(split.block(block + kAhead).k);
  const int64_t key_bytes = kKvBlock * even_dim(dim) * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < key_bytes; i += 64) __builtin_prefetch(keys + i);
}

// R rows from `row` on; s and state begin at the first of them.
template <int R, typename T>
void attend_pass(const Split<T>& split, int row, const Queries& queries, const Scores& scores, const State& state) {
  const AttentionCall& call = split.call;
  const int heads = call.heads_per_kv, dim = padded_dim(call.head_dim);
  const int64_t first_key = split.first_block * kKvBlock;
  constexpr int C = vectors_of<R>();
  // Later tokens see later keys: all rows together see [first.low, last.high), all of them [common.low, common.high).
  const Seen first = seen_by(call, row / heads, first_key), last = seen_by(call, (row + R - 1) / heads, first_key);
  for (int block = first.low / kKvBlock; block * kKvBlock < last.high; ++block) {
    if (row == 0) prefetch_for(split, block, (last.high + kKvBlock - 1) / kKvBlock);
    split.ahead->fetch();
    const T* k = split.block(block).k;
    constexpr int kKeyBytes = sizeof(T) == 1 ? 2 : 1;  // elements from one key to the next
    for (int key = 0; key < kKvBlock; key += 16 * C) {
      score_keys<R, C>(queries, row, call.head_dim, k + key * kKeyBytes, scores.s + block * kKvBlock + key);
    }
  }
  const Seen common = {last.low, first.high < last.low ? last.low : first.high};
  for (int r = 0; r < R; ++r) {
    const Seen seen = seen_by(call, (row + r) / heads, first_key);
    float* s = scores.s + r * kKvSplit;
    const bool any = seen.low < seen.high;
    Weighed weighed = {0, 0};
    if (any) weighed = soften(split, s, queries.scale[row + r], seen.low, seen.high, state.m + r, state.l + r);
    if constexpr (sizeof(T) == 1) {
      quantize_probabilities(s, weighed, seen.low, seen.high, first.low, last.high, scores.p + r * kKvSplit,
                             scores.scale + r);
    } else {
      const int before = seen.high < common.low ? seen.high : common.low;
      if (any && seen.low < before) add_all_values<1>(split, s, seen.low, before, state.o + r * dim);
    }
  }
  if constexpr (sizeof(T) == 1) {
    if (first.low < last.high) sum_all_values<R>(split, scores, first.low, last.high, state.o);
  } else {
    if (common.low < common.high) add_all_values<R>(split, scores.s, common.low, common.high, state.o);
    for (int r = 0; r < R; ++r) {
      const Seen seen = seen_by(call, (row + r) / heads, first_key);
      const int after = seen.low > common.high ? seen.low : common.high;
      if (after < seen.high) add_all_values<1>(split, scores.s + r * kKvSplit, after, seen.high, state.o + r * dim);
    }
  }
}

template <int R, typename T>
inline void dispatch(int rows, const Split<T>& split, int row, const Queries& queries, const Scores& scores,
                     const State& state) {
  if (rows == R) return attend_pass<R>(split, row, queries, scores, state);
  if constexpr (R > 1) dispatch<R - 1>(rows, split, row, queries, scores, state);
}

inline int passes_of(int rows) { return (rows + kPassRows - 1) / kPassRows; }

// All rows of the call against one split, in passes of about the same size.
template <typename T>
void attend_split(const Split<T>& split, const Queries& queries, const Scores& scores, const State& state) {
  const AttentionCall& call = split.call;
  const int rows = call.heads_per_kv * call.tokens, dim = padded_dim(call.head_dim);
  const int passes = passes_of(rows);
  for (int pass = 0; pass < passes; ++pass) {
    const int row = rows * pass / passes, end = rows * (pass + 1) / passes;
    const State part = {state.m + row, state.l + row, state.o + static_cast<int64_t>(row) * dim};
    dispatch<kPassRows>(end - row, split, row, queries, scores, part);
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

// The scaled queries of a row as codes of 16 bits.
void quantize_queries(int rows, int head_dim, const float* x, int16_t* codes, float* scales) {
  const int dim = even_dim(head_dim);
  for (int r = 0; r < rows; ++r, x += head_dim, codes += dim) {
    const float factor = quantization(x, head_dim, kCodes16, scales + r);
    memset(codes, 0, sizeof(int16_t) * static_cast<size_t>(dim));
    for (int d = 0; d < head_dim && factor > 0; ++d) codes[d] = static_cast<int16_t>(rintf(x[d] * factor));
  }
}

template <typename T>
void attend_as(const AttentionCall& call) {
  const int rows = call.heads_per_kv * call.tokens, dim = padded_dim(call.head_dim);
  const size_t floats = partial_floats(call.heads_per_kv, call.head_dim, call.tokens);
  const Scratch at(call.heads_per_kv, call.head_dim, call.tokens);
  uint8_t* memory = static_cast<uint8_t*>(call.scratch);
  const auto floats_at = [&](size_t offset) { return reinterpret_cast<float*>(memory + offset); };
  float *q = floats_at(at.queries), *scales = floats_at(at.scales), *states = floats_at(at.state);
  int16_t* codes = reinterpret_cast<int16_t*>(memory + at.codes);
  const State all = state_at(floats_at(at.all), rows);
  const Queries queries = {q, codes, scales};
  const Scores scores = {floats_at(at.scores), reinterpret_cast<int16_t*>(memory + at.probabilities), scales + rows};
  scale_queries(call, q);
  if constexpr (sizeof(T) == 1) quantize_queries(rows, call.head_dim, q, codes, scales);
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
    const int64_t next = (split + 1) * kSplitBlocks, blocks = last_key / kKvBlock + 1;
    Ahead ahead(call, next, next + kSplitBlocks < blocks ? next + kSplitBlocks : blocks, passes_of(rows));
    attend_split(Split<T>{call, split * kSplitBlocks, &ahead}, queries, scores, state);
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
