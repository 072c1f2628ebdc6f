"""Reads Baton's files from Python: models (posteriors over a network's weights) and predictions.

    import sys; sys.path.insert(0, "tools")
    import baton_files

    model = baton_files.load_model("model.safetensors")
    model.names                        # ["conv1.weight", "conv1.bias", ...], PyTorch's names and layouts
    model.mean("conv1.weight")         # float32 [20, 1, 5, 5]; std() alike
    network.load_state_dict({name: torch.from_numpy(w) for name, w in model.sample(rng=0).items()})

    predictions = baton_files.read_predictions("predictions.csv")
    predictions["probability"]         # [images, classes]

Needs numpy and safetensors only.
"""
import csv
import json
import pathlib
import re
import sys

NEEDS = ("needs the Python packages numpy and safetensors: tools/setup installs them into build/python; "
         "or pip install safetensors numpy")

_installed = pathlib.Path(__file__).resolve().parents[1] / "build" / "python"
if _installed.is_dir() and str(_installed) not in sys.path:
    sys.path.append(str(_installed))
try:
    import numpy as np
    import safetensors
except ImportError as error:
    raise ImportError(f"baton_files {NEEDS}") from error


class FileError(ValueError):
    """A file that is not there, is damaged, or is not what it should be; the message names it."""


# ------------------------------------------------------------------------------------------------- safetensors files
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
           "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?"}


def natural_key(name):
    """Orders layer by layer: conv2 before conv10, and weight before bias."""
    layer, _, leaf = name.rpartition(".")
    parts = [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split("([0-9]+)", layer)]
    return parts, leaf != "weight", leaf


