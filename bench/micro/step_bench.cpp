// Whole training steps of LeNet5 and a prediction by draws of its weights. The models are those of a perfectly fused
// step (a step that reads and writes every number once), so bytes/s is below what the kernels really move.
#include "common.h"
#include "engine/io/synthetic.h"
#include "trainers/predictor.h"
#include "trainers/trainer.h"

using namespace baton;

namespace {

constexpr int images_in_set = 2048;
constexpr double input_size = 784, pooled_outputs = 2880 + 800, outputs = pooled_outputs + 500 + 10;
constexpr double parameters = 431080, forward_macs = 2293000, conv1_macs = 288000;

const Images& digits() {
  static const Images images = generate_digits(images_in_set, 1);
  return images;
}

// FLOPs an image: forward, weight gradients, and data gradients of all layers but the first, 2 a MAC; twice that under
// local reparameterization (means and variances): 13.18 and 26.36 MFLOP.
// Bytes an image: the input read twice; an output's y written and read twice, dy written and read, and under local
// reparameterization v written and read, 20 and 28; a place a window written and read. 131 kB (ffg), 97 kB (ft).
// Bytes a parameter: read twice, gradient written, 12, and 28 of Adam; two parameters a weight for ffg.
Work step_work(bool ffg, int batch, int replicas) {
  const double macs = 3 * forward_macs - conv1_macs;
  const double image = 8 * input_size + (ffg ? 28 : 20) * outputs + 2 * pooled_outputs;
  const double twice = ffg ? 2 : 1, rows = double(batch) * replicas;
  return {rows * image + replicas * twice * parameters * 40, rows * twice * 2 * macs};
}

// Every step reads other images of the 2048 and updates the parameters: warm as in training, nothing rotates.
void training_step(bool ffg, int batch, int replicas) {
  const int steps = on_gpu ? 50 : 1;  // between two looks at the totals, which wait for the host
  add_direct(std::string("training_step/lenet5/") + (ffg ? "ffg" : "ft") + batch_name(batch, replicas),
             step_work(ffg, batch, replicas), steps, [=](Buffers& b) -> std::function<void()> {
               const DeviceImages set = upload_images(b.device, b.arena, digits(), unit_range);
               TrainingSettings training;
               training.kind = ffg ? "ffg" : "ft";
               training.batch = batch;
               training.epochs = 1000;
               training.replicas.clear();
               for (int r = 0; r < replicas; r++) training.replicas.push_back({uint64_t(r)});
               Stages stages = whole_set(set.count);
               stages.order.assign(size_t(replicas), stages.order[0]);
               const auto trainer = std::make_shared<Trainer>(
                   b.device, b.arena, network_factory(network_spec("lenet5")), set, stages, training);
               trainer->begin_stage(0);
               trainer->run(3);  // memory touched, the graph captured
               return [=] { trainer->run(steps); };
             });
}

// Time is of the whole prediction. FLOPs an image and draw: 2 a MAC forward; a normal and 3 a weight and draw.
// Bytes a draw: mean and variance read, the weight written and read, 16 a weight; an image: the input read, an output
// written and read, 8.
void prediction(int images, int draws) {
  const Work work{draws * (16 * parameters + images * (4 * input_size + 8 * outputs)),
                  draws * (2 * forward_macs * images + (flops_a_normal + 3) * parameters)};
  add_direct("prediction/lenet5/images:" + std::to_string(images) + "/draws:" + std::to_string(draws), work, 1,
             [=](Buffers& b) -> std::function<void()> {
               const std::shared_ptr<Posterior> posterior =
                   make_posterior(b.device, b.arena, make_network(network_spec("lenet5"))->layout(), "ffg");
               posterior->initialise(b.states(1));
               Images some = digits();
               limit(some, images);
               const auto predictor =
                   std::make_shared<Predictor>(b.device, b.arena, network_factory(network_spec("lenet5")),
                                               upload_images(b.device, b.arena, some, unit_range));
               return [=] { predictor->predict(*posterior, 0, draws, 1); };
             });
}

}  // namespace

void add_step_benchmarks() {
  for (const bool ffg : {true, false})
    for (const int replicas : {1, 4})
      for (const int batch : {128, 1024}) training_step(ffg, batch, replicas);
  prediction(128, 10);
  prediction(on_gpu ? 2000 : 128, 100);
}
