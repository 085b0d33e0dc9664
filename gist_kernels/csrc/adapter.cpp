// LayerNorm and the adapter over a batch: packing of weights, division among threads, reductions.

#include "adapter.h"

#include <atomic>
#include <cstring>
#include <memory>

#include "dispatch.h"

namespace gist {
namespace {

using std::int64_t;

constexpr const AdapterKernels *kKernels[] = GIST_TABLE(AdapterKernels, adapter_rows);

// Rows per part of the backward pass. Each part has sums of its own; larger sums are shared by more
// rows. The number of parts and their total bytes are bounded.
constexpr int64_t kRowsPerSum = 64, kRowsPerLargeSum = 128;
constexpr int64_t kMostSums = 64, kLeastSums = 8, kSumBytes = 16 << 20;
// From this rank on, the weights fill a cache level. More rows then use them while they are there.
constexpr int64_t kLargeRank = 17, kRowsOfLargeGroup = 16;

AdapterLayout layout_of(const AdapterCall &call) {
  AdapterLayout layout;
  layout.group = call.rank < kLargeRank ? kRowBlock : kRowsOfLargeGroup;
  // One block more: rows of 1024 numbers would compete for the same cache sets.
  layout.stride = rounded_up(call.width, kPaddedWidth) + kPaddedWidth;
  layout.ranks = rounded_up(call.rank, kRankBlock);
  return layout;
}

// Uninitialised memory for a call's numbers, aligned to cache lines. It is allocated before threads
// start, so that the caller's thread gets the exception if memory runs out.
template <class A>
class Memory {
 public:
  explicit Memory(int64_t size) : bytes_(new char[std::size_t(size) * sizeof(A) + kLine]) {
    const auto address = reinterpret_cast<std::uintptr_t>(bytes_.get());
    next_ = reinterpret_cast<A *>((address + kLine - 1) / kLine * kLine);
  }

  A *take(int64_t size) {
    A *const taken = next_;
    next_ += size;
    return taken;
  }

 private:
  static constexpr std::size_t kLine = 64;
  std::unique_ptr<char[]> bytes_;
  A *next_;
};

// Copies `n` numbers, or `missing` n times if `from` is null, and pads with zeros up to `padded`.
template <class A>
const A *pack_row(const void *from, A missing, int64_t n, int64_t padded, A *to) {
  const A *const numbers = static_cast<const A *>(from);
  for (int64_t j = 0; j < padded; ++j)
    to[j] = j >= n ? A(0) : numbers == nullptr ? missing : numbers[j];
  return to;
}

int64_t packed_size(const AdapterLayout &layout) {
  return (2 * layout.ranks + 3) * layout.stride + rounded_up(layout.ranks, kPaddedWidth);
}

template <class A>
PackedWeights pack(const AdapterCall &call, const AdapterLayout &layout, Memory<A> &memory) {
  const int64_t width = call.width, rank = call.rank, stride = layout.stride;
  PackedWeights packed = {};
  const auto row = [&] { return memory.take(stride); };
  if (call.has_norm) {
    packed.norm_weight = pack_row(call.norm_weight, A(1), width, stride, row());
    packed.norm_bias = pack_row(call.norm_bias, A(0), width, stride, row());
  }
  if (rank == 0) return packed;

  A *const constant = row();
  pack_row(call.up_bias, A(0), width, stride, constant);
  for (int64_t j = 0; j < width; ++j) {
    constant[j] *= A(call.scale);
    if (call.bias != nullptr) constant[j] += static_cast<const A *>(call.bias)[j];
  }
  packed.constant = constant;
  A *const down = memory.take(layout.ranks * stride);
  A *const up = memory.take(layout.ranks * stride);
  const A *const from_down = static_cast<const A *>(call.down_weight);
  const A *const from_up = static_cast<const A *>(call.up_weight);
  for (int64_t k = 0; k < layout.ranks; ++k) {
    const bool here = k < rank;
    pack_row(here ? from_down + k * width : nullptr, A(0), width, stride, down + k * stride);
    if (!here) std::memset(up + k * stride, 0, std::size_t(stride) * sizeof(A));
  }
  for (int64_t j = 0; j < stride; ++j)
    for (int64_t k = 0; k < rank; ++k)
      up[k * stride + j] = j < width ? A(call.scale) * from_up[j * rank + k] : A(0);
  packed.down = down;
  packed.up = up;
  packed.down_bias = pack_row(call.down_bias, A(0), rank, layout.ranks,
                              memory.take(rounded_up(layout.ranks, kPaddedWidth)));
  return packed;
}

int64_t team_for(const AdapterCall &call, int threads) {
  return useful_threads(call.rows * call.width * (1 + call.rank / 4), threads);
}

// Calls body(part, scratch) for each part, with the scratch memory of the thread.
template <class A, class Body>
void for_each_part(int64_t parts, int64_t team, A *scratch, int64_t size, const Body &body) {
  if (team > parts) team = parts;
  std::atomic<int64_t> next{0};
  parallel_for(team, team, [&](int64_t member) {
    for (int64_t part; (part = next.fetch_add(1)) < parts;) body(part, scratch + member * size);
  });
}

template <class A>
void forward(const AdapterCall &call, int threads) {
  const AdapterLayout layout = layout_of(call);
  const int64_t team = team_for(call, threads);
  const int64_t size = rounded_up(scratch_size(layout), kPaddedWidth);
  Memory<A> memory(packed_size(layout) + team * size);
  const PackedWeights packed = pack(call, layout, memory);
  const auto kernel = kKernels[current_set()]->forward;
  const int64_t rows = rounded_up((kNumbersPerPart + call.width - 1) / call.width, layout.group);
  const int64_t parts = (call.rows + rows - 1) / rows;
  for_each_part(parts, team, memory.take(team * size), size, [&](int64_t part, A *scratch) {
    const int64_t begin = part * rows, end = begin + rows;
    kernel(call, layout, packed, scratch, begin, end < call.rows ? end : call.rows);
  });
}

// The sums of one part of the rows, in one piece of memory.
template <class A>
struct Sums {
  const AdapterLayout &layout;

