// Attention over a batch: choice of kernels, number of threads, scratch memory.

#include "attention.h"

#include <atomic>
#include <cstddef>
#include <vector>

#include "dispatch.h"

namespace gist {
namespace {

using std::int64_t;

constexpr const AttentionKernels *kKernels[] = GIST_TABLE(AttentionKernels, attention_rows);

// Multiplications that make it worth waking a thread.
constexpr int64_t kProductsPerThread = 256 * 1024;
constexpr int64_t kLineFloats = 64 / sizeof(float);

void run(const AttentionCall &call, Direction direction, int threads) {
  const AttentionKernels &kernels = *kKernels[current_set()];
  const int64_t tasks = call.batch * call.heads;
  const int64_t useful = tasks * call.queries * call.keys * call.head_dim / kProductsPerThread;
  int64_t team = threads < useful ? threads : useful;
  if (team > tasks) team = tasks;
  if (team < 1) team = 1;

  // Kept from call to call: new pages would take a good part of the kernels' own time. The caller's
  // thread allocates, so that the caller gets the exception if memory runs out.
  thread_local std::vector<float> memory;
  const int64_t size =
      (kernels.scratch(call, direction) + kLineFloats - 1) / kLineFloats * kLineFloats;
  const std::size_t needed = std::size_t(team * size + kLineFloats);
  if (memory.size() < needed) {
    memory = {};
    memory.resize(needed);
  }
  const std::uintptr_t past = reinterpret_cast<std::uintptr_t>(memory.data()) % 64;
  float *const scratch = memory.data() + (64 - past) % 64 / sizeof(float);

  // Any thread may take any task, the next as soon as it is free.
  std::atomic<int64_t> next{0};
  parallel_for(team, team, [&](int64_t member) {
    for (int64_t task; (task = next.fetch_add(1)) < tasks;)
      kernels.run(call, direction, task / call.heads, task % call.heads, scratch + member * size);
  });
}

}  // namespace

void attention_forward(const AttentionCall &call, int threads) {
  run(call, Direction::forward, threads);
}

void attention_backward(const AttentionCall &call, int threads) {
  run(call, Direction::backward, threads);
}

}  // namespace gist
