"""What the figures of the Bayesian gradient descent paper are made of: lines over the seeds of a result's runs, words,
axes, and the error of pruned networks."""
import collections
import csv
import math
import textwrap

import numpy
from matplotlib import lines as mlines
from matplotlib import ticker

from .common import METHODS, OTHER_COLOURS, PUBLISHED, End, Words, name_ends

GREY, DASHED = "#555555", (0, (4, 2.5))
DATA = {"mnist": ("MNIST", "digits"), "cifar10": ("CIFAR-10", "images"),
        "cifar10+cifar100": ("CIFAR-10 and CIFAR-100", "images")}
SIGNAL, MAGNITUDE = "signal-to-noise", "magnitude"

# The mean over the seeds, with the least and the greatest, of what runs of one method and label have in common; `kind`
# tells several lines of the same runs apart (the ranking of the pruned weights, the way of predicting).
Line = collections.namedtuple("Line", "method label kind settings seeds x mean low high colour")


def runs_of(result):
    """The runs; a KeyError where what the words say of the data set is missing."""
    for name in ("name", "train", "test"):
        result["dataset"][name]
    return result["runs"]


def colours_of(runs):
    """{(method, label): colour}: the method's, from light to dark where it has several labels (widths)."""
    labels = collections.OrderedDict()
    for run in runs:
        of_method = labels.setdefault(run["method"], [])
        if run["label"] not in of_method:
            of_method.append(run["label"])
    colours = {}
    for i, (method, names) in enumerate(labels.items()):
        base = METHODS.get(method, (method, OTHER_COLOURS[i % len(OTHER_COLOURS)], "o"))[1]
        channels = [int(base[j:j + 2], 16) for j in (1, 3, 5)]
        for j, name in enumerate(names):
            amount = 0.4 - 0.8 * j / (len(names) - 1) if len(names) > 1 else 0
            mixed = (round(c + (255 - c) * amount if amount > 0 else c * (1 + amount)) for c in channels)
            colours[method, name] = "#{:02X}{:02X}{:02X}".format(*mixed)
    return colours


def lines_of(runs, points_of, kind=None, colour=None):
    """points_of(run): its (x, y) in order. A line goes as far as all of its seeds do."""
    colours, groups = colours_of(runs), collections.OrderedDict()
    for run in runs:
        if points := points_of(run):
            groups.setdefault((run["method"], run["label"]), []).append((run, points))
    lines = []
    for (method, label), members in groups.items():
        columns = list(zip(*([y for _, y in points] for _, points in members)))
        lines.append(Line(method, label, kind, members[0][0]["settings"], {run["seed"] for run, _ in members},
                          [x for x, _ in members[0][1]][:len(columns)], [sum(c) / len(c) for c in columns],
                          [min(c) for c in columns], [max(c) for c in columns], colour or colours[method, label]))
    return lines


def pruned_lines(runs):
    """The error's growth by the fraction of the weights that are pruned, for each ranking of the weights."""
    def points_of(ranking):
        def points(run):
            results = (run.get("pruning") or {"results": []})["results"]
            some = sorted((r["fraction"], r["error_ratio"]) for r in results if r["ranking"] == ranking)
            return [(0, 1)] * bool(some and some[0][0] > 0) + some
        return points
    return [line for ranking in (SIGNAL, MAGNITUDE) for line in lines_of(runs, points_of(ranking), ranking)]


# What the words say

def is_whole(result, train, test):
    """Whether the data are real, and as many images as published values come from."""
    data_set = result["dataset"]
    return not data_set.get("generated") and data_set["train"] == train and data_set["test"] == test


def published(figure):
    """[(method, width or None, x, value)]"""
    with open(PUBLISHED / "bgd_values.csv", newline="") as file:
        return [(row["method"], int(row["width"]) if row["width"] else None, float(row["x"]), float(row["value"]))
                for row in csv.DictReader(file) if row["figure"] == figure]


def data_of(result):
    data_set = result["dataset"]
    name, things = DATA.get(data_set["name"], (data_set["name"], "images"))
    return f"generated {things} (not {name})" if data_set.get("generated") else name


def words_of(result, title, fact, seeds, notes, width, mark="line", spread="band"):
    data_set, seeds = result["dataset"], sorted(set().union(*seeds))
    preset = f", preset {result['preset']}" if result.get("preset") else ""
    seed_words = (f"Mean over seeds {', '.join(map(str, seeds))}; {spread}: least to greatest."
                  if len(seeds) > 1 else f"One run a {mark}, seed {seeds[0]}.")
    facts = [f"{data_set['train']:,} training images, {fact}"]
    caption = [line for note in [seed_words, *notes] if note for line in textwrap.wrap(note, int(15 * width))]
    return Words(title + preset, facts, caption)


