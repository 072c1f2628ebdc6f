"""The checks of a first run, in the order in which they are worth having."""
import json
import os
import platform
import re
import shutil

from . import parse
from .cases import QUIET_THREADS, test_check, test_files
from .checks import Check, Command, Failed, NotRun, Stage, TimedOut, needed
from .place import PROGRAMS, find_tool

NAMES = ["machine", "convolutions", "products", "kernels", "layers", "trainers", "repeat", "timings", "calibration",
         "sanitizer", "papers"]
ROOMS = {"products": "engine", "kernels": "kernels", "layers": "layers", "trainers": "trainers"}
# Those outside kernels/ that take an interpreter seconds.
QUICK_AS_PTX = ["engine.blas_test", "engine.linalg_test", "engine.graph_test", "engine.select_test",
                "layers.dense_test", "layers.conv2d_test", "layers.mlp_test", "layers.posterior_test",
                "layers.lenet5_test", "trainers.predictor_test", "trainers.features_test"]
FIRST_OF_ENGINE = ["engine.blas_test", "engine.linalg_test", "engine.graph_test"]  # the rest of it runs on the host

# What a run is cut down to by mode. An interpreter of PTX is some hundred times slower than the host build.
SCALES = {
    "gpu": dict(
        tests=dict(estimate=8, limit=90, silence=40), cases="", networks="lenet5,3conv3fc,vgg11", batches="128,100",
        mnist=["--preset", "quick"], parts="1,10", repeats=60, steps=["--steps", 200, "--warmup", 20],
        predictions=["--steps", 5, "--warmup", 1], rows=[1, 16], small=[], step_limit=90),
    "host": dict(
        tests=dict(estimate=5, limit=120, silence=100), cases="", networks="lenet5,3conv3fc", batches="4",
        mnist=["--preset", "quick", "--train-limit", 400, "--test-limit", 100, "--epochs", 1, "--samples", 2],
        parts="1,2", repeats=120, steps=["--steps", 3, "--warmup", 1],
        predictions=["--steps", 1, "--warmup", 1, "--samples", 10], rows=[1, 4], small=["--small"], step_limit=60),
    "ptx": dict(
        tests=dict(estimate=5, limit=120, silence=100), cases="Small", networks="lenet5", batches="1",
        mnist=["--preset", "quick", "--train-limit", 8, "--test-limit", 2, "--epochs", 1, "--batch", 4, "--samples", 1],
        parts="1", repeats=240, steps=["--steps", 2, "--warmup", 2, "--batch", 2],
        predictions=["--steps", 1, "--warmup", 1, "--batch", 1, "--samples", 1], rows=[1, 2], small=["--small"],
        step_limit=120),
}
# Networks and cases of bench/step_timing, the most wanted first.
STEPS = [("lenet5", "ffg_step"), ("mlp1200", "bgd_step"), ("3conv3fc", "ffg_step"), ("lenet5", "ft_step"),
         ("lenet5", "mnf_step"), ("lenet5", "cfg_step"), ("3conv3fc", "ft_step"), ("mlp1200", "sgd_step"),
         ("lenet5", "predict_weight")]
NEEDS_GPU = "needs a GPU"


def all_stages(place, out, record):
    """The stages for a Place. Files that checks write lie in `out`/work. `record`: of the Runner that will run them."""
    scale = SCALES[place.mode]
    work = out / "work"
    test = {room: [] for room in ROOMS.values()}
    for room, name, patterns in test_files(place.root):
        if room in test:
            test[room].append(test_check(place, scale, name, patterns))
    test["engine"].sort(key=lambda check: FIRST_OF_ENGINE.index(check.name) if check.name in FIRST_OF_ENGINE else 9)
    if place.mode == "ptx":
        test = {room: [check for check in checks if room == "kernels" or check.name in QUICK_AS_PTX]
                for room, checks in test.items()}
    return [
        Stage("machine", machine_checks(place), 1),
        Stage("convolutions", convolution_checks(place, scale), 0.1),
        Stage("products", test["engine"], 0.2, beside=True),
        Stage("kernels", test["kernels"], 0.25, beside=True),
        Stage("layers", test["layers"], 0.2, beside=True),
        Stage("trainers", test["trainers"], 0.25, beside=True),
        Stage("repeat", repeat_checks(place, scale, work), 0.15),
        Stage("timings", timing_checks(place, scale, work), 0.3),
        Stage("calibration", calibration_checks(place, scale, work), 0.2),
        Stage("sanitizer", sanitizer_checks(place, record), 0.2),
        Stage("papers", paper_checks(place, work), 1, fills=True),
    ]


