// baton export: the network at the posterior mean, as PyTorch reads it.
#include "engine/io/safetensors.h"
#include "tools/baton/layers.h"
#include "tools/baton/predictions.h"

namespace baton {

namespace {

class ExportCommand : public Command {
 public:
  const char* name() const override { return "export"; }
  const char* summary() const override { return "write the mean of the weights for PyTorch"; }
  const char* examples() const override {
    return "  baton export --model model.safetensors --out weights.safetensors\n"
           "      a plain network's weights, and the Python that loads them\n";
  }
  void add_options(CLI::App& app) override {
    app.add_option("--model", model_, "the model")->required();
    app.add_option("--out", out_, "the safetensors file to write, of tensors \"conv1.weight\", ...")->required();
    app.add_option("--dtype", dtype_, "type of the numbers: f32")->check(CLI::IsMember({"f32"}))->capture_default_str();
    app.add_flag("--overwrite", overwrite_, "write over --out if it is there");
  }

  json run() override {
    check_free(out_, overwrite_);
    const Model model = load_model(model_);
    Device device;
    TensorFile file = mean_network(device, model);
    file.metadata["format"] = "pt";  // what the loaders of PyTorch ask for
    file.metadata["architecture"] = model.architecture.description();
    file.metadata["normalisation"] = to_json(model.normalisation, model.architecture.channels).dump();
    file.metadata["class_names"] = json(model.class_names).dump();
    save_safetensors(out_, file);

    json result;
    result["command"] = "export";
    result["model"] = description_of(model);
    result["out"] = printable(out_);
    result["dtype"] = dtype_;
    const Architecture& a = model.architecture;
    result["image"] = {a.channels, a.height, a.width};
    result["normalisation"] = to_json(model.normalisation, a.channels);
    result["class_names"] = class_names(model);
    result["tensors"] = json::array();
    const auto network = a.network()();
    for (const TensorSpec& t : network->layout().tensors())
      result["tensors"].push_back({{"tensor", t.name}, {"shape", t.shape}});
    result["parameters"] = network->layout().parameters();
    return result;
  }

  std::string text(const json& r) const override {
    std::vector<std::vector<std::string>> rows{{"tensor", "shape"}};
    for (const json& t : r["tensors"])
      rows.push_back({t["tensor"], shape_text(t["shape"].get<std::vector<int64_t>>())});
    const std::string family = r["model"]["family"];
    std::string text = "model       " + model_text(r["model"]) + "\nwritten     " + r["out"].get<std::string>() + ", " +
                       grouped(r["parameters"]) + " numbers (float32): the ";
    if (family == "ft") text += "weights\n";
    else
      text += std::string("mean of the posterior") + (family == "mnf" ? ", z at its flow's mean" : "") +
              "; what is uncertain about the weights stays behind\n";
    text += "\n" + table(rows) + "\nIn Python, for a torch.nn.Module `network` with layers of these names:\n\n";
    const auto values = [&](const char* key) {
      const auto list = r["normalisation"][key].get<std::vector<float>>();
      bool same = true;
      for (float x : list) same = same && x == list[0];
      std::string all;
      char number[32];
      if (same && list[0] == 0) return std::string();
      for (float x : list) {
        snprintf(number, sizeof number, "%.9g", double(x));
        all += (all.empty() ? "" : ", ") + std::string(number);
        if (same) return all;
      }
      return "torch.tensor([" + all + "]).view(-1, 1, 1)";
    };
    const auto image = r["image"].get<std::vector<int>>();
    text += "import torch, safetensors.torch\n";
    text += "network.load_state_dict(safetensors.torch.load_file(" + r["out"].dump() + "))\n";
    const std::string shift = values("shift");
    text += "x = pixels.float() * " + values("scale") + (shift.empty() ? "" : " + " + shift) + "  # bytes, [n, " +
            std::to_string(image[0]) + ", " + std::to_string(image[1]) + ", " + std::to_string(image[2]) + "]\n";
    text += "probability = torch.softmax(network(x), dim=1)\n";
    return text;
  }

 private:
  std::string model_, out_, dtype_ = "f32";
  bool overwrite_ = false;
};

}  // namespace

std::unique_ptr<Command> export_command() { return std::make_unique<ExportCommand>(); }

}  // namespace baton
