#!/usr/bin/env python3
"""What tools/check-kernel-resources asks of kernels on the tensor cores: on a short disassembly with planted faults,
and on what nvcc makes of a small kernel, where nvcc and the disassembler are at hand."""
import contextlib
import importlib.machinery
import importlib.util
import io
import json
import pathlib
import tempfile
import unittest
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parents[2]
LOADER = importlib.machinery.SourceFileLoader("check_kernel_resources", str(ROOT / "tools" / "check-kernel-resources"))
check = importlib.util.module_from_spec(importlib.util.spec_from_loader(LOADER.name, LOADER))
LOADER.exec_module(check)
machine_code = check.machine_code

# In nvdisasm's form: a main loop of 12 instructions with 4 HMMA, before it a loop that copies, and behind it what may
# stand outside the main loop alone, a call and a conversion. main_loop() and others plant faults between the marks.
PRODUCT = """
	.target	sm_80
.text._Z7productPf:
        .type           _Z7productPf,@function
_Z7productPf:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDGSTS.E.BYPASS.128.ZFILL [R7+0xa00], [R4.64], P3 ;
        /*0020*/              @!P2 BRA `(.L_x_0) ;
        /*0030*/               @P2 BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/                   DEPBAR.LE SB0, 0x1 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   LDGSTS.E.BYPASS.128.ZFILL [R19], desc[UR8][R12.64], P1 ;
        /*0070*/                   LDGDEPBAR ;
        /*0080*/                   LDSM.16.M88.4 R12, [R27+0xa00] ;
        /*0090*/                   LDSM.16.M88.4 R16, [R26] ;
        /*00a0*/                   HMMA.1688.F32.TF32 R4, R16.reuse, R12, R4 ;
        /*00b0*/                   HMMA.1688.F32.TF32 R8, R16, R14, R8 ;
        // inner
        /*00c0*/                   HMMA.1688.F32.TF32 R4, R16.reuse, R20, R4 ;
        /*00d0*/                   HMMA.1688.F32.TF32 R8, R16, R22, R8 ;
        // loop
        /*00e0*/                   ISETP.GE.AND P1, PT, R21, UR5, PT ;
        /*00f0*/              @!P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0100*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath) ;
        /*0110*/                   LOP3.LUT R4, R4, 0xffffe000, RZ, 0xc0, !PT ;
        /*0120*/                   STG.E [R2.64], R4 ;
        // tail
        /*0130*/                   EXIT ;
        // aside
.L_x_3:
        /*0140*/                   BRA `(.L_x_3);
        /*0150*/                   NOP;
$__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath:
        /*0160*/                   RET.REL.NODEC R50 `(_Z7productPf) ;
"""
BRANCH_BACK = "@!P1 BRA `(.L_x_1) ;"


def instruction(text):
    return f"        /*0fff*/                   {text} ;\n"


def judged(text):
    kernels = machine_code.parse(text)
    assert list(kernels) == ["_Z7productPf"]
    return machine_code.judge(kernels["_Z7productPf"])


def plant(mark, text, into=PRODUCT):
    assert into.count(f"        // {mark}\n") == 1
    return into.replace(f"        // {mark}\n", text + f"        // {mark}\n")


