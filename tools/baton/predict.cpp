// baton predict: every image's class probabilities, and how uncertain they are.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/io/files.h"
#include "engine/io/npy.h"
#include "tools/baton/describe.h"

namespace baton {

namespace {

namespace fs = std::filesystem;

// The figures of an image beside its probabilities, in the order of the columns.
struct Figure {
  const char* name;
  std::vector<float> values;
};
std::vector<Figure> collect_figures(const Predictions& p) {
  std::vector<float> aleatoric(p.entropy.size());
  for (size_t i = 0; i < aleatoric.size(); i++) aleatoric[i] = p.entropy[i] - p.mutual_information[i];
  return {{"entropy", p.entropy},
          {"mutual_information", p.mutual_information},
          {"aleatoric_entropy", std::move(aleatoric)},
          {"aleatoric_variance", p.aleatoric_variance},
          {"epistemic_variance", p.epistemic_variance}};
}

// Nine digits bring every float back.
void add(std::string& text, float value) {
  char digits[32];
  text.append(digits, size_t(snprintf(digits, sizeof digits, "%.9g", double(value))));
}

std::string csv_field(const std::string& text) {  // RFC 4180
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (char c : text) quoted += c == '"' ? "\"\"" : std::string(1, c);
  return quoted + '"';
}

std::string json_string(const std::string& text) {
  return json(text).dump(-1, ' ', false, json::error_handler_t::replace);
}

// A row an image.
struct Predicted {
  const Model& model;
  const OwnData& data;
  const Predictions& predictions;
  std::vector<int> chosen;  // the class of an image, the first of equals
  int samples;

  int count() const { return data.images.count; }
  int classes() const { return model.network.classes; }
  const float* probability(int i) const { return &predictions.probability[size_t(i) * classes()]; }
};

std::string format_csv(const Predicted& rows) {
  const bool named = !rows.data.names.empty();
  const std::vector<Figure> figures = collect_figures(rows.predictions);
  std::string text = std::string("index") + (named ? ",name" : "") + (rows.data.labelled ? ",label" : "");
  text += ",prediction";
  for (int c = 0; c < rows.classes(); c++) text += ",p" + std::to_string(c);
  for (const Figure& f : figures) text += std::string(",") + f.name;
  text += '\n';
  for (int i = 0; i < rows.count(); i++) {
    text += std::to_string(i);
    if (named) text += ',' + csv_field(rows.data.names[i]);
    if (rows.data.labelled) text += ',' + std::to_string(rows.data.images.labels[i]);
    text += ',' + csv_field(rows.model.class_name(rows.chosen[i]));
    for (int c = 0; c < rows.classes(); c++) text += ',', add(text, rows.probability(i)[c]);
    for (const Figure& f : figures) text += ',', add(text, f.values[i]);
    text += '\n';
  }
  return text;
}

std::string format_json(const Predicted& rows) {
  const std::vector<Figure> figures = collect_figures(rows.predictions);
  std::string text = "{\"classes\": [";
  for (int c = 0; c < rows.classes(); c++) text += (c ? ", " : "") + json_string(rows.model.class_name(c));
  text += "], \"samples\": " + std::to_string(rows.samples) + ", \"images\": [";
  for (int i = 0; i < rows.count(); i++) {
    text += (i ? ",\n" : "\n") + ("{\"index\": " + std::to_string(i));
    if (!rows.data.names.empty()) text += ", \"name\": " + json_string(rows.data.names[i]);
    if (rows.data.labelled) text += ", \"label\": " + std::to_string(rows.data.images.labels[i]);
    text += ", \"prediction\": " + json_string(rows.model.class_name(rows.chosen[i])) + ", \"probability\": [";
    for (int c = 0; c < rows.classes(); c++) text += c ? ", " : "", add(text, rows.probability(i)[c]);
    text += "]";
    for (const Figure& f : figures) text += std::string(", \"") + f.name + "\": ", add(text, f.values[i]);
    text += "}";
  }
  return text + "\n]}\n";
}

std::map<std::string, Tensor> collect_arrays(const Predicted& rows) {
  const int64_t n = rows.count();
  std::map<std::string, Tensor> arrays;
  arrays["probability"] = Tensor::of<float>(rows.predictions.probability, {n, rows.classes()});
  arrays["prediction"] = Tensor::of<int64_t>(std::vector<int64_t>(rows.chosen.begin(), rows.chosen.end()), {n});
  const std::vector<uint8_t>& labels = rows.data.images.labels;
  if (rows.data.labelled)
    arrays["label"] = Tensor::of<int64_t>(std::vector<int64_t>(labels.begin(), labels.end()), {n});
  for (const Figure& f : collect_figures(rows.predictions)) arrays[f.name] = Tensor::of<float>(f.values, {n});
  return arrays;
}

class Predict : public Command {
 public:
  Predict()
      : Command("predict", "class probabilities of images, and how uncertain they are",
                "  baton predict --model model.safetensors --data photos/ --out predictions.csv\n"
                "      a row for every PNG or JPEG of the folder: class, probabilities, uncertainties\n"
                "  baton predict --model model.safetensors --data t10k-images-idx3-ubyte.gz --samples 20 --out p.npz\n"
                "      MNIST's test images, averaged over 20 draws of the weights; numpy.load reads the file\n"
                "  baton predict --model model.safetensors --data new.npy --images 0:100 --mean\n"
                "      one fast pass over the first 100 images, with the mean of the weights; nothing is written\n") {}

