// The element-wise activation, plain and gated, and its gradient. CMakeLists.txt compiles this file
// once per instruction set, which defines GIST_IN_SET(activation_rows).
//
// A 16-bit dtype has 65,536 numbers only. What each becomes is computed once and looked up from
// then on. This is faster, most of all without AVX-512: the few thousand usual numbers stay in the
// L1 cache.

#include "activation.h"

#include <type_traits>

#include "activation_math.h"
#include "storage.h"

namespace gist {
namespace {

using std::int64_t;

// The values and derivatives of all numbers of 16 bits, by their bits.
template <class Function, class S>
struct Table {
  static constexpr int kCount = 1 << 16;
  float value[kCount], slope[kCount];

  Table() {
    const Function function;
    Halves bits;
    for (int lane = 0; lane < kLanes<float>; ++lane) bits[lane] = std::uint16_t(lane);
    for (int i = 0; i < kCount; i += kLanes<float>) {
      const Floats x[1] = {widen(S{}, bits + std::uint16_t(i))};
      Floats y[1];
      function.value(x, y);
      store(value + i, Whole{}, y[0]);
      function.derivative(x, y);
      store(slope + i, Whole{}, y[0]);
    }
  }
};

GIST_INLINE Floats look_up(const float *table, const void *halves) {
  Halves bits;
  std::memcpy(&bits, halves, sizeof bits);
#if defined(__AVX512F__)
  const __m512i at = _mm512_maskz_cvtepu16_epi32(-1, bit_cast<__m256i>(bits));
  return _mm512_mask_i32gather_ps(Floats{}, 0xffff, at, table, 4);
#elif defined(__AVX2__)
  return _mm256_i32gather_ps(table, _mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)), 4);
#else
  Floats found;
  for (int lane = 0; lane < kLanes<float>; ++lane) found[lane] = table[bits[lane]];
  return found;
#endif
}

// An activation of numbers in memory: looked up or computed.
template <class Function, class S>
class OfMemory {
 public:
  using A = Arithmetic<S>;

  template <class Lanes, int kCount>
  GIST_INLINE void value(const S *u, Lanes lanes, Vec<A> (&to)[kCount]) const {
    if constexpr (kLooksUp && std::is_same_v<Lanes, Whole>) {
      for (int i = 0; i < kCount; ++i) to[i] = look_up(table().value, u + i * kLanes<A>);
    } else {
      Vec<A> x[kCount];
      load_all(u, lanes, x);
      function_.value(x, to);
    }
  }
  template <class Lanes, int kCount>
  GIST_INLINE void derivative(const S *u, Lanes lanes, Vec<A> (&to)[kCount]) const {
    if constexpr (kLooksUp && std::is_same_v<Lanes, Whole>) {
      for (int i = 0; i < kCount; ++i) to[i] = look_up(table().slope, u + i * kLanes<A>);
    } else {
      Vec<A> x[kCount];
      load_all(u, lanes, x);
      function_.derivative(x, to);
    }
  }
  template <class Lanes, int kCount>
  GIST_INLINE void both(const S *u, Lanes lanes, Vec<A> (&values)[kCount],
                        Vec<A> (&slopes)[kCount]) const {
    if constexpr (kLooksUp && std::is_same_v<Lanes, Whole>) {
      value(u, lanes, values);
      derivative(u, lanes, slopes);
    } else {
      Vec<A> x[kCount];
      load_all(u, lanes, x);
      function_.both(x, values, slopes);
    }
  }

 private:
  static constexpr bool kLooksUp =
      sizeof(S) == 2 && !std::is_same_v<Function, ActivationOf<Activation::identity, A>> &&
      !std::is_same_v<Function, ActivationOf<Activation::relu, A>>;

  template <class Lanes, int kCount>
  GIST_INLINE static void load_all(const S *u, Lanes lanes, Vec<A> (&x)[kCount]) {
    for (int i = 0; i < kCount; ++i) x[i] = load(u + i * kLanes<A>, lanes, A(0));
  }
  static const Table<Function, S> &table() {
    static const Table<Function, S> found;
    return found;
  }

  const Function function_{};
};

// Calls body with the OfMemory<..., S> of `activation`.
template <class S, class Body>
GIST_INLINE void with_activation_of(Activation activation, Body body) {
  with_activation<Arithmetic<S>>(activation,
                                 [&](auto function) { body(OfMemory<decltype(function), S>()); });
}

template <class S, class A = Arithmetic<S>>
void forward(const ActivationCall &call, int64_t begin, int64_t end) {
  const S *const u = static_cast<const S *>(call.u) + begin;
  S *const result = static_cast<S *>(call.result) + begin;
  with_activation_of<S>(call.activation, [&](auto activation) {
    for_each_vectors<A>(end - begin, [&](int64_t j, auto lanes, auto count) GIST_LAMBDA {
      Vec<A> x[count];
      activation.value(u + j, lanes, x);
      for (int i = 0; i < count; ++i) store(result + j + i * kLanes<A>, lanes, x[i]);
    });
  });
}

