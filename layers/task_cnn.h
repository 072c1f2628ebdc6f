// The convolutional network of Zenke, Poole and Ganguli 2017 for a sequence of tasks on 32x32 colour images, with one
// output layer ("head") a task, for every replica:
//
//   3x32x32  conv1 3x3 p1, 32, ReLU -> 32x32x32   conv2 3x3 p0, 32, ReLU, max 2/2 -> 32x15x15   dropout .25
//            conv3 3x3 p1, 64, ReLU -> 64x15x15   conv4 3x3 p0, 64, ReLU, max 2/2 -> 64x6x6     dropout .25
//            fc1 2304 -> 512, ReLU   dropout .5   head0 .. head{n-1}: 512 -> classes
//
// 1,276,508 parameters (1,275,744 weights) with six heads of ten classes. Dropout is active where a backward pass will
// follow (LayerContext::training) and the passes get StepStates, with a mask of its own for every replica. Forward and
// backward are written out; there is no autograd.
#pragma once
#include "kernels/dropout.h"
#include "layers/conv2d.h"
#include "layers/dense.h"
#include "layers/network.h"

namespace baton {

class TaskCnn : public Network {
 public:
  explicit TaskCnn(int heads = 6, int classes = 10, bool dropout = true);
  const char* architecture() const override { return "task-cnn"; }
  int classes() const override { return classes_; }
  int heads() const override { return int(heads_.size()); }
  void use_head(int head) override;
  const ParameterLayout& layout() const override { return layout_; }
  void prepare(const LayerContext&, bool shared_input) override;
  const Activation& input() const override { return x_; }
  const float* logits() const override { return heads_[head_].output().signal.value; }
  float* logits_gradient() override { return heads_[head_].output().signal.grad; }
  void forward(Device&, WeightsView, const StepState*) override;
  void backward(Device&, WeightsView, GradientsView, const StepState*) override;
  std::vector<NamedActivation> activations() const override;

 private:
  void drop(Device&, float* x, const Activation&, float rate, int layer, const StepState*, int first_draw);
  int classes_, head_ = 0, replicas_ = 1;
  bool dropout_, training_ = false;
  ParameterLayout layout_;
  Conv2d conv1_, conv2_, conv3_, conv4_;
  Dense fc1_;
  std::vector<Dense> heads_;
  Activation x_;
};

}  // namespace baton
