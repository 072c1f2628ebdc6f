// Models as files: what a file holds, what is no model, and what goes on from one.
#include "trainers/model.h"

#include <cstring>
#include <fstream>
#include <functional>

#include "engine/io/files.h"
#include "tests/support/device.h"
#include "tests/support/models.h"

namespace baton::test {
namespace {

const char* const kinds[] = {"ft", "ffg", "cfg", "mnf"};

std::string bytes_of(const fs::path& path) {
  const std::vector<uint8_t> bytes = read_file(path);
  return {bytes.begin(), bytes.end()};
}

// ------------------------------------------------------------------------------------------------------- the file
// Everything that the file of a model of these kinds keeps.
void expect_same_models(const Model& n, const Model& m) {
  expect_same_arrays(m.arrays, n.arrays);
  EXPECT_EQ(n.network.description(), m.network.description());
  EXPECT_EQ(n.network.options, m.network.options);
  EXPECT_EQ(n.kind, m.kind);
  EXPECT_EQ(n.masked, m.masked);
  EXPECT_EQ(n.settings, m.settings);
  EXPECT_EQ(n.normalisation.scale[0], m.normalisation.scale[0]);
  EXPECT_EQ(n.normalisation.shift[0], m.normalisation.shift[0]);
  EXPECT_EQ(n.precision, m.precision);
  EXPECT_EQ(n.class_names, m.class_names);
  EXPECT_EQ(training_json(n), training_json(m));
  EXPECT_EQ(n.rule, m.rule);
  EXPECT_EQ(n.draws, m.draws);
  EXPECT_EQ(n.batch, m.batch);
  EXPECT_EQ(n.epochs, m.epochs);
  EXPECT_EQ(n.seed, m.seed);
  EXPECT_EQ(n.step, m.step);
  EXPECT_EQ(n.origin, m.origin);
  EXPECT_EQ(n.history, m.history);
  EXPECT_EQ(n.pruned, m.pruned);
  EXPECT_EQ(fingerprint(m), fingerprint(n));
}

TEST(Model, RoundTripOfEveryFamily) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Folder folder;
  for (const char* kind : {"ft", "ffg", "cfg", "mnf", "bgd", "bbb", "sgd", "adam", "si", "ewc"}) {
    SCOPED_TRACE(kind);
    const Model m = model_of(memory.device(), kind);
    save_model(folder.file("a"), m);
    save_model(folder.file("b"), m);
    const std::string bytes = bytes_of(folder.file("a"));
    EXPECT_EQ(bytes, bytes_of(folder.file("b")));
    Arena arena;
    const LoadedModel loaded = load_model(memory.device(), arena, folder.file("a"));
    const Model& n = loaded.model;
    save_model(folder.file("c"), n);
    EXPECT_TRUE(bytes == bytes_of(folder.file("c")));
    expect_same_models(n, m);
    EXPECT_EQ(n.find_stage(0x00c0ffee00c0ffeeull), 1);
    EXPECT_EQ(n.find_stage(1), 0);
    EXPECT_EQ(n.uncertain(), loaded.posterior->uncertain());
    expect_same_models(read_model(folder.file("a")), m);

    // The posterior has the arrays, and gives them back: from a standard deviation where it holds no logarithm of it.
    Model again = n;
    keep(again, *loaded.posterior);
    const bool has_deviations = kind == std::string("bgd") || kind == std::string("bbb");
    for (auto& [name, tensor] : again.arrays.tensors) {
      if (!has_deviations || !name.ends_with(".log_std")) continue;
      EXPECT_TRUE(close(tensor.as<float>(), m.arrays.at(name).as<float>(), {.l2 = 1e-6})) << name;
      tensor = m.arrays.at(name);
    }
    expect_same_arrays(m.arrays, again.arrays);
    EXPECT_EQ(loaded.posterior->kind().name, std::string(kind));
  }
}

// A file that says nothing of it is fp32, as all were before there was another precision.
TEST(Model, KeepsItsPrecision) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Folder folder;
  Model m = model_of(memory.device(), "ffg");
  save_model(folder.file("fp32"), m);
  EXPECT_FALSE(load_safetensors(folder.file("fp32")).metadata.contains("precision"));
  EXPECT_EQ(read_model(folder.file("fp32")).precision, Precision::fp32);
  m.precision = Precision::tf32;
  save_model(folder.file("tf32"), m);
  expect_same_models(read_model(folder.file("tf32")), m);
  TensorFile file = load_safetensors(folder.file("tf32"));
  EXPECT_EQ(file.metadata.at("precision"), "tf32");
  file.metadata["precision"] = "fp16";
  save_safetensors(folder.file("fp16"), file);
  expect_says(refusal([&] { read_model(folder.file("fp16")); }), {folder.file("fp16").string(), "'fp16'", "tf32"});
}

