"""A numerical check that the groups of a model are right."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jaxtyping import Array, Float, Int

from tpp_jax.errors import TPPError
from tpp_jax.graph.arrays import spread
from tpp_jax.graph.functions import Function, as_function, is_array
from tpp_jax.graph.groups import Group, Groups
from tpp_jax.graph.naming import longest_known_suffix
from tpp_jax.pruning.channels import channel_groups
from tpp_jax.pruning.cutting import check_plan, linen_apply, prune
from tpp_jax.pruning.filters import pruned_filters
from tpp_jax.pruning.masks import keep_masks
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.rescaling import find_rescaling
from tpp_jax.pruning.slicing import mask_tree

Outputs = Float[np.ndarray, " entries"]


class GroupCheck(NamedTuple):
    """Measurements of one group, in standard deviations of the outputs.

    Attributes:
      name: Name of the group.
      permuted: Largest change of an output when the channels are permuted.
      influence: Largest change when the channels are permuted only in the layer that
        produces them first, as if the group were wrong. If it is not larger than
        ``permuted``, nothing is proved.

    Example:
      >>> one = GroupCheck("layer1.0.conv1", permuted=2e-6, influence=0.7)
      >>> one.permuted < 1e-3 < one.influence  # the group is right
      True
    """

    name: str
    permuted: float
    influence: float


class Checks(NamedTuple):
    """Result of :func:`check_groups`, which raises if a group is wrong.

    Attributes:
      groups: Measurements of each prunable group of at least two channels.
      masked: Largest difference of an output between masking half of the channels and
        removing them; nan if the masked network divides by zero (weights divided by
        their norm, for example). Groups that a reduction runs over are among them if
        rescaling makes both the same for all of them, see :func:`tpp_jax.prune`.
      unprunable: Group name → reason why it cannot be pruned.
      unproved: Names of the groups that are only partly proved: they do not influence
        the outputs (a dead unit, a bias before a softmax), or a reduction runs over
        them and no weights make masking and removing the same (a softmax over channels,
        an activation that is not zero at zero before a norm, experts of which others
        are chosen in place of those removed).

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones((3, 5))}
      >>> def fn(p, x):
      ...     return x @ p["w"]
      >>> checks = check_groups(fn, jnp.ones((1, 3)), params=params)
      >>> checks.groups, checks.unprunable
      ((), {'w': 'an output of the model'})
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
    """Checks the groups of a model numerically, by running the model.

    The weights are near those of the model (random where they are abstract), so that
    none are zero or equal by initialisation:

    - If the channels of a group are permuted, the outputs must not change.
    - If half of the channels of all groups that no reduction runs over are masked, the
      outputs must be the same as without them.
    - The same holds for a group that a reduction runs over (a root mean square, a
      product of queries and keys) if other parameters can be rescaled to make up for
      it, see :func:`tpp_jax.prune`.
    - Without such factors (a layer norm subtracts a mean), half of the channels are
      made copies of the other half (6 of 9 are copies of 3), which no layer reads. If
      the outputs are not the same as without them, the group is listed as unproved.
    - The model must run without half of all channels, see :func:`tpp_jax.check_plan`.

    Args:
      model: NNX module (runs in evaluation mode, not modified), Linen module or
        function ``fn(params, *inputs)``.
      *inputs: Example inputs; abstract ones are replaced by random numbers.
      params: Parameter pytree of a function, or variables of a Linen module.
      groups: Groups to check; by default those of :func:`tpp_jax.channel_groups`.
      tolerance: Largest difference allowed, in standard deviations of the outputs.
        Rounding in float32 causes about 1e-5 in a deep network.
      seed: Seed of the random numbers.
      **kwargs: Keyword arguments of the model, like ``inputs``.

    Returns:
      The measurements, and the groups that could not be proved.

    Raises:
      TPPError: A group is wrong; the message names it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def mlp(p, x):
      ...     return jax.nn.relu(x @ p["w1"]) @ p["w2"]
      >>> p = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
      >>> checks = check_groups(mlp, jnp.ones((3, 4)), params=p)
      >>> [one.name for one in checks.groups], checks.masked < 1e-5
      (['w1'], True)
    """
    if groups is None:
        groups = channel_groups(model, *inputs, params=params, **kwargs)
    rng = np.random.default_rng(seed)
    network = _Network.of(model, params, groups, inputs, kwargs, rng)
    checks = _check_permuting(network, groups, tolerance, rng)
    plan = _half(groups, rng, lambda _: True)
    check_plan(plan, model, params)
    free = network.is_free(plan)
    if not free:
        plan = _half(groups, rng, lambda group: not group.reduced)
    masked = _check_masking(network, plan, free, tolerance)
    unproved = [one.name for one in checks if one.influence <= tolerance]
    unproved += [groups[i].name for i in _noisy(groups) if groups[i].reason is None]
    if not free or not np.isfinite(masked):
        unproved += _unproved(network, groups, tolerance, rng)
    reasons = {group.name: group.reason for group in groups if group.reason}
    return Checks(checks, masked, reasons, tuple(dict.fromkeys(unproved)))


