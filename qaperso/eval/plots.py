"""Plots as SVG that stands in a page: text stays text, colours are the page's, ids are the plot's own.

As text, names in any script are shown by the reader's fonts; as paths, only those that matplotlib's font has would be.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Metric = Mapping[str, float | int | str | None]

# Inches. Narrow, so that text keeps its size on a phone; pages enlarge it.
WIDTH = 5.2
# Colours that the page replaces by its own, light or dark.
INK, LINE = "#010203", "#040506"
# Okabe and Ito's palette for the colour-blind (jfly.uni-koeln.de/color), without black and yellow, which a dark or a light
# page would swallow. Markers tell apart what has the same colour.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vPX"
NAMED, PANELS, BARS = 18, 8, 40
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "font.family": "sans-serif",
    "font.size": 8,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "qaperso",  # equal plots give equal bytes
    "text.color": INK,
    "text.parse_math": False,  # a name may hold dollars
    "text.usetex": False,
    "xtick.color": INK,
    "ytick.color": INK,
}
SVG, LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@dataclasses.dataclass(frozen=True, eq=False)
class Map:
    """Dialogues of one cluster as points in the plane.

    Attributes:
      cluster: its number.
      how: what made points of vectors, "t-SNE" or "PCA".
      points: float[n, 2].
      queriers: who asks in each of the n dialogues.
    """

    cluster: int
    how: str
    points: np.ndarray
    queriers: Sequence[str]


def learning_curves(name: str, curves: Mapping[str, Sequence[tuple[int, float]]], chosen: int | None) -> str:
    """Losses over steps; terms that are no mean over tokens have a panel of their own.

    Args:
      name: of the plot, unique in its page; begins its ids.
      curves: (step, value) by "loss", "lm", "dev_nll", "contrast", as far as they are there.
      chosen: step of the checkpoint that was scored.
    """
    tokens = {"lm": "training, labels", "dev_nll": "dev, replies"}
    if "lm" not in curves:
        tokens = {"loss": "training"} | tokens
    upper = {k: label for k, label in tokens.items() if curves.get(k)}
    lower = {k: label for k, label in {"contrast": "contrast", "loss": "total loss"}.items() if curves.get(k)}
    # Without a second term the total is the first.
    lower = lower if "contrast" in lower else {}
    panels = [(upper, "nats per token"), (lower, "nats (contrast: per anchor)")]
    panels = [p for p in panels if p[0]]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        colours = iter(COLOURS)
        for ax, (lines, unit) in zip(axes, panels, strict=True):
            for key, label in lines.items():
                few = len(curves[key]) <= 40
                ax.plot(*zip(*curves[key], strict=True), label=label, color=next(colours), marker="." if few else None)
            if chosen is not None:
                label = "checkpoint scored" if ax is axes[0] else None
                ax.axvline(chosen, color=INK, linewidth=0.8, linestyle=":", label=label)
            ax.set_ylabel(unit)
            ax.legend()
        axes[0].set_title("Learning curves")
        axes[-1].set_xlabel("step")

    return _svg(name, "Learning curves", 0.4 + 2.1 * len(panels), draw)


def interval_bars(name: str, title: str, unit: str, metrics: Mapping[str, Metric]) -> str:
    """Horizontal bars with 95% intervals, the highest first; of many the BARS with the most items.

    Args:
      name: of the plot, see `learning_curves`.
      title: above it.
      unit: of the values.
      metrics: by label; those without a value are left out, those without an interval have no whisker.
    """
    there = {label: m for label, m in metrics.items() if not _missing(m["value"])}
    most = sorted(there, key=lambda label: (-there[label]["n"], label))[:BARS]
    order = sorted(most, key=lambda label: (there[label]["value"], label))
    if len(most) < len(there):
        title += f" ({len(most)} of {len(there)})"

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        ax.barh(range(len(order)), [there[label]["value"] for label in order], color=COLOURS[0], height=0.62)
        for place, label in enumerate(order):
            low, high = there[label]["low"], there[label]["high"]
            if not _missing(low):
                ax.hlines(place, low, high, color=INK, linewidth=1.2)
                ax.vlines([low, high], place - 0.16, place + 0.16, color=INK, linewidth=1.2)
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.set_yticks(range(len(order)), [f"{_short(label)} ({there[label]['n']})" for label in order])
        ax.set_ylim(-0.6, len(order) - 0.4)
        ax.grid(axis="y", visible=False)
        ax.set_title(title)
        ax.set_xlabel(unit)

    return _svg(name, title, 0.9 + 0.21 * len(order), draw)


def gain_curve(name: str, gains: Mapping[int, Metric]) -> str:
    """What fitting a row gains over how many dialogues it is fitted on, with 95% intervals.

    Args:
      name: of the plot, see `learning_curves`.
      gains: by the number of dialogues; 0 dialogues gain 0.
    """
    there = {0: {"value": 0.0, "low": 0.0, "high": 0.0}} | {n: m for n, m in gains.items() if not _missing(m["value"])}
    count = sorted(there)

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        ax.plot(range(len(count)), [there[n]["value"] for n in count], color=COLOURS[0], marker="o")
        for place, n in enumerate(count):
            if not _missing(there[n]["low"]):
                ax.vlines(place, there[n]["low"], there[n]["high"], color=INK, linewidth=1.2)
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set_xticks(range(len(count)), [str(n) for n in count])
        ax.set_title("Queriers whom training never met")
        ax.set_xlabel("dialogues that a row is fitted on")
        ax.set_ylabel("gain, nats per reply token")

    return _svg(name, "Queriers whom training never met", 2.6, draw)


def embedding_maps(name: str, maps: Sequence[Map]) -> str:
    """Points of each cluster in a panel of its own, coloured by querier; the NAMED most frequent have names.

    Args:
      name: of the plot, see `learning_curves`.
      maps: the first PANELS are drawn.
    """
    shown = maps[:PANELS]
    frequent = collections.Counter(q for m in shown for q in m.queriers)
    named = sorted(frequent, key=lambda q: (-frequent[q], q))[:NAMED]
    rows = -(-len(shown) // 2)
    looks = {q: (COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS)]) for i, q in enumerate(named)}

    def panel(ax: Axes, found: Map) -> dict:
        who, handles = np.array(found.queriers), {}
        other = ~np.isin(who, named)
        if other.any():
            handles["others"] = ax.scatter(*found.points[other].T, s=5, color=INK, alpha=0.35, linewidth=0)
        for q in named:
            if (who == q).any():
                colour, marker = looks[q]
                handles[q] = ax.scatter(*found.points[who == q].T, s=14, color=colour, marker=marker, linewidth=0)
        ax.set_title(f"Cluster {found.cluster}: {len(who)} dialogues")
        ax.set_xlabel(f"{found.how} 1 (no unit)")
        ax.set_ylabel(f"{found.how} 2 (no unit)")
        ax.tick_params(labelbottom=False, labelleft=False, length=0)
        ax.grid(visible=False)
        return handles

    def draw(figure: Figure) -> None:
        axes = figure.subplots(rows, min(2, len(shown)), squeeze=False).ravel()
        handles: dict = {}
        for ax, found in zip(axes, shown, strict=False):
            handles |= panel(ax, found)
        for ax in axes[len(shown) :]:
            ax.set_axis_off()
        names = [q for q in (*named, "others") if q in handles]
        numbers = [str(i) for i in range(len(names))]
        legend = figure.legend([handles[q] for q in names], numbers, loc="outside lower center", ncols=3)
        # Set afterwards, since a legend leaves out whatever begins with an underscore.
        for text, q in zip(legend.get_texts(), names, strict=True):
            text.set_text(_short(q))

    # Nearly square panels, with room for titles and for three names a line.
    height = rows * (0.8 * WIDTH / min(2, len(shown)) + 0.3) + 0.18 * -(-(len(named) + 1) // 3)
    return _svg(name, "Embeddings by cluster and querier", height, draw)


def querier_map(name: str, places: Mapping[str, Sequence[float]], marked: Sequence[str] = ()) -> str:
    """Where queriers' rows lie, each point with its querier's name.

    Args:
      name: of the plot, see `learning_curves`.
      places: (x, y) by querier, of `gather.querier_places`.
      marked: those who stand out, in a colour and shape of their own.
    """

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        for who, (x, y) in places.items():
            colour, marker = (COLOURS[1], "D") if who in marked else (COLOURS[0], "o")
            ax.scatter(x, y, s=30, color=colour, marker=marker, linewidth=0)
            ax.annotate(_short(who), (x, y), xytext=(4, 4), textcoords="offset points", color=INK)
        ax.set_title("Queriers by their learned rows")
        ax.set_xlabel("first principal component (no unit)")
        ax.set_ylabel("second (no unit)")
        ax.margins(0.15)

    return _svg(name, "Queriers by their learned rows", 0.8 * WIDTH, draw)


def length_histogram(name: str, replies: Sequence[int], references: Sequence[int]) -> str:
    """How long replies are, beside the true ones.

    Args:
      name: of the plot, see `learning_curves`.
      replies, references: numbers of words.
    """
    longest = max((*replies, *references, 1))
    edges = np.arange(-0.5, longest + 1.5, max(1, longest // 25))
    edges = edges if edges[-1] > longest else np.append(edges, edges[-1] + edges[1] - edges[0])

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        true, ours = (np.histogram(x, edges)[0] for x in (references, replies))
        ax.stairs(true, edges, fill=True, alpha=0.45, color=COLOURS[4], label="true replies")
        ax.stairs(ours, edges, color=COLOURS[0], linewidth=1.6, label="the model's")
        ax.set_title("Lengths of replies")
        ax.set_xlabel("words in a reply")
        ax.set_ylabel("number of replies")
        ax.legend()

    return _svg(name, "Lengths of replies", 2.6, draw)


def alone(plot: str) -> str:
    """A plot as a file of its own, for notebooks and wherever no page gives it colours and paper."""
    root = ElementTree.fromstring(plot)
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib |= {"width": f"{width}pt", "height": f"{height}pt"}
    root.attrib["style"] = "color: #1b1f24; --line: #d5dae0; background: #ffffff"
    ElementTree.register_namespace("", SVG)
    return ElementTree.tostring(root, encoding="unicode")


def _missing(value: float | int | None) -> bool:
    return value is None or bool(np.isnan(value))


def _short(label: str, most: int = 22) -> str:
    # What no font shows, XML may not hold either.
    label = "".join(c for c in " ".join(label.split()) if c.isprintable())
    return label if len(label) <= most else label[: most - 1] + "\u2026"


def _svg(name: str, title: str, height: float, draw: Callable[[Figure], None]) -> str:
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # What matplotlib's font lacks, the reader's may have.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure((WIDTH, height), layout="constrained")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), name, title)


def _inline(text: str, name: str, title: str) -> str:
    """An SVG file as an element of a page: no prolog, no style sheet, no metadata, no id that another plot has too."""
    root = ElementTree.fromstring(text)
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    colours = {INK: "currentColor", LINE: "var(--line)"} | {c: f"var(--c{i}, {c})" for i, c in enumerate(COLOURS)}
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                value = f"{name}-{value}"
            elif key == f"{{{LINK}}}href":
                del element.attrib[key]
                key, value = "href", value.replace("#", f"#{name}-")
            else:
                value = value.replace("url(#", f"url(#{name}-")
                for old, new in colours.items():
                    value = value.replace(old, new)
            element.set(key, value)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"class": "plot", "role": "img", "aria-label": title}
    ElementTree.register_namespace("", SVG)
    return ElementTree.tostring(root, encoding="unicode")
