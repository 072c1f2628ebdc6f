// What every kind of posterior promises (layers/posteriors/posterior.h), for each that the registry lists: training,
// files, checkpoints, stages, pruning, and the refusal of what does not fit. A new kind is tested here from its line in
// the registry on.
#include <set>

#include "engine/io/safetensors.h"
#include "kernels/softmax_xent.h"
#include "tests/layers/posteriors/networks.h"
#include "tests/support/device.h"
#include "tests/support/messages.h"

namespace baton::test {
namespace {

// One tiny network that trains on one batch with a kind's standard settings.
struct Trained {
  explicit Trained(
      const std::string& kind, uint64_t seed = 3, bool masked = false,
      const NetworkFactory& make = [] { return std::make_unique<TinyNetwork>(); })
      : make(make),
        network(make()),
        owner(make_posterior(memory.device(), memory.arena(), network->layout(), kind, {json::object()}, masked)),
        posterior(*owner),
        rows(posterior.draws_at_once()),
        states(memory, size_t(rows)) {
    StepState s = state_of(seed, 0);
    s.stage_steps = 20;
    s.base_lr_mean = float(posterior.step_size());
    s.base_lr_scale = 0.01f;
    s.kl_weight = float(posterior.kl_weight(0, 100, batch));
    states.set(std::vector<StepState>(size_t(rows), s));
    posterior.initialise(states);
    network->prepare(posterior.training_context(batch));
    give_input(*network);
    for (int i = 0; i < rows * batch; i++) labels.push_back(i % batch * 7 % 5 % 4);
  }
  void give_input(Network& to) {
    const Signal& x = to.input().signal;
    const std::vector<float> values = random_normal(to.input().size * batch, 0.2f, 1, 8);
    std::vector<float> squares;
    for (float v : values) squares.push_back(v * v);
    upload(memory.device(), x.value, values);
    if (x.square) upload(memory.device(), x.square, squares);
  }
  void step() {
    advance_step(states, rows, memory.stream());
    Buffer label(memory, labels);
    Buffer<float> loss(memory, labels.size()), hit(memory, labels.size());
    for (int first = 0; first < posterior.draws(); first += rows) {
      posterior.draw(first, states);
      network->forward({states, first});
      softmax_cross_entropy(loss, hit, network->logits_gradient(), network->logits(), label, rows, batch,
                            network->classes(), posterior.loss_scale(batch), memory.stream());
      network->backward({states, first});
    }
    posterior.step(states);
  }
  std::vector<float> mean_weights() {
    Buffer<float> w(memory, network->layout().stride());
    posterior.mean_weights(w, 0);
    return w.host();
  }
  std::vector<float> sample(int draws) {
    Buffer<float> w(memory, network->layout().stride() * draws);
    posterior.sample(w, 0, 1, draws, key_of(4));
    return w.host();
  }
  std::vector<float> predict_at_mean() {
    Buffer<float> w(memory, network->layout().stride());
    posterior.mean_weights(w, 0);
    PointWeights weights(w, network->layout().stride());
    const auto plain = make();
    plain->prepare({memory.device(), memory.arena(), weights, 1, batch, /*training*/ false});
    give_input(*plain);
    plain->forward({});
    return download(memory.device(), plain->logits(), size_t(batch) * plain->classes());
  }
  // What a checkpoint holds, or what a model's file holds.
  std::vector<std::vector<float>> arrays(bool all) {
    std::vector<std::vector<float>> values;
    for (const StateArray& a : posterior.state())
      if (all || a.believed())
        values.push_back(download(memory.device(), a.store->at(a.array), a.store->bytes() / sizeof(float)));
    return values;
  }
  TensorFile file() const {
    TensorFile f;
    posterior.save(f);
    return f;
  }