  void add_options(CLI::App& app) override {
    app.add_option("--model", model_, "the model")->required();
    data_.add_to(app, "the images", true);
    app.add_option("--out", out_,
                   "where the predictions go, a row an image: .csv, .json, .npz, or .npy (probabilities alone)");
    app.add_flag("--overwrite", overwrite_, "write over a file that is there");
    prediction_.add_to(app);
  }

  json run() override {
    const std::string ending = check_out();
    Device device;
    Arena arena;
    const LoadedModel loaded = load_model(device, arena, model_);
    const int samples = prediction_.samples(loaded.model);  // what is wrong with --samples, before the images are read
    const OwnData data = data_.load(loaded.model, false);
    const Predictions p = prediction_.predict(device, loaded, data.images);
    Predicted rows{loaded.model, data, p, {}, samples};
    for (int i = 0; i < rows.count(); i++) {
      const float* of_image = rows.probability(i);
      rows.chosen.push_back(int(std::max_element(of_image, of_image + rows.classes()) - of_image));
    }
    if (ending == ".csv") write_file_atomically(out_, format_csv(rows));
    if (ending == ".json") write_file_atomically(out_, format_json(rows));
    if (ending == ".npz") save_npz(out_, collect_arrays(rows));
    if (ending == ".npy")
      save_npy(out_, Tensor::of<float>(p.probability, {int64_t(rows.count()), int64_t(rows.classes())}));
    return summarise(rows);
  }

  std::string text(const json& result) const override {
    const bool epistemic = has_epistemic(result);
    std::string text = "images      " + data_text(result["data"]) + "\n" + how_text(result) + "\n";
    text += "How often each class was predicted:\n" + class_table(result);

    const double most = std::log(double(result["classes"].size()));
    TextRows means{{"mean entropy", decimals(result["mean_entropy"], 4) + " nats"}};
    if (epistemic)
      means.push_back({"mean mutual information", decimals(result["mean_mutual_information"], 4) + " nats"});
    text += "\n" + table(means);
    text += "Entropy: how unsure a prediction is, from 0 (certain) to " + decimals(most, 4) + " (all classes alike).\n";
    if (epistemic)
      text +=
          "Mutual information: the part of it that comes from not knowing the weights; learning more would lower it.\n";

    const json& uncertain = result["most_uncertain"];
    text += "\nThe most uncertain " + std::string(uncertain.size() == 1 ? "image" : "images") + ":\n";
    TextRows images{{"image"}};
    const bool named = uncertain[0].contains("name");
    if (named) images[0].push_back("name");
    for (const char* heading : {"prediction", "its probability", "entropy"}) images[0].push_back(heading);
    if (epistemic) images[0].push_back("mutual information");
    for (const json& image : uncertain) {
      images.push_back({std::to_string(image["index"].get<int64_t>())});
      if (named) images.back().push_back(image["name"]);
      images.back().push_back(image["prediction"]);
      for (const char* figure : {"probability", "entropy", "mutual_information"})
        if (epistemic || figure != std::string("mutual_information"))
          images.back().push_back(decimals(image[figure], 4));
    }
    text += table(images);
    if (!result.contains("out")) return text + "\nNothing was written; --out predictions.csv keeps a row an image.\n";
    return text + "\nPredictions: " + result["out"].get<std::string>() + "\n";
  }