class MainLoops(unittest.TestCase):
    def expect_flaw(self, text, words):
        flaws = judged(text)[1]
        self.assertEqual(len(flaws), 1, flaws)
        self.assertIn(words, flaws[0])

    def test_a_sound_product(self):
        self.assertEqual(judged(PRODUCT), (3.0, []))

    def test_a_kernel_without_hmma_is_no_product(self):
        self.assertEqual(judged(PRODUCT.replace("HMMA.1688.F32.TF32", "FFMA")), (None, []))
        self.assertEqual(judged(PRODUCT.replace("HMMA.1688.F32.TF32", "HFMA2.MMA")), (None, []))

    def test_instructions_are_counted(self):
        add = instruction("IADD3 R3, R3, 0x1, RZ")
        self.assertEqual(judged(plant("loop", 8 * add)), (5.0, []))
        self.assertEqual(judged(plant("loop", 9 * add)), (5.25, []))

    def test_conversions(self):
        for conversion in ("F2FP.TF32.F32.PACK_B R8, R8", "F2F.TF32.F32 R8, R8",
                           "LOP3.LUT R3, R3, 0xffffe000, RZ, 0xc0, !PT", "FSETP.GEU.AND P5, PT, |R6|, +INF , PT"):
            self.expect_flaw(plant("loop", instruction(conversion)), f"the main loop converts to tf32: {conversion}")
            self.assertEqual(judged(plant("tail", instruction(conversion)))[1], [])

    def test_local_memory_anywhere(self):
        for mark in ("loop", "tail"):
            self.expect_flaw(plant(mark, instruction("STL.64 [R1], R2") + instruction("LDL R2, [R1]")),
                             "2 accesses to local memory, the first by STL.64")

    def test_a_call(self):
        self.expect_flaw(plant("loop", instruction("CALL.REL.NOINC `($far)")), "the main loop calls `($far)")
        slow = "`($__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath)"
        self.expect_flaw(plant("loop", instruction("CALL.REL.NOINC " + slow)), "the main loop calls " + slow)

    def test_a_call_that_leaves_the_loop_for_good(self):
        left = plant("loop", instruction("@P1 CALL.REL.NOINC `(.L_x_9)"))
        self.assertEqual(judged(plant("aside", ".L_x_9:\n" + instruction("EXIT"), left))[1], [])

    def test_hmma_without_copies(self):
        lines = PRODUCT.splitlines(keepends=True)
        self.expect_flaw("".join(line for line in lines if "LDGSTS.E.BYPASS.128.ZFILL [R19]" not in line),
                         "a loop with HMMA has no LDGSTS")

    def test_hmma_in_no_loop(self):
        self.expect_flaw(PRODUCT.replace(BRANCH_BACK, "NOP ;"), "HMMA stands in no loop")

    def test_what_a_loop_does_elsewhere_belongs_to_it(self):
        away = plant("loop", "        /*0fff*/               @P5 BRA `(.L_x_4) ;\n.L_x_5:\n")
        conversion = instruction("F2FP.TF32.F32.PACK_B R8, R8")
        away = plant("aside", ".L_x_4:\n" + conversion + instruction("BRA `(.L_x_5)"), away)
        self.assertEqual(judged(away)[0], 3.75)
        self.expect_flaw(away, "converts to tf32")

    def test_a_loop_of_hmma_without_copies_is_part_of_the_one_around_it(self):
        inner = PRODUCT.replace("        // inner\n", ".L_x_6:\n")
        inner = plant("loop", "        /*0fff*/               @P6 BRA `(.L_x_6) ;\n", inner)
        self.assertEqual(judged(inner), (3.25, []))

    def test_every_main_loop_counts(self):
        second = PRODUCT[PRODUCT.index(".L_x_1:\n"):PRODUCT.index(".L_x_2:\n")].replace(".L_x_1", ".L_x_7")
        second = second.replace("        // inner\n", "").replace("        // loop\n", 12 * instruction("NOP"))
        self.assertEqual(judged(plant("tail", second)), (6.0, []))


class Budget(unittest.TestCase):
    def resources(self, per_hmma=3.0, registers=128, threads=256):
        used = {"registers": registers, "stack": 0, "spill": 0, "shared": 0, "per_hmma": per_hmma, "threads": threads}
        return {"kernels/a.cu": {"product(float*)": {"sm_80": used}}}

    def test_instructions_an_hmma_are_budgeted(self):
        with tempfile.TemporaryDirectory() as folder:
            with mock.patch.object(check, "BUDGET", pathlib.Path(folder) / "budget.json"):
                check.write_budget("13.0", self.resources())
                budget = json.loads(check.BUDGET.read_text())["kernels"]
        self.assertEqual(list(check.excesses(self.resources(), budget, True)), [])
        self.assertEqual(list(check.excesses(self.resources(per_hmma=2.9), budget, True)), [])
        self.assertEqual(list(check.excesses(self.resources(per_hmma=3.1), budget, True)),
                         ["kernels/a.cu: product(float*) (sm_80): per_hmma 3.1, budget 3.0"])
        del budget["kernels/a.cu"]["product(float*)"]["sm_80"]["per_hmma"]  # of a time when it was no product
        self.assertEqual(len(list(check.excesses(self.resources(), budget, True))), 1)

    def test_products_with_large_blocks_have_at_most_128_registers(self):
        self.assertEqual(list(check.flaws_of(self.resources())), [])
        self.assertIn("129 registers", next(check.flaws_of(self.resources(registers=129))))
        self.assertIn("129 registers", next(check.flaws_of(self.resources(registers=129, threads=None))))
        self.assertEqual(list(check.flaws_of(self.resources(registers=129, threads=128))), [])

    def test_long_main_loops_are_told(self):
        self.assertIn("1 have more than 5 instructions an HMMA, at most 6.00",
                      check.describe_products(self.resources(per_hmma=6.0)))
        self.assertIn("0 have more", check.describe_products(self.resources()))
        self.assertEqual(check.describe_products({}), "")

    def test_without_a_disassembler_the_check_fails(self):
        said = io.StringIO()
        with mock.patch.object(check, "find_nvcc", return_value="nvcc"), mock.patch("sys.argv", ["check"]), \
                mock.patch.object(machine_code, "find_disassembler", return_value=None), \
                contextlib.redirect_stderr(said):
            self.assertEqual(check.main(), 1)
        self.assertIn("tools/setup --gpu-checks installs it", said.getvalue())


