"""Pictures of a run and of a sweep, drawn by Matplotlib."""

import functools
import io
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.colors
import matplotlib.figure
import numpy as np

from tpp_jax.headline import headline_of, title_of
from tpp_jax.pruning.curves import Sensitivity
from tpp_jax.reports import grids

_COLORS = {
    "pretrain": "#4c72b0",
    "regularize": "#dd8452",
    "stabilize": "#c44e52",
    "grow": "#8172b3",
    "extra": "#937860",
    "finetune": "#55a868",
}


_INK = "#222222"
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color")
_INKED += ("ytick.color",)
_SETTINGS: dict[Any, Any] = {  # Matplotlib's type of the keys is private
    **dict.fromkeys(_INKED, _INK),
    "axes.facecolor": "none",
    # Names are text: `literal` escapes the characters of formulas.
    "text.usetex": False,
    "text.parse_math": True,
    # SVG files contain text instead of outlines and are reproducible.
    "svg.fonttype": "none",
    "svg.hashsalt": "tpp_jax",
}

Drawing = Callable[[], matplotlib.figure.Figure]


def of_run(
    history: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    grams: Mapping[str, np.ndarray],
) -> dict[str, Drawing]:
    """Returns functions that draw the pictures of a run, by name.

    Args:
      history: Rows of metrics with ``step`` and ``phase``; other rows and values that
        are not finite numbers are ignored.
      summary: Summary of the run.
      grams: Arrays of ``gram.npz``, empty if it does not exist.
    """
    found: dict[str, Drawing] = {
        "curves": lambda: _curves(history, summary),
        "channels": lambda: _channels(summary["layers"]),
    }
    if any("jacobian" in phase for phase in summary["phases"]):
        found["jacobian"] = lambda: _jacobians(summary["phases"])
    if "chosen" in grams:
        found["gram"] = lambda: _grams(grams)
    return found


def save(drawings: Mapping[str, Drawing], folder: pathlib.Path) -> dict[str, str]:
    """Saves pictures as ``<name>.png`` and, with a transparent background, as SVG.

    Args:
      drawings: Functions that draw the pictures, by name.
      folder: Folder to write to.

    Returns:
      The SVG pictures by name.
    """
    found = {}
    for name, drawing in drawings.items():
        text = io.StringIO()
        with matplotlib.rc_context(_SETTINGS):
            figure = drawing()
            figure.savefig(folder / f"{name}.png", dpi=120)
            figure.savefig(
                text, format="svg", facecolor="none", metadata={"Date": None}
            )
        found[name] = text.getvalue()
        (folder / f"{name}.svg").write_text(found[name], encoding="utf-8")
    return found


def literal(text: str) -> str:
    r"""Returns text that Matplotlib shows literally: no ``$`` begins a formula.

    Characters that are not printable, which SVG does not allow, become ``�``.

    Args:
      text: Text to show.

    Example:
      >>> literal(r"$\frac$")
      '\\$\\frac\\$'
    """
    printable = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return printable.replace("$", r"\$")


def on_dark(svg: str) -> str:
    """Returns one of :func:`save`'s pictures for a page with a dark background.

    Args:
      svg: Picture for a light background.
    """
    return svg.replace(_INK, "#dddddd")


