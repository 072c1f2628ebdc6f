#!/usr/bin/env python3
"""Installs a build into an empty folder, and builds and runs a project that finds it there (tests/consumer).

Usage: consumer_test.py BUILD_FOLDER
"""
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

BUILD = pathlib.Path(sys.argv.pop(1)).resolve()
PROJECT = pathlib.Path(__file__).resolve().parent.parent / "consumer"


class Consumer(unittest.TestCase):
    def run_command(self, *command, environment=None):
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
        self.assertEqual(done.returncode, 0, f"{command}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def test_a_project_outside_the_tree_trains_a_step(self):
        with tempfile.TemporaryDirectory() as scratch:
            scratch = pathlib.Path(scratch)
            prefix, project, build = scratch / "prefix", scratch / "project", scratch / "build"
            self.run_command("cmake", "--install", BUILD, "--prefix", prefix)
            shutil.copytree(PROJECT, project)  # so that no header of the sources can be found beside it
            self.run_command("cmake", "-S", project, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}",
                             "-DCMAKE_BUILD_TYPE=Release")
            self.run_command("cmake", "--build", build)
            self.assertRegex(self.run_command(build / "consumer"), r"^loss \d+\.\d+\n$")
            # The installed programs run, too, and find nothing missing.
            environment = dict(os.environ, PATH=f"{prefix / 'bin'}:{os.environ['PATH']}")
            self.assertIn("Usage: baton init", self.run_command("baton", "init", "--help", environment=environment))


if __name__ == "__main__":
    unittest.main(verbosity=2)
