// Attention over a batch: choice of kernels, lengths, number of threads, scratch memory.

#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <numeric>
#include <vector>

#include "dispatch.h"

namespace gist {
namespace {

using std::int64_t;

constexpr const AttentionKernels *kKernels[] = GIST_TABLE(AttentionKernels, attention_rows);
constexpr const AttentionKernels *kBf16Kernels[] =
    GIST_BF16_TABLE(AttentionKernels, attention_bf16_rows);

const AttentionKernels &kernels_of(Dtype dtype) {
  const AttentionKernels *const bf16 = kBf16Kernels[current_set()];
  return dtype == Dtype::bfloat16 && bf16 != nullptr ? *bf16 : *kKernels[current_set()];
}

// Multiplications that make it worth waking a thread.
constexpr int64_t kProductsPerThread = 256 * 1024;
constexpr int64_t kLineFloats = 64 / sizeof(float);

// What an image has of the call's queries and keys.
AttentionSizes sizes_of(const AttentionCall &call, int64_t image) {
  if (call.lengths == nullptr) return {call.queries, call.keys};
  const int64_t length = call.lengths[image];
  return {std::min(call.queries, length), length};
}

// The order in which threads take the images; empty where all are of one length. A long one that
// came last would leave the other threads idle.
std::vector<int64_t> longest_first(const AttentionCall &call) {
  if (call.lengths == nullptr) return {};
  std::vector<int64_t> order(std::size_t(call.batch));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return call.lengths[a] > call.lengths[b]; });
  return order;
}

// Writes 0 to a head's columns, from row `first` of `rows` on. In every dtype 0 is zero bytes.
void clear(const AttentionCall &call, const AttentionTensor &tensor, int64_t image, int64_t head,
           int64_t first, int64_t rows) {
  const int64_t bytes = bytes_of(call.dtype);
  for (int64_t row = first; row < rows; ++row) {
    const int64_t at = image * tensor.batch_stride + row * tensor.row_stride + head * call.head_dim;
    std::memset(static_cast<char *>(tensor.data) + at * bytes, 0,
                std::size_t(call.head_dim * bytes));
  }
}

// Writes 0 to whatever of a head's results lies beyond the image's own queries and keys.
void clear_padding(const AttentionCall &call, Direction direction, AttentionSizes sizes,
                   int64_t image, int64_t head) {
  if (direction == Direction::forward) {
    clear(call, call.out, image, head, sizes.queries, call.queries);
    float *const lse = call.lse + (image * call.heads + head) * call.queries;
    std::fill(lse + sizes.queries, lse + call.queries, 0.0f);
    return;
  }
  clear(call, call.d_q, image, head, sizes.queries, call.queries);
  clear(call, call.d_k, image, head, sizes.keys, call.keys);
  clear(call, call.d_v, image, head, sizes.keys, call.keys);
}

void run(const AttentionCall &call, Direction direction, int threads) {
  const AttentionKernels &kernels = kernels_of(call.dtype);
  const int64_t tasks = call.batch * call.heads;
  const std::vector<int64_t> order = longest_first(call);
  int64_t size = 0, scores = 0;
  const auto count = [&](AttentionSizes sizes, int64_t images) {
    size = std::max(size, kernels.scratch(call, direction, sizes));
    scores += images * call.heads * sizes.queries * sizes.keys;
  };
  if (call.lengths == nullptr) count({call.queries, call.keys}, call.batch);
  for (int64_t image : order) count(sizes_of(call, image), 1);
  const int64_t useful = scores * call.head_dim / kProductsPerThread;
  int64_t team = threads < useful ? threads : useful;
  if (team > tasks) team = tasks;
  if (team < 1) team = 1;

  // Kept from call to call: new pages would take a good part of the kernels' own time. The caller's
  // thread allocates, so that the caller gets the exception if memory runs out.
  thread_local std::vector<float> memory;
  size = (size + kLineFloats - 1) / kLineFloats * kLineFloats;
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
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
      const int64_t place = task / call.heads, head = task % call.heads;
      const int64_t image = order.empty() ? place : order[std::size_t(place)];
      const AttentionSizes sizes = sizes_of(call, image);
      kernels.run(call, direction, sizes, image, head, scratch + member * size);
      if (call.lengths != nullptr) clear_padding(call, direction, sizes, image, head);
    }
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
