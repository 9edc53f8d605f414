"""Tables of a pruned network, for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

import rich.table
import rich.text

from tpp_jax.pruning.flops import Count

_DONE = {"stabilize": "regularized", "grow": "shrunk"}


def layer_table(dense: Count, pruned: Count) -> rich.table.Table:
    """Returns a table of every layer before and after: channels, parameters, FLOPs.

    Args:
      dense: The network as it was.
      pruned: The network after slicing, with the same layers.
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
    """Returns a table of what a run achieved, from its summary."""
    table = rich.table.Table(
        title=f"{summary['speedup']:.2f}× fewer FLOPs, "
        f"{100 * summary['sparsity']:.1f} % of the parameters gone"
    )
    table.add_column("network", overflow="fold")
    table.add_column("test accuracy", justify="right")
    for label, accuracy in accuracies(summary):
        if accuracy is not None:
            table.add_row(rich.text.Text(label), f"{accuracy:.2f} %")
    return table


def accuracies(summary: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """Yields what a run measured of its network, in order; None for what it did not."""
    yield "dense", summary["dense"]["accuracy"]
    yield "cut at once (one-shot)", summary["one_shot"]["accuracy_after"]
    done = ""  # to the network since it was last cut
    for phase in summary["phases"]:
        name = phase["name"]
        kind, _, count = name.partition("_")
        cut = "the cut" if not count else f"cut {count}"
        if kind == "slice":
            after = phase["accuracy_after"]
            if done:
                yield f"{done}, before {cut}", phase["accuracy_before"]
            if done or count or after != summary["one_shot"]["accuracy_after"]:
                yield f"{done or 'pruned'}, after {cut}", after
            if phase["accuracy"] != after:
                yield "its kernels made anew", phase["accuracy"]
        elif kind == "extra":
            yield "trained on", phase["accuracy"]
        elif kind == "finetune":
            yield "fine-tuned", phase["accuracy"]
        done = _DONE.get(kind, "")


def _change(before: int, after: int) -> str:
    if before == after:
        return _short(before)
    return f"{_short(before)} → {_short(after)}"


def _short(number: int) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= 10 * size or (number >= size and size > 1e3):
            return f"{number / size:.3g}{unit}"
    return str(number)
