"""Leaves of a tree that are copies of a parameter, and the axes that they share.

A leaf is a copy if its name ends in the name of a parameter. Most copies have the
parameter's shape. Some optimizers keep other shapes under its name: Adafactor the means
of rows and columns, SM3 a vector for each axis, NovoGrad one number, L-BFGS the last
ten values. Those of optax are supported. Any other leaf with the name of a parameter
and another shape is refused, since it is unknown how their axes correspond.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tpp_jax.errors import TPPError
from tpp_jax.graph.functions import is_array
from tpp_jax.graph.groups import Groups
from tpp_jax.graph.naming import longest_known_suffix

Shape = tuple[int, ...]

# scale_by_factored_rms factors the second moment if two axes are at least this large.
_FACTORED_FROM = 128


class Copy(NamedTuple):
    """A leaf with values for the channels of a parameter.

    Attributes:
      parameter: Dotted name of the parameter.
      axes: For each axis of the leaf, the axis of the parameter that it runs along, or
        None.
      source: Leaf whose array belongs here once the parameter is cut: the leaf itself,
        except for factored moments whose larger axis has become the smaller one.
    """

    parameter: str
    axes: tuple[int | None, ...]
    source: str


class Copies:
    """Finder of the copies among the leaves of one tree.

    Attributes:
      groups: Groups of the unpruned model.
      cut: Parameter → its shape after the cut, for the parameters that are cut.
      leaves: Leaves of the tree by name.
      shapes: Leaf name → shape, for all arrays of the tree.
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
        """Returns the parameter that a leaf's name ends in, prunable or not."""
        return longest_known_suffix(name, self.groups.shapes)

    @property
    def numeric(self) -> list[str]:
        """Names of the arrays other than single numbers and raw random keys."""
        return [
            name
            for name, leaf in self.leaves.items()
            if self.shapes.get(name)
            and jnp.issubdtype(leaf.dtype, jnp.number)
            and not jnp.issubdtype(leaf.dtype, jnp.unsignedinteger)
        ]

    def is_named(self, name: str) -> bool:
        """Reports whether the name of a leaf or its parent ends in a parameter's."""
        head = name.rpartition(".")[0].removesuffix(".value")
        return (self.parameter(name) or self.parameter(head)) is not None

    def find(self, name: str) -> Copy | None:
        """Returns the copy that a leaf is; None if it is of no prunable parameter.

        Raises:
          TPPError: The leaf has the name of a parameter and an unknown shape.
        """
        if name not in self.shapes:
            return None
        shape, parameter = self.shapes[name], self.parameter(name)
        if parameter is None:
            return self._vector(name)
        if parameter not in self.groups.members:
            return None
        unpruned = self.groups.shapes[parameter]
        if self._is_projected(name, parameter):
            if parameter not in self.cut:
                return None
            raise self._refused(
                name, parameter, "GaLore's projection is of unpruned gradients"
            )
        if shape == unpruned:
            return Copy(parameter, tuple(range(len(unpruned))), name)
        if all(n == 1 for n in shape):  # one number, or a placeholder
            return Copy(parameter, (None,) * len(shape), name)
        state, _, field = name.removesuffix(parameter).rstrip(".").rpartition(".")
        if field.endswith("_memory") and shape[1:] == unpruned:
            return Copy(parameter, (None, *range(len(unpruned))), name)
        if field == "projector" and shape == (0, 0):
            return None
        factored = self._factored(state, field, parameter)
        if factored is None:
            raise TPPError(
                f"cannot slice {name} of shape {shape}: the parameter {parameter} of "
                f"the planned model has shape {unpruned}. If it is part of an "
                "optimizer's state, initialise the optimizer again with the pruned "
                "parameters"
            )
        return factored

    def _vector(self, name: str) -> Copy | None:
        """Returns the copy that is one of a vector per axis, as SM3 keeps them."""
        head, _, number = name.rpartition(".")
        parameter = self.parameter(head.removesuffix(".value"))
        if not number.isdigit() or parameter not in self.groups.members:
            return None
        unpruned, axis = self.groups.shapes[parameter], int(number)
        if self.shapes[name] == unpruned[axis : axis + 1]:
            return Copy(parameter, (axis,), name)
        return None

    def _factored(self, state: str, field: str, parameter: str) -> Copy | None:
        """Returns the copy that is a moment of rows or columns.

        Rows lack the largest axis, columns the second largest, as in optax's
        ``scale_by_factored_rms``.
        """
        unpruned = self.groups.shapes[parameter]
        if field not in ("v_row", "v_col") or len(unpruned) < 2:
            return None
        rows = f"{state}.v_row.{parameter}".lstrip(".")
        columns = f"{state}.v_col.{parameter}".lstrip(".")
        second, first = _largest(unpruned)
        found = self.shapes.get(rows), self.shapes.get(columns)
        if found != (_without(unpruned, first), _without(unpruned, second)):
            return None
        name = rows if field == "v_row" else columns
        small = self.cut.get(parameter, unpruned)
        new_second, new_first = _largest(small)
        if {second, first} != {new_second, new_first}:
            raise self._refused(
                name, parameter, "its two largest axes change with the cut"
            )
        if parameter in self.cut and not self._remains_factored(state, parameter):
            raise self._refused(
                name, parameter, "its axes may become too small to be factored"
            )
        missing = new_first if field == "v_row" else new_second
        axes = tuple(i for i in range(len(unpruned)) if i != missing)
        return Copy(parameter, axes, rows if missing == first else columns)

    def _remains_factored(self, state: str, parameter: str) -> bool:
        """Reports whether the pruned parameter is surely large enough to be factored.

        The state does not contain the threshold, but the parameters that are factored
        and those that are not bound it from above and below.
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
        """Reports whether a leaf is in GaLore's state of a projected parameter."""
        return any(
            self.shapes.get(f"{outer}.projector.{parameter}"[1:], (0, 0)) != (0, 0)
            for outer in self._galore
            if f".{name}".startswith(f"{outer}.")
        )

    def _refused(self, name: str, parameter: str, why: str) -> TPPError:
        unpruned, small = self.groups.shapes[parameter], self.cut[parameter]
        return TPPError(
            f"cannot slice {name} of shape {self.shapes[name]}, which an optimizer "
            f"keeps for {parameter} of shape {unpruned}, to be cut to {small}: {why}. "
            "Initialise the optimizer again with the pruned parameters"
        )


