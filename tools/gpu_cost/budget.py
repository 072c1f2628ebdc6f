"""The budget of costs: what a step's nodes, and its kernels' instructions and bytes, may be."""
import json
import os


def entry(cost):
    """What the budget keeps of a step's cost. Kernels of one name (instances of a template) are apart."""
    return {
        "nodes": cost["nodes"],
        "kernels": {k["name"]: {"launches": k["launches"], "warp_instructions": k["warp_instructions"],
                                "bytes": k["bytes"]} for k in cost["kernels"]},
    }


def excesses(case, found, granted):
    """Complaints about what has risen, by more than the thousandth part that another allocation of names may move."""
    if granted is None:
        yield f"{case}: has no budget"
        return
    if found["nodes"] > granted["nodes"]:
        yield f"{case}: {found['nodes']} nodes, budget {granted['nodes']}"
    for name, used in found["kernels"].items():
        limit = granted["kernels"].get(name)
        if limit is None:
            yield f"{case}: {name} has no budget"
            continue
        for what, value in used.items():
            if value > limit[what] * 1.001:
                yield f"{case}: {name}: {what} {value}, budget {limit[what]}"
    for name in granted["kernels"].keys() - found["kernels"].keys():
        yield f"{case}: {name} has a budget but is gone"


def write(path, release, entries):
    """One line a kernel, so that a change reads well in a diff."""
    lines = [f'{{"nvcc": "{release}", "cases": {{']
    for number, (case, e) in enumerate(entries.items()):
        lines.append(f' {json.dumps(case)}: {{"nodes": {e["nodes"]}, "kernels": {{')
        kernels = [f"  {json.dumps(name)}: {json.dumps(used)}" for name, used in sorted(e["kernels"].items())]
        lines.append(",\n".join(kernels))
        lines.append(" }}" + ("," if number + 1 < len(entries) else ""))
    lines.append("}}")
    part = path.with_suffix(".part")
    part.write_text("\n".join(lines) + "\n")
    os.replace(part, path)
