"""A step's cost from its profile: by kernel, by library call, the sum, and the floors."""
import collections
import math

from . import chip, model

HEAD = "Computed, not measured: counts by interpreting nvcc's PTX, times by a model of an " + chip.NAME


def cost(profile, readable_name, registers_of):
    """The cost of a step as a dictionary, ready for JSON. `readable_name` and `registers_of` take a kernel's symbol."""
    groups = collections.OrderedDict()
    for node in profile["graph"]:
        key = node["name"].split(" ")[0] if node["kind"] == "call" else node["name"]
        groups.setdefault((node["kind"], key), []).append(node)
    kernels, calls = [], []
    for (kind, key), nodes in groups.items():
        if kind == "kernel":
            kernels.append(kernel_row(nodes, readable_name(key), registers_of(key)))
        else:
            calls.append(call_row(nodes, key))
    # Of our own products every HMMA counts, also where a tile is larger than what it is filled with.
    tensor = sum(n["counters"].get("warp_instructions", {}).get("tensor", 0) for n in profile["graph"]
                 if n["kind"] == "kernel")
    flops = sum(row["flops"] for row in calls) + tensor * chip.FLOPS_OF_HMMA
    update = max((row for row in kernels if row["is_update"]), key=lambda row: row["footprint_bytes"], default=None)
    update_bytes = update["footprint_bytes"] if update else 0
    nodes = len(profile["graph"])
    seconds = sum(row["seconds"] for row in kernels + calls) + nodes * chip.NODE_GAP
    return {
        "nodes": nodes,
        "own_nodes": sum(row["launches"] for row in kernels),
        "library_nodes": {row["name"]: row["calls"] for row in calls},
        "seconds": seconds,
        "gap_seconds": nodes * chip.NODE_GAP,
        "product_flops": flops,
        "floor_fp32_seconds": max(flops / chip.FP32, update_bytes / chip.HBM),
        "floor_tf32_seconds": flops / chip.TF32 + update_bytes / chip.HBM,
        "kernels": kernels,
        "calls": calls,
    }


UPDATES = ("gaussian_step_kernel", "cholesky_step_kernel", "adam_kernel", "sgd_kernel", "update_kernel", "point_step")


def kernel_row(nodes, name, registers):
    counters = [n["counters"] for n in nodes]

    def total(key):
        return sum(c[key] for c in counters)

    instructions = collections.Counter()
    lanes = collections.Counter()
    for c in counters:
        instructions.update(c.get("warp_instructions", {}))
        lanes.update(c.get("lane_instructions", {}))
    estimates = [model.kernel(n, registers) for n in nodes]
    longest = max((c["longest_chain"] for c in counters), key=lambda chain: chain["cycles"])
    slowest = max(estimates, key=lambda e: e.seconds)
    threads = math.prod(nodes[0]["block"])
    resident = chip.blocks_per_multiprocessor(threads, registers, nodes[0]["shared_bytes"])
    return {
        "name": name,
        "is_update": any(word in name for word in UPDATES),
        "launches": len(nodes),
        "blocks": total("blocks"),
        "threads_per_block": threads,
        "registers": registers,
        "shared_bytes": nodes[0]["shared_bytes"],
        "occupancy": min(1.0, resident * threads / chip.THREADS),
        "warp_instructions": sum(instructions.values()),
        "by_class": dict(sorted(instructions.items(), key=lambda x: -x[1])),
        "active_lanes": sum(lanes.values()) / max(1, sum(instructions.values())),
        "footprint_bytes": total("loaded_footprint_bytes") + total("stored_footprint_bytes"),
        "bytes": 32 * (total("load_sectors") + total("store_sectors")),
        "sectors_per_load": total("load_sectors") / max(1, total("load_requests")),
        "sectors_per_store": total("store_sectors") / max(1, total("store_requests")),
        "wavefronts_per_shared": total("shared_wavefronts") / max(1, total("shared_requests")),
        "divergence": total("divergent_branches") / max(1, total("branches")),
        "longest_chain": longest,
        "bound": slowest.bound,
        "seconds": sum(e.seconds for e in estimates),
    }


