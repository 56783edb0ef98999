"""Draws gaternet.svg, the README's picture: the same bytes each time, for one version of matplotlib.

pip install matplotlib scikit-learn && python docs/images/draw.py
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch, PathPatch, Polygon, Rectangle
from matplotlib.path import Path as Curve
from sklearn.datasets import load_digits

WIDTH, HEIGHT = 800, 424  # the drawing's units: pixels where the picture is 800 wide
# Okabe and Ito's palette, which colour-blind people can tell apart, and greys
GATER, OPEN, ANSWER = "#0072B2", "#009E73", "#D55E00"
INK, MUTED, CLOSED, BORDER = "#1F2328", "#57606A", "#A3ABB4", "#D0D7DE"
GATER_TINT, FAN_TINT, BACKBONE_TINT = "#EDF5FB", "#D3E6F4", "#F4F6F8"

DIGIT = 3
LAYERS = ("10110", "1101001", "110100101")  # gates of each layer, 1 for open
STRIPE_HEIGHTS = (88, 66, 46)
LEFT, PITCH, GAP = 184.0, 20.0, 44.0
GATER_Y, GATES_Y, LAYERS_Y = 86.0, 181.0, 306.0


def columns() -> list[list[float]]:
    """The x of each gate, layer by layer; its filter has the same."""
    found, x = [], LEFT
    for gates in LAYERS:
        found.append([x + PITCH * i for i in range(len(gates))])
        x = found[-1][-1] + GAP
    return found


COLUMNS = columns()
FIRST, LAST = COLUMNS[0][0], COLUMNS[-1][-1]


def add(ax: Axes, patch: Patch) -> None:
    """On top of all that was drawn before."""
    patch.set_zorder(len(ax.get_children()))
    ax.add_patch(patch)


def rounded(ax: Axes, x: float, y: float, width: float, height: float, radius: float, **style: Any) -> None:
    """A rectangle with round corners; (x, y) is its upper left one."""
    shape = f"round,pad=0,rounding_size={radius}"
    add(ax, FancyBboxPatch((x, y), width, height, boxstyle=shape, **{"edgecolor": "none", **style}))


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, width: float = 2.0) -> None:
    """A straight arrow whose tip is at `end`."""
    head = f"-|>,head_length={2.6 + 1.3 * width},head_width={1.1 + 0.9 * width}"
    style: dict[str, Any] = {"shrinkA": 0, "shrinkB": 0, "mutation_scale": 1, "joinstyle": "round", "capstyle": "butt"}
    add(ax, FancyArrowPatch(start, end, arrowstyle=head, color=colour, linewidth=width, **style))


def text(ax: Axes, x: float, y: float, words: str, size: float = 13.5, **style: Any) -> None:
    """Words that start at x, unless `ha` says otherwise, on the baseline y."""
    style = {"color": INK, "va": "baseline", "zorder": len(ax.get_children()), **style}
    ax.text(x, y, words, fontsize=size, **style)


def gate(ax: Axes, x: float, y: float, value: str) -> None:
    is_open = value == "1"
    style = {"facecolor": OPEN, "edgecolor": OPEN} if is_open else {"facecolor": "white", "edgecolor": CLOSED}
    rounded(ax, x - 7.5, y - 7.5, 15, 15, 4, linewidth=1.4, **style)
    text(ax, x, y + 4, value, 11, ha="center", color="white" if is_open else MUTED, weight="bold")


def image(ax: Axes, x: float, y: float, side: float) -> None:
    """A digit of scikit-learn's, 8x8 pixels, and its ways into both networks."""
    digits: Any = load_digits()
    pixels = digits.images[(digits.target == DIGIT).argmax()] / 16
    middle, right, turn, bend = y + side / 2, x + side + 6, 138.0, 8.0
    for goal_y, goal_x in ((GATER_Y, FIRST - 10), (LAYERS_Y, FIRST - 9)):
        before = goal_y + (bend if goal_y < middle else -bend)
        points = [(right, middle), (turn, middle), (turn, before), (turn, goal_y), (turn + bend, goal_y)]
        codes = [Curve.MOVETO, Curve.LINETO, Curve.LINETO, Curve.CURVE3, Curve.CURVE3]
        add(ax, PathPatch(Curve(points, codes), facecolor="none", edgecolor=INK, linewidth=2, capstyle="butt"))
        arrow(ax, (turn + bend - 0.5, goal_y), (goal_x, goal_y), INK)
    rounded(ax, x - 6, y - 6, side + 12, side + 12, 7, facecolor="white", edgecolor=BORDER, linewidth=1.5)
    cell = side / 8
    for row, values in enumerate(pixels):
        for column, value in enumerate(values):
            corner = (x + column * cell + 0.5, y + row * cell + 0.5)
            grey = str(round(0.955 - 0.835 * float(value), 3))
            add(ax, Rectangle(corner, cell - 1, cell - 1, facecolor=grey, linewidth=0))
    text(ax, x + side / 2, y + side + 26, "image", ha="center")


