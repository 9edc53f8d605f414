"""The stages without training: saving the dense network, choosing channels, cutting.

Each takes a run and returns the run after the stage.
"""

import functools
import math
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray

from tpp_jax.experiment.methods import Stage
from tpp_jax.experiment.planning import plan_for
from tpp_jax.experiment.position import Result
from tpp_jax.experiment.refitting import (
    calibration_inputs,
    repaired,
    written_back,
)
from tpp_jax.experiment.setup import Setup
from tpp_jax.experiment.tools import Run, Tools
from tpp_jax.graph.groups import Groups
from tpp_jax.graph.nnx_layers import modules
from tpp_jax.method.isometry import reinitialize
from tpp_jax.models.layers import uniform_bias_init
from tpp_jax.pruning.cutting import prune
from tpp_jax.pruning.plan import Plan
from tpp_jax.saving import save_model
from tpp_jax.storage import processes


def keep_dense(run: Run, stage: Stage, tools: Tools) -> Run:
    """Saves and measures the dense network, before pruning, and keeps it to distil."""
    del stage
    if run.teacher is None and tools.setup.distils("finetune"):
        run = run.but(teacher=run.model)
    if run.position.dense is not None:
        return run
    folder = tools.workdir / "dense"
    if not processes.largest(folder.exists()):
        save_model(folder, run.model, config=run.position.config)
    return run.at(dense=tools.score(run.model))


def choose(run: Run, stage: Stage, tools: Tools) -> Run:
    """Makes the plan from the trained weights and scores an immediate cut."""
    if len(run.plans) >= stage.round:
        return run
    setup, headline = tools.setup, tools.task.headline
    groups = setup.groups_of(run.model, run.plans)
    plan = None
    if stage.round == 1:
        plan = _planned(run, groups, setup)
        if (dense := run.position.dense) is not None:
            one_shot = tools.score(prune(run.model, plan))
            tools.progress.say(
                "Chose the channels to prune. Cutting all of them out at once changes "
                f"the {headline.name} from {headline.text(dense)} to "
                f"{headline.text(one_shot)}."
            )
            run = run.at(one_shot=one_shot)
        run = run.at(goal={name: kept.shape[-1] for name, kept in plan.kept.items()})
    if plan is None or setup.rounds > 1:
        plan = _planned(run, groups, setup, _counts(run, stage, groups, setup))
        if not plan.pruned_groups:
            tools.progress.say(
                f"Round {stage.round} of {setup.rounds} removes nothing, since its "
                "share is less than half a channel of every group; it only fine-tunes."
            )
    run = run.at(plans=(*run.position.plans, plan.to_dict()))
    run = run.but(plans=(*run.plans, plan), phases=setup.phases(plan))
    tools.keep_gram(run, "chosen", run.model)
    return run


def _planned(
    run: Run, groups: Groups, setup: Setup, counts: Mapping[str, int] | None = None
) -> Plan:
    config, task = setup.config, setup.task("criteria")
    return plan_for(config.prune, groups, run.model, config.seed, task, counts=counts)


def _counts(run: Run, stage: Stage, groups: Groups, setup: Setup) -> dict[str, int]:
    """Returns the number of channels of each group that a round keeps."""
    sizes = {group.name: group.size for group in setup.groups}
    goal = run.position.goal or {}
    counts = counts_of_round(sizes, goal, stage.round / setup.rounds)
    # A group of one channel may no longer be found.
    there = [group.name for group in groups if group.name in counts]
    return {name: counts[name] for name in there}