def call_row(nodes, name):
    estimates = [model.call(n) for n in nodes]
    return {
        "name": name,
        "calls": len(nodes),
        "flops": sum(n["flops"] for n in nodes),
        "bytes": sum(n["bytes"] for n in nodes),
        "seconds": sum(e.seconds for e in estimates),
        "shapes": [{"call": n["name"], "seconds": e.seconds} for n, e in zip(nodes, estimates)],
    }


def amount(value):
    """1234567 as 1.23 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


CLASS_GROUPS = [("int", ("integer", "integer64", "division")), ("fp32", ("float32", "exact32")),
                ("fp64", ("float64", "exact64")), ("mma", ("tensor",)), ("sfu", ("special",)), ("cvt", ("conversion",)),
                ("glob", ("global_load", "global_store", "async_copy", "atomic")),
                ("shar", ("shared_load", "shared_store", "matrix_load")),
                ("shfl", ("exchange",)), ("bar", ("barrier",)), ("else", ("control", "parameter"))]


def text(case, c):
    """The cost of a step as lines to read."""
    lines = [f"== {case}: {c['nodes']} nodes ({c['own_nodes']} kernels of Baton"
             + "".join(f", {count} {name}" for name, count in c["library_nodes"].items()) + ")"]
    head = ["kernel", "launch", "blocks", "thr", "regs", "occ", "warp ins"]
    head += [name for name, _ in CLASS_GROUPS]
    head += ["bytes", "sect/ld", "sect/st", "wave/sh", "diverg", "chain: cycles", "loads", "bars", "bound", "us"]
    table = [head]
    for k in sorted(c["kernels"], key=lambda row: -row["seconds"]):
        total = max(1, k["warp_instructions"])
        row = [k["name"], k["launches"], k["blocks"], k["threads_per_block"],
               k["registers"] if k["registers"] else "?", f"{100 * k['occupancy']:.0f}%", amount(k["warp_instructions"])]
        for _, classes in CLASS_GROUPS:
            share = 100 * sum(k["by_class"].get(name, 0) for name in classes) / total
            row.append(f"{share:.0f}%" if share >= 0.5 else ".")
        chain = k["longest_chain"]
        row += [amount(k["bytes"]), f"{k['sectors_per_load']:.1f}", f"{k['sectors_per_store']:.1f}",
                f"{k['wavefronts_per_shared']:.1f}", f"{100 * k['divergence']:.0f}%", amount(chain["cycles"]),
                chain["loads"], chain["barriers"], k["bound"], f"{1e6 * k['seconds']:.1f}"]
        table.append(row)
    lines += columns(table)
    if c["calls"]:
        table = [["library call", "calls", "FLOP", "bytes", "us"]]
        for k in sorted(c["calls"], key=lambda row: -row["seconds"]):
            table.append([k["name"], k["calls"], amount(k["flops"]), amount(k["bytes"]), f"{1e6 * k['seconds']:.1f}"])
        lines += columns(table)
    total, fp32, tf32 = c["seconds"], c["floor_fp32_seconds"], c["floor_tf32_seconds"]
    lines.append(f"step {1e6 * total:.0f} us, of which {1e6 * c['gap_seconds']:.0f} us between nodes; floors: fp32 "
                 f"{1e6 * fp32:.1f} us ({total / fp32 if fp32 else math.nan:.1f}x), tf32 {1e6 * tf32:.1f} us "
                 f"({total / tf32 if tf32 else math.nan:.1f}x)")
    return lines


def columns(table):
    table = [[str(cell) for cell in row] for row in table]
    table = [[row[0][:44]] + row[1:] for row in table]
    widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
    return ["  " + row[0].ljust(widths[0]) + "  " + "  ".join(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))
            for row in table]
