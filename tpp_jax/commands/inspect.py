"""Preview of the pruning of a config, without training: --mode=inspect."""

import os
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from tpp_jax import models
from tpp_jax.analysis.groups_svg import draw_groups
from tpp_jax.analysis.groups_text import describe_groups, group_report
from tpp_jax.errors import TPPError
from tpp_jax.experiment.config import RunConfig
from tpp_jax.experiment.planning import plan_for
from tpp_jax.experiment.records.folders import config_of
from tpp_jax.experiment.records.terminal import Terminal, say
from tpp_jax.experiment.setup import abstract_model, initial_model
from tpp_jax.experiment.tasks import described_task
from tpp_jax.graph.groups import Groups
from tpp_jax.interop.modules import name_of
from tpp_jax.pruning.channels import channel_groups
from tpp_jax.pruning.cutting import prune
from tpp_jax.pruning.flops import count
from tpp_jax.saving import load_model, load_model_info

Inputs = tuple[jax.ShapeDtypeStruct, ...]

_WIDTHS = 80, 120  # smallest and largest width of the table on a terminal


def inspect(
    config: ml_collections.ConfigDict,
    workdir: str | pathlib.Path | None = None,
    *,
    given: bool = True,
) -> None:
    """Prints the groups of a config's model and the effect of its ratios.

    Nothing is trained, and the data set need not be prepared.

    Args:
      config: Config of a run.
      workdir: Folder for ``groups.svg``, which is created if it is missing. If it is
        the folder of a run, the run's own config is used.
      given: Whether the user asked for ``config``, so that a message appears if
        another is used.

    Raises:
      TPPError: The config is unusable, or the picture cannot be written.
    """
    try:
        _inspect(RunConfig.from_dict(config_of(workdir, config, given)), workdir)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the pipe has ended, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _inspect(config: RunConfig, workdir: str | pathlib.Path | None) -> None:
    model, inputs = network_of(config)
    groups = channel_groups(model, *inputs)
    weights = _weights(config, model, groups)
    plan = plan_for(config.prune, groups, weights, config.seed)
    before, after = count(model, *inputs), count(prune(model, plan), *inputs)
    picture = None if workdir is None else pathlib.Path(workdir) / "groups.svg"
    if picture is not None:
        try:
            picture.parent.mkdir(parents=True, exist_ok=True)
            draw_groups(groups, picture, plan)
        except OSError as error:
            raise TPPError(f"the picture cannot be written: {error}") from error

    spec = getattr(model, "spec", None)
    classes = isinstance(spec, models.ModelSpec) and f", {spec.num_classes} classes"
    say(f"{title(model, inputs)}{classes or ''}")
    console = Terminal()
    if console.is_terminal:
        console.width = min(max(console.width, _WIDTHS[0]), _WIDTHS[1])
        console.print(group_report(groups, plan, console.width))
    else:
        say(describe_groups(groups, plan))
    amounts = {key: getattr(config.prune, key) for key in ("ratios", "flops", "params")}
    asked = [f"config.prune.{key}={v!r}" for key, v in amounts.items() if v]
    say(
        f"\nwith {', '.join(asked) or 'no ratio and no target'}:\n"
        f"params {before.params:,} → {after.params:,} "
        f"({1 - after.params / before.params:.1%} gone), "
        f"FLOPs {before.flops:,} → {after.flops:,} "
        f"({before.flops / after.flops:.2f}× fewer)"
    )
    if config.prune.scope != "local" and not (config.init.model or config.init.torch):
        say("(ranked by untrained weights; trained ones change the shares of groups)")
    if picture is not None:
        say(f"drawn in {picture}")


def title(model: nnx.Module, inputs: Inputs) -> str:
    """Returns the name of a network and the shapes of its inputs."""
    spec = getattr(model, "spec", None)
    shapes = ", ".join("×".join(map(str, x.shape[1:])) or "()" for x in inputs)
    if isinstance(spec, models.ModelSpec):
        return f"{spec.name}, images {shapes}"
    return f"{name_of(model)}, inputs {shapes}"


def network_of(config: RunConfig) -> tuple[nnx.Module, Inputs]:
    """Returns the model of a config and shapes and types of its inputs.

    The model has no arrays if the plan needs no weights. A saved network of the package
    is taken whatever the rest of the config is.
    """
    saved = config.init.model
    if saved and load_model_info(saved)["model"] is not None:
        model = load_model(saved)
        shape = models.spec_of(model).image_shape
        return model, (jax.ShapeDtypeStruct((1, *shape), jnp.float32),)
    task = described_task(config)
    if saved or (config.init.torch and config.prune.scope != "local"):
        model = initial_model(task, config.model, config.seed, config.init)
    else:
        model = abstract_model(task, config.seed)
    return model, task.example_inputs()


def _weights(config: RunConfig, model: nnx.Module, groups: Groups) -> Any:
    """Returns weights for the plan, of which only the numbers of channels are shown."""
    if config.prune.scope == "local":  # any weights give the same numbers
        return {leaf: np.ones(shape) for leaf, shape in groups.shapes.items()}
    given = config.init.model or config.init.torch
    return model if given else described_task(config).model(nnx.Rngs(config.seed))
