"""The course of a run: its metric, loss, λ, Gram penalty and filters over all steps."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tpp_jax.headline import Headline, headline_of, title_of
from tpp_jax.reports.canvas import (
    blank,
    dress,
    label_ends,
    literal,
    place,
    width_of,
    write,
)
from tpp_jax.style import LIGHT, Canvas

Rows = Sequence[Mapping[str, Any]]

WORDS = {
    "pretrain": "dense training",
    "refit": "refit",
    "grow": "shrinking all",
    "regularize": "regularizing",
    "stabilize": "settling",
    "slice": "cut",
    "extra": "training on",
    "finetune": "fine-tuning",
}
"""Names of the stages of a run, by kind."""

_SHORT = {"pretrain": "dense", "regularize": "regularize", "stabilize": "settle"}
_SHORT |= {"finetune": "fine-tune", "grow": "shrink", "extra": "train on"}
_HIDDEN = 4.0  # a cut at once that is farther off than this many ranges is an arrow
_WIDE_RANGE = 20.0  # from this ratio on, a range is on a logarithmic axis


class _Panel(NamedTuple):
    """Part of the picture: its title, height, and the function that draws it."""

    title: str
    height: float
    draw: Callable[[Axes], None]


def words_of(stage: str) -> str:
    """Returns the name of a stage for its user, with the number of its round.

    Args:
      stage: Name of the stage.

    Example:
      >>> words_of("finetune_2"), words_of("own")
      ('fine-tuning 2', 'own')
    """
    kind, _, number = stage.partition("_")
    return f"{WORDS[kind]} {number}".rstrip() if kind in WORDS else stage


def draw_curves(history: Rows, summary: Mapping[str, Any], canvas: Canvas) -> Figure:
    """Draws a panel for each quantity, one below the other, over the training steps.

    Args:
      history: Rows of metrics.
      summary: Summary of the run.
      canvas: Canvas of the picture.
    """
    history = [row for row in history if isinstance(row.get("phase"), str)]
    panels = _panels(history, summary, canvas)
    left, right = (42, 72) if canvas.narrow else (56, 104)
    width, between = canvas.width - left - right, 26 if canvas.narrow else 30
    spans, last = _spans(history, summary), _last_step(history, summary)
    names, lines = _placed(spans, canvas, left, width / last)
    above = 1.4 * canvas.size * lines + (8 if canvas.narrow else 42)
    below = 2.2 * canvas.size
    height = above + sum(p.height + between for p in panels) + below
    figure = blank(canvas, height)
    y = above + 18
    for i, panel in enumerate(panels):
        axes = place(figure, left, y, width, panel.height)
        axes.set_xlim(0, last)
        panel.draw(axes)
        dress(axes, canvas.size, below=i == len(panels) - 1)
        for start, _, _ in spans[1:]:
            axes.axvline(start, color=LIGHT.line, linewidth=0.7, linestyle=(0, (2, 3)))
        for cut in _cuts(summary):
            axes.axvline(cut, color=LIGHT.ink, linewidth=1, zorder=0)
        write(figure, left - 2, y - 8, literal(panel.title), fontsize=canvas.size)
        y += panel.height + between
    write(
        *(figure, left + width / 2, height - 6, "training step"),
        ha="center",
        fontsize=canvas.size,
        color=LIGHT.soft,
    )
    for middle, line, word in names:
        at = above - 10 - 1.4 * canvas.size * line
        style = {"ha": "center", "fontsize": canvas.size, "color": LIGHT.soft}
        write(figure, middle, at, literal(word), **style)
    if not canvas.narrow:
        write(figure, left - 2, 20, _title(summary), fontsize=13, fontweight="bold")
    return figure


def _panels(history: Rows, summary: Mapping[str, Any], canvas: Canvas) -> list[_Panel]:
    """Returns the panels for which the run has numbers."""
    headline = headline_of(summary)
    color = LIGHT.strong if "tpp" in str(summary.get("method")) else LIGHT.ink
    unit = f", {headline.unit}" if headline.unit else ""
    small = 62 if canvas.narrow else 84

    def score(axes: Axes) -> None:
        _draw_score(axes, history, summary, color, canvas)

    panels = [_Panel(f"test {headline.name}{unit}", 3 * small, score)]
    gram = "Gram penalty" + ("" if canvas.narrow else ": overlap with the kept filters")
    for key, title, scale in (
        ("loss", "training loss", "log"),
        ("strength", "strength λ of the penalties", "linear"),
        ("gram", gram, "log"),
        ("pruned_norm", "norm of the filters to prune", "linear"),
    ):
        steps, values = series(history, key)
        if scale == "log":
            pairs = zip(steps, values, strict=True)
            shown = [(s, v) for s, v in pairs if v > 0]
            steps, values = [s for s, _ in shown], [v for _, v in shown]
        if values:
            panels.append(_Panel(title, small, _line(steps, values, scale, color)))
    return panels


def _line(
    steps: Sequence[float], values: Sequence[float], scale: str, color: str
) -> Callable[[Axes], None]:
    """Returns a function that draws a line, which breaks where its steps are far apart.

    A range of less than a factor of ten is on a linear axis.
    """

    def draw(axes: Axes) -> None:
        if scale == "log" and max(values) > 10 * min(values):
            low, high = max(min(values), 1e-12), max(values)
            axes.set_yscale("log")
            axes.set_ylim(low / 1.5, max(high, low * 2) * 1.5)
        else:
            top = max([*values, 0.0])
            axes.set_ylim(min([*values, 0.0]), 1.08 * top if top else 1.0)
        axes.plot(steps, values, color=color, linewidth=1.5)

    return draw


def _draw_score(
    axes: Axes,
    history: Rows,
    summary: Mapping[str, Any],
    color: str,
    canvas: Canvas,
) -> None:
    """Draws the headline metric, the dense network's as a line, and the cuts."""
    headline = headline_of(summary)
    dense = summary["dense"][headline.name]
    steps, values = series(history, f"test_{headline.name}")
    batches = series(history, headline.name)
    at_once = _at_once(summary, headline)
    shown = [*values, *([] if dense is None else [dense])]
    _limit(axes, shown or batches[1], at_once and at_once[1], headline)
    low, high = sorted(axes.get_ylim())
    axes.plot(*batches, color=LIGHT.rival, linewidth=1, zorder=1)
    axes.plot(steps, values, "o-", color=color, linewidth=2, markersize=3.5, zorder=3)
    ends = []
    if dense is not None:
        axes.axhline(dense, color=LIGHT.ink, linewidth=1, linestyle=(0, (4, 3)))
        ends.append((dense, f"dense {_short(dense)}", LIGHT.ink))
    if values:
        ends.append((values[-1], f"test {_short(values[-1])}", color))
    if batches[1] and low <= batches[1][-1] <= high:
        ends.append((batches[1][-1], "training", LIGHT.rival))
    label_ends(axes, [(y, literal(t), c) for y, t, c in ends], canvas.size)
    if at_once:
        _mark_drop(axes, *at_once, dense, headline, canvas)
    for phase in summary["phases"]:
        if phase["name"] == "slice" and values:
            _mark_cut(axes, _cuts(summary)[0], phase, headline, color, canvas)


