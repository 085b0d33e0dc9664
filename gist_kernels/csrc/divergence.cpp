// The Jensen-Shannon divergence over a batch: which row kernel, and on how many threads.

#include "divergence.h"

namespace gist {
namespace {

using std::int64_t;

constexpr const DivergenceKernel *kRowKernels[] = GIST_TABLE(DivergenceKernel, divergence_rows);

// Gradients larger than this leave the cache before anything reads them.
constexpr int64_t kStreamedBytes = 32 << 20;

void run_rows(const DivergenceCall &call, bool backward, int threads) {
  const DivergenceKernel rows = *kRowKernels[current_set()];
  const int64_t numbers = call.sides * call.classes;
  const int64_t size = (kNumbersPerPart + numbers - 1) / numbers;
  const int64_t parts = (call.rows + size - 1) / size;
  parallel_for(parts, useful_threads(call.rows * numbers, threads), [&](int64_t part) {
    const int64_t end = (part + 1) * size;
    rows(call, backward, part * size, end < call.rows ? end : call.rows);
  });
}

}  // namespace

void divergence_forward(const DivergenceCall &call, int threads) { run_rows(call, false, threads); }

void divergence_backward(DivergenceCall call, int threads) {
  int gradients = 0;
  // Written over the logits, they are in the cache already, and what reads them comes next.
  for (int k = 0; k < call.sides; ++k)
    gradients += call.d_logits[k] != nullptr && call.d_logits[k] != call.logits[k];
  call.stream = gradients * call.rows * call.classes * bytes_of(call.dtype) > kStreamedBytes;
  run_rows(call, true, threads);
}

}  // namespace gist
