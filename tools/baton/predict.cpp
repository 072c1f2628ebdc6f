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

std::string csv_field(const std::string& text) {  // RFC 4180
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (char c : text) quoted += c == '"' ? "\"\"" : std::string(1, c);
  return quoted + '"';
}

// What is known of every image under one name: `width` numbers, or a text in their place where people read it.
struct Series {
  std::string name;
  std::vector<double> numbers;  // [images][width]
  std::vector<std::string> texts{};
  bool whole = false;  // numbers
  size_t width = 1;

  // Nine digits bring every float back.
  std::string cell(size_t i, const std::function<std::string(const std::string&)>& quote) const {
    char digits[32];
    if (!texts.empty()) return quote(texts[i]);
    return std::string(digits, size_t(snprintf(digits, sizeof digits, "%.9g", numbers[i])));
  }
};

std::string format_csv(const std::vector<Series>& all, size_t images) {
  std::string text = "index";
  for (const Series& s : all)
    for (size_t c = 0; c < s.width; c++) text += "," + (s.width > 1 ? "p" + std::to_string(c) : s.name);
  for (size_t i = 0; i < images; i++) {
    text += "\n" + std::to_string(i);
    for (const Series& s : all)
      for (size_t c = 0; c < s.width; c++) text += "," + s.cell(i * s.width + c, csv_field);
  }
  return text + "\n";
}

std::string format_json(const std::vector<Series>& all, size_t images, const Model& model, int samples) {
  std::string text = "{\"classes\": [";
  for (int c = 0; c < model.network.classes; c++) text += (c ? ", " : "") + one_line(model.class_name(c));
  text += "], \"samples\": " + std::to_string(samples) + ", \"images\": [";
  for (size_t i = 0; i < images; i++) {
    text += (i ? ",\n" : "\n") + ("{\"index\": " + std::to_string(i));
    for (const Series& s : all) {
      text += ", \"" + s.name + "\": " + (s.width > 1 ? "[" : "");
      for (size_t c = 0; c < s.width; c++) text += (c ? ", " : "") + s.cell(i * s.width + c, one_line);
      text += s.width > 1 ? "]" : "";
    }
    text += "}";
  }
  return text + "\n]}\n";
}

std::map<std::string, Tensor> collect_arrays(const std::vector<Series>& all, size_t images) {
  std::map<std::string, Tensor> arrays;
  for (const Series& s : all) {
    std::vector<int64_t> shape{int64_t(images)};
    if (s.width > 1) shape.push_back(int64_t(s.width));
    const auto begin = s.numbers.begin(), end = s.numbers.end();
    if (s.whole) arrays[s.name] = Tensor::of<int64_t>(std::vector<int64_t>(begin, end), shape);
    else if (begin != end) arrays[s.name] = Tensor::of<float>(std::vector<float>(begin, end), shape);
  }
  return arrays;
}

