"""Labels of axis positions: which are tied, which are fixed, which are pairs of others.

Every position of every axis of every array has a *label*: a non-negative integer for a
position that could be removed, a negative one for a fixed position, with the reason as
its number. Three facts about labels are collected while the rules go through a
computation:

- *ties*: two labels stand for positions that are kept or removed together;
- *fixes*: a label's position must be kept;
- *definitions*: a label stands for a pair (or more) of others: position 7 of an axis of
  12 that is reshaped to (3, 4) is (1, 3). It is removed if any of its parts is.

:func:`solve` turns them into *channels*: the classes of tied labels that are not
defined by others.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

Axis = np.ndarray
"""Labels of the positions along one axis, int64 ``[n]``."""

Axes = list[Axis]
"""Labels of one array, a vector for each axis."""


class NotUnderstood(str):
    """A reason to keep positions: it is not known what happens to them."""


class Labels:
    """Makes new labels and collects what is found out about them.

    Attributes:
      count: Number of labels so far, which are ``0 … count - 1``.
      ties: Pairs of equally long label vectors, tied position by position.
      blocks: Vectors from :meth:`fresh`, in order. Most ties are between two of them.
      root: For each block, the number of a block, not larger than its own, that all of
        it is tied to; its own number if there is none.
      fixed: Pairs (labels, number of a reason) of positions that must be kept.
      definitions: Pairs (labels ``[n]``, their parts ``[n, k]``).
      pieces: Sizes of the pieces that an axis was concatenated from, by the axis.
      supposed: Axes whose size is hard-coded in an operation's parameters, each with a
        number that distinguishes several sizes of one operation, and the operation's
        source. That the size follows the channels is a supposition, to be tried.
      reduced: Labels of axes that a reduction runs over.
      noise: Axes of random numbers.
      chosen: Axes along which the model chooses places, each with their number.
      reasons: Reasons with the sources of the operations that gave them; the fixed
        label ``-1 - i`` stands for ``reasons[i]``.
      source: Source of the operation whose rule is being applied.
    """

    def __init__(self) -> None:
        self.count = 0
        self.ties: list[tuple[np.ndarray, np.ndarray]] = []
        self.blocks: list[np.ndarray] = []
        self.root: list[int] = []
        self._block: dict[int, int] = {}  # by id: the blocks are kept
        self._signs: dict[int, tuple[np.ndarray, int]] = {}  # by id, with what has it
        self.fixed: list[tuple[np.ndarray, int]] = []
        self.definitions: list[tuple[np.ndarray, np.ndarray]] = []
        self.pieces: dict[bytes, list[int]] = {}
        self.supposed: list[tuple[np.ndarray, int, Any]] = []
        self.reduced: list[np.ndarray] = []
        self.noise: list[np.ndarray] = []
        self.chosen: list[tuple[np.ndarray, int]] = []
        self.reasons: list[tuple[str, Any]] = []
        self.source: Any = None
        self._numbers: dict[tuple[str, int], int] = {}

    def fresh(self, n: int) -> np.ndarray:
        """Returns ``n`` new labels."""
        self.count += n
        block = np.arange(self.count - n, self.count)
        self._block[id(block)] = len(self.blocks)
        self.root.append(len(self.blocks))
        self.blocks.append(block)
        return block

    def stuck(self, n: int, reason: str) -> np.ndarray:
        """Returns labels of ``n`` positions that are fixed for a reason."""
        axis = np.full(n, -1 - self._reason(reason))
        self._signs[id(axis)] = axis, -1
        return axis

    def fix(self, labels: np.ndarray, reason: str) -> None:
        """Fixes positions: their channels cannot be removed."""
        self._fix(labels, self._reason(reason))

    def suppose(self, labels: np.ndarray, part: int = 0) -> None:
        """Notes that the size of an axis is supposed to follow its channels.

        Args:
          labels: Labels of the axis.
          part: Number that distinguishes several such sizes of one operation.
        """
        if (labels >= 0).any():
            self.supposed.append((labels, part, self.source))

    def tie(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Ties two axes position by position; returns the joint labels."""
        if a is b:
            return a
        block, other = self._block.get(id(a)), self._block.get(id(b))
        if block is not None and other is not None:
            block, other = self._root_of(block), self._root_of(other)
            self.root[max(block, other)] = min(block, other)
            return a
        signs = self._sign(a), self._sign(b)
        if signs == (1, 1):
            self.ties.append((a, b))
            return a
        if signs == (-1, -1):
            return b
        both = (a >= 0) & (b >= 0) & (a != b)
        if both.any():
            self.ties.append((a[both], b[both]))
        for x, y in ((a, b), (b, a)):
            mixed = (x >= 0) & (y < 0)
            for code in np.unique(y[mixed]):
                self._fix(x[mixed & (y == code)], -1 - int(code))
        return np.where(a >= 0, a, b)

    def product(self, axes: list[np.ndarray]) -> np.ndarray:
        """Returns the labels of an axis that runs over all tuples of positions.

        Where at most one of the axes can shrink, that axis's labels are repeated;
        otherwise new labels are defined as tuples.
        """
        if len(axes) == 1:
            return axes[0]
        shape = [len(axis) for axis in axes]
        grids = [
            np.broadcast_to(axis.reshape(_along(i, shape)), shape).reshape(-1)
            for i, axis in enumerate(axes)
        ]
        prunable = [grid for grid in grids if (grid >= 0).any()]
        if len(prunable) <= 1:
            return (prunable or grids)[0]
        whole = self.fresh(len(grids[0]))
        self.definitions.append((whole, np.stack(prunable, axis=1)))
        return whole

    def concatenate(self, axes: list[np.ndarray]) -> np.ndarray:
        """Returns the labels of several axes, one after the other, in one axis."""
        whole = np.concatenate(axes)
        self.pieces[whole.tobytes()] = [len(axis) for axis in axes]
        return whole

    def has(self, labels: np.ndarray) -> bool:
        """Reports whether all of some labels are labels made here."""
        lowest, highest = -len(self.reasons), self.count - 1
        return labels.size == 0 or bool(
            lowest <= labels.min() and labels.max() <= highest
        )

    def split(self, axis: np.ndarray, sizes: tuple[int, ...]) -> list[np.ndarray]:
        """Returns the labels of the axes that one axis is split into."""
        if (axis < 0).all():
            return [np.full(n, axis[0]) for n in sizes]
        grid = axis.reshape(sizes)
        varying = [i for i in range(len(sizes)) if np.ptp(grid, axis=i).any()]
        if len(varying) == 1:
            # The same channels are repeated, as by an earlier reshape that merged them
            # with another axis.
            [along] = varying
            own = np.moveaxis(grid, along, 0).reshape(sizes[along], -1)[:, 0]
            repeat = "an axis along which channels are repeated"
            return [
                own if i == along else self.stuck(n, repeat)
                for i, n in enumerate(sizes)
            ]
        if (axis < 0).any():
            reason = NotUnderstood("a reshape that splits an axis that is partly fixed")
            self.fix(axis, reason)
            return [self.stuck(n, reason) for n in sizes]
        pieces = self.pieces.get(axis.tobytes(), [])
        if len(pieces) == sizes[0] and len(set(pieces)) == 1:
            # A concatenation that is reshaped into its pieces is a stack of them.
            piece = functools.reduce(self.tie, np.split(axis, sizes[0]))
            stack = self.stuck(sizes[0], "an axis that arrays are stacked along")
            rest = self.split(piece, sizes[1:]) if len(sizes) > 2 else [piece]
            return [stack, *rest]
        parts = [self.fresh(n) for n in sizes]
        grids = [
            np.broadcast_to(part.reshape(_along(i, sizes)), sizes).reshape(-1)
            for i, part in enumerate(parts)
        ]
        self.definitions.append((axis, np.stack(grids, axis=1)))
        return parts

    def _sign(self, labels: np.ndarray) -> int:
        """Returns 1 if all positions are free, -1 if all are fixed, 0 otherwise."""
        if id(labels) in self._block:
            return 1
        found = self._signs.get(id(labels))
        if found is None:
            free = labels >= 0
            sign = 1 if free.all() else 0 if free.any() else -1
            found = self._signs[id(labels)] = labels, sign
        return found[1]

    def _root_of(self, block: int) -> int:
        root = self.root
        while root[block] != block:
            root[block] = block = root[root[block]]
        return block

    def _fix(self, labels: np.ndarray, reason: int) -> None:
        labels = labels[labels >= 0]
        if labels.size:
            self.fixed.append((labels, reason))

    def _reason(self, text: str) -> int:
        key = text, id(self.source)  # the sources are kept, so that no id comes twice
        if key not in self._numbers:
            self._numbers[key] = len(self.reasons)
            self.reasons.append((text, self.source))
        return self._numbers[key]


