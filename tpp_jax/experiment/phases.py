"""The phases of a run: a kind, a number of steps and an optax chain each."""

import dataclasses

import numpy as np
import optax
from flax import nnx

from tpp_jax.errors import TPPError
from tpp_jax.experiment.sections import PruneConfig, ScheduleConfig, TrainingConfig
from tpp_jax.graph.nnx_layers import modules
from tpp_jax.method.orthogonality import add_orthogonality
from tpp_jax.method.rivals import add_group_lasso, add_growing_l2
from tpp_jax.method.schedule import GrowingSchedule, growing_schedule
from tpp_jax.method.transforms import add_tpp_penalties, zero_pruned
from tpp_jax.pruning.plan import Plan
from tpp_jax.training.optimizers import MOST_STEPS, learning_rate, optimizer


@dataclasses.dataclass(frozen=True)
class Phase:
    """Some training steps with one optimizer.

    Attributes:
      kind: Kind of the stage that trains it.
      steps: Number of steps.
      tx: The optimizer.
      learning_rate: Function from the step to the rate of ``tx``, for the log.
      section: Name of the config's section that the phase reads.
      fresh: Whether the optimizer starts from its initial state and not from the state
        at the end of the previous phase.
      shrinks: Whether the pruned filters shrink to zero, so that their norm is logged.
      gram: Name of the Gram matrix at the end that is kept for the report; "" for
        none.
    """

    kind: str
    steps: int
    tx: optax.GradientTransformation
    learning_rate: optax.Schedule
    section: str
    fresh: bool = True
    shrinks: bool = False
    gram: str = ""