// A file of the version before this one (baton-model-1): the posterior's options and a training's settings were apart,
// and some had other names.
TensorFile as_version_1(TensorFile file, bool log_sd) {
  const std::string kind = file.metadata.at("kind");
  const json training = json::parse(file.metadata.at("training")), settings = training.at("settings");
  json network = json::parse(file.metadata.at("architecture"));
  network["hidden"] = network["options"].value("hidden", json::array());
  network.erase("options");
  json posterior = json::object();
  for (const char* option : {"groups", "moments", "flow", "flow_steps", "flow_hidden", "fixed_base", "path_gradient"})
    if (settings.contains(option)) posterior[option] = settings[option];
  if (kind == "mnf") posterior["z_per_filter"] = settings["z"] == "per-filter";
  if (kind == "mnf") posterior[log_sd ? "z_log_sd" : "z_log_std"] = settings["z_log_std"];
  posterior["masked"] = file.metadata.at("masked") == "true";
  json before{{"rule", training["rule"]},
              {"epochs", training["epochs"]},
              {"batch", training["batch"]},
              {"draws", training["draws"]}};
  // A point estimate had settings of a posterior, too.
  const json standard{{"lr_scale", 0.01},     {"scale_rule", "adam"}, {"beta", 1.0},
                      {"warmup_epochs", 0.0}, {"prior_sd", 1.0},      {"init_log_std", -5.0}};
  for (const char* option : {"lr", "schedule"}) before[option] = settings[option];
  for (const auto& [name, value] : standard.items()) {
    const bool renamed = log_sd && name == "init_log_std";
    before[renamed ? "init_log_sd" : name] = settings.value(name, value);
  }
  file.metadata.erase("kind");
  file.metadata.erase("masked");
  file.metadata["format"] = "baton-model-1";
  file.metadata["architecture"] = network.dump();
  file.metadata["family"] = kind;
  file.metadata["posterior"] = posterior.dump();
  file.metadata["training"] = before.dump();
  return file;
}

