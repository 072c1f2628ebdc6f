"""The figure of the last-layer Laplace program laplace_update, a column a feature set: what an update gains, what it
costs, active learning, and what updating between the picks of a batch adds to it.

Intervals are of the mean over the seeds: t(n - 1) sd / sqrt(n), 95 %."""
import collections
import math
import textwrap

from matplotlib import ticker

from .bgd_parts import DASHED, GREY, linear_limits, logarithmic, tidy
from .common import End, Words, name_ends, page

# The upper 2.5 % point of Student's t with 1 to 30 degrees of freedom.
T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
        2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]
# Name, colour (after Okabe and Ito), marker, whether it is one of the figure's subjects.
METHODS = {
    "implicit": ("implicit", "#C1121F", "o", True),
    "gaussian": ("Gaussian", "#0072B2", "s", True),
    "one_by_one": ("one by one", "#56B4E9", "s", False),
    "first_order": ("first-order", "#E69F00", "^", False),
    "monte_carlo": ("Monte Carlo", "#AA4499", "v", False),
    "retrained": ("retrained", "#222222", "D", False),
    "lbfgs_warm": ("L-BFGS, warm", "#009E73", "D", False),
    "newton_warm": ("Newton, warm", "#00442F", "P", False),
    "adam": ("Adam", "#888888", "X", False),
}
GAINING = ("first_order", "monte_carlo", "gaussian", "implicit", "retrained", "adam")
TIMED = ("implicit", "gaussian", "one_by_one", "first_order", "monte_carlo", "lbfgs_warm", "newton_warm", "adam")
ACQUISITIONS = {
    "margin": ("margin", "#C1121F", "o", True),
    "badge": ("BADGE", "#0072B2", "s", True),
    "entropy": ("entropy", "#E69F00", "^", False),
    "bald": ("BALD", "#009E73", "v", False),
    "bait": ("BAIT", "#AA4499", "D", False),
    "look_ahead": ("look-ahead", "#222222", "", False),
    "random": ("random", "#888888", "", False),
}
ROWS = {
    "gains": ("What an update gains in test accuracy, over the model of the base samples", "new samples",
              "gain in accuracy, points"),
    "times": ("What an update costs: seconds, by new samples", "new samples", "seconds an update"),
    "curves": ("Active learning (solid: updated between the picks of a batch; dashed: its top b at once)",
               "labelled samples", "test accuracy, %"),
    "pairs": ("What updating between picks adds, paired by seed (beside the names: mean over the curve)",
              "labelled samples", "sequential − top-b, points"),
}
SIZE, GAP = 8.5, 0.175  # points, and inches from one line's name to the next

Column = collections.namedtuple("Column", "set notes gains times curves pairs")  # notes: {row: words over its axes}
# Of `seeds` seeds, of which one has no band. whole: the mean over the whole curve and its half width.
Curve = collections.namedtuple("Curve", "name mode x mean low high seeds whole", defaults=[None])


def half_width(sd, n):
    """Of the 95 % interval of a mean. Beyond the table t is almost linear in 1 / n."""
    return (T975[n - 2] if n <= 31 else 1.96 + 0.082 * 30 / (n - 1)) * sd / math.sqrt(n)


