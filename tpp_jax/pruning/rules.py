"""How each primitive ties the positions of its operands' axes together.

Every position of every axis of every array has a *label*: a non-negative integer for a
position that could be removed, a negative one for a position that is fixed (an image
row, a class of the output, padding of a constant width…), which tells why. A primitive
gives labels to its results and ties labels that must be kept or removed together. The
channels of a network are then the connected components of all ties.

Working on single positions rather than on whole axes makes padding, concatenation and
flattening fall out without special cases: ``pad`` puts fixed labels beside the
operand's, ``reshape`` of (h, w, c) into h·w·c repeats the labels of c.

A primitive that is not listed here is never guessed: every position of its operands is
fixed, with the primitive as the reason.
"""

import functools
from collections.abc import Callable

import numpy as np

from tpp_jax.pruning.tracing import Equation

Axes = list[np.ndarray]  # the labels of one array: an int64 vector for each axis


class Labels:
    """Gives out labels and collects ties between them.

    Attributes:
      count: labels given out so far, which are ``0 … count - 1``.
      ties: pairs of equally long label vectors that are tied position by position.
      fixed: pairs (labels, reason number) of positions that must stay.
      reasons: texts; the fixed label ``-1 - i`` stands for ``reasons[i]``.
    """

    def __init__(self) -> None:
        self.count = 0
        self.ties: list[tuple[np.ndarray, np.ndarray]] = []
        self.fixed: list[tuple[np.ndarray, int]] = []
        self.reasons: list[str] = []
        self.reduced: list[np.ndarray] = []

    def fresh(self, n: int) -> np.ndarray:
        """Returns ``n`` new labels."""
        self.count += n
        return np.arange(self.count - n, self.count)

    def stuck(self, n: int, reason: str) -> np.ndarray:
        """Returns ``n`` positions that are fixed for ``reason``."""
        return np.full(n, -1 - self._reason(reason))

    def fix(self, labels: np.ndarray, reason: str) -> None:
        """Fixes positions: their channels cannot be removed."""
        labels = labels[labels >= 0]
        if labels.size:
            self.fixed.append((labels, self._reason(reason)))

    def fix_all(self, operands: list[Axes], reason: str) -> None:
        """Fixes every position of every axis of several arrays."""
        for axes in operands:
            for labels in axes:
                self.fix(labels, reason)

    def tie(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Ties two axes position by position; returns the joint labels."""
        both = (a >= 0) & (b >= 0) & (a != b)
        if both.any():
            self.ties.append((a[both], b[both]))
        for x, y in ((a, b), (b, a)):
            mixed = (x >= 0) & (y < 0)
            for code in np.unique(y[mixed]):
                self.fixed.append((x[mixed & (y == code)], -1 - int(code)))
        return np.where(a >= 0, a, b)

    def _reason(self, text: str) -> int:
        if text not in self.reasons:
            self.reasons.append(text)
        return self.reasons.index(text)


Rule = Callable[[Labels, Equation, list[Axes], list[tuple[int, ...]]], list[Axes]]
"""``rule(labels, equation, operands' axes, results' shapes) -> results' axes``."""


def apply_rule(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    """Gives labels to the results of one equation, by its rule or as unknown."""
    rule = RULES.get(eqn.primitive, _unknown)
    return rule(labels, eqn, operands, shapes)


def _unknown(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    reason = f"the operation '{eqn.primitive}' is not one whose channels are understood"
    labels.fix_all(operands, reason)
    return [[labels.stuck(n, reason) for n in shape] for shape in shapes]


def _elementwise(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    [shape, *_] = shapes
    arrays = [axes for axes in operands if len(axes) == len(shape)]
    out = []
    for i, n in enumerate(shape):
        # An axis of size one is broadcast: it does not couple with what it meets.
        met = [axes[i] for axes in arrays if len(axes[i]) == n]
        out.append(functools.reduce(labels.tie, met))
    return [out for _ in shapes]


def _convolution(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    images, kernel = operands
    dims = eqn.params["dimension_numbers"]
    batch, features, *window = dims.lhs_spec
    produced, contracted, *kernel_window = dims.rhs_spec
    for axis in window:
        labels.fix(images[axis], "a spatial axis of a convolution")
    for axis in kernel_window:
        labels.fix(kernel[axis], "the window of a convolution")
    groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
    out: Axes = [labels.stuck(n, "a spatial axis of a convolution") for n in shapes[0]]
    out_batch, out_features, *_ = dims.out_spec
    out[out_batch] = images[batch]
    if groups == 1:
        labels.tie(images[features], kernel[contracted])
        out[out_features] = kernel[produced]
    else:
        reason = f"a grouped convolution ({groups} groups)"
        for axis in (images[features], kernel[contracted], kernel[produced]):
            labels.fix(axis, reason)
        out[out_features] = labels.stuck(shapes[0][out_features], reason)
    return [out]


def _dot_general(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    left, right = operands
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    for i, j in zip(left_sum, right_sum, strict=True):
        labels.tie(left[i], right[j])
    out = [
        labels.tie(left[i], right[j])
        for i, j in zip(left_batch, right_batch, strict=True)
    ]
    gone = {*left_sum, *left_batch}
    out += [axis for i, axis in enumerate(left) if i not in gone]
    gone = {*right_sum, *right_batch}
    out += [axis for j, axis in enumerate(right) if j not in gone]
    return [out]


def _broadcast_in_dim(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    # Copies along a new axis are alike: the axis takes on whatever width it meets.
    [shape] = shapes
    placed = dict(zip(eqn.params["broadcast_dimensions"], operands[0], strict=True))
    return [
        [
            placed[i] if i in placed and len(placed[i]) == n else labels.fresh(n)
            for i, n in enumerate(shape)
        ]
    ]


def _transpose(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    return [[operands[0][i] for i in eqn.params["permutation"]]]


def _reshape(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    old, new = operands[0], shapes[0]
    out: Axes = []
    for old_axes, new_axes in _matching_axes([len(a) for a in old], new):
        block = [old[i] for i in old_axes]
        sizes = [new[j] for j in new_axes]
        prunable = [i for i, labels_ in enumerate(block) if (labels_ >= 0).any()]
        if not block:
            out.append(labels.fresh(1))
        elif len(sizes) == 1 and len(block) == 1:
            out.append(block[0])
        elif len(sizes) == 1 and len(prunable) <= 1:
            # Only one factor can shrink: each of its labels stands for a whole block.
            shape = [len(a) for a in block]
            i = prunable[0] if prunable else 0
            along = np.reshape(
                block[i], [-1 if i == j else 1 for j in range(len(shape))]
            )
            out.append(np.broadcast_to(along, shape).reshape(-1))
        else:
            what = f"{tuple(len(a) for a in block)} into {tuple(sizes)}"
            reason = f"a reshape of {what}"
            labels.fix_all([block], reason)
            out += [labels.stuck(n, reason) for n in sizes]
    return [out]


def _matching_axes(
    old: list[int], new: tuple[int, ...]
) -> list[tuple[list[int], list[int]]]:
    """Splits a reshape into the smallest runs of axes of equal size.

    Every new axis is in one run, in order; size-one axes stand alone or join a run.
    """
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while j < len(new):
        olds: list[int] = []
        news = [j]
        size, target = 1, new[j]
        j += 1
        if target == 1:
            runs.append((olds, news))  # a new axis of size one comes from nowhere
            continue
        while size != target:
            if size < target:
                if old[i] != 1:
                    olds.append(i)
                size *= old[i]
                i += 1
            else:
                news.append(j)
                target *= new[j]
                j += 1
        runs.append((olds, news))
    return runs


def _squeeze(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    gone = eqn.params["dimensions"]
    return [[a for i, a in enumerate(operands[0]) if i not in gone]]


def _reduce(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    gone = eqn.params["axes"]
    for axis in gone:
        labels.reduced.append(operands[0][axis][operands[0][axis] >= 0])
    return [[a for i, a in enumerate(operands[0]) if i not in gone]]


def _reduce_window(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    out = []
    for i, axis in enumerate(operands[0]):
        untouched = (
            eqn.params["window_dimensions"][i] == 1
            and eqn.params["window_strides"][i] == 1
            and tuple(eqn.params["padding"][i]) == (0, 0)
        )
        if untouched:
            out.append(axis)
        else:
            labels.fix(axis, "an axis that pooling runs over")
            out.append(labels.stuck(shapes[0][i], "an axis that pooling runs over"))
    return [out]


def _pad(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    out = []
    for axis, (low, high, interior) in zip(
        operands[0], eqn.params["padding_config"], strict=True
    ):
        reason = f"padding of a fixed width ({low} before, {high} after)"
        if min(low, high) < 0 or interior:
            labels.fix(axis, reason)
            size = max(len(axis) + (len(axis) - 1) * interior, 0) + low + high
            out.append(labels.stuck(size, reason))
        else:
            sides = labels.stuck(low, reason), labels.stuck(high, reason)
            out.append(np.concatenate([sides[0], axis, sides[1]]))
    return [out]


def _concatenate(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    along = eqn.params["dimension"]
    out = list(operands[0])
    for axes in operands[1:]:
        for i, axis in enumerate(axes):
            if i != along:
                out[i] = labels.tie(out[i], axis)
    out[along] = np.concatenate([axes[along] for axes in operands])
    return [out]


def _slice(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    out = []
    for axis, start, limit, stride in zip(
        operands[0], starts, limits, strides, strict=True
    ):
        part = axis[start:limit:stride]
        if len(part) != len(axis):
            labels.fix(axis, f"a slice with fixed bounds [{start}:{limit}:{stride}]")
        out.append(part)
    return [out]


def _iota(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    return [[labels.stuck(n, "positions that are counted (iota)") for n in shapes[0]]]


_ELEMENTWISE = """
    abs acos add add_any and asin atan atan2 cbrt ceil clamp convert_element_type copy
    copy_p cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow
    is_finite le log log1p logistic lt max min mul ne neg nextafter not or pow
    reduce_precision rem round rsqrt select_n sign sin sinh sqrt square stop_gradient
    sub tan tanh xor
""".split()

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "iota": _iota,
    "pad": _pad,
    "reduce_max": _reduce,
    "reduce_min": _reduce,
    "reduce_sum": _reduce,
    "reduce_window_max": _reduce_window,
    "reduce_window_sum": _reduce_window,
    "reshape": _reshape,
    "slice": _slice,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
