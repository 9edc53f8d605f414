"""The training loop: the stage that trains a run for one phase."""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from tpp_jax.errors import TPPError
from tpp_jax.experiment import measures
from tpp_jax.experiment.methods import Stage, logged_scalars
from tpp_jax.experiment.phases import Phase
from tpp_jax.experiment.position import Result
from tpp_jax.experiment.program import Program, make_program
from tpp_jax.experiment.records.history import means
from tpp_jax.experiment.records.stopping import Stopped
from tpp_jax.experiment.tools import Run, Tools
from tpp_jax.pruning.plan import Plan
from tpp_jax.saving import save_model
from tpp_jax.storage import processes
from tpp_jax.training import parallel
from tpp_jax.training.evaluation import teacher_outputs
from tpp_jax.training.feeds import Resident, TaughtResident
from tpp_jax.training.state import (
    arrays_of,
    initial_state,
    teacher_arrays,
    with_state,
)
from tpp_jax.training.step import TrainState
from tpp_jax.training.task import Feed

Recent = Sequence[tuple[int, Mapping[str, Any]]]
"""Number of steps and mean metrics of each dispatch that is not logged yet."""


def train(run: Run, stage: Stage, tools: Tools) -> Run:
    """Trains for one phase, from the step of the run's position on.

    Raises:
      TPPError: The loss is not finite, or a checkpoint cannot be written.
      Stopped: A signal arrived; everything is saved.
    """
    if run.position.finished(stage.name):
        return run
    phase, config = run.phases[stage.kind], tools.setup.config
    tools = dataclasses.replace(tools, feed=_feed(run, phase, tools))
    program = _program(run, phase, tools)
    run = run.but(position=run.position.within(stage.name), program=program)
    state, recent = _state(run, phase, tools), [*run.position.recent]
    key = stage.key(config.seed)
    key_on_devices = parallel.replicate(key, tools.setup.devices)
    tools.progress.phase(stage.name, phase.steps, first := run.position.step)
    started = time.monotonic() - run.position.seconds
    tools.feed.begin(key, run.position.step)
    while (done := run.position.step) < phase.steps:
        stop = _next_stop(done, phase, program, tools)
        data = tools.feed.train_data(done)
        arguments = state, key_on_devices, np.int32(stop - done), *data
        state, metrics = tools.take(program, arguments, _steps_left(run, tools))
        if done == first:
            jax.block_until_ready(metrics)
            tools.progress.compiled(stop)
        recent.append((stop - done, metrics))
        jax.block_until_ready(recent[-2:-1])  # limits the streamed batches in memory
        run = run.at(step=stop, seconds=time.monotonic() - started)
        if stop % config.log_every == 0 or stop == phase.steps:
            _log(run, phase, state, recent, tools)
            recent = []
        if stop < phase.steps:
            with tools.progress.pause():
                run = _between(run, state, recent, tools)
    return _finish(run, stage, state, started, tools)


def _program(run: Run, phase: Phase, tools: Tools) -> Program:
    if run.program is not None and run.program.tx is phase.tx:
        return run.program
    plan = run.plans[-1] if run.plans else tools.setup.plan
    teacher = _teacher(run, phase, tools)
    return make_program(phase, run.model, plan, tools.setup, tools.feed, teacher)


def _feed(run: Run, phase: Phase, tools: Tools) -> Feed:
    """Returns the feed of a phase, with its teacher's outputs if those are fixed."""
    setup, feed = tools.setup, tools.feed
    task, distillation = setup.task(phase.section), setup.config.finetune.distillation
    teacher = _teacher(run, phase, tools)
    if teacher is None or distillation.activations or not phase.steps:
        return feed
    if not isinstance(feed, Resident) or not getattr(task, "fixed_inputs", False):
        return feed
    outputs = teacher_outputs(task, feed, teacher, setup.step_config(phase.section))
    return TaughtResident(feed, outputs)


def _teacher(run: Run, phase: Phase, tools: Tools) -> nnx.Module | None:
    """Returns the network that a phase's steps distil; None if they do not.

    They do not either if the batches have its outputs.
    """
    known = isinstance(tools.feed, TaughtResident)
    return run.teacher if tools.setup.distils(phase.section) and not known else None


def _state(run: Run, phase: Phase, tools: Tools) -> TrainState:
    """Returns the state of a phase at the run's position, on the devices."""
    begun = run.position.step > 0 or not phase.fresh
    average = tools.setup.step_config(phase.section).ema > 0
    arrays = run.arrays if begun else None
    teacher, step = _teacher(run, phase, tools), run.position.step
    state = initial_state(run.model, phase.tx, average, step, arrays, teacher)
    return parallel.replicate(state, tools.setup.devices)


