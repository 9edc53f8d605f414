"""How batches reach a step: from arrays on the device, or streamed from the host.

A feed has two sides. ``train_data`` and ``test_data`` give, on the host, the arguments
of a step; ``train_batch`` and ``test_batch`` are pure functions that make a device's
share of the batch of them, inside the compiled program. Batches depend on the seed, the
phase and the step alone, so that the position in the data is the number of the step.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Int

from tpp_jax import data
from tpp_jax.training import parallel
from tpp_jax.training.step import Batch

_TEST_BATCH = 512  # images of one step, rounded up to fill the devices evenly


def open_data(settings: ml_collections.ConfigDict | dict[str, Any]) -> Any:
    """Opens the data set that a config's ``data`` part asks for.

    Returns:
      A ``data.Dataset``, in memory, or a ``data.Stream``.

    Raises:
      TPPError: the data cannot be read.
    """
    name, folder = settings["name"], settings["dir"] or None
    if name not in data.STREAMED:
        return _load(name, folder, settings["pad_to"])
    fields = {key: settings[key] for key in ("image_size", "resize", "flip", "workers")}
    shard = jax.process_index(), jax.process_count()
    return data.open_stream(name, folder, **fields, shard=shard)


# The runs of a sweep have one data set, which takes a while to decode.
_load = functools.lru_cache(maxsize=1)(data.load)


def open_feed(
    dataset: data.Dataset | data.Stream,
    settings: ml_collections.ConfigDict | dict[str, Any],
    devices: Sequence[jax.Device],
    parts: int = 1,
) -> "Resident | Streamed":
    """Returns the feed of a data set.

    Args:
      dataset: in memory, or streamed.
      settings: the config's ``data`` part.
      devices: that the step runs on.
      parts: that each device computes its share of a training batch in.
    """
    if isinstance(dataset, data.Stream):
        return Streamed(dataset, settings["batch_size"], devices, parts)
    return Resident(dataset, settings, devices, parts)


class Resident:
    """A data set that lives on the devices as uint8, cropped and flipped there.

    Attributes:
      split: whether the data are split over the devices; here each has all of them.
      at_once: how many steps one dispatch may run at most.
    """

    split = False
    at_once = 100

    def __init__(
        self,
        dataset: data.Dataset,
        settings: ml_collections.ConfigDict | dict[str, Any],
        devices: Sequence[jax.Device],
        parts: int = 1,
    ) -> None:
        self._parts = parts
        self._settings = {
            name: settings[name] for name in ("batch_size", "crop_padding", "flip")
        }
        self._axis, self._devices = parallel.axis_name(devices), devices
        n, size = len(dataset.test_images), min(_TEST_BATCH, len(dataset.test_images))
        self._test_size = math.ceil(size / len(devices)) * len(devices)
        self._starts = range(0, n, self._test_size)
        padding = -n % self._test_size
        test = Batch(
            np.pad(dataset.test_images, ((0, padding), (0, 0), (0, 0), (0, 0))),
            np.pad(dataset.test_labels, (0, padding), constant_values=-1),
        )
        train = Batch(dataset.train_images, dataset.train_labels)
        self._n = len(dataset.train_labels)
        self._train, self._test = parallel.replicate((train, test), devices)
        self._key, self._epoch = None, -1

    def begin(self, key: Array, step: int) -> None:
        """Starts a phase, from a step of it on; ``key`` is the phase's."""
        del step  # the position is the step that train_data is given
        self._key, self._epoch = key, -1

    def steps_left(self, step: int) -> int:
        """Returns how many steps one dispatch may run from a step on: to its epoch's
        end, since the order is one of its arguments."""
        per_epoch = self._n // self._settings["batch_size"]
        return per_epoch - step % per_epoch

    def train_data(self, step: int) -> tuple[Any, ...]:
        """Returns the arguments of the steps from ``step`` on: order and images."""
        epoch = step // (self._n // self._settings["batch_size"])
        if epoch != self._epoch:
            order = _order(self._key, epoch, self._n)
            self._order = parallel.replicate(order, self._devices)
            self._epoch = epoch
        return self._order, self._train

    def train_batch(
        self, step: Int[Array, ""], key: Array, order: Int[Array, " n"], images: Batch
    ) -> Batch:
        """Returns the next images of the epoch's order, cropped and flipped."""
        batch, flip = self._settings["batch_size"], self._settings["flip"]
        steps_per_epoch = order.shape[0] // batch
        start = step % steps_per_epoch * batch
        keys = jax.random.split(key, batch)
        chosen = jax.lax.dynamic_slice_in_dim(order, start, batch)
        if self._axis is not None:
            device = jax.lax.axis_index(self._axis)
            n = jax.lax.axis_size(self._axis)
            mine = parallel.places_of(device, n, batch, self._parts)
            keys, chosen = keys[mine], chosen[mine]
        padding = self._settings["crop_padding"]
        pixels = data.augment(
            keys, images.pixels[chosen], crop_padding=padding, flip=flip
        )
        return Batch(pixels, images.labels[chosen])

    def test_data(self) -> Iterator[tuple[Any, ...]]:
        """Yields the arguments of the steps of an evaluation."""
        for start in self._starts:
            yield self._test, np.int32(start)

    def test_batch(self, images: Batch, start: Int[Array, ""]) -> Batch:
        """Returns this device's share of the test images from ``start`` on."""
        size = self._test_size
        if self._axis is not None:
            size //= jax.lax.axis_size(self._axis)
            start = start + jax.lax.axis_index(self._axis) * size
        return jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), images
        )

    def close(self) -> None:
        """Nothing runs in the background."""


class Streamed:
    """A data set that the host decodes and crops, batch by batch, in the background.

    Attributes:
      split: whether the data are split over the devices.
      at_once: how many steps one dispatch may run at most.
    """

    split = True
    at_once = 1

    def __init__(
        self,
        stream: data.Stream,
        batch_size: int,
        devices: Sequence[jax.Device],
        parts: int = 1,
    ) -> None:
        self._stream, self._batch_size, self._parts = stream, batch_size, parts
        size = min(_TEST_BATCH, batch_size, stream.num_test)
        self._test_size = math.ceil(size / len(devices)) * len(devices)
        self._batches: Iterator[tuple[np.ndarray, np.ndarray]] | None = None

    def begin(self, key: Array, step: int) -> None:
        """Starts a phase, from a step of it on; ``key`` is the phase's."""
        self.close()
        seed = int(jax.random.bits(key, dtype=jnp.uint32))
        self._batches = self._stream.train_batches(
            self._batch_size, seed, step, self._parts
        )

    def steps_left(self, step: int) -> int:
        """Returns how many steps one dispatch may run from a step on."""
        return 1

    def train_data(self, step: int) -> tuple[Any, ...]:
        """Returns the next batch; steps must follow each other."""
        return (Batch(*next(self._batches)),)

    def train_batch(self, step: Int[Array, ""], key: Array, batch: Batch) -> Batch:
        """Returns the batch: the host has augmented it."""
        return batch

    def test_data(self) -> Iterator[tuple[Any, ...]]:
        """Yields the batches of an evaluation."""
        for images, labels in self._stream.test_batches(self._test_size):
            yield (Batch(images, labels),)

    def test_batch(self, batch: Batch) -> Batch:
        """Returns the batch."""
        return batch

    def close(self) -> None:
        """Stops decoding."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def epoch_order(key: Array, epoch: int, n: int) -> Int[Array, " n"]:
    """Returns the order in which an epoch visits n images, a permutation."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), n)


_order = jax.jit(epoch_order, static_argnums=2)