def moments(values):
    """(mean, half width) over the seeds."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, 0.0
    return mean, half_width(math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)), n)


# What a result holds

def number(value, positive=False):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is not a number")
    if not math.isfinite(value) or positive and value <= 0:
        raise ValueError(f"{value!r} is not a {'positive' if positive else 'finite'} number")
    return value


def keyed(lines, *names):
    """{the values of names: line}."""
    table = {}
    for line in lines:
        key = tuple(line[name] for name in names)
        if key in table:
            raise ValueError(f"two lines of {', '.join(map(str, key))}")
        table[key] = line
    return table


def banded(name, mode, points, seeds, whole=None):
    """points: (x, mean, half width)."""
    points = sorted(points)
    return Curve(name, mode, [p[0] for p in points], [p[1] for p in points], [p[1] - p[2] for p in points],
                 [p[1] + p[2] for p in points], seeds, whole)


def gain_of(line):
    gain = line["gain"]
    n, mean = number(gain["n"], True), 100 * number(gain["mean"])
    if n == 1:
        return n, mean, 0.0
    sd = number(gain["sd"])
    if sd < 0:
        raise ValueError(f"a standard deviation of {sd}")
    return n, mean, 100 * half_width(sd, n)


def gains_of(table, base):
    curves = []
    for name in GAINING:
        values = [(number(new, True), *gain_of(line)) for (b, new, method), line in table.items()
                  if (b, method) == (base, name)]
        if values:
            curves.append(banded(name, None, [(new, mean, half) for new, _, mean, half in values],
                                 max(n for _, n, *_ in values)))
    return curves


def times_of(table, base):
    curves = []
    for name in TIMED:
        points = sorted((number(new, True), *(number(line["seconds"][what], True)
                                              for what in ("median", "least", "greatest")))
                        for (b, new, method), line in table.items() if (b, method) == (base, name))
        if points:
            curves.append(Curve(name, None, *map(list, zip(*points)), None))
    return curves


def scores_of(line):
    """{seed: {labelled samples: accuracy in %}}"""
    x, scores = [number(v, True) for v in line["labelled"]], {}
    for seed, accuracies in zip(line["seeds"], line["accuracy"]):
        if len(accuracies) != len(x):
            raise ValueError(f"{len(accuracies)} accuracies at {len(x)} numbers of labelled samples")
        scores[seed] = dict(zip(x, (100 * number(a) for a in accuracies)))
    if not len(line["seeds"]) == len(line["accuracy"]) == len(scores):
        raise ValueError(f"{len(line['accuracy'])} curves of seeds {line['seeds']}")
    return scores if x else {}


def pair_of(name, sequential, top):
    """The differences of the seeds and numbers of labelled samples that both have. At the first of these numbers,
    before any pick, they are the same: the mean over the curve leaves it out."""
    seeds = sorted(sequential.keys() & top.keys())
    if not seeds:
        return None
    shared = sorted(set.intersection(*(set(scores[seed]) for scores in (sequential, top) for seed in seeds)))
    if not shared:
        return None
    points = [(x, *moments([sequential[s][x] - top[s][x] for s in seeds])) for x in shared]
    later = shared[1:] or shared
    return banded(name, None, points, len(seeds),
                  moments([sum(sequential[s][x] - top[s][x] for x in later) / len(later) for s in seeds]))


def read(result):
    """The columns that have something to draw."""
    sets = {s["name"]: (s["title"], int(s["dim"]), int(s["classes"]), bool(s["generated"])) for s in result["sets"]}
    updates, active = collections.defaultdict(list), collections.defaultdict(list)
    for lines, by_set in ((result["updates"], updates), (result["active"], active)):
        for line in lines:
            if line["set"] not in sets:
                raise ValueError(f"a line of the unknown set {line['set']}")
            by_set[line["set"]].append(line)
    columns = []
    for name, facts in sets.items():
        gains, times, notes = [], [], {}
        if updates[name]:
            tau = updates[name][0]["tau"]
            table = keyed([line for line in updates[name] if line["tau"] == tau], "base", "new", "method")
            bases = sorted({number(base, True) for base, *_ in table})
            gains, times = gains_of(table, bases[(len(bases) - 1) // 2]), times_of(table, bases[-1])
            notes = {row: f"{base:,} base samples, prior precision {number(tau):g}"
                     for row, base in (("gains", bases[(len(bases) - 1) // 2]), ("times", bases[-1]))}
        scores = {key: scores_of(line) for key, line in keyed(active[name], "acquisition", "mode").items()}
        curves = [banded(acquisition, mode, [(x, *moments([score[x] for score in seeds.values()]))
                                             for x in next(iter(seeds.values()))], len(seeds))
                  for (acquisition, mode), seeds in scores.items() if seeds and acquisition in ACQUISITIONS]
        pairs = [pair_of(acquisition, scores.get((acquisition, "sequential"), {}), scores.get((acquisition, "top"), {}))
                 for acquisition in ACQUISITIONS]
        pairs = [pair for pair in pairs if pair]
        if gains or times or curves:
            columns.append(Column(facts, notes, gains, times, curves, pairs))
    return columns or None


# The panels

def in_words(seconds):
    for unit, name in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= 0.9995 * unit:
            break
    digits = f"{seconds / unit:.2g}" if seconds / unit < 99.5 else f"{seconds / unit:.0f}"
    return f"{digits} {name}"


def signed(value):
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")  # no −0.00


def draw_curve(axes, curve, style, band=(0.13, 0.08), **more):
    """band: how opaque a subject's is, and another's."""
    _, colour, marker, bold = style
    if band and curve.low != curve.high:
        axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=band[not bold], linewidth=0, zorder=1)
    if len(curve.x) > 12:
        marker = ""
    axes.plot(curve.x, curve.mean, **{"color": colour, "marker": marker, "markersize": 4 if bold else 3.2,
                                      "linewidth": 1.9 if bold else 1.1, "zorder": 5 if bold else 4, **more})


def new_samples(axes, curves):
    """The numbers of new samples there are, evenly by their logarithm."""
    places = sorted({x for curve in curves for x in curve.x})
    axes.set_xscale("log", base=2)
    axes.set_xlim(places[0] / 1.15, places[-1] * 1.15)
    if len(places) == 1:
        axes.set_xlim(places[0] / 2, places[0] * 2)
    axes.xaxis.set_major_locator(ticker.FixedLocator(places[::-(-len(places) // 8)]))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))


def name_curves(axes, curves, styles, words_of, height):
    low, high = axes.get_ylim()
    name_ends(axes, [End(curve.x[-1], min(max(curve.mean[-1], low), high), words_of(curve), styles[curve.name][1],
                         styles[curve.name][3]) for curve in curves], GAP / height, fontsize=SIZE)


def draw_gains(axes, curves, height):
    axes.axhline(0, color="#999999", linewidth=0.9, zorder=2)
    for curve in curves:
        draw_curve(axes, curve, METHODS[curve.name], **({"linestyle": DASHED} if curve.name == "retrained" else {}))
    new_samples(axes, curves)
    # A method that fails is named with its number at the lower edge, and leaves room for the others.
    most = max(0.1, *(v for curve in curves for v in curve.mean + curve.high))
    linear_limits(axes, [0, *(max(v, -1.2 * most) for curve in curves for v in curve.low + curve.high)])
    name_curves(axes, curves, METHODS, lambda c: f"{METHODS[c.name][0]}:  {signed(c.mean[-1])}", height)


def draw_times(axes, curves, height):
    for curve in curves:
        draw_curve(axes, curve, METHODS[curve.name])
    new_samples(axes, curves)
    values = [v for curve in curves for v in curve.low + curve.high]
    logarithmic(axes, values)
    if max(values) > 500 * min(values):  # whole decades
        axes.yaxis.set_major_locator(ticker.LogLocator(numticks=9))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: in_words(v)))
    name_curves(axes, curves, METHODS, lambda c: f"{METHODS[c.name][0]}:  {in_words(c.mean[-1])}", height)


def labelled_samples(axes, curves):
    low, high = min(c.x[0] for c in curves), max(c.x[-1] for c in curves)
    axes.set_xlim(low - 0.03 * (high - low or 1), high + 0.03 * (high - low or 1))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=6, integer=True))


def draw_curves(axes, curves, height):
    """An acquisition's two lines share a name, with the last accuracy of the sequential one."""
    named = {curve.name: curve for curve in sorted(curves, key=lambda curve: curve.mode == "sequential")}
    for curve in curves:
        style = {"top": DASHED, "look_ahead": (0, (1, 1.2))}.get(curve.mode, "-")
        draw_curve(axes, curve, ACQUISITIONS[curve.name], band=None, linestyle=style, marker="",
                   **({"linewidth": 1.2} if curve.mode == "top" else {}))
    labelled_samples(axes, curves)
    # The steep start would leave no room for what sets the lines apart.
    linear_limits(axes, [v for curve in curves for v in curve.mean[len(curve.mean) // 6:]], 100)
    name_curves(axes, list(named.values()), ACQUISITIONS,
                lambda c: f"{ACQUISITIONS[c.name][0]}:  {c.mean[-1]:.2f}", height)


def draw_pairs(axes, curves, height):
    axes.axhline(0, color="#333333", linewidth=1.2, zorder=3)
    for curve in curves:
        draw_curve(axes, curve, ACQUISITIONS[curve.name], band=(0.15, 0.05))
    labelled_samples(axes, curves)
    linear_limits(axes, [0, *(v for curve in curves for v in curve.low + curve.high)])
    name_curves(axes, curves, ACQUISITIONS, lambda c: f"{ACQUISITIONS[c.name][0]}:  {signed(c.whole[0])}" + (
        f" ± {c.whole[1]:.2f}" if c.seeds > 1 else ""), height)


# The whole

def seeds_of(columns, row):
    counts = sorted({curve.seeds for column in columns for curve in getattr(column, row)})
    return f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[0]} seed{'s'[:counts[0] > 1]}"


def words_of(result, columns, rows, width):
    notes = []
    if "gains" in rows:
        notes.append(f"Gains: means over {seeds_of(columns, 'gains')}, each beside its own base model. Retrained: the "
                     "MAP of base and new samples, from scratch; Adam: 200 epochs of it.")
    if "times" in rows:
        notes.append("Seconds: medians, under a band from the least to the greatest. One by one: the Gaussian rule "
                     "with a rank-one downdate a sample; warm: from the base model's weights, on base and new samples.")
    if "curves" in rows:
        notes.append(f"Active learning: means over {seeds_of(columns, 'curves')}, named with their last value. "
                     "Look-ahead chooses by the test labels: an upper baseline, not a method.")
    if any(curve.seeds > 1 for column in columns for curve in column.gains + column.pairs):
        notes.append("Bands of gains and of paired differences, and what follows ±: 95 % intervals of the mean over "
                     "the seeds (Student's t).")
    preset = f", preset {result['preset']}" if result.get("preset") else ""
    names = "a feature set" if len(columns) == 1 else f"{len(columns)} feature sets"
    return Words(f"Closed-form updates of a Bayesian last layer{preset}",
                 [f"Last-layer Laplace approximation on {names}; the old samples are not needed for an update"],
                 [line for note in notes for line in textwrap.wrap(note, int(15 * width))])


def title_of(facts):
    title, dim, classes, generated = facts
    return (f"GENERATED data (not {title})" if generated else title), f"{dim:,} features, {classes:,} classes"


def draw(result, columns):
    draws = {"gains": draw_gains, "times": draw_times, "curves": draw_curves, "pairs": draw_pairs}
    rows = {row: ROWS[row] for row in ROWS if any(getattr(column, row) for column in columns)}
    panel = {1: 4.6, 2: 3.0}.get(len(columns), 2.4)
    left, names, tall, between = 0.8, 2.15, 2.35, 1.12  # names: with the next column's ticks
    pitch = panel + names
    width = left + len(columns) * pitch - 0.45
    boxes = [(left + i * pitch, (len(rows) - 1 - j) * (tall + between), panel, tall)
             for j in range(len(rows)) for i in range(len(columns))]
    figure, axes = page(words_of(result, columns, rows, width), width, len(rows) * (tall + between) - between, boxes,
                        head=1.25)
    for i, column in enumerate(columns):
        title, facts = title_of(column.set)
        for words, height, style in ((title, 74, {"fontsize": 10 if column.set[3] else 11.5, "fontweight": "bold"}),
                                     (facts, 60, {"fontsize": 9, "color": GREY})):
            axes[i].annotate(words, (0, 1), (0, height), xycoords="axes fraction", textcoords="offset points", **style)
    for j, (row, (heading, x_label, y_label)) in enumerate(rows.items()):
        across = axes[j * len(columns):(j + 1) * len(columns)]
        raised = 24 if any(row in column.notes for column in columns) else 12
        across[0].annotate(heading, (0, 1), (0, raised), xycoords="axes fraction", textcoords="offset points",
                           fontsize=10.5, fontweight="bold", color="#333333")
        labelled = next(i for i, column in enumerate(columns) if getattr(column, row))
        for panel_axes, column in zip(across, columns):
            curves = getattr(column, row)
            if not curves:
                panel_axes.set_axis_off()
                continue
            draws[row](panel_axes, curves, tall)
            panel_axes.set_xlabel(x_label)
            if panel_axes is across[labelled]:
                panel_axes.set_ylabel(y_label)
            panel_axes.tick_params(labelsize=9)
            tidy(panel_axes)
            if row in column.notes:
                panel_axes.set_title(column.notes[row], loc="left", fontsize=9, color=GREY)
    return figure
