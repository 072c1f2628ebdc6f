#include "trainers/model.h"

#include <algorithm>
#include <cmath>

#include "layers/conv3fc3.h"
#include "layers/lenet5.h"
#include "layers/mlp.h"
#include "layers/vgg11.h"
#include "trainers/parse.h"

namespace baton {

namespace {

constexpr const char* model_format = "baton-model-1";

std::string pixels_text(int channels, int height, int width) {
  return std::to_string(height) + " x " + std::to_string(width) + (channels == 1 ? " grey" : " colour");
}

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
  void read_text(const std::string& key, F f) const {
    const std::string value = text(key);
    try {
      f(value);
    } catch (const std::exception& e) {
      throw InputError(file_.path + ": \"" + key + "\" in the metadata: " + e.what());
    }
  }
  template <class F>
  void read(const std::string& key, F f) const {
    const json j = object(key);
    read_text(key, [&](const std::string&) { f(j); });
  }

 private:
  const TensorFile& file_;
};

json to_json(const Architecture& a) {
  return {{"name", a.name},     {"classes", a.classes}, {"channels", a.channels},
          {"height", a.height}, {"width", a.width},     {"hidden", a.hidden}};
}

json to_json(const PosteriorOptions& o) {
  json j = json::object();
  if (o.family == Family::channel) j = {{"groups", o.groups}, {"moments", o.moments}};
  if (o.family == Family::multiplicative)
    j = {{"groups", o.groups},
         {"flow", name_of(o.flow)},
         {"flow_steps", o.flow_steps},
         {"flow_hidden", o.flow_hidden},
         {"z_per_filter", o.z_per_filter},
         {"fixed_base", o.fixed_base},
         {"path_gradient", o.path_gradient},
         {"z_log_std", o.z_log_std}};
  j["masked"] = o.masked;
  return j;
}

// Strictly: nlohmann's own conversions cut 1.5, wrap 2^40 and take true for 1.
int whole(const json& j, const char* key, int least, int most) {
  const json& value = j.at(key);
  if (!value.is_number_integer() || value < least || value > most)
    throw InputError("'" + std::string(key) + "' is " + value.dump() + ", expected a whole number from " +
                     std::to_string(least) + " to " + std::to_string(most));
  return value.get<int>();
}
double real(const json& value, const char* key) {
  if (!value.is_number() || std::abs(value.get<double>()) > 1e30)
    throw InputError("'" + std::string(key) + "' is " + value.dump() + ", expected a number");
  return value.get<double>();
}
double real_at(const json& j, const char* key) { return real(j.at(key), key); }

PosteriorOptions posterior_options(Family family, const json& j) {
  PosteriorOptions o(family);
  o.masked = j.at("masked");
  if (o.family == Family::channel || o.family == Family::multiplicative) o.groups = whole(j, "groups", 1, 256);
  if (o.family == Family::channel) o.moments = j.at("moments");
  if (o.family != Family::multiplicative) return o;
  o.flow = flow_kind_of(j.at("flow"));
  o.flow_steps = whole(j, "flow_steps", 0, most_flow_steps);
  o.flow_hidden = whole(j, "flow_hidden", 1, 4096);
  o.z_per_filter = j.at("z_per_filter");
  o.fixed_base = j.at("fixed_base");
  o.path_gradient = j.at("path_gradient");
  o.z_log_std = float(real_at(j, "z_log_std"));
  return o;
}

TrainingSettings settings_of(const json& j) {
  TrainingSettings s;
  s.lr = real_at(j, "lr");
  s.lr_scale = real_at(j, "lr_scale");
  s.prior_sd = real_at(j, "prior_sd");
  s.init_log_std = real_at(j, "init_log_std");
  s.beta = real_at(j, "beta");
  s.warmup_epochs = real_at(j, "warmup_epochs");
  s.schedule = schedule_of(j.at("schedule"));
  return s;
}

const std::vector<std::string> architectures{"lenet5", "3conv3fc", "vgg11", "mlp"};

}  // namespace

Rule rule_of(const std::string& name) {
  if (name == "elbo") return Rule::bound;
  if (name == "bgd") return Rule::descent;
  throw InputError("unknown rule '" + name + "': elbo or bgd");
}
const char* name_of(Rule r) { return r == Rule::bound ? "elbo" : "bgd"; }

