// Multi-head attention. kernels/attention.cpp is compiled once per instruction set, and
// kernels/attention_bf16.cpp once for each that multiplies bf16. attention.cpp selects one of the
// results and divides images and heads among threads.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "dtype.h"

namespace gist {

// The dtypes of queries, keys, values, outputs and their gradients; arithmetic is in float.
constexpr Dtype kAttentionDtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};

// (batch, rows, heads * head_dim); strides count elements, the last dimension is contiguous.
struct AttentionTensor {
  void *data;
  std::int64_t batch_stride, row_stride;
};

// Rotary positions: tokens start to start + rows - 1 of queries and keys are multiplied by cos, and
// the other feature of each pair by sin, with a minus for a pair's first. The transpose goes onto
// their gradients. Pairs are the features j and j + head_dim / 2 (half), or 2 j and 2 j + 1.
struct AttentionRotation {
  const float *sin;  // (rows, head_dim) or (heads, rows, head_dim), contiguous; null for none
  const float *cos;
  std::int64_t start, rows;
  bool per_head, half;
};

// One forward or backward call. Inputs are only read.
struct AttentionCall {
  Dtype dtype;
  std::int64_t batch, heads, queries, keys, head_dim;
  double scale;
  AttentionTensor q, k, v;
  AttentionRotation rotation;
  // (batch), 1 to keys: the tokens of each image. What lies beyond is not read; what is written
  // there is 0. Null if every image has all of them.
  const std::int64_t *lengths;
  AttentionTensor out;  // forward only
  float *lse;           // (batch, heads, queries): forward writes it, backward reads it
  AttentionTensor d_out, d_q, d_k, d_v;  // backward only
};

enum class Direction : int { forward, backward };

// The queries and keys that an image has, at most those of the call.
struct AttentionSizes {
  std::int64_t queries, keys;
};

// The kernels of one instruction set: one head of one image at a time.
struct AttentionKernels {
  // The size of the scratch memory of `run`, in floats. It must start on a cache line.
  std::int64_t (*scratch)(const AttentionCall &, Direction, AttentionSizes);
  void (*run)(const AttentionCall &, Direction, AttentionSizes, std::int64_t image,
              std::int64_t head, float *scratch);
};

extern const AttentionKernels GIST_EVERY_SET(attention_rows);
// For bf16, where the instruction set has matmuls of it.
extern const AttentionKernels GIST_EVERY_BF16_SET(attention_bf16_rows);

// Writes call.out and call.lse.
void attention_forward(const AttentionCall &call, int threads);
// Writes call.d_q, call.d_k and call.d_v. Reads call.lse, which attention_forward has written.
void attention_backward(const AttentionCall &call, int threads);

}  // namespace gist
