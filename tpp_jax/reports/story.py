"""A run in words and numbers: the figures that matter, and its stages in order."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tpp_jax.headline import Headline, headline_of
from tpp_jax.reports.curves import words_of

_METHODS = {
    "tpp": "TPP",
    "oneshot": "Cut at once",
    "extra": "Cut at once, then trained on",
    "scratch": "The small network, trained from random weights",
    "greg2": "GReg-2",
    "group_lasso": "Group lasso",
    "iterative": "Iterative pruning",
    "compensated": "Cut and compensated",
    "compensated_tpp": "Compensated TPP",
    "none": "Dense training, nothing pruned",
}

_SENTENCES = {
    "pretrain": "The unpruned network is trained.",
    "grow": "A penalty shrinks all filters of the groups to prune.",
    "refit": "The layers that read the channels to prune are refit without them.",
    "regularize": "A growing penalty shrinks the filters to prune and decorrelates "
    "them from the kept ones, while training continues.",
    "stabilize": "The penalty keeps its strength until the filters to prune are zero.",
    "slice": "The channels are removed from the arrays.",
    "extra": "The pruned network is trained for as many steps as TPP regularizes.",
    "finetune": "The pruned network is trained.",
}
# Of ``regularize`` without a Gram penalty.
_SHRUNK = "A growing penalty shrinks the filters to prune, while training continues."


class Figure(NamedTuple):
    """A number that matters, as a card shows it.

    Attributes:
      name: Name of the quantity.
      value: Number, with its unit.
      detail: Values before and after.
    """

    name: str
    value: str
    detail: str = ""


class Chapter(NamedTuple):
    """A stage of a run.

    Attributes:
      title: Name of the stage for its user.
      stage: Name of the stage in files; "" for one without.
      text: Sentence about what happens.
      facts: Steps, duration and score.
    """

    title: str
    stage: str
    text: str
    facts: str


def method_of(summary: Mapping[str, Any]) -> str:
    """Returns the name of a run's method for its user.

    Args:
      summary: Summary of the run.
    """
    name = str(summary["method"])
    return _METHODS.get(name, name.rpartition(":")[2])


def figures(
    summary: Mapping[str, Any], profile: Mapping[str, Any] | None
) -> Iterator[Figure]:
    """Yields the figures that matter, the most important one first.

    Args:
      summary: Summary of the run.
      profile: Content of ``profile.json``; None if the networks were not timed.
    """
    headline = headline_of(summary)
    dense, pruned = summary["dense"], summary["pruned"]
    yield _score(headline, dense[headline.name], summary)
    if profile:
        yield from _speed(profile)
    if "params" not in dense:
        return
    if pruned is None:
        yield Figure("parameters", f"{dense['params']:,}")
        yield Figure("FLOPs of one example", number(dense["flops"]))
        return
    if "bytes" in dense and "bytes" in pruned:
        yield _fewer("size of the arrays", dense["bytes"], pruned["bytes"], size)
    yield _fewer("parameters", dense["params"], pruned["params"], number)
    flops = f"{number(dense['flops'])} → {number(pruned['flops'])}"
    yield Figure("FLOPs of one example", f"{summary['speedup']:.2f}× fewer", flops)


def _score(
    headline: Headline, dense: float | None, summary: Mapping[str, Any]
) -> Figure:
    """Returns the metric before and after."""
    name = f"test {headline.name}"
    pruned, phases = summary["pruned"], summary["phases"]
    after = pruned and pruned[headline.name]
    if after is None and dense is None and phases:
        last = phases[-1][headline.name]
        return Figure(name, "–" if last is None else headline.text(last), "so far")
    if after is None or dense is None:
        [*known] = [x for x in (dense, after) if x is not None]
        text = headline.text(known[0]) if known else "–"
        return Figure(name, text, "of the pruned network" if after is not None else "")
    change = after - dense
    points = "points" if headline.unit == "%" else headline.unit
    sign = "+" if change > 0 else "−" if change < 0 else "±"
    amount = f"{abs(change):.2f}" if headline.unit == "%" else f"{abs(change):.3g}"
    short = headline.text(dense).removesuffix(headline.unit).rstrip()
    detail = f"{sign}{amount} {points}".rstrip() + ", before → after"
    return Figure(name, f"{short} → {headline.text(after)}", detail)


def _speed(profile: Mapping[str, Any]) -> Iterator[Figure]:
    """Yields the speedup by the clock at the largest batch, in JAX."""
    timed = {k: x for k, x in profile["networks"].items() if "," not in k}
    if not timed:
        return
    name, pair = list(timed.items())[-1]
    before, after = pair["dense_seconds"], pair["pruned_seconds"]
    yield Figure(
        f"speed by the clock, {name}",
        f"{before / after:.2f}× faster",
        f"{1e3 * before:,.2f} → {1e3 * after:,.2f} ms",
    )


def _fewer(name: str, before: int, after: int, show: Any) -> Figure:
    less = 100 * (1 - after / before)
    return Figure(name, f"{less:.1f} % less", f"{show(before)} → {show(after)}")


def number(value: float) -> str:
    """Returns a number with three digits and a unit, exact below 100,000.

    Args:
      value: Number to write.

    Example:
      >>> number(75002), number(1494272)
      ('75,002', '1.49 M')
    """
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= max(unit, 1e5):
            return f"{value / unit:#.3g}".rstrip(".") + f" {name}"
    return f"{value:,}"


def size(value: float) -> str:
    """Returns a number of bytes with three digits and a unit.

    Args:
      value: Number of bytes.

    Example:
      >>> size(300008), size(512)
      ('300 kB', '512 B')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:#.3g}".rstrip(".") + f" {name}"
    return f"{value:,.0f} B"


