// What the attention kernels are given. attention_rows.cpp is compiled once for every instruction
// set; attention.cpp chooses among them and shares images and heads out to threads.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace gist {

// How queries, keys, values, outputs and their gradients are stored; arithmetic is in float.
enum class AttentionDtype : int { float32, bfloat16, float16 };

// (batch, rows, heads * head_dim); strides count elements, the last dimension is contiguous.
struct AttentionTensor {
  void *data;
  std::int64_t batch_stride, row_stride;
};

// One call, forward where d_out is null. Inputs are only read.
struct AttentionCall {
  AttentionDtype dtype;
  std::int64_t batch, heads, queries, keys, head_dim;
  double scale;
  AttentionTensor q, k, v, out;
  float *lse;  // (batch, heads, queries)
  AttentionTensor d_out, d_q, d_k, d_v;
};

// The kernels of one instruction set: one head of one image at a time.
struct AttentionKernels {
  // Floats of scratch memory, on a cache line's boundary, that `run` needs.
  std::int64_t (*scratch)(const AttentionCall &);
  void (*run)(const AttentionCall &, std::int64_t image, std::int64_t head, float *scratch);
};

extern const AttentionKernels GIST_EVERY_SET(attention_rows);

// Forward writes out and lse, backward d_q, d_k and d_v.
void attention(const AttentionCall &call, int threads);

}  // namespace gist