class Channels(NamedTuple):
    """The solution: every label expressed in channels.

    Attributes:
      component: Class of tied labels that each label is in, int64 ``[labels]``.
      stuck: Number of the reason why a component must be kept, or -1, int64
        ``[components]``.
      reduced: Whether a reduction runs over it, bool ``[components]``.
      chosen: Number of positions like it that the model chooses at once, int64
        ``[components]``; 0 if it does not choose among them.
      parts: Components that define it, -1 in unused entries, int64 ``[components, k]``.
      defined: Whether it has parts, bool ``[components]``.
    """

    component: np.ndarray
    stuck: np.ndarray
    reduced: np.ndarray
    chosen: np.ndarray
    parts: np.ndarray
    defined: np.ndarray

    def of(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the channels that run through an axis.

        Args:
          labels: Labels of its positions.

        Returns:
          Two equally long vectors ``(positions, channels)``. A channel may run through
          several positions, and a position may have several channels.
        """
        positions = np.flatnonzero(labels >= 0)
        channels = self.component[labels[positions]]
        while (defined := self.defined[channels]).any():
            parts = self.parts[channels]
            more_positions, which = np.nonzero((parts >= 0) & defined[:, None])
            positions = np.concatenate([positions[~defined], positions[more_positions]])
            channels = np.concatenate(
                [channels[~defined], parts[more_positions, which]]
            )
        return positions, channels


def solve(labels: Labels) -> Channels:
    """Joins ties, and makes all definitions of a label agree.

    Two definitions of one label with the same number of parts are tied part by part:
    that may tie more than is needed, never less. If the numbers differ, the parts are
    fixed.
    """
    while True:
        component = _components(labels)
        stuck = np.full(component.max(initial=-1) + 1, -1)
        for fixed, reason in reversed(labels.fixed):
            stuck[component[fixed]] = reason
        before = len(labels.ties), len(labels.fixed)
        parts = _agree(labels, component, stuck)
        _fix_circles(labels, component, stuck, parts)
        if (len(labels.ties), len(labels.fixed)) == before:
            break
    _undo_fixed(parts, stuck)
    reduced = np.zeros(len(stuck), bool)
    for summed in labels.reduced:
        reduced[component[summed[summed >= 0]]] = True
    while True:  # a sum over pairs is a sum over all their parts
        through = parts[reduced]
        more = np.unique(through[through >= 0])
        if reduced[more].all():
            break
        reduced[more] = True
    chosen = _chosen(labels, component, parts)
    defined = np.asarray((parts >= 0).any(axis=1))
    return Channels(component, stuck, reduced, chosen, parts, defined)


def _chosen(labels: Labels, component: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Returns how many positions like each component's are chosen at once."""
    chosen = np.zeros(len(parts), np.int64)
    for axis, number in labels.chosen:
        of = np.unique(component[axis[axis >= 0]])
        while of.size:  # a choice among pairs is one among all their parts
            chosen[of] = np.maximum(chosen[of], number)
            of = np.unique(parts[of])
            of = of[of >= 0]
    return chosen


def _fix_circles(
    labels: Labels, component: np.ndarray, stuck: np.ndarray, parts: np.ndarray
) -> None:
    """Fixes labels that are, directly or not, parts of themselves.

    This happens where an axis of heads and dimensions is added to one of the two.
    """
    open_ = (parts >= 0).any(axis=1) & (stuck < 0)
    if not open_.any():
        return
    while True:
        # A label is in no circle if none of its parts may be in one.
        still = open_ & ((parts >= 0) & open_[parts]).any(axis=1)
        if (still == open_).all():
            break
        open_ = still
    if open_.any():
        reason = NotUnderstood("reshapes by which an axis is a part of itself")
        labels.fix(np.flatnonzero(open_[component]), reason)


def _undo_fixed(parts: np.ndarray, stuck: np.ndarray) -> None:
    """Fixes labels whose parts are all fixed, and drops their definitions."""
    while True:
        of_fixed = ((parts < 0) | (stuck[parts] >= 0)).all(axis=1)
        of_fixed &= (parts >= 0).any(axis=1)
        if not of_fixed.any():
            return
        first = parts[of_fixed, (parts[of_fixed] >= 0).argmax(axis=1)]
        stuck[of_fixed] = stuck[first]
        parts[of_fixed] = -1


def _components(labels: Labels) -> np.ndarray:
    """Returns the class of each label, int64 ``[labels]``.

    Classes are numbered in the order of their first labels.
    """
    sizes = np.array([len(block) for block in labels.blocks], np.int64)
    root = np.array([labels._root_of(i) for i in range(len(sizes))], np.int64)
    own = root == np.arange(len(root))
    # A block that is tied to another has the classes of its root, in the same order.
    first = np.cumsum(np.where(own, sizes, 0)) - np.where(own, sizes, 0)
    start = np.cumsum(sizes) - sizes
    component = np.arange(labels.count) + np.repeat(first[root] - start, sizes)
    if not labels.ties:
        return component
    from scipy.sparse import coo_array  # late: slow to import
    from scipy.sparse.csgraph import connected_components

    a, b = (component[np.concatenate(side)] for side in zip(*labels.ties, strict=True))
    n = int(sizes[own].sum())
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(n, n))
    found = connected_components(graph, directed=False)[1].astype(np.int64)
    return found[component]


