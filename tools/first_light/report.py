"""Writes what a run knows: first_light.json, and README.md, the page for readers. Both are whole at any moment."""
import collections
import json
import os
import re

JSON, PAGE = "first_light.json", "README.md"
STATUSES = ("passed", "failed", "timed out", "not run")


def write(folder, record):
    for name, text in ((JSON, json.dumps(record, indent=1) + "\n"), (PAGE, page(record))):
        part = folder / (name + ".part")
        part.write_text(text)
        os.replace(part, folder / name)


def counts(checks):
    found = collections.Counter(check["status"] for check in checks)
    return {status: found[status] for status in STATUSES}


def table(head, rows):
    """A Markdown table; numbers are right-aligned by what the first row holds."""
    if not rows:
        return []
    cells = [[number(cell) for cell in row] for row in rows]
    right = [any(isinstance(row[i], (int, float)) for row in rows) for i in range(len(head))]
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join("---:" if r else "---" for r in right) + "|"]
    for row in cells:
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |")
    return lines + [""]


def number(x):
    if x is None:
        return ""
    if isinstance(x, float):
        return f"{x:.4g}" if abs(x) < 1e4 else f"{x:,.0f}"
    return str(x)


def code(text):
    return f"`{text}`" if text else ""


def page(record):
    checks = record["checks"]
    machine = record.get("machine", {})
    where = machine.get("gpu") or machine.get("device") or record["label"]
    lines = [f"# First light: {where}", ""]
    total = counts(checks)
    lines += table(["", ""], [
        ["figures", f"**{record['label']}**"],
        ["device", machine.get("device", "not asked")],
        ["driver", machine.get("driver", "none")],
        ["date", record["started"]],
        ["commit", record["commit"]],
        ["checks", ", ".join(f"**{count} {status}**" for status, count in total.items())],
        ["minutes", f"{record['minutes']} were given; " + ("the run ended by itself" if record.get("finished")
                                                         else "the run has not ended, or was ended")],
    ])
    lines += table(["stage", *STATUSES, "seconds"],
                   [[stage, *counts(group).values(), round(sum(c.get("seconds", 0) for c in group), 1)]
                    for stage, group in by_stage(checks).items()])
    lines += failures(checks) + unreached(checks)
    found = timings(checks) + predictions(record) + kernels(checks) + calibration(checks)
    found += convolutions(checks) + repeats(checks) + micro(checks) + papers(checks)
    if record["mode"] != "gpu":  # a table that is read alone says whose figures it has
        found = [f"{line} ({record['label']})" if line.startswith("## ") else line for line in found]
    lines += found
    lines += ["## All checks", ""]
    lines += table(["check", "status", "seconds", "says"],
                   [[f"{c['stage']}/{c['name']}", c["status"], c.get("seconds"), summary(c)] for c in checks])
    return "\n".join(lines)


def by_stage(checks):
    groups = {}
    for check in checks:
        groups.setdefault(check["stage"], []).append(check)
    return groups


def summary(check):
    figures = check.get("figures") or {}
    if check["status"] == "not run":
        return check.get("reason", "")
    if "skipped" in figures:
        said = f"{figures['passed']} cases passed"
        said += f", {len(figures['failed'])} failed" if figures["failed"] else ""
        return said + (f", {len(figures['skipped'])} skipped" if figures["skipped"] else "")
    if check.get("errors"):
        return "; ".join(check["errors"][:2])
    return "; ".join(f"{key}: {number(value)}" for key, value in figures.items()
                     if isinstance(value, (str, int, float)))[:200]


def failures(checks):
    bad = [check for check in checks if check["status"] in ("failed", "timed out")]
    lines = ["## Failures", ""] if bad else ["No check failed.", ""]
    for check in bad:
        lines += [f"**{check['stage']}/{check['name']}** {check['status']} after {check.get('seconds', 0):.1f} s", ""]
        lines += ["```"]
        lines += [line.replace("```", "'''") for line in alike_together(check.get("errors", []))[:12]]
        lines += ["```", ""]
        if check.get("commands"):
            lines += [f"    {check['commands'][0][:300]}", ""]
    return lines


