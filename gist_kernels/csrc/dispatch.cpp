// The instruction sets of this build and processor, and the one in use.

#include "dispatch.h"

#include <cstring>

namespace gist {
namespace {

// Numbers that make it worth waking a thread.
constexpr std::int64_t kNumbersPerThread = 16 * 1024;

struct InstructionSet {
  const char *name;
  bool (*supported)();
};

// In the order of GIST_TABLE; the last one runs everywhere.
const InstructionSet kInstructionSets[] = {
#if defined(GIST_X86_KERNELS)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"portable", [] { return true; }},
};

int widest() {
#if defined(GIST_X86_KERNELS)
  __builtin_cpu_init();
#endif
  int set = 0;
  while (!kInstructionSets[set].supported()) ++set;
  return set;
}

int current = widest();

}  // namespace

int current_set() { return current; }

const char *instruction_set() { return kInstructionSets[current].name; }

bool use_instruction_set(const char *name) {
  int set = 0;
  for (const InstructionSet &candidate : kInstructionSets) {
    if (std::strcmp(candidate.name, name) == 0 && candidate.supported()) {
      current = set;
      return true;
    }
    ++set;
  }
  return false;
}

const char *instruction_sets(int index) {
  for (const InstructionSet &candidate : kInstructionSets) {
    if (candidate.supported() && index-- == 0) return candidate.name;
  }
  return nullptr;
}

const char *processor_vendor() {
#if defined(GIST_X86_KERNELS)
  if (__builtin_cpu_is("amd")) return "amd";
  if (__builtin_cpu_is("intel")) return "intel";
#endif
  return "other";
}

bool processor_has_avx512() { return std::strcmp(instruction_sets(0), "avx512") == 0; }

std::int64_t useful_threads(std::int64_t numbers, int threads) {
  const std::int64_t useful = numbers / kNumbersPerThread;
  return useful < 1 ? 1 : useful < threads ? useful : threads;
}

}  // namespace gist
