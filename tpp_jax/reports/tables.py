"""Tables about a pruned network, for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

import rich.table
import rich.text

from tpp_jax.pruning.flops import Count

_DONE = {"stabilize": "regularized", "grow": "shrunk"}


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
    table.add_column("test accuracy", justify="right")
    for label, accuracy in accuracies(summary):
        if accuracy is not None:
            table.add_row(rich.text.Text(label), f"{accuracy:.2f} %")
    return table


def accuracies(summary: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """Yields the accuracies of a run's network, in order; None for unmeasured ones.

    Args:
      summary: Summary of the run.

    Yields:
      A description of the network, and its test accuracy in %.
    """
    yield "dense", summary["dense"]["accuracy"]
    yield "cut at once (one-shot)", summary["one_shot"]["accuracy_after"]
    done = ""  # treatment of the network since the last cut
    for phase in summary["phases"]:
        stage, _, count = phase["name"].partition("_")
        cut = "the cut" if not count else f"cut {count}"
        if stage == "slice":
            after = phase["accuracy_after"]
            if done:
                yield f"{done}, before {cut}", phase["accuracy_before"]
            if done or count or after != summary["one_shot"]["accuracy_after"]:
                yield f"{done or 'pruned'}, after {cut}", after
            if phase["accuracy"] != after:
                yield "kernels reinitialized", phase["accuracy"]
        elif stage == "extra":
            yield "trained on", phase["accuracy"]
        elif stage == "finetune":
            yield "fine-tuned", phase["accuracy"]
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
