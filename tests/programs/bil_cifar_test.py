#!/usr/bin/env python3
"""Runs the programs bil_cifar10, bil_cifar5p5 and bil_search as a user would, on a few generated images: the files they
write, the search for the prior's width, SIGKILL, SIGTERM, SIGINT and --resume, and bad input.

Usage: bil_cifar_test.py FOLDER_OF_THE_PROGRAMS
"""
import json
import pathlib
import sys
import unittest

from support import ProgramTest, options

FOLDER = pathlib.Path(sys.argv.pop(1)).resolve()
LAYERS = ["conv1", "conv2", "conv3", "fc1", "fc2", "fc3"]


def tiny(**changes):
    return options({"train_limit": 200, "test_limit": 100, "epochs": 1, "batch": 40, "samples": 2, "parts": 2},
                   changes)


def tiny_5p5(**changes):
    return tiny(**{"old_limit": 200, "pretrain_epochs": 1, "sigma_grid": "0.01,0.1", **changes})


def write_cifar(folder, name, count, cut=0):
    image = bytes((i * 7919 >> 4) & 255 for i in range(3072))
    (folder / name).write_bytes(b"".join(bytes([i % 10]) + image for i in range(count))[:-cut or None])


class BilCifar(ProgramTest):
    def check_stages_start_at_their_priors(self, result, log):
        """A part's KL is to the posterior that was handed on, and is far below that to the first prior."""
        for run in result["runs"]:
            if "kl_by_layer" not in run["stages"][0]:
                continue
            first = run["stages"][0]["kl"]
            lines = [line for line in log if (line["method"], line["parts"], line["stage"]) == (run["method"], 2, 2)]
            self.assertTrue(lines)
            self.assertLess(abs(lines[0]["kl"]), 0.02 * first, run["method"])

    def small_set(self):
        """A folder with a thousand training images: quicker to read than sixty thousand are to generate."""
        folder = self.folder / "few"
        folder.mkdir()
        for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
            write_cifar(folder, name, 200)
        return ["--data", "few"]

    def check_bad_data(self, *options):
        self.expect_refusal(2, ["nowhere"], *options, "--out", "refused", "--data", "nowhere")
        cut = self.folder / "cut"
        cut.mkdir()
        for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
            write_cifar(cut, name, 20, cut=100 if name == "data_batch_2.bin" else 0)
        self.expect_refusal(2, ["data_batch_2"], *options, "--out", "refused", "--data", "cut")
        self.assertFalse((self.folder / "refused").exists())


class BilCifar10(BilCifar):
    program = FOLDER / "bil_cifar10"

    def test_files_and_resume(self):
        arguments = tiny(methods="ft,ffg,cfg,mnf")
        done = self.finish(*arguments, out="whole", plot=True)
        self.assertIn("GENERATED", done.stdout)
        whole, log = self.result("whole"), self.log("whole")
        self.check_result(whole, log, LAYERS)
        self.assertEqual(whole["experiment"], "bil_cifar10")
        self.assertEqual({k: whole["dataset"][k] for k in ("name", "generated", "train", "test")},
                         {"name": "cifar10", "generated": True, "train": 200, "test": 100})
        self.assertEqual([run["method"] for run in whole["runs"]], ["ft", "ffg", "cfg", "mnf"])
        for run in whole["runs"]:
            self.assertEqual(run["settings"].get("beta", 0.05), 0.05)  # of the larger network
        self.check_stages_start_at_their_priors(whole, log)

        # A line a stage: killed in FFG's first, CFG's second and MNF's.
        self.finish_with_kills(*arguments, out="killed", lines=[3, 5, 7])
        self.check_same_runs("killed", "whole")

    def test_signals(self):
        arguments = [*tiny(methods="ft,cfg", epochs=2, batch=10, train_limit=100), "--augment", *self.small_set()]
        self.finish(*arguments, out="whole")
        places = []
        self.finish_with_stops(*arguments, out="stopped", when=[1, (4, 0.1), (6, 0.1)],
                               check=lambda: places.append(self.where("stopped/checkpoint/run.safetensors")))
        self.check_same_runs("stopped", "whole")
        self.assertTrue(any(steps % 5 for _, steps in places), places)

    def test_augmentation_is_deterministic_and_makes_a_difference(self):
        figures = []
        for out, flags in (("plain", []), ("one", ["--augment"]), ("two", ["--augment"])):
            self.finish(*tiny(methods="ft", parts=1), *flags, out=out)
            figures.append([line["train_loss"] for line in self.log(out)])
        self.assertEqual(figures[1], figures[2])
        self.assertNotEqual(figures[0], figures[1])
        self.assertTrue(self.result("one")["runs"][0]["settings"]["augment"])

    def test_a_loss_that_overflows(self):
        message = self.expect_refusal(1, ["not finite", "stage 1", "step ", "seed 0"],
                                      *tiny(methods="ft", lr=1e6, out="hot"))
        self.assertRegex(message, r"layer (conv[123]|fc[123])\b")
        self.assertFalse((self.folder / "hot/result.json").exists())

    def test_bad_input(self):
        for words, changes in ((["unknown method", "laplace"], {"methods": "ft,laplace"}),
                               (["--parts", "5000", "200"], {"parts": 5000}),
                               (["--sigma-grid"], {"sigma_grid": 0.1}),  # the other program's
                               (["preset", "slow"], {"preset": "slow"})):
            self.expect_refusal(2, words, *tiny(**changes, out="refused"))
        self.assertFalse((self.folder / "refused").exists())
        self.check_bad_data(*tiny())
        self.assertEqual(self.run_program("--help").returncode, 0)


