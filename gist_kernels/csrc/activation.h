// The element-wise activation, plain and gated, and its gradient. kernels/activation.cpp is
// compiled once per instruction set. activation.cpp selects one of the results and divides numbers
// among threads.
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

// The same of a gated activation. `u` has rows of 2 * width numbers, `width` gates before as many
// values. `size` counts the results, act(gate) * value.
struct GatedCall : ActivationCall {
  std::int64_t width;
};

// Writes act(u) into call.result.
void activation_forward(const ActivationCall &call, int threads);
// Writes d_a * act'(u) into call.result.
void activation_backward(const ActivationCall &call, int threads);

// Writes act(gate) * value into call.result.
void gated_forward(const GatedCall &call, int threads);
// Writes d_a * value * act'(gate) and d_a * act(gate) into call.result, which is shaped as u.
void gated_backward(const GatedCall &call, int threads);

// The kernels of one instruction set, on numbers [begin, end).
struct ActivationKernels {
  void (*forward)(const ActivationCall &, std::int64_t begin, std::int64_t end);
  void (*backward)(const ActivationCall &, std::int64_t begin, std::int64_t end);
  void (*gated_forward)(const GatedCall &, std::int64_t begin, std::int64_t end);
  void (*gated_backward)(const GatedCall &, std::int64_t begin, std::int64_t end);
};
extern const ActivationKernels GIST_EVERY_SET(activation_rows);

}  // namespace gist
