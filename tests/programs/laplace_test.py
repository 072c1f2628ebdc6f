#!/usr/bin/env python3
"""Runs the program laplace_update as a user would, on a few generated images and on features from files: the files it
writes, SIGKILL and --resume, and bad input.

Usage: laplace_test.py FOLDER_OF_THE_PROGRAMS
"""
import array
import json
import pathlib
import random
import struct
import sys
import unittest

from support import ProgramTest

FOLDER = pathlib.Path(sys.argv.pop(1)).resolve()
METHODS = ["base", "first_order", "monte_carlo", "gaussian", "implicit", "one_by_one", "lbfgs_warm", "newton_warm",
           "retrained", "adam"]
SMALL = ["--pool", "300", "--test", "100", "--extractor-images", "200", "--extractor-epochs", "1", "--bases", "20,50",
         "--new", "1,5", "--seeds", "0,1", "--adam-seeds", "1", "--adam-epochs", "5", "--draws", "50", "--repeats", "1",
         "--active-seeds", "0,1", "--active-pool", "60", "--cycles", "2", "--batch", "4", "--initial", "10", "--trials",
         "9"]


def write_npy(path, kind, shape, values):
    header = repr({"descr": {"f": "<f4", "d": "<f8", "q": "<i8", "b": "|b1"}[kind], "fortran_order": False,
                   "shape": tuple(shape)}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + array.array(kind, values).tobytes())


def changed(options, changes):
    """Options as --key value, with some of them replaced or added."""
    pairs = dict(zip(options[::2], options[1::2]))
    pairs.update(zip(changes[::2], changes[1::2]))
    return [word for pair in pairs.items() for word in pair]


