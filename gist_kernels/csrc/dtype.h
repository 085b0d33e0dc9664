// The dtypes of tensors, with their codes and names in Python.
#pragma once

#include <cstdint>

namespace gist {

// int64 is for class indices, `none` for an absent tensor.
enum class Dtype : int { float32, bfloat16, float16, float64, int64, none };

static constexpr std::int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::float32 ? 4 : dtype == Dtype::float64 || dtype == Dtype::int64 ? 8 : 2;
}

// A code and its name in Python. native.cpp exports tables of them, so that Python has no copy.
template <class Code>
struct Named {
  const char *name;
  Code code;
};

constexpr Named<Dtype> kDtypes[] = {
    {"float32", Dtype::float32}, {"bfloat16", Dtype::bfloat16}, {"float16", Dtype::float16},
    {"float64", Dtype::float64}, {"int64", Dtype::int64},       {"none", Dtype::none},
};

}  // namespace gist
