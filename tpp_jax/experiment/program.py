"""The training steps of a phase, compiled, and how a run takes them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from tpp_jax.experiment.phases import Phase
from tpp_jax.experiment.setup import Setup
from tpp_jax.pruning.plan import Plan
from tpp_jax.training import parallel
from tpp_jax.training.step import (
    TrainState,
    graphdef_of,
    make_train_step,
    make_train_steps,
)
from tpp_jax.training.task import Feed

Kept = dict[str, Any]
Result = tuple[TrainState, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Program:
    """Steps of a phase, and what it takes to join them with those of other runs.

    Attributes:
      tx: Optimizer that the steps use.
      steps: Compiled function ``(state, key, n, *data) -> (state, metrics)``, see
        :func:`tpp_jax.training.step.make_train_steps`.
      at_once: Largest number of steps in one dispatch.
      likeness: Value that is equal for runs whose steps differ in arguments and plan
        only; None for steps that cannot be joined.
      steps_of: Function from kept indices to steps for one device, to be traced with
        any of their counts.
      compile: Function that compiles a function for one device, given the index of the
        argument to donate.
      unroll: Whether joined steps follow each other, and are not one step of batched
        operations, which are slow on the CPU.
      kept: Indices that the plan keeps, by group.
    """

    tx: optax.GradientTransformation
    steps: Callable[..., Result]
    at_once: int
    likeness: Any
    steps_of: Callable[[Kept], Callable[..., Result]]
    compile: Callable[..., Callable[..., Any]]
    unroll: bool
    kept: Kept


Take = Callable[[Program, tuple[Any, ...], int], Result]
"""Takes steps: ``take(program, arguments, left) -> (state, metrics)``. ``left`` is the
number of steps of the run that are still to be done."""


def alone(program: Program, arguments: tuple[Any, ...], left: int) -> Result:
    """Takes the steps of a run by themselves."""
    del left
    return program.steps(*arguments)


def make_program(
    phase: Phase,
    model: nnx.Module,
    plan: Plan,
    setup: Setup,
    feed: Feed,
) -> Program:
    """Returns the program of a phase.

    Args:
      phase: The phase.
      model: The network; its structure counts.
      plan: Plan of the phase's optimizer.
      setup: Setup of the run.
      feed: Source of the batches.
    """
    config, devices = setup.config, setup.devices
    on_cpu = jax.default_backend() == "cpu"
    at_once = config.steps_per_dispatch or (1 if on_cpu else feed.at_once)
    at_once = min(at_once, feed.at_once)
    graphdef = graphdef_of(model, training=True)
    step_config, loss = setup.step_config(phase.part), setup.task(phase.part).loss

    def steps_of(tx: optax.GradientTransformation) -> Callable[..., Any]:
        axis = parallel.axis_name(devices)
        select = feed.train_batch
        step = make_train_step(graphdef, tx, loss, step_config, select, axis)
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