@dataclasses.dataclass(frozen=True)
class _Network:
    """A model with inputs and weights to check its groups on.

    Attributes:
      model: The model.
      params: Parameters that came with the model, as for :func:`check_groups`.
      function: The model as a function of its weights.
      inputs: Inputs of the model.
      kwargs: Keyword arguments of the model.
      weights: Weights near those of the model, as a tree of ``function.params``.
      names: For each leaf of the weights, the name of the parameter that it copies.
    """

    model: Any
    params: Any
    function: Function
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    weights: Any
    names: tuple[str, ...]

    @classmethod
    def of(
        cls,
        model: Any,
        params: Any,
        groups: Groups,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        rng: np.random.Generator,
    ) -> "_Network":
        function = as_function(model, params)
        weights = jax.tree.map(lambda leaf: _drawn(leaf, rng), function.params)
        arguments = inputs, kwargs
        inputs, kwargs = jax.tree.map(lambda leaf: example(leaf, rng), arguments)
        # A copy of a parameter in another collection changes along with it.
        names = tuple(
            longest_known_suffix(name, groups.shapes) or name for name in function.names
        )
        return cls(model, params, function, inputs, kwargs, weights, names)

    @functools.cached_property
    def _run(self) -> Callable[[Any], jax.Array]:
        call = self.function.call
        return jax.jit(
            lambda weights: _flat(call(weights, *self.inputs, **self.kwargs))
        )

    def run(self, weights: Any) -> Outputs:
        """Returns the outputs of the unpruned network."""
        return np.asarray(self._run(weights))

    def is_free(self, plan: Plan) -> bool:
        """Reports whether a cut of zeros changes nothing, as far as is known."""
        source = plan.groups.source
        return source is not None and find_rescaling(plan, source).problem is None

    def zeroed(self, plan: Plan) -> Any:
        """Returns weights whose pruned filters are zero."""
        filters = pruned_filters(plan)
        leaves, structure = jax.tree.flatten(self.weights)
        for i, name in enumerate(self.names):
            if name in filters:
                mask = np.asarray(filters[name].mask(np.ndim(leaves[i])))
                leaves[i] = np.where(mask, np.zeros((), leaves[i].dtype), leaves[i])
        return jax.tree.unflatten(structure, leaves)

    def run_cut(self, plan: Plan, weights: Any) -> Outputs:
        """Returns the outputs of the network that :func:`prune` returns."""
        if isinstance(self.model, nnx.Module):
            merged = nnx.merge(nnx.graphdef(self.model), weights)
            small = as_function(prune(merged, plan))
        elif isinstance(self.model, linen.Module):
            small = dataclasses.replace(
                self.function,
                call=linen_apply(self.model, plan),
                params=prune(self.model, plan, weights),
            )
        else:
            drawn = iter(jax.tree.leaves(weights))
            tree = jax.tree.map(
                lambda leaf: next(drawn) if is_array(leaf) else leaf, self.params
            )
            small = as_function(self.model, prune(self.model, plan, tree))
        run = jax.jit(
            lambda weights: _flat(small.call(weights, *self.inputs, **self.kwargs))
        )
        return np.asarray(run(small.params))