TEST(Model, ReadsTheVersionBefore) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Folder folder;
  const fs::path path = folder.file("old");
  for (const char* kind : kinds)
    for (bool masked : {false, true}) {
      if (masked && kind == std::string("cfg")) continue;
      SCOPED_TRACE(kind + std::string(masked ? ", pruned" : ""));
      Model m = model_of(memory.device(), kind);
      if (masked) {
        m.masked = true;
        initialise(memory.device(), m);
        m.arrays.tensors["fc1.weight.mask"].bytes[5] = 0;
      }
      save_model(path, m);
      save_safetensors(path, as_version_1(load_safetensors(path), !masked));
      Arena arena;
      const LoadedModel loaded = load_model(memory.device(), arena, path);
      expect_same_models(loaded.model, m);
      expect_same_models(read_model(path), m);
      const auto posterior = make_posterior(memory.device(), arena, m);
      for (const StateArray& a : posterior->state())
        for (const TensorSpec& t : a.store->layout().tensors()) {
          const auto other = std::find_if(
              loaded.posterior->state().begin(), loaded.posterior->state().end(), [&](const StateArray& b) {
                return b.array == a.array && b.store->layout().stride() == a.store->layout().stride();
              });
          ASSERT_NE(other, loaded.posterior->state().end());
          EXPECT_EQ(other->store->read(memory.device(), a.array, 0, t), a.store->read(memory.device(), a.array, 0, t))
              << t.name << "." << a.array;
        }
      EXPECT_EQ(loaded.posterior->kl(), posterior->kl());
      // Saved again, it is of this version, and says the same.
      save_model(path, loaded.model);
      EXPECT_EQ(load_safetensors(path).metadata.at("format"), "baton-model-2");
      expect_same_models(read_model(path), m);
    }
  // By Bayesian gradient descent.
  Model m = model_of(memory.device(), "ffg");
  m.rule = "bgd", m.draws = 3;
  save_model(path, m);
  const TensorFile old = as_version_1(load_safetensors(path), true);
  save_safetensors(path, old);
  expect_same_models(read_model(path), m);
  // What is wrong in it is named as in a file of this version.
  for (const auto& [key, text] : std::vector<std::pair<std::string, std::string>>{{"family", "none"},
                                                                                  {"posterior", "[]"},
                                                                                  {"posterior", "{\"masked\": 1}"},
                                                                                  {"training", "{}"},
                                                                                  {"architecture", "{}"}}) {
    TensorFile file = old;
    file.metadata[key] = text;
    save_safetensors(path, file);
    expect_says(refusal([&] { read_model(path); }), {path.string(), key == "family" ? "none" : "\"" + key + "\""});
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
  const Model m = model_of(memory.device(), "ffg");
  save_model(path, m);
  const TensorFile good = load_safetensors(path);
  const auto refused = [&](const std::function<void(TensorFile&)>& change) {
    TensorFile file = good;
    change(file);
    save_safetensors(path, file);
    return refusal([&] {
      Arena arena;
      load_model(memory.device(), arena, path);
    });
  };
  const std::string name = path.string();
  Arena arena;
  const auto posterior = make_posterior(memory.device(), arena, m);
  EXPECT_EQ(refused([](TensorFile&) {}), nothing_refused);
  expect_says(refused([](TensorFile& f) { f.metadata["format"] = "baton-model-3"; }),
              {name, "another version", "baton-model-3", "baton-model-2"});
  expect_says(refused([](TensorFile& f) { f.metadata["format"] = "baton-training-3"; }),
              {name, "an update that has not ended", "--resume"});
  expect_says(refused([](TensorFile& f) { f.metadata["format"] = "baton-pretrained-1"; }),
              {name, "plain network's weights", "baton init --from"});
  expect_says(refused([&](TensorFile& f) { f = mean_network(memory.device(), *posterior); }),
              {name, "plain network's weights", "baton init --from"});
  expect_says(refused([](TensorFile& f) { f.metadata["format"] = "pt"; }), {name, "no model", "'pt'"});
  expect_says(refused([](TensorFile& f) { f.metadata["format"] = "baton-posterior-1"; }), {name, "tools/from-pytorch"});
  expect_says(refused([](TensorFile& f) { f.metadata.erase("format"); }), {name, "no \"format\""});
  expect_says(refused([](TensorFile& f) { f.tensors.erase("fc2.weight.log_std"); }), {name, "fc2.weight.log_std"});
  expect_says(
      refused([](TensorFile& f) { f.tensors["fc1.bias.mean"] = Tensor::of<float>(std::vector<float>(11), {11}); }),
      {name, "fc1.bias.mean", "[11]", "[12]"});
  expect_says(
      refused([](TensorFile& f) { f.tensors["fc1.bias.mean"] = Tensor::of<int32_t>(std::vector<int32_t>(12), {12}); }),
      {name, "fc1.bias.mean", "I32"});
  for (const char* tensor : {"fc1.weight.mean", "fc3.bias.log_std", "fc2.weight.prior_mean", "fc2.bias.prior_log_std"})
    for (float bad : {NAN, INFINITY})
      expect_says(refused([&](TensorFile& f) {
                    std::vector<float> values = f.at(tensor).as<float>();
                    values.back() = bad;
                    f.tensors[tensor] = Tensor::of<float>(std::span<const float>(values), f.at(tensor).shape);
                  }),
                  {name, tensor, "not finite"});
  // Another architecture's tensors.
  expect_says(refused([](TensorFile& f) {
                json a = json::parse(f.metadata["architecture"]);
                a["options"]["hidden"] = {12, 8};
                f.metadata["architecture"] = a.dump();
              }),
              {name, "fc2.weight.mean", "[7, 12]", "[8, 12]"});
  expect_says(refused([](TensorFile& f) {  // before anything of this size is allocated
                json a = json::parse(f.metadata["architecture"]);
                a["options"]["hidden"] = std::vector<int>(16, 65536);
                f.metadata["architecture"] = a.dump();
              }),
              {name, "fc1.weight.mean", "[65536, 30]"});
  expect_says(refused([](TensorFile& f) {
                f.metadata["architecture"] =
                    R"({"name":"lenet5","classes":10,"channels":1,"height":28,"width":28,"options":{}})";
              }),
              {name, "conv1.weight.mean"});
  expect_says(refused([](TensorFile& f) { f.metadata["kind"] = "mnf"; }), {name, "fc1.z"});
  expect_says(refusal([&] { read_model(folder.file("none")); }), {folder.file("none").string()});
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
  for (const char* kind : {"ffg", "mnf"}) {
    const Model m = model_of(memory.device(), kind);
    save_model(path, m);
    const TensorFile good = load_safetensors(path);
    const std::string bytes = bytes_of(path);
    const auto check = [&](const std::string& key, const std::string& text, bool must_fail) {
      SCOPED_TRACE(key + " = " + text);
      write_with(path, bytes, key, text);
      Model loaded;
      const std::string got = refusal([&] {
        loaded = read_model(path);
        if (key != "masked" && key != "training" && key != "architecture") return;
        Arena arena;
        make_posterior(memory.device(), arena, loaded);
      });
      if (got == nothing_refused) {
        EXPECT_FALSE(must_fail);
        // What has been let in can be used.
        EXPECT_EQ(refusal([&] {
                    loaded.find_stage(1);
                    fingerprint(loaded);
                    data_options(loaded);
                    training_json(loaded);
                  }),
                  nothing_refused);
      } else {
        // Other options of the network or the posterior make it look for other tensors, as "masked" does for masks.
        const bool of_another = got.find("tensor '") != std::string::npos &&
                                (key == "architecture" || key == "training" || key == "masked");
        expect_says(got, {path.string(), of_another ? "tensor '" : "\"" + key + "\""});
      }
    };
    for (const auto& [key, text] : good.metadata) {
      if (key == "format") continue;
      write_with(path, bytes, key, nullptr);
      expect_says(refusal([&] { read_model(path); }), {path.string(), "no \"" + key + "\""});
      if (key == "kind") continue;
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
            // What is left out of a schema's options has the standard value.
            const bool has_standard = &of != &whole && (key == "training" || key == "architecture");
            check(key, rebuilt(copy).dump(), !has_standard && name != "options");
          }
          if (value.is_structured()) self(value, with, self);
        }
      };
      each(
          whole, [](const json& j) { return j; }, each);
    }
    write_with(path, bytes, "step", "0");
    EXPECT_EQ(refusal([&] { read_model(path); }), nothing_refused);
    for (const char* name : {"", "FFG", "ffg ", "{}"}) {
      write_with(path, bytes, "kind", name);
      expect_says(refusal([&] { read_model(path); }),
                  {path.string(), "ft, ffg, cfg, mnf, bgd, bbb, sgd, adam, si or ewc"});
    }
  }
}