class LaplaceUpdate(ProgramTest):
    program = FOLDER / "laplace_update"

    def clusters(self, name, count, dim=6, classes=3, seed=0):
        """Three clusters as features and labels in files; the options that name them."""
        source = random.Random(seed)
        labels = [source.randrange(classes) for _ in range(count)]
        rows = [source.gauss(3 * (d == label), 1) for label in labels for d in range(dim)]
        write_npy(self.folder / f"{name}_x.npy", "f", (count, dim), rows)
        write_npy(self.folder / f"{name}_y.npy", "q", (count,), labels)
        prefix = "--" if name == "train" else "--test-"
        return [prefix + "features", f"{name}_x.npy", prefix + "labels", f"{name}_y.npy"]

    def test_updates_and_active_learning_of_networks_and_pixels(self):
        done = self.finish("--sets", "pixels,lenet5", *SMALL, out="out", plot=True)
        result, log = self.result("out"), self.log("out")
        self.assertEqual([s["name"] for s in result["sets"]], ["pixels", "lenet5"])
        self.assertEqual([s["dim"] for s in result["sets"]], [785, 501])
        self.assertTrue(all(s["generated"] for s in result["sets"]))
        self.assertIn("GENERATED", done.stdout)
        wanted = [(s, b, n, m) for s in ("pixels", "lenet5") for b in (20, 50) for n in (1, 5) for m in METHODS]
        self.assertEqual([(u["set"], u["base"], u["new"], u["method"]) for u in result["updates"]], wanted)
        for u in result["updates"]:
            self.assertTrue(0 <= u["accuracy"]["mean"] <= 1)
            self.assertEqual(u["accuracy"]["n"], 1 if u["method"] == "adam" else 2)
            self.assertEqual("seconds" in u, u["method"] != "base")
            if u["method"] == "base":
                self.assertEqual((u["gain"]["mean"], u["flips"]["mean"]), (0, 0))
        by = {(u["set"], u["base"], u["new"], u["method"]): u for u in result["updates"]}
        for s, b, n, _ in wanted:  # three ways to the same optimum, two to the same update
            self.assertAlmostEqual(by[s, b, n, "retrained"]["nll"]["mean"], by[s, b, n, "newton_warm"]["nll"]["mean"], 6)
            self.assertAlmostEqual(by[s, b, n, "retrained"]["nll"]["mean"], by[s, b, n, "lbfgs_warm"]["nll"]["mean"], 3)
            self.assertAlmostEqual(by[s, b, n, "gaussian"]["nll"]["mean"], by[s, b, n, "one_by_one"]["nll"]["mean"], 9)
        modes = [("random", "random"), ("margin", "top"), ("margin", "sequential"), ("badge", "top"),
                 ("badge", "sequential"), ("look_ahead", "look_ahead")]
        self.assertEqual([(a["set"], a["acquisition"], a["mode"]) for a in result["active"]],
                         [(s, *m) for s in ("pixels", "lenet5") for m in modes])
        for a in result["active"]:
            self.assertEqual(a["labelled"], [10, 14, 18])
            self.assertEqual([len(curve) for curve in a["accuracy"]], [3, 3])
        # Every curve of a set and seed starts from the same samples.
        for name in ("pixels", "lenet5"):
            starts = {tuple(curve[0] for curve in a["accuracy"]) for a in result["active"] if a["set"] == name}
            self.assertEqual(len(starts), 1)
        self.assertEqual(log[0]["part"], "settings")

    def test_killed_and_resumed_is_the_same(self):
        options = ["--sets", "pixels", *SMALL]
        self.finish(*options, out="whole")
        self.finish_with_kills(*options, out="killed", lines=[7, 60, 89], often=())
        self.check_same_runs("killed", "whole")
        self.expect_refusal(2, ["--resume", "other settings"], *options, "--gamma", "5", "--out", "killed", "--resume")

    def test_stopped_and_resumed_is_the_same(self):
        """SIGTERM and SIGINT while a network is trained for its features, in updates and in active learning."""
        options = ["--sets", "pixels,lenet5", *changed(SMALL, ["--extractor-epochs", "20"])]
        self.finish(*options, out="whole")
        # 105 lines of each set, and the settings: 81 of updates, then 24 of active learning.
        self.finish_with_stops(*options, out="stopped", when=[10, 60, 90, (105, 0.2), 130, 190])
        self.check_same_runs("stopped", "whole")

    def test_features_from_files(self):
        options = self.clusters("train", 200) + self.clusters("test", 100, seed=1)
        self.finish("--sets", "file", *options, "--bases", "20", "--new", "10", "--seeds", "0,1,2", "--adam-epochs", "5",
                    "--draws", "50", "--active-seeds", "0", "--active-pool", "100", "--cycles", "2", "--batch", "5",
                    "--initial", "6", "--acquisitions", "random,margin,entropy,bald,badge,bait,look_ahead",
                    "--trials", "9", out="out")
        result = self.result("out")
        self.assertEqual((result["sets"][0]["dim"], result["sets"][0]["classes"]), (7, 3))
        self.assertEqual(len(result["active"]), 12)
        accuracy = {u["method"]: u["accuracy"]["mean"] for u in result["updates"]}
        self.assertGreater(accuracy["implicit"], 0.8)
        self.finish("--sets", "file", *options, "--parts", "updates", "--precision", "float", "--bases", "20", "--new",
                    "10", "--seeds", "0,1,2", "--adam-epochs", "5", "--draws", "50", out="float")
        for u in self.result("float")["updates"]:
            double = next(v for v in result["updates"] if v["method"] == u["method"])
            self.assertAlmostEqual(u["nll"]["mean"], double["nll"]["mean"], 2)

    def test_precision_of_the_extractor(self):
        """It changes the features of a network, and those of pixels not."""
        small = ["--sets", "pixels,lenet5", "--parts", "updates", *changed(SMALL, ["--bases", "20", "--new", "5"])]
        nll = {}
        for precision in ("fp32", "tf32"):
            self.finish(*small, "--extractor-precision", precision, out=precision)
            result = self.result(precision)
            self.assertEqual(result["settings"]["extractor_precision"], precision)
            for u in result["updates"]:
                nll[precision, u["set"], u["method"]] = u["nll"]["mean"]
        for method in METHODS:
            self.assertEqual(nll["tf32", "pixels", method], nll["fp32", "pixels", method])
            self.assertNotEqual(nll["tf32", "lenet5", method], nll["fp32", "lenet5", method])

    def test_prior_precision_by_evidence(self):
        options = self.clusters("train", 200) + self.clusters("test", 100, seed=1)
        self.finish("--sets", "file", *options, "--parts", "updates", "--taus", "evidence", "--bases", "50", "--new", "10",
                    "--seeds", "0", "--methods", "base,implicit,retrained", out="tuned")
        result = self.result("tuned")
        tuned = result["sets"][0]["tuned"]
        self.assertEqual({u["tau"] for u in result["updates"]}, {tuned["tau"]})
        at = tuned["taus"].index(tuned["tau"])
        self.assertEqual(tuned["evidences"][at], max(tuned["evidences"]))
        self.assertTrue(1e-4 < tuned["tau"] < 1e4)

    def test_refuses_bad_input_in_one_line(self):
        small = ["--sets", "pixels", *SMALL, "--out", "bad"]
        for words, changes in [
                (["unknown set 'letters'", "pixels"], ["--sets", "letters"]),
                (["unknown method 'magic'", "implicit"], ["--methods", "magic"]),
                (["unknown acquisition"], ["--acquisitions", "guess"]),
                (["unknown part"], ["--parts", "all"]),
                (["--precision"], ["--precision", "half"]),
                (["unknown precision 'half'"], ["--extractor-precision", "half"]),
                (["--taus", "above 0"], ["--taus", "0"]),
                (["--new"], ["--new", "0"]),
                (["pool has 300"], ["--bases", "1000"]),
                (["unknown preset"], ["--preset", "slow"]),
                (["update rule"], ["--active-rule", "newton"]),
                (["link"], ["--link", "logit"]),
                (["'file' needs --features"], ["--sets", "file"])]:
            with self.subTest(changes=changes):
                self.expect_refusal(2, words, *changed(small, changes))
        train, test = self.clusters("train", 50), self.clusters("test", 20, seed=1)
        files = ["--sets", "file", *SMALL, *train, *test, "--out", "bad"]
        write_npy(self.folder / "nan.npy", "f", (2, 6), [0] * 7 + [float("nan")] + [0] * 4)
        write_npy(self.folder / "two.npy", "q", (2,), [0, 1])
        self.expect_refusal(2, ["nan.npy", "row 1, column 1"], *changed(files, ["--features", "nan.npy", "--labels", "two.npy"]))
        self.expect_refusal(2, ["two.npy", "50 samples"], *changed(files, ["--labels", "two.npy"]))
        write_npy(self.folder / "minus.npy", "q", (50,), [-1] * 50)
        self.expect_refusal(2, ["minus.npy", "label -1"], *changed(files, ["--labels", "minus.npy"]))
        write_npy(self.folder / "wide.npy", "f", (20, 5), [0] * 100)
        self.expect_refusal(2, ["6 columns", "5"], *changed(files, ["--test-features", "wide.npy"]))
        (self.folder / "short.npy").write_bytes((self.folder / "train_x.npy").read_bytes()[:-4])
        self.expect_refusal(2, ["short.npy"], *changed(files, ["--features", "short.npy"]))
        self.expect_refusal(2, ["missing.npy"], *changed(files, ["--features", "missing.npy"]))


if __name__ == "__main__":
    unittest.main()
