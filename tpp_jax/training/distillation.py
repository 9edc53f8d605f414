"""Distillation: a network learns from the outputs of another one, its teacher."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from tpp_jax.errors import TPPError
from tpp_jax.training.feeds import Taught
from tpp_jax.training.structure import Structure
from tpp_jax.training.task import Batch, Loss, Metrics
from tpp_jax.training.watching import Outputs, pairs, watch


class Teacher(NamedTuple):
    """How a step distils; the arrays of the teacher are part of the step's state.

    Attributes:
      structure: Structure of the teacher, in evaluation mode.
      weight: Share of the distillation in the loss, from 0 to 1.
      temperature: Temperature of the softened outputs.
      activations: Patterns of the layers whose outputs are distilled too.
      activation_weight: Factor of that part of the loss.
    """

    structure: Structure
    weight: float
    temperature: float
    activations: str = ""
    activation_weight: float = 1.0


def distillation_loss(
    outputs: Float[Array, "*batch n"],
    targets: Float[Array, "*batch n"],
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """Returns T² · KL(softmax(targets/T) ‖ softmax(outputs/T)), the mean of all rows.

    The factor T² makes the size of its gradient nearly independent of T.

    Args:
      outputs: Logits of the network that learns.
      targets: Logits of the teacher.
      temperature: Temperature T.

    References:
      Hinton et al. 2015, "Distilling the knowledge in a neural network".

    Example:
      >>> logits = jnp.array([[1.0, 2.0]])
      >>> float(distillation_loss(logits, logits + 3.0, temperature=2.0))
      0.0
    """
    ours = jax.nn.log_softmax(outputs.astype(jnp.float32) / temperature)
    theirs = jax.nn.log_softmax(targets.astype(jnp.float32) / temperature)
    rows = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
    return temperature**2 * rows.mean()


def activation_loss(ours: Outputs, theirs: Outputs) -> Float[Array, ""]:
    """Returns ‖h − t‖² / ‖t‖² for outputs h and those of the teacher t, a mean.

    Args:
      ours: Outputs of the layers of the network that learns.
      theirs: Outputs of the same layers of the teacher.

    Raises:
      TPPError: If their shapes differ, or no layer was called.

    References:
      Romero et al. 2015, "FitNets: hints for thin deep nets", equation 3, relative.
    """
    distances = []
    for _, output, target in pairs(ours, theirs):
        target = jax.lax.stop_gradient(target).astype(jnp.float32)
        size = jnp.sum(jnp.square(target))
        distance = jnp.sum(jnp.square(output.astype(jnp.float32) - target))
        distances.append(distance / jnp.maximum(size, jnp.finfo(jnp.float32).tiny))
    if not distances:
        raise TPPError("the network calls none of the layers of distilled activations")
    return jnp.stack(distances).mean()


def distilled(
    loss: Loss,
    teacher: nnx.Module,
    weight: float,
    temperature: float,
    activations: str = "",
    activation_weight: float = 1.0,
) -> Loss:
    """Returns a task's loss with a share of distillation.

    The teacher gets the inputs that the loss gives to the network, which may be
    augmented or mixed.

    Args:
      loss: Loss of a task, which calls the model.
      teacher: Teacher with its arrays, in evaluation mode; modified if activations are
        distilled.
      weight: Share of the distillation.
      temperature: Temperature of the softened outputs.
      activations: Patterns of the layers whose outputs are distilled, separated by
        commas; empty for none.
      activation_weight: Factor of that part.

    Returns:
      A loss of the same arguments, ``(1 - weight) · loss + weight · distillation +
      activation_weight · activations``. Its metrics have the entries ``distillation``
      and, if there are any, ``activations`` too.
    """
    theirs = watch(teacher, activations)

    def fn(
        model: nnx.Module, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        ours, pupil = watch(model, activations), _Observed(model)
        for kept in theirs.values():  # of another part of the batch
            kept.clear()
        value, metrics = loss(cast(Any, pupil), batch, key)
        targets = _targets(pupil.calls, teacher)
        total = (1 - weight) * value
        if weight or not activations:
            outputs = [output for _, _, output in pupil.calls]
            own = _mean_distance(outputs, targets, temperature)
            total, metrics = total + weight * own, {**metrics, "distillation": own}
        if activations:
            metrics["activations"] = activation_loss(ours, theirs)
            total += activation_weight * metrics["activations"]
        return total, metrics

    return fn


def distilled_from_outputs(loss: Loss, weight: float, temperature: float) -> Loss:
    """Returns a task's loss with a share of distillation from outputs in the batch.

    Args:
      loss: Loss of a task, which calls the model once.
      weight: Share of the distillation.
      temperature: Temperature of the softened outputs.

    Returns:
      A loss of batches :class:`tpp_jax.training.feeds.Taught`, as :func:`distilled`.
    """

    def fn(
        model: nnx.Module, batch: Taught, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        pupil = _Observed(model)
        value, metrics = loss(cast(Any, pupil), batch.examples, key)
        outputs = [output for _, _, output in pupil.calls]
        own = _mean_distance(outputs, [batch.outputs], temperature)
        return (1 - weight) * value + weight * own, {**metrics, "distillation": own}

    return fn


def output_of(loss: Loss, model: nnx.Module, batch: Batch) -> Array:
    """Returns what a model returns where a loss calls it.

    Args:
      loss: Loss of a task, which calls the model once.
      model: Network in evaluation mode.
      batch: Batch.

    Raises:
      TPPError: The loss calls the model never, or more than once.
    """
    seen = _Observed(model)
    loss(cast(Any, seen), batch, jax.random.key(0))
    if len(seen.calls) != 1:
        raise TPPError(
            f"the loss of the task calls the model {len(seen.calls)} times, but one "
            "call's outputs are distilled: set config.finetune.distillation.weight to 0"
        )
    return seen.calls[0][2]


class _Observed:
    """A network that keeps the inputs and outputs of its calls."""

    def __init__(self, model: nnx.Module) -> None:
        self._model: Any = model
        self.calls: list[tuple[Any, Any, Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self._model(*args, **kwargs)
        self.calls.append((args, kwargs, outputs))
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _targets(calls: list[tuple[Any, Any, Any]], teacher: Any) -> list[Any]:
    """Returns what the teacher returns for some calls."""
    if not calls:
        raise TPPError(
            "the loss of the task never calls the model as a function, so there are no "
            "outputs to distil: set config.finetune.distillation.weight to 0"
        )
    return [
        jax.lax.stop_gradient(teacher(*args, **kwargs)) for args, kwargs, _ in calls
    ]


def _mean_distance(
    outputs: list[Any], targets: list[Any], temperature: float
) -> Float[Array, ""]:
    """Returns the mean distillation loss of the outputs of some calls."""
    total = jnp.zeros(())
    for output, target in zip(outputs, targets, strict=True):
        ours, theirs = (getattr(x, "shape", ()) for x in (output, target))
        if len(ours) < 2 or ours != theirs:
            raise TPPError(
                f"the outputs of the network and its teacher have the shapes {ours} "
                f"and {theirs}, but distillation needs the same logits of both, with "
                "the classes along the last of two or more axes: set "
                "config.finetune.distillation.weight to 0"
            )
        total += distillation_loss(output, target, temperature)
    return total / len(outputs)
