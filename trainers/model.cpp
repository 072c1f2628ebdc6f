#include "trainers/model.h"

namespace baton {

namespace {

constexpr const char* model_format = "baton-model-2";
constexpr const char* format_before = "baton-model-1";

// Metadata is read with care: a file is somebody's.
class Metadata {
 public:
  explicit Metadata(const TensorFile& file) : file_(file) {}
  std::string text(const std::string& key) const {
    const auto found = file_.metadata.find(key);
    if (found == file_.metadata.end()) throw InputError(file_.path + ": no \"" + key + "\" in the metadata");
    return found->second;
  }
  json object(const std::string& key) const {
    const json j = json::parse(text(key), nullptr, false);
    if (j.is_discarded()) throw InputError(file_.path + ": \"" + key + "\" in the metadata is not JSON");
    return j;
  }
  // What a reading throws becomes an InputError that names the file and the key.
  template <class F>
  void read(const std::string& key, F f) const {
    const json j = object(key);
    try {
      f(j);
    } catch (const std::exception& e) {
      throw InputError(file_.path + ": \"" + key + "\" in the metadata: " + e.what());
    }
  }
  uint64_t number(const std::string& key, uint64_t most) const {
    const json j = object(key);
    if (!j.is_number_unsigned() || j.get<uint64_t>() > most)
      throw InputError(file_.path + ": \"" + key + "\" in the metadata is '" + text(key) +
                       "', expected a whole number from 0 to " + std::to_string(most));
    return j.get<uint64_t>();
  }

