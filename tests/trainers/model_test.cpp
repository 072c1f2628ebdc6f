#include "trainers/model.h"

#include <unistd.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <random>

#include "engine/io/files.h"
#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

namespace fs = std::filesystem;

struct Folder {
  Folder() : path(fs::temp_directory_path() / ("model_test." + std::to_string(getpid()))) {
    fs::create_directories(path);
  }
  ~Folder() { fs::remove_all(path); }
  fs::path file(const std::string& name) const { return path / name; }
  fs::path path;
};

Architecture small_mlp() {
  Architecture a = architecture_of("mlp");
  a.classes = 4, a.height = 5, a.width = 6, a.hidden = {12, 7};
  return a;
}

// A model of its family with a say on everything that a file keeps. cfg needs convolutions.
Model model_of(Device& device, Family family) {
  Model m;
  m.architecture = family == Family::channel ? architecture_of("lenet5") : small_mlp();
  m.posterior = PosteriorOptions(family);
  if (family == Family::channel) m.posterior.groups = 2, m.posterior.moments = true;
  if (family == Family::multiplicative) {
    m.posterior.groups = 2;
    m.posterior.flow = FlowKind::planar, m.posterior.flow_steps = 3, m.posterior.flow_hidden = 6;
    m.posterior.z_per_filter = m.posterior.fixed_base = m.posterior.path_gradient = true;
    m.posterior.z_log_std = -3.5f;
  }
  m.normalisation.scale[0] = 0.1f, m.normalisation.shift[0] = -1.f / 3;
  m.class_names = {"cat", "dög", "", "d\"q"};
  m.training.lr = 0.3, m.training.lr_scale = 0.1, m.training.prior_sd = 0.7, m.training.init_log_std = -3.3;
  m.training.beta = 1.0 / 3, m.training.warmup_epochs = 2.5, m.training.schedule = Schedule::cosine;
  m.scale_rule = ScaleRule::natural;
  m.batch = 17, m.epochs = 0.7, m.seed = UINT64_MAX, m.step = UINT32_MAX;
  m.origin = {{"prior", "N(0, 0.7^2)"}, {"old", {1, 2}}};
  m.history = json::array({{{"stage", 1}, {"data", "00c0ffee00c0ffee"}, {"images", 12}, {"loss", 0.1}}});
  m.pruned = {{"fraction", 0.5}};
  initialise(device, m, {});
  return m;
}

const Family families[] = {Family::point, Family::gaussian, Family::channel, Family::multiplicative};

std::string bytes_of(const fs::path& path) {
  const std::vector<uint8_t> bytes = read_file(path);
  return {bytes.begin(), bytes.end()};
}

void expect_same_arrays(const TensorFile& a, const TensorFile& b) {
  ASSERT_EQ(a.tensors.size(), b.tensors.size());
  for (const auto& [name, tensor] : a.tensors) {
    ASSERT_TRUE(b.has(name)) << name;
    EXPECT_EQ(tensor.bytes, b.at(name).bytes) << name;
    EXPECT_EQ(tensor.shape, b.at(name).shape) << name;
    EXPECT_EQ(tensor.dtype, b.at(name).dtype) << name;
  }
}

std::string refusal(const std::function<void()>& f) {
  try {
    f();
  } catch (const InputError& e) {
    return e.what();
  } catch (const std::exception& e) {
    return std::string("NOT AN INPUT ERROR: ") + e.what();
  }
  return "";
}
void expect_refusal(const std::string& got, const std::vector<std::string>& parts) {
  EXPECT_EQ(got.find("NOT AN INPUT ERROR"), std::string::npos) << got;
  for (const std::string& part : parts) EXPECT_NE(got.find(part), std::string::npos) << "'" << part << "' in: " << got;
}

