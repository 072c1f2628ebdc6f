// MNIST in ten parts by a fully factorized Gaussian posterior, with nothing but the library: what a program of one's
// own looks like. Each part is learned alone; its posterior is the prior of the next one.
//
//   minimal [IMAGES [EPOCHS]]      e.g. minimal 6000 1
//
// It looks for MNIST in $BATON_DATA and ./data, else it draws digits itself.
#include <cstdio>
#include <cstdlib>

#include "engine/io/dataset.h"
#include "engine/io/program.h"
#include "trainers/metrics.h"
#include "trainers/predictor.h"
#include "trainers/trainer.h"

using namespace baton;

namespace {

int run(int argc, char** argv) {
  // The data: bytes on the host, uploaded once; batches are drawn on the device.
  Limits limits;
  limits.train = argc > 1 ? std::atoi(argv[1]) : 0;  // 0: all
  limits.test = limits.train / 6;
  const Dataset mnist = find_mnist(std::nullopt, 0, limits);
  printf("%s: %d training and %d test images\n", mnist.generated ? "generated digits" : "MNIST", mnist.train.count,
         mnist.test.count);

  // The network and its posterior, by their names in the registries. Options that are not named have their standard
  // values (layers/posteriors/gaussian.cpp): here the prior N(0, 1), sigma = e^-4 at first, and a KL weighted by 0.03.
  const NetworkFactory network = network_factory(network_spec("lenet5"));
  TrainingSettings training;
  training.kind = "ffg";
  training.replicas = {{/*seed=*/0, {{"lr", 2e-3}, {"schedule", "linear"}, {"init_log_std", -4}, {"beta", 0.03}}}};
  training.batch = 100;
  training.epochs = argc > 2 ? std::atof(argv[2]) : 10;  // a part

  // All device memory is taken here, before the first step.
  Device device;
  Arena arena;
  const int parts = 10;
  Trainer trainer(device, arena, network, upload_images(device, arena, mnist.train, unit_range),
                  split_into_parts(mnist.train.count, parts, {0}), training);
  Predictor predictor(device, arena, network, upload_images(device, arena, mnist.test, unit_range));
  arena.freeze();

  for (int part = 0; part < parts; part++) {
    trainer.begin_stage(part);  // the posterior becomes the prior, but for the first part
    const EpochTotals learned = trainer.run(trainer.count_steps(part))[0];
    const Predictions p = predictor.predict(trainer.posterior(), 0, /*samples=*/10, /*seed=*/uint64_t(part));
    const Metrics m = evaluate(p.probability, mnist.test.labels, mnist.test.classes, p.entropy, p.mutual_information);
    printf("part %2d: training loss %.4f, KL to the prior %.0f nats; test accuracy %.4f, NLL %.4f\n", part + 1,
           learned.loss, trainer.posterior().kl()[0], m.accuracy, m.nll);
    fflush(stdout);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("minimal", [&] { return run(argc, argv); });
}