def told(folder):
    """A folder of libraries, without where Python's packages lie on this machine."""
    return re.sub(r"^.*-packages/", "Python's ", str(folder))


# ---------------------------------------------------------------------------------------------------------- machine
def machine_checks(place):
    def gpu():
        if place.mode != "gpu":
            raise NotRun(NEEDS_GPU)
        tool = find_tool("nvidia-smi")
        if not tool:
            raise NotRun("nvidia-smi is missing")
        keys = ["name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory", "power.limit", "pstate"]
        done = yield Command([tool, f"--query-gpu={','.join(keys)}", "--format=csv,noheader"])
        figures = dict(zip(keys, map(str.strip, done.output.splitlines()[0].split(","))))
        yield Command([tool], check=False)
        return figures

    def programs():
        there = [name for name in PROGRAMS if place.program(name).exists()]
        errors = []
        for name in there:
            try:
                errors += [f"{name}: {library} was not found" for library in place.unresolved(name)]
            except OSError as error:
                errors.append(f"{name}: {error.strerror}")
        figures = {"programs": len(there)}
        if absent := [name for name in PROGRAMS if name not in there]:
            figures["not there"] = ", ".join(absent)
        for library, folder in sorted(place.libraries.items()):  # those that the loader does not find by itself
            figures[library] = f"in {told(folder)}" if folder else "was not found"
        if errors:
            raise Failed(*errors, figures=figures)
        return figures
        yield

    def tools():
        found = {name: find_tool(name) or "is not there" for name in ("nvcc", "ncu", "nsys", "compute-sanitizer")}
        return {"kernel": platform.release(), "python": platform.python_version(), "cores": os.cpu_count(),
                "free disk": f"{shutil.disk_usage('.').free >> 30} GiB", **found}
        yield

    def device():
        program = needed(place.program("first_light"))
        done = yield Command([program, "offers", "--networks", "lenet5", "--batches", 1])
        lines = parse.json_lines(done.output)
        if not lines or lines[0].get("kind") != "device":
            raise Failed("first_light did not say which device it ran on", *done.said())
        return {"device": lines[0]["device"], "seconds to start": round(done.seconds, 2)}

    def torch():
        python = place.torch_python
        if not python:
            raise NotRun("no Python here has PyTorch")
        ask = ("import json, torch; gpu = torch.cuda.is_available(); print(json.dumps({'torch': torch.__version__, "
               "'CUDA': torch.version.cuda, 'cuDNN': torch.backends.cudnn.version(), "
               "'device': torch.cuda.get_device_name() if gpu else 'cpu'}))")
        done = yield Command([python, "-c", ask], environment=place.given)
        return (parse.json_lines(done.output) or [{}])[-1]

    def files():
        goldens, data = place.goldens, place.data_folder()
        figures = {"goldens": "are there" if goldens.is_dir() else "are missing",
                   "MNIST": "is there" if data else "is missing: digits are generated, and no figure is the papers'"}
        if not goldens.is_dir():
            raise Failed(f"tests need {goldens}", figures=figures)
        return figures
        yield

    return [Check("gpu", gpu, 2, 20), Check("programs", programs, 2, 120), Check("tools", tools, 0, 20),
            Check("device", device, 5, 60), Check("torch", torch, 8, 120), Check("files", files, 0, 10)]