json training_json(const Model& m) {
  const TrainingSettings& s = m.training;
  return {{"rule", name_of(m.rule)},
          {"epochs", m.epochs},
          {"batch", m.batch},
          {"lr", s.lr},
          {"schedule", name_of(s.schedule)},
          {"lr_scale", s.lr_scale},
          {"scale_rule", name_of(m.scale_rule)},
          {"beta", s.beta},
          {"warmup_epochs", s.warmup_epochs},
          {"draws", m.draws},
          {"prior_sd", s.prior_sd},
          {"init_log_std", s.init_log_std}};
}

Architecture architecture_of(const std::string& name) {
  Architecture a;
  a.name = name;
  if (name == "3conv3fc" || name == "vgg11") a.channels = 3, a.height = a.width = 32;
  if (name == "mlp") a.hidden = {400, 400};
  a.network();
  return a;
}

NetworkFactory Architecture::network() const {
  const auto takes = [&](int c, int side) {
    if (channels == c && height == side && width == side) return;
    throw InputError(name + " takes " + pixels_text(c, side, side) + " images, not " +
                     pixels_text(channels, height, width) + " ones");
  };
  if (classes < 2 || classes > 256) throw InputError("classes must be 2 to 256, not " + std::to_string(classes));
  if (name != "mlp" && !hidden.empty()) throw InputError(name + " has no hidden widths to choose");
  const int n = classes;
  if (name == "lenet5") {
    takes(1, 28);
    return [n] { return std::make_unique<LeNet5>(n); };
  }
  if (name == "3conv3fc") {
    takes(3, 32);
    return [n] { return std::make_unique<Conv3Fc3>(n); };
  }
  if (name == "vgg11") {
    takes(3, 32);
    return [n] { return std::make_unique<Vgg11>(n); };
  }
  if (name == "mlp") {
    if ((channels != 1 && channels != 3) || height < 1 || width < 1 || height > 1024 || width > 1024)
      throw InputError("an mlp takes images of 1 or 3 channels and at most 1024 x 1024 pixels");
    if (hidden.empty() || hidden.size() > 16) throw InputError("an mlp has 1 to 16 hidden layers");
    for (int width_of_layer : hidden)
      if (width_of_layer < 1 || width_of_layer > 1 << 16)
        throw InputError("a hidden layer has 1 to 65536 units, not " + std::to_string(width_of_layer));
    const int in = channels * height * width;
    return [in, widths = hidden, n] { return std::make_unique<Mlp>(in, widths, n); };
  }
  throw InputError("unknown architecture '" + name + "': lenet5, 3conv3fc, vgg11 or mlp");
}

std::string Architecture::description() const {
  std::string text = name;
  for (size_t i = 0; i < hidden.size(); i++) text += (i ? "-" : " ") + std::to_string(hidden[i]);
  return text + ", " + pixels_text(channels, height, width) + " images, " + std::to_string(classes) + " classes";
}

Architecture recognise(const TensorFile& weights) {
  const auto shape = [&](const std::string& name) -> std::vector<int64_t> {
    const auto found = weights.tensors.find(name);
    return found == weights.tensors.end() ? std::vector<int64_t>() : found->second.shape;
  };
  std::string nearest, complaint;
  size_t nearest_matches = 0;
  for (const std::string& name : architectures) {
    Architecture a = architecture_of(name);
    if (name == "mlp") {
      a.hidden.clear();
      int layers = 0;
      while (shape("fc" + std::to_string(layers + 1) + ".weight").size() == 2) layers++;
      if (layers < 2 || shape("conv1.weight").size() == 4) continue;
      for (int i = 1; i < layers; i++)
        a.hidden.push_back(int(std::min<int64_t>(shape("fc" + std::to_string(i) + ".weight")[0], 1 << 20)));
      const int64_t in = shape("fc1.weight")[1];
      if (in == 3 * 32 * 32) a.channels = 3, a.height = a.width = 32;
      else if (in != a.height * a.width) {
        const int side = int(std::lround(std::sqrt(double(std::min<int64_t>(in, 1 << 20)))));
        if (int64_t(side) * side == in) a.height = a.width = side;
      }
    }
    const auto last = a.network()()->layout().tensors().back();  // the output layer's bias
    const std::vector<int64_t> outputs = shape(last.name);
    if (outputs.size() == 1 && outputs[0] >= 2 && outputs[0] <= 256) a.classes = int(outputs[0]);
    size_t matches = 0;
    std::string wrong;
    const auto network = a.network()();
    for (const TensorSpec& t : network->layout().tensors()) {
      if (shape(t.name) == t.shape && weights.has(t.name)) matches++;
      else if (wrong.empty())
        wrong = weights.has(t.name) ? "'" + t.name + "' has shape " + shape_text(shape(t.name)) + "; " + name +
                                          " has " + shape_text(t.shape)
                                    : name + "'s '" + t.name + "' is missing";
    }
    if (wrong.empty() && matches == weights.tensors.size()) return a;
    if (wrong.empty()) wrong = "it has more tensors than " + name;
    if (matches > nearest_matches || nearest.empty()) nearest = name, nearest_matches = matches, complaint = wrong;
  }
  throw InputError(weights.path + " fits none of lenet5, 3conv3fc, vgg11, mlp; nearest is " + nearest + ": " +
                   complaint + " (tools/from-pytorch renames tensors)");
}

