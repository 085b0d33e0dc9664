// The native module of gist_kernels: what this processor can run, and with how many threads.
// It links against neither torch nor Python's numeric packages.

#include <nanobind/nanobind.h>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace nb = nanobind;

namespace {

// The widest vector instruction set that both this build and this processor support.
const char *instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "portable";
}

int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "CPU side of gist_kernels, independent of torch.";
  m.def("instruction_set", &instruction_set,
        "The vector instruction set kernels use here: 'avx512', 'avx2' or 'portable'.");
  m.def("max_threads", &max_threads,
        "Threads an OpenMP region would use: torch.get_num_threads() once torch is loaded.");
}
