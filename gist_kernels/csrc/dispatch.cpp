// The instruction sets of this build and processor, and the one in use.

#include "dispatch.h"

#include <cstring>

#if defined(GIST_X86_KERNELS)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace gist {
namespace {

// Numbers that make it worth waking a thread.
constexpr std::int64_t kNumbersPerThread = 16 * 1024;

struct InstructionSet {
  const char *name;
  bool (*supported)();
};

#if defined(GIST_X86_KERNELS)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// Linux keeps the tiles of a process that has asked for them.
bool has_amx() {
#if defined(GIST_AMX_KERNELS) && defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;
  constexpr unsigned bf16 = 1u << 22, tiles = 1u << 24;
  unsigned a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tiles) &&
         __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1) &&  // AVX512_BF16
         syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

// In the order of GIST_TABLE.
const InstructionSet kInstructionSets[] = {
#if defined(GIST_X86_KERNELS)
    {"amx", has_amx},
    {"avx512", has_avx512},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"portable", [] { return true; }},
    {"portable_bf16", [] { return true; }},
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

bool processor_has_avx512() {
#if defined(GIST_X86_KERNELS)
  return has_avx512();
#else
  return false;
#endif
}

std::int64_t useful_threads(std::int64_t numbers, int threads) {
  const std::int64_t useful = numbers / kNumbersPerThread;
  return useful < 1 ? 1 : useful < threads ? useful : threads;
}

}  // namespace gist