// ------------------------------------------------------------------------------------------------------- the file
TEST(Model, RoundTripOfEveryFamily) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Folder folder;
  for (Family family : families) {
    SCOPED_TRACE(name_of(family));
    const Model m = model_of(memory.device(), family);
    save_model(folder.file("a"), m);
    save_model(folder.file("b"), m);
    const std::string bytes = bytes_of(folder.file("a"));
    EXPECT_EQ(bytes, bytes_of(folder.file("b")));
    const Model n = load_model(folder.file("a"));
    save_model(folder.file("c"), n);
    EXPECT_TRUE(bytes == bytes_of(folder.file("c")));
    EXPECT_EQ(fingerprint(m), fingerprint(n));
    expect_same_arrays(m.arrays, n.arrays);

    EXPECT_EQ(n.architecture.description(), m.architecture.description());
    EXPECT_EQ(n.architecture.hidden, m.architecture.hidden);
    EXPECT_EQ(n.posterior.family, family);
    EXPECT_EQ(n.posterior.groups, m.posterior.groups);
    EXPECT_EQ(n.posterior.moments, m.posterior.moments);
    EXPECT_EQ(n.posterior.flow, m.posterior.flow);
    EXPECT_EQ(n.posterior.flow_steps, m.posterior.flow_steps);
    EXPECT_EQ(n.posterior.flow_hidden, m.posterior.flow_hidden);
    EXPECT_EQ(n.posterior.z_per_filter, m.posterior.z_per_filter);
    EXPECT_EQ(n.posterior.fixed_base, m.posterior.fixed_base);
    EXPECT_EQ(n.posterior.path_gradient, m.posterior.path_gradient);
    EXPECT_EQ(n.posterior.z_log_std, m.posterior.z_log_std);
    EXPECT_FALSE(n.posterior.masked);
    EXPECT_EQ(n.normalisation.scale[0], 0.1f);
    EXPECT_EQ(n.normalisation.shift[0], -1.f / 3);
    EXPECT_EQ(n.class_names, m.class_names);
    EXPECT_EQ(training_json(n), training_json(m));
    EXPECT_EQ(n.scale_rule, ScaleRule::natural);
    EXPECT_EQ(n.training.schedule, Schedule::cosine);
    EXPECT_EQ(n.batch, 17);
    EXPECT_EQ(n.epochs, 0.7);
    EXPECT_EQ(n.seed, UINT64_MAX);
    EXPECT_EQ(n.step, UINT32_MAX);
    EXPECT_EQ(n.origin, m.origin);
    EXPECT_EQ(n.history, m.history);
    EXPECT_EQ(n.pruned, m.pruned);
    EXPECT_EQ(n.learned(0x00c0ffee00c0ffeeull), 1);
    EXPECT_EQ(n.learned(1), 0);

    // The posterior has the arrays, and gives them back.
    Arena arena;
    const auto posterior = posterior_of(memory.device(), arena, n);
    Model again = n;
    keep(again, *posterior);
    expect_same_arrays(m.arrays, again.arrays);
  }
}

TEST(Model, ClassNamesAreNumbersWhereThereAreNone) {
  Model m;
  m.class_names = {"a"};
  EXPECT_EQ(m.class_name(0), "a");
  EXPECT_EQ(m.class_name(1), "1");
}

