"""Which leaves of a tree are copies of which parameter, and along which axes.

A leaf is a copy if its name ends in a parameter's. Most copies have the parameter's
shape; some optimizers keep less or more of it under its name: Adafactor the means of
rows and columns, SM3 a vector for each axis, NovoGrad one number, L-BFGS the last ten.
Those of optax are known here. Whatever else has a parameter's name and another shape is
refused, since nobody knows which of its axes is which of the parameter's.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpp_jax.errors import TPPError
from tpp_jax.graph.functions import is_array
from tpp_jax.graph.groups import Groups
from tpp_jax.graph.naming import longest_known_suffix

Shape = tuple[int, ...]

# scale_by_factored_rms factors the second moment of what has two axes of this size.
_FACTORED_FROM = 128


class Copy(NamedTuple):
    """A leaf that holds something for each channel of a parameter.

    Attributes:
      parameter: dotted name of the parameter.
      axes: for each axis of the leaf, the axis of the parameter that it runs along, or
        None.
      source: the leaf whose array belongs here once the parameter is cut: the leaf
        itself, but for factored moments whose larger axis has become the smaller.
    """

    parameter: str
    axes: tuple[int | None, ...]
    source: str


class Copies:
    """Finds the copies among the leaves of one tree.

    Attributes:
      groups: of the unpruned model.
      cut: parameter → its shape after the cut, for those that lose something.
      leaves: of the tree, by name.
      shapes: leaf name → shape, of all arrays of the tree.
    """

    def __init__(
        self, groups: Groups, cut: Mapping[str, Shape], leaves: Mapping[str, Any]
    ) -> None:
        self.groups, self.cut, self.leaves = groups, cut, leaves
        self.shapes: dict[str, Shape] = {
            name: tuple(leaf.shape) for name, leaf in leaves.items() if is_array(leaf)
        }
        names = [f".{name}" for name in self.shapes]
        parts = ".base_optimizer_state.", ".projector."
        states = [{n.split(part)[0] for n in names if part in n} for part in parts]
        self._galore = states[0] & states[1]

    def parameter(self, name: str) -> str | None:
        """Returns the parameter that a leaf is named like, prunable or not."""
        return longest_known_suffix(name, self.groups.shapes)

    @property
    def numeric(self) -> list[str]:
        """Names of the arrays that are no single numbers and no raw random keys."""
        return [
            name
            for name, leaf in self.leaves.items()
            if self.shapes.get(name)
            and jnp.issubdtype(leaf.dtype, jnp.number)
            and not jnp.issubdtype(leaf.dtype, jnp.unsignedinteger)
        ]

    def is_named(self, name: str) -> bool:
        """Tells whether a leaf is named like a parameter, or is part of one such."""
        head = name.rpartition(".")[0].removesuffix(".value")
        return (self.parameter(name) or self.parameter(head)) is not None

    def find(self, name: str) -> Copy | None:
        """Returns what a leaf is a copy of, None if of nothing that is ever cut.

        Raises:
          TPPError: the leaf has a parameter's name and a shape that tells nothing.
        """
        if name not in self.shapes:
            return None
        shape, parameter = self.shapes[name], self.parameter(name)
        if parameter is None:
            return self._vector(name)
        if parameter not in self.groups.members:
            return None
        whole = self.groups.shapes[parameter]
        if self._is_projected(name, parameter):
            if parameter not in self.cut:
                return None
            raise self._refused(name, "GaLore's projection is of unpruned gradients")
        if shape == whole:
            return Copy(parameter, tuple(range(len(whole))), name)
        if all(n == 1 for n in shape):  # one number, or what stands for none
            return Copy(parameter, (None,) * len(shape), name)
        state, _, kind = name.removesuffix(parameter).rstrip(".").rpartition(".")
        if kind.endswith("_memory") and shape[1:] == whole:
            return Copy(parameter, (None, *range(len(whole))), name)
        if kind == "projector" and shape == (0, 0):
            return None
        factored = self._factored(state, kind, parameter)
        if factored is None:
            raise TPPError(
                f"cannot slice {name} of shape {shape}: the parameter {parameter} of "
                f"the planned model has shape {whole}. If it is an optimizer's, init "
                "the optimizer again for the pruned parameters"
            )
        return factored

    def _vector(self, name: str) -> Copy | None:
        """Finds the i-th of a list of vectors, one for each axis, as SM3 keeps it."""
        head, _, number = name.rpartition(".")
        parameter = self.parameter(head.removesuffix(".value"))
        if not number.isdigit() or parameter not in self.groups.members:
            return None
        whole, axis = self.groups.shapes[parameter], int(number)
        if self.shapes[name] == whole[axis : axis + 1]:
            return Copy(parameter, (axis,), name)
        return None

    def _factored(self, state: str, kind: str, parameter: str) -> Copy | None:
        """Finds the moments of rows (without the largest axis) and of columns (without
        the second largest), as optax's ``scale_by_factored_rms`` keeps them."""
        whole = self.groups.shapes[parameter]
        if kind not in ("v_row", "v_col") or len(whole) < 2:
            return None
        rows = f"{state}.v_row.{parameter}".lstrip(".")
        columns = f"{state}.v_col.{parameter}".lstrip(".")
        second, first = _largest(whole)
        there = self.shapes.get(rows), self.shapes.get(columns)
        if there != (_without(whole, first), _without(whole, second)):
            return None
        name = rows if kind == "v_row" else columns
        small = self.cut.get(parameter, whole)
        new_second, new_first = _largest(small)
        if {second, first} != {new_second, new_first}:
            raise self._refused(name, "two other axes are the largest then")
        if parameter in self.cut and not self._stays_factored(state, parameter):
            raise self._refused(name, "its axes may be too small then to be factored")
        gone = new_first if kind == "v_row" else new_second
        axes = tuple(i for i in range(len(whole)) if i != gone)
        return Copy(parameter, axes, rows if gone == first else columns)

    def _stays_factored(self, state: str, parameter: str) -> bool:
        """Tells whether the pruned parameter is surely large enough to be factored.

        The state does not hold the limit, but it tells what was above and below it.
        """
        above, below = [], [0]
        for other, shape in self.groups.shapes.items():
            row = self.shapes.get(f"{state}.v_row.{other}".lstrip("."))
            if row is not None and len(shape) > 1:
                (below if row == (1,) else above).append(shape[_largest(shape)[0]])
        small = self.cut[parameter]
        size = small[_largest(small)[0]]
        default = max(below) < _FACTORED_FROM <= min(above)
        return size >= min(above) or (default and size >= _FACTORED_FROM)

    def _is_projected(self, name: str, parameter: str) -> bool:
        """Tells whether a leaf is part of GaLore's state of a projected parameter."""
        return any(
            self.shapes.get(f"{outer}.projector.{parameter}"[1:], (0, 0)) != (0, 0)
            for outer in self._galore
            if f".{name}".startswith(f"{outer}.")
        )

    def _refused(self, name: str, why: str) -> TPPError:
        parameter = self.parameter(name)
        whole, small = self.groups.shapes[parameter], self.cut[parameter]
        return TPPError(
            f"cannot slice {name} of shape {self.shapes[name]}, which an optimizer "
            f"keeps for {parameter} of shape {whole}, to be cut to {small}: {why}. "
            "Init the optimizer again for the pruned parameters"
        )


