"""Where the programs, their libraries, the data and the tools of this machine are."""
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

PROGRAMS = ["baton_tests", "first_light", "step_timing", "micro", "bil_mnist", "baton", "bgd_mnist",
            "bgd_permuted_mnist", "laplace_update", "bil_cifar10", "bil_cifar5p5", "bgd_cifar10", "bgd_cifar_tasks"]
FOLDERS = {"baton_tests": "tests", "baton": "bin"}  # of the build; else bench
MNIST = [f"{part}-{content}-ubyte" for part in ("train", "t10k") for content in ("images-idx3", "labels-idx1")]
LABELS = {"gpu": "measured on a GPU", "host": "host CPU, not a GPU",
          "ptx": "executed as PTX by an interpreter on a CPU, not on a GPU"}


class Place:
    """A checkout with its build, or an unpacked bundle, which is laid out in the same way.

    mode: "gpu" and "ptx" run the programs of the cuda preset, "host" those of the host preset.
    """

    def __init__(self, root, mode):
        self.root, self.mode = root, mode
        self.build = root / "build" / ("host" if mode == "host" else "cuda")
        manifest = root / "manifest.json"
        self.manifest = json.loads(manifest.read_text()) if manifest.exists() else {}
        self.environment = {}
        self.given = {"LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}  # PyTorch brings libraries of its own
        if mode != "gpu":  # threads that wait for one another beside other jobs are many times slower
            self.environment.update(OMP_WAIT_POLICY="passive")
        self.find_libraries()

    def program(self, name):
        """The path of a program, whether it is there or not."""
        return self.build / FOLDERS.get(name, "bench") / name

    @property
    def commit(self):
        if self.manifest:
            return self.manifest.get("commit", "unknown")
        return git_commit(self.root)

    # ---------------------------------------------------------------------------------------------- shared libraries
    def unresolved(self, program):
        """The shared libraries that the loader does not find for a program. OSError when it cannot be started."""
        words = [str(self.program(program))]
        done = subprocess.run(words, env={**os.environ, **self.environment, "LD_TRACE_LOADED_OBJECTS": "1"},
                              capture_output=True, text=True, timeout=60)
        return re.findall(r"^\s*(\S+) => not found", done.stdout, re.MULTILINE)

    def find_libraries(self):
        """Sets LD_LIBRARY_PATH so that the loader finds the libraries of the CUDA toolkit: in `ptx` beside the programs
        (--ptx: the interpreter and its stand-ins), where it looks anyway, in toolkits, in Python's packages."""
        self.libraries = {}
        folders = [str(self.build / "ptx")] if self.mode == "ptx" else []
        given = [f for f in self.given["LD_LIBRARY_PATH"].split(":") if f]
        self.environment["LD_LIBRARY_PATH"] = ":".join(folders + given)
        for _ in range(4):  # a library that is found now may need others
            try:
                missing = [name for program in PROGRAMS if self.program(program).exists()
                           for name in self.unresolved(program)]
            except (OSError, subprocess.SubprocessError):
                return
            new = {name: find_library(name) for name in set(missing)}
            self.libraries.update(new)
            added = [f for f in dict.fromkeys(str(f) for f in new.values() if f) if f not in folders]
            if not added:
                break
            folders += added
            self.environment["LD_LIBRARY_PATH"] = ":".join(folders + given)

    # -------------------------------------------------------------------------------------------------------- tools
    @functools.cached_property
    def torch_python(self):
        """A Python that has PyTorch, or None."""
        own = str(self.root / "build" / "peers" / "bin" / "python")  # of tools/setup --peers
        for python in dict.fromkeys([own, shutil.which("python3"), sys.executable, "/usr/bin/python3"]):
            if python and os.access(python, os.X_OK):
                try:
                    found = subprocess.run([python, "-c", "import torch"], capture_output=True, timeout=120)
                except subprocess.TimeoutExpired:
                    continue
                if found.returncode == 0:
                    return python
        return None

    @property
    def goldens(self):
        """The folder of the goldens, beside the test program."""
        return self.build / "tests" / "data" / "goldens"

    def predictions(self):
        """What tools/gpu-cost predicts, as its --json wrote it, or None."""
        path = self.root / "gpu-cost.json"
        if not path.exists():
            path = self.build / "gpu-cost.json"
        return json.loads(path.read_text()) if path.exists() else None

    def data_folder(self):
        """The folder that holds mnist, as the programs look for it from the root, or None."""
        return find_mnist([os.environ.get("BATON_DATA"), self.root / "data"])


def git_commit(root):
    """The commit of a checkout, with "+changes" where files under version control differ from it."""
    def git(*words):
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True).stdout.strip()
    try:
        commit = git("rev-parse", "--short=10", "HEAD")
        return commit + ("+changes" if commit and git("status", "--porcelain", "-uno") else "") or "unknown"
    except OSError:
        return "unknown"


def toolkit_folders():
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda",
             *map(str, sorted(pathlib.Path("/usr/local").glob("cuda-*"), reverse=True))]
    return [pathlib.Path(root) for root in dict.fromkeys(roots) if root]


def find_tool(name):
    """A program of the CUDA toolkit or its profilers, or None."""
    if found := shutil.which(name):
        return found
    places = [folder / place for folder in toolkit_folders() for place in ("bin", "compute-sanitizer")]
    places += sorted(pathlib.Path("/opt/nvidia").glob("nsight-*/*"), reverse=True)
    return next((str(place / name) for place in places if os.access(place / name, os.X_OK)), None)


@functools.cache
def library_folders():
    folders = [folder / lib for folder in toolkit_folders() for lib in ("lib64", "lib", "targets/x86_64-linux/lib")]
    for python in dict.fromkeys([shutil.which("python3"), sys.executable, "/usr/bin/python3"]):
        if not python:
            continue
        ask = "import json, sys; print(json.dumps(sys.path))"
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True)
        paths = json.loads(done.stdout) if done.returncode == 0 else []
        for path in paths:
            if path.endswith("-packages"):
                folders += sorted(pathlib.Path(path).glob("nvidia/*/lib"))
    return folders + [pathlib.Path("/usr/lib/x86_64-linux-gnu")]


def find_library(name):
    return next((folder for folder in library_folders() if (folder / name).exists()), None)


def find_mnist(places):
    """The first of these folders that holds MNIST, itself or in its sub-folder mnist; None when none does."""
    for place in places:
        if place is None:
            continue
        for folder in (pathlib.Path(place), pathlib.Path(place) / "mnist"):
            if all(mnist_file(folder, name) for name in MNIST):
                return folder
    return None


def mnist_file(folder, name):
    dotted = name.replace("-idx", ".idx")
    names = [stem + packed for stem in (name, dotted) for packed in ("", ".gz", ".xz")]
    return next((folder / n for n in names if (folder / n).is_file()), None)
