// Vectors of float or double, as wide as the translation unit's instruction set has them, with the
// few operations the kernels need. GCC's vector extensions (Clang has them too) provide arithmetic,
// comparison and conversion. Intrinsics appear only where they save instructions.
//
// Everything in here has internal linkage. This file is compiled once per instruction set. Of equal
// inline functions the linker would keep one, perhaps one that this processor can't run.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define GIST_INLINE inline __attribute__((always_inline))
#define GIST_LAMBDA __attribute__((always_inline))

template <class A, int kCount>
struct VectorOf {
  typedef A type __attribute__((vector_size(kCount * sizeof(A))));
};
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));
template <class A>
using Vec = typename VectorOf<A, kLanes<A>>::type;

template <class To, class From>
GIST_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast changes the type, not the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class A>
GIST_INLINE Vec<A> broadcast(A x) {
  return x - Vec<A>{};
}

// Properties of float and double.
template <class A>
struct Float;

template <>
struct Float<float> {
  using Bits = std::uint32_t;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float round_magic = 0x1.8p23f;
  // 2^r = 1 + r P(r) for |r| <= 1/2, highest power first: minimax, relative error 2.0e-9.
  static constexpr float exp2[] = {1.5353362068858489e-4f, 1.3398874393981390e-3f,
                                   9.6184373569574206e-3f, 5.5503324711908572e-2f,
                                   2.4022647913636853e-1f, 6.9314720285503165e-1f};
  // The same for |r| <= 1/32, for use with a table of 2^(k/16); relative error 1.6e-9.
  static constexpr float short_exp2[] = {5.5502136455739043e-2f, 2.4023428801567776e-1f,
                                         6.9314718266667654e-1f};
};

template <>
struct Float<double> {
  using Bits = std::uint64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double round_magic = 0x1.8p52;
  // The same, relative error 3.4e-18.
  static constexpr double exp2[] = {
      4.4347712982003767083e-10, 7.0737832485031332991e-9, 1.0178199571842137974e-7,
      1.3215435282308487999e-6,  1.5252733493127489347e-5, 1.5403530457112090860e-4,
      1.3333558146774620517e-3,  9.6181291075941200896e-3, 5.5504108664820083227e-2,
      2.4022650695910131260e-1,  6.9314718055994532581e-1};
};

// a * b + c, rounded once if the processor can.
GIST_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
GIST_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// x * y - n for a small result: exact but for one rounding, with or without a fused multiply-add.
template <class A>
GIST_INLINE Vec<A> product_minus(Vec<A> x, A y, Vec<A> n) {
#if defined(__FMA__) || defined(__AVX512F__) || defined(__ARM_FEATURE_FMA)
  return fma(x, broadcast(y), -n);
#else
  // Each factor is split into two halves of its digits, whose products are exact.
  using Bits = typename Float<A>::Bits;
  constexpr Bits upper = ~Bits(0) << ((Float<A>::mantissa + 2) / 2);
  const A y_high = bit_cast<A>(bit_cast<Bits>(y) & upper);
  const Vec<A> x_high = bit_cast<Vec<A>>(bit_cast<Vec<Bits>>(x) & upper);
  return (x_high * y_high - n) + x_high * (y - y_high) + (x - x_high) * y;
#endif
}

// The greater of the two; y where either is NaN.
template <class V>
GIST_INLINE V max(V x, V y) {
  return x > y ? x : y;
}
#if defined(__AVX512F__)
GIST_INLINE Vec<float> max(Vec<float> x, Vec<float> y) { return _mm512_maskz_max_ps(-1, x, y); }
#elif defined(__AVX2__)
GIST_INLINE Vec<float> max(Vec<float> x, Vec<float> y) { return _mm256_max_ps(x, y); }
#elif defined(__SSE2__)
GIST_INLINE Vec<float> max(Vec<float> x, Vec<float> y) { return _mm_max_ps(x, y); }
#endif

// The vector 0, 1, 2, ...
template <class A>
GIST_INLINE Vec<A> lane_numbers() {
  Vec<A> v;
  for (int i = 0; i < kLanes<A>; ++i) v[i] = A(i);
  return v;
}

// x where it is finite, else 0.
template <class V>
GIST_INLINE V finite_or_zero(V x) {
  return x - x == 0 ? x : V{};
}

