"""Data sets too large for memory, read and decoded by Grain during training.

A batch depends only on the seed and its number, and not on the number of threads or
processes that decode or on where reading starts: the position in the data is the number
of the step.
"""

import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int32, UInt8

from tpp_jax.data import folders, sources
from tpp_jax.errors import TPPError, require

STREAMED = ("folder", "imagenet2012")
"""Names of the data sets that `open_stream` opens."""

_ENDLESS = 2**48  # number of batches, more than any run reads

_Pair = tuple[UInt8[np.ndarray, "b h w c"], Int32[np.ndarray, " b"]]
Batches = Generator[_Pair, None, None]
_Load = Callable[[int], tuple[UInt8[np.ndarray, "h w c"], int]]


class Files(Protocol):
    """Image files by number."""

    def __len__(self) -> int:
        """Returns the number of files."""
        ...

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        """Returns the content and the class of a file."""
        ...

    def name(self, i: int) -> str:
        """Returns the name of a file, for an error message."""
        ...


@dataclasses.dataclass(frozen=True)
class Stream:
    """A data set that is read batch by batch.

    Attributes:
      train: Files of the training images.
      test: Files of the test images.
      num_classes: Number of classes.
      image_size: Height and width of the images in a batch, in pixels.
      resize: Length of the shorter side of a test image before its centre crop.
      flip: Whether training images are mirrored at random.
      workers: Number of processes that decode; 0 for threads of this process.
      threads: Number of threads that read and decode in each process.
      shard: Index and number of the equal shares of a batch, of which this process
        reads one.
      mean: Mean per channel for the normalisation of inputs, in units of pixel / 255.
      std: Standard deviation per channel, in units of pixel / 255.
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
        """Shape of one image, (height, width, channels)."""
        return self.image_size, self.image_size, 3

    def train_batches(
        self, batch_size: int, seed: int, start: int = 0, accumulate: int = 1
    ) -> Batches:
        """Yields training batches endlessly, each epoch in a different order.

        The images at the end of an epoch that do not fill a batch are dropped. Close
        the iterator to stop reading ahead.

        Args:
          batch_size: Number of images of all processes together.
          seed: Seed of the orders, crops and flips; below 2³².
          start: Number of the first batch; those before it are not read.
          accumulate: Number of equal parts of a batch over which gradients are
            accumulated; every process reads its share of each.

        Raises:
          TPPError: If the data set is smaller than a batch, or the batch does not split
            over the processes; during iteration, if a file is not an image.
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
        return self._batches(load, batch_size, start, None, accumulate)

    def test_batches(self, batch_size: int) -> Batches:
        """Yields every test image once, in order.

        The last batch is padded with black images of label -1, which do not count.

        Args:
          batch_size: Number of images of all processes together.

        Raises:
          TPPError: If the batch does not split over the processes; during iteration, if
            a file is not an image.
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
        accumulate: int = 1,
    ) -> Batches:
        require("train", "grain", "PIL")
        import grain  # late: data sets in memory do not need it

        index, processes = self.shard
        places = np.arange(batch_size).reshape(accumulate, processes, -1)[:, index]
        batch = _Batch(load, batch_size, tuple(places.reshape(-1).tolist()))
        # Grain's elements are batches, so that processes take turns with batches. With
        # threads only one finished batch waits in memory, with processes two each.
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
    """Loads this process's share of the batch with a given number."""

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
    """Loads the training image at a position in the sequence of all epochs."""

    files: Files
    size: int
    flip: bool
    seed: int
    per_epoch: int  # number of images in an epoch's full batches

    def __call__(self, place: int) -> tuple[np.ndarray, int]:
        from grain.experimental import index_shuffle

        from tpp_jax.data import crops

        epoch, i = divmod(place, self.per_epoch)
        seed = np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]
        # Grain's permutation, which needs no list of the images.
        i = index_shuffle(i, max_index=len(self.files) - 1, seed=int(seed), rounds=4)
        rng = np.random.default_rng((self.seed, place))
        image, label = _decoded(self.files, i)
        return crops.crop_to_train(image, rng, self.size, flip=self.flip), label