TEST(Model, RefusesWhatIsNoModel) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Folder folder;
  const fs::path path = folder.file("file");
  const Model m = model_of(memory.device(), Family::gaussian);
  save_model(path, m);
  const TensorFile good = load_safetensors(path);
  const auto refused = [&](const std::function<void(TensorFile&)>& change) {
    TensorFile file = good;
    change(file);
    save_safetensors(path, file);
    return refusal([&] { load_model(path); });
  };
  const std::string name = path.string();
  EXPECT_EQ(refused([](TensorFile&) {}), "");
  expect_refusal(refused([](TensorFile& f) { f.metadata["format"] = "baton-model-2"; }),
                 {name, "another version", "baton-model-2", "baton-model-1"});
  expect_refusal(refused([](TensorFile& f) { f.metadata["format"] = "baton-training-2"; }),
                 {name, "an update that has not ended", "--resume"});
  expect_refusal(refused([](TensorFile& f) { f.metadata["format"] = "baton-pretrained-1"; }),
                 {name, "plain network's weights", "baton init --from"});
  expect_refusal(refused([&](TensorFile& f) { f = mean_network(memory.device(), m); }),
                 {name, "plain network's weights", "baton init --from"});
  expect_refusal(refused([](TensorFile& f) { f.metadata["format"] = "pt"; }), {name, "no model", "'pt'"});
  expect_refusal(refused([](TensorFile& f) { f.metadata.erase("format"); }), {name, "no \"format\""});
  expect_refusal(refused([](TensorFile& f) { f.tensors.erase("fc2.weight.log_std"); }), {name, "fc2.weight.log_std"});
  expect_refusal(
      refused([](TensorFile& f) { f.tensors["fc1.bias.mean"] = Tensor::of<float>(std::vector<float>(11), {11}); }),
      {name, "fc1.bias.mean", "[11]", "[12]"});
  expect_refusal(
      refused([](TensorFile& f) { f.tensors["fc1.bias.mean"] = Tensor::of<int32_t>(std::vector<int32_t>(12), {12}); }),
      {name, "fc1.bias.mean", "I32"});
  for (const char* tensor : {"fc1.weight.mean", "fc3.bias.log_std", "fc2.weight.prior_mean", "fc2.bias.prior_log_std"})
    for (float bad : {NAN, INFINITY})
      expect_refusal(refused([&](TensorFile& f) {
                       std::vector<float> values = f.at(tensor).as<float>();
                       values.back() = bad;
                       f.tensors[tensor] = Tensor::of<float>(std::span<const float>(values), f.at(tensor).shape);
                     }),
                     {name, tensor, "not finite"});
  // Another architecture's tensors.
  expect_refusal(refused([](TensorFile& f) {
                   json a = json::parse(f.metadata["architecture"]);
                   a["hidden"] = {12, 8};
                   f.metadata["architecture"] = a.dump();
                 }),
                 {name, "fc2.weight.mean", "[7, 12]", "[8, 12]"});
  expect_refusal(refused([](TensorFile& f) {  // before anything of this size is allocated
                   json a = json::parse(f.metadata["architecture"]);
                   a["hidden"] = std::vector<int>(16, 65536);
                   f.metadata["architecture"] = a.dump();
                 }),
                 {name, "fc1.weight.mean", "[65536, 30]"});
  expect_refusal(refused([](TensorFile& f) {
                   f.metadata["architecture"] =
                       R"({"name":"lenet5","classes":10,"channels":1,"height":28,"width":28,"hidden":[]})";
                 }),
                 {name, "conv1.weight.mean"});
  expect_refusal(refused([](TensorFile& f) { f.metadata["family"] = "mnf"; }), {name, "posterior"});
  expect_refusal(refusal([&] { load_model(folder.file("none")); }), {folder.file("none").string()});
}

// The file with another text in its metadata; null takes the key away. Not to the disk's platter: there are many.
void write_with(const fs::path& path, const std::string& bytes, const std::string& key, const json& text) {
  uint64_t length;
  std::memcpy(&length, bytes.data(), sizeof length);
  json header = json::parse(bytes.substr(8, length));
  json& metadata = header["__metadata__"];
  if (text.is_null()) metadata.erase(key);
  else metadata[key] = text;
  const std::string changed = header.dump();
  length = changed.size();
  std::ofstream to(path, std::ios::binary);
  to.write(reinterpret_cast<const char*>(&length), sizeof length) << changed;
  std::memcpy(&length, bytes.data(), sizeof length);
  to << bytes.substr(8 + length);
}

