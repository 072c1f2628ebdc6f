// The registry of the fixed networks. A network is a file that defines its NetworkKind, and a line in networks.cpp;
// programs, `baton`, the search and Python know it from there.
#pragma once
#include <functional>
#include <map>
#include <memory>

#include "engine/io/schema.h"
#include "layers/network.h"

namespace baton {

// Which network, and of what size.
struct NetworkSpec {
  std::string name = "lenet5";
  int classes = 10;
  ImageShape image{};
  json options = json::object();  // the kind's own, all of them

  std::string description() const;  // "lenet5, 28 x 28 grey images, 10 classes"
};

using TensorShapes = std::map<std::string, std::vector<int64_t>>;

struct NetworkKind {
  const char* name;
  ImageShape image;  // the one that it takes, or, where any_image, the usual one
  bool any_image;
  Schema options;
  std::unique_ptr<Network> (*make)(const NetworkSpec&);  // make_chain of the network's class
  // Reads options and image size off a plain network's tensors, as far as they tell; null: there is nothing to read.
  void (*recognise)(const TensorShapes&, NetworkSpec&) = nullptr;
};
template <class N>
std::unique_ptr<Network> make_chain(const NetworkSpec& spec) {
  return std::make_unique<N>(spec);
}

const std::vector<const NetworkKind*>& network_kinds();
// InputError for an unknown name: it lists those that there are.
const NetworkKind& find_network(const std::string& name);
std::string list_networks();  // "lenet5, 3conv3fc, vgg11, mlp or task-cnn"

// The named network with its usual image size. options: those that differ from the standard.
NetworkSpec network_spec(const std::string& name, int classes = 10, const json& options = json::object());
// The same with all of its options. InputError for an unknown name, options that do not fit, or an image size that the
// network does not take.
NetworkSpec check_network(const NetworkSpec&);
std::unique_ptr<Network> make_network(const NetworkSpec&);
using NetworkFactory = std::function<std::unique_ptr<Network>()>;
NetworkFactory network_factory(const NetworkSpec&, int head = 0);  // checked; head: that the passes use

// The network whose tensors these are, by their names and shapes: classes and options are read off. InputError that
// says which tensor fits none; `who` begins the message.
NetworkSpec recognise_network(const TensorShapes&, const std::string& who);

// Every kind with its image size, its options and, of the standard options, the shapes of its tensors: what Python
// tools know of the networks (tools/networks.json). A class count is null there.
json describe_networks();

}  // namespace baton
