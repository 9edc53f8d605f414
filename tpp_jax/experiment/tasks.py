"""The task that a config asks for, and its data."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from tpp_jax import data, models
from tpp_jax.data import sources
from tpp_jax.data.arrays import labelled_images
from tpp_jax.errors import TPPError, renamed
from tpp_jax.experiment.config import RunConfig
from tpp_jax.experiment.dotted import is_dotted
from tpp_jax.experiment.own import called
from tpp_jax.experiment.sections import TrainingConfig
from tpp_jax.headline import ACCURACY, Headline
from tpp_jax.interop.modules import as_nnx
from tpp_jax.training.classification import ImageClassification
from tpp_jax.training.language import PERPLEXITY, LanguageModelling
from tpp_jax.training.own import complete
from tpp_jax.training.task import Task

Load = Callable[[str, str | None, int], data.Dataset]
"""Function of a data set's name, its folder and ``pad_to`` that loads it into memory;
:func:`tpp_jax.data.load`, or the same with a cache."""

_HEADLINES: dict[str, Headline] = {
    "image_classification": ACCURACY,
    "language_modelling": PERPLEXITY,
}
"""Headlines of the tasks of the package."""


def make_task(config: RunConfig, load: Load = data.load) -> Task:
    """Returns the task of a config, as it is evaluated.

    Args:
      config: Config of a run.
      load: Function that loads data into memory.

    Raises:
      TPPError: The data cannot be read, or an object of the user's own is missing or
        incomplete.
    """
    if is_dotted(config.task.name):
        own = called("task", config)
        return complete(own, config.task.name, config.data.batch_size)
    if config.task.name == "language_modelling":
        return _language(config)
    return _classification(config, open_images(config, load))


def described_task(config: RunConfig) -> Task:
    """Returns the task of a config for its network alone.

    The images of the data sets of the package are not read, which need not even be
    prepared.

    Args:
      config: Config of a run.

    Raises:
      TPPError: An object of the user's own is missing or incomplete.
    """
    if config.task.name != "image_classification":
        return make_task(config)
    num_classes, shape = _shapes(config)
    none = np.zeros((0, *shape), np.uint8), np.zeros(0, np.int32)
    dataset = data.Dataset(*none, *none, num_classes, (0.0,), (1.0,))
    return _classification(config, dataset)


def headline_of_task(config: RunConfig, load: Load = data.load) -> Headline:
    """Returns the headline of a config's task; a user's own task is made for it."""
    known = _HEADLINES.get(config.task.name)
    return make_task(config, load).headline if known is None else known


# Names of arguments of tpp_jax.data in messages, for whom a config sets them.
_in_a_config = renamed(r"(?<![-./\w'])data_dir(?![=/\w'])", "--config.data.dir")


@_in_a_config
def open_images(
    config: RunConfig, load: Load = data.load
) -> data.Dataset | data.Stream:
    """Opens a data set of images, in memory or streamed.

    Args:
      config: Config of a run.
      load: Function that loads data into memory.

    Raises:
      TPPError: The data cannot be read, or do not fill a batch.
    """
    settings = config.data
    if settings.name.endswith(".npz"):
        found = data.read_arrays(settings.name)
    elif is_dotted(settings.name):
        found = labelled_images(called("data", config), settings.name)
    elif settings.name not in data.STREAMED:
        found = load(settings.name, settings.dir or None, settings.pad_to)
    else:
        found = data.open_stream(
            settings.name,
            settings.dir or None,
            image_size=settings.image_size,
            resize=settings.resize,
            flip=settings.flip,
            workers=settings.workers,
            shard=(jax.process_index(), jax.process_count()),
        )
    if not 1 <= settings.batch_size <= found.num_train:
        raise TPPError(
            f"config.data.batch_size is {settings.batch_size}, but {settings.name} has "
            f"{found.num_train} training images"
        )
    return found


def _classification(
    config: RunConfig, dataset: data.Dataset | data.Stream
) -> ImageClassification:
    settings, network = config.data, config.model.name
    own = is_dotted(network)
    if config.model.kwargs and not own:
        raise TPPError(
            f"config.model.kwargs is {config.model.kwargs}, but the network {network} "
            "takes none"
        )
    return ImageClassification(
        dataset,
        functools.partial(called, "model", config) if own else network,
        settings.batch_size,
        settings.crop_padding,
        settings.flip,
        config.model.dtype,
    )


def _language(config: RunConfig) -> LanguageModelling:
    settings, name = config.data, config.model.name
    if is_dotted(settings.name):
        text = called("data", config)
        if not isinstance(text, data.Text):
            raise TPPError(
                f"config.data.name is {settings.name!r}, which returned a "
                f"{type(text).__name__}: language modelling needs a tpp_jax.data.Text"
            )
    else:
        text = data.load_text(
            settings.name,
            settings.tokenizer or None,
            held_out=settings.held_out,
            cache=settings.dir or None,
        )

    def network(rngs: nnx.Rngs) -> nnx.Module:
        if is_dotted(name):
            tokens = jax.ShapeDtypeStruct((1, settings.length), "int32")
            return as_nnx(called("model", config, rngs), tokens, rngs=rngs)
        kwargs: dict[str, Any] = {"vocabulary": text.vocabulary, **config.model.kwargs}
        return models.small_decoder(rngs, **kwargs)

    if not is_dotted(name) and name != "small_decoder":
        raise TPPError(
            f"config.model.name is {name!r}, but the networks for text are "
            "small_decoder and those of a dotted path"
        )
    return LanguageModelling(text, network, settings.length, settings.batch_size)


@_in_a_config
def _shapes(config: RunConfig) -> tuple[int, tuple[int, int, int]]:
    """Returns the number of classes and the image shape, if possible without images."""
    settings = config.data
    size = settings.image_size
    if settings.name == "imagenet2012":
        return 1000, (size, size, 3)
    if settings.name == "digits" or settings.name not in sources.NAMES:
        dataset = open_images(config)  # raises for an unknown name
        return dataset.num_classes, dataset.image_shape
    features = sources.open_builder(settings.name, settings.dir or None).info.features
    height, width, channels = features["image"].shape
    shape = sources.padded_size(settings.name, height, width, settings.pad_to)
    return features["label"].num_classes, (*shape, channels)


def make_tasks(task: Any, recipes: Mapping[str, TrainingConfig]) -> dict[str, Task]:
    """Returns a task in all its variants.

    Args:
      task: Task from :func:`make_task`.
      recipes: Sections of the config that may change its loss, by name.

    Returns:
      The task itself for ``""``. If it is image classification, also that of each
      recipe, whose loss has label smoothing, mixup and cutmix, and one in float32 for
      ``"criteria"``.

    Raises:
      TPPError: A recipe changes the loss of a task that is no image classification.
    """
    if not isinstance(task, ImageClassification):
        for section, recipe in recipes.items():
            for name in ("label_smoothing", "mixup", "cutmix"):
                if getattr(recipe, name):
                    raise TPPError(
                        f"config.{section}.{name} is {getattr(recipe, name)}, which "
                        "only image classification has: set it to 0"
                    )
        return {"": task}
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
