"""What is done with each third-party network, from its groups to a training step.

The weights are moved at random first: zeros and ones of the initialisation would hide
mistakes (a layer scale of 1e-6, a gate that is zero).
"""

import dataclasses
import fnmatch
import functools
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

import tpp_jax as tpp
from tests.third_party.networks import Entry, Network

# Differences between two networks that compute the same, in standard deviations of the
# outputs: float32 rounding.
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out for one network.

    Attributes:
      seconds: Processor time of the first ``channel_groups``: other work on the machine
        does not count.
      groups: Number of groups.
      channels: Channels of all groups together.
      prunable: Channels of the groups that can be pruned.
      prunable_groups: Their names.
      reasons: Name of a group → why it cannot be pruned.
      unproved: Groups without influence on the outputs.
      masked: Difference between the masked and the cut network, in standard deviations
        of the outputs; None where every prunable group is reduced.
      effect: What the mask changes in the outputs, in the same unit: far more than
        ``masked``, or nothing was shown.
      parameters: Parameters before and after half of all channels are cut.
      checked, cut, step: ``""`` if it worked, else what was raised.
    """

    seconds: float
    groups: int
    channels: int
    prunable: int
    prunable_groups: tuple[str, ...]
    reasons: dict[str, str]
    unproved: tuple[str, ...] = ()
    masked: float | None = None
    effect: float | None = None
    parameters: tuple[int, int] = (0, 0)
    checked: str = "not reached"
    cut: str = "not reached"
    step: str = "not reached"

    @property
    def right(self) -> bool:
        fine = self.masked is None or self.masked <= TOLERANCE
        return fine and not (self.checked or self.cut or self.step)


def prove(entry: Entry) -> Result:
    """Finds a network's groups, checks them, cuts half of them and trains a step.

    What goes wrong after the groups were found is recorded, not raised.
    """
    network = entry.build()
    with network.context():
        return _proved(_moved(network))


def _proved(network: Network) -> Result:
    model, inputs, params = network.model, network.inputs, network.params
    start = time.process_time()
    groups = tpp.channel_groups(model, *inputs, params=params, **network.kwargs)
    seconds = time.process_time() - start
    result = Result(
        seconds=seconds,
        groups=len(groups),
        channels=sum(group.size for group in groups),
        prunable=sum(group.size for group in groups if group.reason is None),
        prunable_groups=tuple(g.name for g in groups if g.reason is None),
        reasons={group.name: group.reason for group in groups if group.reason},
    )
    try:
        checks = tpp.check_groups(
            model, *inputs, params=params, groups=groups, **network.kwargs
        )
        result = dataclasses.replace(result, checked="", unproved=checks.unproved)
    except Exception as error:
        return dataclasses.replace(result, checked=_told(error))
    try:
        masked, effect = _masked_against_cut(network, groups)
        result = dataclasses.replace(result, masked=masked, effect=effect)
        plan = _half(network, groups, lambda group: True)
        small = pruned(network, plan)
        outputs = _flat(run(small))
        if not np.isfinite(outputs).all():
            raise FloatingPointError("the cut network's outputs are not finite")
        sizes = _size(network), _size(small)
        result = dataclasses.replace(result, cut="", parameters=sizes)
    except Exception as error:
        return dataclasses.replace(result, cut=_told(error))
    try:
        _train(network, small, plan)
    except Exception as error:
        return dataclasses.replace(result, step=_told(error))
    return dataclasses.replace(result, step="")


def against_narrower(entry: Entry) -> float:
    """Compares the cut network with the same weights in its package's narrower one.

    Returns:
      The largest difference, in standard deviations of the outputs.

    Raises:
      AssertionError: The cut network's arrays have other shapes.
    """
    network, narrower = _moved(entry.build()), entry.build(2)
    groups = tpp.channel_groups(
        network.model, *network.inputs, params=network.params, **network.kwargs
    )

    def is_wide(group: Any) -> bool:
        return not any(fnmatch.fnmatch(group.name, p) for p in entry.heads)

    small = pruned(network, _half(network, groups, is_wide))
    if isinstance(network.model, nnx.Module):
        graphdef, state = nnx.split(narrower.model)
        own = _same_shapes(nnx.state(small.model), state)
        narrower = dataclasses.replace(narrower, model=nnx.merge(graphdef, own))
    else:
        own = _same_shapes(small.params, narrower.params)
        narrower = dataclasses.replace(narrower, params=own)
    found, expected = _flat(run(small)), _flat(run(narrower))
    return float(np.abs(found - expected).max()) / (float(expected.std()) or 1.0)


def _same_shapes(tree: Any, like: Any) -> Any:
    """Returns the arrays of a tree in the structure of another."""
    arrays = iter([leaf for leaf in jax.tree.leaves(tree) if _trainable(leaf)])
    leaves, structure = jax.tree.flatten(like)
    filled = [next(arrays) if _trainable(leaf) else leaf for leaf in leaves]
    shapes = [[np.shape(leaf) for leaf in one] for one in (filled, leaves)]
    assert shapes[0] == shapes[1] and next(arrays, None) is None
    return jax.tree.unflatten(structure, filled)


def pruned(network: Network, plan: tpp.Plan) -> Network:
    """Cuts a network as its users do."""
    model = network.model
    if isinstance(model, nnx.Module):
        return dataclasses.replace(network, model=tpp.prune(model, plan))
    params = tpp.prune(model, plan, network.params)
    if isinstance(model, linen.Module):
        model = tpp.linen_apply(model, plan)
    return dataclasses.replace(network, model=model, params=params)


def run(network: Network) -> Any:
    """Returns the network's outputs in evaluation mode."""
    call, params = _call(network)
    return jax.jit(call)(params)