# ----------------------------------------------------------------------------------------------------- convolutions
def convolution_checks(place, scale):
    where = ["--networks", scale["networks"], "--batches", scale["batches"]]

    def lines_of(kind, done):
        lines = [line for line in parse.json_lines(done.output) if line["kind"] == kind]
        errors = [f"{line['layer']}: {line['error']}" for line in parse.json_lines(done.output)
                  if line["kind"] == "error"]
        if done.stopped or (done.status != 0 and not errors):
            raise (TimedOut if done.stopped else Failed)(*errors, *done.said(), figures={kind: lines})
        if not lines and not errors:
            errors = ["it printed nothing"]
        return lines, errors

    def offers():
        if place.mode != "gpu":
            raise NotRun(NEEDS_GPU)
        done = yield Command([needed(place.program("first_light")), "offers", *where], check=False)
        lines, errors = lines_of("offer", done)
        ways = {(line["layer"], tuple(line["shape"]), line["direction"]): [] for line in lines}
        for line in lines:
            ways[line["layer"], tuple(line["shape"]), line["direction"]].append(line)
        errors += [f"{layer}, batch {shape[0]}, {direction}: nothing that is offered may be chosen"
                   for (layer, shape, direction), offered in ways.items() if not any(o["chosen"] for o in offered)]
        if errors:
            raise Failed(*errors, figures={"offer": lines})
        return {"offer": lines}

    def variance():
        done = yield Command([needed(place.program("first_light")), "variance", *where], check=False)
        lines, errors = lines_of("variance", done)
        for line in lines:
            what = f"{line['layer']}, batch {line['shape'][0]}, {line['algorithm']}"
            if line["not_finite"]:
                errors.append(f"{what}: {line['not_finite']} of {line['outputs']} results are not finite")
            if line["negative"]:
                errors.append(f"{what}: {line['negative']} of {line['outputs']} variances are negative, the least "
                              f"{line['least']:.3g} beside a greatest of {line['greatest']:.3g}")
            if line["relative_error"] is None or not line["relative_error"] < 3e-6:
                errors.append(f"{what}: a relative error of {line['relative_error']} is not float32's")
        if errors:
            raise Failed(*errors, figures={"variance": lines})
        return {"variance": lines}

    return [Check("offers", offers, 10, 60), Check("variance", variance, 15, 90)]


# ----------------------------------------------------------------------------------------------------------- repeat
def repeat_checks(place, scale, work):
    def read(folder):
        result = json.loads((folder / "result.json").read_text())
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return {"result": result, "log": log}

    def train(folder, *options):
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        words = [needed(place.program("bil_mnist")), *scale["mnist"], "--out", folder, *options]
        return Command(words, folder=place.root)

    def accuracies(result):
        return {f"{run['method']} T={run['parts']} seed {run['seed']}": run["final_test_accuracy"]
                for run in result["runs"]}

    def twice():
        seconds = []
        for name in ("repeat_1", "repeat_2"):
            done = yield train(work / name, "--parts", scale["parts"])
            seconds.append(round(done.seconds, 1))
        one, other = read(work / "repeat_1"), read(work / "repeat_2")
        figures = {"seconds": seconds, "accuracies": accuracies(one["result"])}
        if found := parse.differences(one, other):
            raise Failed(f"{len(found)} figures differ between two runs of one seed", *found[:5], figures=figures)
        return figures

    def company():
        options = ["--methods", "ffg", "--parts", "2"]
        yield train(work / "company_1", *options, "--seeds", "1")
        yield train(work / "company_2", *options, "--seeds", "0,1", "--at-once", "2")
        alone = read(work / "company_1")["result"]["runs"]
        beside = [run for run in read(work / "company_2")["result"]["runs"] if run["seed"] == 1]
        if found := parse.differences(alone, beside, "runs"):
            raise Failed(f"{len(found)} figures of seed 1 change when seed 0 trains beside it", *found[:5])
        return {"accuracies": accuracies({"runs": alone})}

    def model():
        data = place.data_folder()
        if not data:
            raise NotRun("MNIST is missing")
        baton = needed(place.program("baton"))
        work.mkdir(parents=True, exist_ok=True)
        count = {"gpu": 6000, "host": 400, "ptx": 8}[place.mode]
        files = [work / f"model_{i}.safetensors" for i in (1, 2)]
        yield Command([baton, "init", "--architecture", "lenet5", "--seed", 1, "--overwrite", "--out",
                       work / "model_0.safetensors"])
        for file in files:
            yield Command([baton, "update", "--model", work / "model_0.safetensors", "--data", data, "--images",
                           f"0:{count}", "--epochs", 1, "--overwrite", "--restart", "--out", file])
        (head, tensors), (other_head, other_tensors) = map(safetensors_parts, files)
        found = parse.differences(head, other_head, "header", re.compile(r"second|time|date|written"))
        if found or tensors != other_tensors:
            raise Failed("two updates of one model with the same images differ" +
                         ("" if tensors == other_tensors else " in their tensors"), *found[:5])
        return {"bytes of tensors": len(tensors)}

    limit = scale["repeats"]
    return [Check("bil_mnist twice", twice, limit / 4, limit), Check("seeds in company", company, limit / 6, limit),
            Check("baton update twice", model, limit / 6, limit)]


