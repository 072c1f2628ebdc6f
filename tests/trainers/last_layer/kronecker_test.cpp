// The Kronecker approximation of a last layer's posterior, against golden values and against the exact one.
#include "trainers/last_layer/kronecker.h"

#include "tests/trainers/last_layer/exact_fixture.h"

namespace baton::test {
namespace {

TEST(KroneckerLastLayer, Digits) {
  BATON_NEEDS_DEVICE();
  const Npz z = golden("digits_kron_base100"), predict = golden("digits_predict_base100");
  const Doubles w = golden("digits_map_base100").f64("W_map");
  Rows rows(digits("base100"));
  Device& device = rows.device();
  const KroneckerLastLayer plain(device, rows, digit_classes, w, 1), damped(device, rows, digit_classes, w, 1, true);
  EXPECT_TRUE(within(plain.factor_a(), z.f64("A"), one_shot));
  EXPECT_TRUE(within(plain.factor_b(), z.f64("B"), one_shot));
  EXPECT_TRUE(within(plain.log_determinant(), z.scalar("kron_logdet_prec"), one_shot));
  EXPECT_TRUE(within(damped.log_determinant(), z.scalar("kron_damped_logdet_prec"), one_shot));
  const Doubles phi = predict.f64("Phi"), v = plain.logit_covariances(phi, 50);
  EXPECT_TRUE(within(v, z.f64("kron_f_var"), one_shot));
  EXPECT_TRUE(within(damped.logit_covariances(phi, 50), z.f64("kron_damped_f_var"), one_shot));

  Memory memory;
  Buffer<double> f(memory, predict.f64("f_mu")), variance(memory, v), p(memory, 500);
  link_probabilities<double>({p, nullptr, nullptr, f, variance, nullptr, nullptr, true}, Link::probit, 0, 0, 50,
                             digit_classes, memory.stream());
  EXPECT_TRUE(within(p.host(), z.f64("p_probit"), one_shot));

  ExactLastLayer layer(device, digit_dim, digit_classes, 1);
  layer.fit_covariance(rows, w);
  const Doubles h = layer.curvature(), a = plain.factor_a(), b = plain.factor_b();
  double error = 0;
  for (int i = 0; i < digit_weights; i++)
    for (int j = 0; j < digit_weights; j++) {
      const double product =
          b[i / digit_dim * digit_classes + j / digit_dim] * a[size_t(i % digit_dim) * digit_dim + j % digit_dim];
      error += std::pow(product - h[size_t(i) * digit_weights + j], 2);
    }
  EXPECT_TRUE(within(std::sqrt(error) / frobenius(h), z.scalar("rel_frob_err_of_H"), one_shot));
}

// Of one sample the Kronecker product is no approximation.
TEST(KroneckerLastLayer, IsExactForOneSample) {
  BATON_NEEDS_DEVICE();
  Small small;
  Rows one(small.base.slice(4, 1));
  Device& device = one.device();
  const Doubles w = small.layer.weights();
  const KroneckerLastLayer kronecker(device, one, Small::classes, w, 0.2);
  ExactLastLayer exact(device, Small::dim, Small::classes, 0.2);
  exact.fit_covariance(one, w);
  EXPECT_NEAR(kronecker.log_determinant(), exact.log_determinant(), 1e-12);
  EXPECT_NEAR(kronecker.evidence(-1).value, exact.evidence(-1).value, 1e-12);
  EXPECT_NEAR(kronecker.evidence(-1).by_log_tau, exact.evidence(-1).by_log_tau, 1e-12);
  EXPECT_TRUE(within(kronecker.logit_covariances(small.more.x, 12),
                     logit_covariances(exact, small.more_rows, Small::classes), 1e-12));
}

}  // namespace
}  // namespace baton::test
