// Multiply-adds in registers: choice of instruction set, number of threads.

#include "peak.h"

#include <atomic>

namespace gist {
namespace {

constexpr MultiplyAdds *kKernels[] = GIST_TABLE(MultiplyAdds, peak_multiply_adds);

}  // namespace

void multiply_adds(std::int64_t count, int threads) {
  const std::int64_t team = threads < 1 ? 1 : threads;
  std::atomic<float> result;
  parallel_for(team, team, [&](std::int64_t) {
    result.store(kKernels[current_set()]((count + team - 1) / team), std::memory_order_relaxed);
  });
}

}  // namespace gist
