#!/usr/bin/env python3
"""Tests tools/from-pytorch: what it reads and what it refuses. Files of torch.save are made here without PyTorch, and
with it where it is installed."""
import collections
import contextlib
import importlib.machinery
import importlib.util
import io
import json
import os
import pathlib
import pickle
import random
import subprocess
import sys
import tempfile
import types
import unittest
import unittest.mock
import zipfile

TOOLS = pathlib.Path(__file__).resolve().parents[2] / "tools"
SCRIPT = TOOLS / "from-pytorch"

try:
    import numpy as np
except ImportError:  # as tools/from-pytorch does
    if sys.executable != "/usr/bin/python3" and os.access("/usr/bin/python3", os.X_OK):
        os.execv("/usr/bin/python3", ["/usr/bin/python3", *sys.argv])
    sys.exit("from_pytorch_test: needs numpy; tools/setup installs it")

sys.path.insert(0, str(TOOLS))
try:
    import baton_files
    from safetensors.numpy import load_file, save_file
    MISSING = None
except ImportError as error:
    MISSING = str(error)

LENET5 = {"conv1.weight": (20, 1, 5, 5), "conv1.bias": (20,), "conv2.weight": (50, 20, 5, 5), "conv2.bias": (50,),
          "fc1.weight": (500, 800), "fc1.bias": (500,), "fc2.weight": (10, 500), "fc2.bias": (10,)}
SEQUENTIAL = {"0": "conv1", "3": "conv2", "7": "fc1", "9": "fc2"}  # names that a torch.nn.Sequential gives
MLP = {"fc1.weight": (6, 8), "fc1.bias": (6,), "fc2.weight": (5, 6), "fc2.bias": (5,), "fc3.weight": (3, 5),
       "fc3.bias": (3,)}


