#!/usr/bin/env python3
"""Runs the program minimal where there is no data: ten parts of generated digits, each with a line of finite figures.

Usage: minimal_test.py PROGRAM
"""
import math
import pathlib
import re
import sys
import unittest

from support import ProgramTest

PROGRAM = pathlib.Path(sys.argv.pop(1)).resolve()


class Minimal(ProgramTest):
    program = PROGRAM

    def test_ten_parts_of_generated_digits(self):
        done = self.run_program(1000, 1)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        head, *lines = done.stdout.splitlines()
        self.assertEqual(head, "generated digits: 1000 training and 166 test images")
        self.assertEqual([int(re.match(r"part +(\d+): ", line)[1]) for line in lines], list(range(1, 11)))
        for line in lines:
            loss, kl, accuracy, nll = map(float, re.fullmatch(
                r"part .*: training loss (\S+), KL to the prior (\S+) nats; test accuracy (\S+), NLL (\S+)", line).groups())
            self.assertTrue(all(map(math.isfinite, (loss, kl, accuracy, nll))), line)
            self.assertTrue(loss > 0 and nll > 0 and 0 <= accuracy <= 1, line)
        self.assertGreater(accuracy, 0.2)  # after the last part: it has learned, if little
        self.assertEqual(list(self.folder.iterdir()), [])


if __name__ == "__main__":
    unittest.main(verbosity=2)
