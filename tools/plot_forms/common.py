"""What the figures share: methods' names and colours, the page, and names at the ends of lines."""
import collections
import pathlib

from matplotlib import pyplot

PUBLISHED = pathlib.Path(__file__).resolve().parents[1] / "published"
# A method's name in result.json: its name in the figure, its colour (after Okabe and Ito, safe for colour-blind eyes)
# and its marker, which tells the priors of one family apart once more.
METHODS = {
    "ft": ("FT", "#D55E00", "o"),
    "ft_converged": ("FT converged", "#B8860B", "o"),
    "ft_pretrained": ("FT, pretrained", "#E69F00", "s"),
    "ffg": ("FFG", "#0072B2", "o"),
    "ffg_grid": ("FFG, pretrained prior", "#56B4E9", "s"),
    "ffg_laplace": ("FFG, Laplace prior", "#332288", "^"),
    "cfg": ("CFG", "#009E73", "o"),
    "cfg_grid": ("CFG, pretrained prior", "#7FC8A9", "s"),
    "cfg_laplace": ("CFG, Laplace prior", "#00442F", "^"),
    "mnf": ("MNF", "#AA4499", "o"),
    "mnf_grid": ("MNF, pretrained prior", "#E08CC8", "s"),
    "mnf_laplace": ("MNF, Laplace prior", "#5E1050", "^"),
    "bgd": ("BGD", "#C1121F", "o"),
    "bgd_continuous": ("BGD, continuous", "#E8707A", "s"),
    "sgd": ("SGD", "#1F4E9E", "o"),
    "sgd_continuous": ("SGD, continuous", "#3F7FBF", "s"),
    "adam": ("Adam", "#8C9BC9", "^"),
    "si": ("SI", "#2E8B2E", "o"),
    "ewc": ("EWC", "#7A5195", "o"),
    "bbb": ("BBB", "#F28E2B", "o"),
    "bbb_mixture": ("BBB, mixture prior", "#0F8B8D", "s"),
}
OTHER_COLOURS = ["#888888", "#444444", "#882255", "#117733"]
LABEL_GAP = 0.225  # inches from one name at the lines' ends to the next

Words = collections.namedtuple("Words", "title facts caption")  # facts, caption: lines
End = collections.namedtuple("End", "x y text colour bold")  # the name of a line that ends at (x, y)


class PlotError(Exception):
    pass


def spread(positions, gap, low, high):
    """Moves label positions apart by at least `gap`, keeping their order and staying near where they were, and between
    low and high as far as there is room."""
    def bottom(cluster):
        total, count = cluster
        return max(low, min(total / count - (count - 1) * gap / 2, high - (count - 1) * gap))

    order = sorted(range(len(positions)), key=positions.__getitem__)
    clusters = []  # [sum of wanted positions, number of labels]
    for index in order:
        clusters.append([positions[index], 1])
        while len(clusters) > 1 and bottom(clusters[-2]) + clusters[-2][1] * gap > bottom(clusters[-1]):
            total, count = clusters.pop()
            clusters[-1][0] += total
            clusters[-1][1] += count
    placed = [bottom(cluster) + i * gap for cluster in clusters for i in range(cluster[1])]
    result = [0.0] * len(positions)
    for index, position in zip(order, placed):
        result[index] = position
    return result


def page(words, width, height, boxes, head=0):
    """A figure of `width` inches and one axes for each box (left, bottom, width, height), in inches of the space of
    `height` between the words above (and `head` inches for what stands over the axes) and the caption."""
    above, below = 0.6 + 0.21 * len(words.facts) + head, 0.72 + 0.18 * len(words.caption)
    whole, left = above + height + below, boxes[0][0] / width
    figure = pyplot.figure(figsize=(width, whole))
    figure.text(left, 1 - 0.2 / whole, words.title, fontsize=13, fontweight="bold", va="top")
    figure.text(left, 1 - 0.5 / whole, "\n".join(words.facts), fontsize=10, color="#555555", va="top")
    figure.text(left, 0.1 / whole, "\n".join(words.caption), fontsize=8.5, color="#555555", linespacing=1.5,
                va="bottom")
    return figure, [figure.add_axes([x / width, (below + y) / whole, w / width, h / whole]) for x, y, w, h in boxes]


def name_ends(axes, ends, gap, shift=0.045, fontsize=9.5):
    """Names every line beside the axes; a thin leader where the name had to move. gap, shift: of the axes' height and
    width. The axes' limits and scales are settled before."""
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [to_axes.transform((end.x, end.y))[1] for end in ends]
    for end, height in zip(ends, spread(places, gap, 0, 1)):
        axes.annotate(end.text, xy=(end.x, end.y), xytext=(1 + shift, height), textcoords="axes fraction",
                      color=end.colour, va="center", ha="left", annotation_clip=False,
                      fontweight="bold" if end.bold else "normal", fontsize=fontsize,
                      arrowprops={"arrowstyle": "-", "color": end.colour, "alpha": 0.4, "linewidth": 0.8,
                                  "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 3})
