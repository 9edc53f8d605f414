"""A numerical proof that the groups of a model are what they are said to be."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from tpp_jax.errors import TPPError
from tpp_jax.graph.functions import Function, as_function, is_array
from tpp_jax.graph.groups import Group, Groups
from tpp_jax.graph.naming import longest_known_suffix
from tpp_jax.pruning.channels import channel_groups
from tpp_jax.pruning.cutting import check_plan, linen_apply, prune
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.slicing import mask_tree, slice_tree


class GroupCheck(NamedTuple):
    """What was measured of one group, in units of the outputs' spread.

    Attributes:
      name: the group's name.
      permuted: largest change of an output when its channels change places.
      influence: the same if they change places in the layer that produces them first
        and nowhere else: what a mistake would look like. If that is no more than
        ``permuted``, nothing is proved.
    """

    name: str
    permuted: float
    influence: float


class Checks(NamedTuple):
    """What :func:`check_groups` found; it raises if something is wrong.

    Attributes:
      groups: one entry for each prunable group of at least two channels.
      masked: largest difference between the network with half of the channels masked
        and with them cut out, over all groups that no reduction runs over; nan if the
        masked network divides by zero (weights divided by their norm, for instance).
      unprunable: group name → why it cannot be pruned.
      unproved: names of the groups of which something could not be proved: they have
        no influence on the outputs here (a dead unit, a bias before a softmax), or a
        reduction runs over them that is no mean, so that no weights make masking and
        cutting the same.
    """

    groups: tuple[GroupCheck, ...]
    masked: float
    unprunable: dict[str, str]
    unproved: tuple[str, ...]


def check_groups(
    model: nnx.Module | linen.Module | Callable[..., Any],
    *inputs: Any,
    params: Any = None,
    groups: Groups | None = None,
    tolerance: float = 1e-3,
    seed: int = 0,
    **kwargs: Any,
) -> Checks:
    """Proves the groups of a model on the model itself, with numbers.

    Four things are tried, on weights near the model's own (drawn again where they are
    abstract, so that nothing is zero or alike by initialisation):

    - the channels of each group change places, in all arrays at once: the outputs must
      stay what they are;
    - half of the channels of every group that no reduction runs over are masked, or cut
      out: both networks must compute the same;
    - half of the channels of each group that a reduction runs over are made copies of
      the other half that nothing reads, or cut out: a norm's mean and variance are the
      same for both (of 9 channels, 3 are left). Where the networks differ (the
      reduction is no mean: a softmax, a product of queries and keys), the cut is listed
      as unproved;
    - half of the channels of all groups are cut out: the network must still run, and do
      the same operations on narrower arrays, see :func:`tpp_jax.check_plan`.

    Args:
      model: as for :func:`channel_groups`.
      *inputs: example inputs; abstract ones are drawn at random.
      params: as for :func:`channel_groups`.
      groups: the groups to be checked; found if not given.
      tolerance: the largest difference allowed, in units of the outputs' standard
        deviation; what float32 rounding makes of a deep network is some 1e-5.
      seed: of what is drawn.
      **kwargs: keyword arguments of the model, like ``inputs``.

    Returns:
      What was measured.

    Raises:
      TPPError: a group does not hold; the message names it.

    Example:
      >>> from flax import nnx
      >>> net = nnx.Sequential(
      ...     nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu,
      ...     nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
      >>> checks = check_groups(net, jax.ShapeDtypeStruct((3, 4), jnp.float32))
      >>> [one.name for one in checks.groups], checks.masked < 1e-5
      (['layers.0'], True)
    """
    if groups is None:
        groups = channel_groups(model, *inputs, params=params, **kwargs)
    rng = np.random.default_rng(seed)
    function = as_function(model, params)
    weights = jax.tree.map(lambda leaf: _drawn(leaf, rng), function.params)
    inputs, kwargs = jax.tree.map(lambda leaf: _example(leaf, rng), (inputs, kwargs))
    run = jax.jit(lambda weights: _flat(function.call(weights, *inputs, **kwargs)))
    expected = np.asarray(run(weights))
    if not np.isfinite(expected).all():
        raise TPPError(
            "the model's outputs are not finite near its own weights: nothing can be "
            "proved of it"
        )
    spread = float(expected.std()) or 1.0

    def distance(found: Any) -> float:
        return float(np.abs(np.asarray(found) - expected).max(initial=0.0)) / spread

    # A copy of a parameter in another collection changes along with it.
    names = tuple(
        longest_known_suffix(name, groups.shapes) or name for name in function.names
    )
    checks = []
    # Random numbers do not change places with the channels that they are drawn for.
    noisy = groups.reading.noisy if groups.reading is not None else frozenset()
    for i, group in enumerate(groups):
        if group.reason is not None or group.size < 2 or i in noisy:
            continue
        # One cycle through all channels leaves none where it was.
        cycle = rng.permutation(group.size)
        order = np.empty_like(cycle)
        order[cycle] = np.roll(cycle, 1)
        permuted = distance(run(_permuted(weights, names, group, order)))
        first = next(m for m in group.members if m.role == "produced")
        lone = dataclasses.replace(group, members=(first,))
        influence = distance(run(_permuted(weights, names, lone, order)))
        checks.append(GroupCheck(group.name, permuted, influence))
        if not permuted <= tolerance:
            raise TPPError(
                f"the group {group.name} does not hold: when its channels change "
                f"places, an output changes by {permuted:.2g} standard deviations. "
                "Please report the model; until then, skip this group"
            )
    cut = functools.partial(_run_cut, model, params, function, inputs, kwargs)
    plan = _half(groups, rng, lambda group: not group.reduced)
    mask = mask_tree(plan, weights)
    expected = np.asarray(run(jax.tree.map(_masked, weights, mask)))
    found = cut(plan, weights)
    spread = float(expected.std()) or 1.0
    masked = float(np.abs(found - expected).max(initial=0.0)) / spread
    if np.isfinite(expected).all() and not masked <= tolerance:
        raise TPPError(
            f"masking half of the channels differs from cutting them out by "
            f"{masked:.2g} standard deviations of the outputs"
        )
    check_plan(_half(groups, rng, lambda group: True), model, params)
    unproved = {one.name: None for one in checks if one.influence <= tolerance}
    unproved |= {groups[i].name: None for i in noisy if groups[i].reason is None}
    for group in groups:
        if group.reduced and group.reason is None and group.size > 1:
            plan = _share(groups, rng, group)
            copies = _with_copies(weights, names, group, plan)
            expected = np.asarray(run(copies))
            apart = np.abs(cut(plan, copies) - expected).max(initial=0.0)
            if not apart <= tolerance * (float(expected.std()) or 1.0):
                unproved[group.name] = None
    reasons = {group.name: group.reason for group in groups if group.reason}
    return Checks(tuple(checks), masked, reasons, tuple(unproved))


def _run_cut(
    model: Any,
    params: Any,
    function: Function,
    inputs: Any,
    kwargs: Any,
    plan: Plan,
    weights: Any,
) -> np.ndarray:
    """Returns the outputs of the cut network, as :func:`prune` leaves it."""
    if isinstance(model, nnx.Module):
        small = as_function(prune(nnx.merge(nnx.graphdef(model), weights), plan))
    elif isinstance(model, linen.Module):
        call = linen_apply(model, plan)
        small = dataclasses.replace(
            function, call=call, params=slice_tree(plan, weights)
        )
    else:
        drawn = iter(jax.tree.leaves(weights))
        tree = jax.tree.map(lambda x: next(drawn) if is_array(x) else x, params)
        small = as_function(model, prune(model, plan, tree))
    run = jax.jit(lambda weights: _flat(small.call(weights, *inputs, **kwargs)))
    return np.asarray(run(small.params))


def _with_copies(weights: Any, names: tuple[str, ...], group: Group, plan: Plan) -> Any:
    """Returns weights in which the channels that go are copies that nothing reads."""
    kept, gone = np.asarray(plan.kept[group.name]), plan.pruned(group.name)
    order = np.arange(group.size)
    order[gone] = np.tile(kept, group.size // len(kept) - 1)
    leaves, structure = jax.tree.flatten(_permuted(weights, names, group, order))
    for member in group.members:
        if member.role == "contracted":
            for i in (i for i, name in enumerate(names) if name == member.leaf):
                leaf = np.moveaxis(np.array(leaves[i]), member.axis, 0)
                leaf[member.positions[gone].reshape(-1)] = 0
                leaves[i] = np.moveaxis(leaf, 0, member.axis)
    return jax.tree.unflatten(structure, leaves)


def _masked(leaf: Any, keep: Any) -> Any:
    return np.asarray(leaf) * np.asarray(keep) if _is_float(leaf) else leaf


def _half(groups: Groups, rng: Any, chosen: Callable[[Group], bool]) -> Plan:
    """Plans to keep a random half of the channels of the chosen groups."""
    kept = {}
    for group in groups:
        if group.reason is None:
            n = (group.size + 1) // 2 if chosen(group) else group.size
            kept[group.name] = np.sort(rng.permutation(group.size)[:n]).astype(np.int32)
    return Plan(kept, groups)


def _share(groups: Groups, rng: Any, chosen: Group) -> Plan:
    """Plans to keep so many channels of a group that the others are copies of them."""
    times = next(n for n in range(2, chosen.size + 1) if chosen.size % n == 0)
    kept = {
        group.name: np.arange(group.size, dtype=np.int32)
        for group in groups
        if group.reason is None
    }
    indices = rng.permutation(chosen.size)[: chosen.size // times]
    kept[chosen.name] = np.sort(indices).astype(np.int32)
    return Plan(kept, groups)


def _permuted(weights: Any, names: tuple[str, ...], group: Group, order: Any) -> Any:
    """Returns the weights with the channels of a group in another order."""
    leaves, structure = jax.tree.flatten(weights)
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        places.setdefault(name, []).append(i)
    for member in group.members:
        for i in places[member.leaf]:
            source = np.arange(leaves[i].shape[member.axis])
            source[member.positions] = member.positions[order]
            # On the host: on a device every new shape would be compiled for.
            leaves[i] = np.take(np.asarray(leaves[i]), source, axis=member.axis)
    return jax.tree.unflatten(structure, leaves)


def _drawn(leaf: Any, rng: Any) -> Any:
    """Returns an array near a weight, with no two entries alike."""
    if not _is_float(leaf):
        return leaf
    noise = rng.uniform(-1, 1, leaf.shape)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        fan_in = np.prod(leaf.shape[:-1])
        near = 1 + 0.3 * noise if len(leaf.shape) < 2 else noise * np.sqrt(3 / fan_in)
    else:
        value = np.asarray(leaf, np.float64)
        size = np.sqrt(np.mean(np.square(value))) if value.size else 0.0
        near = value * (1 + 0.3 * noise)
        near += 0.1 * (size or 1.0) * rng.uniform(-1, 1, leaf.shape)
        if value.min(initial=0.0) >= 0:  # a variance, perhaps
            near = np.abs(near)
    return np.asarray(near, leaf.dtype)


def _example(leaf: Any, rng: Any) -> Any:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        drawn = rng.normal(size=leaf.shape)
    else:
        drawn = rng.integers(2, size=leaf.shape)
    return jax.device_put(np.asarray(drawn, leaf.dtype))


def _is_float(leaf: Any) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _flat(outputs: Any) -> jax.Array:
    arrays = [jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(outputs)]
    return jnp.concatenate(arrays)
