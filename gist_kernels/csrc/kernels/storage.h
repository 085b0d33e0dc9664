// Loads and stores between memory, in any dtype, and vectors. Internal linkage: see simd.h.
#pragma once

#include <type_traits>

#include "simd.h"

namespace {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// The type of arithmetic on a storage type.
template <class S>
struct ArithmeticType {
  using type = float;
};
template <>
struct ArithmeticType<double> {
  using type = double;
};
template <class S>
using Arithmetic = typename ArithmeticType<S>::type;

using Floats = Vec<float>;
using Words = Vec<std::uint32_t>;
typedef std::uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

GIST_INLINE Floats widen(BFloat16, Halves halves) {
#if defined(__AVX512F__)
  const Words bits = bit_cast<Words>(_mm512_maskz_cvtepu16_epi32(-1, bit_cast<__m256i>(halves)));
#else
  const Words bits = __builtin_convertvector(halves, Words);
#endif
  return bit_cast<Floats>(bits << 16);
}

GIST_INLINE Floats widen(Float16, Halves halves) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(halves));
#else
  const Words bits = __builtin_convertvector(halves, Words);
  const Words magnitude = (bits & 0x7fff) << 13;
  // The multiplication changes the exponent's bias from 15 to 127, for denormals too.
  const Words finite = bit_cast<Words>(bit_cast<Floats>(magnitude) * 0x1p112f);
  const Words special = magnitude | 0x7f800000;
  return bit_cast<Floats>((magnitude < 0x0f800000 ? finite : special) | (bits & 0x8000) << 16);
#endif
}

// Narrowing rounds to nearest, ties to even. A NaN stays a NaN.
GIST_INLINE Halves narrow(BFloat16, Floats floats) {
  const Words bits = bit_cast<Words>(floats);
  const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Words nan = (bits >> 16) | 0x40;
  return __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded, Halves);
}

GIST_INLINE Halves narrow(Float16, Floats floats) {
#if defined(__AVX512F__)
  return bit_cast<Halves>(_mm512_maskz_cvtps_ph(0xffff, floats, _MM_FROUND_TO_NEAREST_INT));
#else
  const Words bits = bit_cast<Words>(floats), magnitude = bits & 0x7fffffff;
  // Adding 0.5 aligns the last bit of a half's denormal with the last bit of the sum.
  const Words denormal = bit_cast<Words>(bit_cast<Floats>(magnitude) + 0.5f) - 0x3f000000;
  const Words normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const Words infinite = Words{} + 0x7c00, nan = Words{} + 0x7e00;
  const Words half = magnitude < 0x38800000   ? denormal
                     : magnitude < 0x477ff000 ? normal
                     : magnitude > 0x7f800000 ? nan
                                              : infinite;
  return __builtin_convertvector(half | (bits >> 16 & 0x8000), Halves);
#endif
}

// The lanes of a vector that lie in memory: all, or at the end of a row the first few.
struct Whole {};
struct Part {
  int lanes;  // at least one
#if defined(__AVX512F__)
  std::uint16_t mask() const { return std::uint16_t((1u << lanes) - 1); }
#elif defined(__AVX2__)
  __m256i mask(float) const {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  __m256i mask(double) const {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(lanes), _mm256_setr_epi64x(0, 1, 2, 3));
  }
#endif
};

// Copies some bytes, an even number and fewer than kBytes: a call of memcpy takes longer.
template <int kBytes>
GIST_INLINE void copy_part(void *to, const void *from, int bytes) {
  char *t = static_cast<char *>(to);
  const char *f = static_cast<const char *>(from);
  const auto copy = [&](auto size) GIST_LAMBDA {
    if constexpr (size < kBytes) {
      if ((bytes & size) == 0) return;
      std::memcpy(t, f, size);
      t += size;
      f += size;
    }
  };
  copy(std::integral_constant<int, 16>());
  copy(std::integral_constant<int, 8>());
  copy(std::integral_constant<int, 4>());
  copy(std::integral_constant<int, 2>());
}

template <class S>
GIST_INLINE Vec<Arithmetic<S>> load(const S *from, Whole) {
  if constexpr (sizeof(S) == 2) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return widen(S{}, halves);
  } else {
    Vec<S> v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
}

template <class S>
GIST_INLINE void store(S *to, Whole, Vec<Arithmetic<S>> v) {
  if constexpr (sizeof(S) == 2) {
    const Halves halves = narrow(S{}, v);
    std::memcpy(to, &halves, sizeof halves);
  } else {
    std::memcpy(to, &v, sizeof v);
  }
}