def safetensors_parts(path):
    """The header of a safetensors file, its metadata with JSON in them read, and the tensors' bytes."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8:8 + size])
    for key, value in head.get("__metadata__", {}).items():
        try:
            head["__metadata__"][key] = json.loads(value)
        except ValueError:
            pass
    return head, data[8 + size:]


# ---------------------------------------------------------------------------------------------------------- timings
def timing_checks(place, scale, work):
    torch = place.root / "bench" / "peers" / "step_torch.py"
    device = "cuda" if place.mode == "gpu" else "cpu"
    environment = {**place.given, "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
                   "TRITON_CACHE_DIR": str(work / "triton")}

    def numbers(which):
        return scale["steps"] if which.endswith("_step") else scale["predictions"]

    def figures_of(done, side, **more):
        line = (parse.json_lines(done.output) or [{}])[-1]
        if not line.get("ms_per_step", 0) > 0:
            raise Failed("it printed no time", *done.said())
        for loss in line.get("losses", []):
            if loss != loss:
                raise Failed(f"the loss is not a number: {line['losses']}")
        times = sorted(line["ms_all"])
        return {"case": f"{line['network']} {line['case']}", "side": side, "batch": line["batch"],
                "ms": line["ms_per_step"], "least ms": times[0], "greatest ms": times[-1], "steps": len(times), **more}

    def baton(network, which, rows):
        def body():
            words = [needed(place.program("step_timing")), "--network", network, "--case", which, *numbers(which)]
            done = yield Command(words + (["--replicas", rows] if rows > 1 else []))
            line = parse.json_lines(done.output)[-1:]
            return figures_of(done, "baton", rows=rows, peak_bytes=(line or [{}])[0].get("peak_bytes"))
        return body

    def peer(network, which, side, count, *options):
        def body():
            if place.mode == "ptx":
                raise NotRun("PyTorch beside an interpreter says nothing")
            if place.mode == "host" and options:
                raise NotRun(NEEDS_GPU)
            if not place.torch_python:
                raise NotRun("no Python here has PyTorch")
            threads = min(8, os.cpu_count() or 1)
            words = [place.torch_python, needed(torch), "--network", network, "--case", which, "--device", device,
                     "--threads", threads, *count, *options]
            return figures_of((yield Command(words, environment=environment)), side)
        return body

    checks = []
    limit = scale["step_limit"]
    for network, which in STEPS:
        if place.mode != "gpu" and network == "3conv3fc":
            continue
        checks.append(Check(f"baton {network} {which}", baton(network, which, 1), 4, limit))
    for rows in scale["rows"][1:]:
        for network, which in STEPS:
            if network == "lenet5" and which != "predict_weight":
                checks.append(Check(f"baton {network} {which} rows {rows}", baton(network, which, rows), 5, limit))
    few = ["--steps", 2, "--warmup", 3]
    for network, which in STEPS[:-1]:
        if place.mode != "gpu" and (network, which) != STEPS[0]:
            continue
        checks.append(Check(f"PyTorch {network} {which}", peer(network, which, "eager", numbers(which)), 8, limit))
        if place.mode == "gpu":  # what torch.compile makes is kept: made beside the tests, it is there for the timings
            checks.append(Check(f"compile {network} {which}", peer(network, which, "preparation", few, "--compile"), 60,
                                180, background=True))
        checks.append(Check(f"PyTorch compiled {network} {which}",
                            peer(network, which, "compiled", numbers(which), "--compile"), 20, 120))
    for network, which in STEPS[:3]:
        if place.mode == "gpu":
            checks.append(Check(f"PyTorch tf32 {network} {which}",
                                peer(network, which, "eager, tf32", numbers(which), "--tf32"), 8, limit))
    return checks


# ------------------------------------------------------------------------------------------------------ calibration
MICRO = {  # what of bench/micro is wanted first
    "steps": "^(training_step|prediction)/",
    "products": "^(gemm|convolution)/",
    "FFG and FT": "^((conv_sample_pool|dense_sample)(_backward)?|(conv|dense)_bias_gradient)/.*batch:128/replicas:1/"
                  "warm|^(gaussian_step/adam|point_step|gather_training_batch|softmax_cross_entropy|add_to_totals|"
                  "advance_step)/",
    "CFG and MNF": "^(cholesky_sample|cholesky_step|flow_forward|flow_backward|multiplier_gradient|multiply_weights)/",
    "BGD": "^(draw_weights|accumulate_moments|product_moments|bgd_update)/.*warm",
    "last layer": "^(last_layer_update|covariance_products|row_dots)/",
}


def calibration_checks(place, scale, work):
    def calibrate():
        done = yield Command([needed(place.program("first_light")), "calibrate", *scale["small"]], check=False)
        lines = [line for line in parse.json_lines(done.output) if line["kind"] == "calibration"]
        if done.status != 0 or done.stopped:
            raise (TimedOut if done.stopped else Failed)(*done.said(), figures={"calibration": lines})
        return {"calibration": lines}

    def micro(pattern):
        def body():
            program = needed(place.program("micro"))
            if place.mode == "ptx":
                raise NotRun("its shapes take too long under an interpreter")
            work.mkdir(parents=True, exist_ok=True)
            least = 0.05 if place.mode == "gpu" else 0.001
            done = yield Command([program, f"--benchmark_filter={pattern}", f"--benchmark_min_time={least}"],
                                 check=False)
            line = r"^(\S+?)(?:/manual_time|/real_time)?\s+([\d.e+]+) (ns|us|ms|s)\s"
            times = {name: round(float(value) * {"ns": 1e-3, "us": 1, "ms": 1e3, "s": 1e6}[unit], 3)
                     for name, value, unit in re.findall(line, done.output, re.MULTILINE)}
            if done.status != 0 or done.stopped:
                raise (TimedOut if done.stopped else Failed)(*done.said(), figures={"microseconds": times})
            return {"microseconds": times}
        return body

    def kernels(network, which):
        """Every kernel of a training step, the libraries' too, by Nsight Compute."""
        def body():
            if place.mode != "gpu":
                raise NotRun(NEEDS_GPU)
            tool = find_tool("ncu")
            if not tool:
                raise NotRun("ncu (Nsight Compute) is missing")
            # Steps one by one: what comes after the last "advance" is one step.
            done = yield Command([tool, "--csv", "--metrics", "gpu__time_duration.sum", "--clock-control", "none",
                                  "--graph-profiling", "node", needed(place.program("step_timing")),
                                  "--network", network, "--case", which, "--steps", 1, "--warmup", 2, "--together", 1],
                                 check=False)
            times = parse.kernel_times(done.output)
            if re.search(r"ERR_NVGPUCTRPERM|LibraryNotLoaded|Failed to initialize the profiler", done.output):
                raise NotRun("ncu cannot read this device's counters: " + "; ".join(parse.error_lines(done.output, 2)))
            if done.status != 0 or done.stopped:
                raise (TimedOut if done.stopped else Failed)(*done.said(), figures={"launches": len(times)})
            starts = [i for i, (name, _) in enumerate(times) if "advance" in name]
            if not starts:
                raise Failed("no step among its kernels", *done.said())
            step = times[starts[-1]:]
            return {"case": f"{network} {which}", "kernels": step, "sum": round(sum(us for _, us in step), 2)}
        return body

    checks = [Check("device", calibrate, 10, 90)]
    checks += [Check(f"kernels of {network} {which}", kernels(network, which), 20, 120) for network, which in STEPS[:3]]
    groups = MICRO if place.mode == "gpu" else {"products": "^gemm/lenet5.fc2/forward/batch:128/replicas:1"}
    checks += [Check(f"micro: {group}", micro(pattern), 12, 90) for group, pattern in groups.items()]
    return checks


