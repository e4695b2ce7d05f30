// The rowwise kernels over Lanes, compiled once per instruction set. Include one instruction set's lanes first.
// Element i of a row belongs to lane i % 16: the tail of a row leaves the other lanes as they are.
#pragma once
#include <math.h>

#include "kernels/lanes/math.h"
#include "kernels/rowwise/rowwise.h"

namespace haomiao {
namespace {

constexpr int kLanes = 16;

// f(x) for every 16 elements: load, change, store; the tail with `some`.
template <typename F>
inline void transform(const float* x, int n, float* out, F f) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, f(load(x + i), i, kLanes));
  if (i < n) store_some(out + i, f(load_some(x + i, n - i), i, n - i), n - i);
}

inline Lanes load_part(const float* p, int n) { return n == kLanes ? load(p) : load_some(p, n); }

void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  Lanes squares = broadcast(0.0f);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) squares = multiply_add(load(x + i), load(x + i), squares);
  if (i < n) squares = multiply_add(load_some(x + i, n - i), load_some(x + i, n - i), squares);
  const Lanes inverse = broadcast(1.0f / sqrtf(sum(squares) / static_cast<float>(n) + eps));
  transform(x, n, out,
            [&](Lanes v, int at, int count) { return multiply(multiply(v, inverse), load_part(weight + at, count)); });
}

void layer_norm(const float* x, const float* weight, const float* bias, int n, float eps, float* out) {
  Lanes total = broadcast(0.0f), squares = broadcast(0.0f);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) total = add(total, load(x + i));
  if (i < n) total = add(total, load_some(x + i, n - i));
  const float mean = sum(total) / static_cast<float>(n);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const Lanes d = subtract(load(x + i), broadcast(mean));
    squares = multiply_add(d, d, squares);
  }
  if (i < n) {
    float rest[kLanes] = {};  // lanes beyond the row stay 0, not -mean
    for (int k = 0; k < n - i; ++k) rest[k] = x[i + k] - mean;
    squares = multiply_add(load(rest), load(rest), squares);
  }
  const Lanes inverse = broadcast(1.0f / sqrtf(sum(squares) / static_cast<float>(n) + eps));
  transform(x, n, out, [&](Lanes v, int at, int count) {
    const Lanes normal = multiply(subtract(v, broadcast(mean)), inverse);
    const Lanes offset = bias ? load_part(bias + at, count) : broadcast(0.0f);
    return multiply_add(normal, load_part(weight + at, count), offset);
  });
}

// (a, b) -> (a cos - b sin, b cos + a sin), each with one product rounded and one fused
inline void rotate(float* a, float* b, const float* c, const float* s, int n) {
  const Lanes x = load_part(a, n), y = load_part(b, n), cosine = load_part(c, n), sine = load_part(s, n);
  store_some(a, subtract_product(y, sine, multiply(x, cosine)), n);
  store_some(b, multiply_add(x, sine, multiply(y, cosine)), n);
}

void rope(float* x, int heads, int head_dim, int dim, const float* cos_sin) {
  const int half = dim / 2;
  for (int h = 0; h < heads; ++h, x += head_dim) {
    for (int i = 0; i < half; i += kLanes) {
      const int n = half - i < kLanes ? half - i : kLanes;
      rotate(x + i, x + half + i, cos_sin + i, cos_sin + half + i, n);
    }
  }
}

inline Lanes apply(ActivationFunction f, Lanes x) {
  switch (f) {
    case ActivationFunction::silu:
      return silu_lanes(x);
    case ActivationFunction::gelu:
      return gelu_lanes(x);
    case ActivationFunction::gelu_tanh:
      return gelu_tanh_lanes(x);
    default:
      return relu_lanes(x);
  }
}

void activate(const float* x, int n, ActivationFunction f, float* out) {
  transform(x, n, out, [&](Lanes v, int, int) { return apply(f, v); });
}

void glu(const float* gate, const float* up, int n, ActivationFunction f, float* out) {
  transform(gate, n, out, [&](Lanes v, int at, int count) { return multiply(apply(f, v), load_part(up + at, count)); });
}

void add_rows(float* target, const float* source, int n) {
  transform(target, n, target, [&](Lanes v, int at, int count) { return add(v, load_part(source + at, count)); });
}

void scale_softcap(float* x, int n, float scale, float softcap) {
  const Lanes factor = broadcast(scale), cap = broadcast(softcap);
  transform(x, n, x, [&](Lanes v, int, int) {
    v = multiply(v, factor);
    return softcap > 0 ? multiply(cap, tanh_lanes(divide(v, cap))) : v;
  });
}

// NaN is passed over: every comparison with it is false.
float greatest_of(const float* x, int n) {
  Lanes best = broadcast(-kInfinity);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Lanes v = load(x + i);
    best = select_less(best, v, v, best);
  }
  float top = greatest(best);
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// The first stretch that holds a greater value than those before it, then the place inside it.
int32_t argmax(const float* x, int n) {
  constexpr int kStretch = 512;
  float top = -kInfinity;
  int begin = 0, end = n;  // if nothing exceeds -infinity, all is searched
  for (int i = 0; i < n; i += kStretch) {
    const int length = n - i < kStretch ? n - i : kStretch;
    const float here = greatest_of(x + i, length);
    if (here > top) top = here, begin = i, end = i + length;
  }
  for (int i = begin; i < end; ++i) {
    if (x[i] == top) return i;
  }
  return 0;
}

constexpr RowwiseKernels rowwise_table(const char* isa) {
  return {isa, rms_norm, layer_norm, rope, glu, activate, add_rows, scale_softcap, argmax};
}

}  // namespace
}  // namespace haomiao
