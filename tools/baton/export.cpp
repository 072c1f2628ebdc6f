// baton export: the network at the posterior mean, as PyTorch reads it.
#include <algorithm>

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
    add_model(app);
    add_out(app, "the safetensors file to write, of tensors \"conv1.weight\", ...")->required();
    app.add_option("--dtype", dtype_, "type of the numbers: f32")->check(CLI::IsMember({"f32"}))->capture_default_str();
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
    const bool uncertain = r["model"]["uncertain"], mnf = r["model"]["kind"] == "mnf";
    json shown = r;
    for (json& t : shown["tensors"]) t["shape"] = shape_text(t["shape"].get<std::vector<int64_t>>());
    shown["what"] = !uncertain ? "weights"
                               : std::string("mean of the posterior") + (mnf ? ", z at its flow's mean" : "") +
                                     "; what is uncertain about the weights stays behind";
    shown["quoted"] = r["out"].dump();
    shown["factor"] = channels_text(r["normalisation"]["scale"]);
    const std::string shift = channels_text(r["normalisation"]["shift"]);
    shown["shift"] = shift == "0" ? "" : " + " + shift;
    return "model       " + model_text(r["model"]) +
           fill(shown, "\nwritten     {out}, {parameters:,} numbers (float32): the {what}\n\n") +
           table(shown["tensors"], "tensor={tensor}; shape={shape}") +
           fill(shown,
                "\nIn Python, for a torch.nn.Module `network` with layers of these names:\n\n"
                "import torch, safetensors.torch\n"
                "network.load_state_dict(safetensors.torch.load_file({quoted}))\n"
                "x = pixels.float() * {factor}{shift}  # bytes, [n, {image/0}, {image/1}, {image/2}]\n"
                "probability = torch.softmax(network(x), dim=1)\n");
  }

 private:
  // A number for each channel, in Python; one for all where they are the same.
  static std::string channels_text(const json& channels) {
    std::string all;
    for (const json& x : channels) {
      char number[32];
      snprintf(number, sizeof number, "%.9g", x.get<double>());
      all += (all.empty() ? "" : ", ") + std::string(number);
      if (std::count(channels.begin(), channels.end(), x) == int64_t(channels.size())) return all;
    }
    return "torch.tensor([" + all + "]).view(-1, 1, 1)";
  }

  std::string dtype_ = "f32";
};

}  // namespace

std::unique_ptr<Command> export_command() { return std::make_unique<ExportCommand>(); }

}  // namespace baton
