"""Image classification as a task."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, Shaped

from tpp_jax import data, models
from tpp_jax.errors import TPPError
from tpp_jax.headline import ACCURACY, Headline
from tpp_jax.interop.modules import as_function, as_nnx, name_of
from tpp_jax.training import parallel
from tpp_jax.training.feeds import EVAL_BATCH, Resident, Streamed
from tpp_jax.training.task import Feed, Metrics


class Images(NamedTuple):
    """A batch of labelled images.

    Attributes:
      pixels: uint8 ``[n, h, w, c]``.
      labels: int32 ``[n]``.
    """

    pixels: Array | np.ndarray
    labels: Array | np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class ImageClassification:
    """Image classification: cross-entropy is the loss, accuracy the headline.

    Attributes:
      dataset: Images and labels, in memory or streamed.
      network: Name of the network, one of ``tpp_jax.models.names()``; or a function of
        random streams that returns a module of Flax NNX or Linen.
      batch_size: Number of images in a training batch of all devices together.
      crop_padding: Width of the black border around training images before their
        random crop, in pixels. Like ``flip``, it applies only to data in memory; a
        stream crops and mirrors images itself.
      flip: Whether training images are mirrored at random.
      dtype: Type of the network's inputs in training and evaluation.
      label_smoothing: Share of the target that is spread evenly over all classes.
      mixup: α of mixup, see :func:`tpp_jax.data.mix`; 0 for no mixup.
      cutmix: α of cutmix; 0 for no cutmix.
    """

    dataset: data.Dataset | data.Stream
    network: str | Callable[[nnx.Rngs], Any] = ""
    batch_size: int = 128
    crop_padding: int = 0
    flip: bool = False
    dtype: str = "float32"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def headline(self) -> Headline:
        """Accuracy on the test set, in percent."""
        return ACCURACY

    @property
    def examples(self) -> str:
        """Plural noun for the examples."""
        return "images"

    @property
    def examples_per_step(self) -> int:
        """Number of images in a training batch."""
        return self.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in one pass over the training images."""
        return self.dataset.num_train // self.batch_size

    @property
    def fixed_inputs(self) -> bool:
        """Whether an image is the same in every step, so that a teacher's output is."""
        changed = self.crop_padding or self.flip or self.mixup or self.cutmix
        return isinstance(self.dataset, data.Dataset) and not changed

    def model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the network for the classes and the image shape of the data."""
        dataset = self.dataset
        if isinstance(self.network, str):
            return models.create(
                self.network,
                num_classes=dataset.num_classes,
                image_shape=dataset.image_shape,
                rngs=rngs,
            )
        model = as_nnx(self.network(rngs), *self.example_inputs(), rngs=rngs)
        _check_logits(model, self.example_inputs(), dataset.num_classes)
        return model

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns the shape and type of a batch of one normalised image."""
        return (jax.ShapeDtypeStruct((1, *self.dataset.image_shape), jnp.float32),)

    def feed(self, devices: Sequence[parallel.Device], accumulate: int = 1) -> Feed:
        """Returns a feed of images that are in memory or streamed."""
        dataset = self.dataset
        if isinstance(dataset, data.Stream):
            return Streamed(
                _training(dataset, self.batch_size, accumulate),
                _testing(dataset),
                min(EVAL_BATCH, self.batch_size, dataset.num_test),
                devices,
            )
        return Resident(
            Images(dataset.train_images, dataset.train_labels),
            Images(dataset.test_images, dataset.test_labels),
            self.batch_size,
            devices,
            accumulate,
            self._augment,
        )

    def loss(
        self, model: nnx.Module, batch: Images, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Returns the mean cross-entropy, and the accuracy as a fraction.

        With mixup or cutmix, a prediction counts as correct if it is the image's own
        label.
        """
        [x] = self.inputs(batch, self.dtype)
        labels = jnp.asarray(batch.labels)
        x, targets = self._targets(x, labels, key)
        logits = model(x).astype(jnp.float32)
        if targets.ndim == 1:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        else:
            losses = optax.softmax_cross_entropy(logits, targets)
        hits = jnp.argmax(logits, -1) == labels
        return losses.mean(), {"accuracy": hits.mean()}

    def metrics(
        self, model: nnx.Module, batch: Images
    ) -> dict[str, Shaped[Array, " n"]]:
        """Returns the cross-entropy and the correctness of each image's prediction."""
        [x] = self.inputs(batch, self.dtype)
        logits = model(x).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return {"loss": losses, "accuracy": jnp.argmax(logits, -1) == batch.labels}

    def report(self, means: Mapping[str, float]) -> dict[str, float]:
        """Returns the metrics, the accuracy in percent."""
        percent = {"accuracy": 100 * means["accuracy"]} if "accuracy" in means else {}
        return {**means, **percent}

    def inputs(
        self, batch: Images, dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "n h w c"]]:
        """Returns the normalised images."""
        mean, std = self.dataset.mean, self.dataset.std
        return (data.normalize(jnp.asarray(batch.pixels), mean, std, dtype),)

    def probes(self, number: int) -> Images:
        """Returns the first test images, at most ``number``."""
        dataset = self.dataset
        if isinstance(dataset, data.Dataset):
            return Images(dataset.test_images[:number], dataset.test_labels[:number])
        batches = dataset.test_batches(min(number, dataset.num_test))
        with contextlib.closing(batches):
            return Images(*next(batches))

    def samples(self, seed: int) -> Iterator[Images]:
        """Yields the training batches of one epoch in random order.

        Images in memory are unchanged; streamed images are cropped and mirrored.
        """
        dataset = self.dataset
        if isinstance(dataset, data.Stream):  # every process reads all images
            dataset = dataclasses.replace(dataset, shard=(0, 1))
        batches = dataset.train_batches(self.batch_size, seed)
        with contextlib.closing(batches):
            for _ in range(self.steps_per_epoch):
                yield Images(*next(batches))

    def _augment(self, keys: Key[Array, " n"], batch: Images) -> Images:
        padding, flip = self.crop_padding, self.flip
        pixels = jnp.asarray(batch.pixels)
        pixels = data.augment(keys, pixels, crop_padding=padding, flip=flip)
        return Images(pixels, batch.labels)

    def _targets(
        self, x: Array, labels: Int[Array, " n"], key: Key[Array, ""]
    ) -> tuple[Array, Array]:
        """Mixes images and smooths labels; otherwise labels remain integers."""
        if not (self.label_smoothing or self.mixup or self.cutmix):
            return x, labels
        one_hot = jax.nn.one_hot(labels, self.dataset.num_classes)
        targets = optax.smooth_labels(one_hot, self.label_smoothing)
        return data.mix(key, x, targets, mixup=self.mixup, cutmix=self.cutmix)


