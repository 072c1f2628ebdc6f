"""The figures of the Bayesian gradient descent paper (Zeno et al. 2018): of bgd_mnist (tables 1 and 2),
bgd_permuted_mnist (figure 1), bgd_cifar10 (figures 2 and 3, table 3) and bgd_cifar_tasks (figure 4).

A read_* function takes what it draws out of a result; None where no run has finished a stage."""
import collections
import math
import textwrap

from matplotlib import ticker

from .bgd_parts import (DASHED, colours_of, data_of, diamonds, draw_line, draw_pruned, is_whole, left_out, legend,
                        lifted, linear_limits, lines_of, logarithmic, pruned_lines, published, runs_of, tidy,
                        words_of)
from .common import LABEL_GAP, METHODS, End, name_ends, page

# How BGD predicts: its name in the figure and its colour.
WAYS = {"committee": ("committee", "#5E1050"), "softmax": ("mean softmax", "#E69F00"),
        "sampled": ("sampled", "#C1121F"), "map": ("MAP", "#009E73")}

Mnist = collections.namedtuple("Mnist", "errors pruned")
Cifar10 = collections.namedtuple("Cifar10", "accuracies sigmas pruned")
Sigma = collections.namedtuple("Sigma", "label colour seeds edges shares initial median largest")


# bgd_mnist

def read_mnist(result):
    runs = runs_of(result)
    errors = lines_of(runs, lambda run: [(s["epoch"], 100 * (1 - s["test_accuracy"])) for s in run["stages"]])
    return Mnist(errors, pruned_lines(runs)) if errors else None


def draw_mnist(result, drawn):
    lines, whole = lifted(drawn.errors), is_whole(result, 50000, 10000)
    values = {(method, width): value for method, width, _, value in published("table1")} if whole else {}
    marks = [(values[line.method, line.settings.get("width")], line.colour) for line in lines
             if (line.method, line.settings.get("width")) in values
             and not (line.method == "bbb" and "mixture" in (line.settings.get("prior") or {}))]
    ratios = published("table2") if whole else []
    known = {(line.method, line.settings.get("width")) for line in drawn.pruned}
    notes = []
    if marks:
        notes.append("Faint diamonds: published values, test errors after 600 epochs (Zeno et al. 2018, table 1; SGD's "
                     "and BBB's are of Blundell et al. 2015)"
                     + (" and ratios of their table 2." if any(r[:2] in known for r in ratios) else "."))
    notes.append(left_out(result, 50000, 10000))
    height = max(3.6, LABEL_GAP * max(len(drawn.errors), len(drawn.pruned)))
    width, boxes = 7.2, [(0.75, 0, 4.4, height)]
    if drawn.pruned:
        width, boxes = 13.2, boxes + [(7.75, 0, 3.3, height)]
    words = words_of(result, f"Bayesian gradient descent on {data_of(result)}",
                     f"{result['dataset']['test']:,} test images", [line.seeds for line in lines], notes, width)
    figure, axes = page(words, width, height, boxes, head=0.3 if drawn.pruned else 0)

    last = max(line.x[-1] for line in lines)
    for line in lines:
        draw_line(axes[0], line)
    axes[0].set_xlim(0, 1.03 * last)
    for value, colour in marks:
        diamonds(axes[0], [1.03 * last], [value], colour)
    logarithmic(axes[0], [v for line in lines for v in line.low + line.high] + [value for value, _ in marks])
    axes[0].set_xlabel("epoch")
    axes[0].set_ylabel("test error, %")
    tidy(axes[0])
    name_ends(axes[0], [End(line.x[-1], line.mean[-1], f"{line.label}:  {real.mean[-1]:.2f}", line.colour, True)
                        for line, real in zip(lines, drawn.errors)], LABEL_GAP / height, shift=0.05)
    if drawn.pruned:
        draw_pruned(axes[1], drawn.pruned, ratios, LABEL_GAP / height)
    return figure


# bgd_permuted_mnist

