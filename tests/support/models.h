// What the tests of models share: a small model of every kind, a folder for files, and a trainer that goes on from a
// model.
#pragma once
#include <unistd.h>

#include <cmath>
#include <random>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/messages.h"
#include "trainers/model.h"

namespace baton::test {

namespace fs = std::filesystem;

struct Folder {
  Folder() : path(fs::temp_directory_path() / ("model_test." + std::to_string(getpid()))) {
    fs::create_directories(path);
  }
  ~Folder() { fs::remove_all(path); }
  fs::path file(const std::string& name) const { return path / name; }
  fs::path path;
};

inline NetworkSpec small_mlp() {
  NetworkSpec spec = network_spec("mlp", 4, {{"hidden", {12, 7}}});
  spec.image = {1, 5, 6};
  return spec;
}

// A model of its kind with a say on everything that a file keeps. cfg needs convolutions.
inline Model model_of(Device& device, const std::string& kind) {
  Model m = new_model(kind == "cfg" ? network_spec("lenet5") : small_mlp(), kind);
  json settings{{"lr", 0.3},        {"lr_scale", 0.1},      {"prior_sd", 0.7},      {"init_log_std", -3.3},
                {"beta", 1.0 / 3},  {"warmup_epochs", 2.5}, {"schedule", "cosine"}, {"scale_rule", "natural"},
                {"groups", 2},      {"moments", true},      {"flow", "planar"},     {"flow_steps", 3},
                {"flow_hidden", 6}, {"z", "per-filter"},    {"fixed_base", true},   {"path_gradient", true},
                {"z_log_std", -3.5}};
  for (const auto& [name, value] : settings.items())
    if (m.settings.contains(name)) m.settings[name] = value;
  m.normalisation.scale[0] = 0.1f, m.normalisation.shift[0] = -1.f / 3;
  m.class_names = {"cat", "dög", "", "d\"q"};
  m.batch = 17, m.epochs = 0.7, m.seed = UINT64_MAX, m.step = UINT32_MAX;
  m.origin = {{"prior", "N(0, 0.7^2)"}, {"old", {1, 2}}};
  m.history = json::array({{{"stage", 1}, {"data", "00c0ffee00c0ffee"}, {"images", 12}, {"loss", 0.1}}});
  m.pruned = {{"fraction", 0.5}};
  initialise(device, m);
  return m;
}

inline void expect_same_arrays(const TensorFile& a, const TensorFile& b) {
  ASSERT_EQ(a.tensors.size(), b.tensors.size());
  for (const auto& [name, tensor] : a.tensors) {
    ASSERT_TRUE(b.has(name)) << name;
    EXPECT_EQ(tensor.bytes, b.at(name).bytes) << name;
    EXPECT_EQ(tensor.shape, b.at(name).shape) << name;
    EXPECT_EQ(tensor.dtype, b.at(name).dtype) << name;
  }
}

struct Lesson {  // random images, one trainer a model
  explicit Lesson(const Model& m, const char* rule = "adam", int parts = 2) : model(m) {
    Images images;
    const ImageShape& shape = m.network.image;
    images.count = 40, images.channels = shape.channels, images.height = shape.height, images.width = shape.width;
    images.classes = m.network.classes;
    std::mt19937 random(9);
    std::vector<std::vector<int32_t>> examples(static_cast<size_t>(parts));
    for (int i = 0; i < 40; i++) {
      images.labels.push_back(uint8_t(random() % unsigned(m.network.classes)));
      for (size_t p = 0; p < images.image_bytes(); p++) images.pixels.push_back(uint8_t(random()));
      examples[size_t(i / (40 / parts))].push_back(i);
    }
    TrainingSettings settings;
    settings.kind = m.kind;
    settings.masked = m.masked;
    settings.batch = 10;
    settings.epochs = 2;
    settings.stages_before = m.stages();
    settings.replicas = {{m.seed, m.settings}};
    json& options = settings.replicas[0].settings;
    const json faster{{"lr", 1e-2}, {"lr_scale", 1e-2}, {"scale_rule", rule}};
    for (const auto& [name, value] : faster.items())
      if (options.contains(name)) options[name] = value;
    trainer = std::make_unique<Trainer>(memory.device(), memory.arena(), network_factory(m.network),
                                        upload_images(memory.device(), memory.arena(), images, unit_range),
                                        tasks_in_turn(examples), settings);
    trainer->start_from(m.arrays, m.step);
  }
  void learn() {
    for (int stage = 0; stage < trainer->stages().count(); stage++) {
      trainer->begin_stage(stage);
      const EpochTotals t = trainer->run(trainer->count_steps(stage))[0];
      EXPECT_TRUE(std::isfinite(t.kl) && std::isfinite(t.loss));
    }
  }
  Memory memory;
  Model model;
  std::unique_ptr<Trainer> trainer;
};

}  // namespace baton::test