class BilCifar5p5(BilCifar):
    program = FOLDER / "bil_cifar5p5"

    def test_files_search_and_resume(self):
        arguments = tiny_5p5(methods="ft,ft_pretrained,ffg,ffg_grid,ffg_laplace")
        done = self.finish(*arguments, out="whole", plot=True)
        self.assertIn("GENERATED", done.stdout)
        whole, log = self.result("whole"), self.log("whole")
        self.check_result(whole, log, LAYERS)
        self.assertEqual(whole["experiment"], "bil_cifar5p5")
        self.assertEqual({k: whole["dataset"][k] for k in ("name", "generated", "train", "test")},
                         {"name": "cifar10", "generated": True, "train": 200, "test": 100})
        settings = whole["settings"]
        self.assertEqual(sorted(settings["old_classes"] + settings["new_classes"]), list(range(10)))
        self.assertEqual(len(settings["old_classes"]), 5)
        self.assertEqual(settings["old_images"], 200)
        self.check_stages_start_at_their_priors(whole, log)
        self.assertTrue((self.folder / "whole/pretrained_seed0.safetensors").exists())
        self.assertFalse((self.folder / "whole/checkpoint").exists())

        runs = {run["method"]: run for run in whole["runs"]}
        self.assertEqual(list(runs), ["ft", "ft_pretrained", "ffg", "ffg_grid", "ffg_laplace"])
        for method in ("ft", "ffg"):
            self.assertNotIn("pretrained", runs[method]["settings"])
        for method in ("ft_pretrained", "ffg_grid", "ffg_laplace"):
            self.assertIn("pretrained on 200 images of classes", runs[method]["settings"]["pretrained"])
        self.assertIn("Laplace", runs["ffg_laplace"]["settings"]["pretrained"])

        # The width of the prior is a point of the grid, and the best of it.
        [search] = settings["sigma_search"]
        self.assertEqual((search["method"], search["parts"], search["seed"]), ("ffg_grid", 2, 0))
        self.assertEqual([point["sd"] for point in search["points"]], [0.01, 0.1])
        best = min(search["points"], key=lambda point: point["holdout_nll"])
        self.assertEqual(search["chosen_sd"], best["sd"])
        self.assertEqual(runs["ffg_grid"]["settings"]["pretrained_sd"], best["sd"])
        self.assertNotEqual(search["points"][0]["holdout_nll"], search["points"][1]["holdout_nll"])

        # Killed between two methods and inside one; it takes up the pretrained network that it finds.
        self.finish_with_kills(*arguments, out="killed", lines=[5, 9])
        self.check_same_runs("killed", "whole")

    def test_cfg_and_mnf_from_a_pretrained_network(self):
        arguments = tiny_5p5(sigma_grid="0.1", methods="cfg_laplace,mnf_grid")
        self.finish(*arguments, out="whole")
        whole, log = self.result("whole"), self.log("whole")
        self.check_result(whole, log, LAYERS)
        self.assertEqual([run["method"] for run in whole["runs"]], ["cfg_laplace", "mnf_grid"])
        self.check_stages_start_at_their_priors(whole, log)

    def test_signals(self):
        """In pretraining, in the Laplace approximation, in the search for the prior's width, and in the experiment."""
        def those(**changes):
            return tiny_5p5(**{"methods": "ft_pretrained,ffg_grid,ffg_laplace", "batch": 20, "train_limit": 100,
                               "old_limit": 100, "pretrain_epochs": 6, "data": "few", **changes})
        self.small_set()
        arguments = those()
        self.finish(*arguments, out="whole")
        kept, search = pathlib.Path("pretrained_seed0.safetensors"), pathlib.Path("checkpoint/sd_search.json")
        places = []

        def check():
            places.append({p.name: self.where(p) for p in (self.folder / "stopped/checkpoint").glob("*.safetensors")})
        messages = self.finish_with_stops(*arguments, out="stopped", check=check, when=[
            ("old classes", 0.1), kept, ("Laplace prior", 0.1), (search, 0.1), 1, 3])
        self.check_same_runs("stopped", "whole")
        self.assertEqual((self.folder / "stopped" / kept).read_bytes(), (self.folder / "whole" / kept).read_bytes())
        self.assertFalse((self.folder / "stopped/checkpoint").exists())
        self.assertEqual([list(p) for p in places],
                         [["pretraining_seed0.safetensors"], [], *[["sd_search.safetensors"]] * 2,
                          *[["run.safetensors"]] * 2])
        self.assertIn("pretrained network is kept", messages[1])

        # Each of them is of its own options.
        for number, (when, changes) in enumerate(((("old classes", 0.1), {"pretrain_epochs": 7}),
                                                  (("Laplace prior", 0.1), {"sigma_grid": "0.01,0.2"}),
                                                  (("old classes", 0.1), {"precision": "tf32"}))):
            self.expect_another_experiment(*arguments, changed=those(**changes), when=when, out=f"other{number}")

    def test_other_draws_of_the_classes(self):
        for seed in (0, 1):
            self.finish(*tiny(methods="ft", train_limit=60, test_limit=20, parts=1, class_seed=seed), out=f"seed{seed}")
        drawn = [self.result(f"seed{seed}")["settings"]["old_classes"] for seed in (0, 1)]
        self.assertNotEqual(*drawn)
        self.assertFalse((self.folder / "seed0/pretrained_seed0.safetensors").exists())  # nobody asked for it

    def test_bad_input(self):
        for words, changes in ((["unknown method", "ffg_magic"], {"methods": "ffg_magic"}),
                               (["unknown method", "ft_laplace"], {"methods": "ft_laplace"}),
                               (["unknown method", "ffg_pretrained"], {"methods": "ffg_pretrained"}),
                               (["--sigma-grid", "-1"], {"sigma_grid": "0.1,-1"}),
                               (["--sigma-grid", "wide"], {"sigma_grid": "wide"}),
                               (["curvature", "full"], {"curvature": "full"}),
                               (["--parts"], {"parts": 0}), (["--seeds"], {"seeds": "x"}),
                               (["--pretrain-epochs"], {"pretrain_epochs": -1})):
            self.expect_refusal(2, words, *tiny_5p5(**changes, out="refused"))
        self.assertFalse((self.folder / "refused").exists())
        self.check_bad_data(*tiny_5p5())
        self.expect_refusal(2, ["--transfer", "head"], *tiny_5p5(transfer="head", out="transfer"))
        self.assertEqual(self.run_program("--help").returncode, 0)


