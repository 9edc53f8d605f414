"""The training step and the evaluation step, as pure functions for one device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from tpp_jax.data import augment, normalize
from tpp_jax.models import BatchNorm


class TrainState(NamedTuple):
    """What a training step reads and writes.

    Attributes:
      step: int32, steps done in this phase.
      params: the trainable parameters.
      stats: batch statistics.
      opt_state: the optimizer's state.
    """

    step: Int[Array, ""]
    params: nnx.State
    stats: nnx.State
    opt_state: Any


class Images(NamedTuple):
    """A split of a data set, resident on the device.

    Attributes:
      pixels: uint8 ``[n, h, w, c]``.
      labels: int32 ``[n]``; -1 marks padding that does not count.
    """

    pixels: Array
    labels: Array


class StepConfig(NamedTuple):
    """What a step is compiled for.

    Attributes:
      batch_size: images of all devices together.
      crop_padding: zero pixels around an image before its random crop.
      flip: whether images are mirrored at random.
      mean: of the pixels, in units of pixel/255, per channel.
      std: likewise.
    """

    batch_size: int
    crop_padding: int
    flip: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]


def graphdef_of(model: nnx.Module, *, training: bool) -> nnx.GraphDef:
    """Returns the structure of a model in training or evaluation mode.

    It holds no array and no shape of one: it serves the dense and the sliced network.
    """
    copy = nnx.merge(*nnx.split(model))
    copy.train() if training else copy.eval()
    return nnx.split(copy)[0]


def epoch_order(key: Array, epoch: int, n: int) -> Int[Array, " n"]:
    """Returns the order in which an epoch visits n images, a permutation."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), n)


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    config: StepConfig,
    axis: str | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """Makes the training step of one device.

    Args:
      graphdef: of the model, in training mode.
      tx: the optimizer.
      config: batch size, augmentation, normalisation.
      axis: name of the device axis that gradients, batch statistics and metrics are
        averaged over; None for a single device.

    Returns:
      ``step(state, key, order, images) -> (state, metrics)``: the batch is the next
      ``batch_size`` images of the epoch's order; metrics are ``loss`` and ``accuracy``
      (a share) of the whole batch. Augmentation draws from ``key``, the step and the
      place in the batch, so that a batch split over devices is the same batch.
    """

    def loss_fn(params: nnx.State, stats: nnx.State, x: Array, y: Array) -> Any:
        model = nnx.merge(graphdef, params, stats, copy=True)
        if axis is not None:
            for _, module in nnx.iter_modules(model):
                if isinstance(module, BatchNorm):
                    module.axis_name = axis
        logits = model(x)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        accuracy = (jnp.argmax(logits, -1) == y).mean()
        return loss, (nnx.state(model, nnx.BatchStat), accuracy)

    def step(
        state: TrainState, key: Array, order: Int[Array, " n"], images: Images
    ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        batch = config.batch_size
        steps_per_epoch = order.shape[0] // batch
        start = state.step % steps_per_epoch * batch
        keys = jax.random.split(jax.random.fold_in(key, state.step), batch)
        if axis is not None:
            local = batch // jax.lax.axis_size(axis)
            place = jax.lax.axis_index(axis) * local
            start = start + place
            keys = jax.lax.dynamic_slice_in_dim(keys, place, local)
            batch = local
        chosen = jax.lax.dynamic_slice_in_dim(order, start, batch)
        pixels = augment(
            keys,
            images.pixels[chosen],
            crop_padding=config.crop_padding,
            flip=config.flip,
        )
        x = normalize(pixels, config.mean, config.std)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (stats, accuracy)), grads = grad_fn(
            state.params, state.stats, x, images.labels[chosen]
        )
        metrics = {"loss": loss, "accuracy": accuracy}
        if axis is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, stats, opt_state), metrics

    return step


def make_train_steps(step: Callable[..., Any], *, loop: bool) -> Callable[..., Any]:
    """Makes a program of several steps in one dispatch.

    Args:
      step: from :func:`make_train_step`.
      loop: whether the program loops. False makes it one step whatever ``n`` says, for
        the CPU, where XLA runs a convolution inside a loop some 80 times slower.

    Returns:
      ``steps(state, key, order, images, n) -> (state, metrics)`` with the metrics
      averaged over the steps.
    """
    if not loop:
        return lambda state, key, order, images, n: step(state, key, order, images)

    def steps(
        state: TrainState, key: Array, order: Array, images: Images, n: Int[Array, ""]
    ) -> tuple[TrainState, dict[str, Array]]:
        def body(_: Any, carry: Any) -> Any:
            state, sums = carry
            state, metrics = step(state, key, order, images)
            return state, jax.tree.map(jnp.add, sums, metrics)

        shapes = jax.eval_shape(step, state, key, order, images)[1]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        state, sums = jax.lax.fori_loop(0, n, body, (state, zeros))
        return state, jax.tree.map(lambda total: total / n, sums)

    return steps


def make_eval_step(
    graphdef: nnx.GraphDef, config: StepConfig, axis: str | None = None
) -> Callable[..., dict[str, Array]]:
    """Makes the evaluation step of one device.

    Args:
      graphdef: of the model, in evaluation mode.
      config: batch size and normalisation.
      axis: as for :func:`make_train_step`.

    Returns:
      ``step(params, stats, images, start) -> sums``: over the ``batch_size`` images
      from ``start`` on, the sum of losses, the number of hits, and of images.
    """

    def step(
        params: nnx.State, stats: nnx.State, images: Images, start: Int[Array, ""]
    ) -> dict[str, Array]:
        batch = config.batch_size
        if axis is not None:
            batch //= jax.lax.axis_size(axis)
            start = start + jax.lax.axis_index(axis) * batch
        pixels = jax.lax.dynamic_slice_in_dim(images.pixels, start, batch)
        labels = jax.lax.dynamic_slice_in_dim(images.labels, start, batch)
        model = nnx.merge(graphdef, params, stats, copy=True)
        logits = model(normalize(pixels, config.mean, config.std))
        counts = labels >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.maximum(labels, 0)
        )
        sums = {
            "loss": jnp.sum(losses, where=counts),
            "hits": jnp.sum(jnp.argmax(logits, -1) == labels),
            "images": jnp.sum(counts),
        }
        return jax.lax.psum(sums, axis) if axis is not None else sums

    return step