template <class A, int kCount = kLanes<A>>
GIST_INLINE A largest(typename VectorOf<A, kCount>::type v) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    typename VectorOf<A, kCount / 2>::type half[2];
    std::memcpy(half, &v, sizeof v);
    return largest<A, kCount / 2>(max(half[0], half[1]));
  }
}

template <class A, int kCount = kLanes<A>>
GIST_INLINE double sum(typename VectorOf<A, kCount>::type v) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    using Doubles = typename VectorOf<double, kCount / 2>::type;
    typename VectorOf<A, kCount / 2>::type half[2];
    std::memcpy(half, &v, sizeof v);
    return sum<double, kCount / 2>(__builtin_convertvector(half[0], Doubles) +
                                   __builtin_convertvector(half[1], Doubles));
  }
}

// The natural logarithm of normal numbers; infinity and NaN are returned as they are. With
// x = 2^k m and m near 1, log m = 2 artanh((m - 1) / (m + 1)). The error is at most two ulps.
GIST_INLINE Vec<double> log(Vec<double> x) {
  using Bits = Vec<std::uint64_t>;
  constexpr std::uint64_t root_half = 0x3fe6a09e667f3bcd, one = 0x3ff0000000000000;
  constexpr double ln2_high = 0x1.62e42fefa0000p-1, ln2_low = 0x1.cf79abc9e3b3ap-40;
  const Bits biased = (bit_cast<Bits>(x) - root_half + one) >> 52;
  const Vec<double> m = bit_cast<Vec<double>>(bit_cast<Bits>(x) - (biased << 52) + one);
  // Converts integers below 2^52, placed in the last bits of 2^52.
  const Vec<double> k = bit_cast<Vec<double>>(biased | 0x4330000000000000) - (0x1p52 + 1023);
  const Vec<double> ratio = (m - 1) / (m + 1), square = ratio * ratio;
  Vec<double> series = broadcast(1.0 / 21);
  for (int odd = 19; odd > 1; odd -= 2) series = fma(series, square, broadcast(1.0 / odd));
  const Vec<double> rest = fma(ratio * square, 2 * series, k * ln2_low);
  const Vec<double> result = fma(k, broadcast(ln2_high), 2 * ratio + rest);
  return x - x == 0 ? result : x;
}

// x -> exp(scale * x) for x <= 0. The factor log2(e) * scale is stored in two parts. With a fused
// multiply-add the error is then about one ulp for every scale and x.
template <class A>
class Exp {
 public:
  explicit Exp(double scale) {
    constexpr double log2e = 1.4426950408889634074, rest = 2.0355273740931033e-17;
    const double factor = log2e * scale;
    high_ = A(factor);
    low_ = A(__builtin_fma(log2e, scale, -double(high_)) + rest * scale);
    least_ = A((2 - Float<A>::bias) / factor);
  }

  // Takes several vectors at once, step by step, so that their chains of operations overlap.
  template <int kCount>
  GIST_INLINE void operator()(const Vec<A> (&x)[kCount], Vec<A> (&e)[kCount]) const {
    using F = Float<A>;
    using Bits = Vec<typename F::Bits>;
    Vec<A> clamped[kCount], shifted[kCount], r[kCount];
    // Clamped so that no arithmetic sees -inf; max() passes a NaN on.
    for (int i = 0; i < kCount; ++i) clamped[i] = max(broadcast(least_), x[i]);
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) {
      by_table(x, clamped, e);
      return;
    }
#endif
    // Adding the magic number rounds to an integer, which then is in the lowest bits.
    for (int i = 0; i < kCount; ++i)
      shifted[i] = fma(clamped[i], broadcast(high_), broadcast(F::round_magic));
    for (int i = 0; i < kCount; ++i)
      r[i] = product_minus(clamped[i], high_, shifted[i] - F::round_magic);
    for (int i = 0; i < kCount; ++i) r[i] = fma(clamped[i], broadcast(low_), r[i]);
    for (int i = 0; i < kCount; ++i) e[i] = broadcast(F::exp2[0]);
    for (unsigned k = 1; k < sizeof F::exp2 / sizeof(A); ++k)
      for (int i = 0; i < kCount; ++i) e[i] = fma(e[i], r[i], broadcast(F::exp2[k]));
    for (int i = 0; i < kCount; ++i) e[i] = fma(e[i], r[i], broadcast(A(1)));
    for (int i = 0; i < kCount; ++i) {
      const Bits exponent =
          (bit_cast<Bits>(shifted[i]) << F::mantissa) + (typename F::Bits(F::bias) << F::mantissa);
      e[i] = x[i] < least_ ? Vec<A>{} : e[i] * bit_cast<Vec<A>>(exponent);
    }
  }

 private:
