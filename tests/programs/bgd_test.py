#!/usr/bin/env python3
"""Runs the programs bgd_mnist, bgd_permuted_mnist, bgd_cifar10 and bgd_cifar_tasks as a user would, on a few generated
images: the files they write, the models they save, SIGKILL, SIGTERM, SIGINT and --resume, a sigma that diverges, and bad input.

Usage: bgd_test.py FOLDER_OF_THE_PROGRAMS
"""
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
import time
import unittest

from support import LOG_KEYS, ProgramTest, options

FOLDER = pathlib.Path(sys.argv.pop(1)).resolve()
INFERENCES = ["map", "sampled", "softmax", "committee"]
def write_cifar10(folder, count=20, classes=10):
    folder.mkdir()
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        (folder / name).write_bytes(b"".join(bytes([i % classes]) + picture(i) for i in range(count)))


def write_cifar100(folder, each=1, cut=0, label=None):
    """`each` images of every fine label in train.bin and in test.bin; cut: bytes that the first lacks at its end."""
    folder.mkdir()
    records = [bytes([i % 20, i]) + picture(3 * i) for i in range(100)] * each
    if label is not None:
        records[7] = bytes([0, label]) + records[7][2:]
    (folder / "train.bin").write_bytes(b"".join(records)[:-cut or None])
    (folder / "test.bin").write_bytes(b"".join(records[:100]))


def picture(seed):
    return bytes(((i + 31 * seed) * 7919 >> 4) & 255 for i in range(3072))


