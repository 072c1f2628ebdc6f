"""The chip that costs are computed for: an NVIDIA H200 (132 multiprocessors of compute capability 9.0).

Every rate is a data sheet's or a published microbenchmark's, none was measured by Baton; tools/first-light measures the
ones that decide and puts them beside these.
"""
import math

NAME = "H200"
MULTIPROCESSORS = 132
SCHEDULERS = 4                 # a multiprocessor, each issues one warp instruction a cycle
CLOCK = 1.98e9                 # Hz, boost
FP32 = 67e12                   # FLOP/s, ordinary cores
TF32 = 495e12                  # FLOP/s, tensor cores, dense
FLOPS_OF_HMMA = 2 * 16 * 8 * 8  # of one mma.m16n8k8
HBM = 4.3e12                   # bytes/s that a copy reaches; the data sheet says 4.8
L2 = 5.5e12                    # bytes/s
L2_BYTES = 50e6
REGISTERS = 65536              # of 32 bits, a multiprocessor
SHARED = 228 * 1024            # bytes a multiprocessor
THREADS, BLOCKS = 2048, 32     # a multiprocessor
NODE_GAP = 1.3e-6              # s between two dependent nodes of a graph
KERNEL_RAMP = 0.7e-6           # s to start and drain a kernel's blocks
LIBRARY_FLOOR = 3e-6           # s, of the shortest library call


# Issue cycles of a scheduler that a warp instruction of PTX takes, by class: how many machine instructions ptxas makes of
# it, times the cycles for which the unit is busy. The first factor was fitted to the machine code of 151 kernels of
# Baton (91,400 instructions of 73,600 of PTX, median error of a kernel 14 %): many moves vanish, 64-bit integers
# double, divisions become routines (of the exact ones, whose rare branches count in the code and not in the time, half).
ISSUE = {
    "integer": 0.5, "integer64": 1.4, "division": 24.0, "float32": 1.0, "float64": 2.7,
    "special": 8.0,  # 4 lanes a cycle and scheduler
    "exact32": 12.0, "exact64": 80.0, "conversion": 4.0,
    "global_load": 1.5, "global_store": 1.5, "shared_load": 1.0, "shared_store": 1.0, "parameter": 0.3,
    "tensor": 7.0,  # 2048 FLOP: 4.3 at the data sheet's rate, which only wgmma reaches; an estimate
    "matrix_load": 1.0, "async_copy": 1.5,
    "atomic": 4.0, "exchange": 4.0, "barrier": 2.0, "control": 2.0,
}


def blocks_per_multiprocessor(threads, registers, shared):
    """How many blocks are resident at once, by threads, registers (None: unknown) and shared memory."""
    warps = math.ceil(threads / 32)
    limits = [BLOCKS, THREADS // (32 * warps), SHARED // (shared + 1024)]
    if registers:
        of_a_warp = math.ceil(registers * 32 / 256) * 256
        limits.append(REGISTERS // (of_a_warp * warps))
    return max(1, min(limits))
