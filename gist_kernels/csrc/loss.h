// The loss. kernels/loss.cpp is compiled once per instruction set. loss.cpp selects one of the
// results, divides rows among threads and reduces.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "dtype.h"

namespace gist {

enum class Reduction : int { none, sum, mean };

constexpr Dtype kLossDtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16, Dtype::float64};

constexpr int kCls = 0, kGist = 1, kHeads[] = {kCls, kGist};

// The statistics of one row, enough for its gradient. A is float, or double for float64 logits.
template <class A>
struct RowStats {
  A max[2];        // of each head's logits
  A tempered[2];   // 1 / sum exp((x - max) / T)
  A plain[2];      // sum of the target / sum exp(x - max)
  A mean[2];       // of x_cls - x_gist under p and under q, maxima subtracted
  A mean_rest[2];  // what rounding took from the means
  A scale;     // LossCall::row_scale, or the row's own; 0 for an ignored row; NaN for a bad target
  A terms[4];  // cross-entropy of cls, of gist, KL(cls || gist), KL(gist || cls)
};
constexpr int kRowStats = sizeof(RowStats<float>) / sizeof(float);

// One call. Strides count elements; the last dimension is contiguous everywhere.
struct LossCall {
  std::int64_t rows, classes;
  Dtype dtype;
  const void *logits[2];
  std::int64_t logit_stride[2];

  Dtype target_dtype;  // int64 for class indices, `none` for a loss without target
  const void *target;
  std::int64_t target_stride;

  // Of the KL terms: the cls side is at `temperature`, the gist side at temperature / gist_scale.
  double temperature, gist_scale;
  double weights[4];  // in the order of RowStats::terms
  // Whether a head gets the gradient of the KL that starts from it, and of the one that ends at it.
  bool from_own[2], from_other[2];
  double label_smoothing;
  std::int64_t ignore_index;
  Reduction reduction;
  // Of type A, or null: what each row's loss is multiplied by. A row of 0 is not looked at.
  const void *row_scales;
  std::int64_t row_scales_stride;

  void *stats;  // RowStats<A>[rows]
  // Of type A: 1 and 4 numbers, or `rows` and 4 * rows for Reduction::none. Terms may be null.
  void *loss, *terms;
  const void *grad;  // upstream, of type A; null stands for 1
  std::int64_t grad_stride;
  void *d_logits[2];  // null where no gradient is wanted
  std::int64_t d_logits_stride;

  double row_scale;  // RowStats::scale of a row that is kept and has none of its own
  bool stream;       // write gradients past the cache
};

// The pass over rows [begin, end): statistics and terms, gradients, or both in turn.
enum class Pass : int { forward, backward, forward_backward };
using RowKernel = void (*)(const LossCall &, Pass, std::int64_t begin, std::int64_t end);

extern const RowKernel GIST_EVERY_SET(loss_rows);

// Writes statistics, loss and terms. Returns the first row whose class index is out of range, or
// -1. The loss of such a row is NaN.
std::int64_t loss_forward(LossCall call, int threads);
// The same. Also writes the gradients of the loss's sum into call.d_logits. If call.stats is null,
// the statistics are dropped.
std::int64_t loss_forward_backward(LossCall call, int threads);
// Writes gradients into call.d_logits. Reads call.stats, which loss_forward has written.
void loss_backward(LossCall call, int threads);

}  // namespace gist
