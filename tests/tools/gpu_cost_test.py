#!/usr/bin/env python3
"""tools/gpu-cost without the interpreter: the model's arithmetic, the table of a made-up profile, and a budget that
notices every rise. The counts themselves are tested where the interpreter runs (tests/ptx)."""
import copy
import pathlib
import subprocess
import sys
import unittest

TOOLS = pathlib.Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
from gpu_cost import budget, cases, chip, model, report  # noqa: E402


def kernel_node(name="scale_kernel", blocks=264, threads=256, **changes):
    counters = {
        "launches": 1, "blocks": blocks, "threads": blocks * threads,
        "warp_instructions": {"integer": 20 * blocks * threads // 32, "float32": blocks * threads // 32,
                              "global_load": blocks * threads // 32, "global_store": blocks * threads // 32},
        "lane_instructions": {"integer": 20 * blocks * threads, "float32": blocks * threads,
                              "global_load": blocks * threads, "global_store": blocks * threads},
        "load_requests": blocks * threads // 32, "load_sectors": blocks * threads // 8, "load_bytes": 4 * blocks * threads,
        "store_requests": blocks * threads // 32, "store_sectors": blocks * threads // 8,
        "store_bytes": 4 * blocks * threads, "loaded_footprint_bytes": 4 * blocks * threads,
        "stored_footprint_bytes": 4 * blocks * threads, "shared_requests": 0, "shared_wavefronts": 0, "branches": 0,
        "divergent_branches": 0, "block_cycles": 400.0 * blocks,
        "longest_chain": {"cycles": 400.0, "loads": 1, "barriers": 0},
    }
    counters.update(changes)
    return {"kind": "kernel", "name": name, "readable": name, "grid": [blocks, 1, 1], "block": [threads, 1, 1],
            "shared_bytes": 0, "counters": counters}


def call_node(name, flops, nbytes):
    return {"kind": "call", "name": name, "flops": flops, "bytes": nbytes}


CONVOLUTION = "128x20x12x12 to 50, kernel 5x5, padding 0x0, stride 1x1, algorithm 1"


class Model(unittest.TestCase):
    def test_blocks_that_are_resident(self):
        self.assertEqual(chip.blocks_per_multiprocessor(256, 32, 0), 8)
        self.assertEqual(chip.blocks_per_multiprocessor(256, 128, 0), 2)
        self.assertEqual(chip.blocks_per_multiprocessor(32, 180, 0), 11)
        self.assertEqual(chip.blocks_per_multiprocessor(128, 32, 100 * 1024), 2)
        self.assertEqual(chip.blocks_per_multiprocessor(64, None, 0), 32)

    def test_a_kernel_is_bound_by_what_takes_longest(self):
        plain = model.kernel(kernel_node(), 32)
        moved = model.kernel(kernel_node(load_sectors=10**8), 32)
        chained = model.kernel(kernel_node(longest_chain={"cycles": 1e6, "loads": 3000, "barriers": 0}), 32)
        issued = model.kernel(kernel_node(warp_instructions={"special": 10**7}), 32)
        self.assertEqual((moved.bound, chained.bound, issued.bound), ("bytes", "chain", "issue"))
        self.assertAlmostEqual(chained.seconds, 1e6 / chip.CLOCK + chip.KERNEL_RAMP, 12)
        self.assertAlmostEqual(moved.seconds, 32 * (10**8 + 264 * 32) / chip.L2 + chip.KERNEL_RAMP, 9)
        for slower in (moved, chained, issued):
            self.assertGreater(slower.seconds, plain.seconds)
        # One block keeps one multiprocessor busy: the same work over all of them takes a 132nd.
        one = model.kernel(kernel_node(blocks=1, threads=1024, warp_instructions={"float32": 10**6}), 32)
        all_of_them = model.kernel(kernel_node(blocks=132, threads=1024, warp_instructions={"float32": 10**6}), 32)
        self.assertAlmostEqual(one.issue / all_of_them.issue, 132, 6)

    def test_convolutions_are_products(self):
        def extents(direction):
            return model.convolution_as_product(model.CONVOLUTION.match(f"cudnnConvolution{direction} {CONVOLUTION}"))
        self.assertEqual(extents("Forward"), (50, 128 * 64, 500))
        self.assertEqual(extents("BackwardData"), (20, 128 * 144, 1250))
        self.assertEqual(extents("BackwardFilter"), (50, 500, 128 * 64))

    def test_no_product_is_faster_than_the_chip(self):
        for m, n, k, count in ((10, 128, 500, 1), (500, 128, 800, 1), (4096, 4096, 4096, 1), (50, 8192, 500, 16)):
            self.assertGreater(model.product(m, n, k, count), 2 * m * n * k * count / chip.FP32)
        self.assertLess(model.product(4096, 4096, 4096), 1.6 * 2 * 4096**3 / chip.FP32)


class Report(unittest.TestCase):
    profile = {"graph": [kernel_node(), kernel_node(), kernel_node("gaussian_step_kernel"),
                         call_node("cublasSgemm TN m=500 n=128 k=800", 102.4e6, 2.3e6),
                         call_node(f"cudnnConvolutionForward {CONVOLUTION}", 409.6e6, 3.2e6)]}

    def cost(self, profile=None):
        return report.cost(profile or self.profile, lambda symbol: symbol, lambda symbol: 32)

    def test_nodes_and_sums(self):
        c = self.cost()
        self.assertEqual((c["nodes"], c["own_nodes"]), (5, 3))
        self.assertEqual(c["library_nodes"], {"cublasSgemm": 1, "cudnnConvolutionForward": 1})
        self.assertAlmostEqual(c["product_flops"], 512e6)
        rows = c["kernels"] + c["calls"]
        self.assertAlmostEqual(c["seconds"], sum(r["seconds"] for r in rows) + 5 * chip.NODE_GAP, 12)
        self.assertAlmostEqual(c["floor_fp32_seconds"], 512e6 / chip.FP32, 12)
        text = "\n".join(report.text("made up", c))
        for word in ("5 nodes (3 kernels of Baton", "gaussian_step_kernel", "cublasSgemm", "floors: fp32"):
            self.assertIn(word, text)
        self.assertIn("not measured", report.HEAD)

    def test_a_rise_exceeds_the_budget(self):
        granted = budget.entry(self.cost())
        self.assertEqual(list(budget.excesses("made up", granted, granted)), [])
        self.assertEqual(len(list(budget.excesses("made up", granted, None))), 1)

        longer = copy.deepcopy(self.profile)
        longer["graph"].append(kernel_node())
        complaints = list(budget.excesses("made up", budget.entry(self.cost(longer)), granted))
        self.assertTrue(any("6 nodes, budget 5" in line for line in complaints))
        self.assertTrue(any("launches 3, budget 2" in line for line in complaints))

        heavier = copy.deepcopy(self.profile)
        heavier["graph"][2]["counters"]["load_sectors"] += 1000
        complaints = list(budget.excesses("made up", budget.entry(self.cost(heavier)), granted))
        self.assertEqual(len(complaints), 1)
        self.assertIn("gaussian_step_kernel: bytes", complaints[0])

        busier = copy.deepcopy(self.profile)
        busier["graph"][0]["counters"]["warp_instructions"]["integer"] *= 2
        self.assertIn("warp_instructions", list(budget.excesses("made up", budget.entry(self.cost(busier)), granted))[0])

        other = copy.deepcopy(self.profile)
        other["graph"][2]["name"] = "another_kernel"
        complaints = "\n".join(budget.excesses("made up", budget.entry(self.cost(other)), granted))
        self.assertIn("another_kernel has no budget", complaints)
        self.assertIn("gaussian_step_kernel has a budget but is gone", complaints)


class CommandLine(unittest.TestCase):
    def run_tool(self, *arguments):
        return subprocess.run([sys.executable, str(TOOLS / "gpu-cost"), *arguments], capture_output=True, text=True)

    def test_list_and_refusals(self):
        listed = self.run_tool("--list").stdout.split("\n")
        for name in cases.BUDGETED:
            self.assertIn(name, listed)
        done = self.run_tool("--cases", "lenet7 ft x1")
        self.assertEqual(done.returncode, 2)
        self.assertIn("no step lenet7 ft x1", done.stderr)
        done = self.run_tool("--build", "/nonexistent")
        self.assertEqual(done.returncode, 1)
        self.assertIn("step_timing is missing; build it", done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
