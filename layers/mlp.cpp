// The multilayer perceptron of Zeno et al. 2018 (MNIST: 784-h-h-10): fc1, ReLU, fc2, ReLU, ..., output layer.
#include <cmath>

#include "layers/networks.h"

namespace baton {

namespace {

std::string name_layers(const NetworkSpec& spec) {  // "mlp-784-400-400-10"
  std::string name = "mlp-" + std::to_string(spec.image.size());
  for (const json& width : spec.options["hidden"]) name += "-" + width.dump();
  return name + "-" + std::to_string(spec.classes);
}

class Mlp : public Network {
 public:
  explicit Mlp(const NetworkSpec& spec) : Network(name_layers(spec), spec.image, spec.classes) {
    const std::vector<int> hidden = spec.options["hidden"];
    if (hidden.empty() || hidden.size() > 16) throw InputError("an mlp has 1 to 16 hidden layers");
    for (size_t i = 0; i < hidden.size(); i++) add_dense("fc" + std::to_string(i + 1), hidden[i]);
    add_head("fc" + std::to_string(hidden.size() + 1));
  }
};

// Widths are the layers' first extents. A square number of inputs is taken for a grey image, 3,072 for a colour one.
void recognise(const TensorShapes& shapes, NetworkSpec& spec) {
  const auto weight = [&](int layer) {
    const auto found = shapes.find("fc" + std::to_string(layer) + ".weight");
    return found == shapes.end() || found->second.size() != 2 ? std::vector<int64_t>{} : found->second;
  };
  int layers = 0;
  while (!weight(layers + 1).empty()) layers++;
  const auto convolution = shapes.find("conv1.weight");
  if (layers < 2 || (convolution != shapes.end() && convolution->second.size() == 4)) throw InputError("no mlp");
  spec.options["hidden"] = json::array();
  for (int i = 1; i < layers; i++) spec.options["hidden"].push_back(std::min<int64_t>(weight(i)[0], 1 << 20));
  const int64_t in = weight(1)[1];
  const int side = int(std::lround(std::sqrt(double(std::min<int64_t>(in, 1 << 20)))));
  if (in == 3 * 32 * 32) spec.image = {3, 32, 32};
  else if (int64_t(side) * side == in) spec.image = {1, side, side};
}

}  // namespace

extern const NetworkKind mlp_kind{
    "mlp",
    {1, 28, 28},
    true,
    {wholes_option("hidden", {400, 400}, {1, 1 << 16}, "widths of the hidden layers of an mlp, as 400,400")},
    make_chain<Mlp>,
    recognise};

}  // namespace baton
