// The element-wise activation and its gradient. CMakeLists.txt compiles this file once per
// instruction set, which defines GIST_IN_SET(activation_rows).

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

}  // namespace

extern const ActivationKernels GIST_IN_SET(activation_rows) = {forward_any, backward_any};

}  // namespace gist
