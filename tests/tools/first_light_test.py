#!/usr/bin/env python3
"""Tests tools/first-light against programs that crash, hang, lie or are missing: what a check is counted as, what the
time limits cut, that the JSON and the page are whole at any moment, and what a bundle holds.

With the argument --host or --ptx, runs it on this checkout's build instead: what takes a minute or two.
"""
import importlib.machinery
import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from first_light import cases, checks, pack, parse, report, stages  # noqa: E402
from first_light.checks import Check, Command, Failed, NotRun, Runner, Stage  # noqa: E402

# A GoogleTest program: what each case does stands in cases.json beside it. It knows filters, and runs in order.
FAKE_TESTS = '''#!/usr/bin/env python3
import fnmatch, json, os, pathlib, signal, sys, time
cases = json.loads((pathlib.Path(__file__).parent / "cases.json").read_text())
chosen = next((a.split("=", 1)[1] for a in sys.argv if a.startswith("--gtest_filter=")), "*")
wanted, _, unwanted = chosen.partition("-")
cases = {name: does for name, does in cases.items() if any(fnmatch.fnmatch(name, p) for p in wanted.split(":"))
         and not any(fnmatch.fnmatch(name, p) for p in unwanted.split(":") if p)}
print(f"[==========] Running {len(cases)} tests from 1 test suite.", flush=True)
broken, failed = False, 0
for name, does in cases.items():
    print(f"[ RUN      ] {name}", flush=True)
    if does == "crash": os.kill(os.getpid(), signal.SIGSEGV)
    if does == "hang": time.sleep(600)
    if does == "exit": sys.exit(3)
    if does == "break": broken = True
    if does == "fail": print("test.cpp:12: Failure\\nExpected: 1\\n  Actual: 2")
    if broken: print("unknown file: Failure\\nC++ exception: an illegal memory access was encountered")
    if does == "skip": print("test.cpp:9: Skipped\\nno data set here\\n")
    bad = broken or does == "fail"
    failed += bad
    word = "  FAILED " if bad else "  SKIPPED" if does == "skip" else "      OK "
    print(f"[{word} ] {name}" + (", where GetParam() = 3" if bad else "") + " (0 ms)", flush=True)
sys.exit(1 if failed else 0)
'''


def shell(text, **more):
    return Command(["sh", "-c", text], **more)


def new_record():
    return {"checks": [], "machine": {}, "label": "fake", "mode": "gpu", "started": "now", "commit": "none",
            "minutes": 1}


def one(text, **more):
    """The body of a check that runs one line of shell."""
    def body():
        done = yield shell(text, **more)
        return {"said": done.output.strip()}
    return body


def check(name, text, estimate=0, limit=5, **more):
    return Check(name, one(text, **more), estimate, limit)


