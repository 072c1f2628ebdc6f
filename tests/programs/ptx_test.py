#!/usr/bin/env python3
"""Runs programs of the CUDA build on the interpreter of PTX, small, as a user would: the figures are the host build's
within a tolerance, two runs have the same bits, and a run that was killed and resumed has them too.

Usage: ptx_test.py BUILD_FOLDER HOST_BUILD_FOLDER     (LD_LIBRARY_PATH names the folder of the interpreter)
"""
import json
import math
import pathlib
import signal
import struct
import subprocess
import sys
import time
import unittest

from support import ProgramTest, figures, read_tensors

BUILD, HOST = (pathlib.Path(sys.argv.pop(1)).resolve() for _ in range(2))


def leaves(x, path=""):
    """(where, number) of every number in a result."""
    if isinstance(x, dict):
        for key, value in x.items():
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(x, list):
        for index, value in enumerate(x):
            yield from leaves(value, f"{path}[{index}]")
    elif isinstance(x, (int, float)) and not isinstance(x, bool):
        yield path, x


class OnPtx(ProgramTest):
    def host(self, path):
        if not (HOST / path).exists():
            self.skipTest(f"there is no host build with {path}: the figures were NOT compared")
        return HOST / path

    # What a result's numbers may differ by, by the end of their names: accuracies by three images of the test set,
    # likelihoods and divergences by a hundredth of their size. Others (bins, thresholds, counts) are not compared.
    def check_near(self, ours, theirs, test_images):
        ours, theirs = (dict(leaves(figures(x))) for x in (ours, theirs))
        self.assertEqual(ours.keys(), theirs.keys())
        compared = 0
        for where, value in ours.items():
            name = where.rsplit(".", 1)[-1]
            if "accuracy" in where or name in ("error", "map", "sampled", "committee"):
                self.assertAlmostEqual(value, theirs[where], delta=3.01 / test_images, msg=where)
            elif "nll" in where or name in ("kl", "predictive_entropy", "sigma_median"):
                self.assertTrue(math.isclose(value, theirs[where], rel_tol=1e-2, abs_tol=1e-3),
                                f"{where}: {value} as PTX, {theirs[where]} on the host")
            else:
                continue
            compared += 1
        self.assertGreater(compared, 4)

    def check_three_runs(self, program, arguments, lines, **options):
        """A whole run, the same again, and one that is killed when its log has so many lines, and resumed."""
        self.finish(*arguments, out="whole", program=BUILD / program)
        self.finish(*arguments, out="again", program=BUILD / program)
        self.check_same_runs("again", "whole")
        self.finish_with_kills(*arguments, out="killed", lines=lines, program=BUILD / program, **options)
        self.check_same_runs("killed", "whole")
        self.assertIn("PTX interpreter", self.result("whole")["device"])

    def test_bil_mnist(self):
        arguments = ["--methods", "ft,ffg,cfg,mnf", "--parts", "2", "--train-limit", "100", "--test-limit", "40",
                     "--epochs", "1", "--samples", "2", "--stage-samples", "1"]
        self.check_three_runs("bench/bil_mnist", arguments, lines=[2, 5])
        self.finish(*arguments, out="host", program=self.host("bench/bil_mnist"))
        self.check_near(self.result("whole")["runs"], self.result("host")["runs"], 40)

    def test_a_table_in_one_pass(self):
        """Parts and seeds side by side have the figures that they have one after the other."""
        arguments = ["--methods", "ft,ffg", "--parts", "1,10", "--seeds", "0,1", "--batch", "5", "--train-limit", "25",
                     "--test-limit", "20", "--epochs", "1", "--samples", "2", "--stage-samples", "1"]
        results, logs = [], []
        for out, at_once in (("together", []), ("alone", ["--at-once", "1"])):
            self.finish(*arguments, *at_once, out=out, program=BUILD / "bench/bil_mnist")
            results.append(figures(self.result(out))["runs"])
            logs.append(sorted(map(json.dumps, figures(self.log(out)))))
        self.assertEqual(len(results[0]), 8)
        self.assertEqual(*results)
        self.assertEqual(*logs)

    def test_bgd_mnist(self):
        arguments = ["--widths", "20", "--train-limit", "200", "--test-limit", "100", "--epochs", "2"]
        self.check_three_runs("bench/bgd_mnist", arguments, lines=[1, 3])
        self.finish(*arguments, out="host", program=self.host("bench/bgd_mnist"))
        self.check_near(self.result("whole")["runs"], self.result("host")["runs"], 100)

    def test_laplace_update(self):
        arguments = ["--sets", "pixels", "--pool", "100", "--test", "100", "--bases", "20", "--new", "2", "--seeds", "0",
                     "--adam-seeds", "1", "--adam-epochs", "2", "--draws", "10", "--repeats", "1", "--active-seeds", "0",
                     "--active-pool", "40", "--cycles", "1", "--batch", "2", "--initial", "10", "--trials", "4"]
        self.check_three_runs("bench/laplace_update", arguments, lines=[3], often=())
        self.finish(*arguments, out="host", program=self.host("bench/laplace_update"))
        self.check_near(self.result("whole")["updates"], self.result("host")["updates"], 100)

    def write_images(self, folder, count, first):
        """Images of 8 x 8 with a bright quarter, whose place is the class, as IDX files."""
        where = self.folder / folder
        where.mkdir()
        labels = [(7 * i + 3) % 4 for i in range(first, first + count)]
        pixels = bytearray()
        for i, label in enumerate(labels, first):
            for p in range(64):
                bright = (p // 8 // 4, p % 8 // 4) == divmod(label, 2)
                pixels.append((i * 7919 + p * 104729 >> 4) % 90 + 60 * bright)
        (where / "train-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 8, 8) + pixels)
        (where / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + bytes(labels))

    def test_baton_update(self):
        def baton(program, *arguments):
            done = self.run_program(*arguments, program=program)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

        self.write_images("part", 160, 0)
        ours = BUILD / "bin/baton"
        baton(ours, "init", "--architecture", "mlp", "--image", "1x8x8", "--hidden", "24,16", "--classes", 4, "--kind",
              "ffg", "--out", "m")
        update = ["update", "--model", "m", "--data", "part", "--epochs", 6, "--batch", 32]
        start = time.monotonic()
        baton(ours, *update, "--out", "whole")
        seconds = time.monotonic() - start
        baton(ours, *update, "--out", "again")
        self.assertEqual((self.folder / "again").read_bytes(), (self.folder / "whole").read_bytes())
        kills = 0
        for share in (0.4, 0.5, 0.6, 0.3):  # of the time that a whole run takes, its start included
            process = subprocess.Popen([str(ours), *map(str, update), "--out", "killed", "--checkpoint-seconds", "0"]
                                       + (["--resume"] if kills else []), cwd=self.folder, env=self.environment,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(share * seconds)
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        self.assertGreater(kills, 0)
        baton(ours, *update, "--out", "killed", "--resume")
        self.assertEqual((self.folder / "killed").read_bytes(), (self.folder / "whole").read_bytes())

        baton(self.host("bin/baton"), *update, "--out", "host")
        whole, host = (read_tensors(self.folder / name)[0] for name in ("whole", "host"))
        self.assertEqual(whole.keys(), host.keys())
        for name, (shape, values) in whole.items():
            self.assertEqual(shape, host[name][0])
            largest = max(map(abs, host[name][1]))
            worst = max(abs(a - b) for a, b in zip(values, host[name][1]))
            self.assertLessEqual(worst, 2e-3 * largest, name)


if __name__ == "__main__":
    unittest.main(verbosity=2)
