#!/usr/bin/env python3
"""Tests the command lines that tools/profile prints: for every program, with its own options and with those given.

Usage: profile_test.py BUILD_FOLDER [unittest options]
The options of the short runs are looked up in the --help of that build's programs.
"""
import pathlib
import shlex
import subprocess
import sys
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(sys.argv[1])
# `minimal` is an example to read, and has no options.
PROGRAMS = sorted({path.stem for path in (ROOT / "bench/paper").glob("*.cpp")} - {"minimal"}) + [
    "micro", "step_timing", "baton"]


def profile(*arguments):
    return subprocess.run([ROOT / "tools/profile", *arguments], text=True, capture_output=True, timeout=60)


class Profile(unittest.TestCase):
    def lines(self, *arguments):
        done = profile(*arguments)
        self.assertEqual(done.returncode, 0, done.stderr)
        return [shlex.split(line) for line in done.stdout.splitlines()]

    def split(self, line, program):
        """The profiler's part of a command line, and the program's options."""
        path = f"build/cuda-profile/{'bin' if program == 'baton' else 'bench'}/{program}"
        self.assertIn(path, line)
        at = line.index(path)
        return line[:at], line[at + 1:]

    def test_every_program_has_a_short_run(self):
        for program in PROGRAMS:
            for tool in ("nsys", "ncu"):
                with self.subTest(program=program, tool=tool):
                    lines = self.lines(tool, "--print", program)
                    profiler, options = self.split(lines[-1], program)
                    self.assertEqual(profiler[0], tool)
                    report = {"nsys": f"--output=results/profile/{program}", "ncu": f"results/profile/{program}"}[tool]
                    self.assertIn(report, profiler)
                    self.assertIn("--cuda-graph-trace=node" if tool == "nsys" else "--graph-profiling", profiler)
                    self.assertTrue(options)
                    if program not in ("micro", "step_timing"):
                        self.assertTrue(options[options.index("--out") + 1].startswith("results/profile/"))

    def test_the_short_runs_options_exist(self):
        for program in PROGRAMS:
            with self.subTest(program=program):
                for number, line in enumerate(reversed(self.lines("nsys", "--print", program))):
                    if line[0] == "echo":
                        continue
                    _, options = self.split(line, program) if number == 0 else ([], line[1:])
                    path = BUILD / ("bin" if program == "baton" else "bench") / program
                    if program == "micro" and not path.exists():
                        self.skipTest("this build has no Google Benchmark")
                    command = [path, *([options[0]] if program == "baton" else []), "--help"]
                    shown = subprocess.run(command, text=True, capture_output=True, timeout=60)
                    self.assertEqual(shown.returncode, 0, shown.stderr)
                    known = {word.split("=")[0] for word in (shown.stdout + shown.stderr).replace(",", " ").
                             replace("[", " ").split()}
                    for option in options:
                        if option.startswith("--"):
                            self.assertIn(option.split("=")[0], known)

    def test_what_a_short_run_needs_is_made_first(self):
        lines = self.lines("nsys", "--print", "baton")
        self.assertEqual(lines[0][:2], ["build/cuda-profile/bin/baton", "init"])
        model = lines[0][lines[0].index("--out") + 1]
        self.assertEqual(lines[1][lines[1].index("--model") + 1], model)
        lines = self.lines("ncu", "--print", "bil_search")
        self.assertEqual(lines[0][0], "echo")
        self.assertIn(lines[0][-1], lines[1])
        for program in set(PROGRAMS) - {"baton", "bil_search"}:
            self.assertEqual(len(self.lines("nsys", "--print", program)), 1)

    def test_given_options_take_their_place(self):
        lines = self.lines("ncu", "--print", "bgd_cifar10", "--preset", "paper", "--out", "a b", "--seeds", "0")
        self.assertEqual(len(lines), 1)
        self.assertEqual(self.split(lines[0], "bgd_cifar10")[1], ["--preset", "paper", "--out", "a b", "--seeds", "0"])
        lines = self.lines("nsys", "--print", "baton", "predict", "--model", "m", "--data", "d")
        self.assertEqual(len(lines), 1)
        self.assertEqual(self.split(lines[0], "baton")[1], ["predict", "--model", "m", "--data", "d"])

    def test_without_a_name_it_is_bil_mnist(self):
        self.assertEqual(self.lines("nsys", "--print"), self.lines("nsys", "--print", "bil_mnist"))
        _, options = self.split(self.lines("nsys", "--print", "--epochs", "2")[0], "bil_mnist")
        self.assertEqual(options, ["--epochs", "2"])

    def test_where_nsight_compute_looks(self):
        for program, marked in (("bil_mnist", "step/"), ("micro", "step/"), ("laplace_update", "last_layer_update/")):
            line = self.lines("ncu", "--print", program)[0]
            self.assertEqual(line[line.index("--nvtx-include") + 1], marked)

    def test_refusals(self):
        for arguments in ((), ("perf",), ("nsys", "--print", "bil_imagenet"), ("--print",)):
            done = profile(*arguments)
            self.assertEqual(done.returncode, 2, arguments)
        self.assertIn("no program 'bil_imagenet'", profile("nsys", "--print", "bil_imagenet").stderr)
        shown = profile("--help")
        self.assertEqual(shown.returncode, 0)
        for program in PROGRAMS:
            self.assertIn(program, shown.stdout)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[2:]], verbosity=2)