def alike_together(errors):
    """Cases that failed with the same words, but for addresses and numbers, are one line."""
    groups = {}
    for error in errors:
        case, colon, said = error.partition(": ")
        groups.setdefault(re.sub(r"0x[0-9a-f]+|\d+", "#", said), []).append((case, error))
    return [group[0][1] + (f" (so too {', '.join(case for case, _ in group[1:])})" if len(group) > 1 else "")
            for group in groups.values()]


def unreached(checks):
    skipped = [(f"{c['stage']}/{c['name']}: {case}", why) for c in checks
               for case, why in ((c.get("figures") or {}).get("skipped") or {}).items()]
    reasons = {}
    for check in checks:
        if check["status"] == "not run":
            reasons.setdefault(check.get("reason", ""), []).append(f"{check['stage']}/{check['name']}")
    lines = ["## Not run", ""] if reasons or skipped else []
    lines += table(["why", "checks"], [[why, ", ".join(names)] for why, names in reasons.items()])
    if skipped:
        lines += ["Cases that skipped themselves, which are not passed ones:", ""]
        lines += table(["case", "why"], skipped)
    return lines


def all_figures(checks, stage):
    return [check["figures"] for check in checks if check["stage"] == stage and check.get("figures")]


def timings(checks):
    rows = {}
    for f in all_figures(checks, "timings"):
        if "side" in f and f["side"] != "preparation":
            rows.setdefault((f["case"], f.get("rows", 1), f["batch"]), {})[f["side"]] = f
    if not rows:
        return []
    sides = [side for side in ("eager", "compiled", "eager, tf32") if any(side in row for row in rows.values())]
    lines = ["## Steps", "", "Milliseconds of one step or prediction, medians. Ratio: PyTorch's time over Baton's.", ""]
    body = []
    for (case, count, batch), row in rows.items():
        ours = row.get("baton", {}).get("ms")
        cells = [case, count, batch, ours]
        for side in sides:
            theirs = row.get(side, {}).get("ms")
            cells += [theirs, theirs / ours if theirs and ours else None]
        body.append(cells)
    return lines + table(["step", "rows", "batch", "Baton",
                          *(word for side in sides for word in (f"PyTorch {side}", "ratio"))], body)


def predictions(record):
    """record["predictions"]: what tools/gpu-cost --json wrote, {"steps": {"lenet5 ffg x1": {"seconds", "gap_seconds",
    "kernels": [{"name", "launches", "seconds"}], "calls": [{"name", "calls", "seconds"}]}}}."""
    predicted = (record.get("predictions") or {}).get("steps") or {}
    steps, launches = {}, {}
    for f in all_figures(record["checks"], "timings"):
        if f.get("side") == "baton":
            steps[f["case"], f.get("rows", 1)] = 1e3 * f["ms"]
    for f in all_figures(record["checks"], "calibration"):
        for kernel, us in f.get("kernels", []):
            launches.setdefault(f["case"], []).append((plain(kernel), us))
    rows = []
    for name, cost in predicted.items():
        network, method, size = name.split(" ")
        if size.startswith("K=") and size != "K=10":  # the draws that are timed
            continue
        case, count = f"{network} {method}_step", int(size[1:]) if size.startswith("x") else 1

        def add(part, seconds, measured):
            rows.append([case, count, part, 1e6 * seconds, measured,
                         measured / (1e6 * seconds) if measured is not None and seconds > 0 else None])

        add("**whole step**", cost["seconds"], steps.get((case, count)))
        own = {plain(k["name"]): k["seconds"] for k in cost["kernels"]}
        known = launches.get(case) if count == 1 else None
        if not known:
            continue
        for kernel, seconds in sorted(own.items(), key=lambda item: -item[1]):
            times = [us for found, us in known if found == kernel]
            add(kernel, seconds, sum(times) if times else None)
        add("the libraries' kernels", sum(call["seconds"] for call in cost["calls"]),
            sum(us for found, us in known if found not in own))
        if (case, count) in steps:
            add("between kernels", cost["gap_seconds"], steps[case, count] - sum(us for _, us in known))
    if not rows:
        return []
    return ["## Predicted beside measured", "", "Microseconds; the prediction is tools/gpu-cost's. Single kernels are "
            "Nsight Compute's times, each launch alone.", "",
            *table(["step", "rows", "part", "predicted", "measured", "ratio"], rows)]


