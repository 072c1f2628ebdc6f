// Pruned weights are 0 and stay so: in what is drawn, through training, in files and in checkpoints.
#include "tests/support/device.h"
#include "tests/support/models.h"

namespace baton::test {
namespace {

// Every second weight of the first layer, every third of the second, and all of the second's biases.
std::vector<uint8_t> some_pruned(const ParameterLayout& layout) {
  std::vector<uint8_t> pruned;
  for (size_t t = 0; t < layout.tensors().size(); t++)
    for (size_t i = 0; i < layout[int(t)].size; i++)
      pruned.push_back((t == 0 && i % 2 == 0) || (t == 2 && i % 3 == 0) || t == 3);
  return pruned;
}

void expect_held(Device& device, Posterior& posterior, const std::vector<uint8_t>& pruned) {
  const ParameterStore& store = posterior.store();
  const bool gaussian = posterior.uncertain();
  Arena arena;
  const int draws = 3;
  const size_t stride = store.layout().stride();
  float* w = arena.take<float>(stride * (draws + 1));
  posterior.sample(w, 0, 0, draws, key_of(5, 7));
  posterior.mean_weights(w + stride * draws, 0);
  const std::vector<float> drawn = download(device, w, stride * (draws + 1));
  size_t at = 0;
  for (const TensorSpec& t : store.layout().tensors()) {
    SCOPED_TRACE(t.name);
    const auto read = [&](const char* array) { return store.read(device, array, 0, t); };
    const std::vector<float> mean = read("mean"), none(t.size, 0);
    const std::vector<float> variance = gaussian ? read("variance") : none,
                             prior = gaussian ? read("prior_mean") : none;
    size_t wrong = 0, dead = 0;
    for (size_t i = 0; i < t.size; i++, at++) {
      bool all_zero = mean[i] == 0 && variance[i] <= 1e-30f && prior[i] == 0;
      for (int s = 0; s <= draws; s++) all_zero = all_zero && drawn[stride * size_t(s) + t.offset + i] == 0;
      if (pruned[at]) wrong += !all_zero;
      else dead += gaussian ? variance[i] <= 1e-30f : !t.bias && mean[i] == 0;
    }
    EXPECT_EQ(wrong, 0u);
    EXPECT_EQ(dead, 0u);
  }
  if (!gaussian) return;
  const auto kl = posterior.kl_by_name()[0];
  for (size_t i = 0; i < kl.size(); i++) {
    EXPECT_TRUE(std::isfinite(kl[i])) << posterior.kl_names()[i];
    if (i == 3) {
      EXPECT_EQ(kl[i], 0) << "all of " << posterior.kl_names()[i] << " is pruned";
    }
  }
}

TEST(MaskedPosterior, StaysPrunedThroughTrainingAndFiles) {
  BATON_NEEDS_DEVICE();
  Folder folder;
  for (const char* kind : {"ft", "ffg", "mnf"})
    for (const char* rule : {"adam", "natural"}) {
      SCOPED_TRACE(testing::Message() << kind << ", rule " << rule);
      Memory memory;
      Model m = model_of(memory.device(), kind);
      m.history = json::array(), m.step = 0;
      m.masked = true;
      Pretrained pretrained;  // so that not all prior means are 0
      pretrained.weights["fc1.weight"] = std::vector<float>(30 * 12, 0.25f);
      for (size_t i = 0; i < 30 * 12; i += 3) pretrained.weights["fc1.weight"][i] = -0.5f;
      initialise(memory.device(), m, &pretrained, 0.1);
      for (const auto& [name, tensor] : m.arrays.tensors)
        if (name.ends_with(".mask")) {
          for (uint8_t kept : tensor.bytes) ASSERT_EQ(kept, 1) << name;
        }
      std::vector<uint8_t> pruned;
      {
        Arena arena;
        const auto posterior = make_posterior(memory.device(), arena, m);
        pruned = some_pruned(posterior->store().layout());
        const double whole = posterior->kl()[0];
        posterior->mask(pruned);
        expect_held(memory.device(), *posterior, pruned);
        if (posterior->uncertain()) {
          EXPECT_LT(posterior->kl()[0], whole);
          EXPECT_GT(posterior->kl()[0], 0);
        }
        keep(m, *posterior);
      }
      save_model(folder.file("m"), m);
      m = read_model(folder.file("m"));
      EXPECT_TRUE(m.masked);
      Lesson lesson(m, rule);
      expect_held(memory.device(), lesson.trainer->posterior(), pruned);
      lesson.learn();
      expect_held(memory.device(), lesson.trainer->posterior(), pruned);
      // The others have moved.
      Model next = m;
      keep(next, lesson.trainer->posterior());
      const std::vector<float> before = m.arrays.at("fc1.weight.mean").as<float>(),
                               after = next.arrays.at("fc1.weight.mean").as<float>();
      int moved = 0;
      for (size_t i = 0; i < before.size(); i++) {
        if (i % 2 == 0) {
          ASSERT_EQ(after[i], 0) << i;
        }
        moved += before[i] != after[i];
      }
      EXPECT_GT(moved, int(before.size()) / 4);  // but for units that no image reaches
      EXPECT_EQ(next.arrays.at("fc1.weight.mask").bytes, m.arrays.at("fc1.weight.mask").bytes);
      // A checkpoint in the middle keeps the mask.
      lesson.trainer->save(folder.file("t"), "");
      Lesson other(m, rule);
      other.trainer->restore(folder.file("t"));
      expect_held(memory.device(), other.trainer->posterior(), pruned);
      Model restored = m;
      keep(restored, other.trainer->posterior());
      expect_same_arrays(next.arrays, restored.arrays);
    }
}

TEST(MaskedPosterior, MeanNetworkIsZeroWherePruned) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Model m = model_of(memory.device(), "mnf");
  m.masked = true;
  initialise(memory.device(), m);
  Arena arena;
  const auto posterior = make_posterior(memory.device(), arena, m);
  posterior->mask(some_pruned(posterior->store().layout()));
  const TensorFile plain = mean_network(memory.device(), *posterior);
  const std::vector<float> first = plain.at("fc1.weight").as<float>(), second = plain.at("fc2.weight").as<float>();
  for (size_t i = 0; i < first.size(); i++) ASSERT_EQ(first[i] == 0, i % 2 == 0) << i;
  for (size_t i = 0; i < second.size(); i++) ASSERT_EQ(second[i] == 0, i % 3 == 0) << i;
}

TEST(MaskedPosterior, Refuses) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Model m = model_of(memory.device(), "ffg");
  Arena arena;
  const size_t parameters = make_network(m.network)->layout().parameters();
  expect_says(refusal([&] { make_posterior(memory.device(), arena, m)->mask(std::vector<uint8_t>(parameters)); }),
              {"without masks"});
  m.masked = true;
  expect_says(refusal([&] { make_posterior(memory.device(), arena, m); }), {"mask", "missing"});
  initialise(memory.device(), m);
  expect_says(refusal([&] { make_posterior(memory.device(), arena, m)->mask(std::vector<uint8_t>(parameters - 1)); }),
              {std::to_string(parameters)});
  Model cfg = model_of(memory.device(), "cfg");
  cfg.masked = true;
  expect_says(refusal([&] { make_posterior(memory.device(), arena, cfg); }), {"cfg", "cannot be pruned"});
}

}  // namespace
}  // namespace baton::test
