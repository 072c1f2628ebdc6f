"""What the tests of the paper programs share: a program run as a user would run it, killed and gone on with, refused.
"""
import json
import os
import pathlib
import re
import signal
import struct
import subprocess
import tempfile
import time
import unittest

STAGE_KEYS = ("stage", "train_examples", "test_accuracy", "test_nll", "test_ece", "kl", "seconds",
              "examples_per_second")


def figures(x):
    """A result without what the clock says."""
    if isinstance(x, dict):
        return {k: figures(v) for k, v in x.items() if "second" not in k and k != "peak_device_bytes"}
    return [figures(v) for v in x] if isinstance(x, list) else x


class ProgramTest(unittest.TestCase):
    program = None  # its path

    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.folder = pathlib.Path(self.temporary.name)
        # No data set here, so that the images are generated and every machine runs the same test. One thread: two that
        # wait for each other beside other jobs are many times slower.
        self.environment = {k: v for k, v in os.environ.items() if k != "BATON_DATA"}
        self.environment.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

    def run_program(self, *arguments, program=None, **more):
        return subprocess.run([program or self.program, *map(str, arguments)], cwd=self.folder, env=self.environment,
                              text=True, capture_output=True, timeout=1200, **more)

    def finish(self, *arguments, out, program=None):
        done = self.run_program(*arguments, "--out", out, program=program)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done

    def result(self, out):
        return json.loads((self.folder / out / "result.json").read_text())

    def log(self, out):
        return [json.loads(line) for line in (self.folder / out / "log.jsonl").read_text().splitlines()]

    def check_result(self, result, log, layers):
        """The contract of result.json and log.jsonl, whatever the program."""
        for key in ("experiment", "preset", "dataset", "device", "peak_device_bytes", "settings", "runs"):
            self.assertIn(key, result)
        for key in ("name", "source", "generated", "train", "test"):
            self.assertIn(key, result["dataset"])
        for run in result["runs"]:
            self.assertEqual(len(run["stages"]), run["parts"])
            self.assertEqual(run["final_test_accuracy"], run["stages"][-1]["test_accuracy"])
            for number, stage in enumerate(run["stages"], 1):
                for key in STAGE_KEYS:
                    self.assertIn(key, stage)
                self.assertEqual(stage["stage"], number)
                self.assertTrue(0 <= stage["test_accuracy"] <= 1)
            self.assertEqual(sum(stage["train_examples"] for stage in run["stages"]), result["dataset"]["train"])
        for line in log + [stage for run in result["runs"] for stage in run["stages"]]:
            if "kl_by_layer" in line:
                self.assertEqual(list(line["kl_by_layer"]), layers)
                total = sum(line["kl_by_layer"].values())
                self.assertLessEqual(abs(total - line["kl"]), 1e-9 * abs(line["kl"]) + 1e-9)
            else:
                self.assertEqual(line["kl"], 0)  # of a point estimate

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
        """(stage, steps in it) of a trainer's checkpoint."""
        data = (self.folder / checkpoint).read_bytes()
        metadata = json.loads(data[8:8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
        return int(metadata["stage"]), int(metadata["stage_step"])

    def check_same_runs(self, one, other):
        """Two folders hold the same figures, bit for bit."""
        self.assertEqual(figures(self.result(one)), figures(self.result(other)))
        self.assertEqual(figures(self.log(one)), figures(self.log(other)))

    def expect_refusal(self, code, words, *arguments, program=None, **more):
        done = self.run_program(*arguments, program=program, **more)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        # Progress may stand before the message; the message is one line, and the last.
        lines = [line for line in done.stderr.strip().splitlines() if not re.match(r"bil_\w+ \w+ T=\d+ ", line)]
        self.assertEqual(len(lines), 1, done.stderr)
        for word in words:
            self.assertIn(word, lines[0])
        return lines[0]
