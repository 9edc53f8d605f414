"""Learning-rate schedules and optimizers."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tpp_jax.errors import TPPError

SCHEDULES = ("step", "cosine")
OPTIMIZERS = ("sgd", "adamw", "lamb")
ORTHOGONALITY = ("", "kernel", "convolution")
MOST_STEPS = 2**31 - 1
"""Largest number of steps: optax counts them in 32 bits."""

_LARGEST = float(np.finfo(np.float32).max)  # rates are computed in float32


def learning_rate(
    text: str | float,
    steps_per_epoch: int,
    *,
    schedule: str = "step",
    epochs: int = 0,
    warmup_epochs: float = 0.0,
) -> optax.Schedule:
    """Reads a learning-rate schedule over the steps of a phase.

    Args:
      text: Pairs of epoch and rate as in the original, ``"0:0.1,100:0.01"``; or one
        number.
      steps_per_epoch: Number of steps in an epoch.
      schedule: Name of the schedule: ``"step"`` is constant between the given epochs;
        ``"cosine"`` falls from the one given rate along a cosine to zero at the end of
        the phase.
      epochs: Length of the phase in epochs, for the cosine.
      warmup_epochs: Length in epochs of a linear rise from zero to the first rate,
        which replaces the beginning of the schedule; later epochs do not move.

    Returns:
      The rate as a function of the step.

    Raises:
      TPPError: The text cannot be read, the epochs do not ascend from 0, a cosine has
        more than one rate, or the warm-up is too long.

    Example:
      >>> rate = learning_rate("0:0.1,2:0.01", steps_per_epoch=10, warmup_epochs=1)
      >>> [round(float(rate(t)), 3) for t in (0, 5, 10, 19, 20)]
      [0.0, 0.05, 0.1, 0.1, 0.01]
    """
    if schedule not in SCHEDULES:
        choices = " or ".join(map(repr, SCHEDULES))
        raise TPPError(f"unknown learning-rate schedule {schedule!r}: choose {choices}")
    stages = _stages(str(text))
    peak, *later = stages.values()
    boundaries = [round(epoch * steps_per_epoch) for epoch in list(stages)[1:]]
    warmup = round(warmup_epochs * steps_per_epoch)
    total = epochs * steps_per_epoch
    if max([total, warmup, *boundaries]) > MOST_STEPS:
        raise TPPError(
            f"a phase of {epochs} epochs with the learning rate {text!r} and "
            f"warmup_epochs={warmup_epochs} has more than the {MOST_STEPS:,} steps "
            "that can be counted: make it shorter"
        )
    if schedule == "cosine" and later:
        raise TPPError(f"a cosine schedule has one peak learning rate, not {text!r}")
    end = boundaries[0] if boundaries else total or math.inf  # no epochs: never run
    if warmup >= end:
        raise TPPError(
            f"warmup_epochs is {warmup_epochs}, but the learning rate {text!r} of a "
            f"phase of {epochs} epochs falls before the warm-up ends: make it shorter"
        )
    if schedule == "cosine":
        steps = max(total, warmup + 1)
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)
    return _stepwise([peak, *later], boundaries, warmup)


def _stepwise(
    rates: Sequence[float], boundaries: Sequence[int], warmup: int
) -> optax.Schedule:
    """Returns a schedule of constant rates between boundaries, after a warm-up."""
    schedules = [optax.constant_schedule(rate) for rate in rates]
    if warmup:
        schedules = [optax.linear_schedule(0.0, rates[0], warmup), *schedules]
        boundaries = [warmup, *boundaries]
    return optax.join_schedules(schedules, boundaries)


def _stages(text: str) -> dict[float, float]:
    """Reads ``"0:0.1,100:0.01"`` or ``"0.1"`` as the rate from each epoch on."""
    try:
        pairs = [
            part.split(":")
            for part in (text if ":" in text else f"0:{text}").split(",")
        ]
        stages = {float(epoch): float(rate) for epoch, rate in pairs}
    except ValueError:
        raise TPPError(
            f"cannot read the learning rate {text!r}: write one number, or epoch:rate "
            "pairs as in '0:0.1,100:0.01,150:0.001'"
        ) from None
    starts = list(stages)
    ascending = starts == sorted(starts) and len(starts) == len(pairs)
    finite = all(x <= _LARGEST for pair in stages.items() for x in pair)
    if not (finite and ascending and starts[0] == 0 and min(stages.values()) >= 0):
        raise TPPError(
            f"the learning rate {text!r} must start at epoch 0, with epochs ascending "
            "and no negative or infinite rate"
        )
    return stages


def optimizer(
    name: str,
    rate: optax.Schedule | float,
    *,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
    decay_norms: bool = True,
    penalty: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """Returns an optimizer by name.

    Penalties such as :func:`tpp_jax.add_tpp_penalties` are added to the gradient for
    SGD, as in the original. AdamW and LAMB divide a gradient by its own size: a penalty
    in it that grows would soon be all that is left, as steps of constant length. So
    theirs are added behind the moments, where weight decay is. With AdamW, a strength λ
    then shrinks a weight by the share rate · λ in each step.

    Args:
      name: ``"sgd"``, ``"adamw"`` or ``"lamb"``.
      rate: Rate as a function of the step, or one rate.
      momentum: Momentum of SGD; β₁ of the others, whose β₂ is 0.999.
      weight_decay: Weight decay.
      nesterov: Whether the momentum of SGD is Nesterov's.
      decay_norms: Whether parameters with one axis, which are biases and the scales of
        norms, decay too.
      penalty: Transform that adds the gradients of penalties; None for none.

    Raises:
      TPPError: The optimizer is unknown.

    Example:
      >>> tx = optimizer("lamb", 1e-3, momentum=0.9, weight_decay=0.02)
    """
    mask = None if decay_norms else _has_several_axes
    match name:
        case "sgd":
            tx = sgd(rate, momentum, weight_decay, nesterov=nesterov, mask=mask)
            return tx if penalty is None else optax.chain(penalty, tx)
        case "adamw":
            moments, trust = optax.scale_by_adam(b1=momentum), ()
        case "lamb":
            moments = optax.scale_by_adam(b1=momentum, eps=1e-6)
            trust = (optax.scale_by_trust_ratio(),)
        case _:
            raise TPPError(
                f"unknown optimizer {name!r}: choose "
                f"{' or '.join(map(repr, OPTIMIZERS))}"
            )
    return optax.chain(
        moments,
        *(() if penalty is None else (penalty,)),
        optax.add_decayed_weights(weight_decay, mask),
        *trust,
        optax.scale_by_learning_rate(rate),
    )


def sgd(
    rate: optax.Schedule | float,
    momentum: float,
    weight_decay: float,
    *,
    nesterov: bool = False,
    mask: Any = None,
) -> optax.GradientTransformation:
    """Returns SGD in PyTorch's order: weight decay, then momentum, then the rate.

    Args:
      rate: Rate as a function of the step, or one rate.
      momentum: Share of the last step's velocity that is kept.
      weight_decay: Factor by which each parameter is added to its gradient.
      nesterov: Whether momentum is Nesterov's.
      mask: Function from the parameters to a tree of booleans, True for those that
        decay; None for all.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask),
        optax.sgd(rate, momentum=momentum, nesterov=nesterov),
    )


def _has_several_axes(params: Any) -> Any:
    return jax.tree.map(lambda array: jnp.ndim(array) > 1, params)