def _agree(labels: Labels, component: np.ndarray, stuck: np.ndarray) -> np.ndarray:
    """Ties and fixes what the definitions imply; returns each component's parts."""
    width = max((parts.shape[1] for _, parts in labels.definitions), default=1)
    found = np.full((len(stuck), width), -1)
    arity = np.zeros(len(stuck), np.int64)
    first = _representatives(component)
    for whole, parts in list(labels.definitions):
        k = parts.shape[1]
        own = component[whole]
        for code in np.unique(stuck[own][stuck[own] >= 0]):
            chosen = parts[stuck[own] == code].reshape(-1)
            loose = chosen[(chosen >= 0) & (stuck[component[chosen]] < 0)]
            labels._fix(loose, int(code))
        other = (arity[own] > 0) & (arity[own] != k)
        if other.any():
            reason = NotUnderstood("reshapes that split one axis in different ways")
            rest = np.concatenate([parts[other].reshape(-1), whole[other]])
            loose = rest[rest >= 0]
            labels.fix(loose[stuck[component[loose]] < 0], reason)
        arity[own] = k
        for i in range(k):
            here = np.where(parts[:, i] >= 0, component[parts[:, i]], -1)
            new = found[own, i] < 0
            found[own[new], i] = here[new]
            # One definition per component is kept; every other is tied to it.
            there = found[own, i]
            differ = (here >= 0) & (there >= 0) & (here != there)
            if differ.any():
                labels.ties.append((first[here[differ]], first[there[differ]]))
    return found


def _representatives(component: np.ndarray) -> np.ndarray:
    """Returns one label of each component."""
    first = np.zeros(component.max(initial=-1) + 1, np.int64)
    first[component[::-1]] = np.arange(len(component))[::-1]
    return first


def _along(axis: int, shape: tuple[int, ...] | list[int]) -> list[int]:
    return [-1 if i == axis else 1 for i in range(len(shape))]
