"""Mistakes in data sets: missing and damaged files, classes, sizes, text."""

import functools
import pathlib
from typing import Any

import numpy as np
from flax import nnx
from PIL import Image

import tpp_jax as tpp
from tests.mistakes.runs import Cases, train
from tpp_jax.training.language import LanguageModelling

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


def _text(folder: pathlib.Path, content: bytes = b"a\n", **fields: Any) -> Any:
    (folder / "part.txt").write_bytes(content)
    return tpp.data.load_text(folder, **fields)


def _tokenizer(folder: pathlib.Path) -> Any:
    (folder / "tokenizer.json").write_text("{}")
    return _text(folder, 30 * b"a\n", tokenizer=folder / "tokenizer.json")


def _language(folder: pathlib.Path, vocabulary: int = 256, **fields: Any) -> Any:
    text = _text(folder, b"some text\n" * 300)
    sizes = {"width": 8, "depth": 1, "heads": 2, "kv_heads": 1, "head_size": 4}
    config = tpp.models.DecoderConfig(vocabulary=vocabulary, hidden=8, **sizes)
    make = functools.partial(tpp.models.Decoder, config)
    task = LanguageModelling(text, lambda rngs: make(rngs=rngs), **fields)
    return task.model(nnx.Rngs(0))


def text() -> Cases:
    yield from (
        (
            "text from a folder that does not exist",
            lambda f: tpp.data.load_text(f / "none"),
        ),
        ("text from a folder without text", tpp.data.load_text),
        ("text with a file that is not UTF-8", lambda f: _text(f, b"caf\xe9")),
        ("text from files that are empty", lambda f: _text(f, b"")),
        ("text of which 0 is held out", lambda f: _text(f, held_out=0)),
        ("a tokenizer that is none", _tokenizer),
        (
            "text for fewer sequences than a batch has",
            lambda f: _language(f, length=100),
        ),
        (
            "held-out text shorter than a sequence",
            lambda f: _language(f, length=400, batch_size=2),
        ),
        (
            "sequences of no tokens",
            lambda f: _language(f, length=0),
        ),
        (
            "a language model with fewer tokens than the text",
            lambda f: _language(f, length=16, vocabulary=100),
        ),
    )


def data() -> Cases:
    yield from images()
    yield from text()


def images() -> Cases:
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
