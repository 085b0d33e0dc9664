// The element-wise activation, plain and gated, and its gradient. CMakeLists.txt compiles this file
// once per instruction set, which defines GIST_IN_SET(activation_rows).

#include "activation.h"

#include "activation_math.h"
#include "storage.h"

namespace gist {
namespace {

using std::int64_t;

template <class S, class A = Arithmetic<S>>
void forward(const ActivationCall &call, int64_t begin, int64_t end) {
  const S *const u = static_cast<const S *>(call.u) + begin;
  S *const result = static_cast<S *>(call.result) + begin;
  with_activation<A>(call.activation, [&](auto activation) {
    for_each_vectors<A>(end - begin, [&](int64_t j, auto lanes, auto count) GIST_LAMBDA {
      Vec<A> x[count];
      for (int i = 0; i < count; ++i) x[i] = load(u + j + i * kLanes<A>, lanes, A(0));
      activation.value(x, x);
      for (int i = 0; i < count; ++i) store(result + j + i * kLanes<A>, lanes, x[i]);
    });
  });
}

template <class S, class A = Arithmetic<S>>
void backward(const ActivationCall &call, int64_t begin, int64_t end) {
  const S *const u = static_cast<const S *>(call.u) + begin;
  const S *const d_a = static_cast<const S *>(call.d_a) + begin;
  S *const result = static_cast<S *>(call.result) + begin;
  with_activation<A>(call.activation, [&](auto activation) {
    for_each_vectors<A>(end - begin, [&](int64_t j, auto lanes, auto count) GIST_LAMBDA {
      Vec<A> x[count];
      for (int i = 0; i < count; ++i) x[i] = load(u + j + i * kLanes<A>, lanes, A(0));
      activation.derivative(x, x);
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
  with_activation<A>(call.activation, [&](auto activation) {
    for_each_row(call, begin, end, [&](int64_t row, int64_t column, int64_t numbers) GIST_LAMBDA {
      const S *const gate = static_cast<const S *>(call.u) + row * 2 * width + column;
      S *const result = static_cast<S *>(call.result) + row * width + column;
      for_each_vectors<A>(numbers, [&](int64_t j, auto lanes, auto count) GIST_LAMBDA {
        Vec<A> x[count];
        for (int i = 0; i < count; ++i) x[i] = load(gate + j + i * kLanes<A>, lanes, A(0));
        activation.value(x, x);
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
  with_activation<A>(call.activation, [&](auto activation) {
    for_each_row(call, begin, end, [&](int64_t row, int64_t column, int64_t numbers) GIST_LAMBDA {
      const int64_t start = row * 2 * width + column;
      const S *const gate = static_cast<const S *>(call.u) + start;
      const S *const d_a = static_cast<const S *>(call.d_a) + row * width + column;
      S *const d_gate = static_cast<S *>(call.result) + start;
      for_each_vectors<A>(numbers, [&](int64_t j, auto lanes, auto count) GIST_LAMBDA {
        Vec<A> x[count], slope[count];
        for (int i = 0; i < count; ++i) x[i] = load(gate + j + i * kLanes<A>, lanes, A(0));
        activation.both(x, x, slope);
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
