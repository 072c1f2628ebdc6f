"""What the tests of the paper programs share: a program run as a user would run it, killed and resumed, or refused, and
its result.json and log.jsonl, which have one form whatever the program."""
import array
import json
import math
import os
import pathlib
import re
import signal
import struct
import subprocess
import tempfile
import time
import unittest
import xml.etree.ElementTree

RESULT_KEYS = ("experiment", "preset", "dataset", "device", "precision", "peak_device_bytes", "settings", "runs")
RUN_KEYS = ("method", "label", "parts", "seed", "settings", "parameters", "split_hash", "stages", "final_test_accuracy")
STAGE_KEYS = ("stage", "epoch", "train_examples", "samples", "test_accuracy", "test_nll", "test_ece",
              "predictive_entropy", "mutual_information", "seconds", "examples_per_second", "test_seconds")
LOG_KEYS = ("run", "method", "label", "parts", "seed", "stage", "epoch", "step", "train_loss", "train_accuracy",
            "seconds")
CODES = {"F32": "f", "U8": "B"}  # of the module array


def options(defaults, changes):
    """The words of a command line for {option: value}."""
    pairs = {**defaults, **changes}.items()
    return [word for key, value in pairs for word in ("--" + key.replace("_", "-"), str(value))]


def read_header(path):
    """The header of a safetensors file, and the bytes of its tensors, by the format's definition."""
    data = path.read_bytes()
    size, = struct.unpack("<Q", data[:8])
    return json.loads(data[8:8 + size]), data[8 + size:]


def read_tensors(path):
    """{name: (shape, values)} of a safetensors file, and its metadata."""
    header, body = read_header(path)
    metadata = header.pop("__metadata__")
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        values = array.array(CODES[entry["dtype"]], body[first:last])
        if first != end or len(values) != math.prod(entry["shape"]):
            raise ValueError(f"{path}: {name} at {first} to {last}, shape {entry['shape']}")
        tensors[name] = entry["shape"], values
        end = last
    if end != len(body):
        raise ValueError(f"{path}: {len(body)} bytes of tensors, the header says {end}")
    return tensors, metadata


def figures(x):
    """A result without what the clock says."""
    if isinstance(x, dict):
        return {k: figures(v) for k, v in x.items() if "second" not in k and k != "peak_device_bytes"}
    return [figures(v) for v in x] if isinstance(x, list) else x


