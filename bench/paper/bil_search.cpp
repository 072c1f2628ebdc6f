// Finds the settings that the paper leaves out. Each candidate is a replica: candidates that share shapes (family,
// scale rule, batch, epochs) train side by side, on the first --train-limit training images in parts, and are
// judged on the last --hold-out training images, which no candidate trains on. The test set is not looked at.
// Candidates come from a JSON file; the table of all that was tried goes to --out as table.csv, a row a candidate,
// appended as it is found. --resume goes on with the candidates under way.
#include <cstdio>
#include <fstream>

#include "bench/common/program.h"
#include "engine/io/files.h"
#include "engine/io/program.h"
#include "engine/io/stop.h"
#include "trainers/checkpoints.h"
#include "trainers/metrics.h"
#include "trainers/predictor.h"

using namespace baton;

namespace {

// Settings of a training beside those of the posterior's kind.
const Schema training_options{whole_option("parts", 5, {1, 1e6}, ""), whole_option("batch", 100, {1, 1 << 20}, ""),
                              number_option("epochs", 5, positive, ""), whole_option("seed", 0, {0, 2e9}, ""),
                              flag_option("augment", false, "")};

struct Candidate {
  std::string kind;
  json training, settings;  // complete

  // What candidates that train side by side share.
  json group() const {
    return {kind, training["batch"], training["epochs"], training["augment"],
            common_settings(find_posterior(kind), settings)};
  }
};

Candidate parse_candidate(const json& j) {
  Candidate c;
  c.kind = j.value("method", "ffg");
  json training = json::object(), settings = json::object();
  for (const auto& [key, value] : j.items())
    if (key != "method") (find_option(training_options, key) ? training : settings)[key] = value;
  c.training = complete_options(training_options, training, "a candidate");
  c.settings = complete_options(find_posterior(c.kind).options, settings, "a candidate");
  return c;
}

// The options of the kind that have no column of their own and the precision, where they are not the standard.
std::string describe_rest(const Candidate& c, Precision precision) {
  std::string text = precision == Precision::fp32 ? "" : std::string("precision ") + name(precision);
  for (const Option& option : find_posterior(c.kind).options) {
    const json& value = c.settings[option.name];
    if (option.by_replica || option.name == "scale_rule" || value == option.standard) continue;
    text +=
        (text.empty() ? "" : " ") + option.name + " " + (value.is_string() ? value.get<std::string>() : value.dump());
  }
  return text;
}

// A search under way: how many groups are finished, and what of the table is theirs or of earlier searches.
struct Progression {
  std::filesystem::path folder, table;
  json identity;
  size_t groups = 0;
  double checkpoint_seconds = 20;
  std::string precision = "fp32";

