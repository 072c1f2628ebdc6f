// baton evaluate: how good predictions of labelled images are, how well their confidence is calibrated, and how well
// their uncertainty tells foreign images.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <optional>

#include "engine/io/files.h"
#include "tools/baton/describe.h"
#include "trainers/metrics.h"

namespace baton {

namespace {

namespace fs = std::filesystem;

constexpr int calibration_bins = 15, entropy_bins = 40;
constexpr size_t most_listed = 20;  // classes in a table of the text

// {"images", "correct", "accuracy", and Wilson's 95 % interval of it, "low" and "high"}; of no images the last three
// are null.
json estimate_accuracy(int64_t correct, int64_t images) {
  json j{{"images", images}, {"correct", correct}, {"accuracy", nullptr}, {"low", nullptr}, {"high", nullptr}};
  if (images == 0) return j;
  constexpr double z = 1.959963984540054;
  const double n = double(images), p = double(correct) / n, zz = z * z / n;
  const double centre = (p + zz / 2) / (1 + zz);
  const double half = z * std::sqrt(p * (1 - p) / n + zz / (4 * n)) / (1 + zz);
  j["accuracy"] = p;
  j["low"] = std::max(0.0, centre - half);
  j["high"] = std::min(1.0, centre + half);
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
  const pid_t child = fork();
  if (child == 0) {
    dup2(STDERR_FILENO, STDOUT_FILENO);
    execl(program.c_str(), program.c_str(), "--", where.c_str(), nullptr);
    _exit(127);
  }
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
    add_model(app);
    data_.add_to(app, "labelled images", true);
    foreign_.add_to(app, "foreign images of no class that the model knows (out of distribution; labels do not matter)",
                    false);
    add_out(app, "a folder for result.json and the figure (PNG and SVG)");
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
    result["files"] = {{"result", printable(file.string())}, {"figure", nullptr}};
    if (plot(out_))
      for (const char* name : {"baton_evaluate.png", "baton_evaluate.svg"})
        result["files"]["figure"].push_back(printable((fs::path(out_) / name).string()));
    return result;
  }

  std::string text(const json& result) const override {
    std::string text = "images      " + data_text(result["data"]) + "\n" + how_text(result);
    if (result["data"].contains("learned_in_stage"))
      text +=
          fill(result,
               "NOTE        the model learned these very images (stage {data/learned_in_stage}): the numbers say how "
               "well it remembers, not how well it does on new images\n");
    text += "\n" + quality_text(result) + "\n" + classes_text(result) + "\n" + confusion_text(result) + "\n" +
            reliability_text(result);
    if (result.contains("foreign")) text += "\n" + foreign_text(result);
    if (!result.contains("files")) return text;
    text += fill(result, "\nResult: {files/result}\n");
    if (!result["files"]["figure"].is_null())
      return text + fill(result, "Figure: {files/figure/0}\nFigure: {files/figure/1}\n");
    return text + "The figure was not drawn, for the reason that stands above; tools/plot " + printable(out_) +
           " draws it.\n";
  }

 private:
  static void add_quality(json& result, const Predictions& p, const std::vector<uint8_t>& labels) {
    const int classes = int(result["class_names"].size());
    const Metrics m = baton::evaluate(p.probability, labels, classes, p.entropy, p.mutual_information);
    const std::vector<std::vector<int64_t>> confusion = confusion_matrix(p.probability, labels, classes);
    int64_t correct = 0;
    json per_class = json::array(), confusions = json::array();
    for (int c = 0; c < classes; c++) {
      int64_t images = 0;
      for (int predicted = 0; predicted < classes; predicted++) {
        const int64_t count = confusion[c][predicted];
        images += count;
        if (predicted != c && count) confusions.push_back({{"true", c}, {"predicted", predicted}, {"images", count}});
      }
      correct += confusion[c][c];
      per_class.push_back({{"class", c}, {"name", result["class_names"][c]}});
      per_class.back().update(estimate_accuracy(confusion[c][c], images));
    }
    const auto more = [](const json& a, const json& b) { return a["images"] > b["images"]; };

    result.update({{"accuracy", estimate_accuracy(correct, int64_t(labels.size()))},
                   {"nll", m.nll},
                   {"brier", brier(p.probability, labels, classes)},
                   {"ece", m.ece},
                   {"mean_entropy", m.entropy},
                   {"mean_mutual_information", m.mutual_information},
                   {"per_class", per_class},
                   {"confusion", confusion},  // [true][predicted]
                   {"most_frequent_confusions", first_rows(confusions, 10, more)},
                   {"reliability", json::array()}});
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
    json r = result;
    r["wrong"] = number_in(r, "accuracy/images") - number_in(r, "accuracy/correct");
    r["blind"] = std::log(double(r["class_names"].size()));
    r["bins"] = calibration_bins;
    return list(
        r,
        "accuracy|{accuracy/accuracy:.4} (95 %: {accuracy/low:.4} to {accuracy/high:.4})|"
        "{wrong:,} of {accuracy/images:,} wrong\n"
        "negative log-likelihood (NLL)|{nll:.4} nats an image|lower is better; {blind:.4} is guessing\n"
        "Brier score|{brier:.4}|0 to 2, lower is better\n"
        "calibration error (ECE, {bins} bins)|{ece:.4}|how far confidence and accuracy lie apart; 0 is perfect\n"
        "mean entropy|{mean_entropy:.4} nats|how unsure a prediction is; 0 to {blind:.4}\n" +
            std::string(has_epistemic(r) ? "mean mutual information|{mean_mutual_information:.4} nats|"
                                           "the part of the entropy that comes from not knowing the weights"
                                         : "mean mutual information|-|needs several draws of the weights"));
  }