#if defined(__AVX512F__)
  // 2^t = 2^n 2^(k/16) 2^r. With a table of 2^(k/16) in one register, 2^r is a shorter polynomial.
  template <int kCount>
  GIST_INLINE void by_table(const Vec<A> (&x)[kCount], const Vec<A> (&clamped)[kCount],
                            Vec<A> (&e)[kCount]) const {
    using Bits = Vec<std::uint32_t>;
    constexpr float magic = 0x1.8p19f;
    const Vec<float> table = {0x1.000000p0f, 0x1.0b5586p0f, 0x1.172b84p0f, 0x1.2387a6p0f,
                              0x1.306fe0p0f, 0x1.3dea64p0f, 0x1.4bfdaep0f, 0x1.5ab07ep0f,
                              0x1.6a09e6p0f, 0x1.7a1148p0f, 0x1.8ace54p0f, 0x1.9c4918p0f,
                              0x1.ae89fap0f, 0x1.c199bep0f, 0x1.d5818ep0f, 0x1.ea4afap0f};
    Vec<A> shifted[kCount], r[kCount], p[kCount], power[kCount];
    for (int i = 0; i < kCount; ++i)
      shifted[i] = fma(clamped[i], broadcast(high_), broadcast(magic));
    for (int i = 0; i < kCount; ++i) r[i] = product_minus(clamped[i], high_, shifted[i] - magic);
    for (int i = 0; i < kCount; ++i) r[i] = fma(clamped[i], broadcast(low_), r[i]);
    for (int i = 0; i < kCount; ++i)
      p[i] =
          fma(broadcast(Float<float>::short_exp2[0]), r[i], broadcast(Float<float>::short_exp2[1]));
    for (int i = 0; i < kCount; ++i) p[i] = fma(p[i], r[i], broadcast(Float<float>::short_exp2[2]));
    for (int i = 0; i < kCount; ++i) p[i] *= r[i];
    for (int i = 0; i < kCount; ++i) {
      const Bits bits = bit_cast<Bits>(shifted[i]);
      const Bits root = bit_cast<Bits>(
          (Vec<A>)_mm512_maskz_permutexvar_ps(0xffff, bit_cast<__m512i>(bits), table));
      power[i] = bit_cast<Vec<A>>(root + (bits << 19 & 0xff800000));
    }
    for (int i = 0; i < kCount; ++i)
      e[i] = x[i] < least_ ? Vec<A>{} : fma(power[i], p[i], power[i]);
  }
#endif

  A high_, low_, least_;
};

// x -> 2^x in float, for x <= 0: fewer operations than Exp, whose x is in natural units. The error
// is about one ulp.
#if defined(__AVX512F__)
class Exp2 : public Exp<float> {
 public:
  Exp2() : Exp<float>(0.69314718055994530942) {}
};
#else
class Exp2 {
 public:
  template <int kCount>
  GIST_INLINE void operator()(const Vec<float> (&x)[kCount], Vec<float> (&e)[kCount]) const {
    using F = Float<float>;
    using Bits = Vec<F::Bits>;
    Vec<float> clamped[kCount], shifted[kCount], r[kCount];
    // At -bias the exponent's bits are 0, and so is the result. max() passes a NaN on.
    for (int i = 0; i < kCount; ++i) clamped[i] = max(broadcast(float(-F::bias)), x[i]);
    for (int i = 0; i < kCount; ++i) shifted[i] = clamped[i] + F::round_magic;
    for (int i = 0; i < kCount; ++i) r[i] = clamped[i] - (shifted[i] - F::round_magic);
    for (int i = 0; i < kCount; ++i) e[i] = broadcast(F::exp2[0]);
    for (unsigned k = 1; k < sizeof F::exp2 / sizeof(float); ++k)
      for (int i = 0; i < kCount; ++i) e[i] = fma(e[i], r[i], broadcast(F::exp2[k]));
    for (int i = 0; i < kCount; ++i) e[i] = fma(e[i], r[i], broadcast(1.0f));
    for (int i = 0; i < kCount; ++i) {
      const Bits exponent = (bit_cast<Bits>(shifted[i]) + F::Bits(F::bias)) << F::mantissa;
      e[i] *= bit_cast<Vec<float>>(exponent);
    }
  }
};
#endif

}  // namespace