TEST(Model, FingerprintTellsEverythingApart) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  const Model m = model_of(memory.device(), "mnf");
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
      [](Model& n) { n.network.classes++; },
      [](Model& n) { n.network.options["hidden"][0] = 13; },
      [](Model& n) { n.settings["flow_steps"] = 4; },
      [](Model& n) { n.kind = "ffg"; },
      [](Model& n) { n.masked = true; },
      [](Model& n) { n.normalisation.scale[0] = std::nextafter(n.normalisation.scale[0], 1.f); },
      [](Model& n) { n.normalisation.shift[0] = 0; },
      [](Model& n) { n.precision = Precision::tf32; },
      [](Model& n) { n.class_names[0] = "c"; },
      [](Model& n) { n.settings["beta"] = std::nextafter(double(n.settings["beta"]), 1.0); },
      [](Model& n) { n.settings["scale_rule"] = "adam"; },
      [](Model& n) { n.rule = "bgd"; },
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
TensorShapes plain_network(const NetworkSpec& spec) {
  TensorShapes shapes;
  const auto network = make_network(spec);
  for (const TensorSpec& t : network->layout().tensors()) shapes[t.name] = t.shape;
  return shapes;
}

TEST(Model, RecognisesArchitectures) {
  const auto expect_recognised = [](const NetworkSpec& a) {
    const NetworkSpec b = recognise_network(plain_network(a), "net.safetensors");
    EXPECT_EQ(b.description(), a.description());
    EXPECT_EQ(std::string(make_network(b)->architecture()), make_network(a)->architecture());
  };
  for (const char* name : {"lenet5", "3conv3fc", "vgg11", "task-cnn"})
    for (int classes : {2, 10, 47, 256}) expect_recognised(network_spec(name, classes));
  expect_recognised(network_spec("task-cnn", 10, {{"heads", 6}}));
  struct Case {
    std::vector<int> hidden;
    int classes;
    ImageShape image;
  };
  for (const Case& c : std::vector<Case>{{{400, 400}, 10, {1, 28, 28}},
                                         {{5}, 2, {1, 28, 28}},
                                         {{7, 3, 9, 1}, 256, {1, 9, 9}},
                                         {{20}, 3, {3, 32, 32}},
                                         {{2}, 7, {1, 1, 1}}}) {
    NetworkSpec a = network_spec("mlp", c.classes, {{"hidden", c.hidden}});
    a.image = c.image;
    expect_recognised(a);
  }
  EXPECT_EQ(network_spec("lenet5").description(), "lenet5, 28 x 28 grey images, 10 classes");
  EXPECT_EQ(network_spec("3conv3fc").description(), "3conv3fc, 32 x 32 colour images, 10 classes");
  EXPECT_EQ(small_mlp().description(), "mlp 12-7, 5 x 6 grey images, 4 classes");
}