SOURCE = """#include "engine/simt.h"
using namespace baton;
constexpr int sound = 0, rounds = 1, converts = 2, waits = 3;
template <int how>
__global__ void __launch_bounds__(128) product(float* c, const float* a, int steps) {
  SIMT_DYNAMIC_SHARED(float, s);
  const int t = threadIdx.x;
  float sums[16][4] = {};
  const auto fetch = [&](int step) { simt::copy_async<4>(s + step % 2 * 512 + t * 4, a + step * 512 + t * 4); };
  fetch(0);
  simt::copy_async_commit();
  for (int step = 0; step < steps; step++) {
    if (how != waits) fetch(step + 1);
    simt::copy_async_commit();
    simt::copy_async_wait<1>();
    __syncthreads();
    for (int part = 0; part < 8; part++) {
      float x[4], w[4];
      simt::load_matrix(x, s + step % 2 * 512 + part / 2 * 128 + t % 32 * 4);
      simt::load_matrix(w, s + step % 2 * 512 + part % 4 * 128 + t % 32 * 4);
      if (how == rounds) x[0] = simt::round_to_tf32(x[0]);
      if (how == converts) asm("{ .reg .b32 r; cvt.rna.tf32.f32 r, %0; mov.b32 %0, r; }" : "+f"(x[0]));
      simt::mma_tf32(sums[part * 2], x, {w[0], w[1]});
      simt::mma_tf32(sums[part * 2 + 1], x, {w[2], w[3]});
    }
    __syncthreads();
  }
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 4; j++) c[(t * 16 + i) * 4 + j] = sums[i][j];
}
template __global__ void product<sound>(float*, const float*, int);
template __global__ void product<rounds>(float*, const float*, int);
template __global__ void product<converts>(float*, const float*, int);
template __global__ void product<waits>(float*, const float*, int);
"""


class RealCode(unittest.TestCase):
    @unittest.skipUnless(check.find_nvcc(), "nvcc is not on this machine")
    @unittest.skipUnless(machine_code.find_disassembler(), "no disassembler is here (tools/setup --gpu-checks)")
    def test_kernels_of_nvcc(self):
        with tempfile.TemporaryDirectory() as folder:
            source = pathlib.Path(folder) / "product.cu"
            source.write_text(SOURCE)
            found, complaints = check.measure(check.find_nvcc(), machine_code.find_disassembler(), [str(source)])
        kernels = found[str(source)]
        self.assertEqual(len(kernels), 4)
        for targets in kernels.values():
            self.assertEqual(set(targets), {"sm_80", "sm_90"})
            for used in targets.values():
                self.assertTrue(1 < used["per_hmma"] < 8, used)
        for target in ("sm_80", "sm_90"):
            def said(how):
                return "\n".join(line for line in complaints if f"product<{how}>" in line and target in line)
            self.assertEqual(said(0), "")
            self.assertIn("converts to tf32: LOP3", said(1))
            self.assertIn("converts to tf32: FSETP", said(2))
            self.assertIn("has no LDGSTS", said(3))


if __name__ == "__main__":
    unittest.main(verbosity=2)
