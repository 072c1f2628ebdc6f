#!/usr/bin/env python3
"""The command line `baton` as people use it: a network from elsewhere made Bayesian, updated, asked and judged; killed,
stopped and starved at any moment without losing anything; wrong input refused in one line.

usage: baton_test.py BATON [LIBIO_FAULTS]   BATON_KILLS=50: so many kill -9 (else 8)
"""
import json
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import time
import unittest

try:
    import numpy as np
except ImportError:
    if sys.executable != "/usr/bin/python3" and os.access("/usr/bin/python3", os.X_OK):
        os.execv("/usr/bin/python3", ["/usr/bin/python3", *sys.argv])
    raise

from support import ProgramTest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "build/python"), str(ROOT / "tools")]
try:
    import baton_files
    from safetensors.numpy import load_file, save_file
except (ImportError, SystemExit):
    baton_files = None

IO_FAULTS = None
PIXELS = 8 * 8


def blobs(n, seed, side=8, classes=4):
    """Images of a bright square whose place is the class."""
    random_numbers = np.random.default_rng(seed)
    labels = random_numbers.integers(0, classes, n).astype(np.int32)
    images = random_numbers.integers(0, 90, (n, side, side)).astype(np.uint8)
    half = side // 2
    for image, label in zip(images, labels):
        row, column = divmod(int(label) % 4, 2)
        image[row * half:row * half + half, column * half:column * half + half] += 60
    return images, labels


def relu(x):
    return np.maximum(x, 0)


def mlp(weights, images):
    x = images.reshape(len(images), -1).astype(np.float64) / 255
    layers = len(weights) // 2
    for i in range(1, layers + 1):
        x = x @ weights[f"fc{i}.weight"].astype(np.float64).T + weights[f"fc{i}.bias"]
        if i < layers:
            x = relu(x)
    return x


def convolve(x, w, b):
    k = w.shape[2]
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, w, optimize=True) + b[None, :, None, None]


def pool(x):
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))


def lenet5(weights, images):
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x = images[:, None].astype(np.float64) / 255
    x = pool(relu(convolve(x, w["conv1.weight"], w["conv1.bias"])))
    x = pool(relu(convolve(x, w["conv2.weight"], w["conv2.bias"])))
    x = relu(x.reshape(len(x), -1) @ w["fc1.weight"].T + w["fc1.bias"])
    return x @ w["fc2.weight"].T + w["fc2.bias"]


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


class BatonTest(ProgramTest):
    plots = True

    def setUp(self):
        super().setUp()
        for name, n, seed in (("old", 300, 0), ("new", 320, 1), ("newer", 320, 2), ("test", 200, 3)):
            images, labels = blobs(n, seed)
            np.savez(self.folder / f"{name}.npz", images=images, labels=labels)
        np.savez(self.folder / "foreign.npz", images=255 - blobs(150, 4)[0])

    def baton(self, *arguments, code=0, **more):
        done = self.run_program(*arguments, **more)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done

    def ask(self, *arguments):
        return json.loads(self.baton(*arguments, "--json").stdout)

    def refuse(self, code, words, *arguments, **more):
        done = self.baton(*arguments, code=code, **more)
        lines = [line for line in done.stderr.splitlines() if line.startswith("baton: ")]
        self.assertEqual(len(lines), 1, done.stderr)
        self.assertEqual(done.stdout, "")
        for word in words:
            self.assertIn(word, lines[0])
        return lines[0]

    def model(self, name="m.safetensors", kind="ffg", *more):
        self.baton("init", "--architecture", "mlp", "--image", "1x8x8", "--hidden", "24,16", "--classes", 4, "--kind",
                   kind, "--epochs", 12, "--batch", 32, "--out", name, *more)
        return name

    def read(self, name):
        return (self.folder / name).read_bytes()


