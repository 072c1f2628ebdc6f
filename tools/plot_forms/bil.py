"""The figure of the Bayesian incremental learning paper, of bil_mnist, bil_cifar10 and bil_cifar5p5: test accuracy
against the part that was just learned."""
import collections
import csv

from matplotlib import ticker

from .common import LABEL_GAP, METHODS, OTHER_COLOURS, PUBLISHED, End, Words, name_ends, page

# A form of the figure: the name of its data in a title, the figure in the table of published values, the training
# images that those were learned from, and the published series of methods where they are not METHOD T=PARTS.
Form = collections.namedtuple("Form", "title published train series")
FORMS = {
    "mnist": Form("MNIST", "mnist", 60000, {}),
    "cifar10": Form("CIFAR-10", "cifar", 50000, {}),
    "bil_cifar5p5": Form("CIFAR(5+5)", "cifar5+5", 25000, {
        ("ft", 10): "FT", ("ft_pretrained", 10): "FT pretraining", ("ffg", 10): "FFG",
        ("ffg_grid", 10): "FFG pretrained Gaussian prior", ("ffg_laplace", 10): "FFG Laplace prior"}),
}
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()

Curve = collections.namedtuple("Curve", "method label parts mean low high seeds colour marker")


def read(result):
    return curves_of(result["runs"])


def curves_of(runs):
    """One curve for each method, number of parts and label; over the stages that all its seeds have reached."""
    groups = collections.OrderedDict()
    for run in runs:
        accuracies = [100 * stage["test_accuracy"] for stage in run["stages"]]
        if accuracies:
            key = (run["method"], int(run["parts"]), run.get("label") or "")
            groups.setdefault(key, []).append((run["seed"], accuracies))

    colours = {}
    for method, _, label in groups:
        if (method, label) not in colours:
            fallback = OTHER_COLOURS[len(colours) % len(OTHER_COLOURS)]
            known = METHODS.get(method, (method, fallback, "o"))[1]
            colours[method, label] = fallback if known in colours.values() else known

    curves = []
    for (method, parts, label), seeds in groups.items():
        columns = list(zip(*(accuracies for _, accuracies in seeds)))
        name, _, marker = METHODS.get(method, (method, None, "o"))
        if label and label != method:
            name += f", {label}"
        curves.append(Curve(method, name, parts,
                            [sum(column) / len(column) for column in columns],
                            [min(column) for column in columns], [max(column) for column in columns],
                            sorted({seed for seed, _ in seeds}), colours[method, label], marker))
    return curves


def form_of(result):
    data_set = result.get("dataset") or {}
    experiment = result.get("experiment")
    name = data_set.get("name", "unknown data")
    return FORMS.get(experiment) or FORMS.get(name) or Form(name, None, 0, {})


def missing_images(result):
    """What the training lacked of the published figure's data, in words; empty where it had all."""
    form, data_set = form_of(result), result.get("dataset") or {}
    old = (result.get("settings") or {}).get("old_images")
    missing = []
    if data_set.get("train", form.train) < form.train:
        missing.append(f"{data_set['train']:,} of {form.train:,} training images")
    if form is FORMS["bil_cifar5p5"] and old is not None and old < form.train:
        missing.append(f"{old:,} of {form.train:,} images of the old classes")
    return ", ".join(missing)


