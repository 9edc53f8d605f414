"""Learning-rate schedules and optimizer chains, from config fields to optax."""

import math

import optax

from tpp_jax.errors import TPPError


def learning_rate(
    text: str, steps_per_epoch: int, *, kind: str = "step", epochs: int = 0
) -> optax.Schedule:
    """Reads a learning-rate schedule over the steps of a phase.

    Args:
      text: ``"0:0.1,100:0.01"``, epoch:rate pairs as in the original; or one number.
      steps_per_epoch: turns epochs into steps.
      kind: ``"step"``: constant between the given epochs; ``"cosine"``: from zero up to
        the one given rate over the first tenth, then down along a cosine to zero.
      epochs: length of the phase, for the cosine.

    Returns:
      step → rate.

    Raises:
      TPPError: text that cannot be read, epochs that do not start at 0 and ascend, a
        cosine with more than one rate.

    Example:
      >>> rate = learning_rate("0:0.1,2:0.01", steps_per_epoch=10)
      >>> [round(float(rate(t)), 3) for t in (0, 19, 20)]
      [0.1, 0.1, 0.01]
    """
    text = str(text)
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
    finite = all(math.isfinite(number) for pair in stages.items() for number in pair)
    if not (finite and ascending and starts[0] == 0 and min(stages.values()) >= 0):
        raise TPPError(
            f"the learning rate {text!r} must start at epoch 0, with epochs ascending "
            "and no negative or infinite rate"
        )
    if kind == "cosine":
        if len(stages) > 1:
            raise TPPError(
                f"a cosine schedule takes one peak learning rate, not {text!r}"
            )
        steps = max(epochs * steps_per_epoch, 1)
        return optax.warmup_cosine_decay_schedule(
            0.0, stages[0.0], warmup_steps=steps // 10, decay_steps=steps
        )
    if kind != "step":
        raise TPPError(
            f"unknown learning-rate schedule {kind!r}: choose 'step' or 'cosine'"
        )
    return optax.join_schedules(
        [optax.constant_schedule(rate) for rate in stages.values()],
        [round(epoch * steps_per_epoch) for epoch in starts[1:]],
    )


def sgd(
    rate: optax.Schedule | float, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """SGD in PyTorch's order: decay joins the gradient, then momentum, then rate."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum=momentum)
    )