 private:
  const TensorFile& file_;
};

// Strictly: nlohmann's own conversions cut 1.5, wrap 2^40 and take true for 1.
int whole(const json& j, const char* key, int least, int most) {
  const json& value = j.at(key);
  check_option(whole_option(key, least, {double(least), double(most)}, ""), value, "'" + std::string(key) + "'");
  return value.get<int>();
}
double real(const json& value, const char* key) {
  check_option(number_option(key, 0, {}, ""), value, "'" + std::string(key) + "'");
  return value.get<double>();
}

const json& object(const json& value, const char* key) {
  if (!value.is_object()) throw InputError("'" + std::string(key) + "' is no object");
  return value;
}

void read_network(const json& j, NetworkSpec& spec) {
  spec.name = j.at("name");
  spec.classes = whole(j, "classes", 2, 256);
  spec.image = {whole(j, "channels", 1, 3), whole(j, "height", 1, 1024), whole(j, "width", 1, 1024)};
  const NetworkKind& kind = find_network(spec.name);
  json options = j.contains("options") ? object(j["options"], "options") : json::object();
  if (j.contains("hidden") && find_option(kind.options, "hidden")) options["hidden"] = j["hidden"];  // format_before
  spec.options = complete_options(kind.options, options, spec.name);
  make_network(spec);  // it says what does not fit
}

// In format_before the options of the posterior and the settings of a training were apart, and some had other names.
json settings_of_before(const PosteriorKind& kind, const json& posterior, const json& training) {
  json all = training;
  all.update(posterior);
  for (const auto& [before, now] : {std::pair{"z_log_sd", "z_log_std"}, {"init_log_sd", "init_log_std"}})
    if (all.contains(before)) all[now] = all[before];
  if (all.contains("z_per_filter")) all["z"] = all["z_per_filter"] == true ? "per-filter" : "per-channel";
  json kept = json::object();
  for (const Option& option : kind.options)
    if (all.contains(option.name)) kept[option.name] = all[option.name];
  return kept;
}

void read_training(const Metadata& metadata, bool before, Model& m) {
  const PosteriorKind& kind = find_posterior(m.kind);
  metadata.read("training", [&](const json& j) {
    const json& rule = j.at("rule");
    if (rule != "elbo" && rule != "bgd") throw InputError("unknown rule " + rule.dump() + ": elbo or bgd");
    m.rule = rule;
    m.draws = whole(j, "draws", 1, 1000);
    m.batch = whole(j, "batch", 1, 1 << 20);
    m.epochs = real(j.at("epochs"), "epochs");
    const json settings =
        before ? settings_of_before(kind, metadata.object("posterior"), j) : object(j.at("settings"), "settings");
    m.settings = complete_options(kind.options, settings, m.kind);
  });
}

// Everything but the arrays.
std::map<std::string, std::string> list_metadata(const Model& m) {
  std::map<std::string, std::string> to;
  const NetworkSpec& n = m.network;
  to["format"] = model_format;
  to["architecture"] = json({{"name", n.name},
                             {"classes", n.classes},
                             {"channels", n.image.channels},
                             {"height", n.image.height},
                             {"width", n.image.width},
                             {"options", n.options}})
                           .dump();
  to["kind"] = m.kind;
  to["masked"] = m.masked ? "true" : "false";
  const int c = n.image.channels;
  to["normalisation"] = json({{"scale", std::vector<float>(m.normalisation.scale, m.normalisation.scale + c)},
                              {"shift", std::vector<float>(m.normalisation.shift, m.normalisation.shift + c)}})
                            .dump();
  // Not where it is fp32, so that the fingerprints of models stay what they were before there was another precision.
  if (m.precision != Precision::fp32) to["precision"] = name(m.precision);
  to["class_names"] = json(m.class_names).dump();
  to["training"] =
      json({{"rule", m.rule}, {"epochs", m.epochs}, {"batch", m.batch}, {"draws", m.draws}, {"settings", m.settings}})
          .dump();
  to["seed"] = std::to_string(m.seed);
  to["step"] = std::to_string(m.step);
  to["origin"] = m.origin.dump();
  to["history"] = m.history.dump();
  to["pruned"] = m.pruned.dump();
  return to;
}

// What a file is that is no model of this version.
void check_format(const TensorFile& file) {
  const auto found = file.metadata.find("format");
  const std::string format = found == file.metadata.end() ? "" : found->second;
  if (format == model_format || format == format_before) return;
  const std::string who = file.path + " is no model: ";
  if (format.rfind("baton-model-", 0) == 0)
    throw InputError(file.path + " was written by another version of Baton (format " + format +
                     "; this version reads " + model_format + ")");
  if (format.rfind("baton-training-", 0) == 0)
    throw InputError(who +
                     "it is the checkpoint of an update that has not ended (go on with it: baton update --resume)");
  if (format == "baton-pretrained-1" || file.has("conv1.weight") || file.has("fc1.weight"))
    throw InputError(who + "it holds a plain network's weights (baton init --from makes a model of it)");
  if (format == "baton-posterior-1")
    throw InputError(who + "an earlier version saved it (tools/from-pytorch takes its means for baton init --from)");
  throw InputError(who + (format.empty() ? "it has no \"format\" in its metadata" : "its format is '" + format + "'"));
}

}  // namespace

bool Model::uncertain() const { return arrays.has(make_network(network)->layout()[0].name + ".log_std"); }

int Model::find_stage(uint64_t content) const {
  const std::string hash = hash_text(content);
  for (size_t i = 0; i < history.size(); i++)
    if (history[i].value("data", "") == hash) return int(i) + 1;
  return 0;
}

Model new_model(const NetworkSpec& network, const std::string& kind) {
  Model m;
  m.network = network;
  m.kind = kind;
  m.settings = complete_options(find_posterior(kind).options, json::object(), kind);
  return m;
}

json training_json(const Model& m) {
  json j{{"rule", m.rule}, {"epochs", m.epochs}, {"batch", m.batch}, {"draws", m.draws}};
  if (m.precision != Precision::fp32) j["precision"] = name(m.precision);
  j.update(m.settings);
  return j;
}

Model read_model(const std::filesystem::path& path) {
  TensorFile file = load_safetensors(path);
  check_format(file);
  const Metadata metadata(file);
  const bool before = metadata.text("format") == format_before;
  Model m;
  metadata.read("architecture", [&](const json& j) { read_network(j, m.network); });
  // Before anything is allocated by what the metadata claim: the tensors are there.
  const std::unique_ptr<Network> network = make_network(m.network);
  for (const TensorSpec& t : network->layout().tensors()) file.at(t.name + ".mean", t.shape);
  m.kind = metadata.text(before ? "family" : "kind");
  try {
    find_posterior(m.kind);
    if (file.metadata.contains("precision")) m.precision = parse_precision(metadata.text("precision"));
  } catch (const InputError& e) {
    throw InputError(file.path + ": " + e.what());
  }
  metadata.read(before ? "posterior" : "masked", [&](const json& j) { m.masked = before ? j.at("masked") : j; });
  read_training(metadata, before, m);
  metadata.read("normalisation", [&](const json& j) {
    const size_t channels = size_t(m.network.image.channels);
    const json &scale = j.at("scale"), &shift = j.at("shift");
    if (!scale.is_array() || !shift.is_array() || scale.size() != channels || shift.size() != channels)
      throw InputError("it is not of " + std::to_string(channels) + " channels");
    for (size_t c = 0; c < channels; c++) {
      m.normalisation.scale[c] = float(real(scale[c], "scale"));
      m.normalisation.shift[c] = float(real(shift[c], "shift"));
    }
  });
  metadata.read("class_names", [&](const json& j) {
    if (!j.is_array()) throw InputError("it is no list");
    m.class_names = j.get<std::vector<std::string>>();
    if (int(m.class_names.size()) > m.network.classes) throw InputError("more names than classes");
  });
  m.seed = metadata.number("seed", UINT64_MAX);
  m.step = uint32_t(metadata.number("step", UINT32_MAX));
  m.origin = metadata.object("origin");
  metadata.read("history", [&](const json& j) {
    if (!j.is_array()) throw InputError("it is not a list");
    for (const json& stage : j) {
      if (!stage.is_object()) throw InputError("it holds what is no stage");
      for (const char* key : {"data", "parent"})
        if (stage.contains(key) && !stage[key].is_string())
          throw InputError("a stage's '" + std::string(key) + "' is no text");
    }
    m.history = j;
  });
  m.pruned = metadata.object("pruned");
  m.arrays = std::move(file);
  return m;
}

LoadedModel load_model(Device& device, Arena& arena, const std::filesystem::path& path) {
  LoadedModel loaded{read_model(path), nullptr};
  loaded.posterior = make_posterior(device, arena, loaded.model);  // the tensors are all there, and finite
  return loaded;
}

void save_model(const std::filesystem::path& path, const Model& m) {
  TensorFile file = m.arrays;
  file.metadata = list_metadata(m);
  save_safetensors(path, file);
}

std::string fingerprint(const Model& m) {
  uint64_t hash = 0xcbf29ce484222325ull;
  const auto add = [&](const void* bytes, size_t n) {
    for (size_t i = 0; i < n; i++) hash = (hash ^ static_cast<const uint8_t*>(bytes)[i]) * 0x100000001b3ull;
  };
  for (const auto& [key, text] : list_metadata(m)) add(key.data(), key.size()), add(text.data(), text.size());
  for (const auto& [name, tensor] : m.arrays.tensors) {
    add(name.data(), name.size());
    add(tensor.bytes.data(), tensor.bytes.size());
  }
  return hash_text(hash);
}

std::unique_ptr<Posterior> make_posterior(Device& device, Arena& arena, const Model& m) {
  const std::unique_ptr<Network> network = make_network(m.network);
  auto posterior = make_posterior(device, arena, network->layout(), m.kind, {m.settings}, m.masked);
  posterior->load(m.arrays, m.stages() <= 1);  // the first hand-over is the beginning of the second stage
  return posterior;
}

void keep(Model& m, const Posterior& posterior) {
  m.arrays = {};
  posterior.save(m.arrays);
}

void initialise(Device& device, Model& m, const Pretrained* pretrained, double sd) {
  Arena arena;
  const std::unique_ptr<Network> network = make_network(m.network);
  const auto posterior = make_posterior(device, arena, network->layout(), m.kind, {m.settings}, m.masked);
  StepState state{};
  state.noise = key_of(m.seed, 1);
  StepState* states = arena.take<StepState>(1);
  upload(device, states, std::vector<StepState>{state});
  posterior->initialise(states);
  if (pretrained) adopt(*posterior, *network, 0, *pretrained, sd);
  posterior->settle();
  keep(m, *posterior);
}

OwnDataOptions data_options(const Model& m) {
  OwnDataOptions o;
  o.channels = m.network.image.channels;
  o.height = m.network.image.height;
  o.width = m.network.image.width;
  o.classes = m.network.classes;
  o.class_names = m.class_names;
  return o;
}

void check_classes(const Model& m, const OwnData& data) {
  try {
    (void)json(data.class_names).dump();
  } catch (const json::exception&) {
    throw InputError("a class folder's name is not UTF-8, and a model could not keep it");
  }
  if (!data.labelled) return;
  for (int i = 0; i < data.images.count; i++)
    if (data.images.labels[i] >= m.network.classes)
      throw InputError("label " + std::to_string(data.images.labels[i]) + " of image " + std::to_string(i) +
                       "; the model has " + std::to_string(m.network.classes) + " classes, from 0 on");
}

TensorFile mean_network(Device& device, Posterior& posterior) {
  Arena arena;
  const ParameterLayout& layout = posterior.store().layout();
  float* w = arena.take<float>(layout.stride());
  posterior.mean_weights(w, 0);
  const std::vector<float> flat = download(device, w, layout.stride());
  TensorFile file;
  for (const TensorSpec& t : layout.tensors())
    file.tensors[t.name] = Tensor::of<float>(std::span(flat).subspan(t.offset, t.size), t.shape);
  return file;
}

}  // namespace baton
