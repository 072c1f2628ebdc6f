"""The training steps whose cost is computed, and how the interpreter runs them."""
import collections
import json
import os
import pathlib
import subprocess
import tempfile

# `floors`: the part of the step that no arrangement of kernels avoids is the products' FLOPs and the bytes of the pass
# over the parameters, whose kernel is named.
Case = collections.namedtuple("Case", "name arguments")


def _network(network, case, rows):
    return ["--network", network, "--case", f"{case}_step", "--replicas", str(rows)]


CASES = [Case(f"lenet5 {m} x{rows}", _network("lenet5", m, rows)) for m in ("ft", "ffg", "cfg", "mnf") for rows in (1, 16)]
CASES += [Case(f"lenet5 {m} tf32 x{rows}", [*_network("lenet5", m, rows), "--precision", "tf32"])
          for m in ("ft", "ffg", "cfg") for rows in (1, 16)]
CASES += [Case("lenet5 mnf+path x1", [*_network("lenet5", "mnf", 1), "--path-gradient"])]  # as bil_mnist trains it
CASES += [Case(f"3conv3fc ffg x{rows}", _network("3conv3fc", "ffg", rows)) for rows in (1, 16)]
CASES += [Case(f"3conv3fc ffg tf32 x{rows}", [*_network("3conv3fc", "ffg", rows), "--precision", "tf32"])
          for rows in (1, 16)]
CASES += [Case("lenet5 mnf+path tf32 x1", [*_network("lenet5", "mnf", 1), "--path-gradient", "--precision", "tf32"])]
CASES += [Case(f"mlp1200 bgd K={draws}", ["--network", "mlp1200", "--case", "bgd_step", "--draws", str(draws)])
          for draws in (1, 10, 16)]
# What the budget holds: a step of every method on LeNet-5.
BUDGETED = ["lenet5 ft x1", "lenet5 ffg x1", "lenet5 ffg tf32 x1", "lenet5 cfg x1", "lenet5 mnf+path x1"]


class CostError(Exception):
    pass


def profile(case, build, libraries):
    """Runs the case's step on the interpreter; gives the profile that it wrote."""
    program = pathlib.Path(build) / "bench" / "step_timing"
    libraries = pathlib.Path(libraries or pathlib.Path(build) / "ptx")
    for path in (program, libraries / "libcudart.so.13"):
        if not path.exists():
            raise CostError(f"{path} is missing; build it: cmake --preset cuda && cmake --build --preset cuda")
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "profile.json"
        environment = dict(os.environ, LD_LIBRARY_PATH=str(libraries.resolve()), BATON_PTX_PROFILE=str(out),
                           OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        # The first step is eager and is captured; the graph of the second is what counts.
        run = subprocess.run([str(program), *case.arguments, "--warmup", "0", "--steps", "2", "--together", "2"],
                             env=environment,
                             capture_output=True, text=True)
        if run.returncode or not out.exists():
            raise CostError(f"{case.name}: step_timing ended with {run.returncode}: {run.stderr.strip()[-2000:]}")
        found = json.loads(out.read_text())
    if not found["graph"]:
        raise CostError(f"{case.name}: no graph was launched")
    return found
