"""Data sets too large for memory, read and decoded by Grain while a network trains.

A batch depends on the seed and its number alone, however many threads or processes
decode and wherever reading starts: the position in the data is the number of the step.
"""

import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int32, UInt8

from tpp_jax.data import folders, sources
from tpp_jax.errors import TPPError, require

STREAMED = ("folder", "imagenet2012")
"""The data sets that `open_stream` knows."""

_ENDLESS = 2**48  # batches, more than any run reads

Batches = Iterator[tuple[UInt8[np.ndarray, "b h w c"], Int32[np.ndarray, " b"]]]
_Load = Callable[[int], tuple[UInt8[np.ndarray, "h w c"], int]]


class Files(Protocol):
    """Image files by number."""

    def __len__(self) -> int:
        """Returns how many there are."""

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        """Returns the content and the class of a file."""

    def name(self, i: int) -> str:
        """Returns what a file is called, for an error."""


@dataclasses.dataclass(frozen=True)
class Stream:
    """A data set that is read batch by batch.

    Attributes:
      train: the training images: their number, and each as content and label.
      test: the test images, likewise.
      num_classes: number of classes.
      image_size: height and width of the images it gives, in pixels.
      resize: shorter side of a test image before its centre crop.
      flip: whether training images are mirrored at random.
      workers: processes that decode; 0 for threads of this one.
      threads: that read and decode in each process.
      shard: of a batch, which of how many equal parts this process reads.
      mean: per channel that inputs are normalised with, in units of pixel / 255.
      std: likewise, the standard deviation.
    """

    train: Files
    test: Files
    num_classes: int
    image_size: int = 224
    resize: int = 256
    flip: bool = True
    workers: int = 0
    threads: int = 1
    shard: tuple[int, int] = (0, 1)
    mean: tuple[float, ...] = sources.IMAGENET_MEAN
    std: tuple[float, ...] = sources.IMAGENET_STD

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return len(self.train)

    @property
    def num_test(self) -> int:
        """Number of test images."""
        return len(self.test)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one image."""
        return self.image_size, self.image_size, 3

    def train_batches(
        self, batch_size: int, seed: int, start: int = 0, parts: int = 1
    ) -> Batches:
        """Yields training batches without end, each epoch in an order of its own.

        The images that fill no whole batch at the end of an epoch's order are left out.
        Close the iterator to stop reading ahead.

        Args:
          batch_size: images of all processes together.
          seed: of the orders, crops and flips; below 2³².
          start: number of the first batch; those before it are not read.
          parts: of a batch, of each of which every process reads its share.

        Raises:
          TPPError: the data set is smaller than a batch, or the batch does not split
            over processes; in the course of reading, that a file is not an image.
        """
        self._check_batch(batch_size)
        if batch_size > self.num_train:
            raise TPPError(
                f"there are {self.num_train} training images, which make no batch of "
                f"{batch_size}"
            )
        load = _Training(
            self.train,
            self.image_size,
            self.flip,
            seed,
            self.num_train // batch_size * batch_size,
        )
        return self._batches(load, batch_size, start, None, parts)

    def test_batches(self, batch_size: int) -> Batches:
        """Yields every test image once, in order.

        The last batch is filled up with black images of label -1, which do not count.

        Args:
          batch_size: images of all processes together.

        Raises:
          TPPError: as for training.
        """
        self._check_batch(batch_size)
        load = _Testing(self.test, self.image_size, self.resize)
        return self._batches(load, batch_size, 0, -(-self.num_test // batch_size))

    def _batches(
        self,
        load: _Load,
        batch_size: int,
        start: int,
        count: int | None,
        parts: int = 1,
    ) -> Batches:
        require("train", "grain", "PIL")
        import grain  # late: data sets in memory do not need it

        index, processes = self.shard
        places = np.arange(batch_size).reshape(parts, processes, -1)[:, index]
        batch = _Batch(load, batch_size, tuple(places.reshape(-1).tolist()))
        # A batch is an element, so that processes take whole batches in turn, and one
        # more than is being made is all that waits in memory; beside a process, two.
        threads = 0 if self.workers else self.threads
        options = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=threads and threads + 1
        )
        batches = grain.MapDataset.range(start, _ENDLESS).map(batch)
        batches = batches.to_iter_dataset(options)
        if self.workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # by no command line; Grain reads its own
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self.workers), _begin_worker
            )
        return _closing(batches, count)

    def _check_batch(self, batch_size: int) -> None:
        if batch_size < 1 or batch_size % self.shard[1]:
            raise TPPError(
                f"the batch of {batch_size} does not split over {self.shard[1]} "
                "processes"
            )


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Loads the part of a batch that is this process's, given its number."""

    load: _Load
    size: int
    places: tuple[int, ...]

    def __call__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        places = [number * self.size + place for place in self.places]
        image, label = self.load(places[0])
        images = np.empty((len(places), *image.shape), np.uint8)
        labels = np.empty(len(places), np.int32)
        images[0], labels[0] = image, label
        for i, place in enumerate(places[1:], 1):
            images[i], labels[i] = self.load(place)
        return images, labels