def cut(run: Run, stage: Stage, tools: Tools) -> Run:
    """Cuts the pruned channels out and reports the score before and after."""
    if run.position.finished(stage.name):
        return run
    start, setup, plan = time.monotonic(), tools.setup, run.plans[-1]
    key = stage.key(setup.config.seed)
    before = None
    if setup.method.random_weights:
        model = setup.task().model(nnx.Rngs(setup.config.seed))
        model = with_random_weights(prune(model, plan), key)
    else:
        before = tools.score(run.model)
        model = prune(run.model, plan)
    score = after = tools.score(model)
    if before is not None:
        headline = tools.task.headline
        tools.progress.say(
            f"Sliced: {headline.name} {headline.text(before)} before, "
            f"{headline.text(after)} after the cut."
        )
    more: dict[str, Any] = {"before": before, "after": after}
    for name, model in _repairs(run, *setup.repairs, tools):
        score = more[name] = tools.score(model)
        tools.progress.say(f"Then {name}: {tools.task.headline.text(score)}.")
    if recipe := setup.config.prune.reinitialize:
        # The gain is that of ReLU, or 1 for networks whose name ends in _linear.
        linear = setup.config.model.name.endswith("_linear")
        activation = "linear" if linear else "relu"
        model = reinitialize(model, recipe, activation=activation, key=key)
        score = tools.score(model)
    if tools.jacobian is not None:
        more["jacobian"] = tools.jacobian(model)
    tools.keep_gram(run, "cut", model)
    seconds = time.monotonic() - start
    result = Result(stage.name, 0, seconds, score, score, more)
    results = (*run.position.results, result)
    return run.but(model=model).at(phase=stage.name, step=0, results=results)


def refit(run: Run, stage: Stage, tools: Tools) -> Run:
    """Makes the unpruned network independent of the channels that will be cut.

    It then computes what the pruned network does after its repair.
    """
    if run.position.finished(stage.name):
        return run
    start = time.monotonic()
    *_, (_, small) = _repairs(run, True, True, tools)
    model = written_back(run.model, run.plans[-1], small)
    score, seconds = tools.score(model), time.monotonic() - start
    tools.progress.say(
        f"Refit without the pruned channels: {tools.task.headline.text(score)}."
    )
    results = (*run.position.results, Result(stage.name, 0, seconds, score, score))
    return run.but(model=model).at(phase=stage.name, step=0, results=results)


def _repairs(
    run: Run, refit: bool, renorm: bool, tools: Tools
) -> Iterator[tuple[str, nnx.Module]]:
    """Yields the network after each step of the repair of the next cut."""
    setup = tools.setup
    number, seed = setup.config.prune.calibration_examples, setup.config.seed
    return repaired(
        run.model,
        run.plans[-1],
        functools.partial(calibration_inputs, setup.task("criteria"), number, seed),
        refit=refit,
        renorm=renorm,
        say=tools.progress.say,
    )


def counts_of_round(
    sizes: Mapping[str, int], goal: Mapping[str, int], progress: float
) -> dict[str, int]:
    """Returns the number of channels of each group that are kept after some rounds.

    Every round removes the same share of the remaining channels: from n channels to k
    at the end, round r of R keeps n · (k/n)^(r/R), rounded.

    Args:
      sizes: Initial number n of channels of each group.
      goal: Final number k of channels of each group.
      progress: Quotient r/R; 1 gives the goal exactly.

    Example:
      >>> [counts_of_round({"a": 16}, {"a": 2}, r / 3)["a"] for r in (1, 2, 3)]
      [8, 4, 2]
    """
    counts = {}
    for name, k in goal.items():
        n = sizes[name]
        counts[name] = round(n * (k / n) ** progress)
    return counts


def with_random_weights(model: nnx.Module, key: PRNGKeyArray) -> nnx.Module:
    """Returns a model with new random convolutions and dense layers.

    Their distribution follows the current widths: the fewer input channels a layer has,
    the larger its weights. Layers without ``kernel_start`` (norms, tokens, a classifier
    of fixed variance) keep their weights, which are already random in a network that
    was cut before training.

    Args:
      model: Network that was cut out of one with random weights.
      key: Key of the random weights.
    """
    model = nnx.clone(model)
    layer: Any  # has a kernel if it has kernel_start
    for path, layer in modules(model):
        if (start := getattr(layer, "kernel_start", None)) is None:
            continue
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        for_kernel, for_bias = jax.random.split(own)
        kernel = layer.kernel
        kernel.set_value(start(for_kernel, kernel.shape, kernel.dtype))
        if layer.bias is not None:
            start = uniform_bias_init(math.prod(kernel.shape[:-1]))
            layer.bias.set_value(start(for_bias, layer.bias.shape, layer.bias.dtype))
    return model
