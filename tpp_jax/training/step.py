"""The training step and the evaluation step, as pure functions for one device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from tpp_jax.graph.naming import layer_name, map_named, named_leaves
from tpp_jax.training.distillation import Teacher, distilled
from tpp_jax.training.structure import NOT_TRAINED, Structure
from tpp_jax.training.task import Batch, Loss, Metrics
from tpp_jax.xla.blocks import hold_blocks, roll_blocks
from tpp_jax.xla.convolution import use_fast_convolutions


class TrainState(NamedTuple):
    """State that a training step reads and returns.

    Attributes:
      step: Number of steps done in this phase, int32.
      params: Trainable parameters.
      stats: Batch statistics.
      opt_state: State of the optimizer.
      average: Moving averages of ``(params, stats)``; None if none are kept.
      teacher: ``(params, stats)`` of the network that is distilled, which no step
        changes; None if none is.
    """

    step: Int[Array, ""]
    params: nnx.State
    stats: nnx.State
    opt_state: Any
    average: tuple[nnx.State, nnx.State] | None = None
    teacher: tuple[nnx.State, nnx.State] | None = None

    @property
    def network(self) -> tuple[nnx.State, nnx.State]:
        """Parameters and statistics to use: the averages if they are kept."""
        return self.average or (self.params, self.stats)


class StepConfig(NamedTuple):
    """Arithmetic of a step, which does not depend on the task.

    Attributes:
      dtype: Type that parameters are cast to, except those of layers that keep batch
        statistics. The parameters themselves, their updates, batch statistics and the
        loss are float32.
      remat: Whether the backward pass recomputes all but convolutions and matrix
        products, to save memory.
      accumulate: Number of parts in which a device computes its share of a batch, to
        save memory. Each part has its own batch statistics, like a smaller batch.
      skip_nonfinite: Whether a step whose loss or gradient is not finite changes
        nothing and counts as ``skipped`` in the metrics.
      sync_bn: Whether batch norm normalises by the batch of all devices; otherwise each
        device normalises by its own share. The statistics kept for evaluation are the
        mean over devices in both cases.
      ema: Decay d of the averages; at step t it is min(d, (1 + t)/(10 + t)), so that
        the initial values lose their weight. 0 for no averages.
    """

    dtype: str = "float32"
    remat: bool = False
    accumulate: int = 1
    skip_nonfinite: bool = False
    sync_bn: bool = True
    ema: float = 0.0


Gradients = Callable[..., tuple[nnx.State, tuple[nnx.State, Metrics]]]
"""``gradients(params, stats, batch, key) -> (grads, (stats, metrics))``."""

# Number that is folded into the key of a step for the key of its loss; examples use the
# numbers 0, 1, 2…
_OF_THE_LOSS = 2**30


def make_train_step(
    structure: Structure,
    tx: optax.GradientTransformation,
    loss: Loss,
    config: StepConfig,
    select: Callable[..., Batch],
    axis: str | None = None,
    teacher: Teacher | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Makes the training step of one device.

    Args:
      structure: Structure of the model, in training mode.
      tx: Optimizer.
      loss: ``loss(model, batch, key) -> (loss, metrics)`` of a task.
      config: Arithmetic of the step.
      select: ``select(step, key, *data) -> batch``, which returns this device's share
        of a step's batch.
      axis: Name of the device axis that gradients, batch statistics and metrics are
        averaged over; None for a single device.
      teacher: Teacher to distil, whose arrays are those of the state; None for none.

    Returns:
      ``step(state, key, *data) -> (state, metrics)``. The metrics are those that
      ``loss`` returns and the ``loss`` itself, over the batch of all devices. Random
      numbers depend on ``key``, the step and the position in the batch, so that a batch
      split over devices equals the batch of a single device.
    """

    def step(
        state: TrainState, key: Key[Array, ""], *data: Any
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        batch = select(state.step, key, *data)
        taught = _with_teacher(loss, teacher, state.teacher, config.dtype)
        gradients = _gradients(structure, taught, config, axis)
        grads, (stats, metrics) = gradients(
            state.params, state.stats, batch, jax.random.fold_in(key, _OF_THE_LOSS)
        )
        if axis is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis)
            if structure.local or not config.sync_bn:
                stats = _mean_over(axis, stats)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        average: Any = state.average
        if config.ema:
            t = state.step.astype(jnp.float32)
            rate = 1 - jnp.minimum(config.ema, (1 + t) / (10 + t))
            average = _averaged((params, stats), average, rate)
        after = TrainState(
            state.step + 1, params, stats, opt_state, average, state.teacher
        )
        if config.skip_nonfinite:
            return _if_finite(grads, metrics, state, after)
        return after, metrics

    return step