@dataclasses.dataclass(frozen=True)
class _Testing:
    """Loads a test image, or a black one of label -1 past the last."""

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
        reason = getattr(error, "strerror", None) or error  # without the file's name
        raise TPPError(
            f"the image {files.name(i)} cannot be read ({reason}): replace it, or "
            "remove it and start again"
        ) from error


def _begin_worker(index: int, count: int) -> None:
    """Makes a process that decodes end with the process that started it.

    Args:
      index: Number of this process, as Grain passes it.
      count: Number of processes, as Grain passes it.
    """
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent = multiprocessing.parent_process()
    assert parent is not None, "Grain starts this function in a child process"

    def follow() -> None:
        parent.join()
        os._exit(1)  # the parent was killed and cannot stop this process

    threading.Thread(target=follow, daemon=True).start()


def _closing(batches: Any, count: int | None) -> Batches:
    """Yields from an endless Grain data set and ends its threads and processes.

    Batches of workers are in shared memory. They are copied, and no variable refers to
    the originals, so that their memory is freed even if the caller keeps the copies.
    For the same reason the count is not passed to Grain, whose StopIteration would keep
    the last batches.
    """
    iterator = iter(batches)
    try:
        yield from map(_copied, itertools.islice(iterator, count))
    except RuntimeError as error:
        if "Worker process" not in str(error):
            raise
        raise TPPError(
            "a process that decodes images has died; its own message may be above. "
            "If memory or a container's /dev/shm is full, set fewer "
            "workers (data.workers of a config), or 0; a script must call this under "
            "if __name__ == '__main__'"
        ) from error
    finally:
        iterator.close()


def _copied(batch: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = batch
    return np.array(images), np.array(labels)


class _InTFDS:
    """The undecoded images of a split that TensorFlow Datasets has prepared."""

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
    """Opens a large data set such as ImageNet, without reading an image.

    Args:
      name: Name of the data set. ``"folder"``: ``data_dir/train`` and ``data_dir/val``
        with a folder of JPEG (PNG…) files for each class; classes are numbered in the
        order of their names, and a warning counts ignored files, such as hidden ones.
        ``"imagenet2012"``: as TensorFlow Datasets prepares it, as array_record.
      data_dir: Folder that holds the data set; None for TFDS's default.
      image_size: Height and width of the images in a batch, in pixels.
      resize: Length of the shorter side of a test image before its centre crop, in
        pixels.
      flip: Whether training images are mirrored at random.
      workers: Number of processes that decode; 0 for threads of this process, which are
        as fast up to some ten cores, since Pillow decodes without Python's lock.
      threads: Number of threads that decode if there are no workers; None for one per
        core, 16 at most.
      shard: Index and number of the equal shares of each batch, of which this process
        reads one: ``(process_index, process_count)`` if several processes train.

    Returns:
      The data set, whose images are read when its batches are.

    Raises:
      TPPError: If the data set does not exist or is invalid.

    Example:
      >>> import pathlib, tempfile
      >>> from PIL import Image
      >>> root = pathlib.Path(tempfile.mkdtemp())
      >>> for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
      ...     (root / name).mkdir(parents=True)
      ...     Image.new("RGB", (12, 9)).save(root / name / "1.png")
      >>> stream = open_stream("folder", str(root), image_size=8, resize=8)
      >>> stream.num_classes, stream.num_train
      (2, 2)
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
        raise TPPError(f"shard {shard} must be an index and a count greater than it")
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
    """Returns the number of cores that this process may use, 16 at most."""
    has_affinity = hasattr(os, "sched_getaffinity")  # macOS lacks it
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min(cores, 16)


def _imagenet(data_dir: str | None) -> tuple[Files, Files, int]:
    builder = sources.open_builder("imagenet2012", data_dir)
    with sources.explained("imagenet2012", builder, data_dir):
        return _InTFDS(builder, "train"), _InTFDS(builder, "validation"), 1000