def _call(network: Network) -> tuple[Any, Any]:
    """Splits a network into a function of its trainable arrays, and these."""
    model, inputs, kwargs = network.model, network.inputs, network.kwargs
    if isinstance(model, nnx.Module):
        model.eval()
        graphdef, params, rest = nnx.split(model, _trained, ...)

        def call(params: Any) -> Any:
            return nnx.merge(graphdef, params, rest, copy=True)(*inputs, **kwargs)

        return call, params
    if isinstance(model, linen.Module):
        model = model.apply
    leaves, structure = jax.tree.flatten(network.params)
    trained = [i for i, leaf in enumerate(leaves) if _trainable(leaf)]

    def call(params: Any) -> Any:
        own = list(leaves)
        for i, leaf in zip(trained, jax.tree.leaves(params), strict=True):
            own[i] = leaf
        return model(jax.tree.unflatten(structure, own), *inputs, **kwargs)

    masked = [leaf if i in set(trained) else None for i, leaf in enumerate(leaves)]
    return call, jax.tree.unflatten(structure, masked)


def _trained(_: Any, variable: Any) -> bool:
    """Whether it is a parameter, of Flax's or of its package's own kind."""
    return type(variable).__name__.endswith("Param")


def _masked_against_cut(
    network: Network, groups: Any
) -> tuple[float | None, float | None]:
    """Cuts half of the channels that no reduction runs over, and zeroes them."""
    plan = _half(network, groups, lambda group: not group.reduced)
    if all(plan.kept_count(g) == g.size for g in groups if g.reason is None):
        return None, None
    if isinstance(network.model, nnx.Module):
        graphdef, state = nnx.split(network.model)
        zeroed = nnx.merge(graphdef, _zeroed(plan, state))
        masked = dataclasses.replace(network, model=zeroed)
    else:
        masked = dataclasses.replace(network, params=_zeroed(plan, network.params))
    expected, found = _flat(run(masked)), _flat(run(pruned(network, plan)))
    if not np.isfinite(expected).all():
        return None, None  # weights that are divided by their norm: zero by zero
    spread = float(expected.std()) or 1.0
    whole = _flat(run(network))
    return (
        float(np.abs(found - expected).max()) / spread,
        float(np.abs(whole - expected).max()) / spread,
    )


def _zeroed(plan: tpp.Plan, tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    arrays = [leaf if _trainable(leaf) else None for leaf in leaves]
    keep = tpp.mask_tree(plan, jax.tree.unflatten(structure, arrays))
    masks = iter(jax.tree.leaves(keep))
    zeroed = [leaf * next(masks) if _trainable(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, zeroed)


def _half(network: Network, groups: Any, chosen: Any) -> tpp.Plan:
    counts = {
        group.name: group.size // 2
        for group in groups
        if group.reason is None and group.size > 1 and chosen(group)
    }
    tree = network.model if network.params is None else network.params
    return tpp.make_plan(groups, tree, counts=counts)


def _train(network: Network, small: Network, plan: tpp.Plan) -> None:
    """One step of the regularized network, the cut, and one step of what is left."""
    schedule = tpp.growing_schedule(granularity=1e-2, every=1)
    tx = optax.chain(tpp.add_tpp_penalties(plan, schedule), optax.adamw(1e-3))
    state = None
    for one in (network, small):
        call, params = _call(one)
        grad = jax.value_and_grad(functools.partial(_loss, call))

        @jax.jit
        def step(params: Any, state: Any, grad: Any = grad) -> Any:
            loss, grads = grad(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        if state is None:
            state = jax.jit(tx.init)(params)
        else:
            state = tpp.slice_tree(plan, state)
        new, state, loss = step(params, state)
        flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(new)])
        if not (np.isfinite(loss) and np.isfinite(np.abs(flat)).all()):
            raise FloatingPointError("a step gives numbers that are not finite")
        if float(step(new, state)[2]) == float(loss):
            raise AssertionError("a step changes nothing")


def _loss(call: Any, params: Any) -> jax.Array:
    outputs = [x for x in jax.tree.leaves(call(params)) if _trainable(x)]
    return sum(jnp.mean(jnp.abs(x) ** 2) for x in outputs)


def _moved(network: Network) -> Network:
    rng = np.random.default_rng(0)

    def move(leaf: Any) -> Any:
        if not _trainable(leaf):
            return leaf
        value = np.asarray(leaf)
        size = float(np.sqrt(np.mean(np.abs(value) ** 2))) if value.size else 0.0
        size = 1.0 if value.ndim < 2 or not size else size
        noise = rng.uniform(-0.1, 0.1, value.shape) * size
        if not np.iscomplexobj(value) and (value >= 0).all():
            noise = np.abs(noise)  # a variance stays one
        return jnp.asarray(value + noise, leaf.dtype)

    if isinstance(network.model, nnx.Module):
        graphdef, state = nnx.split(network.model)
        moved = nnx.merge(graphdef, jax.tree.map(move, state))
        return dataclasses.replace(network, model=moved)
    return dataclasses.replace(network, params=jax.tree.map(move, network.params))


def _trainable(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _flat(outputs: Any) -> np.ndarray:
    arrays = [np.asarray(x) for x in jax.tree.leaves(outputs) if _trainable(x)]
    return np.concatenate([np.ravel(x).astype(np.complex128) for x in arrays])


def _size(network: Network) -> int:
    _, params = _call(network)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _told(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:300]


def quietly(entry: Entry) -> Result:
    """Like :func:`prove`, without the deprecation warnings of other packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prove(entry)
