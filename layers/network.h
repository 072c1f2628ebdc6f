// A fixed network: a chain of layers that ends in an output layer, or in several of them ("heads", one a task). The
// chain can be run by this class; a network may also write its passes out by hand (LeNet5, Conv3Fc3). There is no
// autograd.
#pragma once
#include <vector>

#include "layers/conv2d.h"
#include "layers/dense.h"

namespace baton {

struct NamedActivation {
  std::string layer;
  Activation activation;
};

// An image as [channels][height][width].
struct ImageShape {
  int channels = 1, height = 28, width = 28;
  int size() const { return channels * height * width; }
  bool operator==(const ImageShape&) const = default;
};

class Network {
 public:
  virtual ~Network() = default;
  const char* architecture() const { return name_.c_str(); }
  ImageShape input_shape() const { return input_; }
  int classes() const { return classes_; }  // of a head
  // Networks with one output layer a task: which one the next passes use (at first the first). The gradients of the
  // others are not written. InputError for a head that is not there.
  int heads() const { return int(heads_.size()); }
  void use_head(int head);
  const ParameterLayout& layout() const { return layout_; }

  // Takes every buffer.
  void prepare(const LayerContext&);
  // The batch goes here first: value, and square where the first layer reads squares. [rows, or 1 where the input is
  // shared][batch][channels][height][width]
  const Activation& input() const { return x_; }
  const float* logits() const { return output().output().signal.value; }    // [rows][batch][classes]
  float* logits_gradient() const { return output().output().signal.grad; }  // the same; where a backward pass starts
  void forward(const Pass&);
  // From logits_gradient() to the gradient of every weight.
  void backward(const Pass&);
  // Every layer's output in the order of the forward pass: where to look for what went wrong.
  std::vector<NamedActivation> activations() const;

 protected:
  Network(std::string name, ImageShape input, int classes);
  // The passes through the layers.
  virtual void forward_layers(const Pass&);
  virtual void backward_layers(const Pass&);
  // Each appends a layer to the chain, with the next noise stream, and returns it. It reads what the one before it
  // writes; only convolutions can come before a convolution.
  Conv2d& add_convolution(const std::string& name, int out, int kernel, int pad, Pooling);
  Dense& add_dense(const std::string& name, int out);  // with ReLU
  // Drops elements of the newest layer's output where a backward pass will follow and the pass has states, with a mask
  // of its own for every row. Not with local reparameterization (InputError): its squares would not be dropped.
  void add_dropout(float rate);
  // The output layer, without ReLU, after all others; the heads share a noise stream, as a pass runs one of them.
  Dense& add_head(const std::string& name);

 private:
  struct Link {
    std::unique_ptr<Linear> layer;
    float dropout = 0;
  };
  Dense& output() const { return *heads_[head_]; }
  size_t reads() const;  // floats of an example that the next layer reads
  void drop(const Link&, float* x, const Pass&) const;
  std::string name_;
  ImageShape input_, map_;  // map_: what the newest convolution leaves
  int classes_, head_ = 0, rows_ = 1;
  bool training_ = false;
  ParameterLayout layout_;
  ProductJobs jobs_;  // of the layers of a pass, where tensor cores multiply
  std::vector<Link> chain_;
  std::vector<std::unique_ptr<Dense>> heads_;
  int dense_outputs_ = 0;  // of the newest dense layer, 0: none yet
  Activation x_;
};

}  // namespace baton
