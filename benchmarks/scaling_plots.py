"""The pictures of ``benchmarks.scaling``."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

_COLORS = {"groups": "#4c72b0", "plan": "#55a868", "prune": "#dd8452"}
_COLORS |= {"trace": "#4c72b0", "compile": "#c44e52", "rolled": "#8172b3"}
_COLORS |= {"pmap": "#4c72b0", "shard_map": "#dd8452"}


def save(result: Mapping[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws the measured parts.

    Args:
      result: Record of ``benchmarks.scaling``.
      folder: Existing folder for the pictures.

    Returns:
      The files, ``scaling_<part>.png``.
    """
    files = []
    for name, (needed, draw) in _PICTURES.items():
        if needed <= result.keys():
            figure = draw({part: result[part]["rows"] for part in needed})
            files.append(folder / f"scaling_{name}.png")
            figure.savefig(files[-1], dpi=120)
    return files


def _pruning(rows: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    jobs = "groups", "plan", "prune"
    _lines(left, rows["depth"], r"resnet(\d+)", jobs)
    left.set(xlabel="layers of a CIFAR ResNet", ylabel="seconds")
    _lines(right, rows["width"], r"resnet56_x(\d+)|resnet56", jobs)
    right.set(xlabel="ResNet-56, times its 16, 32, 64 channels")
    return figure


def _compiling(rows: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    _lines(axes, rows["compile"], r"resnet(\d+)", ("trace", "compile", "rolled"))
    axes.set(xlabel="layers of a CIFAR ResNet", ylabel="seconds, training step")
    return figure


def _lines(
    axes: Axes, rows: Mapping[str, Any], size: str, jobs: tuple[str, ...]
) -> None:
    """Draws jobs over the size that a pattern finds in the networks' names (1 if none),
    with a line for a cost in proportion to the size.
    """
    measured = [name for name, row in rows.items() if row.keys() & set(jobs)]
    found = {name: re.search(size, name) for name in measured}
    known = {int(at[1] or 1): rows[name] for name, at in found.items() if at}
    xs = np.array(list(known))
    for job in jobs:
        seconds = [row.get(job, np.nan) for row in known.values()]
        axes.loglog(xs, seconds, "o-", color=_COLORS[job], markersize=4, label=job)
    first = known[xs[0]][jobs[0]]
    axes.loglog(xs, first * xs / xs[0], ":", color="0.6", label="in proportion")
    _ticks(axes, xs)
    axes.legend(frameon=False, fontsize="small")


def _batches(rows: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    xs = np.array([int(n) for n in rows["batch"]])
    found = rows["batch"].values()
    seconds = np.array([row["seconds"] for row in found])
    around = np.abs(np.array([row["quartiles"] for row in found]).T - seconds)
    axes.errorbar(xs, seconds, around, fmt="o-", color=_COLORS["groups"], capsize=3)
    axes.loglog(xs, seconds[-1] * xs / xs[-1], ":", color="0.6", label="in proportion")
    _ticks(axes, xs)
    axes.set(xlabel="batch", ylabel="seconds per training step of ResNet-20")
    axes.legend(frameon=False, fontsize="small")
    return figure


def _devices(rows: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    found = {tuple(name.split(", ")): row for name, row in rows["devices"].items()}
    for kind in ("pmap", "shard_map"):
        own = {int(n): row for (n, of), row in found.items() if of in (kind, "jit")}
        ratios = np.array([row["ratio"] for row in own.values()])
        around = np.array([row["quartiles"] for row in own.values()]).T
        spread = np.abs(around - ratios)
        style = {"color": _COLORS[kind], "capsize": 3, "label": kind}
        axes.errorbar(list(own), ratios, spread, fmt="o-", **style)
    axes.axhline(1, color="0.6", linestyle=":")
    axes.set_xscale("log", base=2)
    _ticks(axes, np.array(sorted({int(n) for n, _ in found})))
    axes.set_ylim(0)
    axes.set(
        xlabel="simulated devices that share a batch of 128",
        ylabel="time of a ResNet-20 step, one device's = 1",
    )
    axes.legend(frameon=False, fontsize="small")
    return figure


def _ticks(axes: Axes, xs: np.ndarray) -> None:
    axes.set_xticks(xs)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())


_PICTURES = {
    "pruning": ({"depth", "width"}, _pruning),
    "compile": ({"compile"}, _compiling),
    "batch": ({"batch"}, _batches),
    "devices": ({"devices"}, _devices),
}
