// The moments that a backward pass adds up over the draws of a step, against the plain gradients of the draws.
#include "kernels/bgd.h"
#include "kernels/softmax_xent.h"
#include "tests/layers/posteriors/networks.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

struct Problem {
  NetworkFactory make;
  int batch, draws, head = 0;
  std::string idle = {};  // tensors of this name's beginning have no gradient
};

// The sums of a whole step, by passes of `at_once` draws, against those of the draws' own gradients, in double.
void check_moments(const Problem& p, const std::vector<int>& splits, double tolerance) {
  Memory memory;
  Device& device = memory.device();
  const auto plain = p.make();
  plain->use_head(p.head);
  const ParameterLayout& layout = plain->layout();
  const size_t stride = layout.stride();
  const int count = int(stride), draws = p.draws;
  SCOPED_TRACE(plain->architecture());

  std::vector<float> means(stride, 0.f), sds(stride, 0.02f);
  for (const TensorSpec& t : layout.tensors()) {
    const std::vector<float> w =
        random_normal(t.size, 0, t.bias ? 0.1f : std::sqrt(2.f / float(t.fan_in)), unsigned(t.offset));
    std::copy(w.begin(), w.end(), means.begin() + long(t.offset));
  }
  ParameterStore store(memory.arena(), layout, draws);  // every draw as a network of its own
  StoreWeights weights(store, false);
  Buffer mean(memory, means), sd(memory, sds);
  Buffer<float> zero(memory, stride), one(memory, stride, 1.f), noise(memory, stride * draws);
  Buffer states(memory, std::vector<StepState>(draws, state_of(31, 7)));
  draw_weights(noise, stride, zero, one, count, 0, draws, states, memory.stream());
  draw_weights(store.at("mean"), stride, mean, sd, count, 0, draws, states, memory.stream());
  upload(device, store.at("mean.grad"), std::vector<float>(stride * draws, 77.f));
  const std::vector<float> e = noise.host();
  std::vector<int32_t> labels;
  for (int b = 0; b < p.batch; b++) labels.push_back((3 * b + 1) % plain->classes());
  Buffer label(memory, labels);
  Buffer<float> loss(memory, size_t(p.batch) * draws), hit(memory, size_t(p.batch) * draws);

  const auto give_input = [&](Network& network) {
    upload(device, network.input().signal.value, random_normal(network.input().size * p.batch, 0.2f, 1, 5));
  };
  const auto run = [&](Network& network, int rows, int first) {
    network.forward({states, first});
    softmax_cross_entropy(loss, hit, network.logits_gradient(), network.logits(), label, rows, p.batch,
                          network.classes(), 1.f, memory.stream(), true);
    network.backward({states, first});
  };

  plain->prepare({device, memory.arena(), weights, draws, p.batch, /*training*/ true, /*shared_input*/ true});
  give_input(*plain);
  run(*plain, draws, 0);
  const std::vector<float> g = download(device, store.at("mean.grad"), stride * draws);

  for (int at_once : splits) {
    SCOPED_TRACE(testing::Message() << at_once << " of " << draws << " draws at once");
    const auto network = p.make();
    network->use_head(p.head);
    const auto posterior =
        make_posterior(device, memory.arena(), layout, "bgd", {{{"draws", draws}, {"draws_at_once", at_once}}});
    network->prepare(posterior->training_context(p.batch));
    give_input(*network);
    const ParameterStore& held = posterior->store();
    upload(device, held.at("mean"), means);
    upload(device, held.at("std"), sds);
    upload(device, held.at("moments.sum"), std::vector<float>(stride, 123.f));
    upload(device, held.at("moments.noise"), std::vector<float>(stride, 321.f));
    for (int first = 0; first < draws; first += at_once) {
      posterior->draw(first, states);
      run(*network, at_once, first);
    }
    const std::vector<float> got = download(device, held.at("moments.sum"), stride),
                             got_noise = download(device, held.at("moments.noise"), stride);
    for (const TensorSpec& t : layout.tensors()) {
      SCOPED_TRACE(t.name);
      const auto of = [&](const std::vector<float>& all) {
        return std::vector<float>(all.begin() + long(t.offset), all.begin() + long(t.offset + t.size));
      };
      if (begins_with(t.name, p.idle)) {
        EXPECT_TRUE(exact(of(got), std::vector<float>(t.size, 123.f)));
        EXPECT_TRUE(exact(of(got_noise), std::vector<float>(t.size, 321.f)));
        EXPECT_TRUE(exact(of(g), std::vector<float>(t.size, 77.f)));
        continue;
      }
      Doubles want(t.size), want_noise(t.size);
      for (int k = 0; k < draws; k++)
        for (size_t i = 0; i < t.size; i++) {
          const size_t at = stride * k + t.offset + i;
          want[i] += g[at];
          want_noise[i] += double(g[at]) * e[at];
        }
      EXPECT_TRUE(close(of(got), want, {.l2 = tolerance, .bias = 10 * tolerance}));
      EXPECT_TRUE(close(of(got_noise), want_noise, {.l2 = tolerance, .bias = 10 * tolerance}));
    }
    for (const auto& gap : layout.gaps())
      for (size_t i = 0; i < gap.size; i++) {
        ASSERT_EQ(got[gap.offset + i], 123.f);
        ASSERT_EQ(got_noise[gap.offset + i], 321.f);
      }
  }
}

TEST(LearnerMoments, OfAPerceptron) {
  BATON_NEEDS_DEVICE();
  check_moments({perceptron(37, {19, 23}, 7), 9, 6}, {6, 3, 2, 1}, 3e-6);
  check_moments({perceptron(784, {30}, 10), 33, 10}, {10, 5, 1}, 3e-6);
}

TEST(LearnerMoments, OfConvolutionsAndHeads) {
  BATON_NEEDS_DEVICE();
  check_moments({convolutional_heads, 5, 6, 0, "last.1"}, {6, 2, 1}, 5e-6);
  check_moments({convolutional_heads, 8, 4, 1, "last.0"}, {4, 1}, 5e-6);
}

NetworkFactory task_cnn(bool dropout) {
  return network_factory(network_spec("task-cnn", 5, {{"heads", 2}, {"dropout", dropout}}));
}

TEST(LearnerMoments, OfTheTaskCnn) {  // a draw's dropout masks are its own in every split
  BATON_NEEDS_DEVICE();
  check_moments({task_cnn(false), 2, 2, 1, "head0"}, {2, 1}, 2e-5);
  check_moments({task_cnn(true), 3, 2, 0, "head1"}, {2, 1}, 2e-5);
}

TEST(LearnerMoments, OfVgg11) {
  BATON_NEEDS_DEVICE();
  check_moments({network_factory(network_spec("vgg11")), 1, 2}, {1}, 2e-5);
}

}  // namespace
}  // namespace baton::test
