#!/usr/bin/env python3
"""Runs the program bil_mnist as a user would, on small sets: the files it writes, two equal runs, SIGKILL in the middle
of a stage and --resume, seeds side by side or one by one, bad input, and a disk that is full.

Usage: bil_mnist_test.py PROGRAM
"""
import json
import os
import pathlib
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest

PROGRAM = pathlib.Path(sys.argv.pop(1)).resolve()
SMALL = ["--train-limit", "900", "--test-limit", "200", "--epochs", "2", "--samples", "3", "--seeds", "0,1",
         "--parts", "1,3"]


def figures(x):
    """A result without what the clock says."""
    if isinstance(x, dict):
        return {k: figures(v) for k, v in x.items() if "second" not in k and k != "peak_device_bytes"}
    return [figures(v) for v in x] if isinstance(x, list) else x


def write_idx(folder, count=300, images_magic=2051, cut=0, name="train"):
    pixels = bytes((i * 7919 >> 3) & 255 for i in range(count * 784))
    (folder / f"{name}-images-idx3-ubyte").write_bytes(
        (struct.pack(">4i", images_magic, count, 28, 28) + pixels)[:-cut or None])
    (folder / f"{name}-labels-idx1-ubyte").write_bytes(
        struct.pack(">2i", 2049, count) + bytes(i % 10 for i in range(count)))


