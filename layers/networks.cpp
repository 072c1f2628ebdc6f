#include "layers/networks.h"

#include "engine/io/safetensors.h"

namespace baton {

extern const NetworkKind lenet5_kind, conv3fc3_kind, vgg11_kind, mlp_kind, task_cnn_kind;

const std::vector<const NetworkKind*>& network_kinds() {
  static const std::vector<const NetworkKind*> kinds{&lenet5_kind, &conv3fc3_kind, &vgg11_kind, &mlp_kind,
                                                     &task_cnn_kind};
  return kinds;
}

namespace {

std::string describe_image(const ImageShape& s) {
  return std::to_string(s.height) + " x " + std::to_string(s.width) + (s.channels == 1 ? " grey" : " colour");
}

}  // namespace

std::string list_networks() {
  std::string list;
  for (const NetworkKind* kind : network_kinds())
    list += (list.empty() ? "" : kind == network_kinds().back() ? " or " : ", ") + std::string(kind->name);
  return list;
}

const NetworkKind& find_network(const std::string& name) {
  for (const NetworkKind* kind : network_kinds())
    if (name == kind->name) return *kind;
  throw InputError("unknown architecture '" + name + "': " + list_networks());
}

std::string NetworkSpec::description() const {
  std::string text = name;
  for (const auto& [option, value] : options.items()) {
    if (value == find_option(find_network(name).options, option)->standard && !value.is_array()) continue;
    if (!value.is_array()) text += " " + option + " " + value.dump();
    for (size_t i = 0; value.is_array() && i < value.size(); i++) text += (i ? "-" : " ") + value[i].dump();
  }
  return text + ", " + describe_image(image) + " images, " + std::to_string(classes) + " classes";
}

NetworkSpec network_spec(const std::string& name, int classes, const json& options) {
  return check_network({name, classes, find_network(name).image, options});
}

NetworkSpec check_network(const NetworkSpec& given) {
  const NetworkKind& kind = find_network(given.name);
  NetworkSpec spec = given;
  spec.options = complete_options(kind.options, spec.options, spec.name);
  if (spec.classes < 2 || spec.classes > 256)
    throw InputError("classes must be 2 to 256, not " + std::to_string(spec.classes));
  const ImageShape& s = spec.image;
  if (!kind.any_image && s != kind.image)
    throw InputError(spec.name + " takes " + describe_image(kind.image) + " images, not " + describe_image(s) +
                     " ones");
  if ((s.channels != 1 && s.channels != 3) || s.height < 1 || s.width < 1 || s.height > 1024 || s.width > 1024)
    throw InputError(spec.name + " takes images of 1 or 3 channels and at most 1024 x 1024 pixels");
  return spec;
}

std::unique_ptr<Network> make_network(const NetworkSpec& spec) {
  return find_network(spec.name).make(check_network(spec));
}

NetworkFactory network_factory(const NetworkSpec& spec, int head) {
  check_network(spec);
  return [spec, head] {
    auto network = make_network(spec);
    network->use_head(head);
    return network;
  };
}

NetworkSpec recognise_network(const TensorShapes& shapes, const std::string& who) {
  const auto shape = [&](const std::string& name) {
    const auto found = shapes.find(name);
    return found == shapes.end() ? std::vector<int64_t>() : found->second;
  };
  std::string nearest, complaint, names;
  size_t nearest_matches = 0;
  for (const NetworkKind* kind : network_kinds()) {
    NetworkSpec spec{kind->name, 10, kind->image, complete_options(kind->options, json::object(), kind->name)};
    names += (names.empty() ? "" : ", ") + spec.name;
    std::unique_ptr<Network> network;
    try {
      if (kind->recognise) kind->recognise(shapes, spec);
      const std::vector<int64_t> outputs = shape(kind->make(spec)->layout().tensors().back().name);
      if (outputs.size() == 1 && outputs[0] >= 2 && outputs[0] <= 256) spec.classes = int(outputs[0]);
      network = make_network(spec);
    } catch (const InputError&) {  // its tensors cannot be these
      continue;
    }
    size_t matches = 0;
    std::string wrong;
    for (const TensorSpec& t : network->layout().tensors()) {
      if (shapes.count(t.name) && shape(t.name) == t.shape) matches++;
      else if (wrong.empty())
        wrong = shapes.count(t.name) ? "'" + t.name + "' has shape " + shape_text(shape(t.name)) + "; " + spec.name +
                                           " has " + shape_text(t.shape)
                                     : spec.name + "'s '" + t.name + "' is missing";
    }
    if (wrong.empty() && matches == shapes.size()) return spec;
    if (wrong.empty()) wrong = "it has more tensors than " + spec.name;
    if (matches > nearest_matches || nearest.empty()) nearest = spec.name, nearest_matches = matches, complaint = wrong;
  }
  throw InputError(who + " fits none of " + names + "; nearest is " + nearest + ": " + complaint +
                   " (tools/from-pytorch renames tensors)");
}

json describe_networks() {
  json all = json::object();
  for (const NetworkKind* kind : network_kinds()) {
    json& one = all[kind->name];
    one["image"] = {kind->image.channels, kind->image.height, kind->image.width};
    one["any_image"] = kind->any_image;
    one["options"] = json::object();
    for (const Option& option : kind->options) one["options"][option.name] = option.standard;
    // With two counts of classes: an extent that differs between them is the count.
    const auto two = make_network(network_spec(kind->name, 2)), three = make_network(network_spec(kind->name, 3));
    for (size_t i = 0; i < two->layout().tensors().size(); i++) {
      const TensorSpec &a = two->layout()[int(i)], &b = three->layout()[int(i)];
      json shape = json::array();
      for (size_t d = 0; d < a.shape.size(); d++) shape.push_back(a.shape[d] == b.shape[d] ? json(a.shape[d]) : json());
      one["tensors"][a.name] = shape;
    }
  }
  return all;
}

}  // namespace baton
