// The choice of an instruction set, and the division of work among threads. All families of kernels
// (loss, adapter, activation, attention) use only this file for both.
#pragma once

#include <cstdint>

#if !defined(_OPENMP)
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace gist {

// Each file of kernels is compiled once per instruction set, whose name is then GIST_SET. The file
// defines one table of functions, for example GIST_IN_SET(loss_rows).
#define GIST_JOIN_NAMES(name, set) name##_##set
#define GIST_NAME_OF(name, set) GIST_JOIN_NAMES(name, set)
#define GIST_IN_SET(name) GIST_NAME_OF(name, GIST_SET)

// The tables of all instruction sets: `Type GIST_EVERY_SET(loss_rows)` declares them, and
// GIST_TABLE(Type, loss_rows) is an array of pointers to them, indexed by current_set(). The sets
// "amx" and "portable_bf16" add matmuls of bf16 to "avx512" and "portable".
#if defined(GIST_X86_KERNELS)
#define GIST_EVERY_SET(name) name##_avx512, name##_avx2, name##_portable
#define GIST_TABLE(Type, name) \
  {&name##_avx512, &name##_avx512, &name##_avx2, &name##_portable, &name##_portable}
#else
#define GIST_EVERY_SET(name) name##_portable
#define GIST_TABLE(Type, name) {&name##_portable, &name##_portable}
#endif

// The same for kernels of bf16 numbers whose matmuls add up in float: null for other sets.
#if defined(GIST_X86_KERNELS) && defined(GIST_AMX_KERNELS)
#define GIST_EVERY_BF16_SET(name) name##_amx, name##_portable
#define GIST_BF16_TABLE(Type, name) {&name##_amx, nullptr, nullptr, nullptr, &name##_portable}
#elif defined(GIST_X86_KERNELS)
#define GIST_EVERY_BF16_SET(name) name##_portable
#define GIST_BF16_TABLE(Type, name) {nullptr, nullptr, nullptr, nullptr, &name##_portable}
#else
#define GIST_EVERY_BF16_SET(name) name##_portable
#define GIST_BF16_TABLE(Type, name) {nullptr, &name##_portable}
#endif

// The index into a GIST_TABLE of the instruction set in use. By default that is the widest one that
// this build and this processor have.
int current_set();
// The name of the instruction set in use: "amx", "avx512", "avx2", "portable", or "portable_bf16",
// which is for tests and never the default.
const char *instruction_set();
// Selects an instruction set. Returns false if this build or this processor does not have it.
bool use_instruction_set(const char *name);
// The names of the available instruction sets, the default first; nullptr beyond the last.
const char *instruction_sets(int index);

// The processor's maker, "amd" or "intel", or "other".
const char *processor_vendor();
// Whether the processor has AVX-512, whichever instruction set is in use.
bool processor_has_avx512();

// How many of `threads` threads a tensor of this many numbers keeps busy; at least 1.
std::int64_t useful_threads(std::int64_t numbers, int threads);
// Numbers in a part that one thread takes at a time: enough for the processor to read far ahead.
constexpr std::int64_t kNumbersPerPart = 32 * 1024;

// Calls body(part) for 0 <= part < parts, in any order, on `team` threads including the caller's.
template <class Body>
void parallel_for(std::int64_t parts, std::int64_t team, const Body &body) {
  if (team > parts) team = parts;
  if (team < 2) {
    for (std::int64_t part = 0; part < parts; ++part) body(part);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel for num_threads(int(team)) schedule(dynamic)
  for (std::int64_t part = 0; part < parts; ++part) body(part);
#else
  std::atomic<std::int64_t> next{0};
  const auto work = [&] {
    for (std::int64_t part; (part = next.fetch_add(1)) < parts;) body(part);
  };
  std::vector<std::thread> helpers;
  for (std::int64_t i = 1; i < team; ++i) helpers.emplace_back(work);
  work();
  for (std::thread &helper : helpers) helper.join();
#endif
}

}  // namespace gist