def float_of_bfloat16(bits):
    """float32 from uint16: a bfloat16 is the upper half of a float."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def read_tensors(path):
    """({name: array}, in natural order, the metadata, {name: dtype as stored}) of a safetensors file. numpy has no
    bfloat16: it comes as float32, exactly."""
    path = pathlib.Path(path)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
        stored = safetensors.deserialize(path.read_bytes())
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise FileError(f"{path}: not a safetensors file, or cut short ({error})") from error
    tensors, dtypes = {}, {}
    for name, tensor in sorted(stored, key=lambda item: natural_key(item[0])):
        kind = tensor["dtype"]
        if kind not in _DTYPES:
            raise FileError(f"{path}: tensor '{name}' has the unknown dtype {kind}")
        values = np.frombuffer(tensor["data"], _DTYPES[kind])
        dtypes[name] = "bfloat16" if kind == "BF16" else str(values.dtype)
        tensors[name] = (float_of_bfloat16(values) if kind == "BF16" else values).reshape(tensor["shape"])
    return tensors, metadata, dtypes


# ------------------------------------------------------------------------------------------------------------ models
def load_model(path):
    """A model that Baton wrote: `baton`, or a paper program."""
    tensors, metadata, _ = read_tensors(path)
    if metadata.get("format") not in ("baton-model-1", "baton-model-2"):
        raise FileError(f"{path}: not a model of Baton: its format is {metadata.get('format')!r}, not 'baton-model-2'")
    return Model(str(path), tensors, metadata)


def _parsed(path, key, text):
    """JSON, or plain text such as the format and the kind."""
    try:
        return json.loads(text)
    except ValueError as error:
        if text[:1] in ("{", "["):
            raise FileError(f"{path}: the metadata's {key!r} is not JSON ({error})") from error
        return text


UNCERTAIN = ("ffg", "cfg", "mnf", "bgd", "bbb")  # the kinds that are no point estimates


class Model:
    """A posterior over a network's weights. Parameters have PyTorch's names and layouts (convolutions [out, in, height,
    width], dense layers [out, in]).

    metadata      {key: value}; JSON values are parsed
    architecture  {"name": "lenet5", "classes": 10, ...}
    kind          of the posterior: "ffg", "cfg", "mnf", "bgd", "bbb", or a point estimate such as "ft" and "sgd"
    tensors       {name: array} as they lie in the file: "conv1.weight.mean", "conv1.weight.log_std", ...
    names         the parameters, first layer first
    """

    def __init__(self, path, tensors, metadata):
        self.path, self.tensors = path, tensors
        self.metadata = {key: _parsed(path, key, text) for key, text in metadata.items()}
        architecture = self.metadata.get("architecture", {})
        self.architecture = architecture if isinstance(architecture, dict) else {"name": architecture}
        self.kind = self.metadata.get("kind") or self.metadata.get("family", "ft")  # format baton-model-1: family
        self.names = sorted((name[:-len(".mean")] for name in tensors if name.endswith(".mean")), key=natural_key)
        self._noise = {}
        if not self.names:
            raise FileError(f"{path}: holds no tensor \"<parameter>.mean\"")
        for name in self.names:
            self._check(name)

    def _check(self, name):
        """Whatever a draw reads is there and fits."""
        shape = self.tensors[name + ".mean"].shape
        expected = {".log_std": shape, ".mask": shape}
        if len(shape) == 4:
            d = shape[2] * shape[3]
            expected[".scale_tril"] = (*shape[:2], d * (d + 1) // 2)
        for suffix, wanted in expected.items():
            found = self.tensors.get(name + suffix)
            if found is not None and found.shape != wanted:
                raise FileError(f"{self.path}: tensor '{name}{suffix}' is {list(found.shape)}, expected {list(wanted)}")
        needed = ".scale_tril" if self.kind == "cfg" and len(shape) == 4 else ".log_std"
        if self.kind in UNCERTAIN and name + needed not in self.tensors:
            raise FileError(f"{self.path}: no tensor '{name}{needed}', which a posterior of kind {self.kind} has")

    def _of(self, name, suffix):
        if name not in self.names:
            raise KeyError(f"{self.path}: no parameter {name!r}; there are {', '.join(self.names)}")
        return self.tensors.get(name + suffix)

    def mean(self, name):
        """Of mnf, mu of w = z mu + sigma e."""
        return self._of(name, ".mean")

    def mask(self, name):
        """True where a weight is kept; None where nothing is pruned."""
        kept = self._of(name, ".mask")
        return None if kept is None else kept != 0

    def std(self, name):
        """The marginal standard deviations: 0 for a point estimate and where a weight is pruned. Of mnf, sigma."""
        mean, packed = self.mean(name), self._of(name, ".scale_tril")
        if packed is not None:
            return self._correlated(mean, packed, lambda scale, ratios: scale * np.sqrt(1 + (ratios**2).sum(-1)))
        if name + ".log_std" not in self.tensors:
            return np.zeros_like(mean)
        std = np.exp(self.tensors[name + ".log_std"])
        kept = self.mask(name)
        # A pruned weight's log_std is a placeholder.
        return std if kept is None else np.where(kept, std, np.float32(0))

    @staticmethod
    def _correlated(mean, packed, row):
        """row(L_ii, [L_ij / L_ii for j < i]) for every row i of every kernel's Cholesky factor, shaped as the mean.
        Factors are packed row by row: entry (i, j <= i) is at i (i + 1) / 2 + j, ln L_ii or L_ij / L_ii."""
        d = mean.shape[2] * mean.shape[3]
        rows = [row(np.exp(packed[..., i * (i + 3) // 2]), packed[..., i * (i + 1) // 2:i * (i + 3) // 2])
                for i in range(d)]
        return np.stack(rows, -1).reshape(mean.shape)

    def scale_tril(self, name):
        """L [out, in, d, d] of a cfg convolution with kernels of d weights, w = mean + L e: their covariance is
        L L^T."""
        packed = self._of(name, ".scale_tril")
        if packed is None:
            raise KeyError(f"{self.path}: {name!r} has no Cholesky factors; only convolutions of kind cfg have")
        d = int(np.prod(self.mean(name).shape[2:]))
        factor = np.zeros((*packed.shape[:2], d, d), packed.dtype)
        factor[..., *np.tril_indices(d)] = packed
        i = np.arange(d)
        scale = np.exp(factor[..., i, i])
        factor[..., i, i] = 1
        return factor * scale[..., None]

    def mean_state(self):
        """{name: weights at the posterior's mean}, a PyTorch state dict but for torch.from_numpy."""
        self._refuse_mnf("`baton export` writes its mean weights")
        return {name: self.mean(name).copy() for name in self.names}

    def sample(self, rng=None):
        """One draw of all weights, {name: array}. rng: a numpy Generator, or a seed."""
        self._refuse_mnf("`baton predict` averages over its draws")
        rng = np.random.default_rng(rng)
        return {name: self._draw(name, rng) for name in self.names}

    def _refuse_mnf(self, what):
        if self.kind == "mnf":
            raise NotImplementedError(f"{self.path}: a model of kind mnf: its weights are z mu + sigma e with z from "
                                      f"a normalizing flow, which this module does not compute; {what}")

    def _draw(self, name, rng):
        mean = self.mean(name)
        packed = self._of(name, ".scale_tril")
        if packed is None:
            if name not in self._noise:  # exp once, not once a draw
                self._noise[name] = self.std(name)
            return mean + self._noise[name] * rng.standard_normal(mean.shape, np.float32)
        e = rng.standard_normal((*packed.shape[:2], mean.shape[2] * mean.shape[3]), np.float32)
        return mean + self._correlated(
            mean, packed, lambda scale, ratios: scale * (e[..., ratios.shape[-1]]
                                                         + (ratios * e[..., :ratios.shape[-1]]).sum(-1)))


# ------------------------------------------------------------------------------------------------------- predictions
_TEXT, _WHOLE = ("name", "predicted_class"), ("index", "label")
_REAL = ("entropy", "mutual_information", "aleatoric_entropy", "aleatoric_variance", "epistemic_variance")


def read_predictions(path):
    """{column: array} of what `baton predict` wrote as .csv, .json or .npz: "probability" [images, classes],
    "prediction" (the class's number; "predicted_class" is its name, where the file has it), "entropy",
    "mutual_information", "aleatoric_entropy", "aleatoric_variance", "epistemic_variance", "index" and, where the images
    have them, "name" and "label"."""
    path = pathlib.Path(path)
    readers = {".csv": _csv_columns, ".json": _json_columns, ".npz": _npz_columns}
    if path.suffix.lower() not in readers:
        raise FileError(f"{path}: predictions are .csv, .json or .npz")
    try:
        columns = readers[path.suffix.lower()](path)
        probability = np.asarray(columns.pop("probability"), np.float32)
        images = len(probability)
        result = {"probability": probability, "prediction": probability.argmax(1), "index": np.arange(images)}
        named = columns.pop("prediction")
        if path.suffix.lower() != ".npz":
            columns["predicted_class"] = named
        for names, dtype in ((_TEXT, np.str_), (_WHOLE, np.int64), (_REAL, np.float32)):
            result.update((name, np.asarray(columns[name]).astype(dtype)) for name in names if name in columns)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # csv, json, zipfile, zlib, numpy: each has errors of its own
        raise FileError(f"{path}: damaged, or not predictions of Baton ({type(error).__name__}: {error})") from error
    for name, values in result.items():
        if values.shape[0] != images or values.ndim != (2 if name == "probability" else 1):
            raise FileError(f"{path}: {name!r} is {list(values.shape)}, for {images} images")
    return result


def _csv_columns(path):
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *rows = csv.reader(file)
    if any(len(row) != len(header) for row in rows):
        raise ValueError("rows of different lengths")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    classes = sum(re.fullmatch("p[0-9]+", name) is not None for name in header)
    each = [np.array(columns.pop(f"p{c}"), np.float64) for c in range(classes)]
    return {**columns, "probability": np.stack(each, 1)}


def _json_columns(path):
    rows = json.loads(path.read_text(encoding="utf-8"))["images"]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _npz_columns(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