class FolderCase(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def read(self, folder=None):
        """The JSON, checked against the page beside it."""
        folder = folder or self.folder
        record = json.loads((folder / report.JSON).read_text())
        page = (folder / report.PAGE).read_text()
        for status, count in report.counts(record["checks"]).items():
            self.assertIn(f"**{count} {status}**", page)
        for entry in record["checks"]:
            self.assertIn(entry["status"], report.STATUSES)
            self.assertIn(f"| {entry['stage']}/{entry['name']} | {entry['status']} |", page)
        return record


class RunnerTest(FolderCase):
    def run_stages(self, *all_stages, minutes=1, jobs=1):
        record = new_record()
        self.said = []
        runner = Runner(self.folder, record, time.monotonic() + 60 * minutes, minutes, jobs, say=self.said.append)
        runner.run(list(all_stages))
        return {entry["name"]: entry for entry in self.read()["checks"]}

    def test_statuses(self):
        def not_here():
            raise NotRun("the tool xyz is missing")
            yield

        def own_error():
            yield shell("true")
            return 1 / 0
        some = [check("fine", "echo good"), check("bad", "echo 'error: it broke' >&2; exit 3"),
                  check("crash", "kill -SEGV $$"), Check("missing", not_here, 0, 5), Check("bug", own_error, 0, 5),
                  Check("no program", lambda: iter_of(Command(["/no/such/program"])), 0, 5)]
        found = self.run_stages(Stage("s", some, 1))
        self.assertEqual({name: entry["status"] for name, entry in found.items()},
                         {"fine": "passed", "bad": "failed", "crash": "failed", "missing": "not run", "bug": "failed",
                          "no program": "not run"})
        self.assertEqual(found["fine"]["figures"], {"said": "good"})
        self.assertEqual(found["bad"]["errors"], ["exit status 3", "error: it broke"])
        self.assertEqual(found["crash"]["errors"][0], "ended by SIGSEGV")
        self.assertEqual(found["missing"]["reason"], "the tool xyz is missing")
        self.assertIn("/no/such/program: No such file", found["no program"]["reason"])
        self.assertIn("ZeroDivisionError", found["bug"]["errors"][0])
        page = (self.folder / report.PAGE).read_text()
        self.assertLess(page.index("error: it broke"), page.index("## All checks"))
        self.assertIn("error: it broke", (self.folder / "logs" / "s.bad.log").read_text())

    def test_a_hang_is_killed_with_its_children_and_the_next_runs(self):
        mark = self.folder / "alive"
        hang = f"(trap '' TERM; while :; do touch {mark}; sleep 0.05; done) & trap '' TERM; sleep 600 & wait; sleep 600"
        found = self.run_stages(Stage("s", [check("hang", hang, limit=0.7), check("next", "echo here")], 1))
        self.assertEqual(found["hang"]["status"], "timed out")
        self.assertLess(found["hang"]["seconds"], 5)
        self.assertEqual(found["next"]["status"], "passed")
        mark.unlink(missing_ok=True)
        time.sleep(0.3)
        self.assertFalse(mark.exists(), "a process of the check goes on")

    def test_silence_is_a_hang(self):
        def body():
            done = yield shell("echo a; sleep 600", silence=0.4, check=False)
            return {"stopped": done.stopped}
        found = self.run_stages(Stage("s", [Check("quiet", body, 0, 30)], 1))
        self.assertIn("said nothing", found["quiet"]["figures"]["stopped"])
        self.assertLess(found["quiet"]["seconds"], 10)

    def test_the_minutes_cut_what_is_left(self):
        first = Stage("first", [check("a", "sleep 600", limit=600)], 1)
        second = Stage("second", [check("b", "echo b", estimate=1)], 1)
        start = time.monotonic()
        found = self.run_stages(first, second, minutes=0.02)
        self.assertLess(time.monotonic() - start, 6)
        self.assertEqual(found["a"]["status"], "timed out")
        self.assertIn("the run's time was over", found["a"]["errors"][0])
        self.assertEqual(found["b"]["status"], "not run")
        self.assertIn("no time: it takes about 1 s", found["b"]["reason"])
        self.assertIn("no time", (self.folder / report.PAGE).read_text())

    def test_what_exceeds_its_share_runs_before_what_fills_the_rest(self):
        order = self.folder / "order"
        greedy = [check(name, f"echo {name} >> {order}", estimate=0.2) for name in ("a", "b")]
        fill = Stage("fill", [check("fill", f"echo fill >> {order}")], 1, fills=True)
        other = Stage("other", [check("other", f"echo other >> {order}")], 1)
        found = self.run_stages(Stage("greedy", greedy, 0.001), other, fill)
        self.assertEqual(order.read_text().split(), ["other", "a", "b", "fill"])
        self.assertEqual({entry["status"] for entry in found.values()}, {"passed"})

    def test_side_by_side_and_in_the_background(self):
        # Each of four waits for the other three.
        meet = f"touch {self.folder}/$0; while [ $(ls {self.folder} | grep -c '^m[0-3]$') -lt 4 ]; do sleep 0.02; done"
        some = [check(f"m{i}", meet.replace("$0", f"m{i}"), limit=30) for i in range(4)]
        ready = self.folder / "ready"
        later = [check("prepare", f"sleep 0.4; touch {ready}"), check("use", f"test -e {ready}")]
        later[0].background = True
        found = self.run_stages(Stage("s", some, 1, beside=True), Stage("t", later, 1), jobs=4)
        self.assertEqual({entry["status"] for entry in found.values()}, {"passed"})

    def test_what_prepares_a_stage_does_not_hold_it_up(self):
        slow = check("prepare", "sleep 600", limit=600)
        slow.background = True
        wait, checks.MOST_WAIT = checks.MOST_WAIT, 0.3
        self.addCleanup(setattr, checks, "MOST_WAIT", wait)
        found = self.run_stages(Stage("s", [check("a", "sleep 0.2")], 1),
                                Stage("t", [slow, check("b", "true")], 1))
        self.assertEqual((found["prepare"]["status"], found["b"]["status"]), ("not run", "passed"))
        self.assertIn("the stage that it prepares began", found["prepare"]["reason"])

    def test_sigterm_comes_first_where_a_program_has_to_write(self):
        left = self.folder / "checkpoint"
        text = f"trap 'sleep 0.2; touch {left}; exit 143' TERM; while :; do sleep 0.05; done"

        def body():
            done = yield shell(text, grace=5, check=False)
            return {"status": done.status}
        found = self.run_stages(Stage("s", [Check("paper", body, 0, 5.5)], 1))
        self.assertTrue(left.exists())
        self.assertEqual(found["paper"]["figures"], {"status": 143})


def iter_of(command):
    yield command


class CasesTest(FolderCase):
    """Test programs: what one case does to its process costs no other case."""

    def cases(self, silence=30, patterns=("*",), **does):
        program = self.folder / "baton_tests"
        program.write_text(FAKE_TESTS)
        program.chmod(0o755)
        does = {name.replace("__", "."): what for name, what in does.items()}
        (self.folder / "cases.json").write_text(json.dumps(does))
        record = new_record()
        body = lambda: cases.run_cases(program, list(patterns), silence, self.folder)  # noqa: E731
        Runner(self.folder, record, time.monotonic() + 60, 1, say=lambda text: None).run(
            [Stage("s", [Check("file", body, 0, 20)], 1)])
        return self.read()["checks"][0]

    def test_all_pass(self):
        found = self.cases(A__one="pass", A__two="pass")
        self.assertEqual((found["status"], found["figures"]["passed"]), ("passed", 2))

    def test_a_crash_costs_one_case(self):
        found = self.cases(A__one="pass", A__two="crash", A__three="pass", A__four="exit", A__five="pass")
        self.assertEqual(found["status"], "failed")
        self.assertEqual(found["figures"]["passed"], 3)
        self.assertEqual(found["figures"]["failed"], ["A.two", "A.four"])
        self.assertIn("A.two: ended by SIGSEGV", found["errors"][0])
        self.assertIn("A.four: exit status 3", found["errors"][1])

    def test_a_hang_costs_one_case(self):
        found = self.cases(silence=5, A__one="pass", A__two="hang", A__three="pass")
        self.assertEqual(found["status"], "timed out")
        self.assertEqual(found["figures"]["passed"], 2)
        self.assertIn("said nothing", found["errors"][0])

    def test_an_error_that_stays_on_the_gpu_costs_one_case(self):
        found = self.cases(A__one="pass", A__two="break", A__three="pass", A__four="fail", A__five="pass")
        self.assertEqual(found["figures"]["passed"], 3)
        self.assertEqual(found["figures"]["failed"], ["A.two", "A.four"])
        self.assertEqual(found["figures"]["broke their process"], ["A.two"])
        self.assertIn("illegal memory access", found["errors"][0])
        self.assertIn("test.cpp:12: Failure | Expected: 1", found["errors"][1])

    def test_failures_alike_are_told_once(self):
        found = self.cases(**{f"A__c{i}": "break" for i in range(3)}, A__d="fail")
        self.assertEqual(len(found["errors"]), 4)
        page = (self.folder / report.PAGE).read_text()
        self.assertIn("(so too A.c1, A.c2)", page)
        self.assertEqual(page.split("## All checks")[0].count("illegal memory access"), 1)

    def test_too_many_broken_processes_are_told(self):
        found = self.cases(**{f"A__c{i}": "exit" for i in range(26)})
        self.assertEqual(len(found["figures"]["failed"]), 24)
        self.assertIn("the rest was not run", found["errors"][-1])

    def test_skipped_is_not_passed(self):
        found = self.cases(A__one="skip", A__two="skip")
        self.assertEqual(found["status"], "not run")
        self.assertIn("no data set here", found["reason"])
        found = self.cases(A__one="skip", A__two="pass")
        self.assertEqual(found["status"], "passed")
        self.assertIn("A.one", found["figures"]["skipped"])
        self.assertIn("no data set here", (self.folder / report.PAGE).read_text())

    def test_no_case_is_not_passed(self):
        self.assertEqual(self.cases(A__one="pass", patterns=("B.*",))["status"], "not run")

    def test_a_program_that_does_not_start(self):
        program = self.folder / "baton_tests"
        program.write_text("#!/bin/sh\necho 'error while loading shared libraries: libcudnn.so.9' >&2\nexit 127\n")
        program.chmod(0o755)
        record = new_record()
        Runner(self.folder, record, time.monotonic() + 60, 1, say=lambda text: None).run([Stage("s", [Check(
            "file", lambda: cases.run_cases(program, ["*"], 30, self.folder), 0, 20)], 1)])
        found = self.read()["checks"][0]
        self.assertEqual(found["status"], "failed")
        self.assertIn("libcudnn.so.9", found["errors"][1])


class ParseTest(unittest.TestCase):
    def test_kernel_times(self):
        text = ('==PROF== Connected\n"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
                '"0","7","void advance_kernel(State *, int)","gpu__time_duration.sum","ns","2,048.00"\n'
                '"1","7","ampere_sgemm_128x64","gpu__time_duration.sum","us","12.5"\n')
        self.assertEqual(parse.kernel_times(text),
                         [("void advance_kernel(State *, int)", 2.048), ("ampere_sgemm_128x64", 12.5)])
        self.assertEqual(parse.kernel_times("==ERROR== no"), [])

    def test_plain_kernel_names(self):
        for name in ("void baton::(anonymous namespace)::book_kernel<float>(float *, int)",
                     "baton::<unnamed>::book_kernel(float*)", "book_kernel"):
            self.assertEqual(report.plain(name), "book_kernel")

    def test_the_end_of_a_long_line_stays(self):
        lines = ["ptx: a kernel: a load from nowhere", "unknown file: Failure",
                 "launch<" + "x" * 900 + ">: misaligned address"]
        found = parse.first_lines(lines)
        self.assertEqual(found[:2], lines[:2])
        self.assertLess(len(found[2]), 320)
        self.assertTrue(found[2].startswith("launch<") and found[2].endswith("misaligned address"))

    def test_differences_leave_out_the_clock(self):
        one = {"accuracy": 0.5, "seconds": 1, "stages": [{"nll": 1.0}]}
        self.assertEqual(parse.differences(one, {**one, "seconds": 2}), [])
        found = parse.differences(one, {**one, "stages": [{"nll": 1.5}]})
        self.assertEqual(found, ["stages[0].nll: 1.0 and 1.5"])
        self.assertEqual(len(parse.differences({"a": [1, 2]}, {"a": [1]})), 1)

    def test_test_files_are_those_of_ctest(self):
        files = {name: patterns for _, name, patterns in cases.test_files(ROOT)}
        self.assertIn("Graph.*", files["engine.graph_test"])
        self.assertIn("*/Graph.*", files["engine.graph_test"])
        self.assertIn("Dropout.*", files["kernels.dropout_test"])


class PageTest(unittest.TestCase):
    def test_the_page_of_a_gpu(self):
        def entry(stage, name, status="passed", **more):
            return {"stage": stage, "name": name, "status": status, "seconds": 1.0, **more}
        step = {"case": "lenet5 ffg_step", "batch": 128}
        record = {
            "label": "measured on a GPU", "mode": "gpu", "started": "2026-01-02", "commit": "abc", "minutes": 9,
            "finished": True,
            "machine": {"gpu": "NVIDIA H200", "driver": "580.1", "device": "NVIDIA H200, CUDA 13.0"},
            "predictions": {"steps": {
                "lenet5 ffg x1": {"seconds": 440e-6, "gap_seconds": 400e-6, "calls": [{"name": "x", "seconds": 10e-6}],
                                  "kernels": [{"name": "book_kernel", "launches": 1, "seconds": 20e-6}]},
                "lenet5 ffg x16": {"seconds": 4e-3, "gap_seconds": 0, "calls": [], "kernels": []},
                "mlp1200 bgd K=16": {"seconds": 1, "gap_seconds": 0, "calls": [], "kernels": []}}},
            "checks": [
                entry("timings", "ours", figures={**step, "side": "baton", "ms": 0.5}),
                entry("timings", "ours 16", figures={**step, "side": "baton", "rows": 16, "ms": 2.0}),
                entry("timings", "theirs", figures={**step, "side": "eager", "ms": 5.0}),
                entry("timings", "compiled", figures={**step, "side": "compiled", "ms": 1.0}),
                entry("calibration", "kernels", figures={"case": "lenet5 ffg_step", "sum": 42.0, "kernels": [
                    ["void (anonymous namespace)::book_kernel(int)", 30.0], ["gemm<4>(int)", 12.0]]}),
                entry("calibration", "device", figures={"calibration": [
                    {"name": "graph_node", "value": 1.5, "unit": "us", "how": "a chain"}]}),
                entry("kernels", "kernels.dropout_test", "failed", errors=["Dropout.x: Expected | 1"], figures={}),
                entry("sanitizer", "memcheck 1", "not run", reason="compute-sanitizer is missing"),
            ]}
        page = report.page(record)
        for words in ("# First light: NVIDIA H200", "| driver | 580.1 |", "**6 passed**, **1 failed**, **0 timed out**",
                      "Dropout.x: Expected | 1", "compute-sanitizer is missing",
                      "| lenet5 ffg_step | 1 | 128 | 0.5 | 5 | 10 | 1 | 2 |",
                      "| lenet5 ffg_step | 1 | **whole step** | 440 | 500 | 1.136 |",
                      "| lenet5 ffg_step | 1 | book_kernel | 20 | 30 | 1.5 |",
                      "| lenet5 ffg_step | 1 | the libraries' kernels | 10 | 12 | 1.2 |",
                      "| lenet5 ffg_step | 1 | between kernels | 400 | 458 | 1.145 |",
                      "| lenet5 ffg_step | 16 | **whole step** | 4000 | 2000 | 0.5 |",
                      "| graph_node | 1.5 | us | a chain |",
                      "| book_kernel | 1 | 30 | 71 % |"):
            self.assertIn(words, page)
        self.assertLess(page.index("## Failures"), page.index("## Steps"))
        page = report.page({**record, "mode": "host", "label": "host CPU, not a GPU"})
        self.assertIn("## Steps (host CPU, not a GPU)", page)


def fat_binary(*images):
    body = b""
    for kind, architecture, content in images:
        head = struct.pack("<HHIQ", kind, 0x101, 64, len(content)) + bytes(12) + struct.pack("<I", architecture)
        body += head.ljust(64, b"\0") + content
    return struct.pack("<IHHQ", pack.FAT_BINARY, 1, 16, len(body)) + body


class PackTest(FolderCase):
    def make_build(self, programs=pack.NEEDED, content=b""):
        copies = {path: path for path in ("tools/first-light", "tools/first_light", "bench/peers", "tests/kernels")}
        copies["tests/goldens/laplace"] = "build/cuda/tests/data/goldens/laplace"
        for path, to in copies.items():
            (self.folder / to).parent.mkdir(parents=True, exist_ok=True)
            source = ROOT / path
            (shutil.copytree if source.is_dir() else shutil.copy)(source, self.folder / to)
        source = self.folder / "fake.c"
        blob = fat_binary((1, 90, b"PTX" * 100), (2, 80, b"OLD!" * 50), (2, 90, b"NEW!" * 50)) + content
        source.write_text("const unsigned char image[] = {" + ",".join(map(str, blob)) + "};\n"
                          "int main(void) { return image[0]; }\n")
        for name in programs:
            path = self.folder / "build" / "cuda" / {"baton_tests": "tests", "baton": "bin"}.get(name, "bench") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cc", "-O0", "-o", str(path), str(source)], check=True)

    def pack(self, *options, data=True):
        environment = {key: value for key, value in os.environ.items() if key != "BATON_DATA"}
        if data:
            mnist = self.folder / "data" / "mnist"
            mnist.mkdir(parents=True, exist_ok=True)
            for name in pack.MNIST:
                (mnist / f"{name}.gz").write_bytes(b"images")
        words = [sys.executable, str(self.folder / "tools" / "first-light"), "pack", "--out", "b.tar.xz", *options]
        return subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True)

    def test_a_bundle_holds_one_architecture_and_runs_where_it_is_unpacked(self):
        self.make_build()
        done = self.pack()
        self.assertEqual(done.returncode, 0, done.stderr)
        for part in ("programs (PTX 90, sm_90)", "goldens", "MNIST", "scripts and tables", "together; 45 are allowed"):
            self.assertIn(part, done.stdout)
        there = self.folder / "there"
        there.mkdir()
        subprocess.run(["tar", "xf", "../b.tar.xz"], cwd=there, check=True)
        program = (there / "first-light/build/cuda/bench/bil_mnist")
        self.assertTrue(os.access(program, os.X_OK))
        data = program.read_bytes()
        self.assertIn(b"NEW!NEW!", data)
        self.assertIn(b"PTXPTX", data)
        self.assertNotIn(b"OLD!", data)
        self.assertTrue((there / "first-light/data/mnist/train-images-idx3-ubyte.gz").exists())
        self.assertTrue(any((there / "first-light/build/cuda/tests/data/goldens").rglob("*.npz")))
        done = subprocess.run([sys.executable, "first-light/tools/first-light", "run", "--only",
                               "machine/files,kernels/kernels.dropout_test", "--out", "out"],
                              cwd=there, capture_output=True, text=True)
        record = self.read(there / "out")
        self.assertEqual(record["checks"][0]["status"], "passed", record)
        self.assertEqual(record["checks"][1]["status"], "failed")  # the fake program is no GoogleTest program
        self.assertEqual(done.returncode, 1)

    def test_a_bundle_that_is_too_large_is_not_written(self):
        self.make_build()
        done = self.pack("--limit", "0.001")
        self.assertEqual(done.returncode, 1)
        self.assertIn("more than 0", done.stderr)
        self.assertIn("goldens", done.stdout)
        self.assertEqual(list(self.folder.glob("b.tar*")), [])

    def test_what_is_missing_is_named(self):
        self.make_build(programs=["baton_tests", "step_timing", "bil_mnist"])
        done = self.pack()
        self.assertEqual(done.returncode, 1)
        self.assertIn("first_light missing", done.stderr)

    def test_an_architecture_that_is_not_there_is_refused(self):
        self.make_build()
        done = self.pack("--architecture", "120")
        self.assertEqual(done.returncode, 1)
        self.assertIn("no machine code for sm_120", done.stderr)

    def test_an_unknown_layout_is_refused(self):
        broken = bytearray(fat_binary((2, 90, b"x" * 64)))
        struct.pack_into("<Q", broken, 16 + 8, 10**6)
        with self.assertRaises(pack.PackError):
            pack.keep_architecture(bytes(broken), 90)


