// OpenBLAS's kernels are those of this processor, also where OpenBLAS does not know it.
#include <cblas.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "engine/openblas_host.h"

namespace baton::test {
namespace {

TEST(OpenBlas, UsesVectorsWhereTheProcessorHasThem) {
  prepare_openblas();
  const std::string core = openblas_get_corename();
#if defined(__x86_64__)
  if (!std::getenv("OPENBLAS_CORETYPE") && __builtin_cpu_supports("avx2")) {
    EXPECT_NE(core, "Prescott");
  }
#endif
  EXPECT_FALSE(core.empty());
  EXPECT_EQ(openblas_get_num_threads(), 1);

  // Products and factors after the change, at sizes beyond every kernel's block.
  constexpr int n = 70;
  std::vector<float> a(n * n), b(n * n), c(n * n);
  for (int i = 0; i < n * n; i++) a[i] = float(i % 7 - 3), b[i] = float(i % 5 - 2);
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, n, n, 1.f, a.data(), n, b.data(), n, 0.f, c.data(), n);
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++) {
      float want = 0;
      for (int k = 0; k < n; k++) want += a[i * n + k] * b[k * n + j];
      ASSERT_EQ(c[i * n + j], want);
    }
}

}  // namespace
}  // namespace baton::test
