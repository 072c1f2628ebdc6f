#!/usr/bin/env python3
"""LeNet-5-Caffe in PyTorch, as a good PyTorch user would write it: the peer of bench/step_timing.

One training step of FFG (fully factorised Gaussian, local reparameterization, Adam on the ELBO) or of FT (the
plain network, Adam), and the prediction of a batch by 100 posterior samples, with one draw of all weights a
sample or by local reparameterization. Prints one JSON line. Needs PyTorch 1.13 or newer.
"""
import argparse
import json
import math
import os
import statistics
import sys
import time

STAGE_EXAMPLES = 6000  # N_t of one tenth of MNIST
BETA = 1.0
PREDICTION_SAMPLES = 100
VARIANCE_FLOOR = 1e-8


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", required=True, choices=["ffg_step", "ft_step", "predict_weight", "predict_lrt"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12, help="timed steps (default 12)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tf32", action="store_true", help="let the GPU's tensor cores round to tf32")
    parser.add_argument("--compile", action="store_true", help="torch.compile (on cuda with CUDA graphs)")
    return parser.parse_args()


ARGS = parse_arguments()
os.environ.setdefault("OMP_NUM_THREADS", str(ARGS.threads))  # read when PyTorch is loaded
try:
    import torch
except ImportError:  # a virtual environment without PyTorch: Debian's own Python may have it
    if sys.executable != "/usr/bin/python3" and os.access("/usr/bin/python3", os.X_OK):
        os.execv("/usr/bin/python3", ["/usr/bin/python3", *sys.argv])
    sys.exit("lenet5_torch: needs PyTorch; tools/setup --peers installs Debian's")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

SHAPES = {"conv1": (20, 1, 5, 5), "conv2": (50, 20, 5, 5), "fc1": (500, 800), "fc2": (10, 500)}