 private:
  // What is wrong with --out is said before the work. "": there is none.
  std::string check_out() const {
    if (out_.empty()) return "";
    std::string ending = fs::path(out_).extension().string();
    std::transform(ending.begin(), ending.end(), ending.begin(), [](unsigned char c) { return char(std::tolower(c)); });
    if (ending != ".csv" && ending != ".json" && ending != ".npy" && ending != ".npz")
      throw InputError("--out is '" + out_ + "'; expected a file whose name ends in .csv, .json, .npy or .npz");
    check_free(out_, overwrite_);
    const fs::path folder = fs::path(out_).parent_path();
    std::error_code ignored;
    if (fs::is_directory(out_, ignored)) throw InputError("--out: " + out_ + " is a folder");
    if (!folder.empty() && !fs::is_directory(folder, ignored))
      throw InputError("--out: there is no folder " + folder.string());
    return ending;
  }

  json summarise(const Predicted& rows) const {
    const Predictions& p = rows.predictions;
    json result{{"command", "predict"}, {"model", describe_model(rows.model)}, {"data", describe_data(rows.data)}};
    prediction_.describe(result, rows.model);
    std::vector<int64_t> counts(rows.classes());
    for (int c : rows.chosen) counts[c]++;
    const std::vector<std::string> names = list_classes(rows.model);
    result["classes"] = json::array();
    for (int c = 0; c < rows.classes(); c++)
      result["classes"].push_back({{"class", c}, {"name", names[c]}, {"images", counts[c]}});
    result["mean_entropy"] = mean(p.entropy);
    result["mean_mutual_information"] = mean(p.mutual_information);

    std::vector<int> order(rows.count());
    std::iota(order.begin(), order.end(), 0);
    const size_t shown = std::min<size_t>(5, order.size());
    std::partial_sort(order.begin(), order.begin() + std::ptrdiff_t(shown), order.end(),
                      [&](int a, int b) { return p.entropy[a] != p.entropy[b] ? p.entropy[a] > p.entropy[b] : a < b; });
    result["most_uncertain"] = json::array();
    for (size_t k = 0; k < shown; k++) {
      const int i = order[k];
      json image{{"index", i}};
      if (!rows.data.names.empty()) image["name"] = printable(rows.data.names[i]);
      if (rows.data.labelled) image["label"] = rows.data.images.labels[i];
      image["prediction"] = names[rows.chosen[i]];
      image["probability"] = rows.probability(i)[rows.chosen[i]];
      image["entropy"] = p.entropy[i];
      image["mutual_information"] = p.mutual_information[i];
      result["most_uncertain"].push_back(image);
    }
    if (!out_.empty()) result["out"] = printable(out_);
    return result;
  }

  // Of many classes, the most frequent ones.
  static std::string class_table(const json& result) {
    constexpr size_t most = 20;
    std::vector<json> classes(result["classes"].begin(), result["classes"].end());
    const bool some = classes.size() > most;
    if (some) {
      std::stable_sort(classes.begin(), classes.end(),
                       [](const json& a, const json& b) { return a["images"] > b["images"]; });
      classes.resize(most);
      std::erase_if(classes, [](const json& c) { return c["images"] == 0; });
    }
    TextRows rows{{"class", "images", "share"}};
    for (const json& c : classes) {
      const auto n = c["images"].get<int64_t>();
      rows.push_back({c["name"], grouped(n), percent(double(n) / result["data"]["images"].get<double>())});
    }
    return table(rows) + (some ? "(the " + std::to_string(classes.size()) + " most frequent of " +
                                     std::to_string(result["classes"].size()) + "; --json has all)\n"
                               : "");
  }

  std::string model_, out_;
  bool overwrite_ = false;
  DataArguments data_;
  PredictionArguments prediction_;
};

}  // namespace

std::unique_ptr<Command> predict_command() { return std::make_unique<Predict>(); }

}  // namespace baton