class BilMnist(unittest.TestCase):
    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = pathlib.Path(self.temporary.name)
        # No data set here, so that the digits are generated and every machine runs the same test.
        self.environment = {k: v for k, v in os.environ.items() if k != "BATON_DATA"}

    def tearDown(self):
        self.temporary.cleanup()

    def run_program(self, *arguments, **more):
        return subprocess.run([PROGRAM, *map(str, arguments)], cwd=self.folder, env=self.environment, text=True,
                              capture_output=True, timeout=600, **more)

    def result(self, out):
        return json.loads((self.folder / out / "result.json").read_text())

    def test_files_and_resume(self):
        done = self.run_program(*SMALL, "--out", "whole")
        self.assertEqual(done.returncode, 0, done.stderr)
        whole = self.result("whole")
        self.assertTrue(whole["dataset"]["generated"])
        self.assertIn("GENERATED", done.stdout)
        self.assertIn("After 3 parts FFG ends at", done.stdout)
        self.assertEqual(sorted((r["method"], r["parts"], r["seed"]) for r in whole["runs"]),
                         sorted((m, t, s) for m in ("ft", "ffg") for t in (1, 3) for s in (0, 1)))
        for run in whole["runs"]:
            self.assertEqual(len(run["stages"]), run["parts"])
            self.assertEqual(run["final_test_accuracy"], run["stages"][-1]["test_accuracy"])
            for stage in run["stages"]:
                for key in ("stage", "train_examples", "test_accuracy", "test_nll", "test_ece", "kl", "seconds",
                            "examples_per_second"):
                    self.assertIn(key, stage)
                self.assertEqual(stage["train_examples"], 900 // run["parts"])
            if run["method"] == "ffg":
                self.assertGreater(run["stages"][0]["kl"], 0)
        self.assertFalse((self.folder / "whole" / "checkpoint").exists())
        lines = [json.loads(line) for line in (self.folder / "whole" / "log.jsonl").read_text().splitlines()]

        # Killed in the middle of a stage, several times over, and gone on with.
        started = self.folder / "killed"
        deadlines = iter([8, 15, 19])  # lines of the log
        kills = 0
        arguments = [PROGRAM, *SMALL, "--out", "killed", "--checkpoint-seconds", "0"]
        while True:
            wanted = next(deadlines, None)
            process = subprocess.Popen([*map(str, arguments)] + (["--resume"] if kills else []), cwd=self.folder,
                                       env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            while process.poll() is None and wanted is not None:
                log = started / "log.jsonl"
                if log.exists() and log.read_bytes().count(b"\n") >= wanted:
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.002)
            code = process.wait()
            message = process.stderr.read().decode()
            process.stderr.close()
            if code == -signal.SIGKILL:
                kills += 1
                continue
            self.assertEqual(code, 0, message)
            break
        self.assertGreater(kills, 0)
        self.assertEqual(figures(self.result("killed")), figures(whole))
        resumed = [json.loads(line) for line in (started / "log.jsonl").read_text().splitlines()]
        self.assertEqual(figures(resumed), figures(lines))

        # Seeds side by side are the same figures as seeds one by one.
        again = self.run_program(*SMALL, "--out", "side", "--at-once", "2")
        self.assertEqual(again.returncode, 0, again.stderr)
        key = lambda r: (r["method"], r["parts"], r["seed"])  # noqa: E731
        self.assertEqual(sorted(figures(self.result("side"))["runs"], key=key), sorted(figures(whole)["runs"], key=key))

    def expect_refusal(self, code, words, *arguments, **more):
        done = self.run_program(*arguments, **more)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        # Progress may stand before the message; the message is one line, and the last.
        lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("bil_mnist ft")]
        self.assertEqual(len(lines), 1, done.stderr)
        for word in words:
            self.assertIn(word, lines[0])

    def test_resume_of_another_experiment(self):
        process = subprocess.Popen([str(PROGRAM), *SMALL, "--out", "one", "--checkpoint-seconds", "0"], cwd=self.folder,
                                   env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (self.folder / "one/checkpoint/job.safetensors").exists():
            time.sleep(0.002)
        process.kill()
        process.wait()
        self.expect_refusal(2, ["--resume", "another experiment"], *SMALL, "--beta", "0.5", "--out", "one", "--resume")

    def test_bad_options(self):
        out = ["--out", "refused"]
        self.expect_refusal(2, ["--parts", "0"], *SMALL[:-1], "0", *out)
        self.expect_refusal(2, ["--parts", "5000", "900"], *SMALL[:-1], "5000", *out)
        self.expect_refusal(2, ["unknown method", "ffx"], *SMALL, "--methods", "ft,ffx", *out)
        self.expect_refusal(2, ["--seeds"], *SMALL[:6], "--seeds", "0,x", *out)
        self.expect_refusal(2, ["--nonsense"], "--nonsense", *out)
        self.expect_refusal(2, ["preset", "slow"], "--preset", "slow", *out)
        self.expect_refusal(2, ["--epochs"], *SMALL, "--epochs", "0", *out)
        self.assertFalse((self.folder / "refused").exists())
        self.assertEqual(self.run_program("--help").returncode, 0)

    def test_bad_data(self):
        out = ["--out", "refused", "--data"]
        self.expect_refusal(2, ["nowhere"], *out, "nowhere")
        for label, fault, words in (("cut", {"cut": 100}, ["train-images"]),
                                    ("mislabelled", {"images_magic": 2049}, ["train-images"])):
            folder = self.folder / label
            folder.mkdir()
            write_idx(folder, **fault)
            write_idx(folder, name="t10k")
            self.expect_refusal(2, words, *out, label)
        good = self.folder / "good"
        good.mkdir()
        write_idx(good)
        write_idx(good, name="t10k")
        done = self.run_program("--data", "good", "--out", "good_out", "--train-limit", "200", "--test-limit", "100",
                                "--epochs", "1", "--parts", "1", "--methods", "ft")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertFalse((self.folder / "refused").exists())

    def test_full_disk(self):
        def small_files():  # stands for a full disk: a write beyond so many bytes fails
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        self.expect_refusal(1, ["refused"], *SMALL, "--out", "refused", "--checkpoint-seconds", "0",
                            preexec_fn=small_files)
        left = [p.name for p in (self.folder / "refused").rglob("*") if p.is_file()]
        self.assertNotIn("result.json", left)
        self.assertFalse([name for name in left if ".tmp" in name], left)


if __name__ == "__main__":
    unittest.main(verbosity=2)