def training_phase(
    kind: str,
    recipe: TrainingConfig,
    steps_per_epoch: int,
    model: nnx.Module | None = None,
    rounds: int = 1,
) -> Phase:
    """Returns a plain phase, ``pretrain`` or ``finetune``.

    Args:
      kind: Kind of the phase and name of its section of the config.
      recipe: That section of the config.
      steps_per_epoch: Number of steps in an epoch of the data.
      model: Network whose layers have the strides that a penalty on convolutions needs.
      rounds: Number of rounds that share the steps equally. Each runs through the
        complete schedule of the learning rate, faster by this factor.

    Raises:
      TPPError: The learning rate cannot be read, the warm-up is longer than the phase,
        the optimizer is unknown, or there are fewer steps than rounds.
    """
    rate = learning_rate(
        recipe.learning_rate,
        steps_per_epoch,
        schedule=recipe.schedule,
        epochs=recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
    )
    steps = recipe.epochs * steps_per_epoch
    if 0 < steps < rounds:
        raise TPPError(
            f"config.prune.rounds is {rounds}, but {kind} has only {steps} steps for "
            "all rounds together: set fewer rounds or more epochs"
        )
    if rounds > 1:
        rate = _faster(rate, rounds)
    tx = optimizer(
        recipe.optimizer,
        rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        decay_norms=recipe.decay_norms,
    )
    if recipe.orthogonality:
        weight = recipe.orthogonality_weight
        tx = optax.chain(*_orthogonal(recipe.orthogonality, weight, model), tx)
    return Phase(kind, steps // rounds, tx, rate, section=kind)


def _faster(rate: optax.Schedule, times: int) -> optax.Schedule:
    return lambda step: rate(step * times)


def _orthogonal(
    penalty: str, weight: float, model: nnx.Module | None
) -> list[optax.GradientTransformation]:
    """Returns KernOrth, or OrthConv with the stride of each layer.

    Grouped convolutions are left out, since their filters have different input
    channels. OrthConv also leaves out the first convolution, as in the original.
    """
    if model is None:
        raise ValueError("a penalty of orthogonality needs the model")
    layers: dict[str, int] = {}
    for path, module in modules(model):
        if isinstance(module, nnx.Conv):
            if module.feature_group_count == 1:
                layers[path] = max(np.atleast_1d(module.strides or 1))
        elif isinstance(module, nnx.Linear):
            layers[path] = 1
    if penalty == "kernel":
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


def strength_schedule(fields: ScheduleConfig) -> GrowingSchedule:
    """Returns the schedule of the penalties' strength.

    Args:
      fields: Section ``prune.schedule`` of the config.
    """
    schedule = growing_schedule(
        fields.kind,
        fields.granularity,
        fields.every,
        fields.ceiling,
        stabilize=fields.stabilize,
        zero_out_every=fields.zero_out_every,
        regularize_steps=fields.regularize_steps or None,
    )
    return _countable(schedule, "config.prune.schedule")


def _countable(schedule: GrowingSchedule, fields: str) -> GrowingSchedule:
    if schedule.total_steps > MOST_STEPS:
        raise TPPError(
            f"{fields} has {schedule.total_steps} steps, more than the {MOST_STEPS:,} "
            "that can be counted: make it shorter"
        )
    return schedule


def tpp_phases(
    prune: PruneConfig, plan: Plan, schedule: GrowingSchedule
) -> tuple[Phase, ...]:
    """Returns ``regularize`` and ``stabilize``, which share an optimizer and a program.

    Args:
      prune: Section ``prune`` of the config.
      plan: Plan whose pruned filters shrink to zero.
      schedule: Schedule of the strength.

    Raises:
      TPPError: Stabilization ends before the zero-out of the last layer.
    """
    penalty = add_tpp_penalties(
        plan,
        schedule,
        prune.gram_weight,
        prune.bn,
        prune.l2,
        prune.target,
        prune.kept_weight,
        prune.strengths,
        prune.gram_every,
    )
    tx = optax.chain(_descent(prune, penalty), zero_pruned(plan, schedule))
    rate = optax.constant_schedule(prune.learning_rate)
    regularize = Phase(
        "regularize", schedule.regularize_steps, tx, rate, section="prune", shrinks=True
    )
    stabilize = dataclasses.replace(
        regularize,
        kind="stabilize",
        steps=schedule.total_steps - regularize.steps,
        fresh=False,
        gram="regularized",
    )
    return regularize, stabilize


def extra_phase(
    prune: PruneConfig, plan: Plan, schedule: GrowingSchedule
) -> tuple[Phase, ...]:
    """Returns ``extra``: as many plain steps as TPP regularizes and stabilizes.

    Args:
      prune: Section ``prune`` of the config, with the learning rate, momentum and
        weight decay of TPP's steps.
      plan: Plan, which is not used.
      schedule: Schedule of TPP's strength.
    """
    del plan
    return (_penalized("extra", schedule.total_steps, prune),)


def growing_l2_phase(
    prune: PruneConfig, plan: Plan, schedule: GrowingSchedule
) -> tuple[Phase, ...]:
    """Returns ``grow`` of GReg-2: L2 of growing strength on all filters.

    Args:
      prune: Section ``prune`` of the config.
      plan: Plan whose pruned groups are penalized, including their kept filters.
      schedule: Schedule of TPP's strength, which is not used.

    Raises:
      TPPError: A value of ``prune.grow`` is out of range.
    """
    del schedule
    fields = prune.grow
    growth = growing_schedule(
        "linear", fields.granularity, fields.every, fields.ceiling
    )
    _countable(growth, "config.prune.grow")
    penalty = add_growing_l2(plan, growth)
    return (_penalized("grow", growth.regularize_steps, prune, penalty),)


def group_lasso_phase(
    prune: PruneConfig, plan: Plan, schedule: GrowingSchedule
) -> tuple[Phase, ...]:
    """Returns ``grow`` of the group lasso: a constant pull on the norms of all filters.

    Args:
      prune: Section ``prune`` of the config.
      plan: Plan whose pruned groups are penalized, including their kept filters.
      schedule: Schedule of TPP's strength; its length is that of the phase unless the
        config sets one.
    """
    steps = prune.grow.steps or schedule.total_steps
    penalty = add_group_lasso(plan, prune.grow.weight)
    return (_penalized("grow", steps, prune, penalty),)


def _penalized(
    kind: str, steps: int, prune: PruneConfig, *penalties: optax.GradientTransformation
) -> Phase:
    """Returns a phase with TPP's optimizer and some penalties."""
    tx = _descent(prune, *penalties)
    rate = optax.constant_schedule(prune.learning_rate)
    return Phase(kind, steps, tx, rate, section="prune")


def _descent(
    prune: PruneConfig, *penalties: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Returns the optimizer with TPP's constants and some penalties."""
    return optimizer(
        prune.optimizer,
        prune.learning_rate,
        momentum=prune.momentum,
        weight_decay=prune.weight_decay,
        penalty=optax.chain(*penalties) if penalties else None,
    )