// Every value of the metadata in every wrong form: an InputError that names file and key, or a model.
TEST(Model, RefusesMutatedMetadata) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Folder folder;
  const fs::path path = folder.file("file");
  const std::vector<json> wrong{nullptr,
                                true,
                                -1,
                                0,
                                1.5,
                                1e300,
                                int64_t(1) << 40,
                                UINT64_MAX,
                                "",
                                "x",
                                json::array(),
                                json::object(),
                                json::array({nullptr}),
                                json::array({"x", -1, 1e300})};
  for (Family family : {Family::gaussian, Family::multiplicative}) {
    const Model m = model_of(memory.device(), family);
    save_model(path, m);
    const TensorFile good = load_safetensors(path);
    const std::string bytes = bytes_of(path);
    const auto check = [&](const std::string& key, const std::string& text, bool must_fail) {
      SCOPED_TRACE(key + " = " + text);
      write_with(path, bytes, key, text);
      Model loaded;
      const std::string got = refusal([&] { loaded = load_model(path); });
      if (got.empty()) {
        EXPECT_FALSE(must_fail);
        // What has been let in can be used.
        EXPECT_EQ(refusal([&] {
                    loaded.learned(1);
                    fingerprint(loaded);
                    data_options(loaded);
                    training_json(loaded);
                  }),
                  "");
      } else {
        const bool no_mask = got.find(".mask' is missing") != std::string::npos;  // "masked" makes it look for one
        expect_refusal(got, {path.string(), no_mask ? "fc1.weight.mask" : "\"" + key + "\""});
      }
    };
    for (const auto& [key, text] : good.metadata) {
      if (key == "format") continue;
      write_with(path, bytes, key, nullptr);
      expect_refusal(refusal([&] { load_model(path); }), {path.string(), "no \"" + key + "\""});
      if (key == "family") continue;
      for (const char* no_json : {"", "{", "nul", "[1,"}) check(key, no_json, true);
      const bool free = key == "origin" || key == "pruned";
      for (const json& w : wrong)
        check(key, w.dump(), !free && (w.is_null() || w.is_boolean() || w == "x" || w == 1.5));
      const json whole = json::parse(text);
      if (free || whole.is_primitive()) continue;
      const auto each = [&](const json& of, const std::function<json(const json&)>& rebuilt, auto&& self) -> void {
        for (const auto& [name, value] : of.items()) {
          const auto with = [&, name = name](const json& replacement) {
            json copy = of;
            if (copy.is_array()) copy[size_t(std::stoul(name))] = replacement;
            else copy[name] = replacement;
            return rebuilt(copy);
          };
          const bool text_or_flag = value.is_string() || value.is_boolean();
          for (const json& w : wrong) {
            const bool same_kind = w.type() == value.type() || (w.is_number() && value.is_number());
            const bool fatal = key != "history" && !same_kind && (w.is_null() || w.is_object() || text_or_flag);
            check(key, with(w).dump(), fatal);
          }
          if (of.is_object() && key != "history") {
            json copy = of;
            copy.erase(name);
            check(key, rebuilt(copy).dump(), true);
          }
          if (value.is_structured()) self(value, with, self);
        }
      };
      each(
          whole, [](const json& j) { return j; }, each);
    }
    write_with(path, bytes, "step", "0");
    EXPECT_EQ(refusal([&] { load_model(path); }), "");
    for (const char* name : {"", "FFG", "ffg ", "{}"}) {
      write_with(path, bytes, "family", name);
      expect_refusal(refusal([&] { load_model(path); }), {path.string(), "ft, ffg, cfg or mnf"});
    }
  }
}

TEST(Model, FingerprintTellsEverythingApart) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  const Model m = model_of(memory.device(), Family::multiplicative);
  const std::string of = fingerprint(m);
  EXPECT_EQ(of.size(), 16u);
  Model moved = m;
  moved.arrays.path = "elsewhere";
  EXPECT_EQ(fingerprint(moved), of);
  for (const auto& [name, tensor] : m.arrays.tensors)
    for (size_t at : {size_t(0), tensor.bytes.size() / 2, tensor.bytes.size() - 1}) {
      Model n = m;
      n.arrays.tensors[name].bytes[at] ^= 1;
      EXPECT_NE(fingerprint(n), of) << name << " byte " << at;
    }
  const std::vector<std::function<void(Model&)>> changes{
      [](Model& n) { n.architecture.classes++; },
      [](Model& n) { n.architecture.hidden[0]++; },
      [](Model& n) { n.posterior.flow_steps++; },
      [](Model& n) { n.posterior.family = Family::gaussian; },
      [](Model& n) { n.posterior.masked = true; },
      [](Model& n) { n.normalisation.scale[0] = std::nextafter(n.normalisation.scale[0], 1.f); },
      [](Model& n) { n.normalisation.shift[0] = 0; },
      [](Model& n) { n.class_names[0] = "c"; },
      [](Model& n) { n.training.beta = std::nextafter(n.training.beta, 1.0); },
      [](Model& n) { n.scale_rule = ScaleRule::adam; },
      [](Model& n) { n.rule = Rule::descent; },
      [](Model& n) { n.draws++; },
      [](Model& n) { n.batch++; },
      [](Model& n) { n.epochs++; },
      [](Model& n) { n.seed--; },
      [](Model& n) { n.step--; },
      [](Model& n) {
        n.origin["old"] = {1, 3};
      },
      [](Model& n) { n.history[0]["loss"] = 0.2; },
      [](Model& n) { n.history.push_back(n.history[0]); },
      [](Model& n) { n.pruned = json(); }};
  for (size_t i = 0; i < changes.size(); i++) {
    Model n = m;
    changes[i](n);
    EXPECT_NE(fingerprint(n), of) << "change " << i;
  }
}

