"""The task that a config asks for, and its data."""

import dataclasses
from collections.abc import Callable, Mapping

import jax

from tpp_jax import data
from tpp_jax.experiment.sections import DataConfig, ModelConfig, TrainingConfig
from tpp_jax.reports.headline import ACCURACY
from tpp_jax.training.classification import ImageClassification
from tpp_jax.training.task import Task

HEADLINE = ACCURACY
"""Headline of every task that a config can ask for."""

Load = Callable[[str, str | None, int], data.Dataset]
"""Function of a data set's name, its folder and ``pad_to`` that loads it into memory;
:func:`tpp_jax.data.load`, or the same with a cache."""


def open_data(
    settings: DataConfig, load: Load = data.load
) -> data.Dataset | data.Stream:
    """Opens a data set, in memory or streamed.

    Args:
      settings: Section ``data`` of the config.
      load: Function that loads data into memory.

    Raises:
      TPPError: The data cannot be read.
    """
    folder = settings.dir or None
    if settings.name not in data.STREAMED:
        return load(settings.name, folder, settings.pad_to)
    return data.open_stream(
        settings.name,
        folder,
        image_size=settings.image_size,
        resize=settings.resize,
        flip=settings.flip,
        workers=settings.workers,
        shard=(jax.process_index(), jax.process_count()),
    )


def make_task(
    network: ModelConfig, settings: DataConfig, dataset: data.Dataset | data.Stream
) -> ImageClassification:
    """Returns the task of a config, as it is evaluated.

    Args:
      network: Section ``model`` of the config.
      settings: Section ``data`` of the config.
      dataset: Data set from :func:`open_data`.
    """
    return ImageClassification(
        dataset,
        network.name,
        settings.batch_size,
        settings.crop_padding,
        settings.flip,
        network.dtype,
    )


def make_tasks(
    task: ImageClassification, recipes: Mapping[str, TrainingConfig]
) -> dict[str, Task]:
    """Returns a task in all its variants.

    Args:
      task: Task from :func:`make_task`.
      recipes: Sections of the config that change its loss, by name.

    Returns:
      The task of each recipe, whose loss has label smoothing, mixup and cutmix; the
      task in float32 for ``"criteria"``; and the task itself for ``""``, everything
      else.
    """
    trained = {
        section: dataclasses.replace(
            task,
            label_smoothing=recipe.label_smoothing,
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
        )
        for section, recipe in recipes.items()
    }
    exact = dataclasses.replace(task, dtype="float32")
    return {"": task, "criteria": exact, **trained}
