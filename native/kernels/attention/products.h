// The two products of attention, of queries with keys and of probabilities with values, for the rows of a pass and the
// blocks of one split. Part of body.h, which states the rules; knows nothing about softmax, masks or splits joined.
#pragma once
#include "kernels/attention/layout.h"
#include "kernels/lanes/math.h"

#define HAOMIAO_UNROLL _Pragma("GCC unroll 8")
#define HAOMIAO_UNROLL_SOME _Pragma("GCC unroll 4")

namespace haomiao {
namespace {

// Queries as the scores take them, scaled: floats, or for int8 codes of 16 bits and a scale for each row.
struct Queries {
  const float* x;      // [rows][head_dim]
  const int16_t* q;    // [rows][even_dim]
  const float* scale;  // [rows]
};

// A pass's scores, then probabilities, and for int8 their codes and scales.
struct Scores {
  float* s;      // [kPassRows][kKvSplit]
  int16_t* p;    // [kPassRows][kKvSplit]
  float* scale;  // [kPassRows]
};

constexpr int kSplitBlocks = kKvSplit / kKvBlock;

// Asks for the blocks [block, end) of the sequence little by little, while a split is computed: all at once they would
// wait for each other, and the memory would rest afterwards. Into the second cache, as a split exceeds the first.
class Ahead {
 public:
  // `passes` over the split go before; every one fetches once a block for the scores and once for 16 dimensions.
  Ahead(const AttentionCall& call, int64_t block, int64_t end, int passes)
      : call_(call),
        block_(block),
        end_(end),
        bytes_(static_cast<int64_t>(block_bytes(call.kv, call.head_dim))),
        lines_(static_cast<int>(bytes_ / 64 / (passes * (1 + padded_dim(call.head_dim) / 16))) + 1) {}

  void fetch() {
    for (int i = 0; i < lines_ && block_ < end_; ++i) {
      __builtin_prefetch(call_.base + call_.blocks[block_] * call_.block_stride + at_, 0, 2);
      at_ += 64;
      if (at_ >= bytes_) at_ = 0, ++block_;
    }
  }

 private:
  const AttentionCall& call_;
  int64_t block_, end_, at_ = 0, bytes_;
  int lines_;
};

// The blocks of one split as the rows of a pass meet them. Keys count from the split's first position.
template <typename T>
struct Split {
  const AttentionCall& call;
  int64_t first_block;  // of the sequence
  Ahead* ahead;
  const int32_t* blocks;
  uint8_t* base;
  int64_t stride, keys, values;  // of a block; elements of its K and V

  Split(const AttentionCall& of, int64_t first, Ahead* next)
      : call(of),
        first_block(first),
        ahead(next),
        blocks(of.blocks + first),
        base(const_cast<uint8_t*>(of.base)),
        stride(of.block_stride),
        keys(kKvBlock * even_dim(of.head_dim)),
        values(kKvBlock * padded_dim(of.head_dim)) {}

  BlockView<T> block(int index) const { return BlockView<T>(base + blocks[index] * stride, keys, values); }
};

// s[r][key] = sum over d of q[r][d] k[d][key] for R rows from `row` on and C x 16 keys.
template <int R, int C, typename T>
inline void score_keys(const Queries& queries, int row, int head_dim, const T* k, float* s) {
  const float* q = queries.x + static_cast<int64_t>(row) * head_dim;
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

template <int R, int C>
inline void score_keys(const Queries& queries, int row, int head_dim, const int8_t* k, float* s) {
  const int dim = even_dim(head_dim);
  const int16_t* q = queries.q + static_cast<int64_t>(row) * dim;
  Ints sum[R][C];
  HAOMIAO_UNROLL
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sum[r][c] = no_ints();
  }
  HAOMIAO_UNROLL_SOME
  for (int d = 0; d < dim; d += 2, q += 2, k += 2 * kKvBlock) {
    Pairs keys[C];
    for (int c = 0; c < C; ++c) keys[c] = load_pairs(k + c * 32);
    HAOMIAO_UNROLL
    for (int r = 0; r < R; ++r) {
      const Pairs x = broadcast_pair(q + r * dim);
      for (int c = 0; c < C; ++c) sum[r][c] = add_dot(x, keys[c], sum[r][c]);
    }
  }
  HAOMIAO_UNROLL
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) store(s + r * kKvSplit + c * 16, to_lanes(sum[r][c]));
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
    split.ahead->fetch();
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

// o[r][..] = scale[r] sum of p[r][key] v[key][..], for a range that holds all keys whose p is not 0.
template <int R, int C>
inline void sum_values(const Split<int8_t>& split, const Scores& scores, int d, int low, int high, float* o) {
  const int dim = padded_dim(split.call.head_dim);
  Ints sum[R][C];
  HAOMIAO_UNROLL
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sum[r][c] = no_ints();
  }
  for (int key = low / 2 * 2; key < high;) {
    const int8_t* v = split.block(key / kKvBlock).v + key % kKvBlock * dim + 2 * d;
    const int16_t* p = scores.p + key;
    split.ahead->fetch();
    const int end = (key / kKvBlock + 1) * kKvBlock < high ? (key / kKvBlock + 1) * kKvBlock : high;
    HAOMIAO_UNROLL_SOME
    for (; key < end; key += 2, p += 2, v += 2 * dim) {
      Pairs values[C];
      for (int c = 0; c < C; ++c) values[c] = load_pairs(v + c * 32);
      HAOMIAO_UNROLL
      for (int r = 0; r < R; ++r) {
        const Pairs x = broadcast_pair(p + r * kKvSplit);
        for (int c = 0; c < C; ++c) sum[r][c] = add_dot(x, values[c], sum[r][c]);
      }
    }
  }
  HAOMIAO_UNROLL
  for (int r = 0; r < R; ++r) {
    const Lanes scale = broadcast(scores.scale[r]);
    for (int c = 0; c < C; ++c) store(o + r * dim + c * 16, multiply(to_lanes(sum[r][c]), scale));
  }
}

// Vectors of 16 that R rows take at once: few rows take two, or every sum would wait for the one before it.
template <int R>
constexpr int vectors_of() {
  return R <= 2 ? 2 : kPassVectors;
}

template <int R, typename T>
inline void add_all_values(const Split<T>& split, const float* p, int low, int high, float* o) {
  constexpr int C = vectors_of<R>();
  const int dim = padded_dim(split.call.head_dim);
  int d = 0;
  for (; d + 16 * C <= dim; d += 16 * C) add_values<R, C>(split, p, d, low, high, o + d);
  for (; d < dim; d += 16) add_values<R, 1>(split, p, d, low, high, o + d);
}

template <int R>
inline void sum_all_values(const Split<int8_t>& split, const Scores& scores, int low, int high, float* o) {
  constexpr int C = vectors_of<R>();
  const int dim = padded_dim(split.call.head_dim);
  int d = 0;
  for (; d + 16 * C <= dim; d += 16 * C) sum_values<R, C>(split, scores, d, low, high, o + d);
  for (; d < dim; d += 16) sum_values<R, 1>(split, scores, d, low, high, o + d);
}

}  // namespace
}  // namespace haomiao
