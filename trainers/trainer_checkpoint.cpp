// A trainer's checkpoints: what they hold, and how training goes on from one.
#include <charconv>
#include <cstring>
#include <sstream>

#include "trainers/trainer.h"

namespace baton {

namespace {

constexpr const char* checkpoint_format = "baton-training-3";

// Every tensor that a posterior has to keep, with its name in a checkpoint.
void for_each_tensor(
    const Posterior& posterior,
    const std::function<void(const StateArray&, const TensorSpec&, int replica, const std::string& name)>& visit) {
  for (int r = 0; r < posterior.replicas(); r++)
    for (const StateArray& a : posterior.state())
      for (const TensorSpec& t : a.store->layout().tensors()) {
        const std::string name = t.name + "." + a.array;
        visit(a, t, r, posterior.replicas() == 1 ? name : "replica" + std::to_string(r) + "/" + name);
      }
}

template <class T>
Tensor as_bytes(const std::vector<T>& values) {
  const auto* raw = reinterpret_cast<const uint8_t*>(values.data());
  const size_t bytes = values.size() * sizeof(T);
  return Tensor::of<uint8_t>(std::span<const uint8_t>(raw, bytes), {int64_t(bytes)});
}

}  // namespace

std::string Trainer::make_identity() const {
  json j;
  j["architecture"] = network_->architecture();
  j["kind"] = settings_.kind;
  j["batch"] = settings_.batch;
  j["epochs"] = settings_.epochs;
  for (int r = 0; r < posterior_->replicas(); r++) {
    const Replica& replica = settings_.replicas[size_t(r)];
    json settings = posterior_->settings(r);
    settings.erase("draws_at_once");  // changes no figure
    j["replicas"].push_back(
        {replica.seed, settings, replica.pretrained ? replica.pretrained->description : "", replica.pretrained_sd});
  }
  if (settings_.masked) j["masked"] = true;
  if (device_.precision() != Precision::fp32) j["precision"] = name(device_.precision());
  json stages = json::array();
  for (const Group& g : groups_)
    stages.push_back(
        {g.stages.sizes, g.stages.heads, g.stages.augment, g.stages.pixel_order.size(), g.stages.probabilities.size()});
  j["stages"] = groups() == 1 ? stages[0] : stages;
  j["stages_before"] = settings_.stages_before;
  j["identity"] = settings_.identity;
  return j.dump();
}

// "3", or of several groups "3,0".
std::string Trainer::list_groups(const std::function<int64_t(const Group&)>& number) const {
  std::string list;
  for (const Group& g : groups_) list += (list.empty() ? "" : ",") + std::to_string(number(g));
  return list;
}

void Trainer::save(const std::filesystem::path& path, const std::string& extra) {
  TensorFile file;
  for_each_tensor(*posterior_, [&](const StateArray& a, const TensorSpec& t, int r, const std::string& name) {
    file.tensors[name] = Tensor::of<float>(a.store->read(device_, a.array, r, t), t.shape);
  });
  download_states();
  file.tensors["step_state"] = as_bytes(states_host_);
  file.tensors["totals"] = as_bytes(download(device_, totals_, size_t(rows())));
  const std::vector<double> kl = posterior_->accumulated_kl();
  file.tensors["accumulated_kl"] = Tensor::of<double>(kl, {int64_t(kl.size())});
  file.tensors["notes"] = as_bytes(posterior_->notes());
  const int before = settings_.stages_before + stage();
  file.metadata = {{"format", checkpoint_format},
                   {"architecture", network_->architecture()},
                   {"kind", settings_.kind},
                   {"prior", before == 0 ? "the first prior" : "posterior of stage " + std::to_string(before)},
                   {"stage", list_groups([](const Group& g) { return g.stage; })},
                   {"stage_step", list_groups([](const Group& g) { return g.stage_step; })},
                   {"step", list_groups([](const Group& g) { return g.step; })},
                   {"training", make_identity()},
                   {"extra", extra}};
  save_safetensors(path, file);
}

std::string Trainer::restore(const std::filesystem::path& path) {
  const TensorFile file = load_safetensors(path);
  const auto meta = [&](const std::string& key) {
    const auto found = file.metadata.find(key);
    if (found == file.metadata.end()) throw InputError(path.string() + ": no \"" + key + "\" in the metadata");
    return found->second;
  };
  if (meta("format") != checkpoint_format)
    throw InputError(path.string() + ": its format is '" + meta("format") + "'; this version reads '" +
                     checkpoint_format + "'");
  if (meta("training") != make_identity())
    throw InputError(path.string() + ": a checkpoint of another run (its training is " + meta("training") + ")");
  // Everything is read and checked before anything is written, so a damaged file leaves the trainer as it was.
  std::vector<Group> groups = groups_;
  std::istringstream stages(meta("stage")), stage_steps(meta("stage_step")), steps(meta("step"));
  for (size_t i = 0; i < groups.size(); i++) {
    const auto next = [&](const std::string& key, std::istringstream& list, int64_t most) {
      std::string word;
      std::getline(list, word, i + 1 < groups.size() ? ',' : '\0');
      int64_t value = -1;
      const auto end = std::from_chars(word.data(), word.data() + word.size(), value);
      if (end.ec != std::errc() || end.ptr != word.data() + word.size() || value < 0 || value > most)
        throw InputError(path.string() + ": \"" + key + "\" is '" + word + "', expected 0 to " + std::to_string(most));
      return value;
    };
    Group& g = groups[i];
    g.stage = int(next("stage", stages, g.stages.count() - 1));
    g.stage_step = int(next("stage_step", stage_steps, count_steps(g.stage, int(i))));
    g.step = next("step", steps, INT32_MAX);
    g.rests = false;
  }
  std::vector<std::vector<float>> values;
  const int replicas = posterior_->replicas(), at_once = posterior_->draws_at_once();
  for_each_tensor(*posterior_, [&](const StateArray&, const TensorSpec& t, int, const std::string& name) {
    values.push_back(file.at(name, t.shape).as<float>());
  });
  const std::vector<uint8_t> states =
      file.at("step_state", {int64_t(states_host_.size() * sizeof(StepState))}).as<uint8_t>();
  const std::vector<uint8_t> total_bytes = file.at("totals").as<uint8_t>();
  if (total_bytes.empty() || total_bytes.size() % (sizeof(Totals) * size_t(replicas)) != 0)
    throw InputError(path.string() + ": tensor 'totals' has " + std::to_string(total_bytes.size()) + " bytes");
  const std::vector<double> kl = file.at("accumulated_kl", {int64_t(posterior_->accumulated_kl().size())}).as<double>();
  const std::vector<uint8_t> notes = file.at("notes", {int64_t(posterior_->notes().size())}).as<uint8_t>();
  const std::string extra = meta("extra");

  size_t next = 0;
  for_each_tensor(*posterior_, [&](const StateArray& a, const TensorSpec& t, int r, const std::string&) {
    a.store->write(device_, a.array, r, t, values[next++]);
  });
  groups_ = groups;
  posterior_->restored(settings_.stages_before + stage() == 0);
  posterior_->set_accumulated_kl(kl);
  if (!notes.empty()) posterior_->set_notes(notes);
  std::memcpy(states_host_.data(), states.data(), states.size());
  upload_states();
  std::vector<Totals> totals(total_bytes.size() / sizeof(Totals));
  std::memcpy(totals.data(), total_bytes.data(), total_bytes.size());
  if (int(totals.size()) != rows()) {  // one network that ran with another number of draws at once
    for (size_t r = 1; r < totals.size(); r++) {
      totals[0].loss += totals[r].loss;
      totals[0].hits += totals[r].hits;
      totals[0].examples += totals[r].examples;
      totals[0].steps += totals[r].steps;
    }
    totals.resize(1);
    totals.resize(size_t(at_once), Totals{});
  }
  upload(device_, totals_, totals);
  take_stage();
  return extra;
}

}  // namespace baton