int Model::learned(uint64_t content) const {
  const std::string hash = hash_text(content);
  for (size_t i = 0; i < history.size(); i++)
    if (history[i].value("data", "") == hash) return int(i) + 1;
  return 0;
}

namespace {

// Everything but the arrays.
std::map<std::string, std::string> metadata_of(const Model& m) {
  std::map<std::string, std::string> to;
  to["format"] = model_format;
  to["architecture"] = to_json(m.architecture).dump();
  to["family"] = name_of(m.posterior.family);
  to["posterior"] = to_json(m.posterior).dump();
  const int c = m.architecture.channels;
  to["normalisation"] = json({{"scale", std::vector<float>(m.normalisation.scale, m.normalisation.scale + c)},
                              {"shift", std::vector<float>(m.normalisation.shift, m.normalisation.shift + c)}})
                            .dump();
  to["class_names"] = json(m.class_names).dump();
  to["training"] = training_json(m).dump();
  to["seed"] = std::to_string(m.seed);
  to["step"] = std::to_string(m.step);
  to["origin"] = m.origin.dump();
  to["history"] = m.history.dump();
  to["pruned"] = m.pruned.dump();
  return to;
}

uint64_t number(const TensorFile& file, const Metadata& metadata, const std::string& key, uint64_t most) {
  const json j = metadata.object(key);
  if (!j.is_number_unsigned() || j.get<uint64_t>() > most)
    throw InputError(file.path + ": \"" + key + "\" in the metadata is '" + metadata.text(key) +
                     "', expected a whole number from 0 to " + std::to_string(most));
  return j.get<uint64_t>();
}

// What a file is that is no model of this version.
void check_format(const TensorFile& file) {
  const auto found = file.metadata.find("format");
  const std::string format = found == file.metadata.end() ? "" : found->second;
  if (format == model_format) return;
  const std::string who = file.path + " is no model: ";
  if (format.rfind("baton-model-", 0) == 0)
    throw InputError(file.path + " was written by another version of Baton (format " + format +
                     "; this version reads " + model_format + ")");
  if (format.rfind("baton-training-", 0) == 0)
    throw InputError(who +
                     "it is the checkpoint of an update that has not ended (go on with it: baton update --resume)");
  if (format == "baton-pretrained-1" || file.has("conv1.weight") || file.has("fc1.weight"))
    throw InputError(who + "it holds a plain network's weights (baton init --from makes a model of it)");
  throw InputError(who + (format.empty() ? "it has no \"format\" in its metadata" : "its format is '" + format + "'"));
}

}  // namespace