def _averaged(new: Any, average: Any, rate: Float[Array, ""]) -> Any:
    """Returns moving averages after a step; counters and masks have their new value."""

    def one(x: Array, mean: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return (rate * x + (1.0 - rate) * mean).astype(x.dtype)

    return jax.tree.map(one, new, average)


def _with_teacher(
    loss: Loss,
    teacher: Teacher | None,
    arrays: tuple[nnx.State, nnx.State] | None,
    dtype: str,
) -> Loss:
    """Returns the loss, distilled if there is a teacher."""
    if teacher is None or arrays is None:
        return loss
    model = merged(teacher.structure, *arrays, dtype)
    hold_blocks(model)
    return distilled(loss, model, *teacher[1:])


def _gradients(
    structure: Structure, loss: Loss, config: StepConfig, axis: str | None
) -> Gradients:
    """Makes the function that differentiates a device's share of the loss."""

    def forward(
        params: nnx.State, stats: nnx.State, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[nnx.State, Metrics]]:
        model = merged(structure, params, stats, config.dtype, key, axis)
        if axis is not None and config.sync_bn:
            _synchronise(model, axis)
        value, metrics = loss(model, batch, key)
        return value, (nnx.state(model, NOT_TRAINED), {**metrics, "loss": value})

    if config.remat:
        forward = jax.checkpoint(forward, policy=is_expensive)
    differentiate = jax.grad(forward, has_aux=True)
    if config.accumulate == 1:
        return differentiate
    return _accumulated(differentiate, config.accumulate)


def _accumulated(differentiate: Gradients, n: int) -> Gradients:
    """Makes the gradients of a batch the means over n parts, computed in sequence."""

    def accumulated(
        params: nnx.State, stats: nnx.State, batch: Batch, key: Key[Array, ""]
    ) -> tuple[nnx.State, tuple[nnx.State, Metrics]]:
        def body(carry: Any, part: Any) -> Any:
            sums, stats = carry
            grads, (stats, metrics) = differentiate(params, stats, *part)
            return (jax.tree.map(jnp.add, sums, (grads, metrics)), stats), None

        batches = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)
        parts = batches, jax.random.split(key, n)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes, (_, metrics) = jax.eval_shape(differentiate, params, stats, *first)
        zeros = jax.tree.map(jnp.zeros_like, (shapes, metrics))
        # XLA's CPU backend runs a convolution inside a loop some 80 times slower.
        unroll = jax.default_backend() == "cpu"
        (sums, stats), _ = jax.lax.scan(body, (zeros, stats), parts, unroll=unroll)
        grads, metrics = jax.tree.map(lambda total: total / n, sums)
        return grads, (stats, metrics)

    return accumulated


def _if_finite(
    grads: nnx.State, metrics: Metrics, before: TrainState, after: TrainState
) -> tuple[TrainState, Metrics]:
    """Returns a step's state and metrics, or those of a skipped step."""
    ok = jnp.isfinite(metrics["loss"]) & jnp.isfinite(optax.tree.norm(grads))
    before = before._replace(step=after.step)
    state, metrics = jax.tree.map(
        lambda new, old: jnp.where(ok, new, old),
        (after, metrics),
        (before, jax.tree.map(jnp.zeros_like, metrics)),
    )
    return state, {**metrics, "skipped": 1.0 - ok}


def merged(
    structure: Structure,
    params: nnx.State,
    stats: nnx.State,
    dtype: str,
    key: Key[Array, ""] | None = None,
    axis: str | None = None,
) -> nnx.Module:
    """Returns the model with its arrays, prepared for XLA.

    Its random streams start from the key, on each device of an axis differently.
    """
    if structure.rngs and key is not None and axis is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    cast, rngs = _in(dtype, params, stats), structure.streams(key)
    model = nnx.merge(structure.graphdef, cast, stats, *rngs, copy=True)
    use_fast_convolutions(model)
    roll_blocks(model)
    return model


