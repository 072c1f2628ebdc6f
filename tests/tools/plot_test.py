#!/usr/bin/env python3
"""Tests tools/plot: which files it writes, what the figure says, and what it refuses."""
import itertools
import json
import pathlib
import re
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


def cifar_result(**more):
    runs = [run(method, parts, seed, [0.72 + 0.01 * (t + i) for t in range(parts)])
            for i, method in enumerate(("ft", "ft_converged", "ffg", "cfg", "mnf"))
            for parts in (1, 10) for seed in (0, 1)]
    return {**result(runs=runs), "experiment": "bil_cifar10",
            "dataset": {"name": "cifar10", "source": "here", "generated": False, "train": 50000, "test": 10000, **more}}


FIVE_FIVE = ["ft", "ft_pretrained", "ffg", "ffg_grid", "ffg_laplace"]


def five_five_result(methods=FIVE_FIVE, parts=10, old_images=25000, **more):
    runs = [run(method, parts, 0, [0.75 + 0.01 * t + 0.003 * i for t in range(parts)])
            for i, method in enumerate(methods)]
    return {**result(runs=runs), "experiment": "bil_cifar5p5",
            "settings": {"old_classes": [0, 2, 3, 6, 9], "new_classes": [1, 4, 5, 7, 8], "old_images": old_images},
            "dataset": {"name": "cifar10", "source": "here", "generated": False, "train": 25000, "test": 5000, **more}}


def marks(svg):
    """How many published marks the figure has: markers are hollow there, and nowhere else."""
    return len(re.findall(r"<use [^>]*fill-opacity: 0[;\"]", svg))


def line_names(svg):
    """{name of a line: height on the page}."""
    names = re.findall(r'<text [^>]*y="(\S+)"[^>]*>([^<]+, T = \d+:[^<]*)</text>', svg)
    return {text: float(y) for y, text in names}


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
        self.assertEqual(sorted(p.name for p in self.folder.iterdir()),
                         ["bil_mnist.png", "bil_mnist.svg", "result.json"])

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

    def test_cifar10(self):
        svg = self.svg(cifar_result())
        self.assertIn("Learning CIFAR-10 part by part", svg)
        self.assertIn("MNF, T = 10:  85.00", svg)
        self.assertEqual(marks(svg), 3 * (10 + 1))  # FT, FFG and MNF at T = 10 and T = 1; CFG was not published
        self.assertIn("(not CIFAR-10)", self.svg(cifar_result(generated=True)))

    def test_five_plus_five(self):
        svg = self.svg(five_five_result())
        self.assertIn("Learning CIFAR(5+5) part by part", svg)
        self.assertIn("Learned: automobile, deer, dog, horse, ship", svg)
        self.assertIn("Pretrained on: airplane, bird, cat, frog, truck", svg)
        self.assertIn("FFG, Laplace prior, T = 10:  85.20", svg)
        self.assertIn("FT, pretrained, T = 10", svg)
        self.assertEqual(marks(svg), 5 * 10)
        self.assertEqual(marks(self.svg(five_five_result(["ft", "mnf_grid"]))), 10)
        self.assertEqual(marks(self.svg(five_five_result(parts=5))), 0)  # published for ten parts
        generated = self.svg(five_five_result(generated=True))
        self.assertEqual(marks(generated), 0)
        self.assertIn("generated images (not CIFAR(5+5))", generated)
        self.assertIn("Learned: 1, 4, 5, 7, 8", generated)  # not what CIFAR-10 calls them

    def test_a_subset_has_no_published_marks_and_says_so(self):
        mnist = result()
        mnist["dataset"]["train"] = 10000
        for content, words in ((mnist, "10,000 of 60,000 training images"),
                               (cifar_result(train=5000), "5,000 of 50,000 training images"),
                               (five_five_result(train=4000), "4,000 of 25,000 training images"),
                               (five_five_result(old_images=10000), "10,000 of 25,000 images of the old classes")):
            with self.subTest(words=words):
                svg = self.svg(content)
                self.assertEqual(marks(svg), 0)
                self.assertNotIn("diamonds", svg)
                self.assertIn("Of a subset: " + words, svg)
        self.assertNotIn("Of a subset", self.svg(cifar_result()))

    def test_names_at_the_ends_of_lines_do_not_overlap(self):
        methods = FIVE_FIVE + ["cfg", "cfg_grid", "cfg_laplace", "mnf", "mnf_grid", "mnf_laplace"]
        content = five_five_result(methods)
        for r in content["runs"]:
            r["stages"][-1]["test_accuracy"] = 0.87  # all at one place
        content["runs"] += [run(method, 1, 0, [0.9]) for method in methods]
        for content, count in ((content, 22), (cifar_result(), 10)):
            svg = self.svg(content)
            heights = sorted(line_names(svg).values())
            self.assertEqual(len(heights), count)
            self.assertGreater(min(b - a for a, b in itertools.pairwise(heights)), 12)  # points, of a font of 9.5
            whole = float(re.search(r'viewBox="0 0 \S+ (\S+)"', svg)[1])
            self.assertTrue(10 < heights[0] and heights[-1] < whole - 60, heights)  # above the caption

    def test_colours_of_methods_can_be_told_apart(self):
        colours = {name: tuple(int(colour[i:i + 2], 16) for i in (1, 3, 5)) for name, colour in
                   re.findall(r'"(\w+)": \("[^"]+", "(#\w{6})", "\S"\)', PLOT.read_text())}
        self.assertGreaterEqual(len(colours), 12)
        for (a, one), (b, other) in itertools.combinations(colours.items(), 2):
            self.assertGreater(sum(abs(x - y) for x, y in zip(one, other)), 50, (a, b))

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