class ProgramTest(unittest.TestCase):
    program = None  # its path
    # Drawing takes longer than most of these runs do. Without Python in the PATH nothing is drawn; one test of each
    # program has it (finish(plot=True)).
    plots = False

    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.folder = pathlib.Path(self.temporary.name)
        # No data set here, so that the images are generated and every machine runs the same test. One thread: two that
        # wait for each other beside other jobs are many times slower.
        self.environment = {k: v for k, v in os.environ.items() if k != "BATON_DATA"}
        self.environment.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        self.with_plots = dict(self.environment)
        if not self.plots:
            self.environment["PATH"] = "/nowhere"

    def run_program(self, *arguments, program=None, environment=None, **more):
        return subprocess.run([program or self.program, *map(str, arguments)], cwd=self.folder, text=True,
                              env=environment or self.environment, capture_output=True, timeout=1200, **more)

    def finish(self, *arguments, out, program=None, plot=False):
        done = self.run_program(*arguments, "--out", out, program=program,
                                environment=self.with_plots if plot else None)
        self.assertEqual(done.returncode, 0, done.stderr)
        if plot:
            self.check_plot(out)
        return done

    def check_plot(self, out):
        stem = self.folder / out / self.result(out)["experiment"]
        root = xml.etree.ElementTree.parse(stem.with_suffix(".svg")).getroot()
        self.assertTrue(root.tag.endswith("svg"), root.tag)
        png = stem.with_suffix(".png").read_bytes()
        self.assertEqual(png[:8], b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">2I", png[16:24])
        self.assertGreater(min(width, height), 100)

    def result(self, out):
        return json.loads((self.folder / out / "result.json").read_text())

    def log(self, out):
        return [json.loads(line) for line in (self.folder / out / "log.jsonl").read_text().splitlines()]

    def check_keys(self, found, keys):
        self.assertEqual([key for key in keys if key not in found], [], found)

    def check_form(self, result, log):
        """The form of result.json and log.jsonl, whatever the program."""
        self.check_keys(result, RESULT_KEYS)
        self.check_keys(result["dataset"], ("name", "source", "generated", "train", "test"))
        for run in result["runs"]:
            self.check_keys(run, RUN_KEYS)
            self.check_keys(run["settings"], ("epochs", "batch", "schedule", "samples"))
            for stage in run["stages"]:
                self.check_keys(stage, STAGE_KEYS)
                self.assertTrue(0 <= stage["test_accuracy"] <= 1)
            self.assertEqual(run["final_test_accuracy"], run["stages"][-1]["test_accuracy"])
        for line in log:
            self.check_keys(line, LOG_KEYS)
        self.assertEqual(sorted({line["run"] for line in log}), list(range(len({line["run"] for line in log}))))

    def check_result(self, result, log, layers):
        """What a program of incremental learning writes beside: parts of one set, and the KL by layer."""
        self.check_form(result, log)
        for run in result["runs"]:
            self.assertEqual(run["label"], run["method"])
            self.assertEqual([stage["stage"] for stage in run["stages"]], list(range(1, run["parts"] + 1)))
            self.assertEqual({stage["epoch"] for stage in run["stages"]}, {run["settings"]["epochs"]})
            self.assertEqual(sum(stage["train_examples"] for stage in run["stages"]), result["dataset"]["train"])
        stages = [(run["method"], stage) for run in result["runs"] for stage in run["stages"]]
        for method, line in stages + [(line["method"], line) for line in log]:
            if method.startswith("ft"):  # a point estimate
                self.assertFalse({"kl", "kl_by_layer", "mean_log_std"} & set(line), line)
                continue
            self.assertEqual(list(line["kl_by_layer"]), layers)
            total = sum(line["kl_by_layer"].values())
            self.assertLessEqual(abs(total - line["kl"]), 1e-9 * abs(line["kl"]) + 1e-9)
        for method, stage in stages:
            self.assertEqual("mean_log_std" in stage, not method.startswith("ft"))

    def read_model(self, name, run):
        """The tensors of a saved model, as `baton` reads it, and its metadata, with the JSON in them read."""
        tensors, metadata = read_tensors(self.folder / f"{name}.safetensors")
        self.assertEqual((metadata["format"], metadata["kind"]), ("baton-model-2", run["method"].split("_")[0]))
        metadata = {key: text if key in ("format", "kind") else json.loads(text) for key, text in metadata.items()}
        self.assertEqual(metadata["origin"], {"experiment": self.program.name,
                                              **{key: run[key] for key in ("method", "label")}})
        self.assertEqual(metadata["seed"], run["seed"])
        training = metadata["training"]
        self.assertEqual([training[key] for key in ("epochs", "batch")],
                         [run["settings"][key] for key in ("epochs", "batch")])
        known = {key: value for key, value in training["settings"].items() if key in run["settings"]}
        self.assertTrue({"eta", "lr"} & set(known))
        self.assertEqual(known, {key: run["settings"][key] for key in known})
        return tensors, metadata

    def finish_with_kills(self, *arguments, out, lines, program=None, often=("--checkpoint-seconds", "0")):
        """Kills the run when the log has so many lines, one after another, and lets it end at last. Every time but the
        first it goes on from its checkpoint. `often` are the options that make it write one whenever it can."""
        lines = iter(lines)
        kills = 0
        command = [program or self.program, *arguments, "--out", out, *often]
        log = self.folder / out / "log.jsonl"
        while True:
            wanted = next(lines, None)
            process = subprocess.Popen([*map(str, command)] + (["--resume"] if kills else []), cwd=self.folder,
                                       env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            while process.poll() is None and wanted is not None:
                if log.exists() and log.read_bytes().count(b"\n") >= wanted:
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.002)
            message = process.stderr.read().decode()
            process.stderr.close()
            code = process.wait()
            if code != -signal.SIGKILL:
                self.assertEqual(code, 0, message)
                break
            kills += 1
        self.assertGreater(kills, 0)

    def finish_with_stops(self, *arguments, out, when, program=None, check=None):
        """Ends the run by SIGTERM and SIGINT in turn, at each of `when`, and lets it finish at last. One of `when` is a
        number of lines in the log, a text that stands in what the program says, or a file in `out` (a Path), each with
        the seconds that pass after it, or without. `check` is called after every stop. Gives what stopped runs said."""
        name = pathlib.Path(program or self.program).name
        command = [program or self.program, *arguments, "--out", out]
        messages = []
        for number, moment in enumerate([*when, None]):
            said, errors = (self.folder / f"{out}.{stream}" for stream in ("stdout", "stderr"))
            with open(said, "w") as stdout, open(errors, "w") as stderr:
                process = subprocess.Popen([*map(str, command)] + (["--resume"] if number else []), cwd=self.folder,
                                           env=self.environment, stdout=stdout, stderr=stderr)
                sent = signal.SIGINT if number % 2 else signal.SIGTERM
                if moment is not None:
                    self.signal_at(process, sent, moment, out, said)
                code = process.wait(timeout=120)
            message = errors.read_text()
            if moment is None:
                self.assertEqual(code, 0, message)
                return messages
            self.assertEqual(code, 128 + sent, f"at {moment}: {message}")
            lines = [line for line in message.splitlines() if not re.match(rf"{name} .* loss ", line)]
            self.assertEqual(len(lines), 1, message)
            self.assertRegex(lines[0], rf"^{name}: stopped by {sent.name}: .*; --resume goes on from it$")
            self.assertNotIn("Traceback", message)
            messages.append(lines[0])
            if check:
                check()

    def signal_at(self, process, number, moment, out, said):
        what, seconds = moment if isinstance(moment, tuple) else (moment, 0)
        log = self.folder / out / "log.jsonl"

        def has_come():
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            if not int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (number - 1) & 1:
                return False  # it would end at once
            if isinstance(what, int):  # and its images are read or generated
                return said.stat().st_size > 0 and log.exists() and log.read_bytes().count(b"\n") >= what
            if isinstance(what, pathlib.PurePath):
                return (self.folder / out / what).exists()
            return what in said.read_text()
        while process.poll() is None:
            if has_come():
                time.sleep(seconds)
                process.send_signal(number)
                return
            time.sleep(0.002)

    def expect_another_experiment(self, *arguments, changed, when, out):
        """Stopped at `when`, it does not go on with other options."""
        said = self.folder / f"{out}.stdout"
        with open(said, "w") as stdout:
            process = subprocess.Popen([str(self.program), *map(str, arguments), "--out", out], cwd=self.folder,
                                       env=self.environment, stdout=stdout, stderr=subprocess.DEVNULL)
            self.signal_at(process, signal.SIGTERM, when, out, said)
            self.assertEqual(process.wait(timeout=120), 143)
        self.expect_refusal(2, ["--resume", "another experiment"], *changed, "--out", out, "--resume")

    def where(self, checkpoint):
        """(stage, steps in it) of the first run in a trainer's checkpoint."""
        metadata = read_header(self.folder / checkpoint)[0]["__metadata__"]
        return tuple(int(metadata[key].split(",")[0]) for key in ("stage", "stage_step"))

    def check_same_runs(self, one, other):
        """Two folders hold the same figures, bit for bit."""
        self.assertEqual(figures(self.result(one)), figures(self.result(other)))
        self.assertEqual(figures(self.log(one)), figures(self.log(other)))

    def expect_refusal(self, code, words, *arguments, program=None, **more):
        """It ends with this status and one line that has these words; progress may stand before it."""
        done = self.run_program(*arguments, program=program, **more)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        name = pathlib.Path(program or self.program).name
        lines = [line for line in done.stderr.strip().splitlines() if not re.match(rf"{name} .* loss ", line)]
        self.assertEqual(len(lines), 1, done.stderr)
        self.assertTrue(lines[0].startswith(name + ": "), lines[0])
        for word in words:
            self.assertIn(word, lines[0])
        return lines[0]
