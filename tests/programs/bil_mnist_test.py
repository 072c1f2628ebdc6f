#!/usr/bin/env python3
"""Runs the program bil_mnist as a user would, on small sets: the files it writes, two equal runs, SIGKILL in the middle
of a stage and --resume under every posterior, runs side by side or one by one, bad input, a loss that overflows, and a
disk that is full.

Usage: bil_mnist_test.py PROGRAM
"""
import json
import pathlib
import resource
import signal
import struct
import subprocess
import sys
import time
import unittest

from support import ProgramTest, figures, read_tensors

PROGRAM = pathlib.Path(sys.argv.pop(1)).resolve()
LAYERS = ["conv1", "conv2", "fc1", "fc2"]
SMALL = ["--train-limit", "900", "--test-limit", "200", "--epochs", "2", "--samples", "3", "--seeds", "0,1",
         "--parts", "1,3"]
TINY = ["--train-limit", "240", "--test-limit", "60", "--batch", "40", "--samples", "2", "--parts", "2"]


def write_idx(folder, count=300, images_magic=2051, cut=0, name="train"):
    pixels = bytes((i * 7919 >> 3) & 255 for i in range(count * 784))
    (folder / f"{name}-images-idx3-ubyte").write_bytes(
        (struct.pack(">4i", images_magic, count, 28, 28) + pixels)[:-cut or None])
    (folder / f"{name}-labels-idx1-ubyte").write_bytes(
        struct.pack(">2i", 2049, count) + bytes(i % 10 for i in range(count)))


