"""Pictures of matrices: Gram matrices of filters, and the costs of groups by ratio."""

import math
from collections.abc import Mapping

import matplotlib.patches
import numpy as np
from matplotlib.figure import Figure

from tpp_jax.pruning.curves import Sensitivity
from tpp_jax.reports.canvas import blank, literal, place, shortened, width_of, write
from tpp_jax.style import LIGHT, NEGATIVE, POSITIVE, Canvas

_MOMENTS = {
    "chosen": "channels chosen",
    "regularized": "regularized",
    "cut": "after the cut",
}
_MARGIN = 8


def draw_grams(grams: Mapping[str, np.ndarray], canvas: Canvas) -> Figure:
    """Draws the Gram matrix of a layer's filters, kept ones first, as heat maps.

    An entry is as opaque as it is large: zero has the color of the page.

    Args:
      grams: Matrices by moment, the mask ``pruned`` of the filters and the ``layer``.
      canvas: Canvas of the picture.
    """
    moments = [name for name in _MOMENTS if name in grams]
    pruned = np.asarray(grams["pruned"])
    order, kept = np.argsort(pruned, kind="stable"), int((~pruned).sum())
    size, gap = canvas.size, 14 if canvas.narrow else 30
    side = (canvas.width - 2 * _MARGIN - gap * (len(moments) - 1)) / len(moments)
    side = min(side, 220.0)
    head = 5.6 * size
    figure = blank(canvas, head + side + 4.2 * size)
    gone = len(pruned) - kept
    title = shortened(f"W Wᵀ of {grams['layer']}", size, canvas.width - 2 * _MARGIN)
    write(figure, _MARGIN, 1.2 * size, literal(title), fontsize=size)
    order_of = f"{kept} kept filters, then {gone} to prune"
    style = {"fontsize": size, "color": LIGHT.soft}
    write(figure, _MARGIN, 2.7 * size, order_of, **style)
    for i, moment in enumerate(moments):
        left = _MARGIN + i * (side + gap)
        axes = place(figure, left, head, side, side)
        gram = np.asarray(grams[moment])
        if len(gram) == len(pruned):
            gram = gram[np.ix_(order, order)]
            style = {"color": LIGHT.ink, "linewidth": 0.8}
            axes.axhline(kept - 0.5, **style)
            axes.axvline(kept - 0.5, **style)
        axes.imshow(_tinted(gram), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(True)
        text = literal(_MOMENTS[moment])
        write(figure, left, head - 0.6 * size, text, fontsize=size, color=LIGHT.soft)
    _draw_scale(figure, head + side + 1.2 * size, canvas)
    return figure


def _tinted(values: np.ndarray) -> np.ndarray:
    """Returns colors and opacities of the entries of a matrix, as four channels."""
    found = np.zeros((*values.shape, 4), np.uint8)
    found[..., :3] = np.where((values > 0)[..., None], POSITIVE, NEGATIVE)
    size = np.nan_to_num(np.clip(np.abs(values), 0, 1))
    found[..., 3] = np.round(255 * size)
    return found


def _draw_scale(figure: Figure, top: float, canvas: Canvas) -> None:
    """Draws what the colors mean."""
    size, width = canvas.size, 120.0
    axes = place(figure, _MARGIN, top, width, 0.8 * size)
    axes.imshow(_tinted(np.linspace(-1, 1, 61)[None]), aspect="auto")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(True)
    for text, at, side in (("−1", 0, "left"), ("0", 0.5, "center"), ("1", 1, "right")):
        style = {"fontsize": size, "ha": side, "color": LIGHT.soft}
        write(figure, _MARGIN + width * at, top + 2.1 * size, text, **style)


def draw_costs(result: Sensitivity, canvas: Canvas) -> Figure:
    """Draws the costs as a table: a row for each group, a column for each ratio.

    The color of a cell follows its order of magnitude, over three of them.

    Args:
      result: Result of :func:`tpp_jax.sensitivity`.
      canvas: Canvas of the picture.
    """
    rows, columns = result.costs.shape
    size, row = canvas.size, 1.9 * canvas.size
    most = 0.36 if canvas.narrow else 0.45
    names = max(width_of(name, size) for name in result.groups) + 8
    start = _MARGIN + min(names, most * canvas.width)
    width = min((canvas.width - _MARGIN - start) / columns, 84.0)
    head = 5.2 * size
    height = head + row * rows + _MARGIN
    figure = blank(canvas, height)
    axes = place(figure, 0, 0, canvas.width, height)
    axes.set(xlim=(0, canvas.width), ylim=(height, 0))
    axes.axis("off")
    base = f"{result.baseline:.3g}"
    write(figure, _MARGIN, 1.2 * size, f"increase of the loss, from {base}", size=size)
    style = {"size": size, "color": LIGHT.soft}
    write(figure, start, 2.9 * size, "share of the channels removed", **style)
    for j, ratio in enumerate(result.ratios):
        place_of_text = start + width * (j + 0.5), head - 0.7 * size
        axes.text(*place_of_text, f"{ratio:.0%}", ha="center", **style)
    highest = max(float(result.costs.max()), float(np.finfo(float).tiny))
    small = size - (1.5 if canvas.narrow else 0)
    for i, name in enumerate(result.groups):
        middle = head + row * (i + 0.5)
        label = literal(shortened(name, size, start - _MARGIN - 6))
        axes.text(_MARGIN, middle, label, va="center", size=size)
        for j, cost in enumerate(result.costs[i].tolist()):
            step = _step(cost, highest, len(LIGHT.heat))
            corner = start + width * j + 0.5, middle - row / 2 + 0.5
            cell = matplotlib.patches.Rectangle(
                *(corner, width - 1, row - 1), facecolor=LIGHT.heat[step]
            )
            axes.add_patch(cell)
            axes.text(
                *(start + width * (j + 0.5), middle, _cost(cost)),
                size=small,
                ha="center",
                va="center",
                color=LIGHT.ink if step < len(LIGHT.heat) / 2 else LIGHT.paper,
            )
    return figure


def _cost(cost: float) -> str:
    text = f"{cost:.2g}"
    return text.replace("e-0", "e-").replace("e+0", "e+").replace("-", "−")


def _step(cost: float, highest: float, steps: int) -> int:
    """Returns the place of a cost among the colors, over three orders of magnitude."""
    share = 1 + math.log10(max(cost, highest / 1000) / highest) / 3
    return min(int(share * steps), steps - 1)