class RoundTrip(BatonTest):
    def test_every_kind_learns_and_every_command_answers(self):
        steps = {"sgd": ("--lr", 0.3), "bbb": ("--lr", 0.01, "--prior-sd", 0.3)}
        for kind in ("ft", "ffg", "mnf", "bgd", "bbb", "sgd", "adam", "si", "ewc"):
            with self.subTest(kind):
                first = self.model(f"{kind}0.safetensors", kind, *steps.get(kind, ()))
                second, third = f"{kind}1.safetensors", f"{kind}2.safetensors"
                one = self.ask("update", "--model", first, "--data", "new.npz", "--out", second)
                self.assertEqual((one["stage"], one["images"]), (1, 320))
                two = self.ask("update", "--model", second, "--data", "newer.npz", "--out", third, "--epochs", 3)
                self.assertEqual(two["stage"], 2)
                if kind in ("ffg", "mnf"):
                    self.assertGreater(one["kl"], 0)
                    self.assertAlmostEqual(sum(one["kl_by_layer"].values()), one["kl"], delta=1e-6 * one["kl"])
                judged = self.ask("evaluate", "--model", third, "--data", "test.npz", "--samples", 10, "--ood",
                                  "foreign.npz")
                self.assertGreater(judged["accuracy"]["accuracy"], 0.9)
                shown = self.ask("inspect", "--model", third)
                self.assertEqual([stage["images"] for stage in shown["history"]], [320, 320])
                self.assertEqual(shown["model"]["kind"], kind)
                self.assertEqual("kl" in shown["all_layers"], kind in ("ffg", "mnf"))
                self.assertEqual("sigma" in shown["all_layers"], kind in ("ffg", "mnf", "bgd", "bbb"))
                for command in (("inspect", "--model", third),
                                ("compare", "--model", second, "--other", third, "--data", "test.npz"),
                                ("evaluate", "--model", third, "--data", "test.npz", "--ood", "foreign.npz"),
                                ("predict", "--model", third, "--data", "foreign.npz")):
                    self.assertGreater(len(self.baton(*command).stdout.splitlines()), 2)

    def test_precision(self):
        """A model keeps its own, which an update may change and a prediction may leave aside."""
        self.model("m.safetensors", "ffg", "--precision", "tf32")
        shown = self.ask("inspect", "--model", "m.safetensors")
        self.assertEqual(shown["precision"], "tf32")
        self.assertIn("--precision", self.baton("inspect", "--model", "m.safetensors").stdout)
        kept = self.ask("update", "--model", "m.safetensors", "--data", "new.npz", "--out", "n.safetensors")
        self.assertEqual(kept["settings"]["precision"], "tf32")
        other = self.ask("update", "--model", "m.safetensors", "--data", "new.npz", "--out", "other", "--precision", "fp32")
        self.assertNotIn("precision", other["settings"])
        for model, said in (("n.safetensors", "tf32"), ("other", "fp32")):
            self.assertEqual(self.ask("inspect", "--model", model)["precision"], said)
        self.assertNotEqual(kept["loss"], other["loss"])
        self.assertAlmostEqual(kept["loss"], other["loss"], delta=0.05)

        nll = {}
        for given in ((), ("--precision", "tf32"), ("--precision", "fp32")):
            judged = self.ask("evaluate", "--model", "n.safetensors", "--data", "test.npz", "--samples", 5, *given)
            self.assertEqual(judged["precision"], given[1] if given else "tf32")
            nll[given[1:]] = judged["nll"]
        self.assertEqual(nll[()], nll["tf32",])
        self.assertNotEqual(nll[()], nll["fp32",])
        self.assertAlmostEqual(nll[()], nll["fp32",], delta=0.01)
        compared = self.ask("compare", "--model", "n.safetensors", "--other", "other", "--data", "test.npz")
        self.assertEqual(compared["precision"], ["tf32", "fp32"])
        self.assertIn({"setting": "precision", "model": "tf32", "other": "fp32"}, compared["settings"])
        self.baton("prune", "--model", "n.safetensors", "--fraction", 0.5, "--data", "test.npz", "--out", "pruned")
        self.assertEqual(self.ask("inspect", "--model", "pruned")["precision"], "tf32")
        for command in (("init", "--architecture", "lenet5", "--out", "x"),
                        ("update", "--model", "m.safetensors", "--data", "new.npz", "--out", "x"),
                        ("predict", "--model", "m.safetensors", "--data", "new.npz")):
            self.refuse(2, ["precision 'half'", "tf32"], *command, "--precision", "half")

    def test_cfg_on_pictures_of_a_lenet5(self):
        images, labels = blobs(60, 5, 28)
        np.savez(self.folder / "big.npz", images=images, labels=labels)
        self.baton("init", "--architecture", "lenet5", "--family", "cfg", "--classes", 4, "--out", "m.safetensors",
                   "--batch", 20, "--epochs", 2)
        self.baton("update", "--model", "m.safetensors", "--data", "big.npz", "--out", "n.safetensors")
        self.refuse(2, ["cfg", "pruned"], "prune", "--model", "n.safetensors", "--fraction", 0.5, "--out", "p")

    @unittest.skipIf(baton_files is None, "the Python package safetensors is not here (tools/setup)")
    def test_mean_and_draws_are_what_numpy_computes(self):
        images, labels = blobs(80, 5, 28)
        np.savez(self.folder / "big.npz", images=images, labels=labels)
        forward = {"mlp": mlp, "lenet5": lenet5}
        for architecture, data, pictures in (("mlp", "test.npz", blobs(200, 3)[0]), ("lenet5", "big.npz", images)):
            with self.subTest(architecture):
                first = "m0.safetensors"
                if architecture == "mlp":
                    self.model(first, "ffg", "--overwrite")
                else:
                    self.baton("init", "--architecture", "lenet5", "--classes", 4, "--out", first, "--overwrite",
                               "--batch", 20, "--epochs", 1)
                learned = "new.npz" if architecture == "mlp" else "big.npz"
                self.baton("update", "--model", first, "--data", learned, "--out", "m1.safetensors", "--overwrite")
                self.baton("export", "--model", "m1.safetensors", "--out", "mean.safetensors", "--overwrite")
                weights = load_file(self.folder / "mean.safetensors")
                model = baton_files.load_model(self.folder / "m1.safetensors")
                for name, value in model.mean_state().items():
                    np.testing.assert_array_equal(value, weights[name])
                self.baton("predict", "--model", "m1.safetensors", "--data", data, "--mean", "--out", "p.npz",
                           "--overwrite")
                logits = forward[architecture](weights, pictures)
                expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
                got = np.log(np.load(self.folder / "p.npz")["probability"].astype(np.float64))
                sure = expected > -15  # a float's probability says nothing of logits far below the others
                self.assertLess(np.abs(got - expected)[sure].max(), 1e-4)

                # The posterior, drawn in numpy, predicts what Baton's own draws predict, within Monte Carlo error.
                draws = 60
                self.baton("predict", "--model", "m1.safetensors", "--data", data, "--samples", draws, "--out", "s.npz",
                           "--overwrite")
                ours = np.load(self.folder / "s.npz")["probability"]
                rng = np.random.default_rng(0)
                theirs = np.stack([softmax(forward[architecture](model.sample(rng), pictures)) for _ in range(draws)])
                error = np.sqrt(2 * theirs.var(0, ddof=1) / draws) + 1e-4
                z = (ours - theirs.mean(0)) / error
                self.assertLess(np.sqrt(np.mean(z**2)), 1.6)
                self.assertLess(np.abs(z).max(), 8)
                self.assertGreater(np.sqrt(np.mean(z**2)), 0.2)  # they are draws

    @unittest.skipIf(baton_files is None, "the Python package safetensors is not here (tools/setup)")
    def test_a_pretrained_network_is_the_mean_and_the_centre_of_the_prior(self):
        rng = np.random.default_rng(1)
        shapes = {"fc1.weight": (24, 64), "fc1.bias": (24, ), "fc2.weight": (16, 24), "fc2.bias": (16, ),
                  "fc3.weight": (4, 16), "fc3.bias": (4, )}
        weights = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
        save_file(weights, self.folder / "plain.safetensors")
        self.baton("init", "--from", "plain.safetensors", "--image", "1x8x8", "--pretrained-sd", 0.25, "--out", "m")
        model = load_file(self.folder / "m")
        for name, value in weights.items():
            np.testing.assert_array_equal(model[name + ".mean"], value)
            np.testing.assert_array_equal(model[name + ".prior_mean"], value)
            np.testing.assert_allclose(model[name + ".prior_log_std"], np.log(0.25), rtol=1e-6)
        self.baton("init", "--from", "plain.safetensors", "--image", "1x8x8", "--laplace", "--old-data", "old.npz",
                   "--tau", 4, "--out", "l")
        laplace = load_file(self.folder / "l")
        sd = np.exp(laplace["fc1.weight.prior_log_std"])
        self.assertLessEqual(sd.max(), 0.5 + 1e-6)  # 1 / sqrt(tau)
        self.assertLess(sd.min(), 0.47)  # the data say something
        self.baton("init", "--from", "plain.safetensors", "--image", "1x8x8", "--transfer", "all-but-last", "--classes",
                   7, "--out", "t")
        self.assertEqual(load_file(self.folder / "t")["fc3.weight.mean"].shape, (7, 16))
        for words, arguments in ((["fc2.bias"], ["--from", "broken"]), (["--transfer"], ["--from", "plain.safetensors",
                                                                                        "--image", "1x8x8",
                                                                                        "--classes", 7])):
            broken = dict(weights)
            broken["fc2.bias"] = broken["fc2.bias"][:7]
            save_file(broken, self.folder / "broken")
            self.refuse(2, words, "init", *arguments, "--out", "x")

    @unittest.skipIf(baton_files is None, "the Python package safetensors is not here (tools/setup)")
    def test_pruned_weights_stay_away(self):
        self.baton("update", "--model", self.model(), "--data", "new.npz", "--out", "n")
        self.baton("prune", "--model", "n", "--fraction", 0.75, "--out", "p")
        before = load_file(self.folder / "p")
        gone = before["fc1.weight.mask"] == 0
        self.assertGreater(gone.mean(), 0.6)
        self.baton("update", "--model", "p", "--data", "newer.npz", "--out", "q")
        after = load_file(self.folder / "q")
        self.assertTrue((after["fc1.weight.mean"][gone] == 0).all())
        self.assertTrue((after["fc1.weight.mean"][~gone] != 0).all())
        np.testing.assert_array_equal(after["fc1.weight.mask"], before["fc1.weight.mask"])
        self.baton("export", "--model", "q", "--out", "e")
        self.assertTrue((load_file(self.folder / "e")["fc1.weight"][gone] == 0).all())
        self.assertTrue(np.isfinite(self.ask("inspect", "--model", "q")["history"][-1]["kl"]))


    def test_a_network_with_several_heads(self):
        images, labels = blobs(60, 6, 32)
        np.savez(self.folder / "colour.npz", images=np.repeat(images[..., None], 3, 3), labels=labels)
        self.baton("init", "--architecture", "task-cnn", "--heads", 3, "--classes", 4, "--kind", "adam", "--batch", 20,
                   "--epochs", 8, "--out", "m")
        stage = self.ask("update", "--model", "m", "--data", "colour.npz", "--head", 2, "--out", "n")
        self.assertEqual(stage["settings"]["head"], 2)
        moved = {row["layer"]: row["means_relative_l2"] for row in self.ask("compare", "--model", "m", "--other",
                                                                            "n")["layers"]}
        self.assertEqual((moved["head0"], moved["head1"]), (0, 0))
        self.assertGreater(moved["head2"], 0)
        judged = [self.ask("evaluate", "--model", "n", "--data", "colour.npz", "--head", head) for head in (0, 2)]
        self.assertGreater(judged[1]["accuracy"]["accuracy"], judged[0]["accuracy"]["accuracy"] + 0.2)
        self.assertEqual(judged[1]["head"], 2)

    @unittest.skipIf(baton_files is None, "the Python package safetensors is not here (tools/setup)")
    def test_the_anchors_of_si_and_ewc_are_kept(self):
        for kind in ("si", "ewc"):
            self.baton("update", "--model", self.model(f"{kind}0", kind, "--strength", 1), "--data", "new.npz", "--out",
                       f"{kind}1")
            learned = load_file(self.folder / f"{kind}1")
            self.assertGreater(learned["fc1.weight.importance"].max(), 0)
            np.testing.assert_array_equal(learned["fc1.weight.centre"], learned["fc1.weight.mean"])

    def test_python_knows_the_networks(self):
        printed = self.baton("inspect", "--networks").stdout
        self.assertEqual(printed, (ROOT / "tools/networks.json").read_text(),
                         "baton inspect --networks > tools/networks.json")