class BilMnist(ProgramTest):
    program = PROGRAM

    def test_files_and_resume(self):
        done = self.finish(*SMALL, out="whole", plot=True)
        whole = self.result("whole")
        self.assertTrue(whole["dataset"]["generated"])
        self.assertIn("GENERATED", done.stdout)
        self.assertIn("After 3 parts FFG ends at", done.stdout)
        self.assertEqual(sorted((r["method"], r["parts"], r["seed"]) for r in whole["runs"]),
                         sorted((m, t, s) for m in ("ft", "ffg") for t in (1, 3) for s in (0, 1)))
        self.check_result(whole, self.log("whole"), LAYERS)
        for run in whole["runs"]:
            for stage in run["stages"]:
                self.assertEqual(stage["train_examples"], 900 // run["parts"])
            if run["method"] == "ffg":
                self.assertGreater(run["stages"][0]["kl"], 0)
        self.assertFalse((self.folder / "whole" / "checkpoint").exists())

        # Killed in the middle of a stage, several times over, and gone on with.
        self.finish_with_kills(*SMALL, out="killed", lines=[8, 15, 19])
        self.check_same_runs("killed", "whole")

        # All parts and seeds of a method in one pass are the same figures as one run after the other.
        self.finish(*SMALL, "--at-once", "4", out="side")
        self.assertEqual(figures(self.result("side"))["runs"], figures(whole)["runs"])
        lines = [sorted(map(json.dumps, figures(self.log(out)))) for out in ("side", "whole")]
        self.assertEqual(*lines)

    def test_resume_under_cfg_and_mnf(self):
        arguments = [*TINY, "--methods", "cfg,mnf", "--epochs", "2", "--save-models"]
        self.finish(*arguments, out="whole")
        whole = self.result("whole")
        self.check_result(whole, self.log("whole"), LAYERS)
        self.assertEqual([run["method"] for run in whole["runs"]], ["cfg", "mnf"])
        # A stage has two lines: killed in the middle of CFG's first, between MNF's, and in the middle of its second.
        self.finish_with_kills(*arguments, out="killed", lines=[1, 6, 7])
        self.check_same_runs("killed", "whole")
        for run in whole["runs"]:
            name = f"{run['method']}_seed0"
            tensors, metadata = self.read_model(f"whole/{name}", run)
            self.assertEqual(metadata["architecture"]["name"], "lenet5")
            self.assertEqual([stage["images"] for stage in metadata["history"]], [120, 120])
            for layer in LAYERS:
                self.check_keys(tensors, (f"{layer}.weight.mean", f"{layer}.weight.prior_mean"))
            one, other = (self.folder / out / f"{name}.safetensors" for out in ("whole", "killed"))
            self.assertEqual(one.read_bytes(), other.read_bytes())

    def test_signals(self):
        """SIGTERM and SIGINT in the middle of epochs, at their ends and in predictions, several times over."""
        arguments = ["--train-limit", "600", "--test-limit", "100", "--epochs", "3", "--parts", "1,3", "--methods",
                     "ft,ffg", "--seeds", "0,1", "--at-once", "2", "--batch", "20", "--samples", "20",
                     "--stage-samples", "2"]
        self.finish(*arguments, out="whole")
        # Two lines an epoch, 6 to learn all at once and 18 to do so in parts, for each method. The last line before a
        # prediction by 20 draws: 30 and 48.
        places = []
        messages = self.finish_with_stops(
            *arguments, out="stopped", when=[(2, 0.05), 8, 24, 26, (30, 0.2), 32, (46, 0.05), (48, 0.1)],
            check=lambda: places.append(self.where("stopped/checkpoint/run.safetensors")))
        self.assertEqual({m.split(": ")[2] for m in messages},
                         {"the checkpoint is written; --resume goes on from it"})
        self.check_same_runs("stopped", "whole")
        self.assertFalse((self.folder / "stopped/checkpoint").exists())
        # Thirty or ten steps an epoch.
        within = [steps for _, steps in places if steps % 10]
        self.assertGreaterEqual(len(within), 2, places)

    def test_precision(self):
        """It is in the result and in the models, changes the figures a little, and a run is resumed with its own."""
        arguments = [*TINY, "--methods", "ffg", "--epochs", "2", "--save-models"]
        for precision in ("fp32", "tf32"):
            self.finish(*arguments, "--precision", precision, out=precision)
        self.finish(*arguments, out="standard")
        self.check_same_runs("standard", "fp32")
        [before], [rounded] = (self.result(out)["runs"] for out in ("fp32", "tf32"))
        self.assertEqual([self.result(out)["precision"] for out in ("fp32", "tf32")], ["fp32", "tf32"])
        self.assertEqual(before["settings"], rounded["settings"])
        for one, other in zip(before["stages"], rounded["stages"]):
            self.assertNotEqual(one["test_nll"], other["test_nll"])
            self.assertAlmostEqual(one["test_nll"], other["test_nll"], delta=0.05)
        for out, said in (("fp32", None), ("tf32", "tf32")):
            self.assertEqual(read_tensors(self.folder / out / "ffg_seed0.safetensors")[1].get("precision"), said)

        self.finish_with_kills(*arguments, "--precision", "tf32", out="killed", lines=[1, 3])
        self.check_same_runs("killed", "tf32")
        self.kill_within(*arguments, "--precision", "tf32", out="one")
        self.expect_refusal(2, ["--resume", "another experiment"], *arguments, "--out", "one", "--resume")

    def test_a_stage_starts_at_its_prior(self):
        """Steps too small to move anything: the second stage's KL, to what was handed on, is 0 but for rounding."""
        self.finish(*TINY, "--methods", "ffg,cfg,mnf", "--epochs", "1", "--lr", "1e-12", "--lr-scale", "1e-12",
                    out="still")
        for run in self.result("still")["runs"]:
            first, second = run["stages"]
            self.assertGreater(first["kl"], 1e5)
            self.assertLess(abs(second["kl"]), 1e-2, run["method"])
        for line in self.log("still"):
            if line["stage"] == 2:
                self.assertLess(abs(line["kl"]), 1e-2, line["method"])

    def test_a_loss_that_overflows(self):
        """FT goes through at such a step size, and FFG, whose variances are squares, overflows."""
        arguments = [*TINY, "--methods", "ft,ffg", "--epochs", "2", "--lr", "1e6", "--out", "hot"]
        message = self.expect_refusal(1, ["not finite", "stage 1", "step 2", "seed 0"], *arguments)
        self.assertRegex(message, r"layer (conv1|conv2|fc1|fc2)\b")
        self.assertEqual([run["method"] for run in self.result("hot")["runs"]], ["ft"])
        self.assertTrue((self.folder / "hot/checkpoint/experiment.json").exists())
        log = self.log("hot")
        self.assertEqual({line["method"] for line in log}, {"ft"})
        # The checkpoint before it is good: FT is not run again, and FFG comes to the same step.
        self.assertEqual(self.expect_refusal(1, ["not finite"], *arguments, "--resume"), message)
        self.assertEqual(self.log("hot"), log)

    def kill_within(self, *arguments, out):
        """Once it has written its first checkpoint."""
        process = subprocess.Popen([str(PROGRAM), *arguments, "--out", out, "--checkpoint-seconds", "0"],
                                   cwd=self.folder, env=self.environment, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        while process.poll() is None and not (self.folder / out / "checkpoint/run.safetensors").exists():
            time.sleep(0.002)
        process.kill()
        process.wait()

    def test_resume_of_another_experiment(self):
        self.kill_within(*SMALL, out="one")
        self.expect_refusal(2, ["--resume", "another experiment"], *SMALL, "--beta", "0.5", "--out", "one", "--resume")

    def test_bad_options(self):
        out = ["--out", "refused"]
        self.expect_refusal(2, ["--parts", "0"], *SMALL[:-1], "0", *out)
        self.expect_refusal(2, ["--parts", "5000", "900"], *SMALL[:-1], "5000", *out)
        self.expect_refusal(2, ["unknown method", "ffx"], *SMALL, "--methods", "ft,ffx", *out)
        self.expect_refusal(2, ["--seeds"], *SMALL[:6], "--seeds", "0,x", *out)
        self.expect_refusal(2, ["--nonsense"], "--nonsense", *out)
        self.expect_refusal(2, ["preset", "slow"], "--preset", "slow", *out)
        self.expect_refusal(2, ["precision", "half", "fp32", "tf32"], *SMALL, "--precision", "half", *out)
        self.expect_refusal(2, ["--epochs"], *SMALL, "--epochs", "0", *out)
        for words, *options in ((["--groups", "40", "7"], "--groups", 7),
                                (["flow", "glow", "realnvp"], "--flow", "glow"), (["--flow-steps"], "--flow-steps", 9),
                                (["--flow-hidden"], "--flow-hidden", 0), (["--z-log-std"], "--z-log-std", -31),
                                (["--z", "per-weight"], "--z", "per-weight"),
                                (["--beta"], "--beta", -1), (["--transfer"], "--transfer", "conv")):
            self.expect_refusal(2, words, *TINY, "--methods", "mnf", *options, *out)
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