  // Of many classes, the least accurate ones.
  static std::string classes_text(const json& result) {
    json classes = result["per_class"];
    std::string heading = "Accuracy by true class:\n";
    if (classes.size() > most_listed) {
      heading = "The " + std::to_string(most_listed) + " least accurate of " + std::to_string(classes.size()) +
                " classes (--json has all):\n";
      classes = first_rows(classes, most_listed, [](const json& a, const json& b) {
        const double x = number_in(a, "accuracy"), y = number_in(b, "accuracy");
        return std::isnan(y) ? !std::isnan(x) : x < y;
      });
    }
    for (json& c : classes) c["interval"] = c["low"].is_null() ? "-" : fill(c, "{low:.4} to {high:.4}");
    return heading +
           table(classes, "class={name}; images={images:,}; accuracy={accuracy:.4}; 95 % interval={interval}");
  }

  static std::string confusion_text(const json& result) {
    const json &confusion = result["confusion"], &names = result["class_names"];
    if (confusion.size() > most_listed) {
      json most = result["most_frequent_confusions"];
      for (json& c : most)
        for (const char* side : {"true", "predicted"}) c[side] = names[size_t(c[side])];
      if (most.empty()) return "No image was taken for another class.\n";
      return "The most frequent confusions:\n" +
             table(most, "true class={true}; predicted as={predicted}; images={images:,}");
    }
    // Long names head the rows alone; numbers stand for them over the columns.
    const bool numbered =
        std::any_of(names.begin(), names.end(), [](const json& n) { return std::string(n).size() > 6; });
    TextRows rows{{"true"}};
    for (size_t c = 0; c < names.size(); c++) {
      const std::string name = names[c], number = "(" + std::to_string(c) + ")";
      rows[0].push_back(numbered ? number : name);
      rows.push_back({numbered ? number + " " + name : name});
      for (const json& count : confusion[c]) rows.back().push_back(count == 0 ? "." : count.dump());
    }
    return "Confusions, in images: a row for each true class, a column for each predicted one (. is none):\n" +
           align_table(rows);
  }

  static std::string reliability_text(const json& result) {
    json bins = json::array();
    for (const json& bin : result["reliability"])
      if (bin["images"] != 0) bins.push_back(bin);
    return "Reliability: where confidence (the predicted class's probability) is right, the last two columns agree.\n" +
           table(bins,
                 "confidence={low:.3} to {high:.3}; images={images:,}; mean confidence={confidence:.4}; "
                 "accuracy={accuracy:.4}");
  }

  static std::string foreign_text(const json& result) {
    TextRows means{{"", "known", "foreign"}};
    means.push_back(
        {"mean entropy, nats", fill(result, "{mean_entropy:.4}"), fill(result, "{foreign/mean_entropy:.4}")});
    if (has_epistemic(result))
      means.push_back({"mean mutual information, nats", fill(result, "{mean_mutual_information:.4}"),
                       fill(result, "{foreign/mean_mutual_information:.4}")});
    return "Foreign images: " + data_text(result["foreign"]) +
           ". The model should be less sure of them than of known ones.\n" + align_table(means) + "\n" +
           table(result["foreign"]["scores"], "told by={score}; AUROC={auroc:.4}; FPR95={fpr95:.4}") +
           "AUROC: the chance that a foreign image is more uncertain than a known one; 1 is best, 0.5 is guessing.\n"
           "FPR95: the share of known images that are taken for foreign where 95 % of the foreign ones are found; "
           "lower is better.\n";
  }

  DataArguments foreign_{"--ood", "test", true};
};

}  // namespace

std::unique_ptr<Command> evaluate_command() { return std::make_unique<Evaluate>(); }

}  // namespace baton
