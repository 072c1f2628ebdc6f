#!/usr/bin/env python3
"""Tests tools/plot: which files it writes, what the figure says, and what it refuses."""
import contextlib
import itertools
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import tempfile
import traceback
import unittest

try:
    import matplotlib  # noqa: F401
except ImportError:  # as tools/plot does
    if sys.executable != "/usr/bin/python3" and os.access("/usr/bin/python3", os.X_OK):
        os.execv("/usr/bin/python3", ["/usr/bin/python3", *sys.argv])
    sys.exit("plot_test: needs matplotlib; tools/setup installs it")

PLOT = pathlib.Path(__file__).resolve().parents[2] / "tools" / "plot"
COMMON = PLOT.parent / "plot_forms" / "common.py"


sys.path.insert(0, str(PLOT.parent))
plot = runpy.run_path(str(PLOT))  # what tools/plot defines
from plot_forms import evaluation, laplace  # noqa: E402


def in_a_process(work):
    """Calls work() in a process of its own, which has matplotlib already: that takes long to load."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = os.fork()
        if process == 0:
            status = 1
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
                    status = work()
            except SystemExit as end:
                status = end.code
            except BaseException:
                traceback.print_exc(file=errors)
            finally:
                out.flush(), errors.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        out.seek(0), errors.seek(0)
        return subprocess.CompletedProcess(PLOT, status, out.read(), errors.read())


def run_plot(*arguments):
    sys.argv = [str(PLOT), *map(str, arguments)]
    return plot["main"]()


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


class PlotCase(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def plot(self, content, *options, alone=False):
        """alone: the tool itself, as a user calls it."""
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (self.folder / "result.json").write_text(text)
        if alone:
            return subprocess.run([sys.executable, str(PLOT), str(self.folder), *options],
                                  capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return in_a_process(lambda: run_plot(self.folder, *options))

    def assert_refused(self, contents):
        """Each in one line, with exit status 2, and no file."""
        for i, content in enumerate(contents):
            with self.subTest(content=i):
                done = self.plot(content)
                self.assertEqual(done.returncode, 2, done.stderr)
                self.assertRegex(done.stderr, r"\Aplot: [^\n]+\n\Z")
                self.assertEqual([p.name for p in self.folder.iterdir()], ["result.json"])

    def svg(self, content):
        done = self.plot(content, "--out", str(self.folder / "figure.svg"))
        self.assertEqual(done.returncode, 0, done.stderr)
        return (self.folder / "figure.svg").read_text()


class Plot(PlotCase):
    def test_writes_png_and_svg_and_names_them(self):
        done = self.plot(result(), alone=True)
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
                   re.findall(r'"(\w+)": \("[^"]+", "(#\w{6})", "\S"\)', COMMON.read_text())}
        self.assertGreaterEqual(len(colours), 21)
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


def bgd_run(method, label, seed, stages, **more):
    """stages: (stage, epoch, accuracies on the tasks so far)."""
    listed = []
    for stage, epoch, by_task in stages:
        mean = sum(by_task) / len(by_task)
        ways = {"map": mean - 0.01, "sampled": mean, "softmax": mean + 0.02, "committee": mean + 0.01}
        listed.append({"stage": stage, "epoch": epoch, "test_accuracy": mean, "by_inference": ways, "by_task": by_task})
    return {"method": method, "label": label, "parts": 1, "seed": seed, "settings": {}, "stages": listed,
            "inference": "sampled", "final_test_accuracy": sum(stages[-1][2]) / len(stages[-1][2]), **more}


def bgd_result(experiment, name, train, runs, test=10000, generated=False):
    return {"experiment": experiment, "preset": "quick", "device": "cpu", "settings": {}, "runs": runs,
            "dataset": {"name": name, "source": "here", "generated": generated, "train": train, "test": test}}


def pruning(*rows):
    return {"error": 0.02, "weights": 100, "results": [
        {"ranking": ranking, "fraction": fraction, "error": 0.02 * ratio, "error_ratio": ratio}
        for ranking, fraction, ratio in rows]}


def pruned_of(method, pruned):
    """A point estimate has no signal-to-noise ratio."""
    return {"pruning": {**pruned, "results": [row for row in pruned["results"]
                                              if method != "sgd" or row["ranking"] == "magnitude"]}} if pruned else {}


RATIOS = pruning(("magnitude", 0.9, 3.0), ("magnitude", 0.95, 4.5), ("signal-to-noise", 0.9, 1.25),
                 ("signal-to-noise", 0.95, 1.5))


def bgd_mnist_result(widths=(400,), methods=("bgd", "sgd"), train=50000, pruned=None, settings=(), **more):
    runs = []
    for width in widths:
        for i, method in enumerate(methods):
            for seed in (0, 1):
                stages = [(1, e, [0.9 + 0.01 * e + 0.001 * seed - 0.002 * i]) for e in range(1, 9)]
                run = bgd_run(method, f"{method.upper()} 2x{width}", seed, stages,
                              settings={"width": width, **dict(settings)})
                runs.append({**run, **pruned_of(method, pruned)})
    return bgd_result("bgd_mnist", "mnist", train, runs, **more)


def permuted_result(methods=("bgd", "si"), tasks=10, width=2000, train=60000, **more):
    runs = []
    for i, method in enumerate(methods):
        continuous = method.endswith("continuous")
        stages = []
        for t in range(1, tasks + 1):
            if continuous:
                stages.append((1, t, [0.95] * t + [0.15] * (tasks - t)))
            else:
                stages += [(t, 1, [0.5] * t), (t, 2, [0.99 - 0.01 * i - 0.01 * (t - k) for k in range(1, t + 1)])]
        runs.append(bgd_run(method, method.upper().replace("_", ", "), 0, stages,
                            settings={"width": width, "tasks": tasks, "continuous": continuous}))
    return bgd_result("bgd_permuted_mnist", "mnist", train, runs, **more)


SIGMAS = [{"initial": 0.015, "smallest": 0.011, "median": 0.0149, "largest": 0.0312, "edges": [0.01, 0.014, 0.016],
           "counts": [5, 90]},
          {"initial": 0.015, "smallest": 0.014, "median": 0.0149, "largest": 0.0444,
           "edges": [0.014, 0.016, 0.03, 0.05], "counts": [90, 0, 5]}]


def bgd_cifar10_result(pruned=RATIOS, sigmas=SIGMAS, train=50000, **more):
    stages = [(1, e, [0.2 + 0.05 * e]) for e in range(1, 13)]
    runs = [{**bgd_run("bgd", "BGD", seed, stages), **({"sigma": sigmas[seed]} if sigmas else {})} for seed in (0, 1)]
    runs.append(bgd_run("sgd", "SGD", 0, stages))
    for run in runs:
        run.update(pruned_of(run["method"], pruned))
    return bgd_result("bgd_cifar10", "cifar10", train, runs, **more)


def cifar_tasks_result(methods=("bgd", "sgd", "si"), tasks=6, name="cifar10+cifar100", train=75000, **more):
    names = [f"classes {10 * t} to {10 * t + 9}" for t in range(tasks)]
    runs = [bgd_run(method, method.upper(), seed, [(1, 5, [0.8])] + [
        (tasks, 5, [0.6 + 0.02 * t + 0.01 * i + 0.002 * seed for t in range(tasks)])], settings={"tasks": names})
        for i, method in enumerate(methods) for seed in (0, 1)]
    return bgd_result("bgd_cifar_tasks", name, train, runs, **{"test": 15000, **more})


def texts(svg):
    """[(text, x, y)] of the texts that stand at a place of their own."""
    return [(text, float(x), float(y)) for x, y, text in
            re.findall(r'<text [^>]*x="(\S+)" y="(\S+)"[^>]*>([^<]+)</text>', svg)]


class PlotBgd(PlotCase):
    def test_writes_files_named_after_the_experiment(self):
        for content in (bgd_mnist_result(), permuted_result(), bgd_cifar10_result(), cifar_tasks_result()):
            name = content["experiment"]
            done = self.plot(content)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(done.stdout, f"Plot: {self.folder / name}.png\nPlot: {self.folder / name}.svg\n")
            self.assertIn("preset quick", (self.folder / f"{name}.svg").read_text())

    def test_titles_say_generated(self):
        for content, words in ((bgd_mnist_result(generated=True), "generated digits (not MNIST)"),
                               (permuted_result(generated=True), "Permuted generated digits (not MNIST)"),
                               (bgd_cifar10_result(generated=True), "generated images (not CIFAR-10)"),
                               (cifar_tasks_result(generated=True), "Generated images (not CIFAR-10 and CIFAR-100)")):
            with self.subTest(words=words):
                svg = self.svg(content)
                self.assertIn(words, svg)
                self.assertEqual(marks(svg), 0)
                self.assertNotIn("diamonds", svg)

    def test_mnist_names_labels_with_their_last_error(self):
        svg = self.svg(bgd_mnist_result(widths=(400, 800)))
        for words in ("BGD 2x400:  1.95", "SGD 2x800:  2.15", "Bayesian gradient descent on MNIST, preset quick",
                      "Mean over seeds 0, 1; band: least to greatest.", "test error, %"):
            self.assertIn(words, svg)
        self.assertNotIn("weights pruned", svg)
        colours = dict(re.findall(r'<text style="fill: (#\w+)[^>]*>(\w+ 2x\d+):', svg))
        self.assertEqual(len(colours), 4)

    def test_mnist_pruning(self):
        svg = self.svg(bgd_mnist_result(pruned=RATIOS))
        self.assertIn("BGD 2x400, |µ|:  4.50", svg)
        self.assertIn("BGD 2x400, |µ|/σ:  1.50", svg)
        self.assertIn("weights pruned, %", svg)
        everything = pruning(("magnitude", 0.0, 1.0), ("magnitude", 0.5, 1.1), ("magnitude", 1.0, 45.0))
        self.assertIn("SGD 2x400, |µ|:  45.00", self.svg(bgd_mnist_result(pruned=everything)))

    def test_mnist_published_values(self):
        for content, count in ((bgd_mnist_result(), 2), (bgd_mnist_result(widths=(400, 800, 1200)), 6),
                               (bgd_mnist_result(widths=(300,)), 0), (bgd_mnist_result(methods=("bbb",)), 1),
                               (bgd_mnist_result(methods=("bbb",), settings={"prior": {"mixture": 0.5}}), 0),
                               (bgd_mnist_result(methods=("bbb_mixture",)), 0), (bgd_mnist_result(train=10000), 0),
                               (bgd_mnist_result(train=60000), 0), (bgd_mnist_result(test=1000), 0),
                               (bgd_mnist_result(pruned=RATIOS), 2),
                               (bgd_mnist_result(widths=(1200,), pruned=RATIOS), 4)):
            svg = self.svg(content)
            self.assertEqual(marks(svg), count)
            self.assertEqual("Faint diamonds" in svg, count > 0)
        self.assertIn("10,000 and judged on 10,000 images, not 50,000", self.svg(bgd_mnist_result(train=10000)))

    def test_mnist_an_error_of_zero(self):
        content = bgd_mnist_result(pruned=pruning(("magnitude", 0.5, 0.0), ("magnitude", 0.9, 2.0)))
        for run in content["runs"]:
            run["stages"][-1]["test_accuracy"] = 1
        self.assertIn("BGD 2x400:  0.00", self.svg(content))

    def test_names_at_the_ends_of_lines_do_not_overlap(self):
        content = bgd_mnist_result(widths=(400, 800, 1200), methods=("bgd", "sgd", "bbb"), pruned=RATIOS)
        columns = {}
        for text, x, y in texts(self.svg(content)):
            if re.search(r"2x\d+.*:  ", text):
                columns.setdefault(x, []).append(y)
        self.assertEqual(sorted(map(len, columns.values())), [9, 15])
        for heights in columns.values():
            self.assertGreater(min(b - a for a, b in itertools.pairwise(sorted(heights))), 12)

    def test_permuted_is_the_mean_over_the_tasks_at_their_ends(self):
        svg = self.svg(permuted_result())
        self.assertIn("Permuted MNIST, preset quick", svg)
        self.assertIn("10 tasks, hidden layers of 2,000 units", svg)
        self.assertIn("BGD:  94.50", svg)  # 0.99 - the mean of 0 to 0.09
        self.assertIn("SI:  93.50", svg)
        self.assertNotIn("no task borders", svg)

    def test_permuted_continuous_runs_are_over_all_tasks(self):
        content = permuted_result(("bgd", "bgd_continuous"), tasks=4)
        svg = self.svg(content)
        self.assertIn("BGD, CONTINUOUS:  95.00", svg)
        self.assertIn("no task borders: average over all tasks", svg)
        self.assertIn("share of the training", svg)
        self.assertIn("stroke-dasharray", svg)
        self.assertNotIn("stroke-dasharray", self.svg(permuted_result(tasks=4)))

    def test_permuted_reference_values(self):
        for content, count in ((permuted_result(), 10), (permuted_result(("bgd",), tasks=5), 5),
                               (permuted_result(width=200), 0), (permuted_result(train=6000), 0)):
            self.assertEqual(marks(self.svg(content)), count)

    def test_cifar10_ways_of_predicting_sigma_and_pruning(self):
        svg = self.svg(bgd_cifar10_result())
        for words in ("BGD, MAP:  79.00", "BGD, sampled:  80.00", "BGD, committee:  81.00", "BGD, mean softmax:  82.00",
                      "SGD:  80.00", "σ: initial 0.015, median 0.0149, largest 0.0444", "BGD, |µ|/σ:  1.50",
                      "share of the parameters, %", "table 3"):
            self.assertIn(words, svg)
        self.assertEqual(marks(svg), 2)
        self.assertEqual(marks(self.svg(bgd_cifar10_result(train=1000))), 0)

    def test_cifar10_adds_up_the_histograms_of_seeds(self):
        both = {**SIGMAS[1], "edges": [0.01, 0.014, 0.016, 0.03, 0.05], "counts": [5, 180, 0, 5]}
        self.assertEqual(self.svg(bgd_cifar10_result()), self.svg(bgd_cifar10_result(sigmas=[both, both])))

    def test_cifar10_leaves_out_panels_without_data(self):
        svg = self.svg(bgd_cifar10_result(pruned=None))
        self.assertIn("share of the parameters, %", svg)
        self.assertNotIn("weights pruned, %", svg)
        svg = self.svg(bgd_cifar10_result(sigmas=None))
        self.assertNotIn("share of the parameters, %", svg)
        self.assertIn("weights pruned, %", svg)
        svg = self.svg(bgd_cifar10_result(pruned=None, sigmas=None))
        self.assertIn("BGD, MAP:  79.00", svg)
        self.assertNotIn("share of the parameters, %", svg)

    def test_cifar_tasks_bars(self):
        svg = self.svg(cifar_tasks_result())
        shown = re.findall(r">(\d\d\.\d)</text>", svg)
        want = [f"{60.1 + 2 * t + i:.1f}" for i in range(3) for t in (0, 1, 2, 3, 4, 5, 2.5)]
        self.assertEqual(sorted(shown), sorted(want))
        for words in ("task 6", ">mean<", "classes 50", "CIFAR-10 and five parts of CIFAR-100", "thin lines: least"):
            self.assertIn(words, svg)
        self.assertEqual(marks(svg), 7)
        self.assertEqual(marks(self.svg(cifar_tasks_result(("bgd",)))), 7)
        for content in (cifar_tasks_result(name="cifar10"), cifar_tasks_result(train=6000),
                        cifar_tasks_result(tasks=5)):
            self.assertEqual(marks(self.svg(content)), 0)

    def test_a_run_without_stages_and_an_unknown_method(self):
        for content in (bgd_mnist_result(methods=("bgd", "new")), permuted_result(("bgd", "new")),
                        cifar_tasks_result(("bgd", "new"))):
            content["runs"][0]["stages"] = []
            self.assertIn("NEW", self.svg(content))

    def test_the_same_result_gives_the_same_svg(self):
        self.assertEqual(self.svg(bgd_cifar10_result()), self.svg(bgd_cifar10_result()))

    def test_refuses_in_one_line(self):
        contents = []
        for content in (bgd_mnist_result(), permuted_result(), bgd_cifar10_result(), cifar_tasks_result()):
            contents += [{**content, "runs": []}, {**content, "runs": [{}]}, {**content, "dataset": {}}]
        contents.append(bgd_cifar10_result(sigmas=[{**SIGMAS[0], "edges": [0.01]}, SIGMAS[1]]))
        for content in contents:
            with self.subTest(content=str(content)[:200]):
                done = self.plot(content)
                self.assertEqual(done.returncode, 2)
                self.assertRegex(done.stderr, r"\Aplot: [^\n]+\n\Z")


def moments(mean, sd=0.001, n=10):
    return {"mean": mean, "sd": sd, "n": n}


def laplace_updates(name="pixels", taus=(1.0, 0.1), bases=(10, 100, 1000), news=(1, 10, 50)):
    lines = []
    for tau, base, new in itertools.product(taus, bases, news):
        for i, method in enumerate(("base", "first_order", "monte_carlo", "gaussian", "implicit", "one_by_one",
                                    "lbfgs_warm", "newton_warm", "retrained", "adam")):
            line = {"set": name, "tau": tau, "base": base, "new": new, "method": method, "label": method,
                    "gain": moments(1e-4 * i * new * tau + 1e-6 * base if i else 0)}
            if i:
                seconds = 1e-5 * base / 1000 * 3 ** i
                line["seconds"] = {"median": seconds, "least": 0.9 * seconds, "greatest": 1.2 * seconds}
            lines.append(line)
    return lines


def laplace_active(name="pixels", acquisitions=("margin", "entropy", "bald", "badge", "bait"), seeds=(0, 1, 2),
                   gains=(0.01, 0.02, 0.03)):
    """gains: of updating between the picks, by seed, twice as large at the end as in the middle."""
    ways = [(a, mode) for a in acquisitions for mode in ("top", "sequential")]
    return [{"set": name, "acquisition": acquisition, "mode": mode, "label": acquisition, "labelled": [20, 30, 40],
             "seeds": list(seeds), "selection_seconds": 0.2,
             "accuracy": [[0.7, 0.8 + gain * sequential * 2 / 3, 0.9 + 0.001 * seed + gain * sequential * 4 / 3]
                          for seed, gain in zip(seeds, gains)]}
            for acquisition, mode in ways + [("random", "random"), ("look_ahead", "look_ahead")]
            for sequential in [mode == "sequential"]]


def laplace_result(updates=None, active=None, sets=(("pixels", "MNIST, pixels"),), generated=False):
    return {"experiment": "laplace_update", "preset": "quick", "settings": {},
            "sets": [{"name": name, "title": title, "dim": 785, "classes": 10, "generated": generated}
                     for name, title in sets],
            "updates": laplace_updates() if updates is None else updates,
            "active": laplace_active() if active is None else active}


class PlotLaplace(PlotCase):
    PANELS = {"gain in accuracy, points", "seconds an update", "test accuracy, %", "sequential − top-b, points"}

    def test_writes_files_and_names_everything(self):
        done = self.plot(laplace_result())
        self.assertEqual(done.returncode, 0, done.stderr)
        files = [self.folder / f"laplace_update{suffix}" for suffix in (".png", ".svg")]
        self.assertEqual(done.stdout, "".join(f"Plot: {file}\n" for file in files))
        svg = files[1].read_text()
        for words in ("Closed-form updates of a Bayesian last layer, preset quick", "MNIST, pixels",
                      "785 features, 10 classes", "100 base samples, prior precision 1",
                      "1,000 base samples, prior precision 1", "means over 10 seeds", "means over 3 seeds",
                      *self.PANELS, "implicit:  +2.01", "first-order:  +0.51", "retrained:  +4.01",
                      "first-order:  30 µs", "implicit:  810 µs", "Newton, warm:  22 ms", "Adam:  197 ms",
                      "margin:  92.77", "random:  90.10", "look-ahead:  90.10"):
            self.assertIn(words, svg)
        self.assertNotIn("GENERATED", svg)
        self.assertEqual(svg, self.svg(laplace_result(  # the order of the lines says nothing, but for the first tau
            updates=laplace_updates()[::-1][90:] + laplace_updates(taus=(0.1,)))))

    def test_intervals(self):
        """Against numbers by hand: t = 12.706, 4.303, 2.262, 2.042 and 2.000 with 1, 2, 9, 30 and 60 degrees of
        freedom."""
        content = laplace_result()
        column, = laplace.read(content)
        implicit, = (c for c in column.gains if c.name == "implicit")
        margin, = (c for c in column.pairs if c.name == "margin")
        for n, expected in ((2, 8.9845), (3, 2.4843), (10, 0.7153), (31, 0.36675), (61, 0.2561)):
            self.assertAlmostEqual(laplace.half_width(1, n), expected, delta=2e-4)
        _, _, x, mean, low, high, seeds, _ = implicit
        self.assertEqual((x, seeds), ([1, 10, 50], 10))
        self.assertAlmostEqual(mean[2], 2.01)
        self.assertAlmostEqual(low[2], 2.01 - 0.07153, delta=1e-5)  # sd 0.1 points
        self.assertAlmostEqual(high[2], 2.01 + 0.07153, delta=1e-5)
        _, _, x, mean, low, high, seeds, whole = margin
        self.assertEqual((x, seeds), ([20, 30, 40], 3))
        for values, expected in ((mean, (0, 1.3333, 2.6667)), (low, (0, -0.3229, -0.6457)), (high, (0, 2.9895, 5.9791)),
                                 (whole, (2, 2.4843))):
            self.assertEqual(len(values), len(expected))
            for value, wanted in zip(values, expected):
                self.assertAlmostEqual(value, wanted, delta=2e-4)
        self.assertIn("margin:  +2.00 ± 2.48", self.svg({**content, "updates": []}))

    def test_leaves_out_what_is_missing(self):
        sets = (("pixels", "MNIST, pixels"), ("lenet5", "MNIST, LeNet-5 features"), ("fourier", "random features"))
        only_top = [line for line in laplace_active() if line["mode"] != "sequential"]
        for content, left_out in (
                (laplace_result(updates=[], generated=True), {"gain in accuracy, points", "seconds an update"}),
                (laplace_result(active=[]), {"test accuracy, %", "sequential − top-b, points"}),
                (laplace_result(laplace_updates("lenet5"), only_top, sets), {"sequential − top-b, points"})):
            svg = self.svg(content)
            self.assertEqual({words for words in self.PANELS if words not in svg}, left_out)
            self.assertEqual("GENERATED data (not MNIST, pixels)" in svg, content["sets"][0]["generated"])
            self.assertEqual("MNIST, LeNet-5 features" in svg, len(content["sets"]) == 3)
            self.assertNotIn("random features", svg)

    def test_one_seed_a_failed_method_and_names_that_do_not_overlap(self):
        updates = laplace_updates(bases=(100,), news=(8,))
        for line in updates:
            line["gain"] = {"mean": 0.01 if line["method"] != "monte_carlo" else -0.6, "sd": None, "n": 1}
            if "seconds" in line:
                line["seconds"] = {"median": 1e-3, "least": 1e-3, "greatest": 1e-3}
        svg = self.svg(laplace_result(updates, laplace_active(seeds=(4,))))
        self.assertNotIn("±", svg)
        columns = {}
        for text, x, y in texts(svg):
            if ":  " in text:
                columns.setdefault(x, []).append(y)
        heights = sorted(*columns.values())
        self.assertEqual(len(heights), 6 + 8 + 7 + 5)
        self.assertGreater(min(b - a for a, b in itertools.pairwise(heights)), 11)  # points, of a font of 8.5
        self.assertIn("Monte Carlo:  −60.00", svg)
        self.assertIn("gain in accuracy", svg)
        self.assertNotIn("−40", svg)  # no axis down to it

    def test_refuses_in_one_line(self):
        def broken(part, line, **more):
            content = laplace_result(laplace_updates(news=(1,)))
            content[part][line].update(more)
            return content
        contents = [{**laplace_result(), "updates": [], "active": []}, {**laplace_result(), "sets": None},
                    {**laplace_result(), "updates": [{}]}, broken("updates", 0, set="other"),
                    broken("updates", 2, method="first_order"), broken("updates", 11, gain=None),
                    broken("updates", 11, gain={"mean": 0.1, "sd": None, "n": 10}),
                    broken("updates", 11, gain=moments(0.1, sd=-1)), broken("updates", 11, gain=moments("much")),
                    broken("updates", 11, gain=moments(float("nan"))), broken("updates", 11, new=0),
                    broken("updates", 21, seconds={"median": 0, "least": 0, "greatest": 0}),
                    broken("active", 0, accuracy=[[0.1, 0.2]] * 3), broken("active", 0, seeds=[0, 1]),
                    broken("active", 0, seeds=[0, 0, 0]), broken("active", 1, mode="top")]
        self.assert_refused(contents)


def evaluation_result(names=("cat", "dog", "ship"), confusion=None, foreign=True, **more):
    n = len(names)
    if confusion is None:
        confusion = [[87 if i == j else 13 if j == (i + 1) % n else 0 for j in range(n)] for i in range(n)]
    images = sum(map(sum, confusion))
    correct = sum(confusion[i][i] for i in range(n))
    bins = [{"low": k / 15, "high": (k + 1) / 15, "images": 0, "confidence": None, "accuracy": None} for k in range(15)]
    for k, (count, accuracy) in {8: (4, 0.5), 11: (20, 0.8), 14: (images - 24, 0.97)}.items():
        bins[k] |= {"images": count, "confidence": (k + 0.5) / 15, "accuracy": accuracy}
    found = {"experiment": "baton_evaluate", "samples": 100, "seed": 0, "class_names": list(names),
             "model": {"architecture": f"lenet5, 28 x 28 grey images, {n} classes", "family": "ffg", "stages": 2,
                       "fingerprint": "00c0ffee00c0ffee"},
             "data": {"format": "IDX", "images": images, "labelled": True, "hash": "0"},
             "accuracy": {"images": images, "correct": correct, "accuracy": correct / images, "low": 0.86,
                          "high": 0.93},
             "nll": 0.3456, "brier": 0.1234, "ece": 0.0432, "confusion": confusion, "reliability": bins,
             "entropy_histogram": {"edges": [0, 0.25, 0.5, 0.75, 1], "known": [images - 30, 20, 10, 0]}}
    if foreign:
        found["entropy_histogram"]["foreign"] = [10, 20, 30, 140]
        found["foreign"] = {"format": "IDX", "images": 200, "mean_entropy": 0.8,
                            "scores": [{"score": "mutual information", "auroc": 0.7, "fpr95": 0.6},
                                       {"score": "entropy", "auroc": 0.9876, "fpr95": 0.1}]}
    return found | more


class PlotEvaluation(PlotCase):
    def test_writes_files_and_says_everything(self):
        done = self.plot(evaluation_result())
        self.assertEqual(done.returncode, 0, done.stderr)
        files = [self.folder / f"baton_evaluate{suffix}" for suffix in (".png", ".svg")]
        self.assertEqual(done.stdout, "".join(f"Plot: {file}\n" for file in files))
        svg = files[1].read_text()
        for words in ("Evaluation of lenet5, 28 x 28 grey images, 3 classes", "300 labelled images",
                      "accuracy 87.00 % (95 %: 86.00 to 93.00)", "NLL 0.3456 nats", "Brier score 0.1234",
                      "ffg, 2 stages learned; average over 100 draws of the weights", "calibration error (ECE) 0.0432",
                      "Confusions, in images", "AUROC 0.9876", "200 foreign images", "known images"):
            self.assertIn(words, svg)
        self.assertEqual(svg, self.svg(evaluation_result()))
        cells = [text for text, x, y in texts(svg) if text in ("87", "13")]
        self.assertEqual(sorted(cells), ["13"] * 3 + ["87"] * 3)
        self.assertEqual(len([text for text, *_ in texts(svg) if text in ("cat", "dog", "ship")]), 6)

    def test_without_foreign_images_at_the_mean_and_without_errors(self):
        svg = self.svg(evaluation_result(foreign=False, samples=0, confusion=[[5, 0, 0], [0, 90, 0], [0, 0, 0]]))
        self.assertIn("one pass with the mean of the weights", svg)
        for words in ("foreign", "AUROC", "% of the true class"):
            self.assertNotIn(words, svg)

    def test_names_of_classes(self):
        names = ["$a_$", "b<&>", "a name that is far too long", *"defghijkl"]
        svg = self.svg(evaluation_result(names))
        for words in ("$a_$", "b&lt;&amp;&gt;", "a name that is…"[:13]):
            self.assertIn(words, svg)
        self.assertNotIn("far too long", svg)
        self.assertIn("in images", svg)
        many = self.svg(evaluation_result([f"n{i:03}" for i in range(13)]))
        self.assertNotIn("in images", many)  # a colour alone
        self.assertNotIn("87", [text for text, *_ in texts(many)])
        for count, named in ((40, 40), (41, 14), (256, 16)):
            svg = self.svg(evaluation_result([f"n{i:03}" for i in range(count)]))
            self.assertEqual(len(re.findall(r">n\d\d\d<", svg)), 2 * named, count)

    def test_turned_names_stay_above_the_caption(self):
        for names in ([f"automobile {i}" for i in range(10)], [f"automobile {i}" for i in range(40)]):
            content = evaluation_result(names)
            figure = evaluation.draw(content, evaluation.read(content))
            figure.canvas.draw()
            self.assertGreater(figure.axes[2].xaxis.get_tightbbox().y0,
                               max(t.get_window_extent().y1 for t in figure.texts[2:]))

    def test_intervals_and_shares(self):
        low, high = evaluation.wilson(0.9, 100)
        self.assertAlmostEqual(low, 0.8256, delta=1e-4)
        self.assertAlmostEqual(high, 0.9448, delta=1e-4)
        self.assertEqual((evaluation.wilson(1, 1)[1], evaluation.wilson(0, 1)[0]), (1, 0))
        self.assertEqual(list(evaluation.read(evaluation_result()).known), [90, 100 * 20 / 300, 100 * 10 / 300, 0])

    def test_refuses_in_one_line(self):
        def broken(*path, value):
            content = evaluation_result()
            part = content
            for key in path[:-1]:
                part = part[key]
            part[path[-1]] = value
            return content
        self.assert_refused([
            {"experiment": "baton_evaluate"}, evaluation_result(["a"], confusion=[[1, 2]]),
            broken("confusion", 0, 0, value=-1), broken("confusion", 0, 0, value=1.5),
            broken("confusion", 1, value=[1, 2]), broken("class_names", value=[]), broken("reliability", value=[]),
            broken("reliability", 14, "accuracy", value=1.2), broken("reliability", 14, "confidence", value=None),
            broken("reliability", 14, "high", value=0.1), broken("ece", value=float("nan")),
            broken("accuracy", "low", value="little"), broken("entropy_histogram", "known", value=[1, 2]),
            broken("entropy_histogram", "foreign", value=[0, 0, 0, 0]),
            broken("entropy_histogram", "edges", value=[0, 0.5, 0.4, 0.75, 1]),
            broken("foreign", "scores", value=[]), broken("foreign", "scores", 1, "auroc", value=2)])


if __name__ == "__main__":
    unittest.main()