# -------------------------------------------------------------------------------------------------------- sanitizer
# Those of the first line have races and uninitialised reads of their own kernels to find, without the libraries'.
SANITIZED = ["LocalReparam.*Small*:Gaussian.*Small*:Cholesky.*Small*:BgdUpdate.*Small*:"
             "ProductMoments.*Small*",
             "Flow.*Small*:SoftmaxXent.*Small*:Batch.*Small*:Predictive.*Small*:LastLayerKernels.*Small*:Prune.*Small*",
             "Graph.*:LeNet5Net.*"]


def sanitizer_checks(place, record):
    def failed_cases():
        """Up to 20 of the cases that failed, those first that broke their process."""
        figures = [check.get("figures") or {} for check in record["checks"]]
        broken = [case for f in figures for case in f.get("broke their process", [])]
        failed = [case for f in figures if "broke their process" in f for case in f["failed"]]
        return ":".join(list(dict.fromkeys(broken + failed))[:20])

    def sanitize(tool, cases):
        def body():
            if place.mode != "gpu":
                raise NotRun(NEEDS_GPU)
            program = find_tool("compute-sanitizer")
            if not program:
                raise NotRun("compute-sanitizer is missing")
            wanted = cases or failed_cases()
            if not wanted:
                raise NotRun("no test case has failed")
            done = yield Command([program, "--tool", tool, "--error-exitcode", 86, needed(place.program("baton_tests")),
                                  f"--gtest_filter={wanted}"], check=False, folder=place.root,
                                 environment=QUIET_THREADS)
            if re.search(r"Device not supported|Unable to find|unsupported device", done.output):
                raise NotRun("compute-sanitizer cannot watch this device: "
                             + "; ".join(parse.error_lines(done.output, 2)))
            found = [line for line in done.output.splitlines() if line.startswith("=========") and line[9:].strip()]
            ran = parse.Cases(done.output)
            figures = {"cases": len(ran.names), "summary": found[-1] if found else ""}
            if done.status != 0 or done.stopped or not ran.passed:
                raise (TimedOut if done.stopped else Failed)(*found[1:6], *done.said(), figures=figures)
            return figures
        return body

    tools = ("memcheck", "racecheck", "initcheck", "synccheck")
    chosen = [(tool, i) for i in (0, 1) for tool in tools] + [("memcheck", 2)]
    checks = [Check("memcheck of what failed", sanitize("memcheck", None), 30, 150)]
    return checks + [Check(f"{tool} {i + 1}", sanitize(tool, SANITIZED[i]), 20, 90) for tool, i in chosen]