def _limit(
    axes: Axes, values: Sequence[float], at_once: float | None, headline: Headline
) -> None:
    """Sets the vertical range, from all tests and, unless it is far off, the drop."""
    if not values:
        return
    low, high = min(values), max(values)
    if at_once is not None:
        reach = high - low or abs(high)
        if headline.unit == "%" or abs(at_once - low) < _HIDDEN * reach:
            low, high = min(low, at_once), max(high, at_once)
    if low > 0 and high > _WIDE_RANGE * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.2, high * 1.2)
        return
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    bottom, top = low - pad, high + pad
    if headline.unit == "%":
        bottom, top = max(bottom, 0.0), min(top, 100.5) if high <= 100 else top
    axes.set_ylim(bottom, top)


def _mark_drop(
    axes: Axes,
    step: float,
    value: float,
    dense: float | None,
    headline: Headline,
    canvas: Canvas,
) -> None:
    """Marks, at the cut, what cutting all channels at once leaves of the metric."""
    low, high = sorted(axes.get_ylim())
    shown = min(max(value, low), high)
    off = shown != value
    left, right = axes.get_xlim()
    on_left = step - left > right - step
    step += (right - left) / 90 * (-1 if on_left else 1)  # next to the line of the cut
    if dense is not None:
        style = {"color": LIGHT.rival, "linewidth": 2, "linestyle": (0, (1.5, 1))}
        axes.plot([step, step], [dense, shown], **style, zorder=2)
    marker = "o" if not off else ("^" if value > high else "v")
    axes.plot(
        *([step], [shown], marker),
        color=LIGHT.paper,
        markeredgecolor=LIGHT.rival,
        markeredgewidth=1.8,
        markersize=7,
        zorder=4,
        clip_on=False,
    )
    aside = 0 if not off else -10 if value > high else 10
    text = f"cut at once: {headline.text(value)}"
    _note(axes, text, (step, shown), aside, on_left, LIGHT.soft, canvas)