template <class S, class A = Arithmetic<S>>
void backward(const ActivationCall &call, int64_t begin, int64_t end) {
  const S *const u = static_cast<const S *>(call.u) + begin;
  const S *const d_a = static_cast<const S *>(call.d_a) + begin;
  S *const result = static_cast<S *>(call.result) + begin;
  with_activation_of<S>(call.activation, [&](auto activation) {
    for_each_vectors<A>(end - begin, [&](int64_t j, auto lanes, auto count) GIST_LAMBDA {
      Vec<A> x[count];
      activation.derivative(u + j, lanes, x);
      for (int i = 0; i < count; ++i) {
        const int64_t at = j + i * kLanes<A>;
        store(result + at, lanes, load(d_a + at, lanes, A(0)) * x[i]);
      }
    });
  });
}

// Calls body(row, column, count) for each row's part of the results [begin, end).
template <class Body>
GIST_INLINE void for_each_row(const GatedCall &call, int64_t begin, int64_t end, Body body) {
  while (begin < end) {
    const int64_t row = begin / call.width, column = begin % call.width;
    const int64_t rest = call.width - column, count = rest < end - begin ? rest : end - begin;
    body(row, column, count);
    begin += count;
  }
}

template <class S, class A = Arithmetic<S>>
void gated_forward(const GatedCall &call, int64_t begin, int64_t end) {
  const int64_t width = call.width;
  with_activation_of<S>(call.activation, [&](auto activation) {
    for_each_row(call, begin, end, [&](int64_t row, int64_t column, int64_t numbers) GIST_LAMBDA {
      const S *const gate = static_cast<const S *>(call.u) + row * 2 * width + column;
      S *const result = static_cast<S *>(call.result) + row * width + column;
      for_each_vectors<A>(numbers, [&](int64_t j, auto lanes, auto count) GIST_LAMBDA {
        Vec<A> x[count];
        activation.value(gate + j, lanes, x);
        for (int i = 0; i < count; ++i) {
          const int64_t at = j + i * kLanes<A>;
          store(result + at, lanes, x[i] * load(gate + width + at, lanes, A(0)));
        }
      });
    });
  });
}

template <class S, class A = Arithmetic<S>>
void gated_backward(const GatedCall &call, int64_t begin, int64_t end) {
  const int64_t width = call.width;
  with_activation_of<S>(call.activation, [&](auto activation) {
    for_each_row(call, begin, end, [&](int64_t row, int64_t column, int64_t numbers) GIST_LAMBDA {
      const int64_t start = row * 2 * width + column;
      const S *const gate = static_cast<const S *>(call.u) + start;
      const S *const d_a = static_cast<const S *>(call.d_a) + row * width + column;
      S *const d_gate = static_cast<S *>(call.result) + start;
      for_each_vectors<A>(numbers, [&](int64_t j, auto lanes, auto count) GIST_LAMBDA {
        Vec<A> x[count], slope[count];
        activation.both(gate + j, lanes, x, slope);
        for (int i = 0; i < count; ++i) {
          const int64_t at = j + i * kLanes<A>;
          const Vec<A> d = load(d_a + at, lanes, A(0));
          const Vec<A> value = load(gate + width + at, lanes, A(0));
          store(d_gate + at, lanes, d * value * slope[i]);
          store(d_gate + width + at, lanes, d * x[i]);
        }
      });
    });
  });
}

void forward_any(const ActivationCall &call, int64_t begin, int64_t end) {
  switch (call.dtype) {
    case Dtype::float32: return forward<float>(call, begin, end);
    case Dtype::bfloat16: return forward<BFloat16>(call, begin, end);
    case Dtype::float16: return forward<Float16>(call, begin, end);
    default: return forward<double>(call, begin, end);
  }
}

void backward_any(const ActivationCall &call, int64_t begin, int64_t end) {
  switch (call.dtype) {
    case Dtype::float32: return backward<float>(call, begin, end);
    case Dtype::bfloat16: return backward<BFloat16>(call, begin, end);
    case Dtype::float16: return backward<Float16>(call, begin, end);
    default: return backward<double>(call, begin, end);
  }
}

void gated_forward_any(const GatedCall &call, int64_t begin, int64_t end) {
  switch (call.dtype) {
    case Dtype::float32: return gated_forward<float>(call, begin, end);
    case Dtype::bfloat16: return gated_forward<BFloat16>(call, begin, end);
    case Dtype::float16: return gated_forward<Float16>(call, begin, end);
    default: return gated_forward<double>(call, begin, end);
  }
}

void gated_backward_any(const GatedCall &call, int64_t begin, int64_t end) {
  switch (call.dtype) {
    case Dtype::float32: return gated_backward<float>(call, begin, end);
    case Dtype::bfloat16: return gated_backward<BFloat16>(call, begin, end);
    case Dtype::float16: return gated_backward<Float16>(call, begin, end);
    default: return gated_backward<double>(call, begin, end);
  }
}

}  // namespace

extern const ActivationKernels GIST_IN_SET(activation_rows) = {
    forward_any, backward_any, gated_forward_any, gated_backward_any};

}  // namespace gist
