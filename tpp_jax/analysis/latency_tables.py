"""``latency_table``: what the widths of a model's groups cost on this machine."""

import collections
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jaxtyping import Array

from tpp_jax.analysis.products import Operation, is_product, products_of
from tpp_jax.errors import TPPError, TPPTypeError
from tpp_jax.graph.functions import is_array
from tpp_jax.graph.groups import read_groups
from tpp_jax.graph.records import Groups
from tpp_jax.graph.tracing import Trace
from tpp_jax.pruning.axes import Axes, sizes_of
from tpp_jax.pruning.cutting import check_plan
from tpp_jax.pruning.masks import cut_shapes
from tpp_jax.pruning.memory import VIEWS
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.source import Source
from tpp_jax.pruning.times import (
    EVEN,
    STEP,
    LatencyTable,
    Measured,
    TimedLayer,
    TimedShape,
)
from tpp_jax.xla.blocks import hold_blocks
from tpp_jax.xla.convolution import compiler_options, use_fast_convolutions

# Shares of the channels that the networks keep which the weights are fitted to.
_SHARES = (1.0, 0.7, 0.5, 0.3, 0.1)
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 300
# Least duration of all calls of one product at one point, and of one network.
_SECONDS_OF_A_PRODUCT, _SECONDS_OF_A_NETWORK = 0.01, 2.0

Call = Callable[[], Any]


def latency_table(
    model: nnx.Module | linen.Module | Callable[..., Any],
    inputs: Any,
    groups: Groups,
    *,
    params: Any = None,
) -> LatencyTable:
    """Measures, once, what the widths of a model's groups cost on this machine.

    Each distinct shape of a convolution or another product of arrays is timed alone, at
    a grid of widths. Then the dense network and a few pruned ones are timed, to which
    the weights of the products, of all other operations and of a constant are fitted.
    Times are the shortest of several calls, which take turns. On the CPU, NNX modules
    run as in ``--mode=profile``, with convolutions and compiler options that suit a CPU
    (``tpp_jax.xla.convolution``); other models run as they are.

    Args:
      model: Model that the groups were found with.
      inputs: Inputs of a call with the batch size that is to be timed: an array or
        ``jax.ShapeDtypeStruct``, or a sequence of them for several arguments. Only
        their shapes and types are used.
      groups: Groups from :func:`tpp_jax.channel_groups`; example inputs there may have
        another batch size.
      params: Parameter pytree of a function, or variables of a Linen module. Arrays may
        be abstract, here and in an NNX module; values have no effect. Keyword arguments
        of the model are those that the groups were found with.

    Returns:
      The times, for ``make_plan(…, latency=0.5, table=table)``. They hold for this
      device, these inputs and the types of the parameters.

    Raises:
      TPPError: The groups are those of another model.
      TPPTypeError: ``groups`` is not the result of :func:`tpp_jax.channel_groups`, or
        the model has another type.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import tpp_jax as tpp
      >>> def net(p, x):
      ...     return jax.nn.relu(x @ p["w1"]) @ p["w2"]
      >>> p = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
      >>> groups = tpp.channel_groups(net, jnp.ones((1, 4)), params=p)
      >>> table = latency_table(net, jnp.ones((64, 4)), groups, params=p)
      >>> table.seconds({"w1": 4}) > 0
      True
    """
    if not isinstance(groups, Groups):
        raise TPPTypeError(
            f"the groups are a {type(groups).__name__}: pass the result of "
            "tpp_jax.channel_groups(...) after the model and its inputs"
        )
    given = tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)
    source = Source.of(model, params, given, groups.kwargs)
    traced = source.trace()
    found, _ = read_groups(traced, source.inputs, joined=groups.joined)
    if found.shapes != groups.shapes:
        raise TPPError(
            "the groups are those of another model: its parameters have other names or "
            "shapes. Find the groups with the model that is timed"
        )
    axes = Axes(groups.replace(_traced=traced, reading=found.reading))
    elements = _elements(traced, axes)
    for_cpu = isinstance(model, nnx.Module) and jax.default_backend() == "cpu"
    plans = _plans(groups, model, params)
    networks = [network_call(source, plan) for plan in plans]
    # Twice, since other work on the machine comes and goes.
    early = shortest(networks, _SECONDS_OF_A_NETWORK)
    shapes, layers = _timed_products(traced, axes, groups, for_cpu)
    late = shortest(networks, _SECONDS_OF_A_NETWORK)
    measured = tuple(
        Measured(tuple(plan.kept_count(group) for group in groups), min(times))
        for plan, *times in zip(plans, early, late, strict=True)
    )
    table = LatencyTable(
        device=jax.devices()[0].device_kind,
        groups=tuple(group.name for group in groups),
        sizes=tuple(group.size for group in groups),
        axes=tuple(
            tuple((n, tuple(through)) for n, through in runs) for runs in axes.runs
        ),
        shapes=shapes,
        layers=layers,
        elements=elements,
        weights=(1.0, 0.0, 0.0),
        measured=measured,
    )
    return _fitted(table)


