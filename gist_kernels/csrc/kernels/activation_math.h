// Activations and their derivatives on vectors. Internal linkage: see simd.h.
//
// GELU (exact and by tanh) and SiLU are x g(x). The gate g rises from 0 to 1, and
// g(-x) = 1 - g(x). With the gate's tail q(z) = g(-z) for z = |x|, and its slope p(z) = -q'(z),
//
//   act(x) = max(x, 0) - z q        act'(x) = 1 - (q - z p) for x > 0, q - z p for x <= 0
//
// This keeps all digits of a small q, which 1 - g would lose.
#pragma once

#include "activation.h"
#include "simd.h"

namespace {

using gist::Activation;

template <class A>
GIST_INLINE Vec<A> absolute(Vec<A> x) {
  using Bits = typename Float<A>::Bits;
  return bit_cast<Vec<A>>(bit_cast<Vec<Bits>>(x) & (~Bits(0) >> 1));
}

// Q(z) exp(z^2 / 2) for z >= 0, where Q is the upper tail of the normal distribution. This is
// Mills' ratio over sqrt(2 pi), in powers of t = 1 / (1 + 0.24 z), highest first, without the power
// 0. Minimax; the relative error is 3.1e-9 up to z = 14, where the exponential becomes 0.
constexpr float kMillsSlope = 0.24f;
constexpr float kMills[] = {2.54732627694733700e-2f, -1.24334093824804990e-1f,
                            2.04722521782147930e-1f, -1.43191567953362180e-1f,
                            1.40486434061934200e-1f, 2.87150606576574020e-2f,
                            8.75514956463697120e-2f, 8.89836796493248190e-2f,
                            9.58507697769759380e-2f, 9.57424389877824790e-2f};

template <Activation kActivation, class A>
class ActivationOf {
 public:
  // Takes several vectors at once, as Exp does. `to` may be x itself.
  template <int kCount>
  GIST_INLINE void value(const Vec<A> (&x)[kCount], Vec<A> (&to)[kCount]) const {
    Vec<A> derivative[kCount];
    both(x, to, derivative);
  }
  template <int kCount>
  GIST_INLINE void derivative(const Vec<A> (&x)[kCount], Vec<A> (&to)[kCount]) const {
    Vec<A> value[kCount];
    both(x, value, to);
  }

  template <int kCount>
  GIST_INLINE void both(const Vec<A> (&x)[kCount], Vec<A> (&value)[kCount],
                        Vec<A> (&derivative)[kCount]) const {
    const Vec<A> zero = {}, one = broadcast(A(1));
    if constexpr (kActivation == Activation::identity || kActivation == Activation::relu) {
      for (int i = 0; i < kCount; ++i) {
        const Vec<A> at = x[i];
        const bool linear = kActivation == Activation::identity;
        value[i] = linear ? at : at < 0 ? zero : at;  // NaN stays NaN
        derivative[i] = linear ? one : at <= 0 ? zero : one;
      }
    } else {
      Vec<A> z[kCount], q[kCount], p[kCount];
      for (int i = 0; i < kCount; ++i) {
        z[i] = absolute<A>(x[i]);
        // Beyond this, q and p are computed as 0 anyway; infinity times 0 would be NaN.
        z[i] = z[i] > 1024 ? broadcast(A(1024)) : z[i];
      }
      tail(z, q, p);
      for (int i = 0; i < kCount; ++i) {
        const Vec<A> at = x[i], below = fma(-z[i], p[i], q[i]);
        value[i] = fma(-z[i], q[i], at < 0 ? zero : at);
        derivative[i] = at > 0 ? 1 - below : below;
      }
    }
  }

 private:
  // exp_(x) is exp(x) for a logistic gate, and exp(x / 2) for the normal one.
  Exp<A> exp_{kActivation == Activation::gelu ? 0.5 : 1.0};

  template <int kCount>
  GIST_INLINE void tail(const Vec<A> (&z)[kCount], Vec<A> (&q)[kCount], Vec<A> (&p)[kCount]) const {
    Vec<A> power[kCount], e[kCount];
    if constexpr (kActivation == Activation::gelu) {
      for (int i = 0; i < kCount; ++i) power[i] = -(z[i] * z[i]);
      exp_(power, e);
      constexpr A density = A(0.39894228040143267794);  // 1 / sqrt(2 pi)
      for (int i = 0; i < kCount; ++i) p[i] = e[i] * density;
      normal_tail(z, e, q);
    } else {
      // GELU's logistic form: 1/2 (1 + tanh(u)) is the logistic function of 2 u.
      constexpr bool cubic = kActivation == Activation::gelu_tanh;
      constexpr A slope = cubic ? A(1.59576912160573071176) : A(1);  // 2 sqrt(2 / pi)
      constexpr A cube = cubic ? A(0.044715) : A(0);
      for (int i = 0; i < kCount; ++i)
        power[i] = -z[i] * fma(z[i] * z[i], broadcast(slope * cube), broadcast(slope));
      exp_(power, e);
      for (int i = 0; i < kCount; ++i) {
        const Vec<A> gate = 1 / (1 + e[i]);
        q[i] = e[i] * gate;
        p[i] = q[i] * gate * fma(z[i] * z[i], broadcast(3 * slope * cube), broadcast(slope));
      }
    }
  }

  template <int kCount>
  GIST_INLINE void normal_tail(const Vec<A> (&z)[kCount], const Vec<A> (&e)[kCount],
                               Vec<A> (&q)[kCount]) const {
    if constexpr (sizeof(A) == 4) {
      Vec<A> t[kCount];
      for (int i = 0; i < kCount; ++i)
        t[i] = 1 / fma(z[i], broadcast(kMillsSlope), broadcast(A(1)));
      for (int i = 0; i < kCount; ++i) q[i] = broadcast(kMills[0]);
      for (unsigned k = 1; k < sizeof kMills / sizeof *kMills; ++k)
        for (int i = 0; i < kCount; ++i) q[i] = fma(q[i], t[i], broadcast(kMills[k]));
      for (int i = 0; i < kCount; ++i) q[i] *= t[i] * e[i];
    } else {
      constexpr double root_half = 0.70710678118654752440;
      for (int i = 0; i < kCount; ++i)
        for (int lane = 0; lane < kLanes<A>; ++lane)
          q[i][lane] = 0.5 * __builtin_erfc(z[i][lane] * root_half);
    }
  }
};

// Calls body with the ActivationOf<..., A> of `activation`.
template <class A, class Body>
GIST_INLINE void with_activation(Activation activation, Body body) {
  switch (activation) {
    case Activation::gelu: return body(ActivationOf<Activation::gelu, A>());
    case Activation::gelu_tanh: return body(ActivationOf<Activation::gelu_tanh, A>());
    case Activation::identity: return body(ActivationOf<Activation::identity, A>());
    case Activation::relu: return body(ActivationOf<Activation::relu, A>());
    case Activation::silu: return body(ActivationOf<Activation::silu, A>());
  }
}

}  // namespace
