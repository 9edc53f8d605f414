"""Pictures of a run: its curves, and what is left of each layer."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np

_COLORS = {
    "pretrain": "#4c72b0",
    "regularize": "#dd8452",
    "stabilize": "#c44e52",
    "grow": "#8172b3",
    "extra": "#937860",
    "finetune": "#55a868",
}


def draw_run(
    history: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    folder: pathlib.Path,
) -> None:
    """Draws ``curves.png`` and ``channels.png`` into a run's folder.

    Args:
      history: rows of metrics with ``step`` and ``phase``.
      summary: of the run.
      folder: where the pictures go.
    """
    _curves(history, summary).savefig(folder / "curves.png", dpi=120)
    _channels(summary["layers"]).savefig(folder / "channels.png", dpi=120)


def _curves(
    history: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> matplotlib.figure.Figure:
    """Accuracy, loss, strength λ and Gram penalty over the steps of the run."""
    figure = matplotlib.figure.Figure(figsize=(9, 8), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    seen = list(dict.fromkeys(row["phase"] for row in history))
    for name in seen:
        rows = [row for row in history if row["phase"] == name]
        color = _COLORS.get(name.partition("_")[0], "#4c72b0")
        steps, accuracy = _series(rows, "accuracy")
        axes[0].plot(steps, accuracy, color=color, alpha=0.35, linewidth=1)
        steps, accuracy = _series(rows, "test_accuracy")
        axes[0].plot(steps, accuracy, "o-", color=color, markersize=3, label=name)
        axes[1].semilogy(*_series(rows, "loss"), color=color, linewidth=1)
        steps, strength = _series(rows, "strength")
        axes[2].plot(steps, strength, color=color, linewidth=1.5)
    for cut in _steps_of_the_cuts(summary):
        for one in axes:
            one.axvline(cut, color="0.3", linestyle="--", linewidth=1)
        axes[0].text(
            cut,
            1,
            "cut",
            transform=axes[0].get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize="small",
        )
    steps, values = _series(history, "gram")
    if values:
        gram = axes[2].twinx()
        gram.semilogy(steps, np.maximum(values, 1e-12), color="0.5", linewidth=1)
        gram.set_ylabel("Gram penalty (grey)")
    axes[0].set_ylabel("accuracy, %\n(faint: training batches)")
    dense = summary["dense"]["accuracy"]
    if dense is not None:
        axes[0].axhline(dense, color="0.6", linestyle=":", label="dense")
    shown = [row["test_accuracy"] for row in history if "test_accuracy" in row]
    low = min([*shown, 100.0])
    axes[0].set_ylim(max(low - 5, 0), 100.5)
    if seen or dense is not None:
        columns = min(len(seen) + 1, 5)
        axes[0].legend(loc="lower right", ncols=columns, fontsize="small")
    axes[1].set_ylabel("training loss")
    axes[2].set_ylabel("strength λ")
    axes[2].set_xlabel("step")
    model = summary["config"]["model"]["name"]
    data = summary["config"]["data"]["name"]
    pruned = summary["pruned"] and summary["pruned"]["accuracy"]
    accuracies = " → ".join(f"{x:.2f} %" for x in (dense, pruned) if x is not None)
    figure.suptitle(
        f"{model} on {data}: {summary['speedup']:.2f}× fewer FLOPs, {accuracies}"
    )
    for one in axes:
        one.grid(alpha=0.25)
    return figure


def _steps_of_the_cuts(summary: Mapping[str, Any]) -> list[int]:
    steps, cuts = 0, []
    for phase in summary["phases"]:
        if phase["name"].startswith("slice"):
            cuts.append(steps)
        steps += phase["steps"]
    return cuts


def _channels(layers: Mapping[str, Mapping[str, int]]) -> matplotlib.figure.Figure:
    """A bar for each layer: channels kept over channels there were."""
    names = list(layers)
    height = max(2.5, 0.22 * len(names) + 1)
    figure = matplotlib.figure.Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(names))
    total = [layers[name]["total"] for name in names]
    kept = [layers[name]["kept"] for name in names]
    axes.barh(places, total, color="#d9d9d9", label="pruned")
    axes.barh(places, kept, color="#4c72b0", label="kept")
    for place, k, t in zip(places, kept, total, strict=True):
        text = f" {k}/{t}" if k != t else f" {t}"
        axes.text(t, place, text, va="center", fontsize=7)
    axes.set_yticks(places, names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("channels")
    axes.margins(x=0.12, y=0.01)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, 1.0), fontsize="small", ncols=2
    )
    return figure


def _series(
    rows: Sequence[Mapping[str, Any]], name: str
) -> tuple[list[int], list[float]]:
    chosen = [row for row in rows if name in row]
    return [row["step"] for row in chosen], [row[name] for row in chosen]
