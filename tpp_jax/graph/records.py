"""A model's groups of channels as data: members, groups, and all groups of a model.

They are compared, hashed, copied and pickled by content, so that a plan can be sent to
another process and equal plans share one compiled program.
"""

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from tpp_jax.errors import TPPError
from tpp_jax.graph.fields import FieldSize
from tpp_jax.graph.tracing import Trace

Slot = tuple[str, int]
"""An axis of a parameter leaf: the name of the leaf and the index of the axis."""


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One axis of one parameter array that a group's channels run through.

    Attributes:
      leaf: Dotted name of the array, ``layer1.0.conv1.kernel``.
      axis: Index of the axis.
      positions: Positions along the axis: channel c occupies ``positions[c]`` (m > 1
        where a flattened feature map enters a dense layer).
      role: ``"produced"`` for the output axis of a kernel, ``"contracted"`` for its
        input axis, ``"along"`` for arrays that are applied channel by channel (a bias,
        a norm's scale, bias, mean and variance), ``"depthwise"`` for the kernel of a
        depthwise convolution, which is applied channel by channel too.
      order: Index of the layer in order of execution: the kernel's own or, for a norm,
        that of the last layer before it.
      batch: Axes of a kernel along which separate kernels are stacked: the axis that a
        loop over layers runs along, or the experts of a batched product.
      filters: Axes of a kernel that together index its filters: heads and the
        dimensions of a head in a kernel ``[width, heads, size]``. Like ``batch``, empty
        unless the role is ``"produced"``. The axis itself is in one of the two, except
        for the axis of words of an embedding table.
      steps: Axis of the array that a loop over layers goes through, if each layer may
        keep channels of its own; None otherwise.
    """

    leaf: str
    axis: int
    positions: Int[np.ndarray, "size m"]
    role: str
    order: int
    batch: tuple[int, ...] = ()
    filters: tuple[int, ...] = ()
    steps: int | None = None

    @property
    def _content(self) -> tuple[Any, ...]:
        where = self.positions.shape, self.positions.astype(np.int64).tobytes()
        rest = self.role, self.order, self.batch, self.filters, self.steps
        return (self.leaf, self.axis, *where, *rest)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Member):
            return NotImplemented
        return self is other or self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)


@dataclasses.dataclass(frozen=True)
class Group:
    """Channels that occupy the same arrays.

    Attributes:
      name: Name of the first layer that produces the channels, ``layer1.0.conv1``.
      size: Number of channels.
      producers: Names of all layers that produce the channels, in order of execution.
      members: Axes of all parameters that the channels run through.
      inner: Whether one of the ``outer`` groups can be pruned and has several channels:
        a ratio for the layer then applies to that group.
      reason: Reason why the channels cannot be pruned; None if they can.
      reduced: Whether a sum or maximum that is not part of a layer runs over the
        channels (in a layer norm, a softmax, or a product of queries and keys, which is
        scaled by the number of channels). Setting such channels to zero is then not
        equivalent to removing them, unless other weights are rescaled
        (:func:`tpp_jax.prune`).
      outer: Names of the groups that run through the same filters at a coarser grain:
        for instance, their channels are the heads of an attention, and those of this
        group the dimensions of each head. This group is then named ``layer#2``.
      steps: Number of layers that a loop runs through (``jax.lax.scan``), each of which
        may keep channels of its own, the same number in all; None outside of loops, and
        where all of them keep the same.
      chosen: Number of the channels that the model chooses for each example: of the
        experts of a mixture, those that a token is sent to. At least as many are kept,
        and such a group is only pruned if a ratio names it. 0 for all other groups.
    """

    name: str
    size: int
    producers: tuple[str, ...]
    members: tuple[Member, ...]
    inner: bool
    reason: str | None
    reduced: bool
    outer: tuple[str, ...] = ()
    steps: int | None = None
    chosen: int = 0


def with_inner(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Sets ``inner`` of all groups, from which of them can be pruned."""
    prunable = {g.name for g in groups if g.reason is None and g.size > 1}
    inner = [not prunable.isdisjoint(g.outer) for g in groups]
    return tuple(
        g if g.inner == own else dataclasses.replace(g, inner=own)
        for g, own in zip(groups, inner, strict=True)
    )


# Attributes of Groups that are compared and pickled, and those that cannot be, since
# they contain functions and tracebacks: a copy shares them with the original.
_CONTENT = (
    *("all", "layers", "shapes", "inputs", "kwargs"),
    *("joined", "sizes", "trainable"),
)
_SHARED = ("_traced", "reading", "source")


class Groups:
    """The groups of a model, in order of execution; compared by content.

    Attributes:
      all: All groups, prunable or not.
      layers: Names of the convolution and dense layers in order of execution.
      shapes: Parameter leaf name → shape of the unpruned array.
      inputs: Abstract example inputs, to trace a sliced model.
      kwargs: Keyword arguments, like the inputs.
      joined: Pairs of axes whose channels are pruned together because the model does
        not run otherwise.
      trainable: Names of the leaves that are trained; see :class:`Trace`.
      sizes: Attributes of the model's modules that follow the channels.
      reading: Labels that the groups were read off (:class:`comparing.Reading`); None
        after unpickling.
      source: Model to trace again (:class:`tpp_jax.pruning.source.Source`); None after
        unpickling.
    """

    def __init__(
        self,
        groups: tuple[Group, ...],
        layers: tuple[str, ...],
        shapes: dict[str, tuple[int, ...]],
        inputs: tuple[Any, ...],
        traced: Trace,
        joined: tuple[tuple[Slot, Slot], ...] = (),
        reading: Any = None,
    ) -> None:
        self.all = groups
        self.layers = layers
        self.shapes = shapes
        self.inputs = inputs
        self._traced: Trace | None = traced
        self.joined = joined
        self.trainable: frozenset[str] = traced.trainable
        self.kwargs: dict[str, Any] = {}
        self.sizes: tuple[FieldSize, ...] = ()
        self.reading = reading
        self.source: Any = None

    def replace(self, **changes: Any) -> "Groups":
        """Returns a copy with some attributes replaced."""
        new = object.__new__(Groups)
        own = {name: getattr(self, name) for name in (*_CONTENT, *_SHARED)}
        vars(new).update(own, **changes)
        return new

    def with_verdict(
        self,
        wrong: Mapping[int, str],
        sizes: tuple[FieldSize, ...],
        source: Any,
        scaled: Collection[int] = (),
    ) -> "Groups":
        """Returns the groups after they were tried.

        Args:
          wrong: Index of a group → reason why it cannot be pruned.
          sizes: Attributes that follow the channels.
          source: Model.
          scaled: Indices of groups whose number of channels is part of the computation.
        """
        groups = tuple(
            dataclasses.replace(
                group,
                reason=wrong.get(i, group.reason),
                reduced=group.reduced or i in scaled,
            )
            for i, group in enumerate(self.all)
        )
        return self.replace(all=with_inner(groups), sizes=sizes, source=source)

    def checked(self, source: Any, kept: Mapping[str, Any]) -> bool:
        """Reports whether :meth:`note_checked` was called with the same arguments."""
        return (id(source), _key(kept)) in self._checked

    def note_checked(self, source: Any, kept: Mapping[str, Any]) -> None:
        """Records that a plan was tried on a model and that the model works with it."""
        if source is self.source:
            self._checked.add((id(source), _key(kept)))

    @functools.cached_property
    def _checked(self) -> set[tuple[int, bytes]]:
        return set()

    @property
    def traced(self) -> Trace:
        """The computation that the groups were read off.

        Raises:
          TPPError: The groups were unpickled; a pickle does not contain it.
        """
        if self._traced is None:
            raise TPPError(
                "these groups were pickled, and a pickle does not hold the traced "
                "computation that this needs: find them again with "
                "tpp_jax.channel_groups"
            )
        return self._traced

    def __iter__(self) -> Iterator[Group]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, name: str | int) -> Group:
        return self.all[name] if isinstance(name, int) else self._by_name[name]

    def __repr__(self) -> str:
        prunable = sum(group.reason is None for group in self)
        return f"Groups({len(self)} groups, {prunable} prunable)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Groups):
            return NotImplemented
        if self is other:
            return True
        return self._digest == other._digest and _same_inputs(
            (self.inputs, self.kwargs), (other.inputs, other.kwargs)
        )

    def __hash__(self) -> int:
        return hash(self._digest)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _CONTENT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(dict.fromkeys(_SHARED), **state)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Groups":
        new = object.__new__(Groups)
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        vars(new).update({name: getattr(self, name) for name in _SHARED})
        return new

    def __copy__(self) -> "Groups":
        new = object.__new__(Groups)
        vars(new).update(vars(self))
        return new

    @functools.cached_property
    def _digest(self) -> bytes:
        """Hash of all content but the inputs, kept since plans are static in jit."""
        content = hashlib.sha256()
        for group in self.all:
            plain = dataclasses.replace(group, members=())
            content.update(repr(plain).encode())
            for member in group.members:
                content.update(repr(member._content).encode())
        shapes, trainable = sorted(self.shapes.items()), sorted(self.trainable)
        rest = self.layers, shapes, self.joined, trainable, self.sizes
        content.update(repr(rest).encode())
        return content.digest()

    @functools.cached_property
    def _by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self}

    @functools.cached_property
    def members(self) -> dict[str, tuple[tuple[Group, Member], ...]]:
        """Leaf name → prunable groups that run through the leaf, and their members."""
        found: dict[str, list[tuple[Group, Member]]] = {}
        for group in self:
            if group.reason is None:
                for member in group.members:
                    found.setdefault(member.leaf, []).append((group, member))
        return {leaf: tuple(pairs) for leaf, pairs in found.items()}


@dataclasses.dataclass(frozen=True)
class Supposition:
    """An assumption of a group: that a size in an operation follows its channels.

    A traced computation has the size as a number and does not show where it comes from.

    Attributes:
      group: Index of a group.
      part: Index of the size among those in the operation's parameters.
      source: Source of the operation, see :func:`tracing.source_line`.
    """

    group: int
    part: int
    source: Any


def _key(kept: Mapping[str, Any]) -> bytes:
    content = hashlib.sha256()
    for name, indices in sorted(kept.items()):
        content.update(f"{name}:".encode() + np.asarray(indices, np.int64).tobytes())
    return content.digest()


def _same_inputs(one: Any, other: Any) -> bool:
    leaves, structure = jax.tree.flatten(one)
    others, other_structure = jax.tree.flatten(other)
    return structure == other_structure and leaves == others
