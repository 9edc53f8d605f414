"""Batch statistics measured again after a cut: ``recalibrate``."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.extend import core as jex_core
from jaxtyping import Array

from tpp_jax.errors import TPPError
from tpp_jax.graph.functions import Function, as_function
from tpp_jax.graph.naming import layer_name, some
from tpp_jax.graph.unfolding import check_length
from tpp_jax.pruning.compensation import like_leaf, with_leaves
from tpp_jax.pruning.consumers import Tag, moved
from tpp_jax.pruning.masks import keep_masks
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.replay import evaluate, replay
from tpp_jax.pruning.sums import Sums, merge


def recalibrate(
    model: nnx.Module | linen.Module | Callable[..., Any],
    batches: Iterable[Any],
    params: Any = None,
    *,
    like: Any = None,
    plan: Plan | None = None,
    **kwargs: Any,
) -> Any:
    """Measures the running statistics of batch norms again, on a pruned network.

    Every norm takes the mean and variance of each batch, as in training, and their
    exact averages over all batches become its running statistics. With ``like`` they
    are *rebased* on the unpruned network: what the norms of that network see on the
    same batches, next to its own running statistics, says how far the batches are from
    the training data, and this difference is kept. A network that is not pruned is then
    left as it is, whatever the batches are; without ``like`` it is adapted to them.

    Args:
      model: Pruned network: NNX module, Linen module or function
        ``fn(params, *inputs)``; not modified. It runs in evaluation mode.
      batches: Batches; each an array, or a tuple if the model has several inputs.
      params: Pruned variables of a Linen module, or pruned parameters of a function.
      like: Unpruned NNX module, or the unpruned variables or parameters.
      plan: Plan of the cut. With ``like`` it says which channels were kept; by default
        they are found by the values of the norms' scales, biases and variances. A Linen
        module needs it.
      **kwargs: Keyword arguments of the model, the same for all batches.

    Returns:
      The module, or the tree of parameters, with new statistics.

    Raises:
      TPPError: There is no batch, no batch norm was found, or the kept channels of a
        norm cannot be found by its values.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])]
      >>> new = recalibrate(norm, batches)
      >>> new.mean[...].tolist(), new.var[...].tolist()
      ([4.0], [5.0])
      >>> recalibrate(norm, batches, like=norm).mean[...].tolist()
      [0.0]
    """
    small = as_function(model, params, plan)
    norms = _norms_of(small)
    if not norms:
        raise TPPError(
            "there are no batch norms: no statistics called mean and var are next to "
            "each other"
        )
    kept, dense = {}, small
    leaves = {  # either network may be donated later on
        name: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf
        for name, leaf in _leaves(small).items()
    }
    if like is not None:
        own = isinstance(model, nnx.Module)
        dense = as_function(like) if own else as_function(model, like)
        kept = _kept_channels(norms, leaves, _leaves(dense), plan)
    epsilons: dict[str, float] = {}
    run = jax.jit(functools.partial(_run, small, norms, epsilons, kwargs))
    run_dense = jax.jit(functools.partial(_run, dense, norms, epsilons, kwargs))
    total: dict[str, Sums] = {}
    total_dense: dict[str, Sums] = {}
    batch = None
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        references = None
        if like is not None:
            found = run_dense(dense.params, inputs, None)
            _add(total_dense, found)
            references = _references(found, _leaves(dense), norms, kept)
        _add(total, run(small.params, inputs, references or {}))
    if batch is None:
        raise TPPError("there is no batch to measure statistics on")
    missing = sorted(norms.keys() - total.keys())
    if missing:
        raise TPPError(
            f"the norms of {some(missing)} were not recognised: their mean is not "
            "subtracted from activations, or they are inside a loop"
        )
    references = {}
    if like is not None:
        references = _references(total_dense, _leaves(dense), norms, kept)
    for mean, var in norms.items():
        seen = total[mean].mean[0], _variance(total[mean])
        if mean in references:
            seen = references[mean].rebased(*seen, epsilons.get(var, 0.0))
        for name, values in zip((mean, var), seen, strict=True):
            leaves[name] = like_leaf(leaves[name], np.asarray(values))
    return with_leaves(small, params, leaves)


def _leaves(function: Function) -> dict[str, Any]:
    return dict(zip(function.names, jax.tree.leaves(function.params), strict=True))


def _norms_of(function: Function) -> dict[str, str]:
    """Returns the name of each running mean → that of the variance next to it."""
    shapes = {name: np.shape(leaf) for name, leaf in _leaves(function).items()}
    found = {}
    for name, shape in shapes.items():
        layer, _, own = name.rpartition(".")
        for var in ("var", "variance"):
            sibling = ".".join(filter(None, [layer, own.replace("mean", var)]))
            if "mean" in own and shapes.get(sibling) == shape:
                found[name] = sibling
    return found


def _kept_channels(
    norms: Mapping[str, str],
    small: Mapping[str, Any],
    dense: Mapping[str, Any],
    plan: Plan | None,
) -> dict[str, np.ndarray]:
    """Returns the channels of each norm of the unpruned network that were kept.

    Raises:
      TPPError: They cannot be found by the values of the pruned norm.
    """
    kept = {}
    for mean in norms:
        if mean not in dense:
            raise TPPError(f"the unpruned network has no norm {layer_name(mean)}")
        if plan is not None:
            masks = keep_masks(plan, mean)
            every: Any = np.ones(np.shape(dense[mean]), bool)
            for axis, own in masks.items():
                every = every & own.over(axis, range(every.ndim))
            kept[mean] = np.flatnonzero(every)
        else:
            kept[mean] = _matched(mean, small, dense)
        if len(kept[mean]) != np.size(small[mean]):
            raise TPPError(
                f"the channels of {layer_name(mean)} that were kept cannot be found "
                "by its values: pass plan="
            )
    return kept


def _matched(
    mean: str, small: Mapping[str, Any], dense: Mapping[str, Any]
) -> np.ndarray:
    """Returns where the channels of a norm stand in the unpruned one, as far as found.

    A refit changes the means, so the other values of a channel are compared. Channels
    of equal values are taken in order.
    """
    if np.size(small[mean]) == np.size(dense[mean]):
        return np.arange(np.size(dense[mean]))
    layer = layer_name(mean)
    names = [
        name
        for name, leaf in small.items()
        if layer_name(name) == layer and name != mean and name in dense
        if np.size(leaf) == np.size(small[mean])
        and np.size(dense[name]) == np.size(dense[mean])
    ]
    few, many = (
        np.stack([np.asarray(leaves[name]).reshape(-1) for name in names], axis=1)
        for leaves in (small, dense)
    )
    found, place = [], 0
    for channel in few:
        while place < len(many) and (many[place] != channel).any():
            place += 1
        if place == len(many):
            break
        found.append(place)
        place += 1
    return np.asarray(found, int)


class _Reference(NamedTuple):
    """A norm of the unpruned network on calibration data, at the kept channels.

    Attributes:
      mean, var: Statistics of its input.
      running_mean, running_var: Statistics that it keeps.
    """

    mean: Any
    var: Any
    running_mean: Any
    running_var: Any

    def rebased(self, mean: Any, var: Any, epsilon: float) -> tuple[Any, Any]:
        """Returns statistics that do to the pruned norm's input what these did.

        The unpruned norm maps inputs of mean m and variance v to outputs whose mean and
        variance are not 0 and 1 if the data are others than those of the training. The
        pruned norm's outputs get the same mean and variance.
        """
        size = (var + epsilon) / (self.var + epsilon)
        shift = (self.mean - self.running_mean) * size**0.5
        new = (self.running_var + epsilon) * size - epsilon
        return mean - shift, new * (new > 0)


def _references(
    found: Mapping[str, Sums],
    dense: Mapping[str, Any],
    norms: Mapping[str, str],
    kept: Mapping[str, np.ndarray],
) -> dict[str, _Reference]:
    return {
        mean: _Reference(
            sums.mean[0][kept[mean]],
            _variance(sums)[kept[mean]],
            np.asarray(dense[mean]).reshape(-1)[kept[mean]],
            np.asarray(dense[norms[mean]]).reshape(-1)[kept[mean]],
        )
        for mean, sums in found.items()
    }


def _variance(sums: Sums) -> Any:
    return sums.scatter[0] / sums.rows[0]


def _add(total: dict[str, Sums], found: Mapping[str, Sums]) -> None:
    """Adds the sums of a batch, in float64."""
    for name, sums in jax.device_get(found).items():
        exact = Sums(*(np.asarray(part, np.float64) for part in sums))
        total[name] = merge(total[name], exact) if name in total else exact


class _Value(NamedTuple):
    """An array, and the entries of a parameter that it consists of."""

    array: Any
    tag: Tag | None


def _run(
    function: Function,
    norms: Mapping[str, str],
    epsilons: dict[str, float],
    kwargs: Mapping[str, Any],
    params: Any,
    inputs: tuple[Any, ...],
    references: Mapping[str, _Reference] | None,
) -> dict[str, Sums]:
    """Returns the sums of each norm's input in one batch.

    Args:
      function: Model.
      norms: Name of each running mean → that of the variance.
      epsilons: Name of a variance → what is added to it; filled in.
      kwargs: Keyword arguments of the model.
      params: Parameters.
      inputs: Inputs.
      references: Norms of the unpruned network; None if running statistics are used as
        they are, and not those of the batch.
    """
    call = functools.partial(function.call, **kwargs)
    closed = jax.make_jaxpr(call)(params, *inputs)
    check_length(closed.jaxpr)
    arguments = []
    for name, leaf in zip(function.names, jax.tree.leaves(params), strict=True):
        index = np.arange(np.size(leaf)).reshape(np.shape(leaf))
        statistic = name in norms or name in norms.values()
        arguments.append(
            _Value(leaf, Tag("parameter", name, index) if statistic else None)
        )
    arguments += [_Value(leaf, None) for leaf in jax.tree.leaves(inputs)]
    meter = _Meter(norms, epsilons, references, {}, {})
    built_in = functools.partial(_Value, tag=None)
    replay(closed.jaxpr, closed.consts, arguments, built_in, meter.step)
    return meter.sums


@dataclasses.dataclass
class _Meter:
    """Runs equations and measures the inputs of norms.

    Attributes:
      norms, epsilons, references: See :func:`_run`.
      sums: Name of a running mean → sums of the norm's input.
      variances: Name of a variance → the values that take its place.
    """

    norms: Mapping[str, str]
    epsilons: dict[str, float]
    references: Mapping[str, _Reference] | None
    sums: dict[str, Sums]
    variances: dict[str, Array]

    def step(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        """Returns the results of an equation."""
        last = values[-1].tag if values else None
        if eqn.primitive.name == "sub" and last and last.name in self.norms:
            mean = self._measure(values[0].array, values[1].array, last)
            values = [values[0], _Value(mean, None)]
        elif len(values) == 1 and last:
            moves = moved(eqn, last)
            if moves:
                results = evaluate(eqn, [values[0].array])
                return list(map(_Value, results, moves))
        values = [self._replaced(eqn, value) for value in values]
        results = evaluate(eqn, [value.array for value in values])
        return [_Value(result, None) for result in results]

    def _measure(self, x: Array, running: Array, tag: Tag) -> Array:
        """Notes the input of a norm; returns the mean that is subtracted from it."""
        index = np.broadcast_to(tag.index, x.shape)
        axes = tuple(i for i, stride in enumerate(index.strides) if stride == 0)
        own = tuple(slice(0, 1) if i in axes else slice(None) for i in range(x.ndim))
        order = np.argsort(index[own].reshape(-1))
        exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = exact.mean(axes, keepdims=True)
        var = jnp.square(exact - mean).mean(axes).reshape(-1)[order]
        flat = mean.reshape(-1)[order]
        rows = jnp.full(1, x.size // max(flat.size, 1), exact.dtype)
        sums = Sums(rows, flat[None], (var * rows)[None])
        known = self.sums.get(tag.name)
        self.sums[tag.name] = sums if known is None else merge(known, sums)
        name = self.norms[tag.name]
        if self.references is None:
            return running
        if tag.name in self.references:
            epsilon = self.epsilons.get(name, 0.0)
            flat, var = self.references[tag.name].rebased(flat, var, epsilon)
        self.variances[name] = var
        return flat[tag.index].astype(x.dtype)

    def _replaced(self, eqn: Any, value: _Value) -> _Value:
        """Returns a value with new variances in place of running ones."""
        if value.tag is None or value.tag.name not in self.norms.values():
            return value
        name = value.tag.name
        literals = [v.val for v in eqn.invars if isinstance(v, jex_core.Literal)]
        if eqn.primitive.name == "add" and literals:
            self.epsilons[name] = float(literals[0])
        if self.references is None or name not in self.variances:
            return value
        array = self.variances[name][value.tag.index]
        return value._replace(array=array.astype(value.array.dtype))