def published_values(result, curves):
    """{(method, parts): ten accuracies in %} of the methods that are drawn."""
    form = form_of(result)
    if (result.get("dataset") or {}).get("generated") or missing_images(result):
        return {}
    values = {}
    with open(PUBLISHED / "figure_values.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["figure"] == form.published:
                values[row["series"]] = [float(row[f"slice{i}"]) for i in range(1, 11)]

    def series(curve):
        return form.series.get((curve.method, curve.parts), f"{curve.method.upper()} T={curve.parts}")
    return {(curve.method, curve.parts): values[series(curve)] for curve in curves if series(curve) in values}


def draw(result, curves):
    published = published_values(result, curves)
    last = max(curve.parts for curve in curves)
    right = last + 0.35 if last > 1 else 2

    height = max(3.62, LABEL_GAP * len(curves))  # inches, of the axes: every name has its place
    words = words_of(result, curves, published)
    figure, (axes,) = page(words, 9, height, [(0.765, 0, 6.03, height)])

    for curve in curves:
        if curve.parts == 1:
            axes.axhline(curve.mean[-1], color=curve.colour, linestyle=(0, (5, 3)), linewidth=1.4, zorder=2)
            if len(curve.seeds) > 1:
                axes.axhspan(curve.low[-1], curve.high[-1], color=curve.colour, alpha=0.07, linewidth=0, zorder=1)
        else:
            parts = range(1, len(curve.mean) + 1)
            if len(curve.seeds) > 1:
                axes.fill_between(parts, curve.low, curve.high, color=curve.colour, alpha=0.15, linewidth=0, zorder=1)
            axes.plot(parts, curve.mean, color=curve.colour, linewidth=1.8, marker=curve.marker, markersize=4.8,
                      zorder=4)
    for curve in curves:
        values = published.get((curve.method, curve.parts))
        if values:
            where = [last + 0.2] if curve.parts == 1 else range(1, len(values) + 1)
            axes.plot(where, values[:len(where)], linestyle="none", marker="D", markersize=5.5,
                      markerfacecolor="none", markeredgecolor=curve.colour, markeredgewidth=1.2, alpha=0.45, zorder=3)

    marks = [value for values in published.values() for value in values]
    low = min([value for curve in curves for value in curve.low] + marks)
    high = max([value for curve in curves for value in curve.high] + marks)
    margin = max(0.06 * (high - low), 0.1)
    axes.set_ylim(low - margin, min(high + margin, 100 + margin / 2))
    axes.set_xlim(0.75, right)
    if last <= 20:
        axes.set_xticks(range(1, last + 1))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(nbins=9, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(ticker.ScalarFormatter(useOffset=False))
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("part of the training data (t)")
    axes.set_ylabel("test accuracy, %")
    name_ends(axes, [End(right if curve.parts == 1 else min(len(curve.mean), last), curve.mean[-1],
                         f"{curve.label}, T = {curve.parts}:  {curve.mean[-1]:.2f}", curve.colour, curve.parts > 1)
                     for curve in curves], LABEL_GAP / height)
    return figure


def class_names(classes, generated):
    return ", ".join(str(c) if generated or c not in range(10) else CIFAR_CLASSES[c] for c in classes)


def words_of(result, curves, published):
    data_set, settings = result.get("dataset") or {}, result.get("settings") or {}
    title, generated = form_of(result).title, data_set.get("generated")
    if generated:
        title = f"generated {'digits' if data_set.get('name') == 'mnist' else 'images'} (not {title})"
    facts = []
    if data_set.get("train"):
        facts.append(f"{data_set['train']:,} training and {data_set.get('test', 0):,} test images")
    if result.get("preset"):
        facts.append(f"preset {result['preset']}")
    facts = [", ".join(facts)]
    if settings.get("new_classes"):
        facts.append(f"Learned: {class_names(settings['new_classes'], generated)}")
    if settings.get("old_classes"):
        facts.append(f"Pretrained on: {class_names(settings['old_classes'], generated)}")

    seeds = sorted({seed for curve in curves for seed in curve.seeds})
    caption = []
    if any(curve.parts > 1 for curve in curves):
        caption.append("Solid: one part after another.")
    if any(curve.parts == 1 for curve in curves):
        caption.append("Dashed: everything at once (T = 1).")
    caption.append(f"Mean over seeds {', '.join(map(str, seeds))}; band: least to greatest."
                   if len(seeds) > 1 else f"One run a line, seed {seeds[0]}.")
    lines = [" ".join(caption)]
    if published:
        where = ", of a draw of classes that is not known" if settings.get("old_classes") else ""
        lines.append(f"Faint diamonds: published values, one run each{where} "
                     "(Kochurov et al., Bayesian Incremental Learning, 2018).")
    elif not generated and missing_images(result):
        lines.append(f"Of a subset: {missing_images(result)}. Published values do not compare and are left out.")
    return Words(f"Learning {title} part by part", facts, lines)
