// The element-wise activation and its gradient. kernels/activation.cpp is compiled once per
// instruction set. activation.cpp selects one of the results and divides numbers among threads.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "dtype.h"

namespace gist {

enum class Activation : int { gelu, gelu_tanh, identity, relu, silu };

constexpr Named<Activation> kActivations[] = {
    {"gelu", Activation::gelu},         {"gelu_tanh", Activation::gelu_tanh},
    {"identity", Activation::identity}, {"relu", Activation::relu},
    {"silu", Activation::silu},
};

constexpr Dtype kActivationDtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16,
                                       Dtype::float64};

// One forward or backward call on contiguous tensors of `size` numbers of dtype.
struct ActivationCall {
  std::int64_t size;
  Dtype dtype;
  Activation activation;
  const void *u;
  const void *d_a;  // the gradient of act(u); backward only
  void *result;     // act(u), or d_a * act'(u); may be d_a
};

// Writes act(u) into call.result.
void activation_forward(const ActivationCall &call, int threads);
// Writes d_a * act'(u) into call.result.
void activation_backward(const ActivationCall &call, int threads);

// The kernels of one instruction set, on numbers [begin, end).
struct ActivationKernels {
  void (*forward)(const ActivationCall &, std::int64_t begin, std::int64_t end);
  void (*backward)(const ActivationCall &, std::int64_t begin, std::int64_t end);
};
extern const ActivationKernels GIST_EVERY_SET(activation_rows);

}  // namespace gist