  std::filesystem::path path() const { return folder / "search.json"; }
  std::filesystem::path of_group() const { return folder / "group.safetensors"; }
  void save() const {
    write_file_atomically(
        path(),
        json{{"identity", identity}, {"groups", groups}, {"table_bytes", std::filesystem::file_size(table)}}.dump());
  }
};

void train_group(const Progression& at, const Images& images, const Normalisation& normalisation,
                 const NetworkFactory& make, int train_count, int hold_out_count, const std::vector<Candidate>& group,
                 int samples, std::ofstream& table) {
  Device device;
  device.set_precision(parse_precision(at.precision));
  Arena arena;
  const DeviceImages train = upload_images(device, arena, images, normalisation);
  std::vector<int32_t> held;
  for (int i = images.count - hold_out_count; i < images.count; i++) held.push_back(i);
  const Images hold_out = subset(images, held);
  TrainingSettings training;
  training.kind = group[0].kind;
  training.batch = group[0].training["batch"];
  training.epochs = group[0].training["epochs"];
  training.replicas.clear();
  std::vector<Stages> stages;
  for (const Candidate& c : group) {
    const uint64_t seed = c.training["seed"];
    training.replicas.push_back({seed, c.settings});
    stages.push_back(split_into_parts(train_count, c.training["parts"], {seed}, c.training["augment"]));
  }
  Trainer trainer(device, arena, make, train, stages, training);
  Predictor predictor(device, arena, make, upload_images(device, arena, hold_out, normalisation));
  std::vector<int> judged(group.size(), -1);  // the newest stage of each that was
  std::vector<std::string> curve(group.size());
  std::vector<std::vector<double>> last(group.size());  // accuracy, NLL, calibration error
  double before = 0;                                    // seconds, when it was stopped
  const json left = left_by_earlier_run(at.of_group(), at.identity);
  if (left.contains("judged") && left["group"] == at.groups) {
    trainer.restore(at.of_group());
    left["judged"].get_to(judged);
    left["curve"].get_to(curve);
    left["last"].get_to(last);
    before = left["seconds"];
  }
  const double start = seconds_now();
  const auto seconds_so_far = [&] { return before + seconds_now() - start; };
  Checkpoints checkpoints(at.of_group(), at.checkpoint_seconds, [&] {
    return json{{"identity", at.identity}, {"group", at.groups}, {"judged", judged},
                {"curve", curve},          {"last", last},       {"seconds", seconds_so_far()}};
  });
  const auto judge = [&] {
    for (size_t r = 0; r < group.size(); r++) {
      const int stage = trainer.stage(int(r));
      if (!trainer.stage_ended(int(r)) || judged[r] == stage) continue;
      const bool final_stage = stage + 1 == stages[r].count();
      if (final_stage || stage == 0 || stage == 1 || stage == 4) {
        const Predictions p = checkpoints.keep_through(trainer, [&] {
          return predictor.predict(trainer.posterior(), int(r), final_stage ? samples : samples / 4, 99);
        });
        const Metrics m = evaluate(p.probability, hold_out.labels, 10, p.entropy, p.mutual_information);
        last[r] = {m.accuracy, m.nll, m.ece};
        curve[r] += format_text("%s%.4f", curve[r].empty() ? "" : " ", m.accuracy);
      }
      judged[r] = stage;
    }
  };
  judge();
  LearningLoop loop;
  loop.look = [&](const std::vector<Look>&) { judge(); };
  learn(trainer, checkpoints, loop);
  const double seconds = seconds_so_far();
  const std::vector<double> log_std = trainer.posterior().mean_log_std();
  for (size_t r = 0; r < group.size(); r++) {
    const Candidate& c = group[r];
    const auto of = [&](const char* name) { return c.settings.value(name, 0.0); };
    const std::string row = format_text(
        "%s,%s,%d,%d,%g,%s,%s,%g,%g,%g,%g,%g,%g,%d,%.4f,%.4f,%.4f,%.2f,%s,%.1f", c.kind.c_str(),
        describe_rest(c, device.precision()).c_str(), int(c.training["parts"]), int(c.training["batch"]),
        double(c.training["epochs"]), c.settings["schedule"].get<std::string>().c_str(),
        c.settings.value("scale_rule", "").c_str(), of("lr"), of("lr_scale"), of("prior_sd"), of("init_log_std"),
        of("beta"), of("warmup_epochs"), int(c.training["seed"]), last[r][0], last[r][1], last[r][2],
        log_std.empty() ? 0. : log_std[r], curve[r].c_str(), seconds / double(group.size()));
    table << row << std::endl;
    printf("%s\n", row.c_str());
    fflush(stdout);
  }
  if (!table) throw RunError("the table could not be written");
}

int run(int argc, char** argv) {
  CLI::App app{
      "Searches the settings of bil_mnist or bil_cifar10 on a hold-out of the training parts (never on the test set)"};
  std::string candidates_file, set_name = "mnist", out = "results/bil_search";
  std::optional<std::string> data;
  int samples = 20, train_limit = 30000, hold_out = 10000, at_once = 1;
  bool resume = false;
  Progression at;
  app.add_option("candidates", candidates_file, "JSON: a list of objects of settings")->required();
  app.option_defaults()->always_capture_default();
  app.add_option("--set", set_name, "mnist (LeNet5) or cifar10 (3Conv3FC)")->check(CLI::IsMember({"mnist", "cifar10"}));
  app.add_option("--data", data, "folder of the data set");
  app.add_option("--out", out, "folder of the table");
  app.add_option("--samples", samples, "draws of a final prediction");
  app.add_option("--train-limit", train_limit, "train on the first N images");
  app.add_option("--hold-out", hold_out, "judge on the last N training images");
  app.add_option("--at-once", at_once, "candidates that train side by side, where they share shapes");
  app.add_option("--precision", at.precision, "of the layers' products: fp32 or tf32");
  app.add_flag("--resume", resume, "go on from the checkpoint in --out");
  app.add_option("--checkpoint-seconds", at.checkpoint_seconds, "between checkpoints, at the ends of epochs");
  if (!parse_options(app, argc, argv)) return 0;

  const bool mnist = set_name == "mnist";
  const Dataset set = mnist ? find_mnist(data) : find_cifar10(data);
  const NetworkFactory make = network_factory(network_spec(mnist ? "lenet5" : "3conv3fc"));
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
  if (parse_precision(at.precision) != Precision::fp32) at.identity["precision"] = at.precision;
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
    table
        << "method,options,parts,batch,epochs,schedule,scale_rule,lr,lr_scale,prior_sd,init_log_std,beta,warmup_epochs,"
           "seed,"
           "holdout_accuracy,holdout_nll,holdout_ece,mean_log_std,accuracy_after_parts_1_2_5_last,seconds"
        << std::endl;
  std::vector<std::vector<Candidate>> groups;
  for (const json& j : list) {
    const Candidate c = parse_candidate(j);
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
    if (at.groups < groups.size() && stop_requested())
      throw_stopped("the checkpoint is written; --resume goes on from it");
  }
  std::filesystem::remove_all(at.folder);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("bil_search", [&] { return run(argc, argv); });
}
