"""The training step and the evaluation step, as pure functions for one device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from tpp_jax.data import mix, normalize
from tpp_jax.graph.naming import layer_name, map_named, named_leaves
from tpp_jax.models import BatchNorm
from tpp_jax.xla.blocks import hold_blocks, roll_blocks
from tpp_jax.xla.convolution import use_fast_convolutions


class TrainState(NamedTuple):
    """What a training step reads and writes.

    Attributes:
      step: int32, steps done in this phase.
      params: the trainable parameters.
      stats: batch statistics.
      opt_state: the optimizer's state.
      average: moving averages of ``(params, stats)``; None without.
    """

    step: Int[Array, ""]
    params: nnx.State
    stats: nnx.State
    opt_state: Any
    average: tuple[nnx.State, nnx.State] | None = None

    @property
    def network(self) -> tuple[nnx.State, nnx.State]:
        """Parameters and statistics to use: the averages, where they are kept."""
        return self.average or (self.params, self.stats)


class Batch(NamedTuple):
    """Images and labels.

    Attributes:
      pixels: uint8 ``[n, h, w, c]``.
      labels: int32 ``[n]``; -1 marks padding that does not count.
    """

    pixels: Array
    labels: Array


class StepConfig(NamedTuple):
    """What a step is compiled for.

    Attributes:
      mean: of the pixels, in units of pixel/255, per channel.
      std: likewise.
      num_classes: of the data.
      dtype: of the computation. Parameters, their updates, batch statistics and the
        loss stay float32.
      remat: whether the backward pass computes again all but convolutions and matrix
        products, to save memory.
      parts: how many parts a device computes its share of a batch in, to save memory.
        Each has its own batch statistics, as a smaller batch would.
      skip_nonfinite: whether a step whose loss or gradient is not finite changes
        nothing, and counts as ``skipped`` in the metrics.
      sync_bn: whether batch norm normalises by the batch of all devices, or each by its
        own share; what is kept for evaluation is the mean over devices either way.
      label_smoothing: share of the target that all classes get alike.
      mixup, cutmix: see :func:`tpp_jax.data.mix`.
      ema: decay of the averages d; at step t it is min(d, (1 + t)/(10 + t)), so that
        the start is forgotten. 0 for no averages.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    dtype: str = "float32"
    remat: bool = False
    parts: int = 1
    skip_nonfinite: bool = False
    sync_bn: bool = True
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0


# Of a phase's key, what is drawn for a whole batch; its images draw from 0, 1, 2…
_OF_THE_BATCH = 2**30


def graphdef_of(model: nnx.Module, *, training: bool) -> nnx.GraphDef:
    """Returns the structure of a model in training or evaluation mode.

    It holds no array and no shape of one: it serves the dense and the sliced network.
    """
    copy = nnx.merge(*nnx.split(model))
    copy.train() if training else copy.eval()
    return nnx.split(copy)[0]


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    config: StepConfig,
    select: Callable[..., Batch],
    axis: str | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """Makes the training step of one device.

    Args:
      graphdef: of the model, in training mode.
      tx: the optimizer.
      config: how to compute.
      select: ``select(step, key, *data)`` gives this device's share of a step's batch.
      axis: name of the device axis that gradients, batch statistics and metrics are
        averaged over; None for a single device.

    Returns:
      ``step(state, key, *data) -> (state, metrics)``; metrics are ``loss`` and
      ``accuracy`` (a share) of the whole batch. What is random draws from ``key``, the
      step and the place in the batch, so that a batch split over devices is the same
      batch.
    """

    def forward(
        params: nnx.State, stats: nnx.State, x: Array, targets: Array
    ) -> tuple[Array, tuple[nnx.State, Array]]:
        model = nnx.merge(graphdef, _in(config.dtype, params, stats), stats, copy=True)
        use_fast_convolutions(model)
        roll_blocks(model)
        if axis is not None and config.sync_bn:
            for _, module in nnx.iter_modules(model):
                if isinstance(module, BatchNorm):
                    module.axis_name = axis
        logits = model(x).astype(jnp.float32)
        if targets.ndim == 1:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        else:
            losses = optax.softmax_cross_entropy(logits, targets)
        return losses.mean(), (nnx.state(model, nnx.BatchStat), jnp.argmax(logits, -1))

    if config.remat:
        forward = jax.checkpoint(forward, policy=is_expensive)
    differentiate = jax.value_and_grad(forward, has_aux=True)

    def gradients(
        params: nnx.State, stats: nnx.State, batch: Batch, key: Array
    ) -> tuple[nnx.State, nnx.State, dict[str, Array]]:
        x = normalize(batch.pixels, config.mean, config.std, config.dtype)
        x, targets = _targets(x, batch.labels, key, config)
        (loss, (stats, guess)), grads = differentiate(params, stats, x, targets)
        metrics = {"loss": loss, "accuracy": (guess == batch.labels).mean()}
        return grads, stats, metrics

    def gradients_in_parts(
        params: nnx.State, stats: nnx.State, batch: Batch, key: Array
    ) -> tuple[nnx.State, nnx.State, dict[str, Array]]:
        n = config.parts

        def body(carry: Any, part: Any) -> Any:
            sums, stats = carry
            grads, stats, metrics = gradients(params, stats, *part)
            return (jax.tree.map(jnp.add, sums, (grads, metrics)), stats), None

        batches = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)
        parts = batches, jax.random.split(key, n)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradients, params, stats, *first)
        zeros = jax.tree.map(jnp.zeros_like, (shapes[0], shapes[2]))
        # XLA's CPU backend runs a convolution inside a loop some 80 times slower.
        unroll = jax.default_backend() == "cpu"
        carry, _ = jax.lax.scan(body, (zeros, stats), parts, unroll=unroll)
        (grads, metrics), stats = carry
        grads, metrics = jax.tree.map(lambda total: total / n, (grads, metrics))
        return grads, stats, metrics

    def step(
        state: TrainState, key: Array, *data: Any
    ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        key = jax.random.fold_in(key, state.step)
        batch = select(state.step, key, *data)
        differentiated = gradients if config.parts == 1 else gradients_in_parts
        grads, stats, metrics = differentiated(
            state.params, state.stats, batch, jax.random.fold_in(key, _OF_THE_BATCH)
        )
        if axis is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis)
            if not config.sync_bn:
                stats = jax.lax.pmean(stats, axis)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if config.ema:
            t = state.step.astype(jnp.float32)
            rate = 1 - jnp.minimum(config.ema, (1 + t) / (10 + t))
            average = optax.incremental_update((params, stats), average, rate)
        after = TrainState(state.step + 1, params, stats, opt_state, average)
        if config.skip_nonfinite:
            ok = jnp.isfinite(metrics["loss"]) & jnp.isfinite(optax.tree.norm(grads))
            before = state._replace(step=after.step)
            after, metrics = jax.tree.map(
                lambda new, old: jnp.where(ok, new, old),
                (after, metrics),
                (before, jax.tree.map(jnp.zeros_like, metrics)),
            )
            metrics["skipped"] = 1.0 - ok
        return after, metrics

    return step