TEST(Model, NamesTheTensorThatFitsNone) {
  const auto refused = [](const std::string& name, const std::function<void(TensorShapes&)>& change) {
    TensorShapes shapes = plain_network(network_spec(name));
    change(shapes);
    return refusal([&] { recognise_network(shapes, "net.safetensors"); });
  };
  const auto set = [](const std::string& tensor, std::vector<int64_t> shape) {
    return [=](TensorShapes& shapes) { shapes[tensor] = shape; };
  };
  expect_says(refused("lenet5", set("conv2.weight", {50, 20, 3, 3})),
              {"net.safetensors", "nearest is lenet5", "conv2.weight", "[50, 20, 3, 3]", "[50, 20, 5, 5]"});
  expect_says(refused("3conv3fc", set("fc1.bias", {7})), {"nearest is 3conv3fc", "fc1.bias", "[7]"});
  expect_says(refused("vgg11", [](TensorShapes& s) { s.erase("conv8.bias"); }),
              {"nearest is vgg11", "conv8.bias", "missing"});
  expect_says(refused("lenet5", set("bn1.weight", {20})), {"nearest is lenet5", "more tensors"});
  expect_says(refused("mlp", set("fc2.weight", {400, 401})), {"nearest is mlp", "fc2.weight", "[400, 401]"});
  expect_says(refused("mlp", set("fc3.bias", {300})), {"nearest is mlp", "fc3.bias", "[300]"});
  expect_says(refused("mlp", set("fc1.weight", {400, 30})), {"fc1.weight", "[400, 30]"});  // no square image
  expect_says(refused("mlp", set("fc1.weight", {0, 784})), {"fits none"});
  expect_says(refused("lenet5", [](TensorShapes& s) { s.clear(); }), {"fits none"});
  expect_says(refused("mlp",
                      [](TensorShapes& s) {
                        s = {{"fc1.weight", {2, 2}}, {"fc2.weight", {2, 2}}};
                      }),
              {"fits none", "missing"});
}

