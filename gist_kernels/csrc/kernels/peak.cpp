// Multiply-adds in registers. CMakeLists.txt compiles this file once per instruction set, which
// defines GIST_IN_SET(peak_multiply_adds). Everything else has internal linkage (see simd.h).

#include "peak.h"

#include "storage.h"

namespace gist {

// Twelve sums: two units with a latency of four or five cycles need eight to ten.
float GIST_IN_SET(peak_multiply_adds)(std::int64_t count) {
  constexpr int kSums = 12;
  Floats sum[kSums];
  for (int i = 0; i < kSums; ++i) sum[i] = broadcast(float(i));
  // Volatile, so that the compiler can't compute the sums itself. They stay near 1: normal numbers.
  volatile float half = 0.5f;
  const Floats factor = broadcast(float(half)), addend = broadcast(float(half));
  for (std::int64_t done = 0; done < count; done += kSums * kLanes<float>) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) sum[i] = fma(sum[i], factor, addend);
  }
  for (int i = 1; i < kSums; ++i) sum[0] += sum[i];
  return sum[0][0];
}

}  // namespace gist
