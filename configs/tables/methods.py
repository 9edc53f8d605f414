"""Rows that several tables share: the method and its rivals. Not a config itself."""

from typing import Any

import ml_collections

Row = tuple[str, dict[str, Any]]


def rivals(base: ml_collections.ConfigDict) -> tuple[Row, ...]:
    """Returns the methods of the paper's Table 1 and more, as changes of a base."""
    dense = {name: base.pretrain[name] for name in base.pretrain}
    oneshot = {"prune": {"method": "oneshot"}}
    return (
        # The small network from random weights, trained like the dense network.
        ("Scratch", {"prune": {"method": "scratch"}, "finetune": dense}),
        ("L1", oneshot),
        ("L1 + OrthP", {"prune": {"method": "oneshot", "reinitialize": "orthp"}}),
        ("L1 + KernOrth", {**oneshot, "finetune": {"orthogonality": "kernel"}}),
        ("L1 + OrthConv", {**oneshot, "finetune": {"orthogonality": "convolution"}}),
        ("KernOrth + L1", {**oneshot, "pretrain": {"orthogonality": "kernel"}}),
        ("OrthConv + L1", {**oneshot, "pretrain": {"orthogonality": "convolution"}}),
        # Extra steps, as many as TPP's regularized phases and at the same rate: a
        # row without published results.
        ("L1, equal epochs", {"prune": {"method": "extra"}}),
        ("GReg-1", GREG_1),
        ("GReg-2", {"prune": {"method": "greg2"}}),
        ("Group lasso", {"prune": {"method": "group_lasso"}}),
        ("Iterative L1", {"prune": {"method": "iterative"}}),
        ("TPP", {}),
    )


def recovery() -> tuple[Row, ...]:
    """Returns rows of cuts that keep the function, next to those that do not.

    The first rows train the pruned network by fine-tuning alone; the others train for
    as many steps more as TPP regularizes and stabilizes.
    """
    distilled = {"finetune": {"distillation": {"weight": 0.5}}}
    compensated = {"prune": {"method": "compensated"}}
    wanda, obs = (
        {"prune": {"method": "compensated", "criterion": criterion}}
        for criterion in ("wanda", "obs")
    )
    repaired = {"method": "extra", "compensate": True, "recalibrate": True}
    return (
        ("L1", {"prune": {"method": "oneshot"}}),
        ("L1, distilled", {"prune": {"method": "oneshot"}, **distilled}),
        ("Compensated", compensated),
        ("Compensated, distilled", {**compensated, **distilled}),
        ("Compensated, wanda", wanda),
        ("Compensated, obs", obs),
        ("L1, equal epochs", {"prune": {"method": "extra"}}),
        ("Compensated, equal epochs", {"prune": repaired}),
        ("TPP", {}),
        ("TPP, distilled", distilled),
        ("Compensated TPP", {"prune": {"method": "compensated_tpp"}}),
    )


GREG_1 = {"prune": {"gram_weight": 0.0, "bn": False}}
"""The same growing strength as an L2 penalty alone."""


def published(
    row: str,
    columns: tuple[str, ...],
    means: tuple[float | None, ...],
    spreads: tuple[float, ...] | None = None,
) -> tuple[tuple[str, str, str, float, float | None], ...]:
    """Returns published best accuracies of a row, as a table wants them."""
    found = zip(columns, means, spreads or (None,) * len(means), strict=True)
    return tuple(
        (row, column, "best_accuracy", mean, spread)
        for column, mean, spread in found
        if mean is not None
    )


def ratios(pattern: str, *values: str) -> tuple[Row, ...]:
    """Returns columns that prune by a pattern at several ratios."""
    return tuple((v, {"prune": {"ratios": f"{pattern}:{v}"}}) for v in values)
