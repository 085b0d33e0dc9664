// The Jensen-Shannon divergence of several distributions. kernels/divergence.cpp is compiled once
// for each instruction set; divergence.cpp chooses among them and shares rows out to threads.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "dtype.h"

namespace gist {

constexpr Dtype kDivergenceDtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16,
                                       Dtype::float64};
constexpr int kMostSides = 8;

// One side's statistics of a row, all that the gradient needs; A is float, or double for float64.
template <class A>
struct SideStats {
  A max;          // of the logits
  A inverse_sum;  // 1 / sum exp((x - max) / T)
  A log_sum;      // log of that sum
  A shift;        // log of that sum over the first side's
  A mean;         // KL(p_k || m), as the mean of log p_k / m under p_k
};
constexpr int kSideStats = sizeof(SideStats<float>) / sizeof(float);

// One call. Strides count elements; the last dimension is contiguous everywhere.
struct DivergenceCall {
  std::int64_t rows, classes;
  Dtype dtype;
  int sides;
  const void *logits[kMostSides];
  std::int64_t logit_stride[kMostSides];
  double weights[kMostSides], temperatures[kMostSides];

  // Of type A, or null: what each row's divergence is multiplied by. A row of 0 is not looked at.
  const void *row_scales;
  std::int64_t row_scales_stride;

  void *stats;       // SideStats<A>[rows][sides]
  void *loss;        // A[rows]
  const void *grad;  // upstream, A[rows] of any stride
  std::int64_t grad_stride;
  void *d_logits[kMostSides];  // (rows, classes), contiguous; null where no gradient is wanted
  bool stream;                 // write gradients past the cache
};

using DivergenceKernel = void (*)(const DivergenceCall &, bool backward, std::int64_t begin,
                                  std::int64_t end);
extern const DivergenceKernel GIST_EVERY_SET(divergence_rows);

// Writes statistics and each row's divergence.
void divergence_forward(const DivergenceCall &call, int threads);
// Writes the gradients that call.d_logits asks for, from what divergence_forward left in
// call.stats.
void divergence_backward(DivergenceCall call, int threads);

}  // namespace gist
