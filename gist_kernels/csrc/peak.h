// Multiply-adds in registers: what the processor's arithmetic can do at most, for benchmarks.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace gist {

// Does at least `count` multiply-adds of floats, an equal part on each of `threads` threads.
void multiply_adds(std::int64_t count, int threads);

// One thread's part. The result depends on every multiply-add.
using MultiplyAdds = float(std::int64_t count);
extern MultiplyAdds GIST_EVERY_SET(peak_multiply_adds);

}  // namespace gist
