// Which instruction set kernels use here, and how work is shared out to threads. Every family of
// kernels (loss, adapter, activation, attention) goes through this file alone.
#pragma once

#include <cstdint>

#if !defined(_OPENMP)
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace gist {

// A file of kernels is compiled once for each instruction set, with GIST_SET as its name, and
// defines one table of functions, GIST_IN_SET(loss_rows) say.
#define GIST_JOIN_NAMES(name, set) name##_##set
#define GIST_NAME_OF(name, set) GIST_JOIN_NAMES(name, set)
#define GIST_IN_SET(name) GIST_NAME_OF(name, GIST_SET)

// The same kernels of every instruction set, widest first: `Type GIST_EVERY_SET(loss_rows)`
// declares them and GIST_TABLE(Type, loss_rows) is an array of pointers to them.
#if defined(GIST_X86_KERNELS)
#define GIST_EVERY_SET(name) name##_avx512, name##_avx2, name##_portable
#define GIST_TABLE(Type, name) {&name##_avx512, &name##_avx2, &name##_portable}
#else
#define GIST_EVERY_SET(name) name##_portable
#define GIST_TABLE(Type, name) {&name##_portable}
#endif

// Index of the instruction set in use, into a GIST_TABLE: the widest that this build and this
// processor have.
int current_set();
// Its name: "avx512", "avx2" or "portable".
const char *instruction_set();
// Takes another one. False if there is none of that name here.
bool use_instruction_set(const char *name);
// Names of those that are here, widest first; nullptr past the last.
const char *instruction_sets(int index);

// How many of `threads` threads a tensor of so many numbers keeps busy; at least 1.
std::int64_t useful_threads(std::int64_t numbers, int threads);
// Numbers of a part that one thread takes at a time: enough for a processor to read far ahead.
constexpr std::int64_t kNumbersPerPart = 32 * 1024;

// Calls body(part) for 0 <= part < parts on `team` threads, the caller's among them, in any order.
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