def with_new_products(copies: Copies, leaves: dict[str, Any]) -> dict[str, Any]:
    """Computes again what optax's L-BFGS derives from the whole network.

    Its weights are inverse inner products of what it remembers, which is shorter after
    the cut (a pair that does not curve upwards any more is left out, by a weight of 0);
    and its line search keeps the last value of the loss, which is evaluated again if it
    is infinite.

    Args:
      copies: of the uncut tree.
      leaves: of the cut tree, by name.

    Returns:
      The leaves that change.
    """
    changed: dict[str, Any] = {}
    for name, leaf in leaves.items():
        state, _, kind = name.rpartition(".")
        if kind == "weights_memory" and getattr(leaf, "ndim", 0) == 1:
            steps, slopes = (
                [
                    x
                    for n, x in leaves.items()
                    if n.startswith(f"{state}.{memory}.".lstrip("."))
                ]
                for memory in ("diff_params_memory", "diff_updates_memory")
            )
            if any(
                isinstance(x, jax.ShapeDtypeStruct) for x in (leaf, *steps, *slopes)
            ):
                continue
            products = sum(
                jnp.sum(jnp.real(jnp.conj(a) * b), axis=tuple(range(1, a.ndim)))
                for a, b in zip(steps, slopes, strict=True)
            )
            usable = (leaf != 0) & (products > 0)
            weights = jnp.where(usable, 1 / jnp.where(usable, products, 1), 0)
            changed[name] = weights.astype(leaf.dtype)
        elif name.endswith(".info.decrease_error"):
            search = name.removesuffix(".info.decrease_error")
            for value in (search, f"{search}.value"):
                if value in leaves and not isinstance(
                    leaves[value], jax.ShapeDtypeStruct
                ):
                    changed[value] = jnp.full_like(leaves[value], jnp.inf)
    return changed


def _largest(shape: Shape) -> tuple[int, int]:
    """Returns the second largest and the largest axis, as optax takes them."""
    order = np.argsort(shape)
    return int(order[-2]), int(order[-1])


def _without(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], *shape[axis + 1 :])