class LeNet5(nn.Module):
    """The plain network."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc2(x)


class GaussianLayer(nn.Module):
    """Independent Gaussians over the weights and biases of a convolution or a dense layer."""

    def __init__(self, shape):
        super().__init__()
        self.apply_weights = F.conv2d if len(shape) == 4 else F.linear
        self.weight_mean = nn.Parameter(torch.randn(shape) * math.sqrt(2 / math.prod(shape[1:])))
        self.weight_log_std = nn.Parameter(torch.full(shape, -5.0))
        self.bias_mean = nn.Parameter(torch.zeros(shape[0]))
        self.bias_log_std = nn.Parameter(torch.full(shape[:1], -5.0))
        for name in ("weight", "bias"):  # the prior: a Gaussian of its own for every weight
            like = getattr(self, f"{name}_mean")
            self.register_buffer(f"{name}_prior_mean", torch.zeros_like(like))
            self.register_buffer(f"{name}_prior_log_std", torch.zeros_like(like))
            self.register_buffer(f"{name}_prior_precision", torch.ones_like(like))

    def variances(self):
        return (2 * self.weight_log_std).exp(), (2 * self.bias_log_std).exp()

    def moments(self, x, variances):
        mean = self.apply_weights(x, self.weight_mean, self.bias_mean)
        return mean, self.apply_weights(x * x, *variances)

    def forward(self, x, variances):
        """Local reparameterization: noise for every example, output and position."""
        return sample(*self.moments(x, variances))

    def kl(self, variances):
        total = 0.0
        for name, variance in zip(("weight", "bias"), variances):
            difference = getattr(self, f"{name}_mean") - getattr(self, f"{name}_prior_mean")
            log_ratio = getattr(self, f"{name}_prior_log_std") - getattr(self, f"{name}_log_std")
            scaled = (variance + difference * difference) * getattr(self, f"{name}_prior_precision")
            total = total + (log_ratio + 0.5 * scaled).sum() - 0.5 * variance.numel()
        return total

    def draw(self, deviations):
        """One draw of all weights and biases."""
        weight_std, bias_std = deviations
        return (torch.addcmul(self.weight_mean, weight_std, torch.randn_like(weight_std)),
                torch.addcmul(self.bias_mean, bias_std, torch.randn_like(bias_std)))


def sample(mean, variance):
    return torch.addcmul(mean, (variance + VARIANCE_FLOOR).sqrt(), torch.randn_like(mean))


class BayesianLeNet5(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc1, self.fc2 = map(GaussianLayer, SHAPES.values())

    def layers(self):
        return self.conv1, self.conv2, self.fc1, self.fc2

    def variances(self):
        return [layer.variances() for layer in self.layers()]

    def after_conv1(self, x, variances):
        x = F.relu(F.max_pool2d(x, 2))
        x = F.relu(F.max_pool2d(self.conv2(x, variances[1]), 2))
        x = F.relu(self.fc1(x.flatten(1), variances[2]))
        return self.fc2(x, variances[3])

    def loss(self, x, labels):
        variances = self.variances()  # once a step: for the forward pass and for the KL
        logits = self.after_conv1(self.conv1(x, variances[0]), variances)
        kl = sum(layer.kl(v) for layer, v in zip(self.layers(), variances))
        return F.cross_entropy(logits, labels) + BETA / STAGE_EXAMPLES * kl

    def predict_one_draw(self, x, deviations):
        w = [layer.draw(d) for layer, d in zip(self.layers(), deviations)]
        x = F.relu(F.max_pool2d(F.conv2d(x, *w[0]), 2))
        x = F.relu(F.max_pool2d(F.conv2d(x, *w[1]), 2))
        x = F.relu(F.linear(x.flatten(1), *w[2]))
        return F.linear(x, *w[3]).softmax(1)

    def predict_weight(self, x):
        deviations = [tuple(v.sqrt() for v in variance) for variance in self.variances()]
        total = torch.zeros(x.shape[0], 10, device=x.device)
        for _ in range(PREDICTION_SAMPLES):
            total += self.predict_one_draw(x, deviations)
        return total / PREDICTION_SAMPLES

    def predict_one_lrt(self, mean, variance, variances):
        return self.after_conv1(sample(mean, variance), variances).softmax(1)

    def predict_lrt(self, x):
        variances = self.variances()
        moments = self.conv1.moments(x, variances[0])  # the same for every sample
        total = torch.zeros(x.shape[0], 10, device=x.device)
        for _ in range(PREDICTION_SAMPLES):
            total += self.predict_one_lrt(*moments, variances)
        return total / PREDICTION_SAMPLES


def maybe_compiled(function):
    if not ARGS.compile:
        return function
    if not hasattr(torch, "compile"):
        sys.exit(f"lenet5_torch: --compile needs PyTorch 2, this is {torch.__version__}")
    return torch.compile(function, mode="reduce-overhead" if ARGS.device == "cuda" else "default")


def adam(model):
    # On a GPU the fused form is the fastest; on a CPU the plain one is.
    return torch.optim.Adam(model.parameters(), lr=1e-3, **({"fused": True} if ARGS.device == "cuda" else {}))


def make_training_step(model, loss_of):
    optimizer = adam(model)
    loss_of = maybe_compiled(loss_of)

    def step(images, labels):
        optimizer.zero_grad(set_to_none=True)
        loss_of(images, labels).backward()
        optimizer.step()

    return step


def make_step(device):
    if ARGS.case == "ft_step":
        model = LeNet5().to(device)
        return make_training_step(model, lambda images, labels: F.cross_entropy(model(images), labels))
    model = BayesianLeNet5().to(device)
    if ARGS.case == "ffg_step":
        return make_training_step(model, model.loss)
    model.predict_one_draw = maybe_compiled(model.predict_one_draw)
    model.predict_one_lrt = maybe_compiled(model.predict_one_lrt)
    predict = model.predict_weight if ARGS.case == "predict_weight" else model.predict_lrt

    def step(images, labels):
        with torch.no_grad():
            predict(images)

    return step


def time_on_cpu(step, batches):
    times = []
    for i in range(ARGS.steps):
        start = time.perf_counter()
        step(*batches[i % len(batches)])
        times.append(1e3 * (time.perf_counter() - start))
    return times


def time_on_cuda(step, batches):
    """Events between the steps: the host runs ahead, as it does in training."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(ARGS.steps + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for i in range(ARGS.steps):
        step(*batches[i % len(batches)])
        events[i + 1].record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in zip(events, events[1:])]


def main():
    torch.manual_seed(0)
    torch.set_num_threads(ARGS.threads)
    if ARGS.device == "cuda" and not torch.cuda.is_available():
        sys.exit("lenet5_torch: --device cuda, but PyTorch sees no GPU")
    device = torch.device(ARGS.device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = ARGS.tf32
    batches = [(torch.rand(ARGS.batch, 1, 28, 28, device=device), torch.randint(10, (ARGS.batch,), device=device))
               for _ in range(4)]
    step = make_step(device)
    for i in range(ARGS.warmup):
        step(*batches[i % len(batches)])
    times = (time_on_cuda if ARGS.device == "cuda" else time_on_cpu)(step, batches)
    median = statistics.median(times)
    print(json.dumps({
        "case": ARGS.case, "batch": ARGS.batch, "ms_per_step": round(median, 4),
        "ms_all": [round(t, 4) for t in times], "images_per_second": round(1e3 * ARGS.batch / median, 1),
        "torch": torch.__version__, "threads": ARGS.threads,
        "device": torch.cuda.get_device_name() if ARGS.device == "cuda" else "cpu",
        "compiled": ARGS.compile, "tf32": ARGS.tf32}))


if __name__ == "__main__":
    main()