// --------------------------------------------------------------------------------------------------- architectures
TensorFile plain_network(const Architecture& a) {
  TensorFile file;
  file.path = "net.safetensors";
  const auto network = a.network()();
  for (const TensorSpec& t : network->layout().tensors())
    file.tensors[t.name] = Tensor::of<float>(std::vector<float>(t.size), t.shape);
  return file;
}

TEST(Model, RecognisesArchitectures) {
  for (const char* name : {"lenet5", "3conv3fc", "vgg11"})
    for (int classes : {2, 10, 47, 256}) {
      Architecture a = architecture_of(name);
      a.classes = classes;
      const Architecture b = recognise(plain_network(a));
      EXPECT_EQ(b.description(), a.description());
      EXPECT_EQ(std::string(b.network()()->architecture()), a.network()()->architecture());
    }
  struct Case {
    std::vector<int> hidden;
    int classes, channels, height, width;
  };
  for (const Case& c : std::vector<Case>{{{400, 400}, 10, 1, 28, 28},
                                         {{5}, 2, 1, 28, 28},
                                         {{7, 3, 9, 1}, 256, 1, 9, 9},
                                         {{20}, 3, 3, 32, 32},
                                         {{2}, 7, 1, 1, 1}}) {
    Architecture a = architecture_of("mlp");
    a.hidden = c.hidden, a.classes = c.classes, a.channels = c.channels, a.height = c.height, a.width = c.width;
    EXPECT_EQ(recognise(plain_network(a)).description(), a.description());
  }
  EXPECT_EQ(architecture_of("lenet5").description(), "lenet5, 28 x 28 grey images, 10 classes");
  EXPECT_EQ(architecture_of("3conv3fc").description(), "3conv3fc, 32 x 32 colour images, 10 classes");
  EXPECT_EQ(small_mlp().description(), "mlp 12-7, 5 x 6 grey images, 4 classes");
}

TEST(Model, NamesTheTensorThatFitsNone) {
  const auto refused = [](const std::string& name, const std::function<void(TensorFile&)>& change) {
    Architecture a = architecture_of(name);
    TensorFile file = plain_network(a);
    change(file);
    return refusal([&] { recognise(file); });
  };
  const auto set = [](const std::string& tensor, std::vector<int64_t> shape) {
    return [=](TensorFile& f) {
      int64_t size = 1;
      for (int64_t n : shape) size *= n;
      f.tensors[tensor] = Tensor::of<float>(std::vector<float>(size_t(size)), shape);
    };
  };
  expect_refusal(refused("lenet5", set("conv2.weight", {50, 20, 3, 3})),
                 {"net.safetensors", "nearest is lenet5", "conv2.weight", "[50, 20, 3, 3]", "[50, 20, 5, 5]"});
  expect_refusal(refused("3conv3fc", set("fc1.bias", {7})), {"nearest is 3conv3fc", "fc1.bias", "[7]"});
  expect_refusal(refused("vgg11", [](TensorFile& f) { f.tensors.erase("conv8.bias"); }),
                 {"nearest is vgg11", "conv8.bias", "missing"});
  expect_refusal(refused("lenet5", set("bn1.weight", {20})), {"nearest is lenet5", "more tensors"});
  expect_refusal(refused("mlp", set("fc2.weight", {400, 401})), {"nearest is mlp", "fc2.weight", "[400, 401]"});
  expect_refusal(refused("mlp", set("fc3.bias", {300})), {"nearest is mlp", "fc3.bias", "[300]"});
  expect_refusal(refused("mlp", set("fc1.weight", {400, 30})), {"fc1.weight", "[400, 30]"});  // no square image
  expect_refusal(refused("mlp", set("fc1.weight", {0, 784})), {"units, not 0"});
  expect_refusal(refused("lenet5", [](TensorFile& f) { f.tensors.clear(); }), {"fits none"});
  expect_refusal(refused("mlp",
                         [](TensorFile& f) {
                           f.tensors.clear();
                           f.tensors["fc1.weight"] = Tensor::of<float>(std::vector<float>(4), {2, 2});
                           f.tensors["fc2.weight"] = Tensor::of<float>(std::vector<float>(4), {2, 2});
                         }),
                 {"fits none", "missing"});
}

