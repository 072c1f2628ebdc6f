"""The figure of `baton evaluate`: whether confidence is right (reliability), which classes are taken for which, and
how far uncertainty tells foreign images from known ones."""
import collections
import math
import textwrap

from matplotlib import colors, ticker

from .bgd_parts import DASHED, GREY, logarithmic, tidy
from .common import Words, page
from .laplace import number

BLUE, RED = "#0072B2", "#C1121F"
ERRORS = colors.LinearSegmentedColormap.from_list("errors", ["#FFF4E6", "#F6B26B", RED, "#5B0A12"])
RIGHT, NOTHING = "#DCE9F2", "#FFFFFF"
NUMBERED, NAMED = 12, 40  # classes: with numbers in the cells, with a name for every row

# bins: with images in them; confusion: [true][predicted]; known, foreign: shares of images in %, by bin of entropy.
Evaluation = collections.namedtuple("Evaluation", "names bins confusion edges known foreign auroc")
Ticks = collections.namedtuple("Ticks", "places names size turned beside below")
Bin = collections.namedtuple("Bin", "low high images confidence accuracy")


# What a result holds

def count(value):
    if number(value) < 0 or value != int(value):
        raise ValueError(f"{value!r} is not a number of images")
    return int(value)


def share(value):
    if not 0 <= number(value) <= 1:
        raise ValueError(f"{value!r} is not between 0 and 1")
    return value


def shares(counts, bins):
    counts = [count(c) for c in counts]
    if len(counts) != bins or not sum(counts):
        raise ValueError(f"a histogram of {len(counts)} bins and {sum(counts)} images; {bins} bins expected")
    return [100 * c / sum(counts) for c in counts]


def read(result):
    names = [str(name) for name in result["class_names"]]
    confusion = [[count(c) for c in row] for row in result["confusion"]]
    if not names or [len(row) for row in confusion] != [len(names)] * len(names):
        raise ValueError(f"no confusions of {len(names)} classes")
    bins = [Bin(share(b["low"]), share(b["high"]), count(b["images"]), share(b["confidence"]), share(b["accuracy"]))
            for b in result["reliability"] if b["images"]]
    if not bins or any(b.low >= b.high for b in bins):
        raise ValueError("no bins of confidence")
    for name in ("nll", "brier", "ece"):
        number(result[name])
    for name in ("accuracy", "low", "high"):
        share(result["accuracy"][name])
    edges, known, foreign, auroc = [], None, None, None
    if "foreign" in result:
        histogram = result["entropy_histogram"]
        edges = [number(edge) for edge in histogram["edges"]]
        if len(edges) < 2 or any(a >= b for a, b in zip(edges, edges[1:])):
            raise ValueError("the edges of the histogram do not rise")
        known, foreign = (shares(histogram[key], len(edges) - 1) for key in ("known", "foreign"))
        auroc = {line["score"]: share(line["auroc"]) for line in result["foreign"]["scores"]}["entropy"]
    return Evaluation(names, bins, confusion, edges, known, foreign, auroc)


# The panels

def wilson(accuracy, n, z=1.96):
    """The 95 % interval of a proportion."""
    centre, scale = (accuracy + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n)
    half = scale * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    return max(0, centre - half), min(1, centre + half)


