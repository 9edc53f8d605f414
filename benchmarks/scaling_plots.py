"""The pictures of ``benchmarks.scaling``; ``benchmarks.pictures`` writes them."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from tpp_jax.reports.canvas import Drawing, blank, dress, label_ends, place, write
from tpp_jax.style import LIGHT, Canvas

_COLORS = {"groups": LIGHT.second, "plan": LIGHT.rival, "prune": LIGHT.ink}
_COLORS |= {"trace": LIGHT.second, "compile": LIGHT.ink, "rolled": LIGHT.rival}
_COLORS |= {"pmap": LIGHT.second, "shard_map": LIGHT.ink}

Rows = Mapping[str, Any]
Panel = tuple[str, str, Callable[[Axes, float], None]]
"""What is measured and its unit, what it depends on, and a function that draws it."""


def of_result(result: Rows) -> dict[str, Drawing]:
    """Returns functions that draw the measured parts, by the name of their picture.

    Args:
      result: Record of ``benchmarks.scaling``.
    """
    found: dict[str, Drawing] = {}
    for name, (needed, panels) in _PICTURES.items():
        if needed <= result.keys():
            rows = {part: result[part]["rows"] for part in needed}
            found[f"scaling_{name}"] = functools.partial(_draw, panels(rows))
    return found


def _draw(panels: Sequence[Panel], canvas: Canvas) -> Figure:
    """Draws panels next to each other, or on a phone one below the other."""
    size, across = canvas.size, 1 if canvas.narrow else len(panels)
    left, right, high = 52, 92, 190
    whole = canvas.width / max(across, 2 - canvas.narrow)
    step = high + 7 * size
    figure = blank(canvas, step * (len(panels) // across))
    for i, (title, below, draw) in enumerate(panels):
        x, y = left + (i % across) * whole, 2.4 * size + (i // across) * step
        width = whole - left - right
        axes = place(figure, x, y, width, high)
        draw(axes, size)
        write(figure, x - left + 8, y - size, title, fontsize=size)
        style = {"fontsize": size, "ha": "center", "color": LIGHT.soft}
        write(figure, x + width / 2, y + high + 3.2 * size, below, **style)
    return figure


def _pruning(rows: Rows) -> list[Panel]:
    jobs = "groups", "plan", "prune"
    deep = functools.partial(_lines, rows["depth"], r"resnet(\d+)", jobs)
    wide = functools.partial(_lines, rows["width"], r"resnet56_x(\d+)|resnet56", jobs)
    return [
        ("seconds", "layers of a CIFAR ResNet", deep),
        ("seconds", "ResNet-56, times its 16, 32, 64 channels", wide),
    ]


def _compiling(rows: Rows) -> list[Panel]:
    jobs = "trace", "compile", "rolled"
    draw = functools.partial(_lines, rows["compile"], r"resnet(\d+)", jobs)
    return [("seconds, training step", "layers of a CIFAR ResNet", draw)]


def _lines(
    rows: Rows, pattern: str, jobs: tuple[str, ...], axes: Axes, size: float
) -> None:
    """Draws jobs over the size that a pattern finds in the networks' names (1 if none),
    with a line for a cost in proportion to the size.
    """
    measured = [name for name, row in rows.items() if row.keys() & set(jobs)]
    found = {name: re.search(pattern, name) for name in measured}
    known = {int(at[1] or 1): rows[name] for name, at in found.items() if at}
    xs = np.array(sorted(known))
    lines = {j: [known[x].get(j, np.nan) for x in xs.tolist()] for j in jobs}
    lines = {job: line for job, line in lines.items() if not np.isnan(line).all()}
    first = known[int(xs[0])][jobs[0]]
    _log(axes, xs, [*lines.values(), (first * xs / xs[0]).tolist()], size)
    axes.plot(xs, first * xs / xs[0], **_EVEN)
    ends = [(float(first * xs[-1] / xs[0]), "in proportion", LIGHT.soft)]
    for job, line in lines.items():
        axes.plot(xs, line, "o-", color=_COLORS[job], markersize=4, linewidth=1.8)
        known_xs = xs[~np.isnan(line)]
        last = line[int(np.flatnonzero(xs == known_xs[-1])[0])]
        if known_xs[-1] == xs[-1]:
            ends.append((last, job, _COLORS[job]))
        else:
            style = {"fontsize": size, "color": _COLORS[job], "ha": "right"}
            place_of_text = {"xytext": (-2, 8), "textcoords": "offset points"}
            axes.annotate(job, (known_xs[-1], last), **place_of_text, **style)
    label_ends(axes, ends, size)


def _batches(rows: Rows) -> list[Panel]:
    def draw(axes: Axes, size: float) -> None:
        xs = np.array([int(n) for n in rows["batch"]])
        found = rows["batch"].values()
        seconds = np.array([row["seconds"] for row in found])
        around = np.abs(np.array([row["quartiles"] for row in found]).T - seconds)
        even = seconds[-1] * xs / xs[-1]
        _log(axes, xs, [seconds.tolist(), even.tolist()], size)
        axes.plot(xs, even, **_EVEN)
        axes.errorbar(xs, seconds, around, fmt="o-", color=LIGHT.second)
        ends = [(float(seconds[-1]), "measured", LIGHT.second)]
        label_ends(axes, [*ends, (float(even[-1]), "in proportion", LIGHT.soft)], size)

    return [("seconds per training step of ResNet-20", "batch", draw)]


def _devices(rows: Rows) -> list[Panel]:
    def draw(axes: Axes, size: float) -> None:
        found = {tuple(name.split(", ")): row for name, row in rows["devices"].items()}
        xs = np.array(sorted({int(n) for n, _ in found}))
        axes.set_xscale("log", base=2)
        ends, top = [(1.0, "one device", LIGHT.soft)], 1.0
        for kind in ("pmap", "shard_map"):
            own = {int(n): row for (n, of), row in found.items() if of in (kind, "jit")}
            ratios = np.array([row["ratio"] for row in own.values()])
            around = np.array([row["quartiles"] for row in own.values()]).T
            style = {"color": _COLORS[kind], "fmt": "o-", "markersize": 4}
            axes.errorbar(list(own), ratios, np.abs(around - ratios), **style)
            ends.append((float(ratios[-1]), kind, _COLORS[kind]))
            top = max(top, float(around.max()))
        axes.axhline(1, **_EVEN)
        axes.set(xlim=(xs[0] / 1.1, xs[-1] * 1.1), ylim=(0, 1.1 * top))
        _ticks(axes, xs, size)
        label_ends(axes, ends, size)

    title = "time of a ResNet-20 step, one device's = 1"
    return [(title, "simulated devices that share a batch of 128", draw)]


_EVEN: dict[str, Any] = {"color": LIGHT.rival, "linewidth": 1, "linestyle": (0, (2, 2))}


def _log(
    axes: Axes, xs: np.ndarray, lines: Sequence[Sequence[float]], size: float
) -> None:
    """Gives axes logarithmic scales around some lines."""
    values = [y for line in lines for y in line if not np.isnan(y)]
    axes.set(xscale="log", yscale="log")
    axes.set(xlim=(xs[0] / 1.15, xs[-1] * 1.15))
    axes.set(ylim=(min(values) / 1.5, max(values) * 1.5))
    _ticks(axes, xs, size)


def _ticks(axes: Axes, xs: np.ndarray, size: float) -> None:
    dress(axes, size)
    low, high = np.log(axes.get_xlim())
    shown: list[float] = []
    for x in xs.tolist():  # numbers that have space
        if not shown or np.log(x / shown[-1]) > (high - low) / 10:
            shown.append(x)
    axes.xaxis.set_major_locator(FixedLocator(shown))


_PICTURES = {
    "pruning": ({"depth", "width"}, _pruning),
    "compile": ({"compile"}, _compiling),
    "batch": ({"batch"}, _batches),
    "devices": ({"devices"}, _devices),
}
