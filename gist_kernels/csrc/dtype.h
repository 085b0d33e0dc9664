// The number formats that kernels take, under the numbers Python gives them.
#pragma once

#include <cstdint>

namespace gist {

// int64 is class indices, `none` what is absent.
enum class Dtype : int { float32, bfloat16, float16, float64, int64, none };
static constexpr std::int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::float32 ? 4 : dtype == Dtype::float64 || dtype == Dtype::int64 ? 8 : 2;
}

}  // namespace gist