def with_new_products(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Updates the leaves of optax's L-BFGS that depend on the unpruned network.

    Its weights are inverse inner products of vectors that the cut shortens; a pair that
    no longer has positive curvature is ignored, by a weight of 0. Its line search keeps
    the last value of the loss, which it evaluates again if that is infinite.

    Args:
      leaves: Leaves of the cut tree by name.

    Returns:
      The leaves that change, by name.
    """
    changed: dict[str, Any] = {}
    for name, leaf in leaves.items():
        state, _, field = name.rpartition(".")
        if field == "weights_memory" and getattr(leaf, "ndim", 0) == 1:
            weights = _memory_weights(f"{state}.".lstrip("."), leaf, leaves)
            if weights is not None:
                changed[name] = weights
        elif name.endswith(".info.decrease_error"):
            search = name.removesuffix(".info.decrease_error")
            for value in (search, f"{search}.value"):
                if value in leaves and not _is_abstract(leaves[value]):
                    changed[value] = jnp.full_like(leaves[value], jnp.inf)
    return changed


def _memory_weights(
    prefix: str, weights: Any, leaves: Mapping[str, Any]
) -> Float[Array, " memory"] | None:
    """Returns the weights of the pairs that L-BFGS remembers; None if abstract."""
    steps, slopes = (
        [leaf for name, leaf in leaves.items() if name.startswith(f"{prefix}{memory}.")]
        for memory in ("diff_params_memory", "diff_updates_memory")
    )
    if any(_is_abstract(leaf) for leaf in (weights, *steps, *slopes)):
        return None
    products = sum(
        jnp.sum(jnp.real(jnp.conj(a) * b), axis=tuple(range(1, a.ndim)))
        for a, b in zip(steps, slopes, strict=True)
    )
    usable = (weights != 0) & (products > 0)
    inverse = jnp.where(usable, 1 / jnp.where(usable, products, 1), 0)
    return inverse.astype(weights.dtype)


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _largest(shape: Shape) -> tuple[int, int]:
    """Returns the second largest and the largest axis, in the order of optax."""
    order = np.argsort(shape)
    return int(order[-2]), int(order[-1])


def _without(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], *shape[axis + 1 :])
