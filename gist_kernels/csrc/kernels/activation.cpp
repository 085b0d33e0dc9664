// The element-wise activation and its gradient. Compiled once for each instruction set;
// CMakeLists.txt names the result by GIST_IN_SET(activation_rows).

#include "activation.h"

#include "adapter.h"
#include "storage.h"

namespace gist {
namespace {

using std::int64_t;

template <class S, class A = Arithmetic<S>>
void run(const ActivationCall &call, int64_t begin, int64_t end) {
  const S *const u = static_cast<const S *>(call.u) + begin;
  const S *const d = call.d == nullptr ? nullptr : static_cast<const S *>(call.d) + begin;
  S *const to = static_cast<S *>(call.to) + begin;
  const int64_t n = end - begin;
  with_activation<A>(call.activation, [&](auto activation) {
    if (d == nullptr) {
      for_each_vectors<A>(n, [&](int64_t j, auto lanes, auto count) GIST_LAMBDA {
        Vec<A> x[count];
        for (int i = 0; i < count; ++i) x[i] = load(u + j + i * kLanes<A>, lanes, A(0));
        activation.value(x, x);
        for (int i = 0; i < count; ++i) store(to + j + i * kLanes<A>, lanes, x[i]);
      });
    } else {
      for_each_vectors<A>(n, [&](int64_t j, auto lanes, auto count) GIST_LAMBDA {
        Vec<A> x[count];
        for (int i = 0; i < count; ++i) x[i] = load(u + j + i * kLanes<A>, lanes, A(0));
        activation.derivative(x, x);
        for (int i = 0; i < count; ++i) {
          const int64_t at = j + i * kLanes<A>;
          store(to + at, lanes, load(d + at, lanes, A(0)) * x[i]);
        }
      });
    }
  });
}

void run_any(const ActivationCall &call, int64_t begin, int64_t end) {
  switch (call.dtype) {
    case Dtype::float32: return run<float>(call, begin, end);
    case Dtype::bfloat16: return run<BFloat16>(call, begin, end);
    case Dtype::float16: return run<Float16>(call, begin, end);
    default: return run<double>(call, begin, end);
  }
}

}  // namespace

extern const ActivationKernel GIST_IN_SET(activation_rows) = run_any;

}  // namespace gist