  static constexpr int batch = 4;
  Memory memory;
  NetworkFactory make;
  std::unique_ptr<Network> network;
  std::unique_ptr<Posterior> owner;
  Posterior& posterior;
  int rows;
  Buffer<StepState> states;
  std::vector<int32_t> labels;
};

TEST(PosteriorKinds, AreFoundByName) {
  std::set<std::string> names;
  for (const PosteriorKind* kind : posterior_kinds()) {
    SCOPED_TRACE(kind->name);
    EXPECT_EQ(&find_posterior(kind->name), kind);
    EXPECT_TRUE(names.insert(kind->name).second);
    EXPECT_TRUE(begins_with(kind->summary, kind->name + std::string(", ")));
    expect_says(refusal([] { find_posterior("laplace"); }), {kind->name});
    std::set<std::string> options;
    for (const Option& option : kind->options) {
      EXPECT_TRUE(options.insert(option.name).second) << option.name;
      EXPECT_FALSE(option.help.empty()) << option.name;
      EXPECT_NO_THROW(check_option(option, option.standard, option.name));
    }
  }
}

TEST(PosteriorKinds, LearnTheirBatch) {
  BATON_NEEDS_DEVICE();
  for (const PosteriorKind* kind : posterior_kinds()) {
    SCOPED_TRACE(kind->name);
    Trained a(kind->name);
    EXPECT_EQ(&a.posterior.kind(), kind);
    EXPECT_EQ(a.posterior.settings().size(), kind->options.size());
    const std::vector<float> first = a.mean_weights();
    a.step(), a.step();
    EXPECT_FALSE(exact(a.mean_weights(), first));
    for (const auto& array : a.arrays(true))
      for (float x : array) ASSERT_TRUE(std::isfinite(x));
    const size_t names = a.posterior.kl_names().size();
    for (const auto& kl : {a.posterior.kl_by_name(), a.posterior.take_accumulated_kl()}) {
      ASSERT_EQ(kl.size(), 1u);
      EXPECT_EQ(kl[0].size(), names);
    }
    EXPECT_EQ(a.posterior.accumulated_kl().size(), names);
    EXPECT_EQ(a.posterior.warning(Trained::batch, 1), "");
    EXPECT_EQ(a.posterior.failure(Trained::batch, 1), "");
  }
}

// A file of what is believed gives the same predictions, at the mean and, where there are draws, by them.
TEST(PosteriorKinds, AFileIsThePosterior) {
  BATON_NEEDS_DEVICE();
  for (const PosteriorKind* kind : posterior_kinds())
    for (bool first_stage : {true, false}) {
      SCOPED_TRACE(testing::Message() << kind->name << (first_stage ? ", first stage" : ", second stage"));
      Trained a(kind->name), b(kind->name, 4);
      a.step(), a.step();
      if (!first_stage) a.posterior.begin_stage(false), a.step();
      EXPECT_FALSE(exact(b.mean_weights(), a.mean_weights()));
      const TensorFile file = a.file();
      b.posterior.load(file, first_stage);
      EXPECT_TRUE(exact(b.predict_at_mean(), a.predict_at_mean()));
      EXPECT_TRUE(exact(b.mean_weights(), a.mean_weights()));
      const std::vector<float> draws_a = a.sample(3), draws_b = b.sample(3);
      for (const TensorSpec& t : a.network->layout().tensors())
        for (int s = 0; s < 3; s++) {
          const auto of = [&](const std::vector<float>& draws) {
            const auto first = draws.begin() + long(a.network->layout().stride() * s + t.offset);
            return std::vector<float>(first, first + long(t.size));
          };
          EXPECT_TRUE(close(of(draws_b), of(draws_a), {.l2 = 1e-6, .bias = 1e-6})) << t.name;
        }
      EXPECT_NEAR(b.posterior.kl()[0], a.posterior.kl()[0], 1e-5 * std::abs(a.posterior.kl()[0]));
      for (const TensorSpec& t : a.network->layout().tensors()) {
        const auto got = b.posterior.read_log_std(0, t), want = a.posterior.read_log_std(0, t);
        EXPECT_EQ(got.size(), a.posterior.uncertain() ? t.size : 0);
        EXPECT_TRUE(got.empty() || close(got, want, {.l2 = 1e-6})) << t.name;
      }
    }
}

TEST(PosteriorKinds, AFileThatDoesNotFitChangesNothing) {
  BATON_NEEDS_DEVICE();
  for (const PosteriorKind* kind : posterior_kinds()) {
    SCOPED_TRACE(kind->name);
    Trained a(kind->name), b(kind->name, 4);
    const TensorFile file = a.file();
    const auto before = b.arrays(true);
    const auto refused = [&](const TensorFile& f) { return refusal([&] { b.posterior.load(f, true); }); };
    for (const auto& [name, tensor] : file.tensors) {
      TensorFile other = file;
      other.tensors.erase(name);
      expect_says(refused(other), {name});
      other.tensors[name] = Tensor::of<float>(std::vector<float>(7), {7});
      expect_says(refused(other), {name});
      std::vector<float> values = tensor.as<float>();
      values.back() = NAN;
      other.tensors[name] = Tensor::of<float>(std::span<const float>(values), tensor.shape);
      expect_says(refused(other), {"not finite"});
    }
    EXPECT_TRUE(b.arrays(true) == before);
  }
}

// With all of state(), the notes and the accumulated KL, another posterior goes on bit for bit.
TEST(PosteriorKinds, AResumedPosteriorStepsOn) {
  BATON_NEEDS_DEVICE();
  for (const PosteriorKind* kind : posterior_kinds())
    for (bool first_stage : {true, false}) {
      SCOPED_TRACE(testing::Message() << kind->name << (first_stage ? ", first stage" : ", second stage"));
      Trained a(kind->name), b(kind->name, 4);
      a.step(), a.step();
      if (!first_stage) a.posterior.begin_stage(false), a.step();
      const auto& from = a.posterior.state();
      const auto& to = b.posterior.state();
      ASSERT_EQ(from.size(), to.size());
      for (size_t i = 0; i < from.size(); i++)
        upload(b.memory.device(), to[i].store->at(to[i].array),
               download(a.memory.device(), from[i].store->at(from[i].array), from[i].store->bytes() / sizeof(float)));
      b.posterior.restored(first_stage);
      if (const auto notes = a.posterior.notes(); !notes.empty()) b.posterior.set_notes(notes);
      b.posterior.set_accumulated_kl(a.posterior.accumulated_kl());
      b.states.set(a.states.host());
      EXPECT_TRUE(b.arrays(true) == a.arrays(true));
      for (Trained* one : {&a, &b}) one->step(), one->step();
      EXPECT_TRUE(b.arrays(true) == a.arrays(true));
      EXPECT_EQ(b.posterior.accumulated_kl(), a.posterior.accumulated_kl());
      EXPECT_EQ(b.posterior.notes(), a.posterior.notes());
      EXPECT_TRUE(exact(b.predict_at_mean(), a.predict_at_mean()));
    }
}

TEST(PosteriorKinds, StagesBeginAndEnd) {
  BATON_NEEDS_DEVICE();
  for (const PosteriorKind* kind : posterior_kinds()) {
    SCOPED_TRACE(kind->name);
    Trained a(kind->name);
    const auto before = a.arrays(false);
    a.posterior.begin_stage(true);  // the first stage of all: nothing to hand on
    EXPECT_TRUE(a.arrays(false) == before);
    a.step(), a.step();
    const std::vector<float> mean = a.mean_weights();
    a.posterior.end_stage([&](int) { return std::vector<float>(a.network->layout().stride(), 1.f); });
    a.posterior.begin_stage(false);
    EXPECT_TRUE(exact(a.mean_weights(), mean));
    EXPECT_NEAR(a.posterior.kl()[0], 0, 1e-5);
    a.step(), a.step();
    EXPECT_FALSE(exact(a.mean_weights(), mean));
    EXPECT_EQ(a.posterior.kl()[0] > 0, !a.posterior.kl_names().empty());
  }
}

// A network that has taken another head writes no gradients of the one before: it stays as it is.
TEST(PosteriorKinds, ClearedGradientsMoveNothing) {
  BATON_NEEDS_DEVICE();
  for (const PosteriorKind* kind : posterior_kinds()) {
    SCOPED_TRACE(kind->name);
    Trained a(kind->name, 3, false, convolutional_heads);
    std::vector<StepState> states = a.states.host();
    for (StepState& s : states) s.kl_weight = 0;
    a.states.set(states);
    a.step();
    a.posterior.clear_gradients();
    a.posterior.reset_optimizer();
    a.network->use_head(1);
    const auto read = [&](const std::string& name) {
      std::vector<std::vector<float>> values;
      for (const StateArray& s : a.posterior.state())
        if (s.believed() && s.store == &a.posterior.store())
          values.push_back(s.store->read(a.memory.device(), s.array, 0, find_tensor(a.network->layout(), name)));
      return values;
    };
    const auto idle = read("last.0.weight"), idle_bias = read("last.0.bias"), moved = read("last.1.weight");
    a.step();
    EXPECT_TRUE(read("last.0.weight") == idle && read("last.0.bias") == idle_bias);
    EXPECT_FALSE(read("last.1.weight") == moved);
  }
}

TEST(PosteriorKinds, PrunedWeightsStayPruned) {
  BATON_NEEDS_DEVICE();
  for (const PosteriorKind* kind : posterior_kinds()) {
    SCOPED_TRACE(kind->name);
    Trained plain(kind->name);
    const ParameterLayout& layout = plain.network->layout();
    std::vector<uint8_t> pruned(layout.parameters());
    for (size_t i = 0; i < pruned.size(); i += 3) pruned[i] = 1;
    EXPECT_THROW(plain.posterior.mask(pruned), InputError);
    if (!kind->prunable) {
      expect_says(refusal([&] { Trained(kind->name, 3, true); }), {kind->name});
      continue;
    }
    Trained a(kind->name, 3, true), b(kind->name, 4, true);
    EXPECT_TRUE(a.posterior.masked());
    EXPECT_THROW(a.posterior.mask(std::vector<uint8_t>(3)), InputError);
    a.posterior.mask(pruned);
    a.step(), a.step();
    a.posterior.begin_stage(false);
    a.step();
    b.posterior.load(a.file(), false);
    for (Trained* one : {&a, &b}) {
      const std::vector<float> mean = one->mean_weights(), draw = one->sample(1);
      size_t at = 0;
      for (const TensorSpec& t : layout.tensors()) {
        const std::vector<uint8_t> read = one->posterior.read_pruned(t);
        ASSERT_EQ(read.size(), t.size);
        for (size_t i = 0; i < t.size; i++, at++) {
          ASSERT_EQ(read[i], pruned[at]) << t.name;
          ASSERT_TRUE(!pruned[at] || (mean[t.offset + i] == 0 && draw[t.offset + i] == 0)) << t.name;
        }
      }
      EXPECT_FALSE(exact(mean, std::vector<float>(mean.size(), 0)));
    }
    EXPECT_TRUE(exact(b.predict_at_mean(), a.predict_at_mean()));
  }
}

// Another value that an option takes.
json another_value(const Option& option) {
  switch (option.type) {
    case Option::Type::whole:
      return int(option.standard) + 1;
    case Option::Type::number:
      return double(option.standard) != 0 ? double(option.standard) / 2 : 0.5;
    case Option::Type::flag:
      return !bool(option.standard);
    case Option::Type::choice:
      return option.standard == option.choices[0] ? option.choices[1] : option.choices[0];
    case Option::Type::wholes:
      break;
  }
  return option.standard;
}

TEST(PosteriorKinds, WhatDoesNotFitIsRefused) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  const TinyNetwork network;
  for (const PosteriorKind* kind : posterior_kinds()) {
    SCOPED_TRACE(kind->name);
    const auto refused = [&](const std::vector<json>& settings) {
      return refusal([&] { make_posterior(memory.device(), memory.arena(), network.layout(), kind->name, settings); });
    };
    expect_says(refused({}), {"at least one replica"});
    const std::string unknown = refused({{{"no_such_option", 1}}});
    expect_says(unknown, {"no_such_option"});
    expect_says(unknown, {kind->name});
    for (const Option& option : kind->options) {
      SCOPED_TRACE(option.name);
      expect_says(refused({{{option.name, json::object()}}}), {"'" + option.name + "'"});
      const json other{{option.name, another_value(option)}};
      ASSERT_NO_THROW(make_posterior(memory.device(), memory.arena(), network.layout(), kind->name, {other}));
      const std::string apart = refused({json::object(), other});
      if (!kind->many_replicas) expect_says(apart, {"one network at a time"});
      else if (option.by_replica) EXPECT_EQ(apart, nothing_refused);
      else expect_says(apart, {"'" + option.name + "'"});
    }
  }
}

}  // namespace
}  // namespace baton::test
