"""The task that a config asks for."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from tpp_jax import data
from tpp_jax.training.classification import ImageClassification
from tpp_jax.training.task import Task

Fields = Mapping[str, Any]


def open_data(settings: Fields) -> data.Dataset | data.Stream:
    """Opens the data set that a config's ``data`` part asks for, in memory or streamed.

    Raises:
      TPPError: The data cannot be read.
    """
    name, folder = settings["name"], settings["dir"] or None
    if name not in data.STREAMED:
        return _load(name, folder, settings["pad_to"])
    fields = {key: settings[key] for key in ("image_size", "resize", "flip", "workers")}
    shard = jax.process_index(), jax.process_count()
    return data.open_stream(name, folder, **fields, shard=shard)


# The runs of a sweep have one data set, which takes a while to decode.
_load = functools.lru_cache(maxsize=1)(data.load)


def make_task(
    config: Fields, dataset: data.Dataset | data.Stream
) -> ImageClassification:
    """Returns the task of a config, as it is evaluated.

    Args:
      config: Config of the run; its parts ``model`` and ``data`` are read.
      dataset: Data set from :func:`open_data`.
    """
    return ImageClassification(
        dataset,
        config["model"]["name"],
        config["data"]["batch_size"],
        config["data"]["crop_padding"],
        config["data"]["flip"],
        config["model"]["dtype"],
    )


def make_tasks(config: Fields, dataset: data.Dataset | data.Stream) -> dict[str, Task]:
    """Returns the task of a config in its variants.

    Args:
      config: Config of the run.
      dataset: Data set from :func:`open_data`.

    Returns:
      The task as phases of ``pretrain`` and ``finetune`` train it, whose loss has label
      smoothing, mixup and cutmix; in float32, by which ``criteria`` measure; and ``""``
      for everything else.
    """
    task = make_task(config, dataset)
    names = "label_smoothing", "mixup", "cutmix"
    recipes = {
        part: dataclasses.replace(task, **{name: config[part][name] for name in names})
        for part in ("pretrain", "finetune")
    }
    exact = dataclasses.replace(task, dtype="float32")
    return {"": task, "criteria": exact, **recipes}