class Interruptions(BatonTest):
    def update(self, out="n", *more):
        return ["update", "--model", "m.safetensors", "--data", "new.npz", "--out", out, "--epochs", "60",
                "--checkpoint-seconds", "0", *more]

    def check_what_is_there(self, out, old, done):
        """The old model untouched, a next one only if it is whole, and nothing torn."""
        self.assertEqual(self.read("m.safetensors"), old)
        path = self.folder / out
        if path.exists():
            self.assertEqual(path.read_bytes(), done)
        unfinished = self.folder / (out + ".unfinished")
        if unfinished.exists() and baton_files is not None:
            self.assertIn("fc1.weight.mean", load_file(unfinished))

    def test_killed_anywhere_it_goes_on_to_the_same_bits(self):
        self.model()
        start = time.monotonic()
        self.baton(*self.update("done", "--hold-out", "0.1"))
        whole = time.monotonic() - start
        old, done = self.read("m.safetensors"), self.read("done")
        wanted, kills, runs = int(os.environ.get("BATON_KILLS", 8)), 0, 0
        moments = random.Random(7)
        while kills < wanted:
            (self.folder / "n").unlink(missing_ok=True)
            while kills < wanted:
                process = subprocess.Popen([self.program, *self.update("n", "--hold-out", "0.1", "--resume")],
                                           cwd=self.folder, env=self.environment, stdout=subprocess.DEVNULL,
                                           stderr=subprocess.PIPE)
                time.sleep(moments.uniform(0, 1.1 * whole))
                process.send_signal(signal.SIGKILL)
                code = process.wait()
                message = process.stderr.read().decode()
                process.stderr.close()
                self.assertIn(code, (0, -signal.SIGKILL), message)
                self.check_what_is_there("n", old, done)
                kills += code != 0
                if code == 0:
                    break
            self.baton(*self.update("n", "--hold-out", "0.1", "--resume"))
            runs += 1
            self.assertEqual(self.read("n"), done)
            self.assertEqual([p.name for p in self.folder.glob("n.*")], [])  # nothing is left beside it
        print(f"{kills} kills, {runs} runs to the end", file=sys.stderr)

    def test_stopped_it_leaves_a_checkpoint_and_goes_on_to_the_same_bits(self):
        self.model()
        self.baton(*self.update("done"))
        for sent, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            command = [self.program, *self.update("n"), "--checkpoint-seconds", "1000"]
            command[command.index("0")] = "1000"
            process = subprocess.Popen(command[:-2], cwd=self.folder, env=self.environment, text=True,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            time.sleep(0.12)
            process.send_signal(sent)
            out, message = process.communicate()
            if process.returncode == 0:  # a machine too fast for this
                (self.folder / "n").unlink()
                continue
            self.assertEqual(process.returncode, code, message)
            last = message.splitlines()[-1]
            self.assertIn("stopped by " + signal.Signals(sent).name, last)
            self.assertIn("--resume", last)
            self.assertTrue((self.folder / "n.unfinished").exists())
            self.assertFalse((self.folder / "n").exists())
            self.refuse(2, ["n.unfinished", "--resume", "--restart"], *self.update())
            self.baton(*self.update("n", "--resume"))
            self.assertEqual(self.read("n"), self.read("done"))
            self.assertIn("complete already", self.baton(*self.update("n", "--resume")).stdout)
            (self.folder / "n").unlink()

    def test_bayesian_gradient_descent_too(self):
        self.model("m.safetensors", "ffg", "--init-sd", 0.05)
        rule = ("--rule", "bgd", "--draws", 4, "--hold-out", 0.2)
        done = self.ask(*self.update("done", *rule))
        self.assertEqual(done["settings"]["rule"], "bgd")
        self.assertEqual(done["settings"]["lr"], 1)  # eta
        self.assertGreater(done["kl"], 0)
        self.assertGreater(done["hold_out"]["accuracy_after"], 0.9)
        kills = 0
        while kills < 3:
            process = subprocess.Popen([self.program, *map(str, self.update("n", *rule, "--resume"))], cwd=self.folder,
                                       env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(0.1 + 0.1 * kills)
            process.send_signal(signal.SIGKILL)
            kills += 1
            if process.wait() == 0:
                break
        self.baton(*self.update("n", *rule, "--resume"))
        self.assertEqual(self.read("n"), self.read("done"))
        # Its sigma is where it was, or below: one more stage by the bound goes on from there.
        self.assertEqual(self.ask("update", "--model", "n", "--data", "newer.npz", "--rule", "elbo", "--epochs", 2,
                                  "--out", "p")["stage"], 2)
        self.model("f", "mnf")
        self.refuse(2, ["ffg", "mnf"], "update", "--model", "f", "--data", "new.npz", "--out", "x", "--rule", "bgd")
        line = self.refuse(1, ["eta", "lower"], "update", "--model", "m.safetensors", "--data", "new.npz", "--out", "x",
                           "--rule", "bgd", "--eta", 3000)
        self.assertIn("sigma", line)

    def test_in_place(self):
        self.model()
        self.baton(*self.update("done"))
        command = [a for a in self.update() if a not in ("--out", "n")] + ["--in-place"]
        self.baton(*command)
        self.assertEqual(self.read("m.safetensors"), self.read("done"))
        self.refuse(2, ["stage 1", "--again"], *command)
        self.assertIn("complete already", self.baton(*command, "--resume").stdout)
        self.baton(*command, "--again")
        self.assertEqual(len(self.ask("inspect", "--model", "m.safetensors")["history"]), 2)

    def test_another_update_is_not_gone_on_with(self):
        self.model()
        command = self.update()
        with self.assertRaises(subprocess.TimeoutExpired):
            subprocess.run([self.program, *command[:command.index("60")], "100000", *command[command.index("60") + 1:]],
                           cwd=self.folder, env=self.environment, capture_output=True, timeout=0.5)
        self.assertTrue((self.folder / "n.unfinished").exists())
        self.refuse(2, ["n.unfinished", "another run"], *command, "--resume")
        self.baton(*command, "--restart")

    def test_a_full_disk(self):
        self.model()
        old = self.read("m.safetensors")

        def small_files():
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        line = self.refuse(1, ["n.unfinished", "File too large"], *self.update(), preexec_fn=small_files)
        self.assertIn("cannot write", line)
        self.assertEqual(self.read("m.safetensors"), old)
        self.assertEqual([p.name for p in self.folder.glob("n*") if p.name not in ("new.npz", "newer.npz")], [])
        self.refuse(1, ["/dev/full", "No space left"], "export", "--model", "m.safetensors", "--out", "/dev/full",
                    "--overwrite")

    def test_a_folder_that_cannot_be_written(self):
        self.model()
        (self.folder / "file").write_text("")
        for out, words in (("nowhere/n", ["nowhere/n", "No such file"]), ("file/n", ["file/n", "Not a directory"])):
            self.refuse(1, words, "update", "--model", "m.safetensors", "--data", "new.npz", "--epochs", 1, "--out", out)

    def test_every_call_may_fail(self):
        """Each open, read, write, flush, close and rename of a run fails once, in turn."""
        if not IO_FAULTS:
            self.skipTest("without the library that makes calls fail")
        self.model()
        command = ["update", "--model", "m.safetensors", "--data", "new.npz", "--out", "n", "--epochs", "6",
                   "--checkpoint-seconds", "0"]
        self.baton(*command[:-5], "done", *command[-4:])
        old, done = self.read("m.safetensors"), self.read("done")
        log = self.folder / "hit"
        count = 0
        for call, how in (("open", "EMFILE"), ("read", "EIO"), ("read", "short"), ("read", "EINTR"), ("write", "ENOSPC"),
                          ("write", "short"), ("write", "EINTR"), ("fsync", "EIO"), ("close", "EIO"),
                          ("rename", "EACCES"), ("write", "kill"), ("rename", "kill"), ("fsync", "kill")):
            for at in range(1, 60):
                log.unlink(missing_ok=True)
                for name in ("n", "n.unfinished"):
                    (self.folder / name).unlink(missing_ok=True)
                environment = dict(self.environment, LD_PRELOAD=str(IO_FAULTS), IO_FAULT=f"{call}:{at}:{how}",
                                   IO_FAULT_PATH=str(self.folder), IO_FAULT_LOG=str(log))
                if call == "open":
                    environment["IO_FAULT_PATH"] = "n"  # relative names
                if call == "rename":
                    environment["IO_FAULT_PATH"] = "n"
                run = subprocess.run([self.program, *command], cwd=self.folder, env=environment, text=True,
                                     capture_output=True, timeout=60)
                if not log.exists():
                    break
                count += 1
                where = f"{call} {at} {how}: {run.stderr}"
                harmless = how in ("short", "EINTR")
                if how == "kill":
                    self.assertEqual(run.returncode, -signal.SIGKILL, where)
                elif harmless:
                    self.assertEqual(run.returncode, 0, where)
                elif run.returncode != 0:
                    self.assertIn(run.returncode, (1, 2), where)
                    self.assertRegex(run.stderr.splitlines()[-1], r"^baton: cannot (open|read|write) ", where)
                self.check_what_is_there("n", old, done)
                if run.returncode == 0:
                    self.assertEqual(self.read("n"), done, where)
                elif at % 4 == 1:
                    self.baton(*command, "--resume")
                    self.assertEqual(self.read("n"), done, where)
            self.assertGreater(at, 1, f"{call} was never made to fail")
        print(f"{count} faults", file=sys.stderr)


class Refusals(BatonTest):
    def test_wrong_input_is_one_line(self):
        model = self.model()
        images, labels = blobs(20, 0, 10)
        np.savez(self.folder / "large.npz", images=images, labels=labels)
        np.savez(self.folder / "unlabelled.npz", images=blobs(20, 0)[0])
        images, labels = blobs(20, 0)
        np.savez(self.folder / "classes.npz", images=images, labels=labels + 3)
        (self.folder / "text").write_text("no model")
        update = ("update", "--model", model, "--out", "n", "--data")
        for code, words, arguments in (
            (2, ["large.npz", "10", "8"], (*update, "large.npz")),
            (2, ["unlabelled.npz", "labels"], (*update, "unlabelled.npz")),
            (2, ["label"], (*update, "classes.npz")),
            (2, ["nothing.npz", "No such file"], (*update, "nothing.npz")),
            (2, ["--images", "5:x"], (*update, "new.npz", "--images", "5:x")),
            (2, ["1000"], (*update, "new.npz", "--images", "0:1000")),
            (2, ["--epochs"], (*update, "new.npz", "--epochs", 0)),
            (2, ["--epochs"], (*update, "new.npz", "--epochs", "many")),
            (2, ["--lr"], (*update, "new.npz", "--lr", -1)),
            (2, ["ffg", "momentum"], (*update, "new.npz", "--momentum", 0.9)),
            (2, ["--flow"], (*update, "new.npz", "--flow", "planar")),
            (2, ["--schedule", "linear"], (*update, "new.npz", "--schedule", "fast")),
            (2, ["1 heads"], ("predict", "--model", model, "--data", "test.npz", "--head", 1)),
            (2, ["--out", "--in-place"], ("update", "--model", model, "--data", "new.npz")),
            (2, ["--nonsense", "baton update --help"], (*update, "new.npz", "--nonsense")),
            (2, ["text"], ("inspect", "--model", "text")),
            (2, ["test.npz"], ("inspect", "--model", "test.npz")),
            (2, ["there already", "--overwrite"], ("init", "--architecture", "lenet5", "--out", model)),
            (2, ["resnet", "lenet5"], ("init", "--architecture", "resnet", "--out", "x")),
            (2, ["lenet5", "28 x 28"], ("init", "--architecture", "lenet5", "--image", "3x32x32", "--out", "x")),
            (2, ["bayes", "ffg"], ("init", "--architecture", "lenet5", "--kind", "bayes", "--out", "x")),
            (2, ["--std"], ("init", "--architecture", "lenet5", "--std", "0", "--out", "x")),
            (2, ["subcommand"], ()),
        ):
            with self.subTest(arguments=arguments):
                self.refuse(code, words, *arguments)

    def test_a_newer_version_and_another_architecture_are_refused_with_the_reason(self):
        if baton_files is None:
            self.skipTest("the Python package safetensors is not here (tools/setup)")
        from safetensors import safe_open
        self.model()
        tensors = load_file(self.folder / "m.safetensors")
        with safe_open(self.folder / "m.safetensors", "numpy") as file:
            metadata = file.metadata()
        save_file(tensors, self.folder / "newer", dict(metadata, format="baton-model-3"))
        self.refuse(2, ["newer", "another version", "baton-model-3", "baton-model-2"], "inspect", "--model", "newer")
        save_file(tensors, self.folder / "other", dict(metadata, architecture=metadata["architecture"].replace("24", "25")))
        self.refuse(2, ["other", "fc1", "[24, 64]", "[25, 64]"], "inspect", "--model", "other")
        save_file({"fc1.weight": tensors["fc1.weight.mean"]}, self.folder / "plain")
        self.refuse(2, ["plain network", "init --from"], "inspect", "--model", "plain")
        damaged = bytearray(self.read("m.safetensors"))
        (self.folder / "short").write_bytes(damaged[:-5])
        self.refuse(2, ["short", "cut short"], "inspect", "--model", "short")

    def test_config(self):
        (self.folder / "c.json").write_text('{"epochs": 2, "json": true, "hold-out": 0.25, "resume": false}')
        model = self.model()
        update = ["update", "--model", model, "--data", "new.npz", "--out", "n", "--config", "c.json"]
        stage = json.loads(self.baton(*update).stdout)
        self.assertEqual((stage["epochs"], stage["hold_out"]["images"]), (2, 80))
        stage = json.loads(self.baton(*update, "--epochs", 3, "--overwrite").stdout)  # the command line goes before
        self.assertEqual(stage["epochs"], 3)
        for text, words in (('{"epoch": 2}', ["c.json", "'epoch'", "--help"]), ("[1]", ["c.json", "object"]),
                            ("{", ["c.json", "JSON"]), ('{"epochs": null}', ["epochs", "null"]),
                            ('{"epochs": 1, "epochs": 2}', ["twice"]), ('{"json": 3}', ["json", "true or false"])):
            (self.folder / "c.json").write_text(text)
            self.refuse(2, words, *update)

    def test_help_has_examples(self):
        for command in ("init", "update", "predict", "evaluate", "prune", "inspect", "compare", "export"):
            text = self.baton(command, "--help").stdout
            self.assertRegex(text, re.compile(rf"Examples:\n +baton {command} --", re.M))
        self.assertIn("update", self.baton("--help").stdout)


if __name__ == "__main__":
    BatonTest.program = str(pathlib.Path(sys.argv[1]).resolve())
    if len(sys.argv) > 2 and not sys.argv[2].startswith("-") and sys.argv[2].endswith(".so"):
        IO_FAULTS = pathlib.Path(sys.argv.pop(2)).resolve()
    unittest.main(argv=[sys.argv[0], *sys.argv[2:]], verbosity=2)  # a skipped test says why