class BgdTest(ProgramTest):
    def finish(self, *arguments, out, program=None, plot=False):
        done = super().finish(*arguments, out=out, program=program, plot=plot)
        self.assertFalse((self.folder / out / "checkpoint").exists())
        self.assertIn("GENERATED" if self.result(out)["dataset"]["generated"] else "Results", done.stdout)
        if not plot:
            self.assertIn("The plot was not drawn", done.stdout)
        return done

    def check_fraction(self, *values):
        for value in values:
            self.assertTrue(0 <= value <= 1, value)

    def check_contract(self, out, name, dataset):
        """What every program's result.json and log.jsonl hold; gives the result and the log."""
        result, log = self.result(out), self.log(out)
        self.check_form(result, log)
        self.assertEqual(result["experiment"], name)
        self.assertGreater(result["peak_device_bytes"], 0)
        self.assertTrue(result["device"])
        self.assertEqual({k: v for k, v in result["dataset"].items() if k != "source"}, dataset)
        self.assertEqual("generated" in result["dataset"]["source"], dataset["generated"])
        self.assertNotIn(str(self.folder), result["dataset"]["source"])
        for run in result["runs"]:
            self.check_stages(run)
            self.check_settings(run)
            if run["method"].startswith("bgd"):
                self.check_sigma(run)
            else:
                self.assertNotIn("sigma", run)
        self.check_log(result, log)
        return result, log

    def check_stages(self, run):
        self.assertIn(run["inference"], INFERENCES)
        self.assertTrue(run["stages"])
        for stage in run["stages"]:
            self.check_keys(stage, ("by_inference", "by_task"))
            ways = stage["by_inference"]
            # Every way at the end; before it, those that the run's own inference takes.
            if stage is run["stages"][-1]:
                self.assertEqual(sorted(ways), sorted(INFERENCES))
            self.assertTrue(set(ways) <= set(INFERENCES), ways)
            self.check_fraction(stage["test_accuracy"], stage["test_ece"], *ways.values(), *stage["by_task"])
            self.assertGreater(stage["test_nll"], 0)
            self.assertAlmostEqual(stage["test_accuracy"], ways[run["inference"]], places=12)
            self.assertAlmostEqual(stage["test_accuracy"], sum(stage["by_task"]) / len(stage["by_task"]), places=12)
            if not run["method"].startswith("b"):  # a point estimate has one answer
                self.assertEqual(len(set(ways.values())), 1, ways)
        order = [(stage["stage"], stage["epoch"]) for stage in run["stages"]]
        self.assertEqual(order, sorted(set(order)))

    def check_settings(self, run):
        settings = run["settings"]
        for key in ("batch", "epochs"):
            self.assertGreater(settings[key], 0)
        if run["method"].startswith("bgd"):
            self.assertAlmostEqual(settings["step_scale"], settings["eta"] * settings["sigma"] ** 2 * settings["batch"])
            self.assertEqual((settings["warn_ratio"], settings["halt_ratio"]), (10, 100))
            self.check_keys(settings, ("clamp", "least_sigma", "largest_sigma", "draws_at_once"))
            self.assertGreaterEqual(settings["draws"], 1)
        else:
            self.assertGreater(settings["lr"], 0)
            for key in ("draws", "sigma", "prior"):
                self.assertEqual(key in settings, run["method"].startswith("bbb"))
        self.assertEqual("decay" in settings, settings["schedule"] == "steps")

    def check_sigma(self, run):
        sigma = run["sigma"]
        self.assertEqual(sigma["initial"], run["settings"]["sigma"])
        self.assertTrue(0 < sigma["smallest"] <= sigma["largest"], sigma)
        # The median is the middle of a bin of the histogram, a sixteenth of its value wide to either side.
        self.assertTrue(sigma["smallest"] * 15 / 16 <= sigma["median"] <= sigma["largest"] * 17 / 16, sigma)
        self.assertGreater(sigma["largest"] - sigma["smallest"], 0)  # it has learned
        for stage in run["stages"]:
            for key in ("sigma_smallest", "sigma_median", "sigma_largest"):
                self.assertGreater(stage[key], 0)
        self.assertEqual(run["stages"][-1]["sigma_largest"], sigma["largest"])
        if "edges" not in sigma:
            return
        self.assertEqual(len(sigma["edges"]), len(sigma["counts"]) + 1)
        self.assertEqual(sigma["edges"], sorted(set(sigma["edges"])))
        self.assertTrue(sigma["edges"][0] <= sigma["smallest"] and sigma["largest"] <= sigma["edges"][-1], sigma)
        self.assertGreater(min(sigma["counts"][0], sigma["counts"][-1]), 0)
        self.assertEqual(sum(sigma["counts"]), run["parameters"])

    def check_log(self, result, log):
        self.assertEqual(sorted({line["run"] for line in log}), list(range(len(result["runs"]))))
        for number, run in enumerate(result["runs"]):
            lines = [line for line in log if line["run"] == number]
            for line in lines:
                self.assertEqual([line[key] for key in LOG_KEYS[1:5]], [run[key] for key in LOG_KEYS[1:5]])
                self.assertTrue(math.isfinite(line["train_loss"]))
                self.check_fraction(line["train_accuracy"])
            steps = [line["step"] for line in lines]
            self.assertEqual(steps, sorted(set(steps)))
            # Every measurement stands at a line, and a stage ends with one.
            at = [(line["stage"], line["epoch"]) for line in lines]
            for stage in run["stages"]:
                self.assertIn((stage["stage"], stage["epoch"]), at)
            self.assertEqual(at[-1], (run["stages"][-1]["stage"], run["stages"][-1]["epoch"]))

    def check_pruning(self, run, layers, fractions):
        """layers: {name: how many weights}."""
        pruning, weights = run["pruning"], sum(layers.values())
        self.assertEqual(pruning["weights"], weights)
        self.assertLess(abs(pruning["error"] - (1 - run["final_test_accuracy"])), 1e-12)
        rankings = ["magnitude"] if run["method"] in ("sgd", "adam") else ["signal-to-noise", "magnitude"]
        self.assertEqual([(one["ranking"], one["fraction"]) for one in pruning["results"]],
                         [(ranking, fraction) for ranking in rankings for fraction in fractions])
        values = 1 if rankings == ["magnitude"] else 2
        for one in pruning["results"]:
            self.assertEqual(one["weights_left"], weights - round(one["fraction"] * weights))
            self.check_fraction(one["error"], *one["layers"].values())
            if pruning["error"] > 0:
                self.assertAlmostEqual(one["error_ratio"], one["error"] / pruning["error"])
            self.assertEqual(list(one["layers"]), list(layers))
            left = sum(layers[name] * share for name, share in one["layers"].items())
            self.assertAlmostEqual(left, one["weights_left"], places=3)
            self.assertEqual(one["bytes_dense"], 4 * values * weights)
            self.assertEqual(one["bytes_sparse"], 4 * (values + 1) * one["weights_left"])

    def check_refusals(self, defaults, *cases):
        """Each is refused in one line that says what is wrong, before anything is written."""
        before = sorted(self.folder.rglob("*"))
        for words, changes in cases:
            with self.subTest(**changes):
                try:
                    self.expect_refusal(2, words, *options(defaults, {**changes, "out": "refused"}))
                    self.assertEqual(sorted(self.folder.rglob("*")), before)
                finally:
                    shutil.rmtree(self.folder / "refused", ignore_errors=True)
        self.expect_refusal(2, ["--nonsense"], "--nonsense", "--out", "refused")
        self.assertEqual(sorted(self.folder.rglob("*")), before)
        shown = self.run_program("--help")
        self.assertEqual(shown.returncode, 0)
        self.assertIn("--methods", shown.stdout)