def _in(dtype: str, params: nnx.State, stats: nnx.State) -> nnx.State:
    """Casts the parameters, but those of layers that keep batch statistics."""
    if dtype == "float32":
        return params
    norms = {layer_name(name) for name in named_leaves(stats)}
    return map_named(
        lambda name, leaf: leaf if layer_name(name) in norms else leaf.astype(dtype),
        params,
    )


def _targets(
    x: Array, labels: Array, key: Array, config: StepConfig
) -> tuple[Array, Array]:
    """Mixes images and smooths labels; plain labels stay integers."""
    if not (config.label_smoothing or config.mixup or config.cutmix):
        return x, labels
    targets = optax.smooth_labels(
        jax.nn.one_hot(labels, config.num_classes), config.label_smoothing
    )
    return mix(key, x, targets, mixup=config.mixup, cutmix=config.cutmix)


def is_expensive(primitive: Any, *_: Any, **__: Any) -> bool:
    """Tells convolutions and matrix products, as a policy of ``jax.checkpoint``."""
    return primitive.name in ("conv_general_dilated", "dot_general")


def make_train_steps(step: Callable[..., Any], *, loop: bool) -> Callable[..., Any]:
    """Makes a program of several steps in one dispatch.

    Args:
      step: from :func:`make_train_step`.
      loop: whether the program loops. False makes it one step whatever ``n`` says, for
        the CPU, where XLA runs a convolution inside a loop some 80 times slower.

    Returns:
      ``steps(state, key, n, *data) -> (state, metrics)`` with the metrics averaged over
      the steps.
    """
    if not loop:
        return lambda state, key, n, *data: step(state, key, *data)

    def steps(
        state: TrainState, key: Array, n: Int[Array, ""], *data: Any
    ) -> tuple[TrainState, dict[str, Array]]:
        def body(_: Any, carry: Any) -> Any:
            state, sums = carry
            state, metrics = step(state, key, *data)
            return state, jax.tree.map(jnp.add, sums, metrics)

        shapes = jax.eval_shape(step, state, key, *data)[1]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        state, sums = jax.lax.fori_loop(0, n, body, (state, zeros))
        return state, jax.tree.map(lambda total: total / n, sums)

    return steps


def make_eval_step(
    graphdef: nnx.GraphDef,
    config: StepConfig,
    select: Callable[..., Batch],
    axis: str | None = None,
) -> Callable[..., dict[str, Array]]:
    """Makes the evaluation step of one device.

    Args:
      graphdef: of the model, in evaluation mode.
      config: normalisation and precision.
      select: ``select(*data)`` gives this device's share of a batch.
      axis: as for :func:`make_train_step`.

    Returns:
      ``step(params, stats, *data) -> sums``: the sum of losses, the number of hits, and
      of images, over all devices.
    """

    def step(params: nnx.State, stats: nnx.State, *data: Any) -> dict[str, Array]:
        batch = select(*data)
        model = nnx.merge(graphdef, _in(config.dtype, params, stats), stats, copy=True)
        use_fast_convolutions(model)
        roll_blocks(model)
        hold_blocks(model)
        x = normalize(batch.pixels, config.mean, config.std, config.dtype)
        logits = model(x).astype(jnp.float32)
        counts = batch.labels >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.maximum(batch.labels, 0)
        )
        sums = {
            "loss": jnp.sum(losses, where=counts),
            "hits": jnp.sum(jnp.argmax(logits, -1) == batch.labels),
            "images": jnp.sum(counts),
        }
        return jax.lax.psum(sums, axis) if axis is not None else sums

    return step