def _timed_products(
    traced: Trace, axes: Axes, groups: Groups, for_cpu: bool
) -> tuple[tuple[TimedShape, ...], tuple[TimedLayer, ...]]:
    """Returns the times of all distinct products, and where they are used."""
    products = list(products_of(traced, axes))
    full = [(group.size, group.size) for group in groups]
    fewer = (
        [(max(n // 2, 1), n) for n, _ in full],
        [(max(n // 3, 1), n) for n, _ in full],
    )
    dense, *others = (sizes_of(axes.runs, counts) for counts in (full, *fewer))
    known: dict[Any, int] = {}
    shapes, layers = [], []
    for product in products:
        sizes = [size.of(dense) for size in product.sizes]
        varying = tuple(
            any(size.of(other) != n for other in others)
            for size, n in zip(product.sizes, sizes, strict=True)
        )
        key = repr(product.operation), tuple(sizes), varying
        if key not in known:
            known[key] = len(shapes)
            shapes.append(_timed(product.operation, sizes, varying, for_cpu))
        own = tuple(itertools.compress(product.sizes, varying))
        layers.append(TimedLayer(known[key], own, product.times))
    return tuple(shapes), tuple(layers)


def _timed(
    operation: Operation, sizes: Sequence[int], varying: Sequence[bool], for_cpu: bool
) -> TimedShape:
    """Returns the times of a product at a grid of the sizes that vary."""
    grid = [
        grid_of(n) if varies else (n,) for n, varies in zip(sizes, varying, strict=True)
    ]
    arrays: dict[Any, Array] = {}

    def array(shape: tuple[int, ...], dtype: Any) -> Array:
        if (shape, dtype) not in arrays:
            arrays[shape, dtype] = jnp.zeros(shape, dtype)
        return arrays[shape, dtype]

    calls: list[Call] = [jax.jit(lambda: jnp.zeros(()))]
    for point in itertools.product(*grid):
        shapes = zip(operation.shapes(point), operation.dtypes, strict=True)
        operands = [array(*one) for one in shapes]
        calls.append(functools.partial(operation.call(point, for_cpu), *operands))
    empty, *times = shortest(calls, _SECONDS_OF_A_PRODUCT)
    return TimedShape(
        tuple(itertools.compress(grid, varying)),
        tuple(max(t - empty, 0.0) for t in times),
    )


def grid_of(size: int) -> tuple[int, ...]:
    """Returns the widths at which a product is timed, up to its own.

    They are pairs: multiples of a number, which machines like, and their neighbours,
    which they do not.
    """
    few = size <= 4 * STEP
    step = math.ceil(size / ((4 if few else 3) * STEP)) * STEP
    marks = {size, *range(step, size + 1, step), *((EVEN,) if few else ())}
    around = (-1, 0, 1) if step == STEP else (-1, 0)
    near = {1, EVEN, *(mark + one for mark in marks for one in around)}
    return tuple(sorted(n for n in near if 1 <= n <= size))


def shortest(calls: Sequence[Call], seconds: float) -> list[float]:
    """Returns the shortest duration of each call in seconds; the calls take turns.

    Args:
      calls: Functions that return arrays.
      seconds: Least total duration of the calls of one function, on average.
    """
    for call in calls:
        jax.block_until_ready(call())
    found = [math.inf] * len(calls)
    begun, total = time.perf_counter(), seconds * len(calls)
    for rounds in range(_MOST_ROUNDS):
        if rounds >= _LEAST_ROUNDS and time.perf_counter() - begun > total:
            break
        for i, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            found[i] = min(found[i], time.perf_counter() - start)
    return found


def _elements(traced: Trace, axes: Axes) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Returns the numbers of results of all operations that are not timed alone."""
    factors: collections.Counter[tuple[int, ...]] = collections.Counter()
    for eqn in traced.equations:
        moved = eqn.primitive in VIEWS or not traced.unread.isdisjoint(eqn.outputs)
        if moved or is_product(traced, eqn):
            continue
        for value in eqn.outputs:
            if not traced.origin.get(value):
                along = [(value, axis) for axis in range(len(traced.shapes[value]))]
                factor, numbers = axes.product(eqn.times, along)
                factors[tuple(sorted(numbers))] += factor
    return tuple((factor, along) for along, factor in factors.items())


def _plans(groups: Groups, model: Any, params: Any) -> list[Plan]:
    """Returns plans of the networks that are timed, the dense one first.

    Plans that the model does not work with are left out.
    """
    plans: list[Plan] = []
    for share in _SHARES:
        kept = {}
        for group in groups:
            if group.reason is None:
                n = group.size if group.inner else max(round(share * group.size), 1)
                kept[group.name] = np.arange(n, dtype=np.int32)
        plan = Plan(kept, groups)
        try:
            check_plan(plan, model, params)
        except TPPError:
            continue
        if plan not in plans:
            plans.append(plan)
    return plans


def network_call(source: Source, plan: Plan) -> Call:
    """Returns a call of the network that a plan leaves, with random parameters.

    Args:
      source: Model and its inputs.
      plan: Plan of the channels to keep.
    """
    function = source.cut(plan, plan.groups.shapes | cut_shapes(plan), _for_cpu)
    arguments, structure = jax.tree.flatten((source.inputs, source.kwargs))
    draws = np.random.default_rng(0)
    arrays = [_filled(x, draws) for x in arguments if is_array(x)]
    leaves = [_filled(x, draws) for x in function.params]

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def call(leaves: list[Array], arrays: list[Array]) -> Any:
        given = iter(arrays)
        filled = [next(given) if is_array(x) else x for x in arguments]
        inputs, kwargs = jax.tree.unflatten(structure, filled)
        return function.call(leaves, *inputs, **kwargs)

    return functools.partial(call, leaves, arrays)


def _for_cpu(root: nnx.Module) -> None:
    use_fast_convolutions(root)
    hold_blocks(root)


def _filled(x: jax.ShapeDtypeStruct, draws: np.random.Generator) -> Array:
    """Returns an array with random numbers, so that no operation is left out."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), math.prod(x.shape)).reshape(x.shape)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros(x.shape, x.dtype)
    return jnp.asarray(draws.uniform(0.1, 1, x.shape), x.dtype)


def _fitted(table: LatencyTable) -> LatencyTable:
    """Returns the table with the weights that fit its networks, by relative error."""
    import scipy.optimize  # late: it takes long to import

    seconds = np.array([network.seconds for network in table.measured])
    parts = np.array([table.parts(network.counts) for network in table.measured])
    relative = parts / seconds[:, None]
    scale = np.maximum(relative.max(axis=0), 1e-30)
    found, _ = scipy.optimize.nnls(relative / scale, np.ones(len(seconds)))
    if len(seconds) < parts.shape[1]:  # too few networks for three weights
        found = np.eye(3)[0] if parts[0, 0] > 0 else np.eye(3)[2]
        scale = relative[0]
    weights = tuple(float(w) for w in found / np.where(scale > 0, scale, 1))
    return dataclasses.replace(table, weights=weights)
