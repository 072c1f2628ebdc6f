"""What a node of a graph takes on the chip, from what the interpreter counted. A model, never a measurement.

A kernel takes the longest of: moving its bytes, issuing its instructions, and the chain of dependent instructions of its
blocks, wave after wave; plus what starting it costs. A library's product is taken as tiles on the ordinary cores.
"""
import collections
import math
import re

from . import chip

Estimate = collections.namedtuple("Estimate", "seconds bound memory issue chain")


def kernel(node, registers):
    """The time of a kernel's launch: {"grid", "block", "shared_bytes", "counters"}."""
    c = node["counters"]
    blocks, threads = math.prod(node["grid"]), math.prod(node["block"])
    resident = chip.blocks_per_multiprocessor(threads, registers, node["shared_bytes"])
    footprint = c["loaded_footprint_bytes"] + c["stored_footprint_bytes"]
    traffic = 32 * (c["load_sectors"] + c["store_sectors"])
    memory = max(traffic / chip.L2, footprint / chip.HBM if footprint > chip.L2_BYTES else footprint / chip.L2)

    slots = sum(count * chip.ISSUE[name] for name, count in c.get("warp_instructions", {}).items())
    slots += max(0, c["shared_wavefronts"] - c["shared_requests"])
    busiest = math.ceil(blocks / chip.MULTIPROCESSORS) / blocks  # the share of the fullest multiprocessor
    warps = math.ceil(threads / 32) * min(resident, math.ceil(blocks / chip.MULTIPROCESSORS))
    issue = slots * busiest / min(chip.SCHEDULERS, warps) / chip.CLOCK

    waves = math.ceil(blocks / (chip.MULTIPROCESSORS * resident))
    chain = waves * c["block_cycles"] / blocks / chip.CLOCK
    chain = max(chain, c["longest_chain"]["cycles"] / chip.CLOCK)

    bound, seconds = max((("bytes", memory), ("issue", issue), ("chain", chain)), key=lambda x: x[1])
    return Estimate(seconds + chip.KERNEL_RAMP, bound, memory, issue, chain)


# Tiles that a library may choose (rows, columns) and the share of the ordinary cores' rate that their inner loop reaches.
TILES = [(128, 128, 0.75), (128, 64, 0.7), (64, 128, 0.7), (64, 64, 0.6), (128, 32, 0.55), (32, 128, 0.55), (64, 32, 0.45),
         (32, 64, 0.45), (32, 32, 0.35)]
SPLITS = (1, 2, 4, 8, 16, 32)


def product(m, n, k, count=1, nbytes=0):
    """`count` products [m x k][k x n] in one call: the best of the tiles and of cutting k into pieces."""
    if min(m, n, k, count) <= 0:
        return chip.LIBRARY_FLOOR
    best = math.inf
    for rows, columns, efficiency in TILES:
        tiles = math.ceil(m / rows) * math.ceil(n / columns) * count
        for split in SPLITS:
            piece = math.ceil(k / split)
            if split > 1 and piece < 32:
                break
            waves = math.ceil(tiles * split / chip.MULTIPROCESSORS)
            seconds = waves * 2 * rows * columns * piece / (efficiency * chip.FP32 / chip.MULTIPROCESSORS)
            if split > 1:  # the pieces are written and added
                seconds += 1.5e-6 + 8 * m * n * count * split / chip.L2
            best = min(best, seconds)
    return max(best, nbytes / chip.HBM) + chip.LIBRARY_FLOOR


# What addressing an image as a matrix costs a convolution beside a plain product of the same extents.
CONVOLUTION_FACTOR = 1.25
CONVOLUTION = re.compile(r"cudnnConvolution(\w+) (\d+)x(\d+)x(\d+)x(\d+) to (\d+), kernel (\d+)x(\d+), padding (\d+)x(\d+), "
                         r"stride (\d+)x(\d+)")


def convolution_as_product(match):
    """(m, n, k) of the product that a convolution is: outputs by places by inputs, or what its gradients are."""
    batch, inputs, height, width, outputs, rows, columns, pad_y, pad_x, step_y, step_x = map(int, match.groups()[1:])
    places = batch * ((height + 2 * pad_y - rows) // step_y + 1) * ((width + 2 * pad_x - columns) // step_x + 1)
    if match[1] == "Forward":
        return outputs, places, inputs * rows * columns
    if match[1] == "BackwardData":
        return inputs, batch * height * width, outputs * rows * columns
    return outputs, inputs * rows * columns, places


def call(node):
    """The time of a library's call, whose name carries its extents where it is a product or a convolution."""
    name, nbytes = node["name"], node["bytes"]
    memory, issue = nbytes / chip.HBM, node["flops"] / chip.FP32
    if match := CONVOLUTION.match(name):
        seconds = CONVOLUTION_FACTOR * product(*convolution_as_product(match), 1, nbytes)
        return Estimate(seconds, "library", memory, issue, 0)
    extents = {key: int(value) for key, value in re.findall(r"\b(m|n|k|count)=(\d+)", name)}
    if {"m", "n", "k"} <= extents.keys():
        seconds = product(extents["m"], extents["n"], extents["k"], extents.get("count", 1), nbytes)
        return Estimate(seconds, "library", memory, issue, 0)
    return Estimate(nbytes / chip.L2 + chip.KERNEL_RAMP, "bytes", nbytes / chip.L2, 0, 0)
