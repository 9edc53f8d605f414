"""Small image data sets, read into memory as uint8 arrays.

`digits` comes with scikit-learn and needs no download. The others are read with
`tfds.data_source` from data that TensorFlow Datasets has prepared in the array_record
format, which needs no TensorFlow; `tpp_jax.data.prepare` prepares them.
"""

import contextlib
import difflib
import os
import shlex
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from tpp_jax.errors import TPPError, install_command, require


class Dataset(NamedTuple):
    """A data set in memory, with the statistics that normalise it.

    Attributes:
      train_images: Training pixels, 0 to 255.
      train_labels: Training classes, 0 to ``num_classes`` - 1.
      test_images: Test pixels, 0 to 255.
      test_labels: Test classes, 0 to ``num_classes`` - 1.
      num_classes: Number of classes.
      mean: Mean per channel for the normalisation of inputs, in units of pixel / 255.
      std: Standard deviation per channel, in units of pixel / 255.
    """

    train_images: UInt8[np.ndarray, "train h w c"]
    train_labels: Int32[np.ndarray, " train"]
    test_images: UInt8[np.ndarray, "test h w c"]
    test_labels: Int32[np.ndarray, " test"]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return len(self.train_labels)

    @property
    def num_test(self) -> int:
        """Number of test images."""
        return len(self.test_labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image, (height, width, channels)."""
        return self.train_images.shape[1:]

    def train_batches(
        self, batch_size: int, seed: int
    ) -> Generator[
        tuple[UInt8[np.ndarray, "b h w c"], Int32[np.ndarray, " b"]], None, None
    ]:
        """Yields the full batches of one epoch, in random order, not augmented.

        Args:
          batch_size: Number of images in a batch.
          seed: Seed of the random order.
        """
        order = np.random.default_rng(seed).permutation(self.num_train)
        for start in range(0, self.num_train - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield self.train_images[chosen], self.train_labels[chosen]


class _Spec(NamedTuple):
    """Facts about a TFDS data set that are known before it is read."""

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_TFDS = {
    # ImageNet's statistics, with which the original implementation normalises CIFAR-10.
    "cifar10": _Spec(10, IMAGENET_MEAN, IMAGENET_STD),
    "cifar100": _Spec(100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "emnist/balanced": _Spec(47, (0.1751,), (0.3332,)),
    "fashion_mnist": _Spec(10, (0.2860,), (0.3530,)),
    "kmnist": _Spec(10, (0.1918,), (0.3483,)),
    "mnist": _Spec(10, (0.1307,), (0.3081,)),
    "svhn_cropped": _Spec(10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}

NAMES = tuple(sorted(["digits", *_TFDS]))
"""Names of the data sets that `load` reads."""


def load(name: str, data_dir: str | None = None, pad_to: int = 0) -> Dataset:
    """Reads a data set by name.

    Args:
      name: Name of the data set, one of `NAMES`.
      data_dir: Folder that holds the prepared TFDS data; None for TFDS's default,
        ``~/tensorflow_datasets``. Not used by ``digits``.
      pad_to: Height and width in pixels to which images are padded with zeros on all
        sides (MNIST's 28 to 32, say); 0 for no padding. `mean` and `std` remain those
        of the unpadded images.

    Returns:
      The training and test images in memory.

    Raises:
      TPPError: If the name is unknown, the data is not prepared in `data_dir` or not in
        the array_record format, a package is missing, a label is out of range, or the
        images are larger than `pad_to`. The message names the fix.

    Example:
      >>> digits = load("digits")
      >>> digits.train_images.shape, digits.test_images.shape
      ((1437, 8, 8, 1), (360, 8, 8, 1))
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=2, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise TPPError(
            f"There is no data set named {name!r}. {hint}Known: {', '.join(NAMES)}."
        )
    dataset = _load_digits() if name == "digits" else _load_tfds(name, data_dir)
    for split in ("train", "test"):
        _check_labels(name, split, getattr(dataset, f"{split}_labels"), dataset)
    if not pad_to:
        return dataset
    return dataset._replace(
        train_images=_pad(name, dataset.train_images, pad_to),
        test_images=_pad(name, dataset.test_images, pad_to),
    )


def _load_digits() -> Dataset:
    """Reads scikit-learn's 1,797 handwritten digits, 8x8 pixels, split 1437 / 360.

    The split is fixed: of the images sorted stably by class every fifth, beginning with
    the first, is a test image. Both splits keep the original order, and their class
    shares agree to within one image.
    """
    require("train", "sklearn")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    # The pixels are 0 to 16; the rest of the library expects 0 to 255.
    pixels = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    is_test = np.zeros(len(labels), bool)
    is_test[np.argsort(labels, kind="stable")[::5]] = True
    train = pixels[~is_test]
    return Dataset(
        train_images=train,
        train_labels=labels[~is_test],
        test_images=pixels[is_test],
        test_labels=labels[is_test],
        num_classes=10,
        mean=(float(np.mean(train / 255)),),
        std=(float(np.std(train / 255)),),
    )


def _load_tfds(name: str, data_dir: str | None) -> Dataset:
    """Reads a prepared TFDS data set and decodes it into memory."""
    builder = open_builder(name, data_dir)
    with explained(name, builder, data_dir):
        sources = [builder.as_data_source(split=split) for split in ("train", "test")]
    (train_images, train_labels), (test_images, test_labels) = (
        _read(source, name, builder, data_dir) for source in sources
    )
    return Dataset(train_images, train_labels, test_images, test_labels, *_TFDS[name])


def open_builder(name: str, data_dir: str | None) -> Any:
    """Returns TFDS's builder of a data set.

    Args:
      name: Name of the data set in TFDS.
      data_dir: Folder that holds the prepared data; None for TFDS's default.

    Raises:
      TPPError: If a package is missing or the prepared data is damaged.
    """
    require("train", "array_record", "PIL", "tensorflow_datasets")
    import tensorflow_datasets as tfds

    data_dir = os.path.expanduser(data_dir) if data_dir else None
    try:
        return tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # of any type, where TFDS's files are damaged
        where = data_dir or "TFDS's default folder"
        raise TPPError(
            f"the prepared data of {name} in {where} cannot be opened "
            f"({_in_short(error)}). Delete its folder there and prepare it again: "
            f"{prepare_command(name, data_dir)}"
        ) from error


@contextlib.contextmanager
def explained(name: str, builder: Any, data_dir: str | None) -> Iterator[None]:
    """Turns errors of TFDS while it opens a data set into messages that name the fix.

    Args:
      name: Name of the data set.
      builder: TFDS's builder of the data set.
      data_dir: Folder that holds the prepared data; None for TFDS's default.
    """
    try:
        yield
    except (NotImplementedError, KeyError, ValueError, OSError) as error:
        raise _why_unreadable(name, builder, data_dir, error) from error


def _read(
    source: Any, name: str, builder: Any, data_dir: str | None
) -> tuple[UInt8[np.ndarray, "n h w c"], Int32[np.ndarray, " n"]]:
    """Reads all examples of a data source; decoding takes about 0.2 ms per image."""
    labels = np.empty(len(source), np.int32)
    images = None
    for i in range(len(source)):
        # TFDS's batched read is not faster, as decoding takes most of the time, and its
        # mock of a data source does not support it.
        try:
            example = source[i]
        except Exception as error:  # array_record and decoders raise errors of any type
            raise TPPError(
                f"example {i} of {name} in {builder.data_dir} cannot be read "
                f"({_in_short(error)}): the data is damaged. Delete that folder and "
                f"prepare it again: {prepare_command(name, data_dir)}"
            ) from error
        if images is None:
            images = np.empty((len(source), *example["image"].shape), np.uint8)
        images[i] = example["image"]
        labels[i] = example["label"]
    if images is None:
        raise TPPError(
            f"The data source {source!r} holds no examples: prepare it again."
        )
    return images, labels


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _why_unreadable(
    name: str, builder: Any, data_dir: str | None, error: Exception
) -> TPPError:
    """Returns the error that explains why TFDS cannot open a data set."""
    data_dir = os.path.expanduser(data_dir) if data_dir else None
    if data_dir and "://" not in data_dir and not os.path.isdir(data_dir):
        return TPPError(
            f"The data folder {data_dir} does not exist. Point data_dir at prepared "
            f"TFDS data, or prepare {name} there: "
            f"{prepare_command(name, data_dir)}"
        )
    if not builder.info.splits:
        return TPPError(
            f"{name} is not prepared ({builder.data_dir} holds no data set). Point "
            "data_dir at prepared TFDS data, or prepare it: "
            f"{prepare_command(name, data_dir)}"
        )
    formats = sorted(f.value for f in builder.info.available_file_formats())
    if "array_record" not in formats:
        return TPPError(
            f"{name} in {builder.data_dir} is prepared as {', '.join(formats)}; only "
            "array_record can be read without TensorFlow. Prepare it in another "
            "folder, and point data_dir there: "
            f"{prepare_command(name, 'DIR')}"
        )
    return TPPError(
        f"{name} in {builder.data_dir} cannot be opened ({error}). Delete that folder "
        f"and prepare it again: {prepare_command(name, data_dir)}"
    )


def prepare_command(name: str, data_dir: str | None) -> str:
    """Returns the shell command that downloads and prepares a TFDS data set.

    Args:
      name: Name of the data set.
      data_dir: Folder to prepare it in, or None for TFDS's default.
    """
    where = f" --data_dir={shlex.quote(data_dir)}" if data_dir else ""
    command = f"python -m tpp_jax.data.prepare {name}{where}"
    return f"{install_command('prepare')} && {command}"


def _check_labels(
    name: str, split: str, labels: Int32[np.ndarray, " n"], dataset: Dataset
) -> None:
    """Raises for a label without an output of the network: JAX would not report it."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= dataset.num_classes:
        raise TPPError(
            f"The {split} labels of {name} run from {low} to {high}, but its "
            f"{dataset.num_classes} classes are 0 to {dataset.num_classes - 1}: the "
            "data is damaged; prepare it again."
        )


def padded_size(name: str, height: int, width: int, pad_to: int) -> tuple[int, int]:
    """Returns the height and width of a data set's images after padding.

    Args:
      name: Name of the data set, for a message.
      height: Height of an image in pixels.
      width: Width of an image in pixels.
      pad_to: Height and width to pad to; 0 for no padding.

    Raises:
      TPPError: If the images are larger than ``pad_to``.

    Example:
      >>> padded_size("mnist", 28, 28, pad_to=32)
      (32, 32)
    """
    if 0 < pad_to < max(height, width):
        raise TPPError(
            f"pad_to is {pad_to}, but the images of {name} are {height}x{width}: give "
            f"{max(height, width)} or more, or 0 for no padding."
        )
    return (pad_to, pad_to) if pad_to else (height, width)


def _pad(
    name: str, images: UInt8[np.ndarray, "n h w c"], size: int
) -> UInt8[np.ndarray, "n size size c"]:
    """Pads by zeros on all sides; an odd number has one more at bottom and right."""
    height, width = images.shape[1:3]
    padded_size(name, height, width, size)
    top, left = (size - height) // 2, (size - width) // 2
    borders = (top, size - height - top), (left, size - width - left)
    return np.pad(images, ((0, 0), *borders, (0, 0)))
