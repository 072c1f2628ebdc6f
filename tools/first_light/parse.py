"""What the output of a program says: GoogleTest's cases, JSON lines, Nsight Compute's table, lines that look like
errors."""
import csv
import json
import re

# After one of these every later CUDA call of the process may fail too, so the cases behind it say nothing.
STICKY = re.compile(r"illegal memory access|misaligned address|unspecified launch failure|illegal instruction|"
                    r"device-side assert|hardware stack error|launch timed out|invalid program counter|"
                    r"uncorrectable ECC|operation not supported on global/shared address space|a kernel failed|"
                    r"_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)|failed to launch on the GPU")
CASE = re.compile(r"^\[ *(RUN|OK|FAILED|SKIPPED) *\] ([^\s,]+)")
ERROR = re.compile(r"^ptx:|error|fail|fault|illegal|not found|no such|cannot|unable|missing|traceback|exception|nan\b|"
                   r"killed|hazard|invalid", re.IGNORECASE)


class Cases:
    """The test cases that one process of a GoogleTest program ran, in order.

    passed, failed and skipped map a case's name to what it printed. `open` is the case in which the process ended,
    or None. `sticky` is the case whose CUDA error stays with the process, or None: what came after it is left out.
    """

    def __init__(self, output):
        self.passed, self.failed, self.skipped = {}, {}, {}
        self.open = self.sticky = None
        self.announced = None  # how many cases the process meant to run
        lines = []
        for line in output.splitlines():
            if self.announced is None and (count := re.match(r"^\[==========\] Running (\d+) tests? from", line)):
                self.announced = int(count[1])
            case = CASE.match(line)
            if case and case[1] == "RUN":
                self.open, lines = case[2], []
            elif case and case[2] == self.open:
                kind = {"OK": self.passed, "FAILED": self.failed, "SKIPPED": self.skipped}[case[1]]
                kind[self.open] = lines
                if case[1] == "FAILED" and STICKY.search("\n".join(lines)):
                    self.sticky, self.open = self.open, None
                    return
                self.open = None
            elif self.open:
                lines.append(line)
        self.last_words = lines  # of a case that is still open

    @property
    def names(self):
        return [*self.passed, *self.failed, *self.skipped]


def cut(line, length=300):
    """A long line without its middle: the names of templates are there, and what went wrong at its end."""
    return line if len(line) <= length else line[:length // 3] + " ... " + line[-(length - length // 3):]


def first_lines(lines, count=4):
    """The first lines of a failed case that say something: from "FILE:LINE: Failure" on, if there is one, behind what
    was printed before it and looks like an error."""
    said = [line.rstrip() for line in lines if line.strip()]
    start = next((i for i, line in enumerate(said) if re.search(r": Failure$|^unknown file", line)), 0)
    before = [line for line in said[:start] if ERROR.search(line)][:2]
    return [cut(line) for line in before + said[start:start + count]]


def error_lines(output, count=4):
    """The lines of any output that look like errors; else its last line."""
    said = [cut(line.strip()) for line in output.splitlines() if line.strip()]
    return [line for line in said if ERROR.search(line)][:count] or said[-1:]


def json_lines(output):
    """The lines of an output that are JSON objects."""
    found = []
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:  # cut short by a kill
                pass
    return found


def kernel_times(table):
    """[(kernel, microseconds), ...] in the order of launches, from `ncu --csv --metrics gpu__time_duration.sum`."""
    lines = table.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    to_us = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}
    found = []
    for row in csv.DictReader(lines[start:]):
        if row.get("Metric Name") == "gpu__time_duration.sum":
            value, unit = float(row["Metric Value"].replace(",", "")), row["Metric Unit"]
            found.append((row["Kernel Name"], value * to_us.get(unit, 1e-3)))
    return found


def differences(one, other, where="", ignore=re.compile(r"second|peak_device_bytes")):
    """The places at which two results differ, but for what the clock says."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [key for key in {**one, **other} if not ignore.search(key)]
        return [d for key in keys
                for d in differences(one.get(key), other.get(key), f"{where}.{key}".lstrip("."), ignore)]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [d for i, (a, b) in enumerate(zip(one, other)) for d in differences(a, b, f"{where}[{i}]", ignore)]
    return [] if one == other else [f"{where}: {one!r} and {other!r}"[:300]]