// Stores around the cache. `to` must be aligned to the vector, so that no store crosses a line.
template <class S>
GIST_INLINE void store_past_cache(S *to, Vec<Arithmetic<S>> v) {
  if constexpr (sizeof(S) == 2) {
    const Halves halves = narrow(S{}, v);
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i *>(to), bit_cast<__m256i>(halves));
#elif defined(__AVX2__)
    _mm_stream_si128(reinterpret_cast<__m128i *>(to), bit_cast<__m128i>(halves));
#else
    std::memcpy(to, &halves, sizeof halves);
#endif
  } else {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i *>(to), bit_cast<__m512i>(v));
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i *>(to), bit_cast<__m256i>(v));
#elif defined(__SSE2__)
    _mm_stream_si128(reinterpret_cast<__m128i *>(to), bit_cast<__m128i>(v));
#else
    std::memcpy(to, &v, sizeof v);
#endif
  }
}

// Lanes that are not in memory read as `missing`.
template <class S>
GIST_INLINE Vec<Arithmetic<S>> load(const S *from, Part part, Arithmetic<S> missing) {
#if defined(__AVX512F__)
  const Vec<Arithmetic<S>> rest = broadcast(missing);
  if constexpr (sizeof(S) == 8) return _mm512_mask_loadu_pd(rest, part.mask(), from);
  if constexpr (sizeof(S) == 4) return _mm512_mask_loadu_ps(rest, part.mask(), from);
  if constexpr (sizeof(S) == 2) {
    const __m256i halves = bit_cast<__m256i>(narrow(S{}, rest));
    return widen(S{}, bit_cast<Halves>(_mm256_mask_loadu_epi16(halves, part.mask(), from)));
  }
#else
#if defined(__AVX2__)
  const Vec<Arithmetic<S>> rest = broadcast(missing);
  if constexpr (sizeof(S) == 8) {
    const __m256i mask = part.mask(missing);
    return _mm256_blendv_pd(rest, _mm256_maskload_pd(from, mask), __m256d(mask));
  }
  if constexpr (sizeof(S) == 4) {
    const __m256i mask = part.mask(missing);
    return _mm256_blendv_ps(rest, _mm256_maskload_ps(from, mask), __m256(mask));
  }
#endif
  S padded[kLanes<Arithmetic<S>>];
  store(padded, Whole{}, broadcast(missing));
  copy_part<sizeof padded>(padded, from, part.lanes * int(sizeof(S)));
  return load(padded, Whole{});
#endif
}
template <class S>
GIST_INLINE Vec<Arithmetic<S>> load(const S *from, Whole, Arithmetic<S>) {
  return load(from, Whole{});
}

template <class S>
GIST_INLINE void store(S *to, Part part, Vec<Arithmetic<S>> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 8) _mm512_mask_storeu_pd(to, part.mask(), v);
  if constexpr (sizeof(S) == 4) _mm512_mask_storeu_ps(to, part.mask(), v);
  if constexpr (sizeof(S) == 2)
    _mm256_mask_storeu_epi16(to, part.mask(), bit_cast<__m256i>(narrow(S{}, v)));
#else
  S padded[kLanes<Arithmetic<S>>];
  store(padded, Whole{}, v);
  copy_part<sizeof padded>(to, padded, part.lanes * int(sizeof(S)));
#endif
}

// Calls body(j, lanes) for each vector of a run of n numbers; `lanes` is Whole or Part.
template <class A, class Body>
GIST_INLINE void for_each_vector(std::int64_t n, Body body) {
  std::int64_t j = 0;
  for (; j + kLanes<A> <= n; j += kLanes<A>) body(j, Whole{});
  if (j < n) body(j, Part{int(n - j)});
}

// Vectors per head whose exponentials are computed together; the registers hold no more. The
// processor does not look far enough ahead to overlap such chains by itself.
constexpr int kAbreast = kVectorBytes == 64 ? 2 : 1;

// Calls body(j, lanes, count) for every `count` vectors; count is kAbreast, or 1 at the run's end.
template <class A, class Body>
GIST_INLINE void for_each_vectors(std::int64_t n, Body body) {
  constexpr std::int64_t step = kAbreast * kLanes<A>;
  const std::int64_t whole = n / step * step;
  for (std::int64_t j = 0; j < whole; j += step)
    body(j, Whole{}, std::integral_constant<int, kAbreast>());
  for_each_vector<A>(n - whole, [&](std::int64_t j, auto lanes) GIST_LAMBDA {
    body(whole + j, lanes, std::integral_constant<int, 1>());
  });
}

}  // namespace