def plain(kernel):
    """A kernel's name without namespaces, template arguments and parameters."""
    name = kernel.split("(anonymous namespace)::")[-1].split("<unnamed>::")[-1]
    return name.split("(")[0].split("<")[0].split("::")[-1].split()[-1] if name.strip() else kernel


def kernels(checks):
    lines = []
    for f in all_figures(checks, "calibration"):
        if "kernels" in f:
            groups = {}
            for name, us in f["kernels"]:
                groups.setdefault(plain(name), []).append(us)
            lines += [f"## Kernels of {f['case']}", "", f"{len(f['kernels'])} kernels, {f['sum']} us without the gaps "
                      "between them (Nsight Compute).", ""]
            lines += table(["kernel", "launches", "us together", "share"],
                           [[name, len(us), sum(us), f"{100 * sum(us) / max(1e-9, f['sum']):.0f} %"]
                            for name, us in sorted(groups.items(), key=lambda item: -sum(item[1]))])
    return lines


def calibration(checks):
    rows = [[c["name"], c["value"], c["unit"], c["how"]] for f in all_figures(checks, "calibration")
            for c in f.get("calibration", [])]
    return ["## Rates and latencies", "", *table(["", "", "", "how"], rows)] if rows else []


def convolutions(checks):
    lines = []
    for f in all_figures(checks, "convolutions"):
        if "offer" in f:
            lines += ["## Convolution algorithms", "", "What the library offers and can run, in its order; **chosen** "
                      "by Baton. (The JSON has the others too.)", ""]
            offered = {}
            for o in f["offer"]:
                if o["status"] != "CUDNN_STATUS_SUCCESS":
                    continue
                words = f"{o['algorithm']} ({o['math']}, {o['determinism']}, {o['workspace'] >> 10} KB)"
                words = re.sub(r"CUDNN_(CONVOLUTION_(FWD|BWD_DATA|BWD_FILTER)_ALGO_)?", "", words)
                offered.setdefault((o["layer"], o["shape"][0], o["direction"]), []).append(
                    f"**{words}**" if o["chosen"] else words)
            lines += table(["layer", "batch", "direction", "offers"],
                           [[*key, ", ".join(words)] for key, words in offered.items()])
        if "variance" in f:
            lines += ["## Variance convolutions", "", "Inputs and weights are not negative; nor may results be.", ""]
            lines += table(["layer", "batch", "algorithm", "least", "greatest", "negative", "not finite", "error"],
                           [[v["layer"], v["shape"][0], v["algorithm"], v["least"], v["greatest"], v["negative"],
                             v["not_finite"], v["relative_error"]] for v in f["variance"]])
    return lines


def repeats(checks):
    rows = [[check["name"], check["status"], run, accuracy] for check in checks if check["stage"] == "repeat"
            for run, accuracy in ((check.get("figures") or {}).get("accuracies") or {}).items()]
    return ["## Repeated runs", "", *table(["check", "status", "run", "test accuracy"], rows)] if rows else []


def micro(checks):
    rows = [[code(name), us] for f in all_figures(checks, "calibration")
            for name, us in f.get("microseconds", {}).items()]
    return ["## bench/micro", "", *table(["benchmark", "us"], rows)] if rows else []


def papers(checks):
    rows = [[check["name"], run.get("label") or run.get("method"), run.get("parts"), run.get("seed"),
             run.get("final_test_accuracy"), run.get("seconds")]
            for check in checks if check["stage"] == "papers" for run in (check.get("figures") or {}).get("runs", [])]
    head = ["program", "method", "parts", "seed", "test accuracy", "seconds"]
    return ["## Paper programs", "", *table(head, rows)] if rows else []