  int64_t size() const {
    return (2 * layout.ranks + 1) * layout.stride + rounded_up(layout.ranks, kPaddedWidth);
  }
  PartialGradients at(A *sums) const {
    const int64_t weights = layout.ranks * layout.stride;
    return {sums, sums + weights, sums + 2 * weights, sums + 2 * weights + layout.stride};
  }
};

// Rows per part. They depend only on the shapes, so no sum depends on the number of threads.
int64_t rows_per_sum(const AdapterCall &call, int64_t bytes) {
  const int64_t wanted = call.rank < kLargeRank ? kRowsPerSum : kRowsPerLargeSum;
  int64_t most = kSumBytes / bytes;
  most = most < kLeastSums ? kLeastSums : most > kMostSums ? kMostSums : most;
  const int64_t parts = (call.rows + wanted - 1) / wanted;
  if (parts == 0) return wanted;
  if (parts < most) most = parts;
  return rounded_up((call.rows + most - 1) / most, kRowBlock);
}

// to[j * step] = scale * the sum of from[j] over the parts, in their order.
template <class A>
void add_parts(const A *from, int64_t parts, int64_t size, int64_t n, double scale, void *to,
               int64_t step) {
  if (to == nullptr) return;
  constexpr int64_t run = 256;
  for (int64_t begin = 0; begin < n; begin += run) {
    const int64_t count = n - begin < run ? n - begin : run;
    double totals[run] = {};
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t j = 0; j < count; ++j) totals[j] += double(from[part * size + begin + j]);
    for (int64_t j = 0; j < count; ++j)
      static_cast<A *>(to)[(begin + j) * step] = A(scale * totals[j]);
  }
}

template <class A>
void backward(const AdapterCall &call, int threads) {
  const AdapterLayout layout = layout_of(call);
  const Sums<A> sums = {layout};
  const int64_t size = rounded_up(scratch_size(layout), kPaddedWidth);
  const int64_t rows = rows_per_sum(call, sums.size() * int64_t(sizeof(A)));
  const int64_t parts = (call.rows + rows - 1) / rows, team = team_for(call, threads);
  const bool adapter = call.rank > 0;
  Memory<A> memory(packed_size(layout) + team * size + (adapter ? parts * sums.size() : 0));
  const PackedWeights packed = pack(call, layout, memory);
  A *const partial = memory.take(adapter ? parts * sums.size() : 0);
  const auto kernel = kKernels[current_set()]->backward;
  for_each_part(parts, team, memory.take(team * size), size, [&](int64_t part, A *scratch) {
    PartialGradients gradients = {};
    if (adapter) {
      A *const own = partial + part * sums.size();
      std::memset(own, 0, std::size_t(sums.size()) * sizeof(A));
      gradients = sums.at(own);
    }
    const int64_t begin = part * rows, end = begin + rows;
    kernel(call, layout, packed, scratch, gradients, begin, end < call.rows ? end : call.rows);
  });
  if (!adapter) return;

  const PartialGradients first = sums.at(partial);
  const auto add = [&](const void *from, int64_t n, double scale, void *to, int64_t step) {
    add_parts(static_cast<const A *>(from), parts, sums.size(), n, scale, to, step);
  };
  A *const d_down = static_cast<A *>(call.d_down_weight);
  A *const d_up = static_cast<A *>(call.d_up_weight);
  parallel_for(call.rank, useful_threads(parts * call.rank * call.width, threads), [&](int64_t k) {
    const int64_t row = k * layout.stride;
    add(static_cast<const A *>(first.down) + row, call.width, 1, d_down + k * call.width, 1);
    add(static_cast<const A *>(first.up) + row, call.width, call.scale, d_up + k, call.rank);
  });
  add(first.dz, call.rank, 1, call.d_down_bias, 1);
  add(first.d_out, call.width, call.scale, call.d_up_bias, 1);
}

}  // namespace

void adapter_forward(const AdapterCall &call, int threads) {
  call.dtype == Dtype::float64 ? forward<double>(call, threads) : forward<float>(call, threads);
}

void adapter_backward(const AdapterCall &call, int threads) {
  call.dtype == Dtype::float64 ? backward<double>(call, threads) : backward<float>(call, threads);
}

}  // namespace gist
