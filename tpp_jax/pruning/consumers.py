"""What kernels read: where in a computation, and as rows of features.

Every array of a computation may carry a :class:`Tag`, which says of each of its entries
which entry of a parameter it is, or which output of a kernel. Operations that only move
entries (transpose, reshape, slice…) move the tag as well. So a kernel is recognised at
its product whatever was done to its layout, and so is the bias that is added behind it.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tpp_jax.pruning.sums import Sums, sums_of
from tpp_jax.pruning.windows import (
    Line,
    PatchSums,
    patch_rows,
    patch_sums,
    some_of,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tag:
    """The origin of each entry of an array.

    Attributes:
      kind: Whether the entries are those of a parameter, the outputs of a kernel, or
        such outputs after each was added to or multiplied with something.
      name: Name of the parameter, or key of the consumer.
      index: Flat index into the parameter, or number of the output, int
        ``[*steps, *shape]``: in a loop that slices the parameter the first axes are
        the steps.
      loops: Numbers of these loops, from the outermost.
    """

    kind: Literal["parameter", "product", "output"]
    name: str
    index: np.ndarray
    loops: tuple[int, ...] = ()

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of steps of the loops."""
        return self.index.shape[: len(self.loops)]


class Patches(NamedTuple):
    """What a convolution reads: images, with the window along each spatial axis."""

    images: Float[Array, "examples *spatial channels"]
    lines: tuple[Line, ...]
    groups: int


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """What a product reads with a kernel.

    Attributes:
      rows: Function that returns what is read, ``[stacks, rows, features]``. There is
        one stack for each matrix of a batched product or group of a convolution.
      index: Flat index into the kernel's parameter of the weight that takes a feature
        to an output, int ``[*steps, stacks, features, outputs]``.
      made: Number of the output that each entry of the product's result is, int
        ``[*steps, *shape]``; outputs are numbered through all steps and stacks. None
        if that depends on the data.
      patches: Images that a window of several taps reads; None for other products.
      used: Whether a row is one of a stack, ``[stacks, rows]``; there is then one stack
        of rows for all. None if all are.
    """

    rows: Callable[[], Float[Array, "stacks rows features"]]
    index: Int[np.ndarray, "..."]
    made: Int[np.ndarray, "..."] | None
    patches: Patches | None = None
    used: Bool[Array, "stacks rows"] | None = None

    def sums(self, diagonal: bool) -> Sums:
        """Returns the sums of what is read.

        Args:
          diagonal: Whether only squares are summed up.
        """
        return sums_of(self.rows(), diagonal, self.used)


_UNCHANGED = frozenset(
    "convert_element_type copy copy_p reduce_precision sharding_constraint reshard "
    "mesh_cast pvary name stop_gradient".split()
)


def moved(eqn: Any, tag: Tag) -> list[Tag]:
    """Returns the tags of results; none if an operation does more than move entries.

    Args:
      eqn: Equation.
      tag: Tag of its only operand.
    """
    shape = tuple(eqn.outvars[0].aval.shape)
    index, n, params = tag.index, len(tag.loops), eqn.params
    match eqn.primitive.name:
        case name if name in _UNCHANGED:
            pass
        case "transpose":
            index = index.transpose(*range(n), *(n + i for i in params["permutation"]))
        case "reshape" if params.get("dimensions") is None:
            index = index.reshape(*tag.steps, *shape)
        case "squeeze" | "expand_dims":
            index = index.reshape(*tag.steps, *shape)
        case "broadcast_in_dim" if len(eqn.invars) == 1:
            own = [1] * len(shape)
            for axis, size in zip(
                params["broadcast_dimensions"], index.shape[n:], strict=True
            ):
                own[axis] = size
            index = np.broadcast_to(
                index.reshape(*tag.steps, *own), (*tag.steps, *shape)
            )
        case "rev":
            index = np.flip(index, tuple(n + i for i in params["dimensions"]))
        case "slice":
            starts, limits = params["start_indices"], params["limit_indices"]
            strides = params["strides"] or [1] * len(starts)
            cuts = map(slice, starts, limits, strides)
            index = index[(..., *cuts)]
        case "split":
            ends = np.cumsum(params["sizes"])[:-1]
            parts = np.split(index, ends, n + params["axis"])
            return [dataclasses.replace(tag, index=part) for part in parts]
        case _:
            return []
    return [dataclasses.replace(tag, index=index)]


def paired(product: Tag, other: Tag) -> np.ndarray | None:
    """Returns the entry of a parameter that is added to each output of a kernel.

    Args:
      product: Tag of the product.
      other: Tag of the parameter that is added to it.

    Returns:
      Flat index into the parameter for each output, int ``[outputs]``; None if two
      outputs share an entry, or an output meets several.
    """
    made, at = product.index, other.index
    if product.loops != other.loops or made.ndim != at.ndim or not made.size:
        return None
    made, at = np.broadcast_arrays(made, at)
    # Along the axes that both are repeated along, one position says it all.
    repeated = [a == b == 0 for a, b in zip(made.strides, at.strides, strict=True)]
    cuts = tuple(slice(0, 1) if same else slice(None) for same in repeated)
    made, at = made[cuts].reshape(-1), at[cuts].reshape(-1)
    found = np.full(int(made.max()) + 1, -1, at.dtype)
    found[made] = at
    if (found < 0).any() or (found[made] != at).any():
        return None
    return found if np.unique(found).size == found.size else None