TEST(Model, RefusesArchitectures) {
  const auto refused = [](const std::string& name, const std::function<void(Architecture&)>& change) {
    Architecture a = architecture_of(name);
    change(a);
    return refusal([&] { a.network(); });
  };
  expect_refusal(refusal([] { architecture_of("resnet"); }), {"resnet", "lenet5, 3conv3fc, vgg11 or mlp"});
  expect_refusal(refused("lenet5", [](Architecture& a) { a.channels = 3; }), {"28 x 28 grey", "28 x 28 colour"});
  expect_refusal(refused("vgg11", [](Architecture& a) { a.width = 31; }), {"32 x 32 colour", "32 x 31"});
  expect_refusal(refused("lenet5", [](Architecture& a) { a.hidden = {5}; }), {"lenet5", "hidden"});
  for (int classes : {-1, 0, 1, 257})
    expect_refusal(refused("mlp", [&](Architecture& a) { a.classes = classes; }),
                   {"2 to 256", std::to_string(classes)});
  expect_refusal(refused("mlp", [](Architecture& a) { a.hidden = {}; }), {"hidden"});
  expect_refusal(refused("mlp", [](Architecture& a) { a.hidden = {5, 0}; }), {"65536", "not 0"});
  expect_refusal(refused("mlp", [](Architecture& a) { a.channels = 2; }), {"1 or 3 channels"});
  expect_refusal(refused("mlp", [](Architecture& a) { a.height = 0; }), {"1024"});
}

// ------------------------------------------------------------------------------------------------ what it begins with
TEST(Model, BeginsWithPretrainedWeights) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  for (Family family : families) {
    SCOPED_TRACE(name_of(family));
    Model m = model_of(memory.device(), family);
    m.training.init_log_std = -2;  // wider than one pretrained tensor's prior, narrower than the other's
    const auto network = m.architecture.network()();
    const auto& tensors = network->layout().tensors();
    const TensorSpec &one = tensors[0], &laplace = tensors[2];
    auto pretrained = std::make_shared<Pretrained>();
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    for (const TensorSpec* t : {&one, &laplace})
      for (size_t i = 0; i < t->size; i++) pretrained->weights[t->name].push_back(normal(random));
    for (size_t i = 0; i < laplace.size; i++)
      pretrained->prior_log_std[laplace.name].push_back(i % 2 ? -1.f : -3.f + 0.1f * normal(random));
    initialise(memory.device(), m, {pretrained, 0.05});

    Arena arena;
    const auto posterior = posterior_of(memory.device(), arena, m);
    posterior->mean_log_std();  // brings cfg's marginals into log_std
    for (const TensorSpec& t : tensors) {
      SCOPED_TRACE(t.name);
      const bool adopted = pretrained->weights.count(t.name);
      const auto read = [&](const char* array) { return posterior->store().read(memory.device(), array, 0, t); };
      if (adopted) {
        EXPECT_EQ(read("mean"), pretrained->weights[t.name]);
      }
      if (family == Family::point) continue;
      EXPECT_EQ(read("prior_mean"), adopted ? pretrained->weights[t.name] : std::vector<float>(t.size, 0));
      const std::vector<float> prior = read("prior_log_std"), sd = read("log_std");
      for (size_t i = 0; i < t.size; i++)
        ASSERT_FLOAT_EQ(prior[i], t.name == laplace.name ? pretrained->prior_log_std[t.name][i]
                                                         : float(std::log(adopted ? 0.05 : 0.7)));
      for (size_t i = 0; i < t.size; i++)
        ASSERT_NEAR(sd[i], std::min(-2.f, prior[i]), family == Family::channel ? 1e-5 : 0);
    }
    EXPECT_TRUE(std::isfinite(posterior->kl()[0]));

    const std::string before = fingerprint(m), fresh = tensors[4].name + ".mean";  // the seed decides everything
    const std::vector<uint8_t> drawn = m.arrays.at(fresh).bytes;
    initialise(memory.device(), m, {pretrained, 0.05});
    EXPECT_EQ(fingerprint(m), before);
    m.seed--;
    initialise(memory.device(), m, {pretrained, 0.05});
    EXPECT_NE(m.arrays.at(fresh).bytes, drawn);
    pretrained->weights["fc9.weight"] = {1};
    expect_refusal(refusal([&] { initialise(memory.device(), m, {pretrained, 0.05}); }), {"fc9.weight"});
    pretrained->weights.erase("fc9.weight");
    pretrained->weights[one.name].pop_back();
    expect_refusal(refusal([&] { initialise(memory.device(), m, {pretrained, 0.05}); }), {one.name});
  }
}

