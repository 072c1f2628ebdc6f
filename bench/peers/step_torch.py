#!/usr/bin/env python3
"""Times PyTorch on the steps that bench/step_timing times: a training step of LeNet-5-Caffe or 3Conv3FC, plain or
under a posterior (networks_torch.py), with Adam over everything; the prediction of a batch by posterior samples, with
one draw of all weights a sample or by local reparameterization; or a step of the perceptron 784-1200-1200-10 by
Bayesian gradient descent (K = 10) or by SGD with momentum. Prints one JSON line. Needs PyTorch 1.13 or newer.
"""
import argparse
import json
import os
import statistics
import sys
import time

STEPS = ["ft_step", "ffg_step", "cfg_step", "mnf_step"]
PREDICTIONS = ["predict_weight", "predict_lrt"]
MLP_STEPS = ["bgd_step", "sgd_step"]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["lenet5", "3conv3fc", "mlp1200"], default="lenet5")
    parser.add_argument("--case", required=True, choices=STEPS + PREDICTIONS + MLP_STEPS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12, help="timed steps (default 12)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument("--samples", type=int, default=100, help="draws of a prediction (default 100)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tf32", action="store_true", help="let the GPU's tensor cores round to tf32")
    parser.add_argument("--compile", action="store_true", help="torch.compile (on cuda with CUDA graphs)")
    args = parser.parse_args()
    if (args.case in MLP_STEPS) != (args.network == "mlp1200"):
        parser.error(f"--case {args.case} is not of --network {args.network}: mlp1200 has {' and '.join(MLP_STEPS)}")
    return args


ARGS = parse_arguments()
os.environ.setdefault("OMP_NUM_THREADS", str(ARGS.threads))  # read when PyTorch is loaded
try:
    import torch
except ImportError:
    sys.exit(f"step_torch: needs PyTorch, which {sys.executable} does not have; tools/setup --peers installs it for "
             "build/peers/bin/python")

from networks_torch import ARCHITECTURES, Bayesian, BayesianGradientDescent, Plain, Predictor  # noqa: E402


def maybe_compiled(function):
    if not ARGS.compile:
        return function
    if not hasattr(torch, "compile"):
        sys.exit(f"step_torch: --compile needs PyTorch 2, this is {torch.__version__}")
    return torch.compile(function, mode="reduce-overhead" if ARGS.device == "cuda" else "default")


def optimizer_of(model):
    # On a GPU the fused form is the fastest, and of SGD, which PyTorch 1.13 has not fused, the form over lists of
    # tensors; on a CPU the plain one is.
    parameters = [p for p in model.parameters() if p.requires_grad]
    on_gpu = ARGS.device == "cuda"
    if ARGS.case == "sgd_step":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, **({"foreach": True} if on_gpu else {}))
    return torch.optim.Adam(parameters, lr=1e-3, **({"fused": True} if on_gpu else {}))


def make_step(device):
    """A function of images and labels; a training step returns its loss."""
    architecture = ARCHITECTURES[ARGS.network]
    family = "ffg" if ARGS.case in PREDICTIONS else ARGS.case.split("_")[0]
    plain = family in ("ft", "bgd", "sgd")
    model = (Plain(architecture) if plain else Bayesian(architecture, family)).to(device)
    if ARGS.case in PREDICTIONS:
        predictor = Predictor(model, ARGS.samples, maybe_compiled)
        predict = predictor.by_weights if ARGS.case == "predict_weight" else predictor.by_lrt
        return lambda images, labels: predict(images)

    loss_of = maybe_compiled(model.loss)
    if family == "bgd":
        descent = BayesianGradientDescent(model)
        return lambda images, labels: descent.step(images, labels, loss_of)

    optimizer = optimizer_of(model)

    def step(images, labels):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(images, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def time_on_cpu(step, batches):
    times, results = [], []
    for i in range(ARGS.steps):
        start = time.perf_counter()
        results.append(step(*batches[i % len(batches)]))
        times.append(1e3 * (time.perf_counter() - start))
    return times, results


def time_on_cuda(step, batches):
    """Events between the steps: the host runs ahead, as it does in training."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(ARGS.steps + 1)]
    results = []
    torch.cuda.synchronize()
    events[0].record()
    for i in range(ARGS.steps):
        # A compiled step's results lie in its graph's memory, which the next replay writes over: keep a copy.
        result = step(*batches[i % len(batches)])
        results.append(result.clone() if ARGS.compile and ARGS.case not in PREDICTIONS else result)
        events[i + 1].record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in zip(events, events[1:])], results


def make_batches(device):
    """A prototype a class under noise: something to learn."""
    prototypes = torch.rand(10, *ARCHITECTURES[ARGS.network].image, device=device) - 0.5
    batches = []
    for _ in range(4):
        labels = torch.randint(10, (ARGS.batch,), device=device)
        images = prototypes[labels]
        batches.append((images + torch.rand_like(images) - 0.5, labels))
    return batches


def main():
    torch.manual_seed(0)
    torch.set_num_threads(ARGS.threads)
    if ARGS.device == "cuda" and not torch.cuda.is_available():
        sys.exit("step_torch: --device cuda, but PyTorch sees no GPU")
    device = torch.device(ARGS.device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = ARGS.tf32
    batches = make_batches(device)
    step = make_step(device)
    for i in range(ARGS.warmup):
        step(*batches[i % len(batches)])
    times, results = (time_on_cuda if ARGS.device == "cuda" else time_on_cpu)(step, batches)
    median = statistics.median(times)
    line = {
        "network": ARGS.network, "case": ARGS.case, "batch": ARGS.batch, "ms_per_step": round(median, 4),
        "ms_all": [round(t, 4) for t in times], "images_per_second": round(1e3 * ARGS.batch / median, 1),
        "torch": torch.__version__, "threads": ARGS.threads,
        "device": torch.cuda.get_device_name() if ARGS.device == "cuda" else "cpu",
        "compiled": ARGS.compile, "tf32": ARGS.tf32}
    if ARGS.case not in PREDICTIONS:
        line["losses"] = [round(float(loss), 5) for loss in results]
    print(json.dumps(line))


if __name__ == "__main__":
    main()