def read_permuted(result):
    def points(run):
        def mean(stage):
            return 100 * sum(stage["by_task"]) / len(stage["by_task"])

        stages = run["stages"]
        if stages and run["settings"].get("continuous"):  # how far the training was, in tasks
            return [((i + 1) * len(s["by_task"]) / len(stages), mean(s)) for i, s in enumerate(stages)]
        last = {stage["stage"]: stage for stage in stages}  # of the judgements within a stage
        return [(stage, mean(s)) for stage, s in sorted(last.items())]
    return lines_of(runs_of(result), points) or None


def draw_permuted(result, lines):
    widths = {line.settings.get("width") for line in lines}
    tasks = max(math.ceil(line.x[-1]) for line in lines)
    shown = is_whole(result, 60000, 10000) and widths == {2000}
    values = [(x, 100 * v) for _, _, x, v in published("permuted_mnist") if x <= tasks] if shown else []
    notes = ["Faint diamonds: SI by its authors, c = 0.1 (their result files; 2 x 2000 units, 20 epochs a task)."
             if shown else "", left_out(result, 60000, 10000)]
    height = max(3.62, LABEL_GAP * len(lines))
    hidden = f", hidden layers of {widths.pop():,} units" if len(widths) == 1 and None not in widths else ""
    words = words_of(result, f"Permuted {data_of(result)}", f"{tasks} task{'s' if tasks > 1 else ''}{hidden}",
                     [line.seeds for line in lines], notes, 9)
    continuous = [line for line in lines if line.settings.get("continuous")]
    figure, (axes,) = page(words, 9, height, [(0.765, 0, 6.03, height)], head=0.25 if continuous else 0)
    for line in lines:
        draw_line(axes, line, marker=METHODS.get(line.method, ("", "", "o"))[2], markersize=4.8,
                  **({"linestyle": DASHED} if line in continuous else {}))
    if values:
        diamonds(axes, *zip(*values), METHODS["si"][1])
    axes.set_xlim(0.75, max(tasks, 1.5) + 0.35)
    if tasks <= 20:
        axes.set_xticks(range(1, tasks + 1))
    linear_limits(axes, [v for line in lines for v in line.low + line.high] + [v for _, v in values], 100)
    axes.set_xlabel("tasks learned" + (" (dashed: the share of the training, in tasks)" if continuous else ""))
    axes.set_ylabel("average test accuracy, %")
    tidy(axes)
    if continuous:
        legend(axes, ("average over the tasks so far", "-"), ("no task borders: average over all tasks", DASHED))
    name_ends(axes, [End(line.x[-1], line.mean[-1], f"{line.label}:  {line.mean[-1]:.2f}", line.colour, True)
                     for line in lines], LABEL_GAP / height)
    return figure


# bgd_cifar10

def read_cifar10(result):
    runs = runs_of(result)
    bgd, others = [run for run in runs if run["method"] == "bgd"], [run for run in runs if run["method"] != "bgd"]
    accuracies = []
    for way, (_, colour) in WAYS.items():
        accuracies += lines_of(bgd, lambda run: [(s["epoch"], 100 * s["by_inference"][way]) for s in run["stages"]],
                               way, colour)
    accuracies += lines_of(others, lambda run: [(s["epoch"], 100 * s["test_accuracy"]) for s in run["stages"]])
    return Cifar10(accuracies, sigmas_of(runs), pruned_lines(runs)) if accuracies else None