TEST(Model, MeanNetworkIsAPlainNetwork) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  for (Family family : families) {
    SCOPED_TRACE(name_of(family));
    const Model m = model_of(memory.device(), family);
    TensorFile plain = mean_network(memory.device(), m);
    Arena arena;
    const auto posterior = posterior_of(memory.device(), arena, m);
    const ParameterLayout& layout = posterior->store().layout();
    float* w = arena.take<float>(layout.stride());
    posterior->mean_weights(w, 0);
    const std::vector<float> flat = download(memory.device(), w, layout.stride());
    ASSERT_EQ(plain.tensors.size(), layout.tensors().size());
    for (const TensorSpec& t : layout.tensors()) {
      const std::vector<float> got = plain.at(t.name, t.shape).as<float>();
      EXPECT_EQ(got, std::vector<float>(flat.begin() + long(t.offset), flat.begin() + long(t.offset + t.size)));
      if (family != Family::multiplicative) {
        EXPECT_EQ(got, m.arrays.at(t.name + ".mean").as<float>());
      }
    }
    if (family == Family::channel) {
      EXPECT_EQ(recognise(plain).description(), m.architecture.description());
    }
  }
}

TEST(Model, ClassesOfDataMustFit) {
  Model m;
  m.architecture = small_mlp();
  OwnData data;
  data.images.count = 3, data.images.labels = {0, 3, 4};
  check_classes(m, data);
  data.labelled = true;
  expect_refusal(refusal([&] { check_classes(m, data); }), {"label 4", "image 2", "4 classes"});
  data.images.labels[2] = 3;
  check_classes(m, data);
  const OwnDataOptions o = data_options(m);
  EXPECT_EQ((std::vector{o.channels, o.height, o.width, o.classes}), (std::vector{1, 5, 6, 4}));
}

// ------------------------------------------------------------------------------------------------------------ training
struct Lesson {  // random images, one trainer a model
  explicit Lesson(const Model& m, ScaleRule rule = ScaleRule::adam, int parts = 2) : model(m) {
    Images images;
    const Architecture& a = m.architecture;
    images.count = 40, images.channels = a.channels, images.height = a.height, images.width = a.width;
    images.classes = a.classes;
    std::mt19937 random(9);
    for (int i = 0; i < 40; i++) {
      images.labels.push_back(uint8_t(random() % unsigned(a.classes)));
      for (size_t p = 0; p < images.image_bytes(); p++) images.pixels.push_back(uint8_t(random()));
    }
    TrainingPlan plan;
    plan.posterior = m.posterior;
    plan.scale_rule = rule;
    plan.parts = parts;
    plan.batch = 10;
    plan.epochs = 2;
    plan.seeds = {m.seed};
    plan.settings = {m.training};
    plan.settings[0].lr = 1e-2, plan.settings[0].lr_scale = 1e-2;
    plan.stages_before = m.stages();
    std::vector<int32_t> order;
    for (int i = 0; i < 40; i++) order.push_back(i);
    trainer = std::make_unique<IncrementalTrainer>(memory.device(), memory.arena(), m.architecture.network(),
                                                   upload_images(memory.device(), memory.arena(), images, unit_range),
                                                   plan, std::vector<std::vector<int32_t>>(1, order),
                                                   std::vector<int>(size_t(parts), 40 / parts));
    trainer->resume_from(m.arrays, m.step);
  }
  void learn() {
    for (int stage = 0; stage < trainer->stages(); stage++) {
      trainer->begin_stage(stage);
      const EpochTotals t = trainer->run(trainer->steps_of(stage))[0];
      EXPECT_TRUE(std::isfinite(t.kl) && std::isfinite(t.loss));
    }
  }
  Memory memory;
  Model model;
  std::unique_ptr<IncrementalTrainer> trainer;
};