class BgdMnist(BgdTest):
    program = FOLDER / "bgd_mnist"
    SMALL = {"widths": 16, "train_limit": 600, "test_limit": 100, "epochs": 2, "draws": 4, "samples": 3}
    LAYERS = {"fc1.weight": 784 * 16, "fc2.weight": 16 * 16, "fc3.weight": 16 * 10}
    DATASET = {"name": "mnist", "generated": True, "train": 600, "test": 100}

    def test_files(self):
        arguments = options(self.SMALL, {"methods": "bgd,sgd,bbb", "prune": "0.5,0.95", "inference": "committee",
                                        "measure_every": 1})
        done = self.finish(*arguments, "--save-models", out="whole", plot=True)
        result, log = self.check_contract("whole", "bgd_mnist", self.DATASET)
        self.assertEqual([(run["method"], run["label"]) for run in result["runs"]],
                         [("bgd", "BGD 2x16"), ("sgd", "SGD 2x16"), ("bbb", "BBB 2x16")])
        self.assertEqual(len(log), 6)  # a line an epoch
        for run in result["runs"]:
            self.assertEqual([stage["epoch"] for stage in run["stages"]], [1, 2])  # measured after every epoch
            self.assertEqual({stage["train_examples"] for stage in run["stages"]}, {600})
            self.assertEqual(run["inference"], "committee")
            self.assertEqual(run["parameters"], sum(self.LAYERS.values()) + 16 + 16 + 10)
            self.assertEqual(run["settings"]["width"], 16)
            self.check_pruning(run, self.LAYERS, [0.5, 0.95])
            self.check_models("whole", run)
        self.assertIn("edges", result["runs"][0]["sigma"])
        self.assertEqual(result["runs"][0]["settings"]["sigma"], 0.01)
        self.assertAlmostEqual(result["runs"][0]["settings"]["step_scale"], 36 * 0.01 ** 2 * 128)

        # What it says is what the file says.
        bgd, sgd = (100 * (1 - run["final_test_accuracy"]) for run in result["runs"][:2])
        self.assertIn(f"With 2x16 units BGD ends at {bgd:.2f} % test error, SGD after as many epochs at {sgd:.2f} %.",
                      done.stdout)
        said = re.findall(r"^(.+?) +seed 0: 95 % pruned by (\S+) +error ([\d.]+) %, ([\d.]+) times", done.stdout, re.M)
        self.assertEqual(said, [(run["label"], one["ranking"], f"{100 * one['error']:.2f}", f"{one['error_ratio']:.2f}")
                                for run in result["runs"] for one in run["pruning"]["results"]
                                if one["fraction"] == 0.95])
        for run in result["runs"]:
            self.assertRegex(done.stdout, rf"(?m)^{run['label']} +1 +{100 * (1 - run['final_test_accuracy']):.2f} ")

    def check_models(self, out, run):
        """The model, and what is left of it when it is pruned by the first ranking."""
        stem = f"{run['label'].replace(' ', '_')}_seed0"
        drawn = run["method"] != "sgd"
        whole, metadata = self.read_model(f"{out}/{stem}", run)
        self.assertEqual((metadata["masked"], metadata["pruned"]), (False, None))
        self.assertEqual({key: metadata["architecture"][key] for key in ("name", "classes", "height", "options")},
                         {"name": "mlp", "classes": 10, "height": 28, "options": {"hidden": [16, 16]}})
        shapes = {f"fc{i}.{kind}": shape for i, (outputs, inputs) in ((1, (16, 784)), (2, (16, 16)), (3, (10, 16)))
                  for kind, shape in (("weight", [outputs, inputs]), ("bias", [outputs]))}
        arrays = ["mean", "log_std"] if drawn else ["mean"]
        self.assertEqual({name: shape for name, (shape, _) in whole.items()},
                         {f"{name}.{array}": shape for name, shape in shapes.items() for array in arrays})
        for _, values in whole.values():
            self.assertTrue(all(map(math.isfinite, values)))
        for one in run["pruning"]["results"][:2]:
            pruned, metadata = self.read_model(f"{out}/{stem}_pruned{100 * one['fraction']:g}", run)
            self.assertEqual((metadata["masked"], metadata["pruned"]), (True, {"fraction": one["fraction"]}))
            self.assertEqual({name: shape for name, (shape, _) in pruned.items()},
                             {f"{name}.{array}": shape for name, shape in shapes.items() for array in arrays + ["mask"]})
            left = 0
            for name in shapes:
                mask = pruned[name + ".mask"][1]
                self.assertTrue(set(mask) <= {0, 1})
                if name.endswith("bias"):
                    self.assertEqual(set(mask), {1})  # biases are not pruned
                else:
                    left += sum(mask)
                    self.assertAlmostEqual(sum(mask) / len(mask), one["layers"][name])
                # What is left is the whole model's, and what is pruned is 0.
                means = zip(mask, pruned[name + ".mean"][1], whole[name + ".mean"][1])
                self.assertTrue(all(after == (before if kept else 0) for kept, after, before in means))
                if drawn:
                    deviations = zip(mask, pruned[name + ".log_std"][1], whole[name + ".log_std"][1])
                    self.assertTrue(all(math.isfinite(after) and after == before if kept else math.isfinite(after)
                                        for kept, after, before in deviations))
            self.assertEqual(left, one["weights_left"])

    def test_resume(self):
        arguments = [*options(self.SMALL, {"methods": "bgd,sgd,bbb,adam", "epochs": 3, "seeds": "0,4", "prune": "0.9"}),
                     "--save-models"]
        self.finish(*arguments, out="whole")
        # Three lines a run: killed in the middle of one, at the end of one, and far on.
        self.finish_with_kills(*arguments, out="killed", lines=[2, 6, 11, 17])
        self.check_same_runs("killed", "whole")
        models = sorted(path.name for path in (self.folder / "whole").glob("*.safetensors"))
        self.assertEqual(len(models), 2 * 8)
        for name in models:
            self.assertEqual((self.folder / "killed" / name).read_bytes(), (self.folder / "whole" / name).read_bytes())

    def test_settings_make_a_difference(self):
        """And equal settings make none: the same figures again, with the draws in passes of two or all at once."""
        def figures(out, **changes):
            self.finish(*options(self.SMALL, {"methods": "bgd", "epochs": 1, **changes}), out=out)
            return [line["train_loss"] for line in self.log(out)]
        one = figures("one", draws_at_once=1)
        self.assertEqual(figures("again", bgd_draws_at_once=1), one)
        for a, b in zip(figures("two", draws_at_once=2), one):
            self.assertLess(abs(a - b), 1e-5 * b)
        for number, changes in enumerate(({"eta": 2}, {"sigma": 0.04}, {"bgd_draws": 2}, {"seeds": 1})):
            self.assertNotEqual(figures(f"other{number}", draws_at_once=1, **changes), one)
        # Another sigma keeps the means' step of the preset: eta follows unless it is given.
        first, other = (self.result(out)["runs"][0]["settings"] for out in ("one", "other1"))
        self.assertAlmostEqual(other["step_scale"], first["step_scale"])
        self.assertNotEqual(other["eta"], first["eta"])
        self.assertEqual(self.result("other0")["runs"][0]["settings"]["eta"], 2)

    def test_options_of_one_method(self):
        """An option goes to every method that has it, and --METHOD-OPTION to that method, in whatever order."""
        self.finish(*options(self.SMALL, {"methods": "bgd,sgd,bbb", "epochs": 1, "bbb_draws": 2, "draws": 3,
                                          "lr": 0.002, "sgd_lr": 0.05}), "--judge-every", "1", out="one")
        settings = {run["method"]: run["settings"] for run in self.result("one")["runs"]}
        self.assertEqual({method: s.get("draws") for method, s in settings.items()}, {"bgd": 3, "sgd": None, "bbb": 2})
        self.assertEqual({method: s.get("lr") for method, s in settings.items()}, {"bgd": None, "sgd": 0.05, "bbb": 0.002})

    def test_a_sigma_that_diverges(self):
        hot = {"widths": 20, "sigma": 0.5, "eta": 8, "batch": 256, "train_limit": 512, "test_limit": 50, "epochs": 1,
               "draws": 2, "samples": 2, "methods": "sgd,bgd", "out": "hot"}
        message = self.expect_refusal(1, ["stage 1 (seed 0)", "sigma diverged at step 1", "eta sigma0^2 B",
                                          "8 x 0.5^2 x 256 = 512", "lower", "sigma0, the batch or eta", "draws than 2"],
                                      *options(hot, {}))
        # What came before it stays, and a resumed run comes to the same end.
        self.assertEqual([run["method"] for run in self.result("hot")["runs"]], ["sgd"])
        log = self.log("hot")
        self.assertEqual({line["method"] for line in log}, {"sgd"})
        self.assertEqual(self.expect_refusal(1, [], *options(hot, {}), "--resume"), message)
        self.assertEqual(self.log("hot"), log)

    def test_resume_of_another_experiment(self):
        arguments = options(self.SMALL, {"methods": "bgd,sgd", "epochs": 4, "out": "one"})
        process = subprocess.Popen([str(self.program), *arguments, "--checkpoint-seconds", "0"], cwd=self.folder,
                                   env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (self.folder / "one/checkpoint/run.safetensors").exists():
            time.sleep(0.002)
        process.kill()
        process.wait()
        files = {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}
        self.assertIn(self.folder / "one/checkpoint/run.safetensors", files)
        for other in (["--eta", "0.5"], ["--seeds", "1"]):
            self.expect_refusal(2, ["--resume", "another experiment"], *arguments, *other, "--resume")
            self.assertEqual({path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}, files)

    def test_bad_input(self):
        (self.folder / "empty").mkdir()
        self.check_refusals(
            {"widths": 8, "train_limit": 100, "test_limit": 50, "epochs": 1},
            (["unknown method", "ffg"], {"methods": "bgd,ffg"}),
            (["unknown method", "si"], {"methods": "si"}),  # other programs'
            (["preset", "slow", "quick"], {"preset": "slow"}),
            (["inference", "vote", "committee"], {"inference": "vote"}),
            (["--draws is 0", "from 1 to"], {"draws": 0}),
            (["--bgd-draws", "'x'"], {"bgd_draws": "x"}),
            (["--sgd-draws"], {"sgd_draws": 3}),  # it has none
            (["10", "3"], {"methods": "sgd,bgd", "draws": 10, "draws_at_once": 3}),
            (["--samples"], {"samples": 0}),
            (["--batch"], {"batch": 0}),
            (["--epochs"], {"epochs": 0}),
            (["--prune", "1.5"], {"prune": 1.5}),
            (["--prune", "half"], {"prune": "0.5,half"}),
            (["--sigma"], {"sigma": 0}),
            (["--sigma"], {"sigma": "nan"}),
            (["--eta"], {"eta": -1}),
            (["--lr"], {"methods": "sgd", "lr": 0}),
            (["halt_ratio", "warn_ratio"], {"halt_ratio": 5}),
            (["--halt-ratio"], {"halt_ratio": 0.5}),
            (["sigma", "exchanged"], {"least_sigma": 2, "largest_sigma": 1}),
            (["--widths"], {"widths": "8,x"}),
            (["--widths"], {"widths": 0}),
            (["--seeds", "x"], {"seeds": "0,x"}),
            (["schedule", "steep"], {"methods": "sgd", "schedule": "steep"}),
            (["--prior", "flat"], {"methods": "bbb", "prior": "flat"}),
            (["--prior-sd"], {"methods": "bbb", "prior_sd": 0}),
            (["--train-limit"], {"train_limit": -1}),
            (["100000", "60000"], {"train_limit": 100000}),
            (["nowhere"], {"data": "nowhere"}),
            (["empty", "train-images"], {"data": "empty"}))

    def test_a_folder_that_cannot_be_made(self):
        (self.folder / "file").write_text("here")
        self.expect_refusal(2, ["file"], *options(self.SMALL, {"methods": "sgd", "out": "file/deeper"}))


class BgdPermutedMnist(BgdTest):
    program = FOLDER / "bgd_permuted_mnist"
    SMALL = {"tasks": 3, "width": 12, "train_limit": 320, "test_limit": 60, "epochs": 1, "batch": 32, "draws": 2,
             "samples": 2, "fisher_examples": 20}
    METHODS = {"bgd": "BGD", "sgd": "SGD", "adam": "Adam", "si": "SI", "ewc": "EWC",
               "bgd_continuous": "BGD, continuous", "sgd_continuous": "SGD, continuous"}

    def test_files_and_resume(self):
        arguments = [*options(self.SMALL, {"methods": ",".join(self.METHODS)}), "--save-models"]
        done = self.finish(*arguments, out="whole", plot=True)
        dataset = {"name": "mnist", "generated": True, "train": 320, "test": 60}
        result, log = self.check_contract("whole", "bgd_permuted_mnist", dataset)
        self.assertEqual({run["method"]: run["label"] for run in result["runs"]}, self.METHODS)
        for number, run in enumerate(result["runs"]):
            continuous = run["method"].endswith("_continuous")
            self.assertEqual((run["parts"], run["settings"]["tasks"], run["inference"]), (3, 3, "map"))
            self.assertEqual(run["settings"]["continuous"], continuous)
            seen = [len(stage["by_task"]) for stage in run["stages"]]
            stages = [stage["stage"] for stage in run["stages"]]
            lines = [line for line in log if line["run"] == number]
            self.assertEqual(lines[-1]["step"], 3 * 10)
            if continuous:  # one stage, all of the tasks measured at every check
                self.assertEqual((seen, stages), ([3, 3, 3], [1, 1, 1]))
                self.assertEqual([stage["epoch"] for stage in run["stages"]], [1, 2, 3])
            else:  # a task is measured from when it has been learned
                self.assertEqual((seen, stages), ([1, 2, 3], [1, 2, 3]))
                self.assertEqual([line["stage"] for line in lines], [1, 2, 3])
            self.assertNotIn("pruning", run)
            self.check_model(run)
        runs = {run["method"]: run for run in result["runs"]}
        for setting, method in (("strength", "si"), ("xi", "si"), ("strength", "ewc"), ("fisher_examples", "ewc")):
            self.assertIn(setting, runs[method]["settings"])
        self.assertEqual(runs["bgd_continuous"]["settings"]["overlap_beta"], 4)
        # The first task is learned alike by the two that differ in what they keep of it only.
        self.assertEqual(runs["si"]["stages"][0]["test_accuracy"], runs["ewc"]["stages"][0]["test_accuracy"])
        self.assertEqual(runs["si"]["stages"][0]["test_nll"], runs["adam"]["stages"][0]["test_nll"])
        self.assertEqual(len({runs[m]["stages"][1]["test_nll"] for m in ("si", "ewc", "adam")}), 3)
        said = ", ".join(f"{run['label']} {run['final_test_accuracy']:.4f}" for run in result["runs"])
        self.assertIn(f"Average accuracy over the 3 tasks after the last one: {said}.", done.stdout)

        # Three lines a run: killed in BGD's second task, in SI's and EWC's, and between the checks of a stage.
        self.finish_with_kills(*arguments, out="killed", lines=[1, 10, 14, 17])
        self.check_same_runs("killed", "whole")
        for path in (self.folder / "whole").glob("*.safetensors"):
            self.assertEqual((self.folder / "killed" / path.name).read_bytes(), path.read_bytes(), path.name)

    def check_model(self, run):
        """A network of one head, whatever the tasks, and a history of the stages that it learned."""
        tensors, metadata = self.read_model(f"whole/{run['label'].replace(', ', '__')}_seed0", run)
        self.assertEqual((metadata["architecture"]["name"], metadata["architecture"]["options"]),
                         ("mlp", {"hidden": [12, 12]}))
        self.assertEqual([stage["images"] for stage in metadata["history"]],
                         [320] * (1 if run["settings"]["continuous"] else 3))
        self.assertEqual(metadata["step"], 30)
        self.assertEqual([tensors[f"fc{i}.weight.mean"][0] for i in (1, 2, 3)], [[12, 784], [12, 12], [10, 12]])
        self.assertEqual("fc3.bias.log_std" in tensors, run["method"].startswith("bgd"))

    def test_signals(self):
        """SIGTERM and SIGINT in the middle of tasks, in measurements and in EWC's Fisher information."""
        arguments = options({**self.SMALL, "samples": 40, "epochs": 2, "batch": 8, "fisher_examples": 320},
                            {"methods": "bgd,si,ewc,bgd_continuous"})
        self.finish(*arguments, out="whole")
        places = []
        # Six lines a run, two a task, and a measurement after the second.
        self.finish_with_stops(*arguments, out="stopped", when=[1, (2, 0.02), 5, (8, 0.01), 13, (14, 0.01), 15, 20],
                               check=lambda: places.append(self.where("stopped/checkpoint/run.safetensors")))
        self.check_same_runs("stopped", "whole")
        self.assertFalse((self.folder / "stopped/checkpoint").exists())
        self.assertGreaterEqual(len([steps for _, steps in places if steps % 40]), 2, places)

    def test_the_first_task_is_the_set_itself(self):
        """Task 1 shows the pixels as they are, so it does not depend on how many tasks come; a seed's orders do."""
        def stages(out, **changes):
            self.finish(*options(self.SMALL, {"methods": "sgd", "lr": 0.1, **changes}), out=out)
            return [stage["test_nll"] for stage in self.result(out)["runs"][0]["stages"]]
        one, two = stages("one", tasks=1), stages("two", tasks=2)
        self.assertEqual((len(one), len(two)), (1, 2))
        self.assertEqual(one[0], two[0])
        self.assertNotEqual(two[0], two[1])

    def test_bad_input(self):
        self.check_refusals(
            {**self.SMALL, "train_limit": 64, "methods": "sgd"},
            (["unknown method", "bbb"], {"methods": "bbb"}),
            (["--tasks"], {"tasks": 0}),
            (["--tasks"], {"tasks": -1}),
            (["--width"], {"width": 0}),
            (["--width"], {"width": -4}),
            (["beta"], {"methods": "bgd_continuous", "overlap_beta": 1}),
            (["a step for each"], {"methods": "sgd_continuous", "tasks": 30, "batch": 64, "epochs": 0.1}),
            (["--strength"], {"methods": "si", "strength": -1}),
            (["--xi"], {"methods": "si", "xi": 0}),
            (["--fisher-examples"], {"methods": "ewc", "fisher_examples": 0}),
            (["10", "3"], {"methods": "sgd,bgd", "draws": 10, "draws_at_once": 3}),
            (["nowhere"], {"data": "nowhere"}))


class BgdCifar10(BgdTest):
    program = FOLDER / "bgd_cifar10"

    def test_files(self):
        """A pass of VGG11 is a GFLOP an image and draw."""
        arguments = options({"train_limit": 16, "test_limit": 8, "epochs": 1, "batch": 8, "draws": 1, "samples": 1},
                            {"methods": "bgd,sgd", "prune": "0.9"})
        done = self.finish(*arguments, out="whole", plot=True)
        dataset = {"name": "cifar10", "generated": True, "train": 16, "test": 8}
        result, _ = self.check_contract("whole", "bgd_cifar10", dataset)
        self.assertEqual([run["method"] for run in result["runs"]], ["bgd", "sgd"])
        bgd, sgd = result["runs"]
        self.assertIn("edges", bgd["sigma"])
        self.assertEqual(sgd["settings"]["schedule"], "steps")
        for run in result["runs"]:
            self.assertIs(run["settings"]["augment"], False)
            self.assertEqual(run["parameters"], bgd["parameters"])
            self.assertEqual([one["fraction"] for one in run["pruning"]["results"]],
                             [0.9] * (2 if run is bgd else 1))
            weights = run["pruning"]["weights"]
            for one in run["pruning"]["results"]:
                self.assertEqual(one["weights_left"], weights - round(0.9 * weights))
                self.check_fraction(one["error"], *one["layers"].values())
        ways, sigma = bgd["stages"][-1]["by_inference"], bgd["sigma"]
        self.assertIn(f"BGD, seed 0: MAP {100 * ways['map']:.2f} %, mean of sampled networks "
                      f"{100 * ways['sampled']:.2f} %, committee {100 * ways['committee']:.2f} %; sigma from "
                      f"{sigma['initial']:.3g} to median {sigma['median']:.3g}, largest {sigma['largest']:.3g}",
                      done.stdout)
        self.assertIn(f"SGD, seed 0: MAP {100 * sgd['final_test_accuracy']:.2f} %\n", done.stdout)

    def test_signals(self):
        """In a step, and when VGG11 is measured and pruned: nothing of that is done twice, and all is measured."""
        write_cifar10(self.folder / "few", 40)
        arguments = options({"train_limit": 48, "test_limit": 40, "epochs": 2, "batch": 8, "draws": 1, "samples": 2},
                            {"methods": "bgd", "prune": "0.5,0.9", "data": "few"})
        self.finish(*arguments, "--save-models", out="whole")
        self.finish_with_stops(*arguments, "--save-models", out="stopped",
                               when=[1, (2, 0.1), (pathlib.Path("BGD_seed0.safetensors"), 0.3)])
        self.check_same_runs("stopped", "whole")
        for path in (self.folder / "whole").glob("*.safetensors"):
            self.assertEqual((self.folder / "stopped" / path.name).read_bytes(), path.read_bytes(), path.name)

    def test_bad_input(self):
        write_cifar10(self.folder / "cut", 2)
        with open(self.folder / "cut/data_batch_2.bin", "r+b") as file:
            file.truncate(5000)
        self.check_refusals(
            {"train_limit": 8, "test_limit": 4, "epochs": 1, "draws": 1, "samples": 1},
            (["unknown method", "ewc"], {"methods": "ewc"}),
            (["preset", "slow"], {"preset": "slow"}),
            (["--draws"], {"draws": 0}),
            (["--prune", "-0.1"], {"prune": -0.1}),
            (["nowhere"], {"data": "nowhere"}),
            (["data_batch_2"], {"data": "cut", "train_limit": 12000}))


class BgdCifarTasks(BgdTest):
    program = FOLDER / "bgd_cifar_tasks"
    SMALL = {"train_limit": 16, "test_limit": 10, "epochs": 1, "batch": 8, "draws": 2, "samples": 2}

    def write_sets(self):
        write_cifar10(self.folder / "ten")
        write_cifar100(self.folder / "hundred", each=2)
        return options(self.SMALL, {"train_limit": 12, "data": "ten", "cifar100": "hundred"})

    def check_said(self, done, result, first):
        self.assertIn(f"Accuracy on every task after the last one ({first} first):", done.stdout)
        for run in result["runs"]:
            by_task = "".join(f" {accuracy:.3f}" for accuracy in run["stages"][-1]["by_task"])
            self.assertIn(f"\n{run['label']}, seed 0:{by_task}; mean {run['final_test_accuracy']:.3f}\n", done.stdout)

    def check_tasks(self, run, tasks, train):
        self.assertEqual((run["parts"], len(run["settings"]["tasks"]), run["inference"]), (tasks, tasks, "committee"))
        self.assertEqual([stage["stage"] for stage in run["stages"]], list(range(1, tasks + 1)))
        self.assertEqual([len(stage["by_task"]) for stage in run["stages"]], list(range(1, tasks + 1)))
        self.assertEqual([stage["train_examples"] for stage in run["stages"]], train)
        self.assertTrue(run["settings"]["dropout"])

    def test_five_tasks_of_two_classes(self):
        done = self.finish(*options(self.SMALL, {"methods": "bgd,sgd,si"}), out="whole", plot=True)
        dataset = {"name": "cifar10", "generated": True, "train": 80, "test": 50}
        result, log = self.check_contract("whole", "bgd_cifar_tasks", dataset)
        self.assertEqual([run["method"] for run in result["runs"]], ["bgd", "sgd", "si"])
        self.assertEqual(len(log), 3 * 5)
        for run in result["runs"]:
            self.check_tasks(run, 5, [16] * 5)
            self.assertEqual(run["settings"]["tasks"], [f"classes {2 * t} and {2 * t + 1}" for t in range(5)])
            self.assertEqual(run["parameters"], 1245728 + 5 * (512 * 2 + 2))
        self.check_said(done, result, "classes 0 and 1")

    def test_six_tasks_of_ten_classes(self):
        arguments = self.write_sets()
        done = self.finish(*arguments, "--methods", "bgd,si", "--save-models", out="whole")
        result, _ = self.check_contract("whole", "bgd_cifar_tasks", {"name": "cifar10+cifar100", "generated": False,
                                                                     "train": 72, "test": 60})
        for word in ("CIFAR-10,", "CIFAR-100,"):
            self.assertIn(word, result["dataset"]["source"])
        names = ["CIFAR-10"] + [f"CIFAR-100 {t}-{t + 9}" for t in range(0, 50, 10)]
        for run in result["runs"]:
            self.check_tasks(run, 6, [12] * 6)
            self.assertEqual(run["settings"]["tasks"], names)
            self.assertEqual(run["parameters"], 1276508)
        self.check_said(done, result, "CIFAR-10")
        for run in result["runs"]:
            tensors, metadata = self.read_model(f"whole/{run['label']}_seed0", run)
            self.assertEqual({key: metadata["architecture"][key] for key in ("name", "classes", "options")},
                             {"name": "task-cnn", "classes": 10, "options": {"heads": 6, "dropout": True}})
            self.assertEqual([stage["images"] for stage in metadata["history"]], [12] * 6)
            for head in range(6):
                self.assertEqual(tensors[f"head{head}.weight.mean"][0], [10, 512])
                self.assertEqual(f"head{head}.bias.log_std" in tensors, run["method"] == "bgd")
            self.assertNotIn("head6.weight.mean", tensors)
            values = sum(len(values) for name, (_, values) in tensors.items() if name.endswith(".mean"))
            self.assertEqual(values, run["parameters"])

        # Six lines a run: killed between BGD's tasks, and in SI's.
        self.finish_with_kills(*arguments, "--methods", "bgd,si", "--save-models", out="killed", lines=[2, 8])
        self.check_same_runs("killed", "whole")
        for name in ("BGD_seed0.safetensors", "SI_seed0.safetensors"):
            self.assertEqual((self.folder / "killed" / name).read_bytes(), (self.folder / "whole" / name).read_bytes())

    def test_ewc_with_dropout(self):
        """The Fisher information is of the network that predicts: nothing is dropped in its passes."""
        arguments = self.write_sets()
        self.finish(*arguments, "--methods", "ewc", "--fisher-examples", "4", out="whole")
        run, = self.result("whole")["runs"]
        self.check_tasks(run, 6, [12] * 6)
        self.assertEqual(run["settings"]["fisher_examples"], 4)

    def test_bad_input(self):
        write_cifar10(self.folder / "ten")
        write_cifar10(self.folder / "five", classes=5)
        write_cifar100(self.folder / "cut", cut=100)
        write_cifar100(self.folder / "label", label=100)
        write_cifar100(self.folder / "untested")
        (self.folder / "untested/test.bin").unlink()
        write_cifar100(self.folder / "few")
        with open(self.folder / "few/train.bin", "r+b") as file:
            file.truncate(25 * 3074)  # no image of the classes from 25 on
        self.check_refusals(
            {**self.SMALL, "data": "ten", "methods": "sgd"},
            (["unknown method", "bbb"], {"methods": "sgd,bbb"}),
            (["preset", "slow"], {"preset": "slow"}),
            (["10", "3"], {"methods": "sgd,bgd", "draws": 10, "draws_at_once": 3}),
            (["nowhere"], {"data": "nowhere"}),
            (["nowhere"], {"cifar100": "nowhere"}),
            (["train.bin", "3074"], {"cifar100": "cut"}),
            (["train.bin", "100 of record 7"], {"cifar100": "label"}),
            (["untested", "test.bin"], {"cifar100": "untested"}),
            (["no examples"], {"cifar100": "few"}),
            (["no examples"], {"data": "five"}))


if __name__ == "__main__":
    unittest.main(verbosity=2)
