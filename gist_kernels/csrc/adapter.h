// LayerNorm and the adapter. kernels/adapter.cpp is compiled once per instruction set. adapter.cpp
// selects one of the results, packs weights, divides rows among threads and reduces.
#pragma once

#include <cstdint>

#include "activation.h"
#include "dispatch.h"
#include "dtype.h"

namespace gist {

constexpr Dtype kAdapterDtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16,
                                    Dtype::float64};

// One forward or backward call on (rows, width) tensors. Absent tensors are null. Strides count
// elements from row to row; the last dimension is contiguous. Written tensors are contiguous. A is
// float, or double for float64 tensors.
struct AdapterCall {
  std::int64_t rows, width;
  std::int64_t rank;  // 0 without adapter
  Dtype dtype;
  Activation activation;
  bool has_norm;  // forward: normalise; backward: d_normed is given
  double eps, scale;

  const void *x, *add, *d_out, *d_normed;  // of dtype
  std::int64_t x_stride, add_stride, d_out_stride, d_normed_stride;
  void *normed, *out, *dx;  // of dtype
  bool pass_through;        // dx includes d_out

  void *stats;  // A (rows, 2): mean and 1 / standard deviation
  void *z;      // A (rows, rank)
  // Of type A, contiguous: (width), (rank, width) and (rank) down, (width, rank) and (width) up.
  // Backward reads only norm_weight, down_weight and up_weight.
  const void *norm_weight, *norm_bias, *bias, *down_weight, *down_bias, *up_weight, *up_bias;
  void *d_down_weight, *d_down_bias, *d_up_weight, *d_up_bias;
};

// With call.has_norm, writes call.normed and call.stats. With an adapter, writes call.out and
// call.z.
void adapter_forward(const AdapterCall &call, int threads);
// Writes call.dx unless null and, with an adapter, the gradients of its weights.
void adapter_backward(const AdapterCall &call, int threads);

// Blocks of ranks and of rows. The vectors of every instruction set divide kPaddedWidth.
constexpr std::int64_t kRankBlock = 4, kRowBlock = 4, kPaddedWidth = 16;
static constexpr std::int64_t rounded_up(std::int64_t n, std::int64_t to) {
  return (n + to - 1) / to * to;
}

// The layout of the arrays that row kernels work on. They hold numbers of type A, padded with 0.
struct AdapterLayout {
  std::int64_t group;   // rows that a kernel keeps in cache together
  std::int64_t stride;  // from one row of `width` numbers to the next
  std::int64_t ranks;   // rank, rounded up to whole blocks
};

// down and scale * up^T are (ranks, stride), down_bias is (ranks), the others are (stride).
struct PackedWeights {
  const void *down, *up, *down_bias;
  const void *constant;  // bias + scale * up_bias
  const void *norm_weight, *norm_bias;
};

// Sums over a part of the rows: d_down and d_up^T without scale, both (ranks, stride), d_out
// (stride) and dz (ranks).
struct PartialGradients {
  void *down, *up, *d_out, *dz;
};

struct AdapterKernels {
  // Rows [begin, end). `scratch` has scratch_size() numbers.
  void (*forward)(const AdapterCall &, const AdapterLayout &, const PackedWeights &, void *scratch,
                  std::int64_t begin, std::int64_t end);
  // With an adapter, adds to `sums`.
  void (*backward)(const AdapterCall &, const AdapterLayout &, const PackedWeights &, void *scratch,
                   const PartialGradients &sums, std::int64_t begin, std::int64_t end);
};
extern const AdapterKernels GIST_EVERY_SET(adapter_rows);

static constexpr std::int64_t scratch_size(const AdapterLayout &layout) {
  return layout.group * (3 * layout.stride + 3 * layout.ranks);
}

}  // namespace gist