// Under MNF the first stage's prior of z is another function of its arrays than later ones; a model that has learned
// one stage still answers to it.
TEST(Model, KlIsTheTrainersKl) {
  BATON_NEEDS_DEVICE();
  for (Family family : {Family::gaussian, Family::multiplicative})
    for (int stages : {1, 2}) {
      SCOPED_TRACE(testing::Message() << name_of(family) << ", " << stages << " stages");
      Memory memory;
      Model m = model_of(memory.device(), family);
      m.history = json::array(), m.step = 0;
      initialise(memory.device(), m, {});
      Lesson lesson(m, ScaleRule::adam, stages);
      lesson.learn();
      keep(m, lesson.trainer->posterior());
      for (int s = 0; s < stages; s++) m.history.push_back({{"stage", s + 1}, {"data", ""}});
      Arena arena;
      EXPECT_EQ(posterior_of(memory.device(), arena, m)->kl_by_name(), lesson.trainer->posterior().kl_by_name());
    }
}

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
  const bool gaussian = posterior.family() != Family::point;
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
  for (Family family : {Family::point, Family::gaussian, Family::multiplicative})
    for (ScaleRule rule : {ScaleRule::adam, ScaleRule::natural}) {
      SCOPED_TRACE(testing::Message() << name_of(family) << ", rule " << int(rule));
      Memory memory;
      Model m = model_of(memory.device(), family);
      m.history = json::array(), m.step = 0;
      m.posterior.masked = true;
      auto pretrained = std::make_shared<Pretrained>();  // so that not all prior means are 0
      pretrained->weights["fc1.weight"] = std::vector<float>(30 * 12, 0.25f);
      for (size_t i = 0; i < 30 * 12; i += 3) pretrained->weights["fc1.weight"][i] = -0.5f;
      initialise(memory.device(), m, {pretrained, 0.1});
      for (const auto& [name, tensor] : m.arrays.tensors)
        if (name.ends_with(".mask")) {
          for (uint8_t kept : tensor.bytes) ASSERT_EQ(kept, 1) << name;
        }
      std::vector<uint8_t> pruned;
      {
        Arena arena;
        const auto posterior = posterior_of(memory.device(), arena, m);
        pruned = some_pruned(posterior->store().layout());
        const double whole = posterior->kl()[0];
        posterior->mask(pruned);
        expect_held(memory.device(), *posterior, pruned);
        if (family != Family::point) {
          EXPECT_LT(posterior->kl()[0], whole);
          EXPECT_GT(posterior->kl()[0], 0);
        }
        keep(m, *posterior);
      }
      save_model(folder.file("m"), m);
      m = load_model(folder.file("m"));
      EXPECT_TRUE(m.posterior.masked);
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
  Model m = model_of(memory.device(), Family::multiplicative);
  m.posterior.masked = true;
  initialise(memory.device(), m, {});
  Arena arena;
  const auto posterior = posterior_of(memory.device(), arena, m);
  posterior->mask(some_pruned(posterior->store().layout()));
  keep(m, *posterior);
  const TensorFile plain = mean_network(memory.device(), m);
  const std::vector<float> first = plain.at("fc1.weight").as<float>(), second = plain.at("fc2.weight").as<float>();
  for (size_t i = 0; i < first.size(); i++) ASSERT_EQ(first[i] == 0, i % 2 == 0) << i;
  for (size_t i = 0; i < second.size(); i++) ASSERT_EQ(second[i] == 0, i % 3 == 0) << i;
}

TEST(MaskedPosterior, Refuses) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Model m = model_of(memory.device(), Family::gaussian);
  Arena arena;
  const size_t parameters = m.architecture.network()()->layout().parameters();
  expect_refusal(refusal([&] { posterior_of(memory.device(), arena, m)->mask(std::vector<uint8_t>(parameters)); }),
                 {"without masks"});
  m.posterior.masked = true;
  expect_refusal(refusal([&] { posterior_of(memory.device(), arena, m); }), {"mask", "missing"});
  initialise(memory.device(), m, {});
  expect_refusal(refusal([&] { posterior_of(memory.device(), arena, m)->mask(std::vector<uint8_t>(parameters - 1)); }),
                 {std::to_string(parameters)});
  Model cfg = model_of(memory.device(), Family::channel);
  cfg.posterior.masked = true;
  expect_refusal(refusal([&] { posterior_of(memory.device(), arena, cfg); }), {"cfg", "covariance"});
}

}  // namespace
}  // namespace baton::test
