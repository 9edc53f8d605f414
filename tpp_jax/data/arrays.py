"""Labelled images of a user's own, from arrays, a file of arrays or random access."""

import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from tpp_jax.data.sources import Dataset
from tpp_jax.data.streams import Stream
from tpp_jax.errors import TPPError

_PARTS = ("train_images", "train_labels", "test_images", "test_labels")


def from_arrays(
    train_images: Any,
    train_labels: Any,
    test_images: Any,
    test_labels: Any,
    *,
    num_classes: int | None = None,
    where: str = "the data",
) -> Dataset:
    """Returns a data set of arrays in memory.

    Args:
      train_images: Pixels from 0 to 255, uint8 ``[n, h, w, c]`` or ``[n, h, w]``.
      train_labels: Classes of these, integers ``[n]`` from 0.
      test_images: Pixels of the test images.
      test_labels: Classes of these.
      num_classes: Number of classes; None for the largest label plus 1.
      where: Origin of the arrays, for messages.

    Returns:
      The data set. It is normalised by the mean and the standard deviation of each
      channel of the training images.

    Raises:
      TPPError: Shapes, types or labels do not fit.

    Example:
      >>> images, labels = np.zeros((6, 8, 8), np.uint8), np.arange(6) % 3
      >>> from_arrays(images, labels, images, labels).image_shape
      (8, 8, 1)
    """
    images = {"train": _pixels(train_images, f"train_images of {where}")}
    images["test"] = _pixels(test_images, f"test_images of {where}")
    labels = {"train": _classes(train_labels, f"train_labels of {where}")}
    labels["test"] = _classes(test_labels, f"test_labels of {where}")
    for part, pixels in images.items():
        if len(pixels) != len(labels[part]) or not len(pixels):
            raise TPPError(
                f"{where} has {len(pixels)} {part} images and {len(labels[part])} "
                "labels: there must be one label for each of at least one image"
            )
    if images["train"].shape[1:] != images["test"].shape[1:]:
        raise TPPError(
            f"the training images of {where} have the shape "
            f"{images['train'].shape[1:]} and the test images "
            f"{images['test'].shape[1:]}: they must be equal"
        )
    largest = int(max(each.max() for each in labels.values()))
    number = largest + 1 if num_classes is None else num_classes
    if largest >= number:
        raise TPPError(f"{where} has the label {largest}, but {number} classes")
    scaled = images["train"].reshape(-1, images["train"].shape[-1])
    mean, std = scaled.mean(0) / 255, scaled.std(0) / 255
    return Dataset(
        images["train"],
        labels["train"],
        images["test"],
        labels["test"],
        number,
        tuple(map(float, mean)),
        tuple(float(x) or 1.0 for x in std),
    )


def read_arrays(path: str) -> Dataset:
    """Reads a ``.npz`` file of images and labels.

    Args:
      path: File with the arrays ``train_images``, ``train_labels``, ``test_images`` and
        ``test_labels``, see :func:`from_arrays`, and if wanted ``num_classes``.

    Returns:
      The data set.

    Raises:
      TPPError: The file is missing or damaged, or its arrays do not fit.

    Example:
      >>> import tempfile
      >>> file = f"{tempfile.mkdtemp()}/own.npz"
      >>> images, labels = np.zeros((6, 8, 8), np.uint8), np.arange(6) % 3
      >>> arrays = dict(zip(_PARTS, (images, labels) * 2, strict=True))
      >>> np.savez(file, **arrays)
      >>> read_arrays(file).num_classes
      3
    """
    try:
        with np.load(pathlib.Path(path)) as file:
            content = dict(file)
    except FileNotFoundError:
        raise TPPError(f"there is no file {path}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise TPPError(f"{path} cannot be read as a .npz file ({error})") from error
    if missing := [part for part in _PARTS if part not in content]:
        raise TPPError(
            f"{path} has no array {missing[0]}; it needs {', '.join(_PARTS)} and has "
            f"{', '.join(sorted(content)) or 'none'}"
        )
    number = content.get("num_classes")
    return from_arrays(
        *(content[part] for part in _PARTS),
        num_classes=None if number is None else int(number),
        where=path,
    )


def labelled_images(found: Any, where: str) -> Dataset | Stream:
    """Returns what a user's function has returned as a data set of images.

    Args:
      found: Data set or stream of this package; a dict of the arrays of
        :func:`from_arrays`; ``((train_images, train_labels), (test_images,
        test_labels))``; or a dict or tuple of two sources of random access, ``train``
        and ``test``, whose elements are ``(image, label)`` or ``{"image": …, "label":
        …}``, as Grain's data sources have them. These are read into memory.
      where: Name of the function, for messages.

    Raises:
      TPPError: It is nothing of these, or its arrays do not fit.
    """
    if isinstance(found, Dataset | Stream):
        return found
    if isinstance(found, Mapping) and found.keys() >= set(_PARTS):
        extra = {key: x for key, x in found.items() if key not in _PARTS}
        if extra.keys() <= {"num_classes"}:
            return from_arrays(*(found[x] for x in _PARTS), **extra, where=where)
    if isinstance(found, Mapping) and set(found) == {"train", "test"}:
        found = found["train"], found["test"]
    if isinstance(found, tuple | list) and len(found) == 2:
        parts = [_pair(part, where) for part in found]
        return from_arrays(*parts[0], *parts[1], where=where)
    raise TPPError(
        f"{where} returned a {type(found).__name__}: image classification needs "
        "((train_images, train_labels), (test_images, test_labels)), a dict of these "
        "four, two sources train and test, or a data set of tpp_jax.data"
    )


def _pair(part: Any, where: str) -> tuple[Any, Any]:
    """Returns images and labels, given so or by random access."""
    two = isinstance(part, tuple | list) and len(part) == 2
    if two and not isinstance(part[0], tuple | Mapping):
        return part[0], part[1]
    if not (hasattr(part, "__len__") and hasattr(part, "__getitem__")):
        raise TPPError(f"{where} returned a {type(part).__name__} in place of images")
    images, labels = [], []
    for i in range(len(part)):
        one = part[i]
        pair = (one["image"], one["label"]) if isinstance(one, Mapping) else tuple(one)
        images.append(np.asarray(pair[0]))
        labels.append(int(pair[1]))
    if len({image.shape for image in images}) > 1:
        raise TPPError(
            f"the images of {where} have different shapes: resize them, or return a "
            "tpp_jax.data.Stream, which crops"
        )
    return np.stack(images), np.asarray(labels)


def _pixels(images: Any, what: str) -> np.ndarray:
    found = np.asarray(images)
    found = found[..., None] if found.ndim == 3 else found
    if found.ndim != 4 or found.dtype != np.uint8:
        raise TPPError(
            f"{what} are {found.dtype} of shape {found.shape}, must be uint8 [n, h, w, "
            "c] from 0 to 255"
        )
    return found


def _classes(labels: Any, what: str) -> np.ndarray:
    found = np.asarray(labels)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise TPPError(f"{what} are {found.dtype} of shape {found.shape}, must be [n]")
    if found.size and found.min() < 0:
        raise TPPError(f"{what} have the class {found.min()}: the first is 0")
    return found.astype(np.int32)