TEST(Model, RefusesArchitectures) {
  const auto refused = [](const std::string& name, const std::function<void(NetworkSpec&)>& change) {
    NetworkSpec spec = network_spec(name);
    change(spec);
    return refusal([&] { make_network(spec); });
  };
  expect_says(refusal([] { network_spec("resnet"); }), {"resnet", "lenet5, 3conv3fc, vgg11, mlp or task-cnn"});
  expect_says(refused("lenet5", [](NetworkSpec& a) { a.image.channels = 3; }), {"28 x 28 grey", "28 x 28 colour"});
  expect_says(refused("vgg11", [](NetworkSpec& a) { a.image.width = 31; }), {"32 x 32 colour", "32 x 31"});
  expect_says(refused("lenet5", [](NetworkSpec& a) { a.options["hidden"] = {5}; }), {"lenet5", "hidden"});
  for (int classes : {-1, 0, 1, 257})
    expect_says(refused("mlp", [&](NetworkSpec& a) { a.classes = classes; }), {"2 to 256", std::to_string(classes)});
  for (int layers : {0, 17})
    expect_says(refused("mlp", [&](NetworkSpec& a) { a.options["hidden"] = std::vector<int>(layers, 5); }),
                {"16 hidden"});
  expect_says(refused("mlp", [](NetworkSpec& a) { a.options["hidden"] = {5, 0}; }), {"65536", "[5,0]"});
  expect_says(refused("mlp", [](NetworkSpec& a) { a.image.channels = 2; }), {"1 or 3 channels"});
  expect_says(refused("mlp", [](NetworkSpec& a) { a.image.height = 0; }), {"1024"});
}

// ------------------------------------------------------------------------------------------------ what it begins with
TEST(Model, BeginsWithPretrainedWeights) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  for (const std::string kind : kinds) {
    SCOPED_TRACE(kind);
    Model m = model_of(memory.device(), kind);
    if (kind != "ft")
      m.settings["init_log_std"] = -2;  // wider than one pretrained tensor's prior, narrower than the other's
    const auto network = make_network(m.network);
    const auto& tensors = network->layout().tensors();
    const TensorSpec &one = tensors[0], &laplace = tensors[2];
    Pretrained pretrained;
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    for (const TensorSpec* t : {&one, &laplace})
      for (size_t i = 0; i < t->size; i++) pretrained.weights[t->name].push_back(normal(random));
    for (size_t i = 0; i < laplace.size; i++)
      pretrained.prior_log_std[laplace.name].push_back(i % 2 ? -1.f : -3.f + 0.1f * normal(random));
    initialise(memory.device(), m, &pretrained, 0.05);

    Arena arena;
    const auto posterior = make_posterior(memory.device(), arena, m);
    posterior->mean_log_std();  // brings cfg's marginals into log_std
    for (const TensorSpec& t : tensors) {
      SCOPED_TRACE(t.name);
      const bool adopted = pretrained.weights.count(t.name);
      const auto read = [&](const char* array) { return posterior->store().read(memory.device(), array, 0, t); };
      if (adopted) {
        EXPECT_EQ(read("mean"), pretrained.weights[t.name]);
      }
      if (kind == "ft") continue;
      EXPECT_EQ(read("prior_mean"), adopted ? pretrained.weights[t.name] : std::vector<float>(t.size, 0));
      const std::vector<float> prior = read("prior_log_std"), sd = read("log_std");
      for (size_t i = 0; i < t.size; i++)
        ASSERT_FLOAT_EQ(prior[i], t.name == laplace.name ? pretrained.prior_log_std[t.name][i]
                                                         : float(std::log(adopted ? 0.05 : 0.7)));
      for (size_t i = 0; i < t.size; i++) ASSERT_NEAR(sd[i], std::min(-2.f, prior[i]), kind == "cfg" ? 1e-5 : 0);
    }
    EXPECT_TRUE(std::isfinite(posterior->kl()[0]));

    const std::string before = fingerprint(m), fresh = tensors[4].name + ".mean";  // the seed decides everything
    const std::vector<uint8_t> drawn = m.arrays.at(fresh).bytes;
    initialise(memory.device(), m, &pretrained, 0.05);
    EXPECT_EQ(fingerprint(m), before);
    m.seed--;
    initialise(memory.device(), m, &pretrained, 0.05);
    EXPECT_NE(m.arrays.at(fresh).bytes, drawn);
    pretrained.weights["fc9.weight"] = {1};
    expect_says(refusal([&] { initialise(memory.device(), m, &pretrained, 0.05); }), {"fc9.weight"});
    pretrained.weights.erase("fc9.weight");
    pretrained.weights[one.name].pop_back();
    expect_says(refusal([&] { initialise(memory.device(), m, &pretrained, 0.05); }), {one.name});
  }
}

