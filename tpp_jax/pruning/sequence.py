"""Refits in order of execution: from what layers read in the pruned network.

The unpruned and the pruned network run side by side, from layer to layer. At a layer
that reads pruned channels both wait until it is refit, and the pruned network continues
with the new weights.
"""

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tpp_jax.errors import TPPError
from tpp_jax.graph.arrays import on_host
from tpp_jax.graph.functions import Function
from tpp_jax.pruning.consumers import (
    Reading,
    Tag,
    moved,
    read_convolution,
    read_dot,
)
from tpp_jax.pruning.masks import keep_masks
from tpp_jax.pruning.moments import ConsumerMoments, Moments
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.replay import equations, evaluate
from tpp_jax.pruning.ridge import Damping, Errors, refit
from tpp_jax.pruning.sums import Sums, filled, merge, sums_of


class _Value(NamedTuple):
    """An array, with the parameter that its entries are those of."""

    array: Any
    tag: Tag | None


class _Use(NamedTuple):
    """A layer that is about to be applied to a batch."""

    leaf: str
    reading: Reading


def refit_in_order(
    dense: Function,
    small: Function,
    plan: Plan,
    moments: Moments,
    batches: Sequence[Any],
    kept_back: int,
    damping: Damping,
    kwargs: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Returns the refit parameters of a pruned network by name, float64 and flat.

    Args:
      dense: Unpruned network.
      small: Pruned network.
      plan: Plan of the cut.
      moments: Moments of what layers read in the unpruned network.
      batches: Batches.
      kept_back: Number of last batches on which the damping is chosen.
      damping: Damping of the fits.
      kwargs: Keyword arguments of the network.

    Raises:
      TPPError: The networks do not apply the same layers in the same order.
    """
    entries = [entry for entry in moments.consumers if _is_refit(plan, entry)]
    wanted = {entry.leaf for entry in entries}
    followed = wanted | {e.bias.leaf for e in entries if e.bias is not None}
    new: dict[str, np.ndarray] = {}
    originals = dict(zip(dense.names, jax.tree.leaves(dense.params), strict=True))
    current = dict(zip(small.names, jax.tree.leaves(small.params), strict=True))
    # The same calls for all batches, so that JAX traces those of one shape once.
    calls = [functools.partial(function.call, **kwargs) for function in (dense, small)]
    walks = []
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        networks = zip((dense, small), calls, ({}, new), strict=True)
        walks.append([_uses(*each, inputs, wanted, followed) for each in networks])
    left = list(entries)
    while left:  # what follows the last of them need not be computed
        pairs = [[next(walk, None) for walk in walk_pair] for walk_pair in walks]
        leaves = {use and use.leaf for pair in pairs for use in pair}
        if leaves == {None}:
            break
        if len(leaves) > 1:
            raise TPPError(
                "the unpruned and the pruned network do not apply the same layers in "
                "the same order: refit without sequential=True"
            )
        entry = _refit_layer(
            pairs,
            entries,
            plan,
            originals,
            current,
            new,
            len(pairs) - kept_back,
            damping,
        )
        left = [other for other in left if other is not entry]
    return new


def kept_features(
    plan: Plan, entry: ConsumerMoments
) -> Bool[np.ndarray, "stacks features"]:
    """Returns which features of a consumer a plan keeps."""
    masks = keep_masks(plan, entry.leaf)
    keep = np.ones((len(entry.stacks), len(entry.features)), bool)
    for axis, positions in entry.positions.items():
        if axis in masks:
            mask, _, loop = masks[axis]
            mask = np.asarray(mask)
            if loop is not None:
                shape = plan.groups.shapes[entry.leaf]
                mask = mask[np.unravel_index(entry.stacks, shape)[loop]]
            keep &= mask[..., positions]
    return keep


def _is_refit(plan: Plan, entry: ConsumerMoments) -> bool:
    keep = kept_features(plan, entry)
    empty = any(not kept.number for kept in keep_masks(plan, entry.leaf).values())
    return entry.fixed is None and entry.once and not (keep.all() or empty)


def _uses(
    function: Function,
    call: Callable[..., Any],
    changed: Mapping[str, np.ndarray],
    inputs: tuple[Any, ...],
    wanted: set[str],
    followed: set[str],
) -> Generator[_Use, None, None]:
    """Runs a network on a batch and yields each layer of interest before it is applied.

    Args:
      function: Network.
      call: What computes it from its parameters and a batch.
      changed: Name of a parameter → its values by now, flat, if they have changed.
      inputs: Batch.
      wanted: Names of the kernels of interest.
      followed: Names of the parameters that may change on the way.
    """
    closed = jax.make_jaxpr(call)(function.params, *inputs)
    arguments = []
    leaves = jax.tree.leaves(function.params)
    for name, leaf in zip(function.names, leaves, strict=True):
        tag = None
        if name in followed:
            index = np.arange(np.size(leaf)).reshape(np.shape(leaf))
            tag = Tag("parameter", name, index)
        arguments.append(_Value(leaf, tag))
    arguments += [_Value(leaf, None) for leaf in jax.tree.leaves(inputs)]

    def fresh(value: _Value) -> Any:
        if value.tag is None or value.tag.name not in changed:
            return value.array
        new = changed[value.tag.name][value.tag.index]
        return jnp.asarray(new, value.array.dtype)

    walk = equations(
        closed.jaxpr, closed.consts, arguments, lambda array: _Value(array, None)
    )
    results: Any = None
    while True:
        try:
            eqn, values = walk.send(results)
        except StopIteration:
            return
        use = _use(eqn, values, wanted)
        if use is not None:
            yield use
        found = evaluate(eqn, [fresh(value) for value in values])
        tags: list[Tag | None] = [None] * len(found)
        if len(values) == 1 and values[0].tag is not None:
            tags = list(moved(eqn, values[0].tag)) or tags
        results = list(map(_Value, found, tags))


def _use(eqn: Any, values: list[_Value], wanted: set[str]) -> _Use | None:
    """Returns the layer that an equation is, if it is one of interest."""
    name = eqn.primitive.name
    if name not in ("dot_general", "conv_general_dilated"):
        return None
    for operand in (1, 0):
        tag, other = values[operand].tag, values[1 - operand]
        if tag is None or tag.name not in wanted or other.tag is not None:
            continue
        if name == "dot_general":
            return _Use(tag.name, read_dot(eqn, operand, tag, other.array))
        if operand == 1 and eqn.params["batch_group_count"] == 1:
            return _Use(tag.name, read_convolution(eqn, tag, other.array))
    return None


def _refit_layer(
    pairs: list[list[Any]],
    entries: Sequence[ConsumerMoments],
    plan: Plan,
    originals: Mapping[str, Any],
    current: Mapping[str, Any],
    new: dict[str, np.ndarray],
    fitted: int,
    damping: Damping,
) -> ConsumerMoments | None:
    """Refits a layer, in place; returns its moments, or None if it cannot be refit.

    Args:
      pairs: The layer in the unpruned and in the pruned network, for each batch.
      entries: Moments of the layers that may be refit.
      plan: Plan of the cut.
      originals: Parameters of the unpruned network.
      current: Parameters of the pruned network, before any of these refits.
      new: Those that have changed, flat.
      fitted: Number of batches to fit to; the damping is chosen on the others.
      damping: Damping of the fit.
    """
    dense, small = pairs[0]
    entry = _entry_of(dense, entries)
    same = all(_row_count(a) == _row_count(b) for a, b in pairs)
    if entry is None or not same:
        return None
    columns = _columns(plan, dense, small)
    kernel = on_host(originals[dense.leaf]).reshape(-1)[dense.reading.index]
    totals: list[Sums] = []
    for use in (pairs[:fitted], pairs[fitted:]):
        sums = [
            _joint(a.reading.rows(), jnp.asarray(kernel), b.reading.rows(), columns)
            for a, b in use
        ]
        exact = [
            jax.tree.map(lambda leaf: on_host(leaf).astype(np.float64), one)
            for one in sums
        ]
        if exact:
            totals.append(filled(functools.reduce(merge, exact)))
    weights = _flat(dense.leaf, current, new)
    before = on_host(originals[dense.leaf]).astype(np.float64).reshape(-1)
    before = before[_kept_entries(plan, dense.leaf)]
    for s, index in enumerate(small.reading.index):
        lack, bias, at = np.zeros(index.shape[1]), None, None
        if entry.bias is not None:
            at, bias, old = _bias_of(entry, columns[s], plan, originals, current, new)
            lack = entry.bias.sign * (old - bias[at])
        errors = [_errors(total, s, before[index], lack) for total in totals]
        held = errors[1] if len(errors) > 1 else None
        change, shift = refit(errors[0], held, damping, entry.bias is not None)
        weights[index] = before[index] + change
        if bias is not None and entry.bias is not None:
            bias[at] += entry.bias.sign * shift
    return entry


def _row_count(use: _Use) -> int:
    return jax.eval_shape(use.reading.rows).shape[1]


def _entry_of(use: _Use, entries: Sequence[ConsumerMoments]) -> ConsumerMoments | None:
    index = np.sort(use.reading.index, axis=None)
    for entry in entries:
        own = entry.weight_index() if entry.leaf == use.leaf else index[:0]
        if np.array_equal(np.sort(own, axis=None), index):
            return entry
    return None


def _flat(
    leaf: str, current: Mapping[str, Any], new: dict[str, np.ndarray]
) -> np.ndarray:
    if leaf not in new:
        new[leaf] = on_host(current[leaf]).astype(np.float64).reshape(-1)
    return new[leaf]


def _kept_entries(plan: Plan, leaf: str) -> Int[np.ndarray, " kept"]:
    """Returns the flat indices of a parameter's entries that are kept, in order."""
    shape = plan.groups.shapes[leaf]
    keep = np.ones(shape, bool)
    for axis, kept in keep_masks(plan, leaf).items():
        keep &= np.asarray(kept.over(axis, range(len(shape))))
    return np.flatnonzero(keep)


def _columns(plan: Plan, dense: _Use, small: _Use) -> Int[np.ndarray, "stacks outputs"]:
    """Returns the output of the unpruned layer that each of the pruned layer is."""
    stacks, _, outputs = dense.reading.index.shape
    number = np.full(int(np.prod(plan.groups.shapes[dense.leaf])), -1)
    made = np.arange(stacks * outputs).reshape(stacks, 1, outputs)
    number[dense.reading.index] = made
    return number[_kept_entries(plan, dense.leaf)[small.reading.index[:, 0]]]


def _bias_of(
    entry: ConsumerMoments,
    outputs: Int[np.ndarray, " outputs"],
    plan: Plan,
    originals: Mapping[str, Any],
    current: Mapping[str, Any],
    new: dict[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns where the entries of a bias are, all of it, and these before the cut."""
    assert entry.bias is not None
    leaf = entry.bias.leaf
    index = entry.bias.index.reshape(-1)[outputs]
    at = np.searchsorted(_kept_entries(plan, leaf), index)
    old = on_host(originals[leaf]).astype(np.float64).reshape(-1)[index]
    return at, _flat(leaf, current, new), old


@jax.jit
def _joint(
    read: Float[Array, "all rows features"],
    kernel: Float[Array, "all features outputs"],
    kept: Float[Array, "stacks rows kept"],
    columns: Int[Array, "stacks own"],
) -> Sums:
    """Returns sums of what the pruned layer reads and the unpruned one gives."""
    highest = jax.lax.Precision.HIGHEST
    outputs = jnp.einsum("srf,sfo->rso", read, kernel, precision=highest)
    wanted = outputs.reshape(len(outputs), -1)[:, columns].transpose(1, 0, 2)
    both = [kept.astype(wanted.dtype), wanted]
    return sums_of(jnp.concatenate(both, axis=-1), diagonal=False)


def _errors(
    sums: Sums,
    stack: int,
    weights: Float[np.ndarray, "kept outputs"],
    lack: Float[np.ndarray, " outputs"],
) -> Errors:
    """Returns the errors of the outputs with some weights.

    Args:
      sums: Sums of what is read, and of what the outputs should be.
      stack: Stack of interest.
      weights: Weights.
      lack: What the outputs lack besides.
    """
    n, rows = len(weights), sums.rows[stack]
    moments, mean = sums.scatter[stack] / rows, sums.mean[stack]
    return Errors(
        rows,
        moments[:n, :n],
        moments[:n, n:] - moments[:n, :n] @ weights,
        mean[:n],
        mean[n:] - weights.T @ mean[:n] + lack,
    )