def draw_reliability(axes, below, bins, ece):
    middles, width = [(b.low + b.high) / 2 for b in bins], 0.92 * (bins[0].high - bins[0].low)
    axes.plot([0, 1], [0, 1], color="#333333", linewidth=1.1, linestyle=DASHED, zorder=4)
    axes.bar(middles, [b.accuracy for b in bins], width, color=BLUE, alpha=0.8, linewidth=0, zorder=2)
    for b, middle in zip(bins, middles):
        low, high = wilson(b.accuracy, b.images)
        axes.plot([middle, middle], [low, high], color="#00304D", linewidth=1.1, zorder=5)
    axes.plot([b.confidence for b in bins], [b.confidence for b in bins], linestyle="none", marker="o", markersize=4,
              color=RED, markeredgecolor="white", markeredgewidth=0.6, zorder=6)
    axes.set_ylim(0, 1.02)
    axes.tick_params(labelbottom=False)
    axes.set_ylabel("accuracy")
    tidy(axes, f"Reliability: calibration error (ECE) {ece:.4f}")

    counts = [b.images for b in bins]
    below.bar(middles, counts, width, color="#8C9BA5", linewidth=0, zorder=2)
    if max(counts) > 30 * min(counts):
        logarithmic(below, [min(counts) / 2, max(counts)])
        below.yaxis.set_major_locator(ticker.LogLocator(numticks=4))
    else:
        below.yaxis.set_major_locator(ticker.MaxNLocator(3, integer=True))
    below.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:,.0f}"))
    below.set_ylabel("images")
    below.set_xlabel("confidence: probability of the predicted class")
    tidy(below)
    for each in (axes, below):
        each.set_xlim(0, 1)
        each.xaxis.set_major_locator(ticker.MultipleLocator(0.2))


def side_of(names):
    """The confusion matrix's, in inches."""
    return 4.3 if len(names) <= 20 else 5.2