def by_output(array: Array, tag: Tag) -> Float[Array, "rows outputs"] | None:
    """Returns an array with the outputs of a kernel as columns, in their order.

    Args:
      array: Array of the shape of the outputs, as they are laid out by now.
      tag: Tag of the outputs; of stacks of a loop, those of one step are taken.

    Returns:
      None if the axes of the array do not separate rows from outputs.
    """
    index = tag.index[(0,) * len(tag.loops)]
    one = index[tuple(slice(0, 1) if not s else slice(None) for s in index.strides)]
    over = []
    for axis in range(index.ndim):
        first = one.take([0], axis)
        if (one == first).all():
            over.append(axis)
            one = first
    outputs = one.reshape(-1)
    if not np.array_equal(np.sort(outputs), np.arange(outputs.size)):
        return None
    own = [axis for axis in range(index.ndim) if axis not in over]
    rows = array.transpose(*over, *own).reshape(-1, outputs.size)
    order = np.argsort(outputs)
    in_order = np.array_equal(order, np.arange(order.size))
    return rows if in_order else rows[:, order]  # a gather takes time


def read_dot(eqn: Any, operand: int, tag: Tag, other: Array) -> Reading:
    """Returns what a ``dot_general`` reads.

    Args:
      eqn: Equation.
      operand: Index of the operand that is the kernel.
      tag: Tag of the kernel.
      other: The other operand.
    """
    sums, batches = eqn.params["dimension_numbers"]
    steps, n = tag.steps, len(tag.loops)
    kernel_shape = tag.index.shape[n:]
    batch, summed = batches[operand], sums[operand]
    free = [i for i in range(len(kernel_shape)) if i not in (*batch, *summed)]
    order = (*batch, *summed, *free)
    stacks = tuple(kernel_shape[i] for i in batch)
    outputs = tuple(kernel_shape[i] for i in free)
    features = math.prod(kernel_shape[i] for i in summed)
    index = tag.index.transpose(*range(n), *(n + i for i in order))
    sizes = math.prod(stacks), features, math.prod(outputs)
    theirs, contracted = batches[1 - operand], sums[1 - operand]
    rest = [i for i in range(other.ndim) if i not in (*theirs, *contracted)]
    rows = other.transpose(*theirs, *rest, *contracted)
    rows = rows.reshape(sizes[0], math.prod(other.shape[i] for i in rest), features)
    # The result's axes: those of the batch, then the left operand's, then the right's.
    ones = [1] * len(rest)
    place = [*stacks, *ones, *outputs] if operand else [*stacks, *outputs, *ones]
    count = math.prod(steps) * sizes[0] * sizes[2]
    made = np.arange(count).reshape(*steps, *place)
    shape = eqn.outvars[0].aval.shape
    return Reading(
        lambda: rows,
        index.reshape(*steps, *sizes),
        np.broadcast_to(made, (*steps, *shape)),
    )


def read_ragged(eqn: Any, tag: Tag, rows: Array, sizes: Array) -> Reading | None:
    """Returns what a ``ragged_dot_general`` reads: rows that are sorted by expert.

    Args:
      eqn: Equation.
      tag: Tag of the kernel.
      rows: Rows of all experts.
      sizes: Number of rows of each expert.

    Returns:
      None if the product is not one of rows with the kernels of experts.
    """
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (summed, kernel_summed), batches = dims.dot_dimension_numbers
    n, groups = len(tag.loops), tuple(dims.rhs_group_dimensions)
    plain = rows.ndim == 2 and tuple(dims.lhs_ragged_dimensions) == (1 - summed[0],)
    if any(batches) or len(summed) != 1 or len(groups) != 1 or not plain:
        return None
    [free] = {0, 1, 2} - {*groups, *kernel_summed}
    order = (*groups, *kernel_summed, free)
    index = tag.index.transpose(*range(n), *(n + i for i in order))
    ends = jnp.cumsum(sizes)[:, None]
    at = jnp.arange(rows.shape[1 - summed[0]])
    used = (at < ends) & (at >= ends - sizes[:, None])
    rows = rows.transpose(1 - summed[0], summed[0])[None]
    return Reading(lambda: rows, index, None, used=used)


