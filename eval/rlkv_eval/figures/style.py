"""One look for all figures: one font, few inks, colours that colour-blind readers tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID = "#222222", "#767676", "#e8e8e8"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so figures look the same everywhere
    "mathtext.fontset": "dejavusans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 8,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # text stays text in PDF
    "savefig.dpi": 200,
}
# Okabe and Ito (2008), with Tol's wine; markers and dashes differ too.
LOOKS: dict[str, tuple[str, str, str]] = {
    "full": ("#000000", "", "--"),
    "h2o": ("#CC79A7", "v", "-"),
    "rkv": ("#D55E00", "D", "-"),
    "streaming": ("#56B4E9", "P", "-"),
    "random_eviction": ("#8c8c8c", "x", ":"),
    "random": ("#5a5a5a", "+", ":"),
    "duo": ("#E69F00", "s", "-"),
    "kvzip": ("#009E73", "^", "-"),
    "ablation": ("#882255", "X", "-"),
    "rlkv": ("#0072B2", "o", "-"),
}
OTHER_LOOK = ("#333333", "*", "-.")
KIND_COLOURS = {
    "wrong": "#0072B2",
    "truncated": "#E69F00",
    "repetition": "#D55E00",
    "no_answer": "#999999",
    "grader_error": "#000000",
}


def look(method: str) -> tuple[str, str, str]:
    """Colour, marker and line style of a method."""
    return LOOKS.get(method, OTHER_LOOK)


def panels(
    rows: int, columns: int, width: float, height: float, margin: float = 0.0, **options: Any
) -> tuple[Figure, Any]:
    """A grid of axes, each ``width`` x ``height`` inches, with labels; the grid comes as a 2-d array.

    ``margin``: further height, for a legend above and a label below.
    """
    size = (width * columns, height * rows + margin)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move ``positions`` apart to at least ``gap``, keeping their order and as little as that takes.

    They stay within [low, high] where it has room for all.
    """
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    # Least squares under "each at least a gap above the one before" is isotonic regression of the
    # positions with the gaps taken off: pool neighbours that are out of order.
    blocks: list[list[float]] = []  # [sum, count]
    for rank, index in enumerate(order):
        blocks.append([positions[index] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    fitted = [block[0] / block[1] for block in blocks for _ in range(int(block[1]))]
    top = max(low, high - gap * (len(order) - 1))
    placed = [0.0] * len(order)
    for rank, index in enumerate(order):
        placed[index] = min(max(fitted[rank], low), top) + rank * gap
    return placed


def label_lines(axes: Axes, ends: Sequence[tuple[float, float, str, str]], room: float = 0.06) -> None:
    """Write each line's name right of the panel, in its colour, joined to its end (x, y) by a thin line."""
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    heights = spread([y for _, y, _, _ in ends], 0.085 * (high - low), low, high)
    span = right - axes.get_xlim()[0]
    for (x, y, text, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            text,
            xy=(x, y),
            xytext=(right + room * span, height),
            color=colour,
            fontsize=7.5,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.5,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0, 0.5),  # from the name's left end, not across it
            },
        )


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem``.png and ``stem``.pdf and free the figure; returns the paths."""
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "pdf")]
    for path in paths:
        figure.savefig(path, bbox_inches="tight", pad_inches=0.04)
    plt.close(figure)
    return paths
