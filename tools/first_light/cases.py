"""The test cases of baton_tests as checks, file by file."""
import json
import re

from . import parse
from .checks import Check, Command, Failed, NotRun, TimedOut, needed

# Spinning threads of test programs that run side by side are many times slower.
QUIET_THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}


def test_files(root):
    """[(room, "room.file", patterns of its cases)] of every test file, as tests/CMakeLists.txt has them. A bundle has
    no sources: there they stand in tests.json."""
    listed = root / "tests.json"
    if listed.exists():
        return [tuple(entry) for entry in json.loads(listed.read_text())]
    files = []
    for room in ("engine", "kernels", "layers", "trainers"):
        for path in sorted((root / "tests" / room).rglob("*_test.c*")):
            suites = re.findall(r"^ *(?:TYPED_TEST(?:_P)?|TEST(?:_F|_P)?)\( *(\w+)", path.read_text(), re.MULTILINE)
            patterns = [p for suite in dict.fromkeys(suites) for p in (f"{suite}.*", f"*/{suite}.*", f"{suite}/*.*")]
            if patterns:
                files.append((room, f"{room}.{path.stem}", patterns))
    return files


def test_check(place, scale, name, patterns):
    if scale["cases"] and name.startswith("kernels."):  # only those with this word in their names
        patterns = [pattern + scale["cases"] + "*" for pattern in patterns]
    settings = scale["tests"]

    def body():
        return (yield from run_cases(needed(place.program("baton_tests")), patterns, settings["silence"], place.root))
    return Check(name, body, settings["estimate"], settings["limit"])


def run_cases(program, patterns, silence, folder, most_starts=24):
    """Runs the cases of a GoogleTest program. After one that crashed, hung, or left the GPU in an error, the others run
    in a new process, so that it costs no other case."""
    passed, skipped, errors, broken = [], {}, [], []
    failed, timed_out = [], False
    for _ in range(most_starts):
        done_with = [*passed, *skipped, *failed]
        filters = ":".join(patterns) + ("-" + ":".join(done_with) if done_with else "")
        done = yield Command([program, f"--gtest_filter={filters}"], check=False, silence=silence, folder=folder,
                             environment=QUIET_THREADS)
        cases = parse.Cases(done.output)
        passed += cases.passed
        skipped.update({case: " ".join(parse.first_lines(lines, 2)) for case, lines in cases.skipped.items()})
        failed += cases.failed
        for case, lines in cases.failed.items():
            errors.append(f"{case}: " + " | ".join(parse.first_lines(lines)))
        if cases.open:
            end = done.said()[0]
            failed.append(cases.open)
            broken.append(cases.open)
            errors.append(f"{cases.open}: {end}: " + " | ".join(line for line in cases.last_words[-3:] if line.strip()))
            timed_out |= bool(done.stopped)
        elif cases.sticky:
            broken.append(cases.sticky)
        elif done.status not in (0, 1) or done.stopped or cases.announced is None:
            errors += [f"between the cases: {line}" for line in done.said()]
            timed_out |= bool(done.stopped)
            break
        if not (cases.open or cases.sticky) or "was over" in done.stopped:
            break
    else:
        errors.append(f"{most_starts} cases broke their processes: the rest was not run")
    figures = {"passed": len(passed), "failed": failed, "skipped": skipped, "broke their process": broken}
    if errors:
        raise (TimedOut if timed_out else Failed)(*errors, figures=figures)
    if not passed:
        reason = next(iter(skipped.values()), "it has no such case")
        raise NotRun(f"no case ran: {reason}", figures)
    return figures