class BilSearch(BilCifar):
    program = FOLDER / "bil_search"

    def test_signals(self):
        candidates = [{"epochs": 2, "batch": 10, "parts": 2, **more}
                      for more in ({"method": "ffg", "lr": 1e-3, "prior_sd": 1},
                                   {"method": "cfg", "lr": 1e-3, "prior_sd": 0.5, "groups": 2},
                                   {"method": "ft", "lr": 2e-3})]
        (self.folder / "list.json").write_text(json.dumps(candidates))
        arguments = ["list.json", "--set", "cifar10", *self.small_set(), "--train-limit", 120, "--hold-out", 50,
                     "--samples", 8]

        def table(out):  # less the clock's column, the last
            return [row.rsplit(",", 1)[0] for row in (self.folder / out / "table.csv").read_text().splitlines()]
        self.finish(*arguments, out="whole")
        self.assertEqual([row.split(",")[:3] for row in table("whole")],
                         [["method", "options", "parts"], ["ffg", "", "2"], ["cfg", "groups 2", "2"], ["ft", "", "2"]])
        checkpoint, first = pathlib.Path("checkpoint/search.json"), "ffg,"
        places = []
        self.finish_with_stops(*arguments, out="stopped", when=[(checkpoint, 0.3), (first, 0.2), (checkpoint, 0.4)],
                               check=lambda: places.append(self.where("stopped/checkpoint/group.safetensors")))
        self.assertEqual(table("stopped"), table("whole"))
        self.assertFalse((self.folder / "stopped/checkpoint").exists())
        self.assertTrue(any(steps % 6 for _, steps in places), places)

        # Another search appends; a resumed one takes nobody's rows but its own.
        (self.folder / "one.json").write_text(json.dumps(candidates[2:]))
        arguments[0] = "one.json"
        self.finish_with_stops(*arguments, out="stopped", when=[(checkpoint, 0.2)])
        self.assertEqual(table("stopped"), table("whole") + table("whole")[3:])
        self.expect_another_experiment(*arguments, changed=["list.json", *arguments[1:]], when=checkpoint, out="other")
        self.finish(*arguments, "--precision", "tf32", out="stopped")  # said in the table, where it is not fp32
        self.assertEqual([row.split(",")[1] for row in table("stopped")[-2:]], ["", "precision tf32"])
        self.expect_another_experiment(*arguments, changed=[*arguments, "--precision", "tf32"], when=checkpoint,
                                       out="rounded")
        for candidate, words in (({"speed": 1}, ["speed"]), ({"method": "ft", "prior_sd": 1}, ["prior_sd"]),
                                 ({"batch": 0}, ["batch", "0"]), ({"method": "sfg"}, ["sfg"])):
            (self.folder / "bad.json").write_text(json.dumps([candidate]))
            self.expect_refusal(2, ["bil_search: ", *words], "bad.json", *arguments[1:], "--out", "bad")


if __name__ == "__main__":
    unittest.main(verbosity=2)
