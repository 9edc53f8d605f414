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

from tpp_jax import data, models
from tpp_jax.analysis.groups_svg import draw_groups
from tpp_jax.analysis.groups_text import describe_groups, group_report
from tpp_jax.data import sources
from tpp_jax.errors import TPPError
from tpp_jax.experiment.config import RunConfig
from tpp_jax.experiment.planning import plan_for
from tpp_jax.experiment.records.folders import config_of
from tpp_jax.experiment.records.terminal import Terminal, say
from tpp_jax.experiment.sections import DataConfig
from tpp_jax.experiment.setup import initial_model, random_model
from tpp_jax.experiment.tasks import open_data
from tpp_jax.graph.groups import Groups
from tpp_jax.pruning.channels import channel_groups
from tpp_jax.pruning.cutting import prune
from tpp_jax.pruning.flops import count
from tpp_jax.saving import load_model

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
    model = abstract_model(config)
    spec = models.spec_of(model)
    example = jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.float32)
    groups = channel_groups(model, example)
    weights = _weights(config, model, groups)
    plan = plan_for(config.prune, groups, weights, config.seed)
    before, after = count(model, example), count(prune(model, plan), example)
    picture = None if workdir is None else pathlib.Path(workdir) / "groups.svg"
    if picture is not None:
        try:
            picture.parent.mkdir(parents=True, exist_ok=True)
            draw_groups(groups, picture, plan)
        except OSError as error:
            raise TPPError(f"the picture cannot be written: {error}") from error

    shape = "×".join(map(str, spec.image_shape))
    say(f"{spec.name}, images {shape}, {spec.num_classes} classes")
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


def abstract_model(config: RunConfig) -> nnx.Module:
    """Returns the model of a config, without arrays if the plan needs no weights."""
    if config.init.model:  # whatever the rest of the config is
        return load_model(config.init.model)
    arguments = config.model.name, config.seed, *_shapes(config.data)
    if config.init.torch and config.prune.scope != "local":
        return initial_model(*arguments, config.init)
    return nnx.eval_shape(lambda: random_model(*arguments))


def _weights(config: RunConfig, model: nnx.Module, groups: Groups) -> Any:
    """Returns weights for the plan, of which only the numbers of channels are shown."""
    if config.prune.scope == "local":  # any weights give the same numbers
        return {leaf: np.ones(shape) for leaf, shape in groups.shapes.items()}
    if config.init.model or config.init.torch:
        return model
    spec = models.spec_of(model)
    return random_model(
        config.model.name, config.seed, spec.num_classes, spec.image_shape
    )


def _shapes(settings: DataConfig) -> tuple[int, tuple[int, int, int]]:
    """Returns the number of classes and the image shape, without reading images."""
    if settings.name in data.STREAMED:
        size = settings.image_size
        if settings.name == "imagenet2012":
            return 1000, (size, size, 3)
        return open_data(settings).num_classes, (size, size, 3)
    if settings.name == "digits" or settings.name not in sources.NAMES:
        dataset = open_data(settings)  # raises for an unknown name
        return dataset.num_classes, dataset.image_shape
    features = sources.open_builder(settings.name, settings.dir or None).info.features
    height, width, channels = features["image"].shape
    size = sources.padded_size(settings.name, height, width, settings.pad_to)
    return features["label"].num_classes, (*size, channels)
