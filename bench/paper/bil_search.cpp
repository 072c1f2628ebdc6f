// Finds the settings that the paper leaves out. Each candidate is a replica: candidates that share shapes (family,
// scale rule, batch, epochs, parts) train side by side, on the first --train-limit training images in parts, and are
// judged on the last --hold-out training images, which no candidate trains on. The test set is not looked at.
// Candidates come from a JSON file; the table of all that was tried goes to --out as table.csv, a row a candidate,
// appended as it is found. --resume goes on with the candidates under way.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <map>

#include "bench/common/resume.h"
#include "engine/io/files.h"
#include "engine/io/program.h"
#include "engine/io/runlog.h"
#include "engine/io/stop.h"
#include "layers/conv3fc3.h"
#include "layers/lenet5.h"
#include "trainers/metrics.h"
#include "trainers/parse.h"

using namespace baton;

namespace {

struct Candidate {
  PosteriorOptions posterior;
  ScaleRule rule = ScaleRule::adam;
  int parts = 5, batch = 100;
  double epochs = 5;
  uint64_t seed = 0;
  TrainingSettings settings;
  bool augment = false;
  auto group() const {
    return std::make_tuple(int(posterior.family), int(rule), parts, batch, epochs, seed, augment, posterior.groups,
                           posterior.moments, int(posterior.flow), posterior.flow_steps, posterior.flow_hidden,
                           posterior.z_per_filter, posterior.fixed_base, posterior.path_gradient, posterior.z_log_std);
  }
};

Candidate candidate_of(const json& j) {
  Candidate c;
  for (const auto& [key, value] : j.items()) {
    if (key == "method") {
      c.posterior.family = family_of(value);
    } else if (key == "groups") {
      c.posterior.groups = value;
    } else if (key == "moments") {
      c.posterior.moments = value;
    } else if (key == "flow") {
      c.posterior.flow = flow_kind_of(value);
    } else if (key == "flow_steps") {
      c.posterior.flow_steps = value;
    } else if (key == "flow_hidden") {
      c.posterior.flow_hidden = value;
    } else if (key == "z_per_filter") {
      c.posterior.z_per_filter = value;
    } else if (key == "fixed_base") {
      c.posterior.fixed_base = value;
    } else if (key == "path_gradient") {
      c.posterior.path_gradient = value;
    } else if (key == "z_log_std") {
      c.posterior.z_log_std = value;
    } else if (key == "augment") {
      c.augment = value;
    } else if (key == "scale_rule") c.rule = scale_rule_of(value);
    else if (key == "parts") c.parts = value;
    else if (key == "batch") c.batch = value;
    else if (key == "epochs") c.epochs = value;
    else if (key == "seed") c.seed = value;
    else if (key == "lr") c.settings.lr = value;
    else if (key == "lr_scale") c.settings.lr_scale = value;
    else if (key == "prior_sd") c.settings.prior_sd = value;
    else if (key == "init_log_std") c.settings.init_log_std = value;
    else if (key == "beta") c.settings.beta = value;
    else if (key == "warmup_epochs") c.settings.warmup_epochs = value;
    else if (key == "schedule") c.settings.schedule = schedule_of(value);
    else throw InputError("unknown setting '" + key + "' in the candidates");
  }
  return c;
}

// What CFG and MNF have beside the rest, in one column.
std::string draws_of(const PosteriorOptions& o) {
  char text[120] = "";
  if (o.family == Family::channel) snprintf(text, sizeof text, "groups %d%s", o.groups, o.moments ? " moments" : "");
  if (o.family == Family::multiplicative)
    snprintf(text, sizeof text, "groups %d %s x%d h%d %s%s%s z_log_std %.3g", o.groups, name_of(o.flow), o.flow_steps,
             o.flow_hidden, o.z_per_filter ? "z_n" : "z_nc", o.fixed_base ? " fixed-base" : "",
             o.path_gradient ? " path" : "", o.z_log_std);
  return text;
}

// A search under way: how many groups are finished, and what of the table is theirs or of earlier searches.
struct Progression {
  std::filesystem::path folder, table;
  json identity;
  size_t groups = 0;
  double checkpoint_seconds = 20;