def numbers(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def bfloat16_bits(values):
    return (values.view(np.uint32) >> 16).astype(np.uint16)


# ------------------------------------------------------------------------------------- what torch.save would write
# Stand-ins for the objects that a pickle of PyTorch names; registered as modules only while something is pickled.
def _rebuild_tensor_v2(*_):
    raise AssertionError("only named, never called")


def _rebuild_parameter(*_):
    raise AssertionError("only named, never called")


STORAGES = {np.dtype("float32"): "FloatStorage", np.dtype("float64"): "DoubleStorage", np.dtype("float16"):
            "HalfStorage", np.dtype("uint16"): "BFloat16Storage", np.dtype("int64"): "LongStorage"}
TORCH, UTILS = types.ModuleType("torch"), types.ModuleType("torch._utils")
TORCH._utils = UTILS
for function in (_rebuild_tensor_v2, _rebuild_parameter):
    function.__module__ = "torch._utils"
    setattr(UTILS, function.__name__, function)
for storage_name in STORAGES.values():
    setattr(TORCH, storage_name, type(storage_name, (), {"__module__": "torch"}))


class Storage:
    def __init__(self, values):
        self.values = np.asarray(values)  # uint16: the bits of bfloat16


class Tensor:
    """A view of a storage."""

    def __init__(self, values, shape=None, strides=None, offset=0):
        self.storage = values if isinstance(values, Storage) else Storage(np.ascontiguousarray(values).ravel())
        self.shape = np.shape(values) if shape is None else shape
        self.strides, self.offset = strides, offset
        if strides is None:
            self.strides = tuple(int(np.prod(self.shape[i + 1:])) for i in range(len(self.shape)))

    def __reduce__(self):
        return _rebuild_tensor_v2, (self.storage, self.offset, self.shape, self.strides, False,
                                    collections.OrderedDict())


class Parameter(Tensor):
    def __reduce__(self):
        return _rebuild_parameter, (Tensor(self.storage, self.shape, self.strides, self.offset), True,
                                    collections.OrderedDict())


class Pickler(pickle.Pickler):
    def __init__(self, file, protocol):
        super().__init__(file, protocol)
        self.storages = []

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        if obj not in self.storages:
            self.storages.append(obj)
        kind = getattr(TORCH, STORAGES[obj.values.dtype])
        return "storage", kind, str(self.storages.index(obj)), "cpu", obj.values.size


def pickled(content, protocol=2):
    """(data.pkl, the storages' bytes)."""
    file = io.BytesIO()
    with unittest.mock.patch.dict(sys.modules, {"torch": TORCH, "torch._utils": UTILS}):
        pickler = Pickler(file, protocol)
        pickler.dump(content)
    return file.getvalue(), [storage.values.tobytes() for storage in pickler.storages]


def write_zip(path, data, storages, **more):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for key, values in enumerate(storages):
            archive.writestr(f"archive/data/{key}", values)
        for name, text in {"version": "3\n", **more}.items():
            archive.writestr(f"archive/{name}", text)


def torch_save(path, content, **more):
    write_zip(path, *pickled(content), **more)


def state_dict(arrays):
    state = collections.OrderedDict((name, Tensor(values)) for name, values in arrays.items())
    state._metadata = collections.OrderedDict({"": {"version": 1}})
    return state


def renamed(arrays, names):
    """Layers under other names."""
    old = {new: old for old, new in names.items()}
    return {f"{old[name.split('.')[0]]}.{name.split('.')[1]}": values for name, values in arrays.items()}


class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        if MISSING:
            raise unittest.SkipTest(MISSING)
        loader = importlib.machinery.SourceFileLoader("from_pytorch", str(SCRIPT))
        cls.script = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
        with unittest.mock.patch.object(sys, "dont_write_bytecode", True):
            loader.exec_module(cls.script)

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.input, self.out = self.folder / "net.pt", self.folder / "net.safetensors"

    def run_script(self, *arguments):
        """(exit status, stdout, stderr), in this process."""
        out, err = io.StringIO(), io.StringIO()
        with unittest.mock.patch.object(sys, "argv", ["from-pytorch", *map(str, arguments)]), \
                contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = self.script.main()
            except SystemExit as stop:
                code = stop.code
        return code, out.getvalue(), err.getvalue()

    def converted(self, *arguments):
        """The tensors and what was said."""
        self.out.unlink(missing_ok=True)
        code, said, err = self.run_script(self.input, "--out", self.out, *arguments)
        self.assertEqual((code, err), (0, ""))
        return load_file(self.out), said

    def refused(self, pattern, *arguments):
        self.out.unlink(missing_ok=True)
        code, said, err = self.run_script(self.input, "--out", self.out, *arguments)
        self.assertEqual((code, said), (2, ""), err)
        self.assertRegex(err, pattern)
        self.assertTrue(err.startswith(f"from-pytorch: {self.input}: "), err)
        self.assertFalse(self.out.exists())
        self.assertEqual(list(self.folder.glob("*.part")), [])
        return err

    def same(self, found, expected):
        self.assertEqual(sorted(found), sorted(expected))
        for name, values in expected.items():
            self.assertEqual(found[name].dtype, np.float32)
            np.testing.assert_array_equal(found[name], values, name)


class Reading(Case):
    def test_state_dict(self):
        arrays = numbers(LENET5)
        torch_save(self.input, state_dict(arrays))
        found, said = self.converted("--architecture", "lenet5")
        self.same(found, arrays)
        self.assertEqual(said, f"{self.out}: 8 tensors, 431,080 parameters, lenet5 with 10 classes\n")
        _, metadata, _ = baton_files.read_tensors(self.out)
        self.assertEqual(metadata, {"format": "baton-pretrained-1", "architecture": "lenet5"})
        self.assertEqual(sorted(p.name for p in self.folder.iterdir()), ["net.pt", "net.safetensors"])

    def test_checkpoints(self):
        arrays = numbers(MLP)
        optimizer = {"state": {0: {"step": 3, "exp_avg": Tensor(np.ones(4, np.float32))}}, "param_groups": [{"lr": .1}]}
        for key in ("state_dict", "model", "model_state_dict"):
            with self.subTest(key=key):
                torch_save(self.input, {"epoch": 4, "optimizer": optimizer,
                                        key: state_dict({"module." + n: v for n, v in arrays.items()})})
                found, said = self.converted()
                self.same(found, arrays)
                self.assertIn(f'under "{key}"', said)
                self.assertIn('Dropped from every name: "module."', said)
        torch_save(self.input, {"epoch": 4, "optimizer": optimizer})
        self.refused("holds a dict of epoch, optimizer, and no state dict")
        torch_save(self.input, [1, 2])
        self.refused("holds a list, and no state dict")

    def test_prefixes_go_only_where_all_have_them(self):
        arrays = numbers({"model.fc1.weight": (2, 3), "head.weight": (2, 2)})
        torch_save(self.input, state_dict(arrays))
        self.same(self.converted()[0], arrays)
        torch_save(self.input, state_dict({"module._orig_mod.model." + n: v for n, v in numbers(MLP).items()}))
        self.same(self.converted("--architecture", "mlp")[0], numbers(MLP))

    def test_views(self):
        base = np.arange(60, dtype=np.float32)
        storage = Storage(base)
        torch_save(self.input, {
            "transposed": Tensor(storage, (4, 3), (1, 4), 5),
            "part": Tensor(storage, (2, 3, 2), (20, 5, 2), 7),
            "parameter": Parameter(storage, (3,), (1,), 57),
            "repeated": Tensor(storage, (3, 2), (0, 1), 10),
            "scalar": Tensor(storage, (), (), 59),
            "empty": Tensor(storage, (0, 3), (3, 1), 60),
            "reversed_axes": Tensor(np.arange(24.), (2, 3, 4), (1, 2, 6))})
        found, _ = self.converted()
        self.same(found, {
            "transposed": base[5:17].reshape(3, 4).T,
            "part": np.array([[[7 + 20 * i + 5 * j + 2 * k for k in range(2)] for j in range(3)] for i in range(2)]),
            "parameter": base[57:], "repeated": np.tile(base[10:12], (3, 1)), "scalar": base[59],
            "empty": np.zeros((0, 3)), "reversed_axes": np.arange(24.).reshape(4, 3, 2).T})

    def test_dtypes(self):
        values = np.float32([1.5, -2.25, 3e-5, 0])
        torch_save(self.input, {"half": Tensor(values.astype(np.float16)), "double": Tensor(values.astype(np.float64)),
                                "brain": Tensor(bfloat16_bits(values)), "count": Tensor(np.int64([3])),
                                "words": "not a tensor"})
        found, said = self.converted()
        self.same(found, {"half": values.astype(np.float16), "double": values,
                          "brain": (values.view(np.uint32) & 0xFFFF0000).view(np.float32)})
        self.assertIn("Left out: count [1], int64\n", said)
        self.assertIn("Left out: words, which is no tensor\n", said)
        self.assertIn("--architecture", said)
        code, listed, _ = self.run_script(self.input, "--list")
        self.assertEqual((code, [line.split() for line in listed.splitlines()]),
                         (0, [["half", "float16", "[4]"], ["double", "float64", "[4]"], ["brain", "bfloat16", "[4]"],
                              ["count", "int64", "[1]"]]))

    def test_other_formats(self):
        arrays = numbers(MLP)
        self.input = self.folder / "net.npz"
        np.savez(self.input, steps=np.int64(3), **arrays)
        self.same(self.converted("--architecture", "mlp")[0], arrays)
        np.savez(self.input, weird=np.array([{}], object))
        self.refused("npz")
        self.input = self.folder / "other.safetensors"
        brain = bfloat16_bits(arrays["fc2.weight"])
        stored = {name: ("F32", value) for name, value in arrays.items()}
        stored["fc2.weight"] = ("BF16", brain)
        header, data = {}, b""
        for name, (dtype, value) in stored.items():  # by hand, for numpy has no bfloat16
            header[name] = {"dtype": dtype, "shape": value.shape, "data_offsets": [len(data), len(data) + value.nbytes]}
            data += value.tobytes()
        text = json.dumps(header).encode()
        self.input.write_bytes(len(text).to_bytes(8, "little") + text + data)
        arrays["fc2.weight"] = (brain.astype(np.uint32) << 16).view(np.float32)
        self.same(self.converted("--architecture", "mlp")[0], arrays)
        self.assertIn("bfloat16", self.run_script(self.input, "--list")[1])
        self.input.write_bytes(self.input.read_bytes()[:-5])
        self.refused("cut short")

    def test_as_a_program(self):
        torch_save(self.input, state_dict(numbers(MLP)))
        done = subprocess.run([sys.executable, SCRIPT, self.input, "--architecture", "mlp", "--out", self.out],
                              capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("mlp-8-6-5-3 with 3 classes", done.stdout)
        self.assertIn("examples:", subprocess.run([SCRIPT, "--help"], capture_output=True, text=True).stdout)


class Matching(Case):
    def test_order(self):
        arrays = numbers(LENET5)
        torch_save(self.input, state_dict(renamed(arrays, SEQUENTIAL)))
        found, said = self.converted("--architecture", "lenet5")
        self.same(found, arrays)
        self.assertIn("  0.weight -> conv1.weight [20, 1, 5, 5]\n", said)
        self.assertIn("  9.bias -> fc2.bias [10]\n", said)
        # Every order but the architecture's is refused, and so are renames that leave other names.
        backwards = dict(reversed(list(renamed(arrays, SEQUENTIAL).items())))
        torch_save(self.input, state_dict(backwards))
        self.refused(r"(?s)missing: conv1.weight \[20, 1, 5, 5\].*first to differ in the order of the file: 9.bias "
                     r"\[10\] where conv1.weight \[20, 1, 5, 5\] is expected", "--architecture", "lenet5")
        torch_save(self.input, state_dict(renamed(arrays, SEQUENTIAL)))
        self.refused("missing: conv2.weight", "--architecture", "lenet5", "--rename", "0=conv1")

    def test_means_of_a_model_of_an_earlier_version(self):
        self.input = self.folder / "before.safetensors"
        arrays = numbers(MLP)
        save_file({f"{name}.{what}": values if what == "mean" else values * 0 for name, values in arrays.items()
                   for what in ("mean", "log_std")}, self.input, {"format": "baton-posterior-1", "method": "bgd"})
        found, said = self.converted("--architecture", "mlp")
        self.same(found, arrays)
        self.assertIn("means of a model that an earlier Baton saved", said)

    def test_order_of_safetensors_is_by_name(self):
        arrays = numbers(LENET5)
        self.input = self.folder / "features.safetensors"
        names = {"features.2": "conv1", "features.10": "conv2", "classifier.1": "fc1", "classifier.4": "fc2"}
        save_file({f"{old}.{leaf}": arrays[f"{new}.{leaf}"] for old, new in names.items()
                   for leaf in ("weight", "bias")}, self.input)
        self.same(self.converted("--architecture", "lenet5")[0], arrays)

    def test_renames(self):
        arrays = numbers(LENET5)
        torch_save(self.input, state_dict(renamed(arrays, {"body.0": "conv1", "body.01": "conv2", "a.fc": "fc1",
                                                           "a": "fc2"})))
        rules = [word for rule in ("body.0=conv1", "body.01=conv2", "a=fc2", "a.fc=fc1")
                 for word in ("--rename", rule)]
        self.same(self.converted("--architecture", "lenet5", *rules)[0], arrays)
        self.assertIn("body.01.weight", self.converted("--rename", "body.0=conv1")[0])
        self.refused("no tensor 'c' or under it; there are body.0.weight", "--rename", "c=d")
        self.refused("two tensors the name 'x.weight'", "--rename", "body.0=x", "--rename", "body.01=x")
        torch_save(self.input, state_dict({"backbone." + n: v for n, v in arrays.items()}))
        self.same(self.converted("--rename", "backbone=")[0], arrays)
        self.same(self.converted("--rename", "backbone.=", "--rename", "backbone.fc2.bias=last")[0],
                  {"last" if n == "fc2.bias" else n: v for n, v in arrays.items()})
        for rule in ("nothing", "=x"):
            self.assertEqual(self.run_script(self.input, "--out", self.out, "--rename", rule)[0], 2)

    def test_says_what_is_wrong(self):
        shapes = {**LENET5, "fc1.weight": (500, 1250), "bn1.running_mean": (20,)}
        del shapes["conv2.bias"]
        torch_save(self.input, state_dict(numbers(shapes)))
        said = self.refused("does not match lenet5", "--architecture", "lenet5")
        self.assertEqual(said.splitlines()[1:-1],
                         ["  missing: conv2.bias [50]", "  different: fc1.weight is [500, 1250], expected [500, 800]",
                          "  not in lenet5: bn1.running_mean [20]"])

    def test_architectures(self):
        """Names, shapes and sizes as tools/baton/README.md has them; any number of classes."""
        for name, weights, biases in (("lenet5", 430500, 580), ("3conv3fc", 2420400, 2234), ("vgg11", 9222848, 2762)):
            shapes = self.script.expected(name, {"x": np.zeros((10, 500))})  # of tools/networks.json
            self.assertEqual(sum(np.prod(s) for s in shapes.values() if len(s) > 1), weights)
            self.assertEqual(sum(np.prod(s) for s in shapes.values() if len(s) == 1), biases)
        torch_save(self.input, state_dict(numbers({**LENET5, "fc2.weight": (26, 500), "fc2.bias": (26,)})))
        self.assertIn("with 26 classes", self.converted("--architecture", "lenet5")[1])
        for classes in (1, 257):
            shapes = {**LENET5, "fc2.weight": (classes, 500), "fc2.bias": (classes,)}
            torch_save(self.input, state_dict(numbers(shapes)))
            self.refused(f"has {classes} outputs", "--architecture", "lenet5")
        torch_save(self.input, state_dict(numbers({**LENET5, "fc2.bias": (26,)})))
        self.refused(r"fc2.bias is \[26\], expected \[10\]", "--architecture", "lenet5")

    def test_mlp(self):
        arrays = numbers(MLP)
        torch_save(self.input, state_dict(dict(reversed(arrays.items()))))  # named: the order does not matter
        self.same(self.converted("--architecture", "mlp")[0], arrays)
        self.assertEqual(baton_files.read_tensors(self.out)[1]["architecture"], "mlp-8-6-5-3")
        torch_save(self.input, state_dict(renamed(arrays, {"1": "fc1", "3": "fc2", "5": "fc3"})))
        self.same(self.converted("--architecture", "mlp")[0], arrays)
        torch_save(self.input, state_dict(numbers({**MLP, "fc2.weight": (5, 7)})))
        self.refused(r"fc2.weight is \[5, 7\], expected \[5, 6\]", "--architecture", "mlp")
        for shapes in ({"fc1.weight": (3, 8), "fc1.bias": (3,)}, {"fc1.bias": (3,)}):
            torch_save(self.input, state_dict(numbers(shapes)))
            self.refused("matrix", "--architecture", "mlp")


class Call:
    """Pickled as a call, which a plain pickle.load would make."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Refusing(Case):
    def test_code_is_not_run(self):
        flag = self.folder / "flag"
        touch = f"touch {flag}"
        state = state_dict(numbers(MLP))
        for evil in (Call(os.system, touch), Call(eval, f"open({str(flag)!r}, 'w')"),
                     Call(subprocess.getoutput, touch), Call(getattr, collections.OrderedDict, "fromkeys")):
            for content in (evil, {"state_dict": state, "extra": evil}, {**state, "fc9.weight": evil}):
                for protocol in range(1, 6):
                    write_zip(self.input, *pickled(content, protocol))
                    self.refused(r"holds \w+\.\w+; only plain tensors are read")
        for name in (b"OrderedDict.fromkeys", b"namedtuple"):  # a dotted name would be looked up in a known class
            write_zip(self.input, b"\x80\x04\x8c\x0bcollections\x8c" + bytes([len(name)]) + name + b"\x93.", [])
            self.refused("holds collections." + name.decode())
        self.assertFalse(flag.exists())

    def test_damaged(self):
        torch_save(self.input, state_dict(numbers(MLP)))
        whole = self.input.read_bytes()
        for cut in (*range(0, 40), *range(40, len(whole), 37), len(whole) - 1):
            self.input.write_bytes(whole[:cut])
            self.refused(r"\A[^\n]+\n\Z")
        self.input.write_bytes(whole.replace(numbers(MLP)["fc2.bias"].tobytes(), b"?" * 20))
        self.refused("damaged.*CRC")
        self.input = self.folder / "none.pt"
        self.refused("No such file")

    def test_damaged_pickles(self):
        data, storages = pickled(state_dict(numbers(MLP)))
        rng = random.Random(0)
        codes = collections.Counter()
        for _ in range(1500):
            changed = bytearray(data)
            for _ in range(rng.choice((1, 1, 2, 5))):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            write_zip(self.input, bytes(changed), storages)
            code, _, err = self.run_script(self.input, "--list")
            codes[code] += 1
            self.assertEqual(code == 0, not err, err)
        write_zip(self.input, b"\x80\x02}r\xff\xff\xff\xff.", [])  # would take 64 GiB
        self.refused("impossible number")
        self.assertEqual(sorted(codes), [0, 2])  # every other is an exception, which ends the test

    def test_impossible_tensors(self):
        storage = Storage(np.arange(10, dtype=np.float32))
        for shape, strides, offset in (((11,), (1,), 0), ((2, 5), (6, 1), 0), ((3,), (1,), 8), ((2,), (-1,), 5),
                                       ((-1,), (1,), 0), ((1,), (1,), -1), ((2, 2), (1,), 0), ((1 << 40,), (0,), 0),
                                       ((1 << 62, 4), (1 << 62, 1), 0), ((2.0,), (1,), 0), (((1,),), (1,), 0)):
            with self.subTest(shape=shape, strides=strides, offset=offset):
                torch_save(self.input, {"x": Tensor(storage, shape, strides, offset)})
                self.refused("damaged, or not a file of torch.save")
        data, storages = pickled({"x": Tensor(storage)})
        for fewer in ([storages[0][:-4]], [storages[0][:-1]], []):
            write_zip(self.input, data, fewer)
            self.refused("damaged")

    def test_values_that_are_not_finite(self):
        for value in (np.nan, np.inf, 1e39):
            torch_save(self.input, {"x": Tensor(np.array([1, value]))})
            self.refused("tensor 'x' has values that are not finite")

    def test_other_files(self):
        torch_save(self.input, state_dict(numbers(MLP)), **{"constants.pkl": "x"})
        self.refused("TorchScript")
        torch_save(self.input, state_dict(numbers(MLP)), byteorder="big")
        self.refused("big-endian")
        torch_save(self.input, state_dict(numbers(MLP)), byteorder="little")
        self.converted()
        with zipfile.ZipFile(self.input, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", pickled({})[0])
        self.refused("compressed")
        self.input.write_bytes(pickle.dumps(0x1950a86a20f9469cfc6c))
        self.refused("since PyTorch 1.6")
        np.savez(self.folder / "net.npz", x=np.zeros(3))
        self.input.write_bytes((self.folder / "net.npz").read_bytes())
        self.refused("no data.pkl")
        torch_save(self.input, {"count": Tensor(np.int64([3]))})
        self.refused("no floating-point tensor")

    def test_outputs(self):
        torch_save(self.input, state_dict(numbers(MLP)))
        before = self.input.read_bytes()
        for out, words in ((self.input, "the input itself"), (self.folder, "a folder")):
            code, _, err = self.run_script(self.input, "--out", out)
            self.assertEqual(code, 2)
            self.assertIn(words, err)
        self.assertEqual(self.input.read_bytes(), before)
        self.out.write_text("old")
        os.link(self.out, self.folder / "link")  # another name of the old file, which is replaced, not written into
        self.assertEqual(self.run_script(self.input, "--out", self.out)[0], 0)
        self.assertEqual((self.folder / "link").read_text(), "old")
        self.assertEqual(self.run_script(self.input, "--out", self.input / "under" / "a.safetensors")[0], 1)
        self.assertEqual(self.run_script(self.input, "--out", self.folder / "new" / "a.safetensors")[0], 0)
        self.assertEqual(self.run_script(self.input)[0], 2)


class Packages(unittest.TestCase):
    def test_missing(self):
        words = ("needs the Python packages numpy and safetensors: tools/setup installs them into build/python; "
                 "or pip install safetensors numpy\n")
        code = "import sys, runpy; sys.modules['safetensors'] = None; sys.argv = ['from-pytorch', 'x', '--list']\n" \
               f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(TOOLS)})
        self.assertEqual((done.returncode, done.stdout, done.stderr), (2, "", "from-pytorch: " + words))


WRITE_WITH_TORCH = """
import sys, torch
from collections import OrderedDict
folder = sys.argv[1]
torch.manual_seed(1)
net = torch.nn.Sequential(OrderedDict(conv1=torch.nn.Conv2d(1, 20, 5), bn=torch.nn.BatchNorm2d(20)))
plain = torch.nn.Sequential(torch.nn.Conv2d(1, 20, 5), torch.nn.ReLU(), torch.nn.Conv2d(20, 50, 5),
                            torch.nn.Flatten(), torch.nn.Linear(800, 500), torch.nn.Linear(500, 10))
base = torch.arange(24.).reshape(2, 3, 4)
views = {"t": base.permute(2, 0, 1), "s": base[:, 1:, ::2], "p": torch.nn.Parameter(base[1]),
         "e": base[0, 0, 1].expand(3), "z": torch.zeros(0, 3), "half": base.half(),
         "brain": base.bfloat16() / 3, "double": base.double() / 3, "long": base.long(), "bool": base > 3}
torch.save(net.state_dict(), folder + "/net.pt")
torch.save({"epoch": 1, "model_state_dict": torch.nn.DataParallel(plain).state_dict(),
            "optimizer_state_dict": torch.optim.Adam(plain.parameters()).state_dict()}, folder + "/plain.pth")
torch.save(views, folder + "/views.pt")
torch.save(plain, folder + "/whole.pt")
torch.save(plain.state_dict(), folder + "/old.pt", _use_new_zipfile_serialization=False)
torch.jit.script(plain).save(folder + "/script.pt")
import numpy
for name, state in (("net", net.state_dict()), ("plain", plain.state_dict()), ("views", views)):
    numpy.savez(f"{folder}/{name}.npz", **{k: v.detach().float().numpy() for k, v in state.items()})
"""


@unittest.skipUnless(importlib.util.find_spec("torch"), "PyTorch is not installed")
class WithTorch(Case):
    def test_files_of_torch_save(self):
        done = subprocess.run([sys.executable, "-c", WRITE_WITH_TORCH, self.folder], capture_output=True, text=True)
        if "No module named" in done.stderr:
            self.skipTest(done.stderr.splitlines()[-1])
        self.assertEqual(done.returncode, 0, done.stderr)

        def expected(name):
            with np.load(self.folder / f"{name}.npz") as file:
                return dict(file)
        found, said = self.converted()
        wanted = expected("net")
        del wanted["bn.num_batches_tracked"]
        self.same(found, wanted)
        self.assertIn("Left out: bn.num_batches_tracked [], int64\n", said)
        self.refused("no matrix of weights", "--architecture", "lenet5")
        self.input = self.folder / "plain.pth"
        names = {"0": "conv1", "2": "conv2", "4": "fc1", "5": "fc2"}
        self.same(renamed(self.converted("--architecture", "lenet5")[0], names), expected("plain"))
        self.input = self.folder / "views.pt"
        wanted = expected("views")
        del wanted["long"], wanted["bool"]
        self.same(self.converted()[0], wanted)
        for name, pattern in (("whole", r"torch\.nn\.modules"), ("old", "since PyTorch 1.6"),
                              ("script", "TorchScript")):
            self.input = self.folder / f"{name}.pt"
            self.refused(pattern)


if __name__ == "__main__":
    unittest.main(verbosity=2)  # a skipped test says why