def left_out(result, train, test):
    """Says that no published values are drawn beside less, or more, than their data."""
    data_set = result["dataset"]
    if data_set.get("generated") or is_whole(result, train, test):
        return ""
    return (f"Learned from {data_set['train']:,} and judged on {data_set['test']:,} images, not {train:,} and "
            f"{test:,}: published values do not compare and are left out.")


# Parts of figures

def tidy(axes, title=None, grid="y"):
    axes.grid(axis=grid, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, loc="left", fontsize=10.5, color="#333333")


def draw_line(axes, line, **style):
    if len(line.seeds) > 1:
        axes.fill_between(line.x, line.low, line.high, color=line.colour, alpha=0.13, linewidth=0, zorder=1)
    marker = {"marker": "o", "markersize": 4} if len(line.x) <= 20 else {}
    axes.plot(line.x, line.mean, color=line.colour, **{"linewidth": 1.7, "zorder": 4, **marker, **style})


def diamonds(axes, x, y, colour):
    axes.plot(x, y, linestyle="none", marker="D", markersize=5.5, markerfacecolor="none", markeredgecolor=colour,
              markeredgewidth=1.2, alpha=0.5, zorder=3, clip_on=False)


def legend(axes, *styles):
    """A line above the axes. styles: (words, linestyle)."""
    handles = [mlines.Line2D([], [], color=GREY, linestyle=style, linewidth=1.5, label=words)
               for words, style in styles]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncol=len(handles), frameon=False,
                fontsize=9, borderaxespad=0.1, handlelength=2.6, labelcolor=GREY)


def linear_limits(axes, values, most=math.inf):
    low, high = min(values), max(values)
    margin = max(0.06 * (high - low), 0.1)
    axes.set_ylim(low - margin, min(high + margin, most + margin / 2))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(nbins=9, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(ticker.ScalarFormatter(useOffset=False))


def lifted(lines):
    """The lines for a logarithmic axis: a zero goes to half of the least value that is not one."""
    least = min((v for line in lines for v in line.low if v > 0), default=0.02)

    def lift(values):
        return [max(v, least / 2) for v in values]
    return [line._replace(mean=lift(line.mean), low=lift(line.low), high=lift(line.high)) for line in lines]


def logarithmic(axes, values):
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.06, 1.02)
    low, high = low / margin, high * margin
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    for mantissas in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), None):
        ticks = ticker.MaxNLocator(9, steps=[1, 2, 5, 10]).tick_values(low, high) if mantissas is None else [
            m * 10.0 ** e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high))) for m in mantissas]
        ticks = [t for t in ticks if low <= t <= high]
        if len(ticks) >= 4:
            break
    axes.yaxis.set_major_locator(ticker.FixedLocator(ticks))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))


def draw_pruned(axes, lines, values, gap):
    """values: published ones, [(method, width, fraction, ratio)] of the methods and widths that are drawn."""
    drawn = lifted(lines)
    for line in drawn:
        draw_line(axes, line, **({"linestyle": DASHED, "marker": "s"} if line.kind == MAGNITUDE else {}))
    marks = [(x, y, line.colour) for method, width, x, y in values for line in lines
             if method == line.method and width in (None, line.settings.get("width"))
             and line.kind == (MAGNITUDE if method == "sgd" else SIGNAL)]
    for x, y, colour in marks:
        diamonds(axes, [x], [y], colour)
    fractions = sorted({x for line in lines for x in line.x})
    if fractions[-1] < 1:  # equal steps where the weights that are left are halved
        axes.set_xscale("function", functions=(lambda f: -numpy.log2(numpy.maximum(1 - f, 1e-9)),
                                                   lambda u: 1 - 2.0 ** -u))
        axes.set_xlim(0, 1 - 0.92 * (1 - fractions[-1]))
    axes.xaxis.set_major_locator(ticker.FixedLocator(fractions))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda f, _: f"{100 * f:g}"))
    logarithmic(axes, [v for line in drawn for v in line.low + line.high] + [y for _, y, _ in marks])
    axes.set_xlabel("weights pruned, %")
    axes.set_ylabel("error / error of the whole network")
    tidy(axes)
    legend(axes, ("pruned by |µ|/σ", "-"), ("by magnitude, |µ|", DASHED))
    name_ends(axes, [End(line.x[-1], line.mean[-1], f"{line.label}, {'|µ|/σ' if line.kind == SIGNAL else '|µ|'}:  "
                         f"{whole.mean[-1]:.2f}", line.colour, line.kind == SIGNAL)
                     for line, whole in zip(drawn, lines)], gap, shift=0.06, fontsize=9)
