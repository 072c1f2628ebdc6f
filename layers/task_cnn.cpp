// The convolutional network of Zenke, Poole and Ganguli 2017 for a sequence of tasks on 32x32 colour images, with one
// output layer ("head") a task:
//
//   3x32x32  conv1 3x3 p1, 32, ReLU -> 32x32x32   conv2 3x3 p0, 32, ReLU, max 2/2 -> 32x15x15   dropout .25
//            conv3 3x3 p1, 64, ReLU -> 64x15x15   conv4 3x3 p0, 64, ReLU, max 2/2 -> 64x6x6     dropout .25
//            fc1 2304 -> 512, ReLU   dropout .5   head0 .. head{n-1}: 512 -> classes
//
// 1,276,508 parameters (1,275,744 weights) with six heads of ten classes.
#include "layers/networks.h"

namespace baton {

namespace {

class TaskCnn : public Network {
 public:
  explicit TaskCnn(const NetworkSpec& spec) : Network("task-cnn", spec.image, spec.classes) {
    const bool dropout = spec.options["dropout"];
    add_convolution("conv1", 32, 3, 1, Pooling::none);
    add_convolution("conv2", 32, 3, 0, Pooling::max2);
    if (dropout) add_dropout(0.25f);
    add_convolution("conv3", 64, 3, 1, Pooling::none);
    add_convolution("conv4", 64, 3, 0, Pooling::max2);
    if (dropout) add_dropout(0.25f);
    add_dense("fc1", 512);
    if (dropout) add_dropout(0.5f);
    for (int i = 0; i < int(spec.options["heads"]); i++) add_head("head" + std::to_string(i));
  }
};

void recognise(const TensorShapes& shapes, NetworkSpec& spec) {
  int heads = 0;
  while (shapes.count("head" + std::to_string(heads) + ".weight")) heads++;
  if (heads == 0) throw InputError("no head");
  spec.options["heads"] = heads;
}

}  // namespace

extern const NetworkKind task_cnn_kind{"task-cnn",
                                       {3, 32, 32},
                                       false,
                                       {whole_option("heads", 1, {1, 1000}, "output layers, one a task"),
                                        flag_option("dropout", true, "drop activations in training")},
                                       make_chain<TaskCnn>,
                                       recognise};

}  // namespace baton
