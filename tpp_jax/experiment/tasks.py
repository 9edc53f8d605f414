"""The task that a config asks for."""

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
    config: Fields,
    dataset: data.Dataset | data.Stream,
    recipe: Fields | None = None,
) -> Task:
    """Returns the task of a config.

    Args:
      config: Config of the run; its parts ``model`` and ``data`` are read.
      dataset: Data set from :func:`open_data`.
      recipe: Part of the config for a phase of plain training, whose loss differs from
        that of the other phases by label smoothing, mixup and cutmix.
    """
    names = ("label_smoothing", "mixup", "cutmix") if recipe else ()
    return ImageClassification(
        dataset,
        config["model"]["name"],
        config["data"]["batch_size"],
        config["data"]["crop_padding"],
        config["data"]["flip"],
        config["model"]["dtype"],
        **{name: recipe[name] for name in names},
    )