@dataclasses.dataclass(frozen=True)
class _Training:
    """Loads the training image that stands at a place of all epochs' orders."""

    files: Files
    size: int
    flip: bool
    seed: int
    per_epoch: int  # images of an epoch's whole batches

    def __call__(self, place: int) -> tuple[np.ndarray, int]:
        from grain.experimental import index_shuffle

        from tpp_jax.data import crops

        epoch, i = divmod(place, self.per_epoch)
        seed = np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]
        # The permutation that Grain shuffles with: no list of the images is drawn up.
        i = index_shuffle(i, max_index=len(self.files) - 1, seed=int(seed), rounds=4)
        rng = np.random.default_rng((self.seed, place))
        image, label = _decoded(self.files, i)
        return crops.crop_to_train(image, rng, self.size, flip=self.flip), label


@dataclasses.dataclass(frozen=True)
class _Testing:
    """Loads a test image; black ones of label -1 follow the last."""

    files: Files
    size: int
    resize: int

    def __call__(self, place: int) -> tuple[np.ndarray, int]:
        from tpp_jax.data import crops

        if place >= len(self.files):
            return np.zeros((self.size, self.size, 3), np.uint8), -1
        image, label = _decoded(self.files, place)
        return crops.crop_to_test(image, self.resize, self.size), label


def _decoded(files: Files, i: int) -> tuple[Any, int]:
    from tpp_jax.data import crops

    try:
        content, label = files[i]
        return crops.decode(content), label
    except crops.DAMAGED as error:
        reason = getattr(error, "strerror", None) or error  # without the name
        raise TPPError(
            f"the image {files.name(i)} cannot be read ({reason}): replace it, or "
            "remove it and start again"
        ) from error


def _begin_worker(index: int, count: int) -> None:
    """Binds a process that decodes to the one that started it, in life and death."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other to handle

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # it was killed: nobody will ask this one to stop

    threading.Thread(target=follow, daemon=True).start()


def _closing(batches: Any, count: int | None) -> Batches:
    """Yields from an endless Grain data set, whose threads and processes end with it.

    Batches that workers make lie in shared memory. They are copied out of it, and no
    variable here keeps them, so that it is free again whatever becomes of them; for the
    same reason the end is here and not in Grain, which would keep the last ones with
    its StopIteration.
    """
    iterator = iter(batches)
    try:
        yield from map(_copied, itertools.islice(iterator, count))
    except RuntimeError as error:
        if "Worker process" not in str(error):
            raise
        raise TPPError(
            "a process that decodes images has died; its own message may stand above. "
            "Set fewer config.data.workers, or 0, if memory is full or a container's "
            "/dev/shm; a script must begin under if __name__ == '__main__'"
        ) from error
    finally:
        iterator.close()


def _copied(batch: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = batch
    return np.array(images), np.array(labels)


class _InTFDS:
    """The images of a split that TensorFlow Datasets has prepared, undecoded."""

    def __init__(self, builder: Any, split: str) -> None:
        import tensorflow_datasets as tfds

        skip = {"image": tfds.decode.SkipDecoding()}
        self._split = f"{builder.name}, split {split}"
        self._source = builder.as_data_source(split=split, decoders=skip)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        example = self._source[i]
        return example["image"], int(example["label"])

    def name(self, i: int) -> str:
        return f"number {i} of {self._split}"


def open_stream(
    name: str,
    data_dir: str | None = None,
    *,
    image_size: int = 224,
    resize: int = 256,
    flip: bool = True,
    workers: int = 0,
    threads: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Stream:
    """Opens a data set of ImageNet's kind; no image is read yet.

    Args:
      name: ``"folder"`` for ``data_dir/train`` and ``data_dir/val`` with a folder of
        JPEG (PNG…) files for each class, classes numbered in the order of their names.
        What is left out there, hidden files for example, is counted in a warning;
        ``"imagenet2012"`` as TensorFlow Datasets prepares it, as array_record.
      data_dir: where it is; for TFDS None is its own default.
      image_size: height and width of the images it gives, in pixels.
      resize: shorter side of a test image before its centre crop, in pixels.
      flip: whether training images are mirrored at random.
      workers: processes that decode; 0 for threads of this one, which is as fast up to
        some ten cores, since Pillow decodes outside Python's lock.
      threads: that decode, where there are no workers; None for one a core, 16 at most.
      shard: which of how many equal parts of each batch to read, ``(process_index,
        process_count)`` where several processes train.

    Raises:
      TPPError: there is no such data set, or it is not as it should be.
    """
    if name == "folder":
        train, test, num_classes = folders.open_folders(data_dir)
    elif name == "imagenet2012":
        train, test, num_classes = _imagenet(data_dir)
    else:
        raise TPPError(f"unknown streamed data set {name!r}: {' or '.join(STREAMED)}")
    threads = _cores() if threads is None else threads
    if min(image_size, resize, threads) < 1 or workers < 0:
        raise TPPError(
            f"image_size {image_size}, resize {resize} and threads {threads} must be 1 "
            f"or more, workers {workers} not negative"
        )
    if not 0 <= shard[0] < shard[1]:
        raise TPPError(f"shard {shard} must be an index and, above it, a count")
    return Stream(
        train,
        test,
        num_classes,
        image_size,
        resize,
        flip,
        workers,
        threads,
        shard,
    )


def _cores() -> int:
    """Returns how many cores this process may use, 16 at most."""
    has_affinity = hasattr(os, "sched_getaffinity")  # macOS has not
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min(cores, 16)


def _imagenet(data_dir: str | None) -> tuple[Files, Files, int]:
    builder = sources.open_builder("imagenet2012", data_dir)
    with sources.explained("imagenet2012", builder, data_dir):
        return _InTFDS(builder, "train"), _InTFDS(builder, "validation"), 1000