def _curves(
    history: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> matplotlib.figure.Figure:
    """Draws headline, loss, strength λ, Gram penalty and norm of the pruned filters."""
    headline = headline_of(summary)
    metric = headline.name
    history = [row for row in history if isinstance(row.get("phase"), str)]
    steps, norms = _series(history, "pruned_norm")
    ratios = (3, 2, 2, 1.4)[: 4 if norms else 3]
    size = 9, 1.15 * sum(ratios)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
    phases = list(dict.fromkeys(row["phase"] for row in history))
    for name in phases:
        rows = [row for row in history if row["phase"] == name]
        color = _COLORS.get(name.partition("_")[0], "#4c72b0")
        _draw_scores(axes[0], rows, metric, color, literal(name))
        axes[1].semilogy(*_series(rows, "loss"), color=color, linewidth=1)
        axes[2].plot(*_series(rows, "strength"), color=color, linewidth=1.5)
    _draw_cuts(axes, summary)
    _draw_gram(axes[2], history)
    unit = f", {headline.unit}" if headline.unit else ""
    axes[0].set_ylabel(literal(f"{metric}{unit}") + "\n(faint: training batches)")
    dense = summary["dense"][metric]
    if dense is not None:
        axes[0].axhline(dense, color="0.6", linestyle=":", label="dense")
    if headline.unit == "%":
        low = min([*_series(history, f"test_{metric}")[1], 100.0])
        axes[0].set_ylim(max(low - 5, 0), 100.5)
    if phases or dense is not None:
        columns = min(len(phases) + 1, 5)
        axes[0].legend(loc="lower right", ncols=columns, fontsize="small")
    axes[1].set_ylabel("training loss")
    axes[2].set_ylabel("strength λ")
    if norms:
        axes[3].plot(steps, norms, color=_COLORS["regularize"], linewidth=1.5)
        axes[3].set_ylabel("norm of the\nfilters to prune")
        axes[3].set_ylim(bottom=0)
    axes[-1].set_xlabel("step")
    figure.suptitle(_title(summary))
    for one in axes:
        one.grid(alpha=0.25)
    return figure


def _draw_scores(
    axes: Any, rows: Sequence[Mapping[str, Any]], metric: str, color: str, label: str
) -> None:
    """Draws the metric in one phase, on training batches and on the test set."""
    axes.plot(*_series(rows, metric), color=color, alpha=0.35, linewidth=1)
    steps, values = _series(rows, f"test_{metric}")
    axes.plot(steps, values, "o-", color=color, markersize=3, label=label)


def _draw_cuts(axes: Sequence[Any], summary: Mapping[str, Any]) -> None:
    """Draws a vertical line at each cut."""
    ink = matplotlib.rcParams["text.color"]
    for cut in _steps_of_the_cuts(summary):
        for one in axes:
            one.axvline(cut, color=ink, linestyle="--", linewidth=1)
        axes[0].text(
            cut,
            1,
            "cut",
            transform=axes[0].get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize="small",
        )


def _draw_gram(axes: Any, history: Sequence[Mapping[str, Any]]) -> None:
    """Draws the Gram penalty, if there is one, on a second axis."""
    steps, values = _series(history, "gram")
    if values:
        gram = axes.twinx()
        gram.semilogy(steps, np.maximum(values, 1e-12), color="0.5", linewidth=1)
        gram.set_ylabel("Gram penalty (grey)")


def _title(summary: Mapping[str, Any]) -> str:
    title = literal(title_of(summary["config"]))
    headline = headline_of(summary)
    dense = summary["dense"][headline.name]
    pruned = summary["pruned"] and summary["pruned"][headline.name]
    change = " → ".join(headline.text(x) for x in (dense, pruned) if x is not None)
    return f"{title}: {summary['speedup']:.2f}× fewer FLOPs, {literal(change)}"


def _steps_of_the_cuts(summary: Mapping[str, Any]) -> list[int]:
    steps, cuts = 0, []
    for phase in summary["phases"]:
        if phase["name"].startswith("slice"):
            cuts.append(steps)
        steps += phase["steps"]
    return cuts


def _channels(layers: Mapping[str, Mapping[str, int]]) -> matplotlib.figure.Figure:
    """Draws a bar for each layer: the kept channels over all channels."""
    names = list(layers)
    height = max(2.5, 0.22 * len(names) + 1)
    figure = matplotlib.figure.Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(names))
    total = [layers[name]["total"] for name in names]
    kept = [layers[name]["kept"] for name in names]
    axes.barh(places, total, color="#999999", alpha=0.4, label="pruned")
    axes.barh(places, kept, color="#4c72b0", label="kept")
    for place, k, t in zip(places.tolist(), kept, total, strict=True):
        text = f" {k}/{t}" if k != t else f" {t}"
        axes.text(t, place, text, va="center", fontsize=7)
    axes.set_yticks(places, [literal(name) for name in names], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("channels")
    axes.margins(x=0.12, y=0.01)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, 1.0), fontsize="small", ncols=2
    )
    return figure


def _jacobians(phases: Sequence[Mapping[str, Any]]) -> matplotlib.figure.Figure:
    """Draws histograms of the Jacobian's singular values at the end of each stage."""
    stages = [phase for phase in phases if "jacobian" in phase]
    figure = matplotlib.figure.Figure(
        figsize=(9, 1.3 * len(stages) + 1), layout="constrained"
    )
    axes = np.atleast_1d(figure.subplots(len(stages), 1, sharex=True))
    for one, stage in zip(axes, stages, strict=True):
        jacobian = stage["jacobian"]
        one.stairs(
            jacobian["counts"],
            jacobian["edges"],
            fill=True,
            color=_COLORS.get(stage["name"].partition("_")[0], "#937860"),
        )
        condition = jacobian["condition"]
        condition = "∞" if condition is None else f"{condition:.3g}"
        low, high, name = jacobian["min"], jacobian["max"], literal(stage["name"])
        one.set_title(
            f"{name}: mean {jacobian['mean']:.4g}, std {jacobian['std']:.3g}, "
            f"{low:.3g} to {high:.3g}, condition {condition}",
            fontsize="small",
            loc="left",
        )
        one.set_yticks([])
        one.grid(alpha=0.25)
    axes[-1].set_xlabel("singular values of ∂output/∂input")
    return figure


_MOMENTS = {
    "chosen": "channels chosen",
    "regularized": "end of regularization",
    "cut": "after the cut",
}


