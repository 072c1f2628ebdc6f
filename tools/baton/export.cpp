// baton export: the network at the posterior mean, as PyTorch reads it.
#include "tools/baton/describe.h"

namespace baton {

namespace {

class ExportCommand : public Command {
 public:
  ExportCommand()
      : Command("export", "write the mean of the weights for PyTorch",
                "  baton export --model model.safetensors --out weights.safetensors\n"
                "      a plain network's weights, and the Python that loads them\n") {}

  void add_options(CLI::App& app) override {
    app.add_option("--model", model_, "the model")->required();
    app.add_option("--out", out_, "the safetensors file to write, of tensors \"conv1.weight\", ...")->required();
    app.add_option("--dtype", dtype_, "type of the numbers: f32")->check(CLI::IsMember({"f32"}))->capture_default_str();
    app.add_flag("--overwrite", overwrite_, "write over --out if it is there");
  }

  json run() override {
    check_free(out_, overwrite_);
    Device device;
    Arena arena;
    const auto [model, posterior] = load_model(device, arena, model_);
    TensorFile file = mean_network(device, *posterior);
    file.metadata["format"] = "pt";  // what the loaders of PyTorch ask for
    file.metadata["architecture"] = model.network.description();
    file.metadata["normalisation"] = normalisation_json(model).dump();
    file.metadata["class_names"] = json(model.class_names).dump();
    save_safetensors(out_, file);

    const ImageShape& image = model.network.image;
    json result{{"command", "export"},
                {"model", describe_model(model)},
                {"out", printable(out_)},
                {"dtype", dtype_},
                {"image", {image.channels, image.height, image.width}},
                {"normalisation", normalisation_json(model)},
                {"class_names", list_classes(model)},
                {"tensors", json::array()}};
    const ParameterLayout& layout = posterior->store().layout();
    for (const TensorSpec& t : layout.tensors()) result["tensors"].push_back({{"tensor", t.name}, {"shape", t.shape}});
    result["parameters"] = layout.parameters();
    return result;
  }

  std::string text(const json& r) const override {
    TextRows rows{{"tensor", "shape"}};
    for (const json& t : r["tensors"])
      rows.push_back({t["tensor"], shape_text(t["shape"].get<std::vector<int64_t>>())});
    std::string text = "model       " + model_text(r["model"]) + "\nwritten     " + r["out"].get<std::string>() + ", " +
                       grouped(r["parameters"]) + " numbers (float32): the ";
    if (!r["model"]["uncertain"]) text += "weights\n";
    else
      text += std::string("mean of the posterior") + (r["model"]["kind"] == "mnf" ? ", z at its flow's mean" : "") +
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