class ProgramTest(FolderCase):
    """The whole tool, on a checkout whose programs are fakes."""

    on_gpu = False

    def setUp(self):
        super().setUp()
        (self.folder / "tools").mkdir()
        shutil.copy(ROOT / "tools" / "first-light", self.folder / "tools")
        shutil.copytree(ROOT / "tools" / "first_light", self.folder / "tools" / "first_light")
        (self.folder / "CMakeLists.txt").touch()
        (self.folder / "build" / "host" / "tests" / "data" / "goldens").mkdir(parents=True)
        (self.folder / "tests.json").write_text(json.dumps(
            [["kernels", "kernels.a_test", ["A.*"]], ["kernels", "kernels.b_test", ["B.*"]],
             ["layers", "layers.c_test", ["C.*"]]]))
        self.program("tests/baton_tests", FAKE_TESTS)
        self.cases({"A.one": "pass", "B.one": "pass", "C.one": "pass"})

    def program(self, name, text, build="host"):
        path = self.folder / "build" / build / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def cases(self, does):
        (self.folder / "build" / "host" / "tests" / "cases.json").write_text(json.dumps(does))

    def words(self, *options):
        mode = [] if "--ptx" in options or self.on_gpu else ["--host"]
        return [sys.executable, str(self.folder / "tools" / "first-light"), "run", *mode, "--out", "out", *options]

    def run_tool(self, *options):
        path = f"{self.folder / 'path'}:{os.environ['PATH']}"
        return subprocess.run(self.words(*options), cwd=self.folder, capture_output=True, text=True, timeout=120,
                              env={**os.environ, "PATH": path})

    def start_tool(self, *options):
        return subprocess.Popen(self.words(*options), cwd=self.folder, stdout=subprocess.PIPE, text=True)

    def statuses(self):
        return {f"{c['stage']}/{c['name']}": c["status"] for c in self.read(self.folder / "out")["checks"]}

    def test_a_run_of_some_stages(self):
        done = self.run_tool("--only", "kernels,layers")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertEqual(self.statuses(), {"kernels/kernels.a_test": "passed", "kernels/kernels.b_test": "passed",
                                           "layers/layers.c_test": "passed"})
        self.assertIn("host CPU, not a GPU", (self.folder / "out" / "README.md").read_text())
        for name in ("first_light.json", "README.md"):  # they are read elsewhere
            self.assertNotIn(str(self.folder), (self.folder / "out" / name).read_text())
        self.assertIn("3 passed, 0 failed, 0 timed out, 0 not run", done.stdout)

    def test_what_the_host_cannot_do_is_not_run(self):
        self.program("bench/first_light", "#!/bin/sh\nexit 1\n")
        done = self.run_tool("--only", "machine/gpu,convolutions/offers,sanitizer,papers/bil_mnist")
        self.assertEqual(done.returncode, 0, done.stdout)
        for name, status in self.statuses().items():
            self.assertEqual(status, "not run", name)
        self.assertIn("needs a GPU", (self.folder / "out" / "README.md").read_text())

    def test_tools_of_the_gpu(self):
        """What they say is read; one that cannot watch this device is "not run"."""
        self.on_gpu = True
        self.program("tests/baton_tests", FAKE_TESTS, "cuda")
        self.program("bench/step_timing", "#!/bin/sh\n", "cuda")
        self.program("nvidia-smi", "#!/bin/sh\necho 'NVIDIA H200, 580.1, 143771 MiB, 1980 MHz, 3201 MHz, 700 W, P0'\n")
        self.program("compute-sanitizer", """#!/bin/sh
case $2 in
memcheck)
  echo "ran: $*"; echo "[ RUN      ] A.one"
  echo "[       OK ] A.one (0 ms)"; echo "========= ERROR SUMMARY: 0 errors" ;;
racecheck) echo "[ RUN      ] A.one"; echo "[       OK ] A.one (0 ms)"
  echo "========= Race reported between x and y"; exit 86 ;;
initcheck) echo "========= Error: Device not supported"; exit 1 ;;
synccheck) exit 0 ;;
esac
""")
        self.program("ncu", """#!/bin/sh
echo '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
for time in 5 7; do
  echo '"0","advance_kernel(State *)","gpu__time_duration.sum","us","1.5"'
  echo '"1","void gemm<4>(float *)","gpu__time_duration.sum","us","'$time'"'
done
""")
        (self.folder / "build" / "host").rename(self.folder / "path")  # where run_tool's PATH begins
        (self.folder / "build" / "cuda" / "tests" / "cases.json").write_text(json.dumps(
            {"A.one": "pass", "A.two": "fail", "A.three": "crash", "A.four": "pass"}))
        done = self.run_tool("--only", "machine/gpu,kernels/kernels.a_test,sanitizer/* 1,sanitizer/*failed,"
                             "calibration/kernels of lenet5 ffg_step")
        self.assertEqual(done.returncode, 1, done.stdout + done.stderr)
        found = {c["name"]: c for c in self.read(self.folder / "out")["checks"]}
        self.assertEqual({name: c["status"] for name, c in found.items()}, {
            "gpu": "passed", "kernels.a_test": "failed", "memcheck of what failed": "passed", "memcheck 1": "passed",
            "racecheck 1": "failed", "initcheck 1": "not run", "synccheck 1": "failed",  # where no case ran
            "kernels of lenet5 ffg_step": "passed"})
        self.assertIn("--gtest_filter=A.three:A.two", found["memcheck of what failed"]["tail"])
        self.assertIn("Race reported", "".join(found["racecheck 1"]["errors"]))
        self.assertIn("Device not supported", found["initcheck 1"]["reason"])
        self.assertEqual(found["kernels of lenet5 ffg_step"]["figures"]["sum"], 8.5)  # the last step
        page = (self.folder / "out" / "README.md").read_text()
        self.assertIn("# First light: NVIDIA H200", page)
        self.assertIn("| driver | 580.1 |", page)

    def test_missing_programs_are_named(self):
        self.run_tool("--only", "repeat/bil_mnist twice,timings/baton lenet5 ffg_step")
        self.assertEqual(set(self.statuses().values()), {"not run"})
        self.assertIn("bil_mnist is missing", (self.folder / "out" / "README.md").read_text())

    def test_going_on_from_a_stage(self):
        self.cases({"A.one": "fail", "B.one": "pass", "C.one": "fail"})
        self.assertEqual(self.run_tool("--only", "kernels,layers").returncode, 1)
        self.cases({"A.one": "pass", "B.one": "pass", "C.one": "pass"})
        done = self.run_tool("--from", "layers", "--only", "layers")
        self.assertEqual(self.statuses(), {"kernels/kernels.a_test": "failed", "kernels/kernels.b_test": "passed",
                                           "layers/layers.c_test": "passed"})
        self.assertEqual(done.returncode, 1)
        self.assertEqual(self.run_tool().returncode, 2)  # an earlier run is not written over
        subprocess.run(["git", "init", "-q", "."], cwd=self.folder, check=True)
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "a"],
                       cwd=self.folder, check=True)
        done = self.run_tool("--from", "layers")
        self.assertEqual(done.returncode, 2)
        self.assertIn("another build", done.stderr)

    def test_whole_files_after_a_kill(self):
        self.cases({"A.one": "pass", "B.one": "hang", "C.one": "pass"})
        process = self.start_tool("--only", "kernels,layers")
        for line in process.stdout:
            if "kernels.a_test" in line:
                break
        time.sleep(0.5)
        process.kill()
        process.wait()
        process.stdout.close()
        record = self.read(self.folder / "out")
        found = {c["name"]: (c["status"], c.get("reason")) for c in record["checks"]}
        self.assertEqual(found["kernels.a_test"][0], "passed")
        self.assertEqual(found["kernels.b_test"], ("not run", "running when the run ended"))
        self.assertEqual(found["layers.c_test"], ("not run", "not reached when the run ended"))
        self.assertIs(record["finished"], False)

    def test_sigterm_ends_a_run_in_order(self):
        self.cases({"A.one": "pass", "B.one": "hang", "C.one": "pass"})
        process = self.start_tool("--only", "kernels,layers")
        for line in process.stdout:
            if "kernels.a_test" in line:
                break
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        self.assertEqual(process.wait(20), 130)
        process.stdout.close()
        self.assertEqual(self.statuses(), {"kernels/kernels.a_test": "passed", "kernels/kernels.b_test": "not run",
                                           "layers/layers.c_test": "not run"})

    def test_bad_options(self):
        for options in (["--only", "kernel"], ["--from", "nowhere"], ["nowhere.tar.xz"], ["--ptx"]):
            done = self.run_tool(*options)
            self.assertEqual(done.returncode, 2, options)
            self.assertNotIn("Traceback", done.stderr)


