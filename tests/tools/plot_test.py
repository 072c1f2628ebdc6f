#!/usr/bin/env python3
"""Tests tools/plot: which files it writes, what the figure says, and what it refuses."""
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

PLOT = pathlib.Path(__file__).resolve().parents[2] / "tools" / "plot"


def run(method, parts, seed, accuracies, **more):
    stages = [{"stage": i + 1, "test_accuracy": accuracy} for i, accuracy in enumerate(accuracies)]
    return {"method": method, "parts": parts, "seed": seed, "settings": {}, "stages": stages,
            "final_test_accuracy": accuracies[-1], **more}


def result(generated=False, runs=None):
    if runs is None:
        runs = []
        for seed in range(3):
            rise = [0.97 + 0.002 * t + 0.001 * seed for t in range(10)]
            runs += [run("ft", 10, seed, rise), run("ffg", 10, seed, [a + 0.001 for a in rise]),
                     run("ft", 1, seed, [0.993]), run("ffg", 1, seed, [0.992])]
    return {"experiment": "bil_mnist", "preset": "quick", "device": "cpu", "settings": {}, "runs": runs,
            "dataset": {"name": "mnist", "source": "somewhere", "generated": generated, "train": 60000, "test": 10000}}


class Plot(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def plot(self, content, *options):
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (self.folder / "result.json").write_text(text)
        return subprocess.run([sys.executable, str(PLOT), str(self.folder), *options],
                              capture_output=True, text=True, stdin=subprocess.DEVNULL)

    def svg(self, content):
        done = self.plot(content, "--out", str(self.folder / "figure.svg"))
        self.assertEqual(done.returncode, 0, done.stderr)
        return (self.folder / "figure.svg").read_text()

    def test_writes_png_and_svg_and_names_them(self):
        done = self.plot(result())
        self.assertEqual(done.returncode, 0, done.stderr)
        png, svg = self.folder / "bil_mnist.png", self.folder / "bil_mnist.svg"
        self.assertEqual(png.read_bytes()[:8], b"\x89PNG\r\n\x1a\n")
        self.assertIn("<svg", svg.read_text())
        self.assertEqual(done.stdout, f"Plot: {png}\nPlot: {svg}\n")
        self.assertEqual(sorted(p.name for p in self.folder.iterdir()), ["bil_mnist.png", "bil_mnist.svg", "result.json"])

    def test_names_methods_with_the_mean_of_the_last_part(self):
        svg = self.svg(result())
        self.assertIn("FT, T = 10:  98.90", svg)  # 97 + 1.8 + the mean of 0, 0.1 and 0.2
        self.assertIn("FFG, T = 1:  99.20", svg)
        self.assertIn("Learning MNIST part by part", svg)
        self.assertIn("preset quick", svg)
        self.assertIn("seeds 0, 1, 2", svg)

    def test_published_values_only_beside_the_real_data_set(self):
        self.assertIn("published", self.svg(result()))
        generated = self.svg(result(generated=True))
        self.assertNotIn("published", generated)
        self.assertIn("generated digits", generated)

    def test_one_seed_converged_ft_unknown_method_and_unfinished_seed(self):
        svg = self.svg(result(runs=[run("ft_converged", 5, 0, [0.9, 0.95, 0.96, 0.97, 0.98]),
                                    run("new", 5, 0, [0.8, 0.9]), run("new", 5, 1, [0.7]),
                                    run("ffg", 1, 0, [0.99]), run("ffg", 1, 0, [0.98], label="beta 0.1")]))
        self.assertIn("FT converged, T = 5:  98.00", svg)
        self.assertIn("new, T = 5:  75.00", svg)
        self.assertIn("FFG, beta 0.1, T = 1:  98.00", svg)

    def test_only_one_part(self):
        self.assertIn("FT, T = 1:  99.00", self.svg(result(runs=[run("ft", 1, 0, [0.99])])))

    def test_the_same_result_gives_the_same_svg(self):
        self.assertEqual(self.svg(result()), self.svg(result()))

    def test_refuses_in_one_line(self):
        for content in (None, "{", "[]", json.dumps({"runs": [{}]}), result(runs=[])):
            with self.subTest(content=content):
                done = self.plot(content)
                self.assertEqual(done.returncode, 2)
                self.assertRegex(done.stderr, r"\Aplot: [^\n]+\n\Z")
                self.assertFalse(list(self.folder.glob("bil_mnist*")))


if __name__ == "__main__":
    unittest.main()
