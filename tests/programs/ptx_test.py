#!/usr/bin/env python3
"""Runs programs of the CUDA build on the interpreter of PTX, small, as a user would: the figures are the host build's
within a tolerance, two runs have the same bits, and a run that was killed and resumed has them too.

Usage: ptx_test.py BUILD_FOLDER HOST_BUILD_FOLDER     (LD_LIBRARY_PATH names the folder of the interpreter)
"""
import math
import pathlib
import subprocess
import sys
import unittest

from support import ProgramTest, figures

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
            self.skipTest(f"the host build has no {path}: the figures were NOT compared")
        return HOST / path

    def check_near(self, ours, theirs, test_images):
        """Every number of two results: accuracies within three images, others within a hundredth of their size."""
        ours, theirs = (dict(leaves(figures(x)["runs"])) for x in (ours, theirs))
        self.assertEqual(ours.keys(), theirs.keys())
        for where, value in ours.items():
            if "accuracy" in where or "error" in where:
                self.assertAlmostEqual(value, theirs[where], delta=3.01 / test_images, msg=where)
            elif any(word in where for word in ("ece", "mutual_information")):  # of bins, and differences of entropies
                self.assertAlmostEqual(value, theirs[where], delta=0.03, msg=where)
            else:
                self.assertTrue(math.isclose(value, theirs[where], rel_tol=1e-2, abs_tol=1e-4),
                                f"{where}: {value} as PTX, {theirs[where]} on the host")

    def three_runs(self, program, arguments, lines):
        """A whole run, the same again, and one that is killed when its log has so many lines, and resumed."""
        self.finish(*arguments, out="whole", program=BUILD / program)
        self.finish(*arguments, out="again", program=BUILD / program)
        self.check_same_runs("again", "whole")
        self.finish_with_kills(*arguments, out="killed", lines=lines, program=BUILD / program)
        self.check_same_runs("killed", "whole")
        self.assertIn("PTX interpreter", self.result("whole")["device"])

    def test_bil_mnist(self):
        arguments = ["--methods", "ft,ffg,cfg,mnf", "--parts", "2", "--train-limit", "400", "--test-limit", "100",
                     "--epochs", "1", "--samples", "2", "--stage-samples", "1"]
        self.three_runs("bench/bil_mnist", arguments, lines=[2, 5])
        self.finish(*arguments, out="host", program=self.host("bench/bil_mnist"))
        self.check_near(self.result("whole"), self.result("host"), 100)

    def test_bgd_mnist(self):
        arguments = ["--widths", "50", "--train-limit", "400", "--test-limit", "100", "--epochs", "2"]
        self.three_runs("bench/bgd_mnist", arguments, lines=[1, 3])
        self.finish(*arguments, out="host", program=self.host("bench/bgd_mnist"))
        self.check_near(self.result("whole"), self.result("host"), 100)


if __name__ == "__main__":
    unittest.main(verbosity=2)