# ----------------------------------------------------------------------------------------------------------- papers
PAPERS = [  # (name, program, options), the most wanted first
    ("bil_mnist", "bil_mnist", ["--methods", "ft,ffg,cfg,mnf", "--parts", "1,10", "--seeds", "0,1,2"]),
    ("bgd_mnist", "bgd_mnist", []),
    ("bil_cifar10", "bil_cifar10", ["--methods", "ft,ffg", "--parts", "10"]),
    ("bgd_permuted_mnist", "bgd_permuted_mnist", []),
    ("laplace_update", "laplace_update", []),
    ("bgd_cifar10", "bgd_cifar10", []),
]


def paper_checks(place, work):
    def paper(name, program, options):
        def body():
            if place.mode != "gpu":
                raise NotRun(f"{NEEDS_GPU}: the paper preset takes hours here")
            if "mnist" in name and not place.data_folder():
                raise NotRun("MNIST is missing")
            if "cifar" in name and not (place.root / "data" / "cifar10").exists():
                raise NotRun("CIFAR-10 is missing")
            folder = work.parent / "papers" / name
            folder.parent.mkdir(parents=True, exist_ok=True)
            resume = ["--resume"] if (folder / "log.jsonl").exists() else []
            words = [needed(place.program(program)), "--preset", "paper", *options, "--out", folder, *resume]
            done = yield Command(words, folder=place.root, grace=15, check=False)
            result = folder / "result.json"
            runs = json.loads(result.read_text())["runs"] if result.exists() else []
            figures = {"runs": [
                {key: run.get(key) for key in ("method", "label", "parts", "seed", "final_test_accuracy", "seconds")}
                for run in runs]}
            if done.stopped and done.status in (143, -15):
                last = (parse.error_lines(done.output, 99) or [""])[-1]
                raise NotRun(f"not finished when the run's minutes were over ({last}); --from papers goes on with it",
                             figures)
            if done.status != 0 or done.stopped:
                raise (TimedOut if done.stopped else Failed)(*done.said(), figures=figures)
            return figures
        return body

    return [Check(name, paper(name, program, options), 20, 24 * 3600) for name, program, options in PAPERS]
