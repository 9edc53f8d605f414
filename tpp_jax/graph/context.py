"""An operation as the rule for its primitive sees it."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

from tpp_jax.graph.labels import Axes, Axis, Labels


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Context:
    """One operation of a traced model, for the rule of its primitive.

    A rule follows positions along axes. Each position of an axis has a *label*, an
    integer, and an axis is the int64 vector of its labels. A rule returns the axes of
    the results: axes of the operands, parts of them, or axes from :meth:`fresh`,
    :meth:`fixed` and :meth:`product`. It ties and fixes labels on the way.

    Attributes:
      primitive: Name of the primitive.
      params: Parameters of the operation, as in its jaxpr.
      operands: Axes of each operand; an empty list for a scalar.
      shapes: Shape of each result.
      labels: Labels of the model so far; the methods here are its ways to change.
      kind: Kind of a convolution in the unpruned model, ``"plain"``, ``"grouped"`` or
        ``"depthwise"``; None to derive it from its sizes.
      free: Axes that the operation chooses along, indexes or counts, and which need not
        be kept for that, since it is understood what becomes of the chosen places.

    Example:
      >>> def swap(ctx: Context) -> list[Axes]:  # a transpose of a matrix
      ...     [[rows, columns]] = ctx.operands
      ...     return [[columns, rows]]
      >>> labels = Labels()
      >>> matrix = [labels.fresh(2), labels.fresh(3)]
      >>> [result] = swap(Context("swap", {}, [matrix], [(3, 2)], labels))
      >>> [axis.tolist() for axis in result]
      [[2, 3, 4], [0, 1]]
    """

    primitive: str
    params: dict[str, Any]
    operands: list[Axes]
    shapes: Sequence[tuple[int, ...]]
    labels: Labels
    kind: str | None = None
    free: frozenset[int] = frozenset()

    def fresh(self, size: int) -> Axis:
        """Returns a new axis, whose positions are tied to nothing so far."""
        return self.labels.fresh(size)

    def fixed(self, size: int, reason: str) -> Axis:
        """Returns a new axis whose positions must all be kept.

        Args:
          size: Length of the axis.
          reason: Reason that messages give, a noun phrase: ``"a sorted axis"``.
        """
        return self.labels.stuck(size, reason)

    def fix(self, axis: Axis, reason: str) -> None:
        """Records that all positions of an axis must be kept.

        Args:
          axis: Axis of an operand or a result.
          reason: Reason that messages give; see :meth:`fixed`.
        """
        self.labels.fix(axis, reason)

    def fix_all(self, axes: Iterable[Axis], reason: str) -> None:
        """Fixes several axes; see :meth:`fix`."""
        for axis in axes:
            self.labels.fix(axis, reason)

    def tie(self, one: Axis, other: Axis) -> Axis:
        """Ties two axes of one length, position by position.

        Tied positions are kept or removed together.

        Returns:
          The axis that stands for both.
        """
        return self.labels.tie(one, other)

    def tie_all(self, axes: Iterable[Axis]) -> Axis:
        """Ties one or more axes of one length; see :meth:`tie`."""
        return functools.reduce(self.labels.tie, axes)

    def tie_arrays(self, arrays: Sequence[Axes]) -> Axes:
        """Ties the axes of one or more arrays of one shape; see :meth:`tie`."""
        return [self.tie_all(axes) for axes in zip(*arrays, strict=True)]

    def product(self, axes: list[Axis]) -> Axis:
        """Returns the axis that several axes are merged into, as by a reshape."""
        return self.labels.product(axes)

    def concatenate(self, axes: list[Axis]) -> Axis:
        """Returns the axis that has the positions of several axes, in order."""
        return self.labels.concatenate(axes)

    def split(self, axis: Axis, sizes: tuple[int, ...]) -> list[Axis]:
        """Returns the axes that one axis is split into, as by a reshape."""
        return self.labels.split(axis, sizes)

    def suppose(self, axis: Axis, part: int = 0) -> None:
        """Notes that a size given to the operation should follow an axis's channels.

        The operation has the size of the axis as a parameter (``new_sizes`` of a
        reshape). Whether the model computes it from its arrays is found out by a trace
        of the model with fewer channels.

        Args:
          axis: Axis of that size.
          part: Number that distinguishes several such sizes of one operation.
        """
        self.labels.suppose(axis, part)

    def sum_over(self, axis: Axis) -> None:
        """Notes that results depend on all positions of an axis, as those of a sum."""
        self.labels.reduced.append(axis[axis >= 0])

    def choose(self, axis: Axis, number: int) -> None:
        """Notes that the model chooses some positions among all along an axis.

        Args:
          axis: Axis along which it chooses.
          number: Number of positions that it chooses at once.
        """
        self.sum_over(axis)
        self.labels.chosen.append((axis, number))
