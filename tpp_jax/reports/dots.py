"""The picture of a sweep: a dot for each row, a panel for each column."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tpp_jax.reports import grids
from tpp_jax.reports.canvas import (
    blank,
    dress,
    literal,
    place,
    shortened,
    width_of,
    write,
)
from tpp_jax.style import LIGHT, Canvas

_MARGIN = 8
_WIDE_RANGE = 100.0  # from this ratio on, the axis is logarithmic


def draw_dots(grid: grids.Grid, metric: str, canvas: Canvas) -> Figure:
    """Draws the means of a metric with their spread, names of rows at the left.

    Args:
      grid: Results of the sweep.
      metric: Name of the metric.
      canvas: Canvas of the picture.
    """
    rows = [row for row in grid.rows if _has(grid, row, metric)]
    columns = [c for c in grid.columns if any(_entry(grid, r, c, metric) for r in rows)]
    rows, columns = rows or list(grid.rows), columns or list(grid.columns)
    size, row = canvas.size, 1.65 * canvas.size
    names = max(width_of(name, size) for name in rows) + 16
    left = _MARGIN + min(names, (0.4 if canvas.narrow else 0.3) * canvas.width)
    across = (
        1 if canvas.narrow else math.ceil(len(columns) / math.ceil(len(columns) / 3))
    )
    gap = 26.0
    width = (canvas.width - left - 16 - gap * (across - 1)) / across
    head, title = 2.6 * size, 3.4 * size
    panel = row * len(rows) + 0.5 * row
    foot = 4.6 * size
    down = math.ceil(len(columns) / across)
    published = any(m == metric for _, _, m in grid.paper)
    notes = 2.0 * size if published else 0
    figure = blank(canvas, title + down * (head + panel + foot) + notes)
    heading = literal(shortened(grids.heading(grid, metric), size, canvas.width - 16))
    write(figure, _MARGIN, 1.3 * size, heading, fontsize=size, fontweight="bold")
    limits, log = _limits(grid, rows, columns, metric)
    for i, column in enumerate(columns):
        y = title + (i // across) * (head + panel + foot) + head
        x = left + (i % across) * (width + gap)
        axes = place(figure, x, y, width, panel)
        axes.set_xscale("log" if log else "linear")
        axes.set(xlim=limits, ylim=(len(rows) - 0.25, -0.75))
        _draw_column(axes, grid, rows, column, metric, canvas)
        dress(axes, size)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        text = literal(shortened(_named(grid, column), size, width + 10))
        write(figure, x, y - 0.5 * size, text, fontsize=size, color=LIGHT.soft)
        style = {"fontsize": size, "color": LIGHT.soft, "ha": "center"}
        below = y + panel + 2.9 * size
        write(figure, x + width / 2, below, _axis_name(grid, metric), **style)
        if i % across == 0:
            _name_rows(axes, rows, left - 2 * _MARGIN, canvas)
    if published:
        at = title + down * (head + panel + foot) + 0.9 * size
        text = "◇ published value"
        write(figure, _MARGIN, at, text, fontsize=size, color=LIGHT.soft)
    return figure


def _axis_name(grid: grids.Grid, metric: str) -> str:
    """Returns what is measured and its unit."""
    name, unit = grid.headline.name, grid.headline.unit
    if metric.endswith(f"_{name}"):
        return literal(f"test {name}" + (f", {unit}" if unit else ""))
    return literal(
        grids.metrics_about(grid.headline)[metric].removesuffix(" right after the cut")
    )


def _named(grid: grids.Grid, column: str) -> str:
    """Returns the name of a column; one that is a number is a pruning ratio."""
    return f"pruning ratio {column}" if grids.by_ratio(grid) else column


def _name_rows(axes: Axes, rows: list[str], room: float, canvas: Canvas) -> None:
    for i, row in enumerate(rows):
        axes.annotate(
            literal(shortened(row, canvas.size, room)),
            (0, i),
            (-10, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=canvas.size,
            fontweight="bold" if grids.is_tpp(row) else "normal",
            color=LIGHT.strong if grids.is_tpp(row) else LIGHT.ink,
            annotation_clip=False,
        )


def _draw_column(
    axes: Axes,
    grid: grids.Grid,
    rows: list[str],
    column: str,
    metric: str,
    canvas: Canvas,
) -> None:
    """Draws the dots of a column, and the dense networks as a line."""
    for i, row in enumerate(rows):
        color = LIGHT.strong if grids.is_tpp(row) else LIGHT.rival
        found = grids.entry(grid, row, column, metric)
        if found.n:
            style = {"color": color, "linewidth": 2, "capsize": 0}
            spread = found.std if found.n > 1 else 0.0
            axes.errorbar(found.mean, i, xerr=spread, fmt="none", **style)
            size = 8 if grids.is_tpp(row) else 6.5
            axes.plot(found.mean, i, "o", color=color, markersize=size, zorder=3)
        if found.paper is not None:
            axes.plot(
                *(found.paper, i, "D"),
                markerfacecolor="none",
                markeredgecolor=LIGHT.ink,
                markersize=5,
                zorder=4,
            )
    dense = grids.dense(grid, column, metric)
    if dense is not None:
        axes.axvline(dense, color=LIGHT.ink, linewidth=1, linestyle=(0, (4, 3)))
        low, high = axes.get_xlim()
        on_left = dense - low > (high - low) / 2
        axes.annotate(
            literal(f"dense {dense:.4g}"),
            (dense, 1),
            (-4 if on_left else 4, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right" if on_left else "left",
            va="bottom",
            fontsize=canvas.size,
            annotation_clip=False,
        )


def _entry(grid: grids.Grid, row: str, column: str, metric: str) -> bool:
    found = grids.entry(grid, row, column, metric)
    return bool(found.n) or found.paper is not None


def _has(grid: grids.Grid, row: str, metric: str) -> bool:
    return any(_entry(grid, row, column, metric) for column in grid.columns)


def _limits(
    grid: grids.Grid, rows: list[str], columns: list[str], metric: str
) -> tuple[tuple[float, float], bool]:
    """Returns the range of all columns, and whether it is logarithmic."""
    values: list[float] = []
    for column in columns:
        for row in rows:
            found = grids.entry(grid, row, column, metric)
            if found.n:
                values += [found.mean - found.std, found.mean + found.std]
            if found.paper is not None:
                values.append(found.paper)
        dense = grids.dense(grid, column, metric)
        values += [] if dense is None else [dense]
    values = [x for x in values if math.isfinite(x)] or [0.0, 1.0]
    low, high = min(values), max(values)
    positive = [x for x in values if x > 0]
    if high > 0 and low >= 0 and positive and high > _WIDE_RANGE * min(positive):
        return (min(positive) / 1.5, high * 1.5), True
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (low - pad, high + pad), False
