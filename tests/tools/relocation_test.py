#!/usr/bin/env python3
"""Tests that a build folder can be moved: its programs, copied elsewhere with what the build put beside them, find their
goldens and the plotting there, and know nothing of the sources.

Usage: relocation_test.py BUILD_FOLDER SOURCE_FOLDER [unittest options]
LD_LIBRARY_PATH=BUILD_FOLDER/ptx has programs of the CUDA build run on the interpreter of PTX, which moves with them.
"""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

BUILD, SOURCE = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
ROOMS = ("engine", "kernels", "layers", "trainers", "bench", "tests", "tools")


def is_program(path):
    if not path.is_file() or path.is_symlink() or not os.access(path, os.X_OK):
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"


class Relocation(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.folder = pathlib.Path(cls.temporary.name)
        cls.moved = cls.folder / "moved"
        for name in ("tests/baton_tests", "bench/bil_mnist"):
            (cls.moved / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(BUILD / name, cls.moved / name)
        cls.environment = {k: v for k, v in os.environ.items() if k not in ("BATON_DATA", "BATON_TEST_DATA")}
        folders = ["tests/data", "tools"]
        if cls.environment.get("LD_LIBRARY_PATH") == str(BUILD / "ptx"):
            folders.append("ptx")
            cls.environment["LD_LIBRARY_PATH"] = str(cls.moved / "ptx")
        for name in folders:
            shutil.copytree(BUILD / name, cls.moved / name, symlinks=True)

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def run_moved(self, name, *arguments, moved=None, **environment):
        return subprocess.run([(moved or self.moved) / name, *map(str, arguments)], cwd=self.folder, text=True,
                              env={**self.environment, **environment}, capture_output=True, timeout=600)

    def goldens(self, filter, **environment):
        return self.run_moved("tests/baton_tests", f"--gtest_filter={filter}", **environment)

    def test_no_program_names_the_sources(self):
        programs = [path for folder in ("bin", "bench", "tests") for path in (BUILD / folder).glob("*")
                    if is_program(path)]
        self.assertGreater(len(programs), 3)
        for path in programs:
            content = path.read_bytes()
            # What UBSan and nvcc's -lineinfo say of a source cannot be mapped; no such program needs to be moved.
            if b"__ubsan_handle" in content or b".loc\t" in content:
                continue
            for room in ROOMS:
                self.assertEqual(content.find(os.fsencode(f"{SOURCE}/{room}/")), -1, path)

    def test_the_goldens_are_found(self):
        # These need no device, so they run on every build and machine.
        done = self.goldens("NpzGoldens.*:TaskMeasures.OfTheAuthorsRuns:Tasks.TheScheduleIsTheAuthors")
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertGreaterEqual(int(re.search(r"\[  PASSED  \] (\d+) tests", done.stdout)[1]), 4, done.stdout)
        self.assertNotIn("SKIPPED", done.stdout)
        # The others where there is a device; the quick ones as PTX.
        done = self.goldens("Layers/*Golden*" if (self.moved / "ptx").is_dir() else "*Golden*")
        self.assertEqual(done.returncode, 0, done.stdout)

    def test_the_goldens_may_lie_elsewhere(self):
        elsewhere = self.folder / "elsewhere"
        shutil.copytree(self.moved / "tests/data", elsewhere)
        done = self.goldens("NpzGoldens.*", BATON_TEST_DATA=str(elsewhere))
        self.assertEqual(done.returncode, 0, done.stdout)
        done = self.goldens("NpzGoldens.*", BATON_TEST_DATA=str(self.folder / "nowhere"))
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertIn("nowhere/goldens/layers/", done.stdout)

    def test_the_plotting_is_there(self):
        result = self.folder / "result"
        result.mkdir()
        shutil.copy(SOURCE / "bench/results/bil_mnist_paper_cpu/result.json", result)
        done = self.run_moved("tools/plot", result)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertTrue((result / "bil_mnist.png").is_file())

    def run_bil_mnist(self, out, moved=None):
        done = self.run_moved("bench/bil_mnist", "--preset", "quick", "--methods", "ft", "--parts", "1,2", "--seeds", "0",
                              "--epochs", "1", "--train-limit", "100", "--test-limit", "50", "--out", out, moved=moved)
        if "no usable NVIDIA GPU" in done.stderr:
            self.skipTest("no NVIDIA GPU on this machine")
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def test_a_program_draws_its_plot(self):
        text = self.run_bil_mnist("drawn")
        self.assertTrue((self.folder / "drawn/bil_mnist.png").is_file(), text)

    def test_a_program_without_the_plotting_says_so(self):
        alone = self.folder / "alone"
        (alone / "bench").mkdir(parents=True)
        shutil.copy2(self.moved / "bench/bil_mnist", alone / "bench")
        text = self.run_bil_mnist("not_drawn", moved=alone)
        self.assertIn(f"The plot was not drawn, for {alone}/tools/plot is not there", text)
        self.assertFalse((self.folder / "not_drawn/bil_mnist.png").exists())


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[3:]], verbosity=2)