// In the order of the columns. chosen: the class of every image.
std::vector<Series> collect_series(const Model& model, const OwnData& data, const Predictions& p,
                                   const std::vector<int>& chosen) {
  const auto doubles = [](const auto& values) { return std::vector<double>(values.begin(), values.end()); };
  std::vector<std::string> names;
  for (int c : chosen) names.push_back(model.class_name(c));
  std::vector<float> aleatoric;
  for (size_t i = 0; i < p.entropy.size(); i++) aleatoric.push_back(p.entropy[i] - p.mutual_information[i]);
  std::vector<Series> all;
  if (!data.names.empty()) all.push_back({"name", {}, data.names});
  if (data.labelled) all.push_back({"label", doubles(data.images.labels), {}, true});
  all.push_back({"prediction", doubles(chosen), names, true});
  all.push_back({"probability", doubles(p.probability), {}, false, size_t(model.network.classes)});
  all.push_back({"entropy", doubles(p.entropy)});
  all.push_back({"mutual_information", doubles(p.mutual_information)});
  all.push_back({"aleatoric_entropy", doubles(aleatoric)});
  all.push_back({"aleatoric_variance", doubles(p.aleatoric_variance)});
  all.push_back({"epistemic_variance", doubles(p.epistemic_variance)});
  return all;
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
    add_model(app);
    data_.add_to(app, "the images", true);
    add_out(app, "where the predictions go, a row an image: .csv, .json, .npz, or .npy (probabilities alone)");
    prediction_.add_to(app);
  }

  json run() override {
    const std::string ending = check_out();
    Device device;
    Arena arena;
    const LoadedModel loaded = load_model(device, arena, model_);
    const Model& model = loaded.model;
    const int samples = prediction_.samples(model);  // what is wrong with --samples, before the images are read
    const OwnData data = data_.load(model, false);
    const Predictions p = prediction_.predict(device, loaded, data.images);
    const std::vector<int> chosen = choose_classes(p, model.network.classes);
    const size_t images = chosen.size();
    const std::vector<Series> all = collect_series(model, data, p, chosen);
    if (ending == ".csv") write_file_atomically(out_, format_csv(all, images));
    if (ending == ".json") write_file_atomically(out_, format_json(all, images, model, samples));
    if (ending == ".npz") save_npz(out_, collect_arrays(all, images));
    if (ending == ".npy") save_npy(out_, collect_arrays(all, images)["probability"]);
    return summarise(model, data, p, chosen);
  }

  std::string text(const json& result) const override {
    json r = result;
    r["most"] = std::log(double(result["classes"].size()));
    const bool epistemic = has_epistemic(result);
    if (!epistemic)
      for (json& image : r["most_uncertain"]) image.erase("mutual_information");
    TextRows means{{"mean entropy", fill(r, "{mean_entropy:.4} nats")}};
    if (epistemic) means.push_back({"mean mutual information", fill(r, "{mean_mutual_information:.4} nats")});
    return "images      " + data_text(r["data"]) + "\n" + how_text(r) + "\nHow often each class was predicted:\n" +
           class_table(r) + "\n" + align_table(means) +
           fill(r, "Entropy: how unsure a prediction is, from 0 (certain) to {most:.4} (all classes alike).\n") +
           (epistemic
                ? "Mutual information: the part of it that comes from not knowing the weights; learning more would "
                  "lower it.\n"
                : "") +
           (r["most_uncertain"].size() == 1 ? "\nThe most uncertain image:\n" : "\nThe most uncertain images:\n") +
           table(r["most_uncertain"],
                 "image={index}; name={name}; prediction={prediction}; its probability={probability:.4}; "
                 "entropy={entropy:.4}; mutual information={mutual_information:.4}") +
           fill(r, r.contains("out") ? "\nPredictions: {out}\n"
                                     : "\nNothing was written; --out predictions.csv keeps a row an image.\n");
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

  json summarise(const Model& model, const OwnData& data, const Predictions& p, const std::vector<int>& chosen) const {
    json result{{"command", "predict"}, {"model", describe_model(model)}, {"data", describe_data(data)}};
    prediction_.describe(result, model);
    const std::vector<std::string> names = list_classes(model);
    const int classes = int(names.size());
    result["classes"] = json::array();
    for (int c = 0; c < classes; c++)
      result["classes"].push_back(
          {{"class", c}, {"name", names[c]}, {"images", std::count(chosen.begin(), chosen.end(), c)}});
    result["mean_entropy"] = mean(p.entropy);
    result["mean_mutual_information"] = mean(p.mutual_information);

    std::vector<size_t> order(chosen.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return p.entropy[a] > p.entropy[b]; });
    order.resize(std::min<size_t>(5, order.size()));
    result["most_uncertain"] = json::array();
    for (size_t i : order) {
      json image{{"index", i}};
      if (!data.names.empty()) image["name"] = printable(data.names[i]);
      if (data.labelled) image["label"] = data.images.labels[i];
      image["prediction"] = names[chosen[i]];
      image["probability"] = p.probability[i * classes + chosen[i]];
      image["entropy"] = p.entropy[i];
      image["mutual_information"] = p.mutual_information[i];
      result["most_uncertain"].push_back(image);
    }
    if (!out_.empty()) result["out"] = printable(out_);
    return result;
  }

  // Of many classes, the most frequent ones.
  static std::string class_table(const json& result) {
    json classes = result["classes"];
    const bool some = classes.size() > 20;
    if (some) classes = first_rows(classes, 20, [](const json& a, const json& b) { return a["images"] > b["images"]; });
    json rows = json::array();
    for (json& c : classes) {
      c["share"] = number_in(c, "images") / number_in(result, "data/images");
      if (!some || c["images"] != 0) rows.push_back(c);
    }
    return table(rows, "class={name}; images={images:,}; share={share:%}") +
           (some ? "(the " + std::to_string(rows.size()) + " most frequent of " +
                       std::to_string(result["classes"].size()) + "; --json has all)\n"
                 : "");
  }
};

}  // namespace

std::unique_ptr<Command> predict_command() { return std::make_unique<Predict>(); }

}  // namespace baton
