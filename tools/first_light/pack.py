"""Packs what a machine with a GPU needs into one file."""
import datetime
import io
import json
import lzma
import os
import pathlib
import struct
import subprocess
import tarfile
import tempfile

from . import cases
from .place import MNIST, PROGRAMS, Place, find_mnist, mnist_file

MOST_BYTES = 45 << 20
NEEDED = ["baton_tests", "first_light", "step_timing", "bil_mnist"]
TOP = "first-light"  # the folder in the bundle
FAT_BINARY, MACHINE_CODE = 0xBA55ED50, 2
SCRIPTS = ["tools/first-light", "tools/first_light/*.py", "bench/peers/*", "tools/kernel-budget.json"]


class PackError(Exception):
    pass


def fat_binary_images(data):
    """(kind, architecture, begin, end) of every image in a program's fat binaries, as nvcc embeds them: a header of
    magic, version, its own size and that of what follows; then images, each behind a header of its own."""
    magic = struct.pack("<I", FAT_BINARY)
    at = data.find(magic)
    while at >= 0:
        _, _, head, size = struct.unpack_from("<IHHQ", data, at)
        place, end = at + head, at + head + size
        if head < 16 or end > len(data):  # four bytes that only look like the magic number
            at = data.find(magic, at + 4)
            continue
        while place < end:
            kind, _, head, size = struct.unpack_from("<HHIQ", data, place)
            architecture, = struct.unpack_from("<I", data, place + 28)
            if head < 32 or place + head + size > end:
                raise PackError("a fat binary is laid out in an unknown way")
            yield kind, architecture, place + head, place + head + size
            place += head + size
        at = data.find(magic, end)


def keep_architecture(data, architecture):
    """The program with the machine code of other architectures blanked out (the loader never looks at it; zeros pack
    to nothing), and the names of what is left, as {"sm_90", "PTX 90"}."""
    data, kept = bytearray(data), set()
    for kind, found, begin, end in list(fat_binary_images(data)):
        if kind == MACHINE_CODE and found != architecture:
            data[begin:end] = bytes(end - begin)
        else:
            kept.add(f"sm_{found}" if kind == MACHINE_CODE else f"PTX {found}")
    return bytes(data), kept


def stripped(path):
    with tempfile.TemporaryDirectory() as folder:
        to = pathlib.Path(folder) / path.name
        subprocess.run(["strip", "-o", str(to), str(path)], check=True)
        return to.read_bytes()


class Bundle:
    """A tar.xz file that says how much each part of it takes."""

    def __init__(self, path):
        self.file = open(path, "wb")
        # Programs are much alike: with so large a dictionary the second costs a fraction of the first.
        self.packed = lzma.LZMAFile(self.file, "w", preset=9)
        self.tar = tarfile.open(fileobj=self.packed, mode="w")
        self.sizes = []
        self.seen = self.plain = 0

    def add(self, name, data, executable=False):
        info = tarfile.TarInfo(f"{TOP}/{name}")
        info.size, info.mode = len(data), 0o755 if executable else 0o644
        self.tar.addfile(info, io.BytesIO(data))
        self.plain += len(data)

    def end_part(self, name, files):
        size = self.file.tell()
        self.sizes.append((name, files, self.plain, size - self.seen))
        self.seen, self.plain = size, 0

    def close(self):
        self.tar.close()
        self.packed.close()
        self.file.close()
        name, files, plain, packed = self.sizes[-1]  # what the compressor still held
        self.sizes[-1] = (name, files, plain, packed + os.stat(self.file.name).st_size - self.seen)


def pack(root, out, data, predictions, architecture, with_ptx, most=MOST_BYTES, say=print):
    """Writes the bundle to `out`. PackError when something is missing, or when it is larger than `most` bytes."""
    place = Place(root, "gpu")
    programs = [name for name in PROGRAMS if place.program(name).exists()]
    missing = [name for name in NEEDED if name not in programs]
    if missing:
        raise PackError(f"{', '.join(missing)} missing in {place.build}: cmake --preset cuda && cmake --build --preset "
                        "cuda")
    folder = find_mnist([data, os.environ.get("BATON_DATA"), root / "data"])
    if data and not folder:
        raise PackError(f"{data} does not hold MNIST")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    bundle = Bundle(part)
    try:
        kept = set()
        for name in programs:
            content, has = keep_architecture(stripped(place.program(name)), architecture)
            kept |= has
            bundle.add(place.program(name).relative_to(root), content, executable=True)
        if f"sm_{architecture}" not in kept:
            raise PackError(f"the programs hold no machine code for sm_{architecture}, but {', '.join(sorted(kept))}")
        bundle.end_part("programs (" + ", ".join(sorted(kept)) + ")", len(programs))
        if with_ptx:
            libraries = [path for path in sorted((place.build / "ptx").glob("lib*.so*")) if not path.is_symlink()]
            if not libraries:
                raise PackError(f"no interpreter in {place.build / 'ptx'}")
            for path in libraries:
                bundle.add(path.relative_to(root), stripped(path), executable=True)
            bundle.end_part("interpreter of PTX", len(libraries))
        goldens = [path for path in sorted(place.goldens.rglob("*")) if path.is_file()]
        for path in goldens:
            bundle.add(path.relative_to(root), path.read_bytes())
        bundle.end_part("goldens", len(goldens))
        if folder:
            for name in MNIST:
                path = mnist_file(folder, name)
                bundle.add(f"data/mnist/{path.name}", path.read_bytes())
            bundle.end_part("MNIST", len(MNIST))
        scripts = [path for pattern in SCRIPTS for path in sorted(root.glob(pattern)) if path.is_file()]
        for path in scripts:
            bundle.add(path.relative_to(root), path.read_bytes(), executable=os.access(path, os.X_OK))
        bundle.add("tests.json", json.dumps(cases.test_files(root)).encode())
        predicted = json.loads(predictions.read_text()) if predictions else place.predictions()
        if predicted:
            bundle.add("gpu-cost.json", json.dumps(predicted).encode())
        bundle.add("manifest.json", json.dumps({
            "commit": place.commit, "packed": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "programs": programs, "holds": sorted(kept)}).encode())
        bundle.end_part("scripts and tables", len(scripts) + 3)
        bundle.close()
        for name, files, plain, packed in bundle.sizes:
            say(f"{packed / 2**20:7.2f} MiB of {plain / 2**20:7.2f}  {name}, {files} files")
        size = part.stat().st_size
        say(f"{size / 2**20:7.2f} MiB  together; {most / 2**20:.0f} are allowed")
        if not folder:
            say("MNIST was not found and is not in it: programs will generate digits")
        if not predicted:
            say("no predictions are in it: tools/gpu-cost --json build/cuda/gpu-cost.json makes them")
        if size > most:
            raise PackError(f"the bundle has {size / 2**20:.2f} MiB, more than {most / 2**20:.0f}")
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    say(f"Bundle: {out}")