def read_convolution(eqn: Any, tag: Tag, images: Array) -> Reading:
    """Returns what a ``conv_general_dilated`` reads: patches with their zero padding.

    Args:
      eqn: Equation, of one batch group.
      tag: Tag of the kernel.
      images: Input of the convolution.
    """
    params = eqn.params
    dims, groups = params["dimension_numbers"], params["feature_group_count"]
    steps, n = tag.steps, len(tag.loops)
    made_axis, read_axis, *spatial = dims.rhs_spec
    order = (made_axis, *spatial, read_axis)
    index = tag.index.transpose(*range(n), *(n + i for i in order))
    outputs, *window, width = index.shape[n:]
    taps = math.prod(window)
    index = index.reshape(*steps, groups, outputs // groups, taps * width)
    index = np.swapaxes(index, -1, -2)
    out_shape = tuple(eqn.outvars[0].aval.shape)
    place = [1] * len(out_shape)
    place[dims.out_spec[1]] = outputs
    count = math.prod(steps) * outputs
    made = np.arange(count).reshape(*steps, *place)
    images, lines = _seen_by_window(eqn, images, window)
    return Reading(
        lambda: patch_rows(images, lines, groups),
        index,
        np.broadcast_to(made, (*steps, *out_shape)),
        Patches(images, lines, groups) if taps > 1 else None,
    )


def _seen_by_window(
    eqn: Any, images: Array, window: Sequence[int]
) -> tuple[Array, tuple[Line, ...]]:
    """Returns images with channels last, and the window along each of their axes."""
    params = eqn.params
    dims, shape = params["dimension_numbers"], eqn.outvars[0].aval.shape
    batch, channels, *axes = dims.lhs_spec
    images = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    images = images.transpose(batch, *axes, channels)
    between = [(0, 0, dilation - 1) for dilation in params["lhs_dilation"]]
    if any(dilation > 1 for dilation in params["lhs_dilation"]):
        around = [(0, 0, 0), *between, (0, 0, 0)]
        images = lax.pad(images, jnp.zeros((), images.dtype), around)
    lines = map(
        Line,
        images.shape[1:-1],
        window,
        [shape[axis] for axis in dims.out_spec[2:]],
        [low for low, _ in params["padding"]],
        params["window_strides"],
        params["rhs_dilation"],
    )
    return images, tuple(lines)


class Place(NamedTuple):
    """The key of a consumer, and the window with which images are read, if they are."""

    key: str
    lines: tuple[Line, ...] = ()
    groups: int = 1


@dataclasses.dataclass
class Windows:
    """Sums over the patches of convolutions, outside of loops.

    Attributes:
      centres: Means of the channels of what windows read in the first call.
      first: Whether this call is the first; a traced boolean.
      enough: Number of rows for each feature that are enough; None for all.
      sums: Where patches are read → sums over them.
    """

    centres: Mapping[Place, Any]
    first: Any
    enough: int | None
    sums: dict[Place, PatchSums]

    def note(self, place: Place, images: Any, diagonal: bool) -> None:
        """Sums up the patches of images."""

        def centre_of(mean: Any) -> Any:
            known = self.centres.get(place)
            return mean if known is None else jnp.where(self.first, mean, known)

        _, lines, groups = place
        if not diagonal and self.enough is not None:
            images = some_of(images, lines, groups, self.enough)
        self.sums[place] = patch_sums(images, lines, groups, diagonal, centre_of)


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """The weights of a parameter that are used as one kernel.

    The weight that takes feature f to output o in stack s has the flat index
    ``stacks[s] + features[f] + outputs[o]``.

    Attributes:
      leaf: Name of the parameter.
      stacks: Flat indices of the first weights of the stacks.
      features: Offsets of the features, ascending.
      outputs: Offsets of the outputs.
      positions: Axis of the parameter that channels run along → the position of each
        feature along it.
      order: Order of the features among those of a row.
    """

    leaf: str
    stacks: np.ndarray
    features: np.ndarray
    outputs: np.ndarray
    positions: Mapping[int, np.ndarray]
    order: np.ndarray


def weights_of(
    leaf: str,
    shape: tuple[int, ...],
    index: Int[np.ndarray, "..."],
    axes: Collection[int],
) -> Weights | None:
    """Returns the weights of a kernel; None if they lie in no regular pattern.

    Args:
      leaf: Name of the parameter.
      shape: Shape of the parameter.
      index: Flat index of each weight, ``[*steps, stacks, features, outputs]``.
      axes: Axes of the parameter that channels of interest run along.
    """
    flat = index.reshape(-1, *index.shape[-2:])
    if not flat.size:
        return None
    first = flat[0, 0, 0]
    stacks, features, outputs = flat[:, 0, 0], flat[0, :, 0], flat[0, 0]
    features, outputs = features - first, outputs - first
    if (stacks[:, None, None] + features[:, None] + outputs != flat).any():
        return None
    order = np.argsort(features)
    positions = {}
    for axis in axes:
        at = flat // math.prod(shape[axis + 1 :]) % shape[axis]
        one = at[0, :, 0]
        # Other axes are those of outputs, or of the stacks.
        if (at == one[:, None]).all() and (one != one[0]).any():
            positions[axis] = one[order]
    return Weights(leaf, stacks, features[order], outputs, positions, order)
