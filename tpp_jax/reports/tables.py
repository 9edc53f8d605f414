"""Tables about a pruned network, for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

import rich.table
import rich.text

from tpp_jax.headline import headline_of
from tpp_jax.pruning.flops import Count

_DONE = {"stabilize": "regularized", "grow": "shrunk"}
_REPAIRS = {
    "compensated": "layers behind the cut refit",
    "recalibrated": "batch statistics measured again",
}


def layer_table(dense: Count, pruned: Count) -> rich.table.Table:
    """Returns a table of every layer before and after: channels, parameters, FLOPs.

    Args:
      dense: Counts of the network before pruning.
      pruned: Counts of the network after slicing, with the same layers.
    """
    table = rich.table.Table(title="Before → after pruning")
    table.add_column("layer", overflow="fold")
    for column in ("channels", "params", "FLOPs"):
        table.add_column(column, justify="right")
    rows = [
        (name, before, pruned.layers[name]) for name, before in dense.layers.items()
    ]
    for name, before, after in rows:
        table.add_row(
            rich.text.Text(name),  # a plain string would be read as markup
            _change(before.channels, after.channels),
            _change(before.params, after.params),
            _change(before.flops, after.flops),
        )
    table.add_section()
    table.add_row(
        "all (norms included)",
        "",
        _change(dense.params, pruned.params),
        _change(dense.flops, pruned.flops),
    )
    return table


def result_table(summary: Mapping[str, Any]) -> rich.table.Table:
    """Returns a table of the results of a run.

    Args:
      summary: Summary of the run.
    """
    table = rich.table.Table(
        title=f"{summary['speedup']:.2f}× fewer FLOPs, "
        f"{100 * summary['sparsity']:.1f} % of the parameters removed"
    )
    table.add_column("network", overflow="fold")
    headline = headline_of(summary)
    table.add_column(f"test {headline.name}", justify="right")
    for label, score in scores(summary):
        if score is not None:
            table.add_row(rich.text.Text(label), headline.text(score))
    return table


def scores(summary: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """Yields the headline metric of a run's network, in order; None if not measured.

    Args:
      summary: Summary of the run.

    Yields:
      A description of the network, and its metric.
    """
    metric = headline_of(summary).name
    one_shot = summary["one_shot"][f"{metric}_after"]
    yield "dense", summary["dense"][metric]
    yield "cut at once (one-shot)", one_shot
    done = ""  # treatment of the network since the last cut
    for phase in summary["phases"]:
        stage, _, count = phase["name"].partition("_")
        cut = "the cut" if not count else f"cut {count}"
        if stage == "slice":
            after = phase[f"{metric}_after"]
            if done:
                yield f"{done}, before {cut}", phase[f"{metric}_before"]
            if done or count or after != one_shot:
                yield f"{done or 'pruned'}, after {cut}", after
            repairs = [name for name in _REPAIRS if f"{metric}_{name}" in phase]
            for name in repairs:
                yield _REPAIRS[name], phase[f"{metric}_{name}"]
            if phase[metric] != after and not repairs:
                yield "kernels reinitialized", phase[metric]
        elif stage == "refit":
            yield "refit without the pruned channels", phase[metric]
        elif stage == "extra":
            yield "trained on", phase[metric]
        elif stage == "finetune":
            yield "fine-tuned", phase[metric]
        done = _DONE.get(stage, "")


def _change(before: int, after: int) -> str:
    if before == after:
        return _short(before)
    return f"{_short(before)} → {_short(after)}"


def _short(number: int) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= 10 * size or (number >= size and size > 1e3):
            return f"{number / size:.3g}{unit}"
    return str(number)