def sigmas_of(runs):
    """The histogram of sigma of each label, over its seeds: their bins are of one grid, trimmed."""
    groups, colours = collections.OrderedDict(), colours_of(runs)
    for run in runs:
        if run.get("sigma") and run["sigma"].get("counts"):
            groups.setdefault((run["method"], run["label"]), []).append(run)
    sigmas = []
    for key, members in groups.items():
        bins = collections.Counter()
        for run in members:
            edges, counts = run["sigma"]["edges"], run["sigma"]["counts"]
            if len(edges) != len(counts) + 1:
                raise ValueError(f"{len(edges)} edges of {len(counts)} bins of sigma")
            for low, high, count in zip(edges, edges[1:], counts):
                bins[low, high] += count
        order, total = sorted(bins), sum(bins.values())

        def of(name):
            return sum(run["sigma"][name] for run in members) / len(members)
        sigmas.append(Sigma(key[1], colours[key], {run["seed"] for run in members}, [b[0] for b in order]
                            + [order[-1][1]], [100 * bins[b] / total for b in order], of("initial"), of("median"),
                            max(run["sigma"]["largest"] for run in members)))
    return sigmas


def draw_sigmas(axes, sigmas):
    for sigma in sigmas:
        axes.stairs(sigma.shares, sigma.edges, fill=len(sigmas) == 1, color=sigma.colour, linewidth=1.4,
                    alpha=0.75 if len(sigmas) == 1 else 1)
        axes.axvline(sigma.initial, color="#333333" if len(sigmas) == 1 else sigma.colour, linestyle=DASHED,
                     linewidth=1.3, zorder=5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    shares = [share for sigma in sigmas for share in sigma.shares if share > 0]
    axes.set_ylim(min(shares) / 2, min(2 * max(shares), 150))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("σ of a parameter (dashed: its initial value)")
    axes.set_ylabel("share of the parameters, %")
    tidy(axes, "\n".join((f"{sigma.label}: " if len(sigmas) > 1 else "") + f"σ: initial {sigma.initial:.3g}, median "
                         f"{sigma.median:.3g}, largest {sigma.largest:.3g}" for sigma in sigmas))


def draw_cifar10(result, drawn):
    whole = is_whole(result, 50000, 10000)
    height = max(3.4, LABEL_GAP * len(drawn.accuracies))
    lower = max(3.0, LABEL_GAP * len(drawn.pruned))
    below = [0.765, 5.85] if drawn.sigmas and drawn.pruned else [0.765]
    boxes = [(0.765, lower + 1.1 + 0.2 * max(len(drawn.sigmas) - 1, 0), 6.6, height)]
    boxes += [(below[0], 0, 4.1, lower)] if drawn.sigmas else []
    boxes += [(below[-1], 0, 2.75, lower)] if drawn.pruned else []
    if len(boxes) == 1:
        boxes = [(0.765, 0, 6.6, height)]
    ratios = published("table3") if whole else []
    marked = {line.method for line in drawn.pruned} & {method for method, *_ in ratios}
    notes = ["Faint diamonds: published ratios (Zeno et al. 2018, table 3)." if marked else "",
             left_out(result, 50000, 10000)]
    words = words_of(result, f"Bayesian gradient descent on {data_of(result)}",
                     f"{result['dataset']['test']:,} test images", [line.seeds for line in drawn.accuracies], notes, 10)
    figure, axes = page(words, 10.3, boxes[0][1] + height, boxes)

    first = axes[0]
    labels = list(dict.fromkeys(line.label for line in drawn.accuracies if line.kind))
    for line in drawn.accuracies:
        dash = ["-", DASHED, (0, (1, 1.5))][labels.index(line.label) % 3] if line.kind else "-"
        draw_line(first, line, linestyle=dash)
    # The steep start would leave no room for what sets the lines apart.
    shown = [v for line in drawn.accuracies for values in (line.low, line.high) for v in values[len(values) // 4:]]
    linear_limits(first, shown, 100)
    first.set_xlim(0, 1.02 * max(line.x[-1] for line in drawn.accuracies))
    first.set_xlabel("epoch")
    first.set_ylabel("test accuracy, %")
    tidy(first)
    name_ends(first, [End(line.x[-1], line.mean[-1], line.label + (f", {WAYS[line.kind][0]}" if line.kind else "")
                          + f":  {line.mean[-1]:.2f}", line.colour, True) for line in drawn.accuracies],
              LABEL_GAP / height)
    if drawn.sigmas:
        draw_sigmas(axes[1], drawn.sigmas)
    if drawn.pruned:
        draw_pruned(axes[-1], drawn.pruned, ratios, LABEL_GAP / lower)
    return figure


# bgd_cifar_tasks

def read_cifar_tasks(result):
    """A line for every label: x the tasks, from 1, and last the mean over them; of runs that have learned them all."""
    runs = [run for run in runs_of(result) if run["stages"]]
    tasks = max((len(run["stages"][-1]["by_task"]) for run in runs), default=0)

    def points(run):
        accuracies = [100 * a for a in run["stages"][-1]["by_task"]]
        return list(enumerate(accuracies + [sum(accuracies) / tasks], 1)) if len(accuracies) == tasks else []
    return lines_of(runs, points) or None


def draw_cifar_tasks(result, lines):
    tasks = len(lines[0].x) - 1
    data_set, names = result["dataset"], lines[0].settings.get("tasks")
    hundred = data_set["name"] == "cifar10+cifar100"
    shown = hundred and tasks == 6 and is_whole(result, 75000, 15000)
    values = [100 * v for _, _, _, v in published("cifar_tasks")] if shown else []
    if values:
        values.append(sum(values) / len(values))
    bar = min(0.8 / len(lines), 0.26)
    columns = {line.label: (i - (len(lines) - 1) / 2) * bar for i, line in enumerate(lines)}
    si = next((columns[line.label] for line in lines if line.method == "si"), 0)
    notes = ["Faint diamonds: SI by its authors, c = 0.01 (their result files; 60 epochs a task)." if shown
             else left_out(result, 75000, 15000) if hundred else ""]
    title = "CIFAR-10 and five parts of CIFAR-100" if hundred else "CIFAR-10 in tasks"
    if data_set.get("generated"):
        title = f"{data_of(result)[0].upper()}{data_of(result)[1:]} in tasks"
    words = words_of(result, title, f"{tasks} tasks, an output layer each; accuracy after the last one",
                     [line.seeds for line in lines], notes, 10, "bar", "thin lines")
    figure, (axes,) = page(words, 10.6, 3.7, [(0.765, 0, 9.6, 3.7)], head=0.3)

    places = list(range(tasks)) + [tasks + 0.3]
    for line in lines:
        at = [place + columns[line.label] for place in places]
        axes.bar(at, line.mean, width=0.92 * bar, color=line.colour, label=line.label, zorder=2)
        if len(line.seeds) > 1:
            axes.vlines(at, line.low, line.high, color="#222222", linewidth=1, alpha=0.6, zorder=3)
        light = sum(int(line.colour[i:i + 2], 16) for i in (1, 3, 5)) > 420
        for x, value in zip(at, line.mean):  # at the foot, where no diamond is
            axes.annotate(f"{value:.1f}", (x, 0 if value > 15 else value), xytext=(0, 4), textcoords="offset points",
                          ha="center", va="bottom", fontsize=8, rotation=90 if bar < 0.25 else 0,
                          color="#222222" if light or value <= 15 else "white")
    if values:
        diamonds(axes, [place + si for place in places], values, "#111111")
    axes.axvline(tasks - 0.35, color="#bbbbbb", linewidth=0.8)
    ticks = [f"task {i + 1}" for i in range(tasks)] + ["mean"]
    if isinstance(names, list) and len(names) == tasks:
        ticks = [f"{tick}\n{textwrap.fill(name, 12)}" for tick, name in zip(ticks, names)] + ["mean"]
    axes.set_xticks(places, ticks, fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, tasks + 0.9)
    axes.set_ylim(0, min(max([v for line in lines for v in line.high] + values) * 1.12, 108))
    axes.set_yticks(range(0, int(axes.get_ylim()[1]) + 1 if axes.get_ylim()[1] < 100 else 101, 10))
    axes.set_ylabel("test accuracy, %")
    tidy(axes)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncol=len(lines), frameon=False, fontsize=9.5,
                borderaxespad=0.2, handlelength=1, handleheight=1)
    return figure