def _check_permuting(
    network: _Network, groups: Groups, tolerance: float, rng: np.random.Generator
) -> tuple[GroupCheck, ...]:
    """Checks that the outputs do not change when the channels of a group do."""
    expected = network.run(network.weights)
    if not np.isfinite(expected).all():
        raise TPPError(
            "the model's outputs are not finite near its own weights: nothing can be "
            "proved about it"
        )
    checks = []
    noisy = _noisy(groups)
    for i, group in enumerate(groups):
        if group.reason is not None or group.size < 2 or i in noisy:
            continue
        # A single cycle moves every channel; in each layer of a loop another one.
        cycle = np.stack([rng.permutation(group.size) for _ in range(group.steps or 1)])
        order = np.empty_like(cycle)
        np.put_along_axis(order, cycle, np.roll(cycle, 1, axis=-1), axis=-1)
        order = order[0] if group.steps is None else order
        permuted = _distance(network.run(_permuted(network, group, order)), expected)
        first = next(m for m in group.members if m.role == "produced")
        alone = dataclasses.replace(group, members=(first,))
        influence = _distance(network.run(_permuted(network, alone, order)), expected)
        checks.append(GroupCheck(group.name, permuted, influence))
        if not permuted <= tolerance:
            raise TPPError(
                f"the group {group.name} is wrong: when its channels are permuted, an "
                f"output changes by {permuted:.2g} standard deviations. Please report "
                "the model; until then, skip this group"
            )
    return tuple(checks)


def _check_masking(
    network: _Network, plan: Plan, free: bool, tolerance: float
) -> float:
    """Checks that masked and removed channels give the same, and returns how nearly.

    Args:
      network: Network.
      plan: Plan of the cut.
      free: Whether a cut of zeros, which rescales other weights, is to be free.
      tolerance: Largest difference allowed.
    """
    mask = mask_tree(plan, network.weights)
    weights = jax.tree.map(_masked, network.weights, mask)
    expected = network.run(weights)
    found = network.run_cut(plan, weights if free else network.weights)
    masked = _distance(found, expected)
    if np.isfinite(expected).all() and not masked <= tolerance:
        raise TPPError(
            f"masking half of the channels differs from removing them by "
            f"{masked:.2g} standard deviations of the outputs"
        )
    return masked


def _unproved(
    network: _Network, groups: Groups, tolerance: float, rng: np.random.Generator
) -> list[str]:
    """Returns the reduced groups that neither zeros nor copies of channels prove."""
    unproved = []
    for group in groups:
        if not group.reduced or group.reason is not None or group.size < 2:
            continue
        if group.chosen:  # the model chooses others in their place
            unproved.append(group.name)
            continue
        plan = _share(groups, rng, group)
        if network.is_free(plan):
            weights = network.zeroed(plan)
            expected = network.run(weights)
            if np.isfinite(expected).all():
                zeros = _distance(network.run_cut(plan, weights), expected)
                if not zeros <= tolerance:
                    raise TPPError(
                        f"removing zeros from the group {group.name} changes an "
                        f"output by {zeros:.2g} standard deviations, though the other "
                        "weights are rescaled. Please report the model; until then, "
                        "skip this group"
                    )
                continue
        weights = _with_copies(network, group, plan)
        found = network.run_cut(plan, weights)
        if not _distance(found, network.run(weights)) <= tolerance:
            unproved.append(group.name)
    return unproved


def _noisy(groups: Groups) -> frozenset[int]:
    """Returns the groups whose channels random numbers are drawn for.

    These numbers are not permuted with the channels.
    """
    return groups.reading.noisy if groups.reading is not None else frozenset()


def _distance(found: Outputs, expected: Outputs) -> float:
    """Returns the largest difference, in standard deviations of what is expected."""
    spread = float(expected.std()) or 1.0
    return float(np.abs(found - expected).max(initial=0.0)) / spread