def gater(ax: Axes) -> None:
    text(ax, FIRST - 8, 46, "Gater", 16, color=GATER, weight="bold")
    text(ax, FIRST + 53, 46, "looks at the image first", color=MUTED)
    x = FIRST - 4
    for width, height in ((7, 50), (10, 39), (13, 29), (17, 20)):  # a CNN: smaller and smaller maps, more of them
        rounded(ax, x, GATER_Y - height / 2, width, height, 2.5, facecolor=GATER)
        x += width + 6
    text(ax, FIRST - 4, 131, "small CNN")

    neck = (FIRST + LAST) / 2
    arrow(ax, (x + 2, GATER_Y), (neck - 34, GATER_Y), GATER)
    fan = [(neck - 23, GATER_Y + 8), (neck + 23, GATER_Y + 8), (LAST + 9, GATES_Y - 12), (FIRST - 9, GATES_Y - 12)]
    add(ax, Polygon(fan, closed=True, facecolor=FAN_TINT, linewidth=0))
    rounded(ax, neck - 30, GATER_Y - 9, 60, 18, 9, facecolor="white", edgecolor=GATER, linewidth=1.8)
    for offset in (-18, -6, 6, 18):
        add(ax, Circle((neck + offset, GATER_Y), 3.6, facecolor=GATER, linewidth=0))
    text(ax, neck + 41, GATER_Y + 5, "bottleneck")
    text(ax, neck, 143, "one gate per filter", ha="center")
    for gates, xs in zip(LAYERS, COLUMNS, strict=True):
        for value, x in zip(gates, xs, strict=True):
            gate(ax, x, GATES_Y, value)


def backbone(ax: Axes) -> None:
    for gates, xs, height in zip(LAYERS, COLUMNS, STRIPE_HEIGHTS, strict=True):
        top = LAYERS_Y - height / 2
        for value, x in zip(gates, xs, strict=True):
            if value == "1":
                arrow(ax, (x, GATES_Y + 8.5), (x, top - 2), OPEN, 1.3)
                rounded(ax, x - 6, top, 12, height, 3, facecolor=OPEN)
            else:
                stem = Curve([(x, GATES_Y + 8.5), (x, top - 2)])
                add(ax, PathPatch(stem, edgecolor=BORDER, linewidth=1.3))
                style: dict[str, Any] = {"facecolor": "white", "edgecolor": CLOSED, "linewidth": 1.4}
                rounded(ax, x - 5.3, top + 0.7, 10.6, height - 1.4, 3, linestyle=(0, (3, 2)), **style)
    for before, after in pairwise(COLUMNS):
        arrow(ax, (before[-1] + 9, LAYERS_Y), (after[0] - 9, LAYERS_Y), INK)
    text(ax, FIRST - 8, 387, "Backbone", 16, weight="bold")
    text(ax, FIRST + 90, 387, "predicts with the open filters", color=MUTED)


def answer(ax: Axes, x: float) -> None:
    arrow(ax, (LAST + 9, LAYERS_Y), (x - 38, LAYERS_Y), INK)
    rounded(ax, x - 29, LAYERS_Y - 29, 58, 58, 10, facecolor="white", edgecolor=ANSWER, linewidth=2.4)
    text(ax, x, LAYERS_Y + 12, str(DIGIT), 32, ha="center", color=ANSWER, weight="bold")
    text(ax, x, LAYERS_Y + 52, "prediction", ha="center")


def legend(ax: Axes, x: float) -> None:
    for y, value, words in ((GATES_Y - 26, "1", "open"), (GATES_Y, "0", "closed: zeros")):
        gate(ax, x, y, value)
        text(ax, x + 14, y + 4.5, words, 13)


def draw() -> Figure:
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))  # one unit of the drawing is one point of the file
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    ax.axis("off")
    rounded(ax, 1, 1, WIDTH - 2, HEIGHT - 2, 16, facecolor="white", edgecolor=BORDER, linewidth=1)
    panel = LAST - FIRST + 48
    rounded(ax, FIRST - 24, 20, panel, 182, 12, facecolor=GATER_TINT)
    rounded(ax, FIRST - 24, 222, panel, 182, 12, facecolor=BACKBONE_TINT)
    image(ax, 30, 166, 80)
    gater(ax)
    backbone(ax)
    answer(ax, 729)
    legend(ax, 678)
    return figure


if __name__ == "__main__":
    mpl.rcParams.update({"svg.hashsalt": "gaternet", "svg.fonttype": "path", "font.family": "DejaVu Sans"})
    draw().savefig(Path(__file__).with_name("gaternet.svg"), transparent=True, metadata={"Date": None, "Creator": None})