def _synchronise(model: nnx.Module, axis: str) -> None:
    """Makes batch norms normalise by the batch of all devices on an axis."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.axis_name = axis


def _mean_over(axis: str, stats: nnx.State) -> nnx.State:
    """Returns the means of statistics over devices; counters are equal on all.

    Constants are equal too and are kept bit by bit, which their mean need not be.
    """

    def mean(x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        least, most = jax.lax.pmin(x, axis), jax.lax.pmax(x, axis)
        return jnp.where(least == most, most, jax.lax.pmean(x, axis))

    return jax.tree.map(mean, stats)


def _in(dtype: str, params: nnx.State, stats: nnx.State) -> nnx.State:
    """Casts the parameters, except those of layers that keep batch statistics."""
    if dtype == "float32":
        return params
    norms = {layer_name(name) for name in named_leaves(stats)}
    return map_named(
        lambda name, leaf: leaf if layer_name(name) in norms else leaf.astype(dtype),
        params,
    )


def is_expensive(primitive: Any, *_: Any, **__: Any) -> bool:
    """Returns whether a primitive is a convolution or a matrix product.

    Such results are kept for the backward pass: a policy of ``jax.checkpoint``.
    """
    return primitive.name in ("conv_general_dilated", "dot_general")


def make_train_steps(step: Callable[..., Any], *, loop: bool) -> Callable[..., Any]:
    """Makes a program of several steps in one dispatch.

    Args:
      step: Step from :func:`make_train_step`.
      loop: Whether the program loops. Otherwise it takes one step, whatever ``n`` is;
        on the CPU, XLA runs a convolution inside a loop some 80 times slower.

    Returns:
      ``steps(state, key, n, *data) -> (state, metrics)`` with the metrics averaged over
      the steps.
    """

    def one(
        state: TrainState, key: Key[Array, ""], n: Int[Array, ""], *data: Any
    ) -> tuple[TrainState, Metrics]:
        del n
        return step(state, key, *data)

    def several(
        state: TrainState, key: Key[Array, ""], n: Int[Array, ""], *data: Any
    ) -> tuple[TrainState, Metrics]:
        def body(_: Any, carry: Any) -> Any:
            state, sums = carry
            state, metrics = step(state, key, *data)
            return state, jax.tree.map(jnp.add, sums, metrics)

        shapes = jax.eval_shape(step, state, key, *data)[1]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        state, sums = jax.lax.fori_loop(0, n, body, (state, zeros))
        return state, jax.tree.map(lambda total: total / n, sums)

    return several if loop else one


def make_eval_step(
    structure: Structure,
    metrics: Callable[[nnx.Module, Batch], dict[str, Shaped[Array, " n"]]],
    config: StepConfig,
    select: Callable[..., tuple[Batch, Bool[Array, " n"]]],
    axis: str | None = None,
) -> Callable[..., tuple[dict[str, Array], Int[Array, ""]]]:
    """Makes the evaluation step of one device.

    Args:
      structure: Structure of the model, in evaluation mode.
      metrics: ``metrics(model, batch)`` of a task, which returns values per example.
      config: Arithmetic of the step.
      select: ``select(*data) -> (batch, counts)``, which returns this device's share of
        a batch and a mask of the examples that count.
      axis: Name of the device axis; None for a single device.

    Returns:
      ``step(params, stats, *data) -> (sums, n)``: the sums of the metrics over the
      examples that count, and their number, over all devices.
    """

    def step(
        params: nnx.State, stats: nnx.State, *data: Any
    ) -> tuple[dict[str, Array], Int[Array, ""]]:
        batch, counts = select(*data)
        model = merged(structure, params, stats, config.dtype)
        hold_blocks(model)
        values = metrics(model, batch)
        sums = {name: jnp.sum(x, where=counts) for name, x in values.items()}
        totals = sums, jnp.sum(counts)
        return jax.lax.psum(totals, axis) if axis is not None else totals

    return step
