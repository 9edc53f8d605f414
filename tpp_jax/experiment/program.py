"""The compiled training steps of a phase, and the functions that run them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from flax import nnx

from tpp_jax.experiment.phases import Phase
from tpp_jax.experiment.setup import Setup
from tpp_jax.pruning.plan import Plan
from tpp_jax.training import parallel
from tpp_jax.training.distillation import Teacher, distilled_from_outputs
from tpp_jax.training.feeds import TaughtResident
from tpp_jax.training.step import (
    TrainState,
    make_train_step,
    make_train_steps,
)
from tpp_jax.training.structure import structure_of
from tpp_jax.training.task import Feed

Kept = Mapping[str, Any]
"""Indices that a plan keeps, by group."""

Outcome = tuple[TrainState, dict[str, Any]]
"""State after some steps, and their mean metrics."""


@dataclasses.dataclass(frozen=True)
class Program:
    """Steps of a phase, which can be joined with the steps of other runs.

    Attributes:
      tx: Optimizer that the steps use.
      steps: Compiled function ``(state, key, n, *data) -> (state, metrics)``, see
        :func:`tpp_jax.training.step.make_train_steps`.
      at_once: Largest number of steps in one dispatch.
      likeness: Value that is equal for runs whose steps differ only in arguments and
        plan; None for steps that cannot be joined.
      steps_of: Function from kept indices, of any number, to uncompiled steps for one
        device.
      compile: Function that compiles a function for one device, given the index of the
        argument to donate.
      unroll: Whether joined steps run in sequence and not as one step of batched
        operations, which is slow on the CPU.
      kept: Indices that the phase's plan keeps, by group.
    """

    tx: optax.GradientTransformation
    steps: Callable[..., Outcome]
    at_once: int
    likeness: Any
    steps_of: Callable[[Kept], Callable[..., Outcome]]
    compile: Callable[..., Callable[..., Any]]
    unroll: bool
    kept: Kept


Take = Callable[[Program, tuple[Any, ...], int], Outcome]
"""Runs steps: ``take(program, arguments, left) -> (state, metrics)``. ``left`` is the
number of steps that remain in the run."""


def alone(program: Program, arguments: tuple[Any, ...], left: int) -> Outcome:
    """Runs the steps of a single run."""
    del left
    return program.steps(*arguments)


def make_program(
    phase: Phase,
    model: nnx.Module,
    plan: Plan,
    setup: Setup,
    feed: Feed,
    teacher: nnx.Module | None = None,
) -> Program:
    """Returns the program of a phase.

    Args:
      phase: Phase to train.
      model: Network, of which only the structure is used.
      plan: Plan of the phase's optimizer.
      setup: Setup of the run.
      feed: Source of the batches.
      teacher: Network to distil in the step, of which only the structure is used; None
        for none, or if the batches have its outputs.
    """
    config, devices = setup.config, setup.devices
    on_cpu = jax.default_backend() == "cpu"
    at_once = config.steps_per_dispatch or (1 if on_cpu else feed.at_once)
    at_once = min(at_once, feed.at_once)
    structure = structure_of(model, training=True)
    step_config, loss = setup.step_config(phase.section), setup.task(phase.section).loss
    taught, distillation = None, config.finetune.distillation
    if isinstance(feed, TaughtResident):
        loss = distilled_from_outputs(
            loss, distillation.weight, distillation.temperature
        )
    elif teacher is not None:
        taught = Teacher(
            structure_of(teacher, training=False),
            distillation.weight,
            distillation.temperature,
            distillation.activations,
            distillation.activation_weight,
        )

    def steps_of(tx: optax.GradientTransformation) -> Callable[..., Any]:
        axis = parallel.axis_name(devices)
        select = feed.train_batch
        step = make_train_step(structure, tx, loss, step_config, select, axis, taught)
        return make_train_steps(step, loop=at_once > 1)

    on_devices = functools.partial(
        parallel.on_devices,
        devices=devices,
        accumulate=config.accumulate,
        api=config.parallel,
    )
    return Program(
        tx=phase.tx,
        steps=on_devices(steps_of(phase.tx), donate=0, split=3 if feed.split else None),
        at_once=at_once,
        likeness=None if feed.split else setup.likeness(phase),
        steps_of=lambda kept: steps_of(
            setup.phases(Plan(kept, plan.groups))[phase.kind].tx
        ),
        compile=on_devices,
        unroll=on_cpu,
        kept=plan.kept,
    )
