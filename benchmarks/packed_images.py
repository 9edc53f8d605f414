"""A data set of small images in a few files that are easy to carry.

    python -m benchmarks.packed_images cifar10 --data_dir=~/tensorflow_datasets

writes ``cifar10_1.npz`` and ``cifar10_2.npz``, each of at most half of the images as
lossless WebP, which is about half of the pixels. :func:`read` reads them back, with
JAX, NumPy and Pillow alone.
"""

import argparse
import io
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

import tpp_jax as tpp


def write(dataset: tpp.data.Dataset, files: Sequence[pathlib.Path]) -> None:
    """Writes the images of a data set to files, about as many to each."""
    parts = {
        "train": (dataset.train_images, dataset.train_labels),
        "test": (dataset.test_images, dataset.test_labels),
    }
    total = sum(len(labels) for _, labels in parts.values())
    bounds = [round(total * i / len(files)) for i in range(len(files) + 1)]
    for file, low, high in zip(files, bounds, bounds[1:], strict=False):
        arrays, before = {}, 0
        for name, (images, labels) in parts.items():
            chosen = slice(*(min(max(x - before, 0), len(labels)) for x in (low, high)))
            before += len(labels)
            encoded = [_encoded(image) for image in images[chosen]]
            arrays[f"{name}_bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
            arrays[f"{name}_sizes"] = np.array([len(x) for x in encoded], np.uint32)
            arrays[f"{name}_labels"] = labels[chosen].astype(np.uint8)
        np.savez(file, **arrays)


def read(files: Sequence[pathlib.Path]) -> tpp.data.Dataset:
    """Reads the files of :func:`write`, in their order."""
    images: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    labels: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for file in files:
        with np.load(file) as arrays:
            for name in images:
                ends = np.cumsum(arrays[f"{name}_sizes"], dtype=np.int64)
                content = arrays[f"{name}_bytes"].tobytes()
                starts = np.concatenate([[0], ends[:-1]])[: len(ends)]
                images[name] += [
                    np.asarray(Image.open(io.BytesIO(content[a:b])).convert("RGB"))
                    for a, b in zip(starts, ends, strict=True)
                ]
                labels[name].append(arrays[f"{name}_labels"].astype(np.int32))
    return tpp.data.from_arrays(
        np.stack(images["train"]),
        np.concatenate(labels["train"]),
        np.stack(images["test"]),
        np.concatenate(labels["test"]),
        where=", ".join(map(str, files)),
    )


def synthetic(number: int, size: int = 32, seed: int = 0) -> tpp.data.Dataset:
    """Returns noise around one image for each of ten classes, in place of CIFAR-10."""
    rng = np.random.default_rng(seed)
    means = rng.uniform(64, 192, size=(10, size, size, 3))

    def part(n: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(10, size=n, dtype=np.int32)
        noise = rng.normal(scale=48, size=(n, size, size, 3)).astype("float32")
        return np.clip(means[labels] + noise, 0, 255).astype(np.uint8), labels

    return tpp.data.from_arrays(*part(number), *part(max(number // 5, 1)))


def _encoded(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "webp", lossless=True, quality=100, method=6)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="name of a data set, as for tpp_jax.data.load")
    parser.add_argument("--data_dir")
    parser.add_argument("--files", type=int, default=2)
    options = parser.parse_args()
    files = [pathlib.Path(f"{options.name}_{i + 1}.npz") for i in range(options.files)]
    write(tpp.data.load(options.name, options.data_dir), files)
    for file in files:
        print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
