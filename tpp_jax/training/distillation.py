"""Distillation: a network learns from the outputs of another one, its teacher."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from tpp_jax.errors import TPPError
from tpp_jax.training.task import Batch, Loss, Metrics


class Teacher(NamedTuple):
    """How a step distils; the arrays of the teacher are part of the step's state.

    Attributes:
      graphdef: Structure of the teacher, in evaluation mode.
      weight: Share of the distillation in the loss, from 0 to 1.
      temperature: Temperature of the softened outputs.
    """

    graphdef: nnx.GraphDef
    weight: float
    temperature: float


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


def distilled(
    loss: Loss, teacher: nnx.Module, weight: float, temperature: float
) -> Loss:
    """Returns a task's loss with a share of distillation.

    The teacher gets the inputs that the loss gives to the network, which may be
    augmented or mixed.

    Args:
      loss: Loss of a task, which calls the model.
      teacher: Teacher with its arrays, in evaluation mode.
      weight: Share of the distillation.
      temperature: Temperature of the softened outputs.

    Returns:
      A loss of the same arguments, ``(1 - weight) · loss + weight · distillation``. Its
      metrics have the entry ``distillation`` too.
    """

    def fn(
        model: nnx.Module, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        pupil: Any = _Observed(model)
        value, metrics = loss(pupil, batch, key)
        own = _mean_distance(pupil.calls, teacher, temperature)
        return (1 - weight) * value + weight * own, {**metrics, "distillation": own}

    return fn


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


def _mean_distance(
    calls: list[tuple[Any, Any, Any]], teacher: Any, temperature: float
) -> Float[Array, ""]:
    """Returns the mean distillation loss of some calls."""
    if not calls:
        raise TPPError(
            "the loss of the task never calls the model as a function, so there are no "
            "outputs to distil: set config.finetune.distillation.weight to 0"
        )
    total = jnp.zeros(())
    for args, kwargs, outputs in calls:
        targets = jax.lax.stop_gradient(teacher(*args, **kwargs))
        ours, theirs = (getattr(x, "shape", ()) for x in (outputs, targets))
        if len(ours) < 2 or ours != theirs:
            raise TPPError(
                f"the outputs of the network and its teacher have the shapes {ours} "
                f"and {theirs}, but distillation needs the same logits of both, with "
                "the classes along the last of two or more axes: set "
                "config.finetune.distillation.weight to 0"
            )
        total += distillation_loss(outputs, targets, temperature)
    return total / len(calls)