def chapters(summary: Mapping[str, Any]) -> Iterator[Chapter]:
    """Yields the stages of a run in order, with the choice of the channels.

    Args:
      summary: Summary of the run.
    """
    headline = headline_of(summary)
    metric = headline.name
    at_once = (summary["one_shot"] or {}).get(f"{metric}_after")
    shown = at_once is None
    for phase in summary["phases"]:
        kind, _, _ = phase["name"].partition("_")
        if not shown and kind in ("regularize", "refit", "slice"):
            yield _choice(headline, at_once)
            shown = True
        title = words_of(phase["name"])
        text = _SENTENCES.get(kind, "The network is trained.")
        if kind == "regularize" and not _decorrelates(summary):
            text = _SHRUNK
        yield Chapter(
            title[0].upper() + title[1:], phase["name"], text, _facts(phase, headline)
        )
    if not shown:
        yield _choice(headline, at_once)


def _decorrelates(summary: Mapping[str, Any]) -> bool:
    return summary["config"].get("prune", {}).get("gram_weight") != 0


def _choice(headline: Headline, at_once: float | None) -> Chapter:
    assert at_once is not None
    text = "The channels to prune are chosen. If they were cut now, the network would "
    text += f"have {headline.name} {headline.text(at_once)}."
    return Chapter("Choice of the channels", "", text, "")


def _facts(phase: Mapping[str, Any], headline: Headline) -> str:
    """Returns steps, duration and score of a stage."""
    metric, facts = headline.name, []
    if phase["steps"]:
        facts.append(f"{phase['steps']:,} steps")
    if phase.get("seconds") is not None:
        facts.append(duration(phase["seconds"]))
    before, after = phase.get(f"{metric}_before"), phase.get(f"{metric}_after")
    score = phase[metric]
    if before is not None and after is not None:
        change = f"{headline.text(before)} before the cut, {headline.text(after)} after"
        facts.append(f"{metric} {change}")
    elif after is not None:
        facts.append(f"{metric} {headline.text(after)} after the cut")
    for key, words in (("compensated", "refit"), ("recalibrated", "new statistics")):
        value = phase.get(f"{metric}_{key}")
        if value is not None:
            facts.append(f"{headline.text(value)} after the {words}")
    if after is None and score is not None:
        facts.append(f"{metric} {headline.text(score)} at the end")
        best = phase.get(f"best_{metric}")
        if best is not None and best != score:
            facts.append(f"best {headline.text(best)}")
    return ", ".join(facts)


def duration(seconds: float) -> str:
    """Returns a duration in a unit that suits it.

    Args:
      seconds: Duration in seconds.

    Example:
      >>> duration(7.9), duration(150), duration(7260)
      ('7.9 s', '2 min 30 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
