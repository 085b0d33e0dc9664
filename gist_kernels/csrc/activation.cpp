// The element-wise activation over a tensor: choice of kernels, number of threads.

#include "activation.h"

#include "dispatch.h"

namespace gist {
namespace {

using std::int64_t;

constexpr const ActivationKernels *kKernels[] = GIST_TABLE(ActivationKernels, activation_rows);

template <class Call, class Kernel>
void run(const Call &call, Kernel kernel, int threads) {
  const int64_t parts = (call.size + kNumbersPerPart - 1) / kNumbersPerPart;
  parallel_for(parts, useful_threads(call.size, threads), [&](int64_t part) {
    const int64_t begin = part * kNumbersPerPart, end = begin + kNumbersPerPart;
    kernel(call, begin, end < call.size ? end : call.size);
  });
}

}  // namespace

void activation_forward(const ActivationCall &call, int threads) {
  run(call, kKernels[current_set()]->forward, threads);
}

void activation_backward(const ActivationCall &call, int threads) {
  run(call, kKernels[current_set()]->backward, threads);
}

void gated_forward(const GatedCall &call, int threads) {
  run(call, kKernels[current_set()]->gated_forward, threads);
}

void gated_backward(const GatedCall &call, int threads) {
  run(call, kKernels[current_set()]->gated_backward, threads);
}

}  // namespace gist
