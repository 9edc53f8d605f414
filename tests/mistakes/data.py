"""Mistakes in data sets: missing and damaged files, classes, sizes."""

import functools
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from tests.mistakes.runs import Cases, train

_STREAMED = {
    "model.name": "cifar_resnet8",
    "data.name": "folder",
    "data.image_size": 32,
    "data.resize": 32,
    "data.batch_size": 8,
    "prune.skip": "",
    "prune.ratios": "*layer*.conv1:0.5",
    "prune.schedule.stabilize": 60,
}


def _train_on_folder(folder: pathlib.Path, **fields: Any) -> Any:
    return train(folder, **(_STREAMED | {"data.dir": str(folder)} | fields))


def _write_classes(
    folder: pathlib.Path, splits: tuple[str, ...] = ("train", "val")
) -> None:
    draws = np.random.default_rng(0)
    for split in splits:
        for name in ("cat", "dog"):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(8):
                pixels = draws.integers(256, size=(40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.jpg")


def _damaged_images(folder: pathlib.Path, content: bytes | int) -> Any:
    _write_classes(folder)
    for image in (folder / "train").rglob("*.jpg"):
        before = image.read_bytes()
        image.write_bytes(before[:content] if isinstance(content, int) else content)
    return _train_on_folder(folder)


def _damaged_metadata(folder: pathlib.Path) -> Any:
    (folder / "mnist" / "3.0.1").mkdir(parents=True)
    (folder / "mnist" / "3.0.1" / "dataset_info.json").write_text("{")
    return train(folder, **{"data.name": "mnist", "data.dir": str(folder)})


def _no_test_images(folder: pathlib.Path) -> Any:
    _write_classes(folder, ("train",))
    return _train_on_folder(folder)


def _empty_class(folder: pathlib.Path) -> Any:
    _write_classes(folder)
    (folder / "train" / "emu").mkdir()
    return _train_on_folder(folder)


def _other_classes(folder: pathlib.Path) -> Any:
    _write_classes(folder)
    (folder / "val" / "dog").rename(folder / "val" / "fox")
    return _train_on_folder(folder)


def _linked(folder: pathlib.Path) -> Any:
    _write_classes(folder)
    (folder / "train" / "cat" / "more").symlink_to(folder / "train")
    return _train_on_folder(folder)


def _large_batch(folder: pathlib.Path) -> Any:
    _write_classes(folder)
    return _train_on_folder(folder, **{"data.batch_size": 64})


def data() -> Cases:
    damaged = functools.partial(functools.partial, _damaged_images)
    yield from (
        (
            "a prepared data set in a folder that does not exist",
            lambda f: train(f, **{"data.name": "mnist", "data.dir": str(f / "none")}),
        ),
        (
            "a folder without the prepared data set",
            lambda f: train(f, **{"data.name": "mnist", "data.dir": str(f)}),
        ),
        ("a prepared data set whose metadata is damaged", _damaged_metadata),
        ("class folders: an empty folder", _train_on_folder),
        ("class folders: no test images", _no_test_images),
        ("class folders: a class without images", _empty_class),
        ("class folders: other classes to test than to train", _other_classes),
        ("class folders: a link that leads back", _linked),
        ("an image that is cut short", damaged(content=200)),
        ("an image that is text", damaged(content=b"hello")),
        ("an image file without content", damaged(content=b"")),
        ("a batch that is larger than the data", _large_batch),
        (
            "crops larger than the images: `config.data.resize` < `image_size`",
            lambda f: _train_on_folder(
                f, **{"data.image_size": 224, "data.resize": 200}
            ),
        ),
    )