def _with_copies(network: _Network, group: Group, plan: Plan) -> Any:
    """Returns weights whose pruned channels are copies that no layer reads."""
    kept, pruned = np.asarray(plan.kept[group.name]), plan.pruned(group.name)
    order = np.broadcast_to(np.arange(group.size), (*kept.shape[:-1], group.size))
    order, times = order.copy(), group.size // kept.shape[-1] - 1
    copies = np.concatenate([kept] * times, axis=-1)
    np.put_along_axis(order, pruned, copies, axis=-1)
    leaves, structure = jax.tree.flatten(_permuted(network, group, order))
    for member in group.members:
        if member.role == "contracted":
            keep = keep_masks(plan, member.leaf)[member.axis]
            for i in (i for i, name in enumerate(network.names) if name == member.leaf):
                own = keep.over(member.axis, range(np.ndim(leaves[i])))
                leaves[i] = np.where(own, leaves[i], np.zeros((), leaves[i].dtype))
    return jax.tree.unflatten(structure, leaves)


def _masked(leaf: Any, keep: Any) -> Any:
    return np.asarray(leaf) * np.asarray(keep) if _is_float(leaf) else leaf


def _half(
    groups: Groups, rng: np.random.Generator, chosen: Callable[[Group], bool]
) -> Plan:
    """Returns a plan that keeps a random half of the channels of the chosen groups."""
    kept = {}
    for group in groups:
        if group.reason is None:
            n = (group.size + 1) // 2 if chosen(group) else group.size
            n = max(n, group.chosen)
            kept[group.name] = _some(group, n, rng)
    return Plan(kept, groups)


def _some(group: Group, n: int, rng: np.random.Generator) -> Int[np.ndarray, "..."]:
    """Returns random channels of a group; of each layer of a loop other ones."""
    rows = [np.sort(rng.permutation(group.size)[:n]) for _ in range(group.steps or 1)]
    return (np.stack(rows) if group.steps else rows[0]).astype(np.int32)


def _share(groups: Groups, rng: np.random.Generator, chosen: Group) -> Plan:
    """Returns a plan for one group that keeps a divisor of its number of channels."""
    times = next(n for n in range(2, chosen.size + 1) if chosen.size % n == 0)
    kept = {
        group.name: np.arange(group.size, dtype=np.int32)
        for group in groups
        if group.reason is None
    }
    kept[chosen.name] = _some(chosen, chosen.size // times, rng)
    return Plan(kept, groups)


def _permuted(
    network: _Network,
    group: Group,
    order: Int[np.ndarray, " size"] | Int[np.ndarray, "steps size"],
) -> Any:
    """Returns the weights with the channels of a group in another order."""
    leaves, structure = jax.tree.flatten(network.weights)
    indices: dict[str, list[int]] = {}
    for i, name in enumerate(network.names):
        indices.setdefault(name, []).append(i)
    for member in group.members:
        for i in indices[member.leaf]:
            # On the host: a device would compile a program for every shape.
            leaf, axis = np.asarray(leaves[i]), member.axis
            source = np.zeros((*order.shape[:-1], leaf.shape[axis]), np.int64)
            source += np.arange(leaf.shape[axis])
            source[..., member.positions] = member.positions[order]
            loop = member.steps if source.ndim > 1 else None
            index = spread(source, axis, loop, range(leaf.ndim))
            leaves[i] = np.take_along_axis(leaf, index, axis=axis)
    return jax.tree.unflatten(structure, leaves)


def _drawn(leaf: Any, rng: np.random.Generator) -> Any:
    """Returns an array near a weight, without equal entries."""
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


def example(leaf: Any, rng: np.random.Generator) -> Any:
    """Returns a random array in place of an abstract one."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        drawn = rng.normal(size=leaf.shape)
    else:
        drawn = rng.integers(2, size=leaf.shape)
    return jax.device_put(np.asarray(drawn, leaf.dtype))


def _is_float(leaf: Any) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _flat(outputs: Any) -> Float[Array, " entries"]:
    """Returns all outputs in one vector."""
    arrays = [jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(outputs)]
    return jnp.concatenate(arrays)
