// Finds the settings that the paper leaves out. Each candidate is a replica: candidates that share shapes (family,
// scale rule, batch, epochs, parts) train side by side, on the first --train-limit training images in parts, and are
// judged on the last --hold-out training images, which no candidate trains on. The test set is not looked at.
// Candidates come from a JSON file; the table of all that was tried goes to
// --out as table.csv, a row a candidate, appended as it is found.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <map>

#include "engine/files.h"
#include "engine/program.h"
#include "engine/runlog.h"
#include "layers/lenet5.h"
#include "trainers/metrics.h"
#include "trainers/parse.h"

using namespace baton;

namespace {

struct Candidate {
  Family family = Family::gaussian;
  ScaleRule rule = ScaleRule::adam;
  int parts = 5, batch = 100;
  double epochs = 5;
  uint64_t seed = 0;
  TrainingSettings settings;
  auto group() const { return std::make_tuple(int(family), int(rule), parts, batch, epochs, seed); }
};

Candidate candidate_of(const json& j) {
  Candidate c;
  for (const auto& [key, value] : j.items()) {
    if (key == "method") {
      const std::string m = value;
      if (m != "ft" && m != "ffg") throw InputError("unknown method '" + m + "': ft or ffg");
      c.family = m == "ft" ? Family::point : Family::gaussian;
    } else if (key == "scale_rule") c.rule = scale_rule_of(value);
    else if (key == "parts") c.parts = value;
    else if (key == "batch") c.batch = value;
    else if (key == "epochs") c.epochs = value;
    else if (key == "seed") c.seed = value;
    else if (key == "lr") c.settings.lr = value;
    else if (key == "lr_scale") c.settings.lr_scale = value;
    else if (key == "prior_sd") c.settings.prior_sd = value;
    else if (key == "init_log_sd") c.settings.init_log_sd = value;
    else if (key == "beta") c.settings.beta = value;
    else if (key == "warmup_epochs") c.settings.warmup_epochs = value;
    else if (key == "schedule") c.settings.schedule = schedule_of(value);
    else throw InputError("unknown setting '" + key + "' in the candidates");
  }
  return c;
}

Images subset(const Images& from, const std::vector<int32_t>& index) {
  Images to = from;
  to.count = int(index.size());
  const size_t bytes = from.image_bytes();
  to.pixels.resize(bytes * index.size());
  to.labels.resize(index.size());
  for (size_t i = 0; i < index.size(); i++) {
    std::copy_n(&from.pixels[bytes * index[i]], bytes, &to.pixels[bytes * i]);
    to.labels[i] = from.labels[index[i]];
  }
  return to;
}

void train_group(const Images& images, int train_count, int hold_out_count, const std::vector<Candidate>& group,
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
  const DeviceImages train = upload_images(device, arena, images, unit_range);
  const Images hold_out = subset(images, held);
  const NetworkFactory make = [] { return std::make_unique<LeNet5>(); };
  TrainingPlan plan;
  plan.family = first.family;
  plan.scale_rule = first.rule;
  plan.parts = first.parts;
  plan.batch = first.batch;
  plan.epochs = first.epochs;
  for (const Candidate& c : group) plan.seeds.push_back(c.seed), plan.settings.push_back(c.settings);
  IncrementalTrainer trainer(device, arena, make, train, plan, std::vector<std::vector<int32_t>>(group.size(), order),
                             sizes);
  Predictor predictor(device, arena, make, upload_images(device, arena, hold_out, unit_range));
  std::vector<std::string> curve(group.size());
  std::vector<Metrics> last(group.size());
  std::vector<bool> broken(group.size(), false);
  const auto start = std::chrono::steady_clock::now();
  for (int stage = 0; stage < trainer.stages(); stage++) {
    trainer.begin_stage(stage);
    trainer.run(trainer.steps_of(stage));
    const bool final_stage = stage + 1 == trainer.stages();
    if (!final_stage && stage != 0 && stage != 1 && stage != 4) continue;
    for (size_t r = 0; r < group.size(); r++) {
      const Predictions p = predictor.predict(trainer.posterior(), int(r), final_stage ? samples : samples / 4, 99);
      last[r] = evaluate(p.probability, hold_out.labels, 10, p.entropy, p.mutual_information);
      char text[32];
      snprintf(text, sizeof text, "%s%.4f", curve[r].empty() ? "" : " ", last[r].accuracy);
      curve[r] += text;
    }
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const std::vector<double> log_sd = trainer.posterior().mean_log_sd();
  for (size_t r = 0; r < group.size(); r++) {
    const Candidate& c = group[r];
    char row[400];
    snprintf(row, sizeof row, "%s,%d,%d,%g,%s,%s,%g,%g,%g,%g,%g,%g,%d,%.4f,%.4f,%.4f,%.2f,%s,%.1f", name_of(c.family),
             c.parts, c.batch, c.epochs, name_of(c.settings.schedule), name_of(c.rule), c.settings.lr,
             c.settings.lr_scale, c.settings.prior_sd, c.settings.init_log_sd, c.settings.beta,
             c.settings.warmup_epochs, int(c.seed), last[r].accuracy, last[r].nll, last[r].ece, log_sd[r],
             curve[r].c_str(), seconds / double(group.size()));
    table << row << std::endl;
    printf("%s\n", row);
    fflush(stdout);
  }
  if (!table) throw RunError("the table could not be written");
}

int run(int argc, char** argv) {
  CLI::App app{"Searches the settings of bil_mnist on a hold-out of the training parts (never on the test set)"};
  std::string candidates_file, data, out = "results/bil_mnist_search";
  int samples = 20, train_limit = 30000, hold_out = 10000, at_once = 1;
  app.add_option("candidates", candidates_file, "JSON: a list of objects of settings")->required();
  app.add_option("--data", data, "folder of the data set");
  app.add_option("--out", out, "folder of the table");
  app.add_option("--samples", samples, "draws of a final prediction");
  app.add_option("--train-limit", train_limit, "train on the first N images")->capture_default_str();
  app.add_option("--hold-out", hold_out, "judge on the last N training images")->capture_default_str();
  app.add_option("--at-once", at_once, "candidates that train side by side, where they share shapes");
  CLI11_PARSE(app, argc, argv);

  const Dataset set = find_mnist(data.empty() ? std::nullopt : std::optional<std::filesystem::path>(data));
  if (train_limit < 1 || hold_out < 1 || train_limit + hold_out > set.train.count)
    throw InputError("--train-limit and --hold-out must share the " + std::to_string(set.train.count) +
                     " training images between them");
  const std::vector<uint8_t> bytes = read_file(candidates_file);
  const json list = json::parse(bytes.begin(), bytes.end(), nullptr, false);
  if (!list.is_array()) throw InputError(candidates_file + ": not a JSON list");
  make_directories(out);
  const std::filesystem::path path = std::filesystem::path(out) / "table.csv";
  const bool fresh = !std::filesystem::exists(path);
  std::ofstream table(path, std::ios::app);
  if (fresh)
    table << "method,parts,batch,epochs,schedule,scale_rule,lr,lr_scale,prior_sd,init_log_sd,beta,warmup_epochs,seed,"
             "holdout_accuracy,holdout_nll,holdout_ece,mean_log_sd,accuracy_after_parts_1_2_5_last,seconds"
          << std::endl;
  std::vector<std::vector<Candidate>> groups;
  for (const json& j : list) {
    const Candidate c = candidate_of(j);
    if (!groups.empty() && groups.back()[0].group() == c.group() && int(groups.back().size()) < at_once)
      groups.back().push_back(c);
    else groups.push_back({c});
  }
  for (const auto& group : groups) {
    try {
      train_group(set.train, train_limit, hold_out, group, samples, table);
    } catch (const RunError& e) {
      printf("# %s\n", e.what());
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("bil_mnist_search", [&] { return run(argc, argv); });
}
