#include "engine/openblas_host.h"

#include <cblas.h>

#include <cstdlib>
#include <cstring>

// Only builds of OpenBLAS with kernels for several processors (DYNAMIC_ARCH) have these functions.
extern "C" {
[[gnu::weak]] void gotoblas_dynamic_init();
[[gnu::weak]] void gotoblas_dynamic_quit();
}

namespace baton {

namespace {

// OpenBLAS chooses its kernels by a table of processors. For an Intel processor that is not in the table it takes those
// of 2004 (Prescott), with which a BGD step of 784-1200-1200-10 takes three times as long. So the choice is made here,
// by what the processor can do, unless the user has set OPENBLAS_CORETYPE.
void choose_kernels() {
#if defined(__x86_64__)
  if (!gotoblas_dynamic_init || !gotoblas_dynamic_quit || std::getenv("OPENBLAS_CORETYPE") ||
      std::strcmp(openblas_get_corename(), "Prescott") != 0)
    return;
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!avx2) return;
  setenv("OPENBLAS_CORETYPE", avx512 ? "SkylakeX" : "Haswell", 1);
  gotoblas_dynamic_quit();
  gotoblas_dynamic_init();
  unsetenv("OPENBLAS_CORETYPE");
#endif
}

}  // namespace

void prepare_openblas() {
  [[maybe_unused]] static const bool once = (choose_kernels(), openblas_set_num_threads(1), true);
}

}  // namespace baton