TEST(Model, MeanNetworkIsAPlainNetwork) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  for (const std::string kind : kinds) {
    SCOPED_TRACE(kind);
    const Model m = model_of(memory.device(), kind);
    Arena arena;
    const auto posterior = make_posterior(memory.device(), arena, m);
    const TensorFile plain = mean_network(memory.device(), *posterior);
    const ParameterLayout& layout = posterior->store().layout();
    float* w = arena.take<float>(layout.stride());
    posterior->mean_weights(w, 0);
    const std::vector<float> flat = download(memory.device(), w, layout.stride());
    ASSERT_EQ(plain.tensors.size(), layout.tensors().size());
    TensorShapes shapes;
    for (const TensorSpec& t : layout.tensors()) {
      shapes[t.name] = plain.at(t.name).shape;
      const std::vector<float> got = plain.at(t.name, t.shape).as<float>();
      EXPECT_EQ(got, std::vector<float>(flat.begin() + long(t.offset), flat.begin() + long(t.offset + t.size)));
      if (kind != "mnf") {
        EXPECT_EQ(got, m.arrays.at(t.name + ".mean").as<float>());
      }
    }
    if (kind == "cfg") {
      EXPECT_EQ(recognise_network(shapes, "").description(), m.network.description());
    }
  }
}

TEST(Model, ClassesOfDataMustFit) {
  Model m;
  m.network = small_mlp();
  OwnData data;
  data.images.count = 3, data.images.labels = {0, 3, 4};
  check_classes(m, data);
  data.labelled = true;
  expect_says(refusal([&] { check_classes(m, data); }), {"label 4", "image 2", "4 classes"});
  data.images.labels[2] = 3;
  check_classes(m, data);
  const OwnDataOptions o = data_options(m);
  EXPECT_EQ((std::vector{o.channels, o.height, o.width, o.classes}), (std::vector{1, 5, 6, 4}));
}

// ------------------------------------------------------------------------------------------------------------ training
// Under MNF the first stage's prior of z is another function of its arrays than later ones; a model that has learned
// one stage still answers to it.
TEST(Model, KlIsTheTrainersKl) {
  BATON_NEEDS_DEVICE();
  for (const char* kind : {"ffg", "mnf"})
    for (int stages : {1, 2}) {
      SCOPED_TRACE(testing::Message() << kind << ", " << stages << " stages");
      Memory memory;
      Model m = model_of(memory.device(), kind);
      m.history = json::array(), m.step = 0;
      initialise(memory.device(), m);
      Lesson lesson(m, "adam", stages);
      lesson.learn();
      keep(m, lesson.trainer->posterior());
      for (int s = 0; s < stages; s++) m.history.push_back({{"stage", s + 1}, {"data", ""}});
      Arena arena;
      EXPECT_EQ(make_posterior(memory.device(), arena, m)->kl_by_name(), lesson.trainer->posterior().kl_by_name());
    }
}

}  // namespace
}  // namespace baton::test