Model load_model(const std::filesystem::path& path) {
  TensorFile file = load_safetensors(path);
  check_format(file);
  const Metadata metadata(file);
  Model m;
  metadata.read("architecture", [&](const json& j) {
    m.architecture.name = j.at("name");
    m.architecture.classes = whole(j, "classes", 2, 256);
    m.architecture.channels = whole(j, "channels", 1, 3);
    m.architecture.height = whole(j, "height", 1, 1024);
    m.architecture.width = whole(j, "width", 1, 1024);
    const json& hidden = j.at("hidden");
    if (!hidden.is_array()) throw InputError("'hidden' is no list");
    for (size_t i = 0; i < hidden.size(); i++)
      m.architecture.hidden.push_back(whole({{"hidden", hidden[i]}}, "hidden", 1, 1 << 16));
    m.architecture.network();
  });
  // Before anything is allocated by what the metadata claim: the tensors are there.
  const std::unique_ptr<Network> network = m.architecture.network()();
  for (const TensorSpec& t : network->layout().tensors()) file.at(t.name + ".mean", t.shape);
  metadata.read_text("family", [&](const std::string& name) { m.posterior.family = family_of(name); });
  metadata.read("posterior", [&](const json& j) { m.posterior = posterior_options(m.posterior.family, j); });
  metadata.read("normalisation", [&](const json& j) {
    const size_t channels = size_t(m.architecture.channels);
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
    if (int(m.class_names.size()) > m.architecture.classes) throw InputError("more names than classes");
  });
  metadata.read("training", [&](const json& j) {
    m.training = settings_of(j);
    m.scale_rule = scale_rule_of(j.at("scale_rule"));
    m.rule = rule_of(j.at("rule"));
    m.draws = whole(j, "draws", 1, 1000);
    m.batch = whole(j, "batch", 1, 1 << 20);
    m.epochs = real_at(j, "epochs");
  });
  m.seed = number(file, metadata, "seed", UINT64_MAX);
  m.step = uint32_t(number(file, metadata, "step", UINT32_MAX));
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
  Device device;  // the tensors are all there, of the right shapes and finite
  Arena arena;
  posterior_of(device, arena, m);
  return m;
}

void save_model(const std::filesystem::path& path, const Model& m) {
  TensorFile file = m.arrays;
  file.metadata = metadata_of(m);
  save_safetensors(path, file);
}

std::string fingerprint(const Model& m) {
  uint64_t hash = 0xcbf29ce484222325ull;
  const auto add = [&](const void* bytes, size_t n) {
    for (size_t i = 0; i < n; i++) hash = (hash ^ static_cast<const uint8_t*>(bytes)[i]) * 0x100000001b3ull;
  };
  for (const auto& [key, text] : metadata_of(m)) add(key.data(), key.size()), add(text.data(), text.size());
  for (const auto& [name, tensor] : m.arrays.tensors) {
    add(name.data(), name.size());
    add(tensor.bytes.data(), tensor.bytes.size());
  }
  return hash_text(hash);
}

std::unique_ptr<Posterior> posterior_of(Device& device, Arena& arena, const Model& m) {
  const std::unique_ptr<Network> network = m.architecture.network()();
  auto posterior = std::make_unique<Posterior>(device, arena, network->layout(), m.posterior, 1);
  posterior->load(m.arrays, m.stages() <= 1);  // the first hand-over is the beginning of the second stage
  return posterior;
}

void keep(Model& m, const Posterior& posterior) {
  m.arrays = {};
  posterior.save(m.arrays);
}

void initialise(Device& device, Model& m, const Beginning& beginning) {
  Arena arena;
  const std::unique_ptr<Network> network = m.architecture.network()();
  Posterior posterior(device, arena, network->layout(), m.posterior, 1);
  StepState state{};
  state.noise = key_of(m.seed, 1);
  StepState* states = arena.take<StepState>(1);
  upload(device, states, std::vector<StepState>{state});
  posterior.initialise(states, {float(m.training.init_log_std)}, {float(m.training.prior_sd)});
  if (beginning.pretrained) {
    adopt(posterior, *network, 0, *beginning.pretrained, beginning.pretrained_sd);
    posterior.settle();
  }
  keep(m, posterior);
}

OwnDataOptions data_options(const Model& m) {
  OwnDataOptions o;
  o.channels = m.architecture.channels;
  o.height = m.architecture.height;
  o.width = m.architecture.width;
  o.classes = m.architecture.classes;
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
    if (data.images.labels[i] >= m.architecture.classes)
      throw InputError("label " + std::to_string(data.images.labels[i]) + " of image " + std::to_string(i) +
                       "; the model has " + std::to_string(m.architecture.classes) + " classes, from 0 on");
}

TensorFile mean_network(Device& device, const Model& m) {
  Arena arena;
  const auto posterior = posterior_of(device, arena, m);
  const ParameterLayout& layout = posterior->store().layout();
  float* w = arena.take<float>(layout.stride());
  posterior->mean_weights(w, 0);
  const std::vector<float> flat = download(device, w, layout.stride());
  TensorFile file;
  for (const TensorSpec& t : layout.tensors())
    file.tensors[t.name] = Tensor::of<float>(std::span(flat).subspan(t.offset, t.size), t.shape);
  return file;
}

}  // namespace baton
