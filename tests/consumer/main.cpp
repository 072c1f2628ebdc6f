// A step of a fully factorized Gaussian LeNet-5 on generated digits, with the installed library alone.
#include <baton/engine/io/synthetic.h>
#include <baton/trainers/trainer.h>

#include <cmath>
#include <cstdio>

int main() {
  using namespace baton;
  const Images digits = generate_digits(64, 1);
  Device device;
  Arena arena;
  TrainingSettings training;
  training.kind = "ffg";
  training.batch = 32;
  Trainer trainer(device, arena, network_factory(network_spec("lenet5")),
                  upload_images(device, arena, digits, unit_range), whole_set(digits.count), training);
  trainer.begin_stage(0);
  const double loss = trainer.run(1)[0].loss;
  printf("loss %.4f\n", loss);
  return std::isfinite(loss) ? 0 : 1;
}