def ticks_of(names):
    """Names along the matrix, and the inches that they take beside it and below it."""
    places = range(0, len(names), 1 if len(names) <= NAMED else -(-len(names) // 16))
    shown = [names[i] if len(names[i]) <= 14 else names[i][:13] + "…" for i in places]
    size = 6.5 if 20 < len(names) <= NAMED else 9
    longest = 0.0088 * size * max(map(len, shown))
    turned = 0
    if longest > 0.95 * side_of(names) / len(shown):
        turned = 90 if len(names) > 20 else 40
    return Ticks(places, shown, size, turned, longest, 0.2 if not turned else longest * math.sin(math.radians(turned)))


def draw_confusion(axes, bar, names, confusion):
    """The colour of an error is its share of the true class's images; the diagonal has none, for it would leave no
    colours to the errors."""
    n, totals = len(names), [max(1, sum(row)) for row in confusion]
    errors = [[100 * c / total if i != j else 0 for j, c in enumerate(row)]
              for i, (row, total) in enumerate(zip(confusion, totals))]
    worst = max(map(max, errors))
    scale = colors.PowerNorm(0.5, 0, worst or 1)  # rare errors take up half of the colours
    cells = [[colors.to_rgb(RIGHT) if i == j else ERRORS(scale(error))[:3] if error else colors.to_rgb(NOTHING)
              for j, error in enumerate(row)] for i, row in enumerate(errors)]
    axes.imshow(cells, interpolation="nearest", aspect="auto")
    if n <= NUMBERED:
        longest = max(len(f"{c:,}") for row in confusion for c in row)
        size = min(9, 270 / (n * max(longest, 3) * 0.62))
        for i, row in enumerate(confusion):
            for j, c in enumerate(row):
                if c:
                    axes.text(j, i, f"{c:,}", ha="center", va="center", fontsize=size,
                              color="white" if i != j and scale(errors[i][j]) > 0.45 else "#222222")
    ticks = ticks_of(names)
    axes.set_xticks(ticks.places, ticks.names, fontsize=ticks.size, parse_math=False,
                    **{0: {}, 40: {"rotation": 40, "ha": "right", "rotation_mode": "anchor"},
                       90: {"rotation": 90}}[ticks.turned])
    axes.set_yticks(ticks.places, ticks.names, fontsize=ticks.size, parse_math=False)
    if n <= NAMED:
        axes.set_xticks([i - 0.5 for i in range(n + 1)], minor=True)
        axes.set_yticks([i - 0.5 for i in range(n + 1)], minor=True)
        axes.grid(which="minor", color="#E4E4E4", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_color("#BBBBBB")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title("Confusions" + (", in images" if n <= NUMBERED else ""), loc="left", fontsize=10.5, color="#333333")

    if not worst:
        bar.set_axis_off()
        return
    steps = 128
    bar.imshow([[ERRORS((steps - 1 - i) / (steps - 1))[:3]] for i in range(steps)], aspect="auto",
               extent=(0, 1, 0, 1), interpolation="nearest")
    ticks = [t for t in ticker.MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(0, worst) if 0 <= t <= worst]
    bar.set_yticks([float(scale(t)) for t in ticks], [f"{t:g}" for t in ticks], fontsize=8)
    bar.set_xticks([])
    bar.yaxis.tick_right()
    bar.yaxis.set_label_position("right")
    bar.tick_params(length=2)
    bar.spines[:].set_visible(False)
    bar.set_ylabel("errors, % of the true class", fontsize=8.5, color=GREY)


def draw_entropies(axes, drawn):
    # Where one set lies in a bin or two, the other would vanish beside it.
    tallest = sorted((max(drawn.known), max(drawn.foreign)))
    some = [v for v in drawn.known + drawn.foreign if v]
    floor = 0
    axes.set_ylim(0, 1.16 * tallest[1])  # room for the names
    if tallest[1] > 4 * tallest[0]:
        floor = min(some) / 2
        axes.set_yscale("log")
        axes.set_ylim(floor, 4 * tallest[1])
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    for values, colour, words in ((drawn.known, BLUE, "known images"), (drawn.foreign, RED, "foreign images")):
        axes.stairs([max(v, floor) for v in values], drawn.edges, baseline=floor, fill=True, color=colour, alpha=0.35,
                    linewidth=0, zorder=2)
        axes.stairs([max(v, floor) for v in values], drawn.edges, baseline=floor, color=colour, linewidth=1.5, zorder=3,
                    label=words)
    axes.set_xlim(drawn.edges[0], drawn.edges[-1])
    axes.set_xlabel("entropy of the prediction, nats")
    axes.set_ylabel("share of the images, %")
    tidy(axes, f"Uncertainty on foreign images: AUROC {drawn.auroc:.4f}")
    axes.legend(loc="upper center", frameon=False, fontsize=9.5, ncol=2, handlelength=1.4)


# The whole

def words_of(result, drawn, width):
    model, samples, accuracy = result["model"], int(result["samples"]), result["accuracy"]
    way = f"average over {samples:,} draws of the weights" if samples else "one pass with the mean of the weights"
    facts = [f"{result['data']['images']:,} labelled images: accuracy {100 * accuracy['accuracy']:.2f} % "
             f"(95 %: {100 * accuracy['low']:.2f} to {100 * accuracy['high']:.2f}), "
             f"NLL {result['nll']:.4f} nats, Brier score {result['brier']:.4f}",
             f"{model.get('kind') or model['family']}, {model['stages']} stage{'s'[:model['stages'] != 1]} learned; {way}"]
    notes = ["Reliability: bars are the accuracy of images by confidence, with its 95 % interval; dots, their mean "
             "confidence. A bar above the diagonal: right more often than the model claims; below: less often."]
    if drawn.foreign:
        notes.append(f"{result['foreign']['images']:,} foreign images (out of distribution). AUROC: the chance that "
                     "one of them has a greater entropy than a known image.")
    return Words(f"Evaluation of {model['architecture']}", facts,
                 [line for note in notes for line in textwrap.wrap(note, int(15 * width))])


def draw(result, drawn):
    side, ticks = side_of(drawn.names), ticks_of(drawn.names)
    floor = max(0, ticks.below - 0.25)
    left = 0.8
    matrix = left + 3.7 + 0.9 + ticks.beside
    width = matrix + side + 0.95
    boxes = [(left, floor + 1.15, 3.7, side - 1.15), (left, floor, 3.7, 0.95), (matrix, floor, side, side),
             (matrix + side + 0.1, floor, 0.14, side)]
    if drawn.foreign:
        boxes.append((width + 0.6, floor, 3.9, side))
        width += 0.6 + 3.9 + 0.3
    figure, axes = page(words_of(result, drawn, width), width, side + floor, boxes, head=0.35)
    draw_reliability(axes[0], axes[1], drawn.bins, result["ece"])
    draw_confusion(axes[2], axes[3], drawn.names, drawn.confusion)
    if drawn.foreign:
        draw_entropies(axes[4], drawn)
    return figure