def _mark_cut(
    axes: Axes,
    step: float,
    phase: Mapping[str, Any],
    headline: Headline,
    color: str,
    canvas: Canvas,
) -> None:
    """Writes what the cut of the prepared network changes."""
    before = phase.get(f"{headline.name}_before")
    after = phase.get(f"{headline.name}_after")
    if not (_finite(before) and _finite(after)):
        return
    low, high = sorted(axes.get_ylim())
    left, right = axes.get_xlim()
    on_left = step - left > right - step
    first = headline.text(before).removesuffix(headline.unit).rstrip()
    text = f"cut: {first} → {headline.text(after)}"
    lower = after > (low + high) / 2
    place = step, min(max(after, low), high)
    _note(axes, text, place, -15 if lower else 15, on_left, color, canvas)


def _note(
    axes: Axes,
    text: str,
    place: tuple[float, float],
    above: float,
    on_left: bool,
    color: str,
    canvas: Canvas,
) -> None:
    axes.annotate(
        literal(text),
        place,
        (-10 if on_left else 10, above),
        textcoords="offset points",
        ha="right" if on_left else "left",
        va="center",
        fontsize=canvas.size,
        color=color,
        annotation_clip=False,
        bbox={"facecolor": LIGHT.paper, "edgecolor": "none", "pad": 1},
        zorder=5,
    )


def _at_once(
    summary: Mapping[str, Any], headline: Headline
) -> tuple[float, float] | None:
    """Returns the step of the first cut and the score of a cut without preparation."""
    value = (summary.get("one_shot") or {}).get(f"{headline.name}_after")
    cuts = _cuts(summary)
    if not _finite(value):
        return None
    if not cuts:  # a run that was stopped before its cut
        cuts = [sum(phase["steps"] for phase in summary["phases"])]
    return cuts[0], value


def _short(value: float) -> str:
    return f"{value:.1f}" if 10 <= abs(value) < 1000 else f"{value:.3g}"


def _title(summary: Mapping[str, Any]) -> str:
    title = literal(title_of(summary["config"]))
    headline = headline_of(summary)
    dense = summary["dense"][headline.name]
    pruned = summary["pruned"] and summary["pruned"][headline.name]
    change = " → ".join(headline.text(x) for x in (dense, pruned) if x is not None)
    if summary["speedup"] is None:
        return f"{title}: {literal(change)}".removesuffix(": ")
    parts = f"{summary['speedup']:.2f}× fewer FLOPs", f"{headline.name} {change}"
    return f"{title}: {', '.join(literal(part) for part in parts[: 1 + bool(change)])}"


def _spans(history: Rows, summary: Mapping[str, Any]) -> list[tuple[float, float, str]]:
    """Returns first step, last step and name of each phase that trains."""
    spans, steps = [], 0
    for phase in summary["phases"]:
        if phase["steps"]:
            spans.append((steps, steps + phase["steps"], phase["name"]))
        steps += phase["steps"]
    last = _last_step(history, summary)
    named = {name for _, _, name in spans}
    begun = [row["phase"] for row in history if row["phase"] not in named]
    if begun and last > steps:  # the phase in which the run was stopped
        spans.append((steps, last, begun[-1]))
    return spans


def _last_step(history: Rows, summary: Mapping[str, Any]) -> float:
    steps = [row["step"] for row in history if _finite(row.get("step"))]
    return max([sum(p["steps"] for p in summary["phases"]), *steps, 1])


def _cuts(summary: Mapping[str, Any]) -> list[int]:
    """Returns the number of steps before each cut."""
    steps, cuts = 0, []
    for phase in summary["phases"]:
        if phase["name"].startswith("slice"):
            cuts.append(steps)
        steps += phase["steps"]
    return cuts


def _placed(
    spans: Sequence[tuple[float, float, str]],
    canvas: Canvas,
    left: float,
    scale: float,
) -> tuple[list[tuple[float, int, str]], int]:
    """Returns middle, line and text of the phases' names, and the number of lines.

    A name for which two lines have no space is left out.
    """
    size, found = canvas.size, []
    free = [left - 14.0, left - 14.0]  # right end of the text in each line
    for start, end, stage in spans:
        kind, _, number = stage.partition("_")
        word = words_of(stage)
        if width_of(word, size) > scale * (end - start):
            word = f"{_SHORT.get(kind, word)} {number}".rstrip()
        half = width_of(word, size) / 2
        middle = left + scale * (start + end) / 2
        middle = min(max(middle, left + half - 10), canvas.width - half - 4)
        for line in (0, 1):
            if middle - half > free[line] + 6:
                free[line] = middle + half
                found.append((middle, line, word))
                break
    return found, 1 + max((line for _, line, _ in found), default=0)


def series(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and the finite values of a metric.

    Args:
      rows: Rows of metrics.
      name: Name of the metric.
    """
    chosen = [
        row for row in rows if _finite(row.get("step")) and _finite(row.get(name))
    ]
    return [row["step"] for row in chosen], [row[name] for row in chosen]


def _finite(value: Any) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max
