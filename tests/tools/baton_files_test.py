#!/usr/bin/env python3
"""Tests tools/baton_files.py: the models and predictions that it reads and refuses, and the statistics of draws."""
import csv
import json
import os
import pathlib
import sys
import tempfile
import unittest

try:
    import numpy as np
except ImportError:  # as tools/from-pytorch does
    if sys.executable != "/usr/bin/python3" and os.access("/usr/bin/python3", os.X_OK):
        os.execv("/usr/bin/python3", ["/usr/bin/python3", *sys.argv])
    sys.exit("baton_files_test: needs numpy; tools/setup installs it")

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tools"))
try:
    import baton_files
    from safetensors.numpy import save_file
except ImportError as error:
    sys.exit(f"baton_files_test: {error}; tools/setup installs it")

ARCHITECTURE = {"name": "lenet5", "classes": 10, "channels": 1, "height": 28, "width": 28, "options": {}}
POINTS = ("ft", "sgd", "adam", "si", "ewc")
SMALL = {"conv1.weight": (2, 3, 2, 2), "conv1.bias": (2,), "conv10.weight": (2, 2, 3, 3), "conv10.bias": (2,),
         "conv2.weight": (2, 2, 2, 1), "conv2.bias": (2,), "fc.weight": (3, 4), "fc.bias": (3,)}


class Files(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)