  std::filesystem::path path() const { return folder / "search.json"; }
  std::filesystem::path of_group() const { return folder / "group.safetensors"; }
  void save() const {
    write_file_atomically(
        path(),
        json{{"identity", identity}, {"groups", groups}, {"table_bytes", std::filesystem::file_size(table)}}.dump());
  }
  // Of the group under way: its curves so far, and its seconds.
  json extra(const std::vector<std::string>& curve, double seconds) const {
    return {{"identity", identity}, {"group", groups}, {"curve", curve}, {"seconds", seconds}};
  }
};

void train_group(const Progression& at, const Images& images, const Normalisation& normalisation,
                 const NetworkFactory& make, int train_count, int hold_out_count, const std::vector<Candidate>& group,
                 int samples, std::ofstream& table) {
  const Candidate& first = group[0];
  std::vector<int32_t> order, held;
  std::vector<int> sizes;
  for (const auto& part : split_parts(train_count, first.parts, first.seed)) {
    order.insert(order.end(), part.begin(), part.end());
    sizes.push_back(int(part.size()));
  }
  for (int i = images.count - hold_out_count; i < images.count; i++) held.push_back(i);
  Device device;
  Arena arena;
  const DeviceImages train = upload_images(device, arena, images, normalisation);
  const Images hold_out = subset(images, held);
  TrainingPlan plan;
  plan.posterior = first.posterior;
  plan.augment = first.augment;
  plan.scale_rule = first.rule;
  plan.parts = first.parts;
  plan.batch = first.batch;
  plan.epochs = first.epochs;
  for (const Candidate& c : group) plan.seeds.push_back(c.seed), plan.settings.push_back(c.settings);
  IncrementalTrainer trainer(device, arena, make, train, plan, std::vector<std::vector<int32_t>>(group.size(), order),
                             sizes);
  Predictor predictor(device, arena, make, upload_images(device, arena, hold_out, normalisation));
  std::vector<std::string> curve(group.size());
  std::vector<Metrics> last(group.size());
  double before = 0;  // seconds, when it was stopped
  int stage = 0;
  const json left = left_by_earlier_run(at.of_group(), at.identity);
  if (!left.is_null() && left["group"] == at.groups) {
    trainer.restore(at.of_group());
    stage = trainer.stage();
    curve = left["curve"].get<std::vector<std::string>>();
    before = left["seconds"];
  }
  const auto start = std::chrono::steady_clock::now();
  const auto seconds_so_far = [&] {
    return before + std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  for (; stage < trainer.stages(); stage++) {
    if (trainer.stage() != stage) trainer.begin_stage(stage);
    finish_stage(trainer, at.of_group(), at.extra(curve, seconds_so_far()), at.checkpoint_seconds);
    const bool final_stage = stage + 1 == trainer.stages();
    if (!final_stage && stage != 0 && stage != 1 && stage != 4) continue;
    try {
      for (size_t r = 0; r < group.size(); r++) {
        const Predictions p = predictor.predict(trainer.posterior(), int(r), final_stage ? samples : samples / 4, 99);
        last[r] = evaluate(p.probability, hold_out.labels, 10, p.entropy, p.mutual_information);
      }
    } catch (const Stopped&) {
      trainer.save(at.of_group(), at.extra(curve, seconds_so_far()).dump());
      stop_at_checkpoint();
    }
    for (size_t r = 0; r < group.size(); r++) {
      char text[32];
      snprintf(text, sizeof text, "%s%.4f", curve[r].empty() ? "" : " ", last[r].accuracy);
      curve[r] += text;
    }
  }
  const double seconds = seconds_so_far();
  const std::vector<double> log_std = trainer.posterior().mean_log_std();
  for (size_t r = 0; r < group.size(); r++) {
    const Candidate& c = group[r];
    char row[400];
    snprintf(row, sizeof row, "%s,%s,%d,%d,%g,%s,%s,%g,%g,%g,%g,%g,%g,%d,%.4f,%.4f,%.4f,%.2f,%s,%.1f",
             name_of(c.posterior.family), draws_of(c.posterior).c_str(), c.parts, c.batch, c.epochs,
             name_of(c.settings.schedule), name_of(c.rule), c.settings.lr, c.settings.lr_scale, c.settings.prior_sd,
             c.settings.init_log_std, c.settings.beta, c.settings.warmup_epochs, int(c.seed), last[r].accuracy,
             last[r].nll, last[r].ece, log_std[r], curve[r].c_str(), seconds / double(group.size()));
    table << row << std::endl;
    printf("%s\n", row);
    fflush(stdout);
  }
  if (!table) throw RunError("the table could not be written");
}

int run(int argc, char** argv) {
  CLI::App app{
      "Searches the settings of bil_mnist or bil_cifar10 on a hold-out of the training parts (never on the test set)"};
  std::string candidates_file, set_name = "mnist", data, out = "results/bil_search";
  int samples = 20, train_limit = 30000, hold_out = 10000, at_once = 1;
  bool resume = false;
  Progression at;
  app.add_option("candidates", candidates_file, "JSON: a list of objects of settings")->required();
  app.add_option("--set", set_name, "mnist (LeNet5) or cifar10 (3Conv3FC)")
      ->check(CLI::IsMember({"mnist", "cifar10"}))
      ->capture_default_str();
  app.add_option("--data", data, "folder of the data set");
  app.add_option("--out", out, "folder of the table");
  app.add_option("--samples", samples, "draws of a final prediction");
  app.add_option("--train-limit", train_limit, "train on the first N images")->capture_default_str();
  app.add_option("--hold-out", hold_out, "judge on the last N training images")->capture_default_str();
  app.add_option("--at-once", at_once, "candidates that train side by side, where they share shapes");
  app.add_flag("--resume", resume, "go on from the checkpoint in --out");
  app.add_option("--checkpoint-seconds", at.checkpoint_seconds, "between checkpoints, at the ends of epochs")
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);

  const auto folder = data.empty() ? std::nullopt : std::optional<std::filesystem::path>(data);
  const bool mnist = set_name == "mnist";
  const Dataset set = mnist ? find_mnist(folder) : find_cifar10(folder);
  const NetworkFactory make = [&]() -> std::unique_ptr<Network> {
    if (mnist) return std::make_unique<LeNet5>();
    return std::make_unique<Conv3Fc3>();
  };
  const Normalisation normalisation = mnist ? unit_range : standardise(set.train);
  if (train_limit < 1 || hold_out < 1 || train_limit + hold_out > set.train.count)
    throw InputError("--train-limit and --hold-out must share the " + std::to_string(set.train.count) +
                     " training images between them");
  const std::vector<uint8_t> bytes = read_file(candidates_file);
  const json list = json::parse(bytes.begin(), bytes.end(), nullptr, false);
  if (!list.is_array()) throw InputError(candidates_file + ": not a JSON list");
  at.folder = std::filesystem::path(out) / "checkpoint";
  at.table = std::filesystem::path(out) / "table.csv";
  at.identity = {{"candidates", list},         {"set", set.source},    {"samples", samples},
                 {"train_limit", train_limit}, {"hold_out", hold_out}, {"at_once", at_once}};
  make_directories(at.folder);
  if (!resume) {
    for (const auto& path : {at.path(), at.of_group()}) std::filesystem::remove(path);
  } else if (const json before = left_by_earlier_run(at.path(), at.identity); !before.is_null()) {
    at.groups = before["groups"];
    const size_t bytes = before["table_bytes"];  // a row behind them is of a group that will run again
    if (std::filesystem::exists(at.table) && std::filesystem::file_size(at.table) > bytes)
      std::filesystem::resize_file(at.table, bytes);
  }
  const bool fresh = !std::filesystem::exists(at.table);
  std::ofstream table(at.table, std::ios::app);
  if (fresh)
    table << "method,draws,parts,batch,epochs,schedule,scale_rule,lr,lr_scale,prior_sd,init_log_std,beta,warmup_epochs,"
             "seed,"
             "holdout_accuracy,holdout_nll,holdout_ece,mean_log_std,accuracy_after_parts_1_2_5_last,seconds"
          << std::endl;
  std::vector<std::vector<Candidate>> groups;
  for (const json& j : list) {
    const Candidate c = candidate_of(j);
    if (!groups.empty() && groups.back()[0].group() == c.group() && int(groups.back().size()) < at_once)
      groups.back().push_back(c);
    else groups.push_back({c});
  }
  if (at.groups == 0) at.save();
  while (at.groups < groups.size()) {
    try {
      train_group(at, set.train, normalisation, make, train_limit, hold_out, groups[at.groups], samples, table);
    } catch (const RunError& e) {
      printf("# %s\n", e.what());
    }
    at.groups++;
    at.save();
    if (at.groups < groups.size() && stop_requested()) stop_at_checkpoint();
  }
  std::filesystem::remove_all(at.folder);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("bil_search", [&] { return run(argc, argv); });
}