def _grams(grams: Mapping[str, np.ndarray]) -> matplotlib.figure.Figure:
    """Draws the Gram matrix of a layer's filters, kept ones first, as heat maps."""
    moments = [name for name in _MOMENTS if name in grams]
    figure = matplotlib.figure.Figure(
        figsize=(3 * len(moments) + 0.8, 3.4), layout="constrained"
    )
    pruned = np.asarray(grams["pruned"])
    order, kept = np.argsort(pruned, kind="stable"), int((~pruned).sum())
    images = []
    for one, moment in zip(
        np.atleast_1d(figure.subplots(1, len(moments))), moments, strict=True
    ):
        gram = np.asarray(grams[moment])
        if len(gram) == len(pruned):
            gram = gram[np.ix_(order, order)]
            one.axhline(kept - 0.5, color="#888888", linewidth=0.8)
            one.axvline(kept - 0.5, color="#888888", linewidth=0.8)
        images.append(
            one.imshow(gram, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        )
        one.set_title(_MOMENTS[moment], fontsize="medium")
        one.set_xticks([])
        one.set_yticks([])
    figure.colorbar(images[-1], ax=figure.axes, shrink=0.8)
    figure.suptitle(
        f"W Wᵀ of {literal(str(grams['layer']))}: {kept} kept filters, then "
        f"{len(pruned) - kept} to prune"
    )
    return figure


def of_grid(grid: grids.Grid) -> dict[str, Drawing]:
    """Returns functions that draw the pictures of a sweep, by metric.

    Args:
      grid: Results of the sweep.
    """
    return {metric: functools.partial(_rows, grid, metric) for metric in grid.metrics}


def _rows(grid: grids.Grid, metric: str) -> matplotlib.figure.Figure:
    """Draws every row over the columns, with error bars and published values."""
    figure = matplotlib.figure.Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    palette = matplotlib.colormaps["tab20"]
    colors = [palette(i) for i in (*range(0, 20, 2), *range(1, 20, 2))]  # strong first
    width = 0.7 / len(grid.rows)
    for i, row in enumerate(grid.rows):
        entries = [grids.entry(grid, row, column, metric) for column in grid.columns]
        places = np.arange(len(entries)) + (i - (len(grid.rows) - 1) / 2) * width
        color = colors[i % len(colors)]
        axes.errorbar(
            places,
            [e.mean for e in entries],
            [e.std for e in entries],
            fmt="o",
            markersize=5,
            capsize=3,
            color=color,
            label=str(i),  # see the legend
        )
        published = [np.nan if e.paper is None else e.paper for e in entries]
        axes.plot(places, published, "x", color=color, markersize=6)
    axes.set_xticks(range(len(grid.columns)), [literal(x) for x in grid.columns])
    axes.set_xlim(-0.5, len(grid.columns) - 0.5)
    axes.set_title(grids.heading(grid, metric), fontsize="medium")
    low, high = axes.dataLim.intervaly
    if 0 < low < high / 100:
        axes.set_yscale("log")
    if any(m == metric for _, _, m in grid.paper):
        axes.plot([], [], "x", color="0.5", label="published")
    legend = axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    # As a label, a name that begins with _ would hide the row from the legend.
    names = {str(i): row for i, row in enumerate(grid.rows)}
    for shown in legend.get_texts():
        shown.set_text(literal(names.get(shown.get_text(), shown.get_text())))
    axes.grid(alpha=0.25)
    return figure


def of_sensitivity(result: Sensitivity) -> dict[str, Drawing]:
    """Returns functions that draw what each group costs, by name.

    Args:
      result: Result of :func:`tpp_jax.sensitivity`.
    """
    return {"sensitivity": lambda: _costs(result)}


def _costs(result: Sensitivity) -> matplotlib.figure.Figure:
    """Draws the costs as a table: a row for each group, a column for each ratio."""
    rows, columns = result.costs.shape
    size = 1.9 + 0.55 * columns, 0.9 + 0.2 * rows  # legible at the width of a phone
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    highest = max(result.costs.max(), np.finfo(float).tiny)
    # Three orders of magnitude; what is below is as good as nothing.
    norm = matplotlib.colors.LogNorm(highest / 1000, highest, clip=True)
    shades = norm(np.maximum(result.costs, highest / 1000))
    axes.imshow(shades, cmap="YlOrRd", vmin=0, vmax=1.2, aspect="auto")
    for (row, column), cost in np.ndenumerate(result.costs):
        axes.text(
            column,
            row,
            f"{cost:.2g}",
            color="white" if shades[row, column] > 0.75 else "black",
            ha="center",
            va="center",
            fontsize=8,
        )
    axes.set_xticks(range(columns), [f"{ratio:.0%}" for ratio in result.ratios])
    axes.set_yticks(range(rows), [literal(name) for name in result.groups])
    axes.tick_params(labelsize=8, length=0)
    axes.set_xlabel("share of the channels removed", fontsize=8)
    figure.suptitle(f"increase of the loss, from {result.baseline:.3g}", fontsize=9)
    return figure


def _series(
    rows: Sequence[Mapping[str, Any]], name: str
) -> tuple[list[int], list[float]]:
    chosen = [
        row for row in rows if _finite(row.get("step")) and _finite(row.get(name))
    ]
    return [row["step"] for row in chosen], [row[name] for row in chosen]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max
