"""Head scores of several methods on one model: heat maps beside the heads kept at one sparsity."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlkv_eval.figures.style import LOOKS, panels
from rlkv_eval.names import method_title
from rlkv_eval.overlap import keep

KEPT = ListedColormap(["#ececec", LOOKS["rlkv"][0]])


def heat_maps(heads: Mapping[str, np.ndarray], model: str, sparsity: float) -> Figure:
    """A row for each method: scores [layers, kv_heads] in [0, 1] left, kept heads right; layers across."""
    layers, kv_heads = next(iter(heads.values())).shape
    cell = min(0.115, 4.2 / layers)  # inches
    width = max(layers * cell + 0.55, 2.7)  # of the titles, at least
    figure, axes = panels(len(heads), 2, width, max(kv_heads * cell, 0.45) + 0.42, sharex=True, sharey=True)
    for (method, scores), (left, right) in zip(heads.items(), axes, strict=True):
        image = table(left, scores, "viridis")
        left.set_title(f"{method_title(method)}: mean {scores.mean():.2f}")
        kept = keep(scores, sparsity, seed=0)
        table(right, kept, KEPT)
        empty = int((kept.sum(1) == 0).sum())
        right.set_title(
            f"kept at s = {sparsity:g}; {empty or 'no'} layer{'s' * (empty > 1)} without any",
            fontweight="normal",
        )
        left.set_ylabel("KV head")
    for panel in axes[-1]:
        panel.set_xlabel("layer")
    bar = figure.colorbar(
        image, ax=axes[:, 0], location="left", shrink=0.8, aspect=22, pad=0.02, ticks=[0, 0.5, 1]
    )
    bar.ax.set_yticklabels(["0 local", "0.5", "1 full"])
    bar.outline.set_visible(False)
    figure.suptitle(
        f"{model}: head scores, and the {100 * (1 - sparsity):.0f} % of heads that score highest", fontsize=9
    )
    return figure


def table(axes: Axes, values: np.ndarray, colours: str | ListedColormap):
    """One map, layers across, thin white lines between cells."""
    layers, kv_heads = values.shape
    image = axes.imshow(values.T, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.grid(False)
    axes.set_xticks(np.arange(layers - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(kv_heads - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    return image