def _check_logits(
    model: Any, inputs: tuple[jax.ShapeDtypeStruct, ...], num_classes: int
) -> None:
    """Raises a TPPError unless a network maps images to logits of the classes."""
    what = f"{name_of(model)}, applied to images {inputs[0].shape},"
    try:
        found = jax.eval_shape(as_function(model), *inputs)
    except Exception as error:  # whatever a user's network does
        reason = str(error).strip().partition("\n")[0]
        raise TPPError(f"{what} fails with {type(error).__name__}: {reason}") from error
    if getattr(found, "shape", None) != (1, num_classes):
        shape = getattr(found, "shape", type(found).__name__)
        raise TPPError(
            f"{what} returns {shape}, but the data have {num_classes} classes: it must "
            f"return logits {(1, num_classes)}"
        )


def _training(
    stream: data.Stream, batch_size: int, accumulate: int
) -> Callable[[Key[Array, ""], int], Generator[Images, None, None]]:
    def batches(key: Key[Array, ""], step: int) -> Generator[Images, None, None]:
        seed = int(jax.random.bits(key, dtype=jnp.uint32))
        found = stream.train_batches(batch_size, seed, step, accumulate)
        with contextlib.closing(found):
            yield from itertools.starmap(Images, found)

    return batches


def _testing(stream: data.Stream) -> Callable[[int], Iterator[Images]]:
    def batches(size: int) -> Iterator[Images]:
        for images, labels in stream.test_batches(size):
            n = np.count_nonzero(labels >= 0)  # padding comes last
            yield Images(images[:n], labels[:n])

    return batches