class Models(Files):
    def setUp(self):
        super().setUp()
        self.path = self.folder / "model.safetensors"

    def model(self, kind, /, shapes=SMALL, more=None, drop=(), **metadata):
        rng = np.random.default_rng(3)
        tensors = {}
        for name, shape in shapes.items():
            tensors[name + ".mean"] = rng.standard_normal(shape).astype(np.float32)
            if kind not in POINTS:
                tensors[name + ".log_std"] = rng.uniform(-2, 0.5, shape).astype(np.float32)
                tensors[name + ".prior_mean"] = np.zeros(shape, np.float32)
                tensors[name + ".prior_log_std"] = np.zeros(shape, np.float32)
            if kind == "cfg" and len(shape) == 4:
                d = shape[2] * shape[3]
                packed = (*shape[:2], d * (d + 1) // 2)
                tensors[name + ".scale_tril"] = rng.uniform(-1, 0.5, packed).astype(np.float32)
                tensors[name + ".prior_scale_tril"] = np.zeros(packed, np.float32)
        tensors.update(more or {})
        for name in drop:
            del tensors[name]
        save_file(tensors, self.path, {
            "format": "baton-model-2", "architecture": json.dumps(ARCHITECTURE), "kind": kind,
            "normalisation": json.dumps({"scale": [0.01], "shift": [-0.4]}), "history": json.dumps([{"stage": 1}]),
            "class_names": json.dumps(["zero", "one"]), "seed": "18446744073709551615", "pruned": "null",
            "note": "plain text", **metadata})
        return baton_files.load_model(self.path)

    def draws(self, model, count):
        rng = np.random.default_rng(7)
        all_draws = [model.sample(rng) for _ in range(count)]
        return {name: np.stack([draw[name] for draw in all_draws]).astype(np.float64) for name in model.names}

    def check_moments(self, model, count=4000):
        """Mean and standard deviation of every weight within 5 standard errors."""
        draws = self.draws(model, count)
        for name in model.names:
            mean, sd = model.mean(name), model.std(name)
            error = np.abs(draws[name].mean(0) - mean)
            self.assertTrue((error <= 5 * sd / np.sqrt(count) + 1e-6 * (1 + np.abs(mean))).all(), name)
            error = np.abs(draws[name].std(0) - sd)
            self.assertTrue((error <= 5 * sd / np.sqrt(2 * count) + 1e-6 * (1 + np.abs(mean))).all(), name)
        return draws

    def test_what_it_says(self):
        model = self.model("ffg")
        self.assertEqual(model.architecture, ARCHITECTURE)
        self.assertEqual(model.kind, "ffg")
        self.assertEqual(model.names, ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "conv10.weight",
                                       "conv10.bias", "fc.weight", "fc.bias"])
        self.assertEqual(model.metadata["normalisation"], {"scale": [0.01], "shift": [-0.4]})
        self.assertEqual(model.metadata["history"], [{"stage": 1}])
        self.assertEqual(model.metadata["class_names"], ["zero", "one"])
        self.assertEqual([model.metadata[key] for key in ("note", "seed", "pruned")],
                         ["plain text", 18446744073709551615, None])
        np.testing.assert_array_equal(model.std("fc.bias"), np.exp(model.tensors["fc.bias.log_std"]))
        with self.assertRaisesRegex(KeyError, "no parameter 'fc9'"):
            model.mean("fc9")
        self.assertEqual(self.model("ft", architecture="lenet5").architecture, {"name": "lenet5"})

    def test_a_file_of_the_version_before(self):
        before = self.model("bgd", format="baton-model-1", kind="", family="bgd")
        self.assertEqual(before.kind, "bgd")
        now = self.model("bgd").sample(1)
        self.assertEqual(list(before.sample(1)), list(now))
        for name, values in before.sample(1).items():
            np.testing.assert_array_equal(values, now[name], name)

    def test_point(self):
        for model in map(self.model, POINTS):
            self.check_point(model)

    def check_point(self, model):
        for state in (model.mean_state(), model.sample(1)):
            self.assertEqual(list(state), model.names)
            for name, values in state.items():
                np.testing.assert_array_equal(values, model.mean(name))
                before = values.copy()
                values += 1  # the model keeps its own
                np.testing.assert_array_equal(before, model.mean(name))
        self.assertFalse(model.std("fc.weight").any())

    def test_gaussian(self):
        for kind in ("ffg", "bgd", "bbb"):
            draws = self.check_moments(self.model(kind))
            w = draws["fc.weight"].reshape(len(draws["fc.weight"]), -1)
            correlation = np.corrcoef(w.T) - np.eye(w.shape[1])
            self.assertLess(np.abs(correlation).max(), 5 / np.sqrt(len(w)))
        model = self.model("ffg")
        first, again, other = model.sample(5), model.sample(5), model.sample(6)
        for name in model.names:
            self.assertEqual(first[name].dtype, np.float32)
            np.testing.assert_array_equal(first[name], again[name])
            self.assertTrue((first[name] != other[name]).all())

    def test_pruned(self):
        kept = np.random.default_rng(0).integers(0, 2, (3, 4)).astype(np.uint8)
        mean = np.where(kept, np.float32(2), np.float32(0))
        model = self.model("ffg", more={"fc.weight.mask": kept, "fc.weight.mean": mean})
        np.testing.assert_array_equal(model.mask("fc.weight"), kept == 1)
        self.assertIsNone(model.mask("fc.bias"))
        np.testing.assert_array_equal(model.std("fc.weight"),
                                      np.where(kept, np.exp(model.tensors["fc.weight.log_std"]), 0))
        draws = self.check_moments(model, 1000)
        self.assertFalse(draws["fc.weight"][:, kept == 0].any())

    def test_cholesky(self):
        model = self.model("cfg")
        name = "conv10.weight"
        packed, factor = model.tensors[name + ".scale_tril"], model.scale_tril(name)
        for i in range(9):  # the definition, entry by entry
            for j in range(9):
                row = packed[..., i * (i + 1) // 2 + min(i, j)]
                scale = np.exp(packed[..., i * (i + 1) // 2 + i])
                np.testing.assert_allclose(factor[..., i, j], scale if i == j else row * scale * (j < i), rtol=1e-6)
        covariance = factor @ factor.swapaxes(-1, -2)
        np.testing.assert_allclose(model.std(name).reshape(2, 2, 9) ** 2,
                                   np.diagonal(covariance, axis1=-2, axis2=-1), rtol=1e-5)
        count = 4000
        draws = self.check_moments(model, count)[name].reshape(count, 36)
        expected = np.zeros((36, 36))  # kernels are independent of one another
        for block in range(4):
            expected[9 * block:9 * block + 9, 9 * block:9 * block + 9] = covariance.reshape(4, 9, 9)[block]
        sd = np.sqrt(np.diag(expected))
        error = np.abs(np.cov(draws.T) - expected) / np.outer(sd, sd)
        self.assertLess(error.max(), 5 * np.sqrt(2 / count))
        with self.assertRaisesRegex(KeyError, "no Cholesky"):
            model.scale_tril("fc.weight")

    def test_multiplicative(self):
        model = self.model("mnf", more={"fc.z.base_mean.value": np.zeros(4, np.float32),
                                        "fc.z.flow0.mask.value": np.zeros(4, np.float32)})
        self.assertEqual(len(model.names), len(SMALL))
        self.assertEqual(model.std("fc.weight").shape, (3, 4))
        for call in (model.sample, model.mean_state):
            with self.assertRaisesRegex(NotImplementedError, "mnf.*normalizing flow"):
                call()

    def test_refuses(self):
        for kind, change, words in (
                ("ffg", {"drop": ["fc.bias.log_std"]}, "no tensor 'fc.bias.log_std'"),
                ("bbb", {"drop": ["fc.bias.log_std"]}, "no tensor 'fc.bias.log_std'"),
                ("cfg", {"drop": ["conv2.weight.scale_tril"]}, "no tensor 'conv2.weight.scale_tril'"),
                ("ffg", {"more": {"fc.bias.log_std": np.zeros(4, np.float32)}}, r"is \[4\], expected \[3\]"),
                ("ffg", {"more": {"fc.bias.mask": np.zeros(4, np.uint8)}}, r"is \[4\], expected \[3\]"),
                ("cfg", {"more": {"conv1.weight.scale_tril": np.zeros((2, 3, 9), np.float32)}}, r"expected \[2, 3, 10"),
                ("ft", {"shapes": {}, "more": {"x": np.zeros(1)}}, "holds no tensor"),
                ("ft", {"format": "baton-training-2"}, "not a model of Baton"),
                ("ft", {"history": "[{"}, "'history' is not JSON")):
            with self.subTest(words=words), self.assertRaisesRegex(baton_files.FileError, words):
                self.model(kind, **change)
        whole = self.path.read_bytes()
        for cut in (0, 7, 100, len(whole) - 1):
            self.path.write_bytes(whole[:cut])
            with self.assertRaisesRegex(baton_files.FileError, "model.safetensors"):
                baton_files.load_model(self.path)
        with self.assertRaisesRegex(baton_files.FileError, "No such file"):
            baton_files.load_model(self.folder / "none")


FIGURES = ("entropy", "mutual_information", "aleatoric_entropy", "aleatoric_variance", "epistemic_variance")


class Predictions(Files):
    """Files as `baton predict` writes them, of twelve classes whose names are no help: each is another's number."""

    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(2)
        p = rng.dirichlet(np.ones(12), 5).astype(np.float32)
        chosen = p.argmax(1)
        self.columns = {"index": np.arange(5), "name": np.array(['0"0', "01", "a,b", "x\ny", "cat/\u00e9.png"]),
                        "label": np.array([3, 1, 0, 2, 11]), "prediction": chosen, "probability": p,
                        "predicted_class": np.array([str(11 - c) for c in chosen])}
        self.columns.update((name, rng.random(5).astype(np.float32)) for name in FIGURES)

    def rows(self, without=()):
        """Header and rows of the .csv."""
        names = [name for name in ("index", "name", "label", "predicted_class") if name not in without]
        header = [*names, *(f"p{c}" for c in range(12)), *FIGURES]
        header[header.index("predicted_class")] = "prediction"
        return [header] + [[*(str(self.columns[name][i]) for name in names),
                            *(f"{x:.9g}" for x in self.columns["probability"][i]),
                            *(f"{self.columns[name][i]:.9g}" for name in FIGURES)] for i in range(5)]

    def check(self, file, without=()):
        found = baton_files.read_predictions(self.folder / file)
        self.assertEqual(sorted(found), sorted(set(self.columns) - set(without)))
        for name, values in found.items():
            self.assertEqual(values.dtype.kind, self.columns[name].dtype.kind, name)
            np.testing.assert_array_equal(values, self.columns[name], name)

    def write_csv(self, rows):
        with (self.folder / "a.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

    def test_csv(self):
        self.write_csv(self.rows())
        self.check("a.csv")
        self.write_csv(self.rows(("name", "label")))
        self.check("a.csv", ("name", "label"))

    def test_json(self):
        images = []
        for i in range(5):
            image = {name: self.columns[name][i].item() for name in ("index", "name", "label", *FIGURES)}
            images.append({**image, "prediction": str(self.columns["predicted_class"][i]),
                           "probability": self.columns["probability"][i].tolist()})
        (self.folder / "a.json").write_text(json.dumps({"classes": ["0"] * 12, "samples": 3, "images": images}))
        self.check("a.json")
        del images[3]["entropy"]
        (self.folder / "a.json").write_text(json.dumps({"images": images}))
        with self.assertRaisesRegex(baton_files.FileError, "a.json: damaged.*entropy"):
            baton_files.read_predictions(self.folder / "a.json")

    def test_npz(self):
        without = ("index", "name", "predicted_class")
        arrays = {name: values for name, values in self.columns.items() if name not in without}
        np.savez(self.folder / "a.npz", **arrays)
        self.check("a.npz", without[1:])
        np.savez(self.folder / "a.npz", **{**arrays, "entropy": np.zeros(6)})
        with self.assertRaisesRegex(baton_files.FileError, r"'entropy' is \[6\], for 5 images"):
            baton_files.read_predictions(self.folder / "a.npz")

    def test_refuses(self):
        self.write_csv(self.rows())
        text = (self.folder / "a.csv").read_text()
        for file, content in (("a.csv", ""), ("a.csv", text[:-40]), ("a.csv", text.replace(",p0,", ",q0,")),
                              ("a.csv", text.replace(",prediction,", ",class,")), ("a.csv", "index,entropy\n0,1\n"),
                              ("a.json", "[1]"), ("a.json", "{}"), ("a.json", "["), ("a.json", '{"images": []}'),
                              ("a.json", '{"images": [{"probability": 1, "prediction": "x"}]}'),
                              ("a.npz", "PK"), ("a.npz", ""), ("a.txt", "")):
            with self.subTest(file=file, content=content[:20]):
                (self.folder / file).write_text(content)
                with self.assertRaisesRegex(baton_files.FileError, "a."):
                    baton_files.read_predictions(self.folder / file)
        with self.assertRaisesRegex(baton_files.FileError, "No such file"):
            baton_files.read_predictions(self.folder / "none.csv")


if __name__ == "__main__":
    unittest.main(verbosity=2)  # a skipped test says why