def _next_stop(done: int, phase: Phase, program: Program, tools: Tools) -> int:
    """Returns the step at which the next dispatch ends."""
    config = tools.setup.config
    every = config.log_every, config.eval_every, config.checkpoint_every
    every += (config.jacobian_every,) if config.jacobian_every else ()
    at_once = min(program.at_once, tools.feed.steps_left(done))
    return min(phase.steps, done + at_once, *((done // k + 1) * k for k in every))


def _steps_left(run: Run, tools: Tools) -> int:
    kinds = [stage.kind for stage in tools.setup.stages]
    steps = sum(run.phases[kind].steps for kind in kinds if kind in run.phases)
    return steps - run.position.steps_done


def _between(run: Run, state: TrainState, recent: Recent, tools: Tools) -> Run:
    """Evaluates, measures, saves and stops between two dispatches, if due."""
    config, done = tools.setup.config, run.position.step
    if done % config.eval_every == 0:
        run, _ = _evaluate(run, state, tools)
    if tools.jacobian is not None and done % config.jacobian_every == 0:
        _measure_jacobian(run, state, tools.jacobian, tools)
    # Processes seldom agree on a signal, since that needs a collective.
    agreeing = jax.process_count() == 1 or done % config.log_every == 0
    asked = processes.largest(tools.signals.asked) if agreeing else 0
    if done % config.checkpoint_every == 0 or asked:
        _check_finite(run, recent, tools)
        run = run.at(recent=tuple((n, jax.tree.map(float, x)) for n, x in recent))
        _save(run, state, tools)
    if asked:
        _stop(asked, tools)
    return run


def _finish(
    run: Run, stage: Stage, state: TrainState, started: float, tools: Tools
) -> Run:
    """Measures, records and saves the end of a phase."""
    phase, state = run.phases[stage.kind], parallel.local(state)
    with tools.progress.pause():
        run, score = _evaluate(run, state, tools)
    more = {}
    if tools.jacobian is not None:
        more["jacobian"] = _measure_jacobian(run, state, tools.jacobian, tools)
    if phase.gram:
        tools.keep_gram(run, phase.gram, with_state(run.model, state))
    seconds, best = time.monotonic() - started, run.position.best
    best = score if best is None else best
    result = Result(stage.name, phase.steps, seconds, score, best, more)
    tools.feed.close()
    # The next stage starts from the averages, if they were kept.
    params, stats = state.network
    state = state._replace(params=params, stats=stats, average=None)
    run = run.at(results=(*run.position.results, result), recent=())
    if phase.steps:  # otherwise the last checkpoint has the same arrays
        _save(run, state, tools)
    run = run.but(arrays=arrays_of(state), model=with_state(run.model, state))
    if phase.steps and (asked := processes.largest(tools.signals.asked)):
        _stop(asked, tools)
    return run


def _log(
    run: Run, phase: Phase, state: TrainState, recent: Recent, tools: Tools
) -> None:
    """Shows and records the metrics of the last steps."""
    _check_finite(run, recent, tools)
    config, done = tools.setup.config, run.position.step
    metrics = tools.task.report(means(recent))
    metrics |= logged_scalars(config.prune.method, state.opt_state)
    if phase.shrinks:
        norm = measures.pruned_norm(run.plans[-1], parallel.local(state.params))
        metrics["pruned_norm"] = float(norm)
    tools.progress.step(done, metrics)
    metrics["learning_rate"] = float(np.asarray(phase.learning_rate(done - 1)))
    if rate := tools.progress.rate(done):
        speed = rate * tools.task.examples_per_step
        metrics[f"{tools.task.examples}_per_second"] = speed
    tools.record(run.position, metrics)


def _check_finite(run: Run, recent: Recent, tools: Tools) -> None:
    wrong = any(not math.isfinite(m["loss"]) for _, m in recent)
    skipped = bool(recent) and all(m.get("skipped", 0) == 1 for _, m in recent)
    if not wrong and not skipped:
        return
    saved = tools.checkpoints.latest()
    kept = "" if saved is None else f" The checkpoint of step {saved} is kept."
    raise TPPError(
        f"the loss is no longer finite at step {run.position.step} of "
        f"{run.position.phase}.{kept} Lower the "
        "learning rate or the penalties, and use a new --workdir"
    )


def _evaluate(run: Run, state: TrainState, tools: Tools) -> tuple[Run, float]:
    """Returns the run with its best score so far, and the current score."""
    result, headline = tools.evaluate(run.model, *state.network), tools.task.headline
    score = result[headline.name]
    _check_finite(run, [(1, {"loss": result.get("loss", score)})], tools)
    if headline.improves(score, run.position.best):
        run = run.at(best=score)
        if run.position.phase == tools.setup.stages[-1].name:
            _keep_best(run, state, tools)
    metrics = {f"test_{name}": value for name, value in result.items()}
    tools.record(run.position, metrics)
    tools.progress.line(run.position.step, metrics)
    return run, score


def _keep_best(run: Run, state: TrainState, tools: Tools) -> None:
    """Saves the network of the last phase's best score as ``best/``.

    A run that is killed here resumes from an earlier checkpoint and repeats this.
    """
    name = tools.task.headline.name
    save_model(
        tools.workdir / "best",
        _network(run, state),
        functools.reduce(Plan.then, run.plans) if run.plans else None,
        config=run.position.config,
        metrics={name: run.position.best, "step": run.position.step},
    )


def _network(run: Run, state: TrainState) -> nnx.Module:
    params, stats = parallel.local(state.network)
    return with_state(run.model, state._replace(params=params, stats=stats))


def _measure_jacobian(
    run: Run, state: TrainState, meter: measures.JacobianMeter, tools: Tools
) -> dict[str, Any]:
    measured = meter(_network(run, state))
    tools.record(run.position, measures.jacobian_scalars(measured))
    return measured


def _save(run: Run, state: TrainState, tools: Tools) -> None:
    position, arrays = run.position, arrays_of(state)
    if run.teacher is not None:
        arrays |= teacher_arrays(run.teacher)
    tools.checkpoints.save(position.steps_done, arrays, position.to_json())
    for callback in tools.callbacks if tools.kept else ():
        callback.on_checkpoint(position.steps_done)


def _stop(signum: int, tools: Tools) -> None:
    tools.progress.say("Stopped and saved: the same command continues from here.")
    raise Stopped(signum)
