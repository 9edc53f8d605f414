"""The stages that do not train: keeping the dense network, choosing channels, cutting.

Those that change a run are functions of it; the others are pure.
"""

import math
import time
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import ml_collections
from flax import nnx
from jaxtyping import PRNGKeyArray

from tpp_jax.experiment import measures
from tpp_jax.experiment.methods import Stage
from tpp_jax.experiment.setup import plan_for, random_model
from tpp_jax.graph.groups import Groups
from tpp_jax.graph.nnx_layers import modules
from tpp_jax.method.isometry import reinitialize
from tpp_jax.models.layers import uniform_bias_init
from tpp_jax.pruning.channels import channel_groups
from tpp_jax.pruning.cutting import prune
from tpp_jax.saving import save_model
from tpp_jax.storage import processes

if TYPE_CHECKING:
    from tpp_jax.experiment.run import Run


def keep_dense(run: "Run") -> None:
    """Saves and measures the network before anything is done to prune it."""
    if run.meta["dense_accuracy"] is not None:
        return
    if not processes.largest((run.workdir / "dense").exists()):
        save_model(run.workdir / "dense", run.model, config=run.meta["config"])
    run.meta["dense_accuracy"] = run.accuracy(run.model)


def choose(run: "Run", stage: Stage) -> None:
    """Makes the plan from the trained weights, and shows what one-shot costs."""
    if len(run.plans) >= stage.round:
        return
    setup, groups = run.setup, groups_now(run)
    arguments = setup.config, groups, run.model, setup.dataset
    if stage.round == 1:
        plan = plan_for(*arguments)
        if (dense := run.meta["dense_accuracy"]) is not None:
            one_shot = run.meta["one_shot"] = run.accuracy(prune(run.model, plan))
            run.progress.say(
                "Chose the channels to prune. Cutting all of them out at once takes "
                f"the accuracy from {dense:.2f} % to {one_shot:.2f} %."
            )
        run.meta["goal"] = {name: len(kept) for name, kept in plan.kept.items()}
    if (rounds := setup.stages[-1].round) > 1:
        sizes = {group.name: group.size for group in setup.groups}
        counts = counts_of_round(sizes, run.meta["goal"], stage.round / rounds)
        # A group that is down to one channel may no longer be seen as one.
        there = [group.name for group in groups if group.name in counts]
        plan = plan_for(*arguments, counts={name: counts[name] for name in there})
        if not plan.pruned_groups:
            run.progress.say(
                f"Round {stage.round} of {rounds} removes nothing, since its share is "
                "less than half a channel of every group; its fine-tuning goes on."
            )
    run.plans.append(plan)
    run.meta["plans"] = [plan.to_dict() for plan in run.plans]
    run.phases = setup.phases(plan)
    save_gram(run, "chosen", run.model)


def cut(run: "Run", stage: Stage) -> None:
    """Cuts the pruned channels out and compares the accuracy before and after."""
    if run.finished(stage.name):
        return
    start, config, plan = time.monotonic(), run.setup.config, run.plans[-1]
    key, dataset = stage.key(config.seed), run.setup.dataset
    before = None
    if config.prune.method == "scratch":
        fresh = random_model(config, dataset.num_classes, dataset.image_shape)
        run.model = with_random_weights(prune(fresh, plan), key)
    else:
        before = run.accuracy(run.model)
        run.model = prune(run.model, plan)
    accuracy = after = run.accuracy(run.model)
    if before is not None:
        run.progress.say(
            f"Sliced: accuracy {before:.2f} % before, {after:.2f} % after the cut."
        )
    if config.prune.reinitialize:
        run.model = reinitialized(run.model, config, key)
        accuracy = run.accuracy(run.model)
    run.meta["phase"], run.meta["step"] = stage.name, 0
    save_gram(run, "cut", run.model)
    run.record_result(
        name=stage.name,
        steps=0,
        seconds=time.monotonic() - start,
        accuracy=accuracy,
        best_accuracy=accuracy,
        accuracy_before=before,
        accuracy_after=after,
        **({"jacobian": run.jacobian(run.model)} if config.jacobian_every else {}),
    )


def save_gram(run: "Run", moment: str, model: nnx.Module) -> None:
    """Keeps a Gram matrix for the report, in a first round that prunes the layer."""
    if len(run.plans) == 1 and processes.is_first():
        [plan] = run.plans
        if (member := measures.find_report_layer(run.setup.config, plan)) is None:
            return
        measures.save_gram(run.workdir / "gram.npz", moment, model, member, plan)


def groups_now(run: "Run") -> Groups:
    """Returns the groups of the network as it is."""
    if not run.plans:
        return run.setup.groups
    return channel_groups(run.model, *run.setup.groups.inputs)


def counts_of_round(
    sizes: Mapping[str, int], goal: Mapping[str, int], progress: float
) -> dict[str, int]:
    """Returns how many channels of each group stay after some rounds.

    Every round takes the same share of what is left: of n channels of which k are to
    stay in the end, round r of R leaves n · (k/n)^(r/R), rounded.

    Args:
      sizes: group → n.
      goal: group → k.
      progress: r/R; at 1 the goal is reached exactly.

    Example:
      >>> [counts_of_round({"a": 16}, {"a": 2}, r / 3)["a"] for r in (1, 2, 3)]
      [8, 4, 2]
    """
    counts = {}
    for name, k in goal.items():
        n = sizes[name]
        counts[name] = round(n * (k / n) ** progress)
    return counts


def reinitialized(
    model: nnx.Module, config: ml_collections.ConfigDict, key: PRNGKeyArray
) -> nnx.Module:
    """Returns the model with kernels made anew by ``config.prune.reinitialize``.

    The gain is that of ReLU, or 1 for the networks that are called linear.
    """
    linear = config.model.name.endswith("_linear")
    activation = "linear" if linear else "relu"
    recipe = config.prune.reinitialize
    return reinitialize(model, recipe, activation=activation, key=key)


def with_random_weights(model: nnx.Module, key: PRNGKeyArray) -> nnx.Module:
    """Returns a model whose convolutions and dense layers start anew at their widths.

    The fewer channels a layer sees, the larger its weights are drawn. What does not
    tell how it started (norms, tokens, a classifier of fixed variance) stays as it is,
    which is right for a network of random weights that was cut.
    """
    model = nnx.clone(model)
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
