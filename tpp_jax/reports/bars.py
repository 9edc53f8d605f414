"""Pictures of single numbers: channels of layers, times, singular values."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.patches
from matplotlib.figure import Figure

from tpp_jax.reports.canvas import (
    blank,
    dress,
    literal,
    place,
    plain,
    shortened,
    width_of,
    write,
)
from tpp_jax.reports.curves import words_of
from tpp_jax.style import LIGHT, Canvas

_MARGIN = 8  # units at the sides of a picture


def draw_channels(layers: Mapping[str, Mapping[str, int]], canvas: Canvas) -> Figure:
    """Draws a bar for each layer: the kept channels over all channels.

    Args:
      layers: Numbers ``kept`` and ``total`` of each layer, by its name.
      canvas: Canvas of the picture.
    """
    most = max((layer["total"] for layer in layers.values()), default=1)
    size = canvas.size
    names = [" ".join(name.split()) for name in layers]
    texts = [_change(layer) for layer in layers.values()]
    after = max((width_of(text, size) for text in texts), default=0) + 10
    name = max((width_of(name, size) for name in names), default=0) + 14
    if canvas.narrow:  # the names stand above the bars
        start, row = _MARGIN, 2.9 * size
    else:
        start, row = min(_MARGIN + name, 0.5 * canvas.width), 1.75 * size
    width = canvas.width - start - after - _MARGIN
    top = 2.4 * size
    figure = blank(canvas, top + row * len(layers) + 0.6 * size)
    write(figure, _MARGIN, 1.2 * size, "channels of each layer", fontsize=size)
    axes = place(figure, 0, 0, canvas.width, top + row * len(layers) + 0.6 * size)
    axes.set(xlim=(0, canvas.width), ylim=(top + row * len(layers) + 0.6 * size, 0))
    axes.axis("off")
    room = canvas.width - 2 * _MARGIN if canvas.narrow else start - _MARGIN - 8
    for i, (label, text, layer) in enumerate(
        zip(names, texts, layers.values(), strict=True)
    ):
        y = top + row * (i + 1) - 0.55 * size  # middle of the bar
        kept, total = (max(width * layer[key] / most, 1.5) for key in ("kept", "total"))
        cut = layer["kept"] < layer["total"]
        high = 0.85 * size
        outline = {"edgecolor": LIGHT.line, "facecolor": "none", "linewidth": 1}
        rectangle = matplotlib.patches.Rectangle
        axes.add_patch(rectangle((start, y - high / 2), total, high, **outline))
        fill = LIGHT.second if cut else LIGHT.line
        axes.add_patch(rectangle((start, y - high / 2), kept, high, facecolor=fill))
        at = (_MARGIN, y - 0.75 * size) if canvas.narrow else (start - 8, y)
        style = {"fontsize": size, "color": LIGHT.ink if cut else LIGHT.soft}
        axes.text(
            *at,
            literal(shortened(label, size, room)),
            ha="left" if canvas.narrow else "right",
            va="bottom" if canvas.narrow else "center",
            **style,
        )
        axes.text(start + total + 6, y, text, va="center", **style)
    return figure


def _change(layer: Mapping[str, int]) -> str:
    kept, total = layer["kept"], layer["total"]
    return f"{total:,}" if kept == total else f"{total:,} → {kept:,}"


def draw_times(networks: Mapping[str, Mapping[str, float]], canvas: Canvas) -> Figure:
    """Draws the time of the dense and of the pruned network, by batch and program.

    Args:
      networks: ``dense_seconds`` and ``pruned_seconds``, by name.
      canvas: Canvas of the picture.
    """
    size = canvas.size
    title, bar, gap = 2.0 * size, 1.35 * size, 1.3 * size
    row = title + 2 * bar + gap
    height = row * len(networks) + 4
    figure = blank(canvas, height)
    axes = place(figure, 0, 0, canvas.width, height)
    axes.set(xlim=(0, canvas.width), ylim=(height, 0))
    axes.axis("off")
    start = _MARGIN + width_of("pruned", size) + 8
    width = canvas.width - start - width_of("1,000.00 ms", size) - _MARGIN
    rectangle = matplotlib.patches.Rectangle
    for i, (name, pair) in enumerate(networks.items()):
        y = row * i + 1.2 * size
        faster = pair["dense_seconds"] / pair["pruned_seconds"]
        axes.text(_MARGIN, y, literal(name), fontsize=size, va="baseline")
        axes.text(
            *(canvas.width - _MARGIN, y, f"{faster:.2f}× faster"),
            fontsize=size,
            fontweight="bold",
            ha="right",
            va="baseline",
        )
        longest = max(pair["dense_seconds"], pair["pruned_seconds"])
        for j, which in enumerate(("dense", "pruned")):
            seconds = pair[f"{which}_seconds"]
            middle = row * i + title + bar * (j + 0.4)
            color = LIGHT.second if j else LIGHT.rival
            long = max(width * seconds / longest, 1.5)
            place_of_bar = (start, middle - 0.4 * size)
            axes.add_patch(rectangle(place_of_bar, long, 0.8 * size, color=color))
            style = {"fontsize": size, "va": "center", "color": LIGHT.soft}
            axes.text(_MARGIN, middle, which, **style)
            text = f"{1e3 * seconds:,.2f} ms"
            axes.text(start + long + 6, middle, text, **style)
    return figure


def draw_jacobians(phases: Sequence[Mapping[str, Any]], canvas: Canvas) -> Figure:
    """Draws histograms of the Jacobian's singular values at the end of each stage.

    Args:
      phases: Stages of the run; those with a ``jacobian`` are drawn.
      canvas: Canvas of the picture.
    """
    stages = [phase for phase in phases if "jacobian" in phase]
    size = canvas.size
    panel, between, below = 46.0, 2.9 * size, 3.8 * size
    figure = blank(canvas, (panel + between) * len(stages) + below)
    low = min(min(stage["jacobian"]["edges"]) for stage in stages)
    high = max(max(stage["jacobian"]["edges"]) for stage in stages)
    width = canvas.width - 2 * _MARGIN - 14
    for i, stage in enumerate(stages):
        jacobian = stage["jacobian"]
        y = (panel + between) * i
        axes = place(figure, _MARGIN, y + between, width, panel)
        axes.stairs(
            *(jacobian["counts"], jacobian["edges"]), fill=True, color=LIGHT.second
        )
        axes.set_xlim(low, high if high > low else low + 1)
        axes.axvline(jacobian["mean"], color=LIGHT.ink, linewidth=1)
        dress(axes, size, below=i == len(stages) - 1)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        words = words_of(stage["name"]).replace("cut", "the cut")
        name = literal(words if canvas.narrow else f"after {words}")
        write(figure, _MARGIN, y + 1.1 * size, name, fontsize=size)
        numbers = f"mean {plain(_round(jacobian['mean']))}"
        if not canvas.narrow:
            condition = jacobian["condition"]
            condition = "∞" if condition is None else plain(_round(condition))
            numbers += f", std {plain(_round(jacobian['std']))}, condition {condition}"
        style = {"fontsize": size, "ha": "right", "color": LIGHT.soft}
        write(figure, _MARGIN + width, y + 1.1 * size, numbers, **style)
    foot = "singular values of ∂output/∂input (line: mean)"
    bottom = (panel + between) * len(stages) + below - 0.8 * size
    style = {"fontsize": size, "ha": "center", "color": LIGHT.soft}
    write(figure, _MARGIN + width / 2, bottom, foot, **style)
    return figure


def _round(value: float) -> float:
    return float(f"{value:.3g}")
