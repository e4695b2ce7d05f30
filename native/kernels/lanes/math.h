// exp, tanh and the activation functions over Lanes. Include one instruction set's lanes first: the same operations in
// the same order everywhere, so that bits agree across instruction sets. Coefficients: coefficients.py (our own fits).
#pragma once

namespace haomiao {
namespace {

constexpr float kInfinity = __builtin_inff();

// e^x to about 1 ulp. Cody-Waite reduction x = n ln2 + r with ln2 in two parts, then 1 + r + r^2 q(r); results below
// 2^-126 are 0, NaN stays NaN.
// exp_to_one is the same for x <= 0 or NaN.
inline Lanes exp_to_one(Lanes x) {
  const Lanes shift = broadcast(0x1.8p23f);  // adding it rounds to an integer, ties to even
  const Lanes z = multiply_add(x, broadcast(0x1.715476p0f), shift);
  const Lanes n = subtract(z, shift);
  Lanes r = subtract_product(n, broadcast(0x1.62e400p-1f), x);
  r = subtract_product(n, broadcast(0x1.7f7d1cp-20f), r);
  Lanes q = broadcast(0x1.6a452ep-10f);
  q = multiply_add(q, r, broadcast(0x1.1239aap-7f));
  q = multiply_add(q, r, broadcast(0x1.5558b8p-5f));
  q = multiply_add(q, r, broadcast(0x1.555492p-3f));
  q = multiply_add(q, r, broadcast(0x1.fffffcp-2f));
  const Lanes y = add(broadcast(1.0f), multiply_add(multiply(r, r), q, r));
  Lanes result = add_exponent(y, z);
  result = select_less(x, broadcast(-0x1.5d589ep6f), broadcast(0.0f), result);  // ln 2^-126
  return select_nan(x, x, result);
}
inline Lanes exp_lanes(Lanes x) {
  return select_less(broadcast(0x1.62e42ep6f), x, broadcast(kInfinity), exp_to_one(x));  // ln of the greatest float
}

// tanh to about 2 ulp: an odd polynomial near 0, 1 - 2 / (e^2x + 1) beyond.
inline Lanes tanh_lanes(Lanes x) {
  const Lanes one = broadcast(1.0f), s = multiply(x, x), a = absolute(x);
  Lanes q = broadcast(-0x1.750ce2p-8f);
  q = multiply_add(q, s, broadcast(0x1.51f8cep-6f));
  q = multiply_add(q, s, broadcast(-0x1.b835a4p-5f));
  q = multiply_add(q, s, broadcast(0x1.1106f6p-3f));
  q = multiply_add(q, s, broadcast(-0x1.555532p-2f));
  const Lanes near = multiply_add(multiply(x, s), q, x);
  const Lanes far = subtract(one, divide(broadcast(2.0f), add(exp_lanes(add(a, a)), one)));
  const Lanes signed_far = select_less(x, broadcast(0.0f), subtract(broadcast(0.0f), far), far);
  return select_nan(x, x, select_less(a, broadcast(0.625f), near, signed_far));
}

// x / (1 + e^-x)
inline Lanes silu_lanes(Lanes x) {
  const Lanes e = exp_lanes(subtract(broadcast(0.0f), x));
  return divide(x, add(broadcast(1.0f), e));
}

// x * (1 + tanh(u)) / 2 = x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks & Gimpel 2016)
inline Lanes gelu_tanh_lanes(Lanes x) {
  const Lanes inner = multiply_add(multiply(broadcast(0.044715f), multiply(x, x)), x, x);
  const Lanes e = exp_lanes(multiply(broadcast(-0x1.988454p0f), inner));  // 2 sqrt(2 / pi)
  return divide(x, add(broadcast(1.0f), e));
}

// x Phi(x) with Phi(-z sqrt 2) = erfc(z) / 2 and erfc(z) = e^(-z^2) t q(t), t = 1 / (1 + z / 2)
inline Lanes gelu_lanes(Lanes x) {
  const Lanes one = broadcast(1.0f), a = absolute(x);
  const Lanes z = multiply(a, broadcast(0x1.6a09e6p-1f));
  const Lanes t = divide(one, multiply_add(z, broadcast(0.5f), one));
  Lanes q = broadcast(0x1.927ba6p-7f);
  q = multiply_add(q, t, broadcast(-0x1.f8d4f8p-4f));
  q = multiply_add(q, t, broadcast(0x1.b736c4p-2f));
  q = multiply_add(q, t, broadcast(-0x1.570c2p-1f));
  q = multiply_add(q, t, broadcast(0x1.af6178p-2f));
  q = multiply_add(q, t, broadcast(-0x1.92b4bap-4f));
  q = multiply_add(q, t, broadcast(0x1.cde8fep-3f));
  q = multiply_add(q, t, broadcast(0x1.e8be8ep-3f));
  q = multiply_add(q, t, broadcast(0x1.21a548p-2f));
  q = multiply_add(q, t, broadcast(0x1.20d584p-2f));
  const Lanes e = exp_lanes(multiply(multiply(broadcast(-0.5f), a), a));
  const Lanes tail = multiply(broadcast(0.5f), multiply(e, multiply(t, q)));  // Phi(-|x|)
  const Lanes result = multiply(x, select_less(x, broadcast(0.0f), tail, subtract(one, tail)));
  return select_nan(x, x,
                    select_less(a, broadcast(14.0f), result, select_less(x, broadcast(0.0f), broadcast(0.0f), x)));
}

inline Lanes relu_lanes(Lanes x) { return select_less(x, broadcast(0.0f), broadcast(0.0f), x); }

}  // namespace
}  // namespace haomiao
