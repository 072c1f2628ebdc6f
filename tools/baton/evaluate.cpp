// baton evaluate: how good predictions of labelled images are, how well their confidence is calibrated, and how well
// their uncertainty tells foreign images.
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <tuple>

#include "engine/io/files.h"
#include "tools/baton/describe.h"
#include "trainers/metrics.h"

extern char** environ;

namespace baton {

namespace {

namespace fs = std::filesystem;

constexpr int calibration_bins = 15, entropy_bins = 40;
constexpr size_t most_confusions = 10;
constexpr size_t most_listed = 20;  // classes in a table of the text

// Wilson's 95 % interval of a proportion.
std::pair<double, double> wilson(int64_t hits, int64_t n) {
  constexpr double z = 1.959963984540054;
  const double p = double(hits) / double(n), zz = z * z / double(n);
  const double centre = (p + zz / 2) / (1 + zz);
  const double half = z * std::sqrt(p * (1 - p) / double(n) + zz / (4 * double(n))) / (1 + zz);
  return {std::max(0.0, centre - half), std::min(1.0, centre + half)};
}

// {"images", "correct", "accuracy", "low", "high"}; of no images the last three are null.
json estimate_accuracy(int64_t correct, int64_t images) {
  json j{{"images", images}, {"correct", correct}, {"accuracy", nullptr}, {"low", nullptr}, {"high", nullptr}};
  if (images == 0) return j;
  j["accuracy"] = double(correct) / double(images);
  std::tie(j["low"], j["high"]) = wilson(correct, images);
  return j;
}

std::vector<int64_t> histogram(const std::vector<float>& values, double high) {
  std::vector<int64_t> counts(entropy_bins);
  for (float v : values) counts[std::clamp(int(v / high * entropy_bins), 0, entropy_bins - 1)]++;
  return counts;
}

// 1 - the chosen class's probability.
std::vector<float> doubt(const Predictions& p, int classes) {
  std::vector<float> all;
  for (auto at = p.probability.begin(); at != p.probability.end(); at += classes)
    all.push_back(1 - *std::max_element(at, at + classes));
  return all;
}

// tools/plot draws what lies in the folder; its words go to stderr. Whether it did.
bool plot(const fs::path& folder) {
  const std::string program = in_build_folder("tools/plot"), where = folder.string();
  if (!fs::exists(program)) {
    fprintf(stderr, "baton evaluate: no figure was drawn, for %s is not there\n", program.c_str());
    return false;
  }
  const char* const arguments[] = {program.c_str(), "--", where.c_str(), nullptr};
  posix_spawn_file_actions_t actions;
  if (posix_spawn_file_actions_init(&actions) != 0) return false;
  pid_t child;
  const bool started =
      posix_spawn_file_actions_adddup2(&actions, STDERR_FILENO, STDOUT_FILENO) == 0 &&
      posix_spawn(&child, program.c_str(), &actions, nullptr, const_cast<char**>(arguments), environ) == 0;
  posix_spawn_file_actions_destroy(&actions);
  if (!started) return false;
  int status = 0;
  while (waitpid(child, &status, 0) < 0)
    if (errno != EINTR) return false;
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

class Evaluate : public Command {
 public:
  Evaluate()
      : Command("evaluate", "accuracy, calibration and confusions on labelled images; how well foreign images are told",
                "  baton evaluate --model model.safetensors --data mnist/\n"
                "      on the test images of MNIST's folder: the numbers, as text\n"
                "  baton evaluate --model model.safetensors --data mnist/ --ood fashion-mnist/ --out report/\n"
                "      whether clothes are told from digits, too; report/ gets result.json and a figure (PNG, SVG)\n"
                "  baton evaluate --model model.safetensors --data photos/ --samples 20 --json > evaluation.json\n"
                "      a folder of pictures for each class; 20 draws of the weights; everything as one JSON object\n") {
  }

  void add_options(CLI::App& app) override {
    app.add_option("--model", model_, "the model")->required();
    data_.add_to(app, "labelled images", true);
    foreign_.add_to(app, "foreign images of no class that the model knows (out of distribution; labels do not matter)",
                    false);
    app.add_option("--out", out_, "a folder for result.json and the figure (PNG and SVG)");
    app.add_flag("--overwrite", overwrite_, "write over the folder's result.json");
    prediction_.add_to(app);
  }

  json run() override {
    const fs::path file = fs::path(out_) / "result.json";
    if (!out_.empty()) check_free(file.string(), overwrite_);
    Device device;
    Arena arena;
    const LoadedModel loaded = load_model(device, arena, model_);
    const Model& model = loaded.model;
    prediction_.samples(model);  // what is wrong with --samples, before the images are read
    const OwnData data = data_.load(model, true);
    std::optional<OwnData> foreign;
    if (foreign_.given()) foreign = foreign_.load(model, false);
    if (!out_.empty()) make_directories(out_);

    json result{{"experiment", "baton_evaluate"}, {"model", describe_model(model)}, {"data", describe_data(data)}};
    prediction_.describe(result, model);
    result["class_names"] = list_classes(model);
    if (const int stage = model.find_stage(content_hash(data.images))) result["data"]["learned_in_stage"] = stage;
    const Predictions known = prediction_.predict(device, loaded, data.images);
    add_quality(result, known, data.images.labels);
    const double most = std::log(double(model.network.classes));
    json edges = json::array();
    for (int b = 0; b <= entropy_bins; b++) edges.push_back(most * b / entropy_bins);
    result["entropy_histogram"] = {{"edges", edges}, {"known", histogram(known.entropy, most)}};
    if (foreign) {
      const Predictions other = prediction_.predict(device, loaded, foreign->images);
      result["entropy_histogram"]["foreign"] = histogram(other.entropy, most);
      add_foreign(result, known, *foreign, other, model.network.classes);
    }
    if (out_.empty()) return result;

    write_file_atomically(file, json_text(result) + "\n");
    const bool drawn = plot(out_);
    result["files"] = {{"result", printable(file.string())}, {"figure", nullptr}};
    if (drawn) {
      result["files"]["figure"] = json::array();
      for (const char* name : {"baton_evaluate.png", "baton_evaluate.svg"})
        result["files"]["figure"].push_back(printable((fs::path(out_) / name).string()));
    }
    return result;
  }

  std::string text(const json& result) const override {
    std::string text = "images      " + data_text(result["data"]) + "\n" + how_text(result);
    if (result["data"].contains("learned_in_stage"))
      text += "NOTE        the model learned these very images (stage " +
              std::to_string(result["data"]["learned_in_stage"].get<int>()) +
              "): the numbers say how well it remembers, not how well it does on new images\n";
    text += "\n" + quality_text(result) + "\n" + classes_text(result) + "\n" + confusion_text(result) + "\n" +
            reliability_text(result);
    if (result.contains("foreign")) text += "\n" + foreign_text(result);
    if (!result.contains("files")) return text;
    text += "\nResult: " + result["files"]["result"].get<std::string>() + "\n";
    for (const json& figure : result["files"]["figure"]) text += "Figure: " + figure.get<std::string>() + "\n";
    if (result["files"]["figure"].is_null())
      text += "The figure was not drawn, for the reason that stands above; tools/plot " +
              fs::path(result["files"]["result"].get<std::string>()).parent_path().string() + " draws it.\n";
    return text;
  }

 private:
  static void add_quality(json& result, const Predictions& p, const std::vector<uint8_t>& labels) {
    const int classes = int(result["class_names"].size());
    const Metrics m = baton::evaluate(p.probability, labels, classes, p.entropy, p.mutual_information);
    const std::vector<std::vector<int64_t>> confusion = confusion_matrix(p.probability, labels, classes);
    int64_t correct = 0;
    json per_class = json::array();
    std::vector<json> confusions;
    for (int c = 0; c < classes; c++) {
      int64_t images = 0;
      for (int predicted = 0; predicted < classes; predicted++) {
        const int64_t count = confusion[c][predicted];
        images += count;
        if (predicted != c && count) confusions.push_back({{"true", c}, {"predicted", predicted}, {"images", count}});
      }
      correct += confusion[c][c];
      json line{{"class", c}, {"name", result["class_names"][c]}};
      line.update(estimate_accuracy(confusion[c][c], images));
      per_class.push_back(line);
    }
    std::stable_sort(confusions.begin(), confusions.end(),
                     [](const json& a, const json& b) { return a["images"] > b["images"]; });
    confusions.resize(std::min(confusions.size(), most_confusions));

    result["accuracy"] = estimate_accuracy(correct, int64_t(labels.size()));
    result["nll"] = m.nll;
    result["brier"] = brier(p.probability, labels, classes);
    result["ece"] = m.ece;
    result["mean_entropy"] = m.entropy;
    result["mean_mutual_information"] = m.mutual_information;
    result["per_class"] = per_class;
    result["confusion"] = confusion;  // [true][predicted]
    result["most_frequent_confusions"] = confusions;
    result["reliability"] = json::array();
    const std::vector<ReliabilityBin> bins = reliability(p.probability, labels, classes, calibration_bins);
    for (int b = 0; b < calibration_bins; b++) {
      const bool empty = bins[b].count == 0;
      result["reliability"].push_back({{"low", double(b) / calibration_bins},
                                       {"high", double(b + 1) / calibration_bins},
                                       {"images", bins[b].count},
                                       {"confidence", empty ? json() : json(bins[b].confidence)},
                                       {"accuracy", empty ? json() : json(bins[b].accuracy)}});
    }
  }

  static void add_foreign(json& result, const Predictions& known, const OwnData& data, const Predictions& foreign,
                          int classes) {
    json j = describe_data(data);
    j["mean_entropy"] = mean(foreign.entropy);
    j["mean_mutual_information"] = mean(foreign.mutual_information);
    j["scores"] = json::array();
    const auto add = [&](const char* name, const std::vector<float>& a, const std::vector<float>& b) {
      const Separation s = separation(a, b);
      j["scores"].push_back({{"score", name}, {"auroc", s.auroc}, {"fpr95", s.fpr95}});
    };
    add("entropy", known.entropy, foreign.entropy);
    add("1 - largest probability", doubt(known, classes), doubt(foreign, classes));
    if (has_epistemic(result)) {
      add("mutual information", known.mutual_information, foreign.mutual_information);
      add("epistemic variance", known.epistemic_variance, foreign.epistemic_variance);
    }
    result["foreign"] = j;
  }

  static std::string quality_text(const json& result) {
    const json& accuracy = result["accuracy"];
    const double blind = std::log(double(result["class_names"].size()));
    const auto images = accuracy["images"].get<int64_t>(), wrong = images - accuracy["correct"].get<int64_t>();
    const bool epistemic = has_epistemic(result);
    return list({{"accuracy",
                  decimals(accuracy["accuracy"], 4) + " (95 %: " + decimals(accuracy["low"], 4) + " to " +
                      decimals(accuracy["high"], 4) + ")",
                  grouped(wrong) + " of " + grouped(images) + " wrong"},
                 {"negative log-likelihood (NLL)", decimals(result["nll"], 4) + " nats an image",
                  "lower is better; " + decimals(blind, 4) + " is guessing"},
                 {"Brier score", decimals(result["brier"], 4), "0 to 2, lower is better"},
                 {"calibration error (ECE, " + std::to_string(calibration_bins) + " bins)", decimals(result["ece"], 4),
                  "how far confidence and accuracy lie apart; 0 is perfect"},
                 {"mean entropy", decimals(result["mean_entropy"], 4) + " nats",
                  "how unsure a prediction is; 0 to " + decimals(blind, 4)},
                 {"mean mutual information",
                  epistemic ? decimals(result["mean_mutual_information"], 4) + " nats" : std::string("-"),
                  epistemic ? "the part of the entropy that comes from not knowing the weights"
                            : "needs several draws of the weights"}});
  }

  // Of many classes, the least accurate ones.
  static std::string classes_text(const json& result) {
    std::vector<json> classes(result["per_class"].begin(), result["per_class"].end());
    const bool some = classes.size() > most_listed;
    if (some) {
      std::stable_sort(classes.begin(), classes.end(), [](const json& a, const json& b) {
        const double x = number_in(a, "accuracy"), y = number_in(b, "accuracy");
        return std::isnan(y) ? !std::isnan(x) : x < y;
      });
      classes.resize(most_listed);
    }
    TextRows rows{{"class", "images", "accuracy", "95 % interval"}};
    for (const json& c : classes) {
      const bool empty = c["accuracy"].is_null();
      rows.push_back({c["name"], grouped(c["images"]), decimals(number_in(c, "accuracy"), 4),
                      empty ? "-" : decimals(number_in(c, "low"), 4) + " to " + decimals(number_in(c, "high"), 4)});
    }
    return (some ? "The " + std::to_string(most_listed) + " least accurate of " +
                       std::to_string(result["per_class"].size()) + " classes (--json has all):\n"
                 : "Accuracy by true class:\n") +
           table(rows);
  }

  static std::string confusion_text(const json& result) {
    const json &confusion = result["confusion"], &names = result["class_names"];
    if (confusion.size() > most_listed) {
      TextRows rows{{"true class", "predicted as", "images"}};
      for (const json& c : result["most_frequent_confusions"])
        rows.push_back({names[c["true"].get<size_t>()], names[c["predicted"].get<size_t>()], grouped(c["images"])});
      return rows.size() == 1 ? "No image was taken for another class.\n"
                              : "The most frequent confusions:\n" + table(rows);
    }
    // Long names head the rows alone; numbers stand for them over the columns.
    size_t longest = 0;
    for (const json& name : names) longest = std::max(longest, name.get<std::string>().size());
    const bool numbered = longest > 6;
    TextRows rows{{"true"}};
    for (size_t c = 0; c < names.size(); c++) {
      const std::string name = names[c];
      rows[0].push_back(numbered ? "(" + std::to_string(c) + ")" : name);
      rows.push_back({numbered ? "(" + std::to_string(c) + ") " + name : name});
    }
    for (size_t c = 0; c < names.size(); c++)
      for (const json& count : confusion[c]) rows[c + 1].push_back(count == 0 ? "." : std::to_string(count.get<int>()));
    return "Confusions, in images: a row for each true class, a column for each predicted one (. is none):\n" +
           table(rows);
  }

  static std::string reliability_text(const json& result) {
    TextRows rows{{"confidence", "images", "mean confidence", "accuracy"}};
    for (const json& bin : result["reliability"])
      if (bin["images"] != 0)
        rows.push_back({decimals(bin["low"], 3) + " to " + decimals(bin["high"], 3), grouped(bin["images"]),
                        decimals(number_in(bin, "confidence"), 4), decimals(number_in(bin, "accuracy"), 4)});
    return "Reliability: where confidence (the predicted class's probability) is right, the last two columns agree.\n" +
           table(rows);
  }

  static std::string foreign_text(const json& result) {
    const json& foreign = result["foreign"];
    const bool epistemic = has_epistemic(result);
    TextRows means{{"", "known", "foreign"},
                   {"mean entropy, nats", decimals(result["mean_entropy"], 4), decimals(foreign["mean_entropy"], 4)}};
    if (epistemic)
      means.push_back({"mean mutual information, nats", decimals(result["mean_mutual_information"], 4),
                       decimals(foreign["mean_mutual_information"], 4)});
    TextRows scores{{"told by", "AUROC", "FPR95"}};
    for (const json& s : foreign["scores"])
      scores.push_back({s["score"], decimals(s["auroc"], 4), decimals(s["fpr95"], 4)});
    return "Foreign images: " + data_text(foreign) + ". The model should be less sure of them than of known ones.\n" +
           table(means) + "\n" + table(scores) +
           "AUROC: the chance that a foreign image is more uncertain than a known one; 1 is best, 0.5 is guessing.\n"
           "FPR95: the share of known images that are taken for foreign where 95 % of the foreign ones are found; "
           "lower is better.\n";
  }

  std::string model_, out_;
  bool overwrite_ = false;
  DataArguments data_, foreign_{"--ood", Split::test, true};
  PredictionArguments prediction_;
};

}  // namespace

std::unique_ptr<Command> evaluate_command() { return std::make_unique<Evaluate>(); }

}  // namespace baton