# What a run on a real build must have found out: the checks to run, and those of them that no CPU can pass.
REAL = ["machine/device", "machine/files", "convolutions/variance", "products/engine.graph_test",
        "kernels/kernels.dropout_test", "kernels/kernels.philox_test", "layers/layers.dense_test",
        "repeat/bil_mnist twice", "repeat/seeds in company", "timings/baton lenet5 ffg_step",
        "timings/baton lenet5 mnf_step rows *", "calibration/device"]
NOT_HERE = ["machine/gpu", "convolutions/offers", "sanitizer/memcheck 1", "papers/bil_mnist"]


def run_build(mode):
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "out"
        done = subprocess.run([sys.executable, str(ROOT / "tools" / "first-light"), "run", mode, "--minutes", "10",
                               "--out", str(out), "--only", ",".join(REAL + NOT_HERE)])
        print((out / report.PAGE).read_text())
        checks = json.loads((out / report.JSON).read_text())["checks"]
    found = {f"{c['stage']}/{c['name']}": c["status"] for c in checks}
    wrong = [name for name, status in found.items() if status != ("not run" if name in NOT_HERE else "passed")]
    if done.returncode or wrong or len(found) != len(REAL + NOT_HERE):
        sys.exit(f"exit status {done.returncode}, {len(found)} checks; not as they should be: "
                 + (", ".join(wrong) or "none"))


if __name__ == "__main__":
    if sys.argv[1:] in (["--host"], ["--ptx"]):
        run_build(sys.argv[1])
    else:
        unittest.main()
