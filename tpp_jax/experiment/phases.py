"""The phases of a run: each a name, a number of steps and an optax chain."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from tpp_jax.errors import TPPError
from tpp_jax.graph.nnx_layers import modules
from tpp_jax.method.orthogonality import OrthogonalityState, add_orthogonality
from tpp_jax.method.rivals import (
    GroupLassoState,
    GrowingState,
    add_group_lasso,
    add_growing_l2,
)
from tpp_jax.method.schedule import GrowingSchedule, growing_schedule
from tpp_jax.method.transforms import TPPState, add_tpp_penalties, zero_pruned
from tpp_jax.pruning.plan import Plan
from tpp_jax.training.optimizers import (
    MOST_STEPS,
    learning_rate,
    optimizer,
    sgd,
)


class Phase(NamedTuple):
    """A stretch of training.

    Attributes:
      kind: what it is, a word of :data:`tpp_jax.experiment.methods.METHODS`.
      steps: how long it is.
      tx: the optimizer.
      learning_rate: step → rate, as ``tx`` has it; to be logged.
      fresh: whether the optimizer starts anew, or carries on from the phase before.
    """

    kind: str
    steps: int
    tx: optax.GradientTransformation
    learning_rate: optax.Schedule
    fresh: bool = True


def training_phase(
    kind: str,
    config: Any,
    steps_per_epoch: int,
    model: nnx.Module | None = None,
    rounds: int = 1,
) -> Phase:
    """Returns a plain phase, ``pretrain`` or ``finetune``.

    Args:
      kind: which.
      config: its part of the config.
      steps_per_epoch: of the data.
      model: for the strides of its layers, which a penalty on convolutions asks for.
      rounds: into which its steps are divided; each goes through the whole schedule of
        the learning rate, that much faster.

    Raises:
      TPPError: a learning rate that cannot be read, a warm-up longer than the phase, an
        unknown optimizer.
    """
    rate = learning_rate(
        config.learning_rate,
        steps_per_epoch,
        kind=config.schedule,
        epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
    )
    steps = config.epochs * steps_per_epoch
    if 0 < steps < rounds:
        raise TPPError(
            f"config.prune.rounds is {rounds}, but {kind} has only {steps} steps to "
            "divide among them: take fewer rounds, or more epochs"
        )
    if rounds > 1:
        rate = _faster(rate, rounds)
    tx = optimizer(config, rate)
    if config.orthogonality:
        weight = config.orthogonality_weight
        tx = optax.chain(*_orthogonal(config.orthogonality, weight, model), tx)
    return Phase(kind, steps // rounds, tx, rate)


def _faster(rate: optax.Schedule, times: int) -> optax.Schedule:
    return lambda step: rate(step * times)


def _orthogonal(
    kind: str, weight: float, model: nnx.Module
) -> list[optax.GradientTransformation]:
    """Returns KernOrth, or OrthConv with each layer's own stride.

    Grouped convolutions have no matrix of filters that all see the same channels, and
    are left out. So is, by OrthConv, the first convolution, as in the original.
    """
    layers: dict[str, int] = {}
    for path, module in modules(model):
        if isinstance(module, nnx.Conv):
            if module.feature_group_count == 1:
                layers[path] = max(np.atleast_1d(module.strides or 1))
        elif isinstance(module, nnx.Linear):
            layers[path] = 1
    if kind == "kernel":
        return [add_orthogonality(weight, "kernorth", layers=list(layers))]
    convolutions = [path for path, m in modules(model) if isinstance(m, nnx.Conv)]
    for path in convolutions[:1]:
        layers.pop(path, None)
    by_stride = {
        stride: [path for path, own in layers.items() if own == stride]
        for stride in sorted(set(layers.values()))
    }
    return [
        add_orthogonality(weight, "orthconv", layers=paths, stride=stride)
        for stride, paths in by_stride.items()
    ]


def strength_schedule(config: Any) -> GrowingSchedule:
    """Returns the schedule of the penalties from ``config.prune.schedule``."""
    fields = config.to_dict()
    fields["regularize_steps"] = fields["regularize_steps"] or None
    return _countable(growing_schedule(**fields), "config.prune.schedule")


def _countable(schedule: GrowingSchedule, fields: str) -> GrowingSchedule:
    if schedule.total_steps > MOST_STEPS:
        raise TPPError(
            f"{fields} has {schedule.total_steps} steps, more than the {MOST_STEPS:,} "
            "that are counted: make it shorter"
        )
    return schedule


def tpp_phases(
    config: Any, plan: Plan, schedule: GrowingSchedule
) -> tuple[Phase, Phase]:
    """Returns ``regularize`` and ``stabilize``: one optimizer, so one compiled step.

    Args:
      config: the run's ``prune`` part.
      plan: what is pruned.
      schedule: of the strength.

    Raises:
      TPPError: stabilizing ends before the last layer's zero-out.
    """
    tx = optax.chain(
        add_tpp_penalties(
            plan,
            schedule,
            config.gram_weight,
            config.bn,
            config.l2,
            config.target,
            config.kept_weight,
        ),
        sgd(config.learning_rate, config.momentum, config.weight_decay),
        zero_pruned(plan, schedule),
    )
    grow = schedule.regularize_steps
    rate = optax.constant_schedule(config.learning_rate)
    return (
        Phase("regularize", grow, tx, rate),
        Phase("stabilize", schedule.total_steps - grow, tx, rate, fresh=False),
    )


def extra_phase(config: Any, schedule: GrowingSchedule) -> Phase:
    """Returns ``extra``: as many plain steps as TPP regularizes and stabilizes for.

    Args:
      config: the run's ``prune`` part, whose learning rate, momentum and weight decay
        are those of TPP's steps.
      schedule: of TPP's strength.
    """
    tx = sgd(config.learning_rate, config.momentum, config.weight_decay)
    rate = optax.constant_schedule(config.learning_rate)
    return Phase("extra", schedule.total_steps, tx, rate)


def grow_phase(config: Any, plan: Plan, schedule: GrowingSchedule) -> Phase:
    """Returns ``grow``: all filters of the groups to be pruned are shrunk.

    Args:
      config: the run's ``prune`` part.
      plan: whose pruned groups are meant.
      schedule: of TPP's strength; as long is the group lasso unless told.

    Raises:
      TPPError: a number of GReg-2's growth is out of range.
    """
    fields = config.grow
    if config.method == "greg2":
        growth = growing_schedule(
            "linear", fields.granularity, fields.every, fields.ceiling
        )
        _countable(growth, "config.prune.grow")
        penalty, steps = add_growing_l2(plan, growth), growth.regularize_steps
    else:
        penalty = add_group_lasso(plan, fields.weight)
        steps = fields.steps or schedule.total_steps
    tx = optax.chain(
        penalty, sgd(config.learning_rate, config.momentum, config.weight_decay)
    )
    rate = optax.constant_schedule(config.learning_rate)
    return Phase("grow", steps, tx, rate)


def make_phases(
    config: Any,
    kinds: Sequence[str],
    *,
    plan: Plan,
    schedule: GrowingSchedule,
    steps_per_epoch: int,
    model: nnx.Module,
    rounds: int = 1,
) -> dict[str, Phase]:
    """Returns the phases among a run's stages, by kind.

    Args:
      config: of the run.
      kinds: of its stages.
      plan: what is pruned.
      schedule: of TPP's strength.
      steps_per_epoch: of the data.
      model: for the strides of its layers.
      rounds: of fine-tuning, which share its epochs.

    Raises:
      TPPError: a field is wrong.
    """
    found: dict[str, Phase] = {}
    for part in ("pretrain", "finetune"):
        n = rounds if part == "finetune" else 1
        found[part] = training_phase(part, config[part], steps_per_epoch, model, n)
    if "regularize" in kinds:
        for phase in tpp_phases(config.prune, plan, schedule):
            found[phase.kind] = phase
    if "extra" in kinds:
        found["extra"] = extra_phase(config.prune, schedule)
    if "grow" in kinds:
        found["grow"] = grow_phase(config.prune, plan, schedule)
    return found


def penalties_of(opt_state: Any) -> dict[str, float]:
    """Returns what the penalties in an optimizer's state have to be logged of."""
    known = TPPState, GrowingState, GroupLassoState, OrthogonalityState
    found: dict[str, float] = {}
    for state in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, known)):
        match state:
            case TPPState(strength=strength, gram=gram):
                found |= {"strength": float(strength), "gram": float(gram)}
            case GrowingState(strength=strength):
                found["strength"] = float(strength)
            case GroupLassoState(penalty=penalty):
                found["group_lasso"] = float(penalty)
            case OrthogonalityState(penalty=penalty):  # one for each stride
                before = found.get("orthogonality", 0.0)
                found["orthogonality"] = before + float(penalty)
    return found
