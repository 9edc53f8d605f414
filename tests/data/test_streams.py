"""Streams: batches that depend on seed and number alone, whoever decodes them."""

import collections
import io
import itertools
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from tests.data.test_crops import encoded
from tests.data.test_sources import _write_prepared
from tpp_jax.data import Stream, crops, open_stream, prepare
from tpp_jax.errors import TPPError

ROOT = pathlib.Path(__file__).parents[2]
SIZES = {"image_size": 8, "resize": 10}
TRAIN, TEST, BATCH = 23, 7, 5  # four batches an epoch, three images left out
CLASSES = ("ant", "bee", "cat")


def numbered(i: int) -> Image.Image:
    """An image that tells its number by its red, and where it was cropped by the rest.

    Red is constant, green grows from left to right and blue from top to bottom.
    """
    rows, columns = np.indices((20, 24))
    pixels = np.stack([np.full_like(rows, 10 * i), 10 * columns, 12 * rows], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def numbers(images: np.ndarray) -> list[int]:
    return (images[:, 0, 0, 0] // 10).tolist()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    """Class folders of numbered images: image i is of class i modulo 3."""
    root = tmp_path_factory.mktemp("folders")
    for split, count in (("train", TRAIN), ("val", TEST)):
        for i in range(count):
            file = root / split / CLASSES[i % 3] / f"{i:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            numbered(i).save(file)
    return root


@pytest.fixture(scope="module")
def stream(root) -> Stream:
    return open_stream("folder", str(root), **SIZES, threads=1)


def taken(batches, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def assert_same(first, second) -> None:
    for ours, theirs in zip(first, second, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert type(a) is np.ndarray and a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def undisturbed(stream):
    """The first ten batches: two epochs and a half."""
    return taken(stream.train_batches(BATCH, seed=3), 10)


def test_a_folder_tells_its_counts_and_classes(root):
    stream = open_stream("folder", str(root))
    assert (stream.num_train, stream.num_test, stream.num_classes) == (TRAIN, TEST, 3)
    assert stream.image_shape == (224, 224, 3)
    assert stream.mean == (0.485, 0.456, 0.406)
    assert stream.std == (0.229, 0.224, 0.225)


def test_batches_are_bytes_of_the_size_asked_for(undisturbed):
    for images, labels in undisturbed:
        assert images.shape == (BATCH, 8, 8, 3) and images.dtype == np.uint8
        assert labels.shape == (BATCH,) and labels.dtype == np.int32


def test_labels_are_the_places_of_the_classes_in_the_alphabet(stream, undisturbed):
    for images, labels in [*undisturbed, *stream.test_batches(TEST)]:
        assert labels.tolist() == [i % 3 for i in numbers(images)]


def test_an_epoch_shows_no_image_twice_and_each_has_its_own_order(undisturbed):
    shown = [numbers(images) for images, _ in undisturbed]
    first, second = (list(itertools.chain(*shown[i : i + 4])) for i in (0, 4))
    assert len(set(first)) == len(set(second)) == 4 * BATCH
    assert first != second
    assert set(first) != set(second)  # what was left out changes as well


def test_epochs_of_whole_batches_show_every_image(stream):
    for images, _ in taken(stream.train_batches(TRAIN, seed=0), 3):
        assert sorted(numbers(images)) == list(range(TRAIN))


def test_another_seed_gives_another_order_and_other_crops(stream, undisturbed):
    other = taken(stream.train_batches(BATCH, seed=4), 4)
    orders = [
        [numbers(images) for images, _ in found] for found in (undisturbed[:4], other)
    ]
    assert orders[0] != orders[1]
    crops_of = [by_number(found) for found in (undisturbed[:4], other)]
    shared = crops_of[0].keys() & crops_of[1].keys()
    assert all((crops_of[0][i] != crops_of[1][i]).any() for i in shared)


def test_an_image_is_cropped_anew_in_every_epoch(undisturbed):
    first, second = by_number(undisturbed[:4]), by_number(undisturbed[4:8])
    shared = first.keys() & second.keys()
    assert len(shared) > 10
    assert all((first[i] != second[i]).any() for i in shared)


def by_number(batches) -> dict[int, np.ndarray]:
    return {
        i: image
        for images, _ in batches
        for i, image in zip(numbers(images), images, strict=True)
    }


def test_a_training_image_is_the_random_crop_of_its_file(undisturbed):
    images, _ = undisturbed[7]
    places = range(7 * BATCH, 8 * BATCH)
    for place, number, image in zip(places, numbers(images), images, strict=True):
        rng = np.random.default_rng((3, place))
        expected = crops.crop_to_train(numbered(number), rng, 8)
        np.testing.assert_array_equal(image, expected)


def test_images_are_mirrored_unless_that_is_switched_off(root, undisturbed):
    def mirrored(batches):
        images = np.concatenate([images for images, _ in batches]).astype(int)
        return images[:, 0, 0, 1] > images[:, 0, -1, 1]

    stream = open_stream("folder", str(root), **SIZES, flip=False)
    plain = taken(stream.train_batches(BATCH, seed=3), 10)
    assert not mirrored(plain).any()
    assert 10 < mirrored(undisturbed).sum() < 40


@pytest.mark.parametrize("start", [1, 3, 4, 9])
def test_begun_in_the_middle_batches_are_those_of_an_undisturbed_run(
    stream, undisturbed, start
):
    resumed = taken(stream.train_batches(BATCH, seed=3, start=start), 10 - start)
    assert_same(resumed, undisturbed[start:])


def test_processes_give_the_same_batches_and_end(root, undisturbed):
    stream = open_stream("folder", str(root), **SIZES, workers=2)
    assert_same(taken(stream.train_batches(BATCH, seed=3, start=2), 8), undisturbed[2:])
    assert not multiprocessing.active_children()


def test_any_number_of_threads_gives_the_same_batches(root, undisturbed):
    stream = open_stream("folder", str(root), **SIZES, threads=4)
    assert_same(taken(stream.train_batches(BATCH, seed=3), 10), undisturbed)


class Counted:
    """Endless files that count how often each is read."""

    def __init__(self, count: int) -> None:
        self.count, self.read = count, collections.Counter()
        self.content = encoded(numbered(1), "png")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        self.read[i] += 1
        return self.content, 0


@pytest.mark.parametrize("threads", [1, 3])
def test_neither_what_is_skipped_nor_what_is_far_ahead_is_read(threads):
    files = Counted(10**9)
    stream = Stream(files, files, 1, 8, 10, threads=threads)
    batches = stream.train_batches(BATCH, seed=0, start=10**7)
    assert not files.read  # nor anything before the first batch is asked for
    next(batches)
    batches.close()
    # One is given out, as many are being made as there are threads, and one waits.
    assert files.read.total() <= (2 + threads) * BATCH


def test_closed_or_forgotten_an_iterator_leaves_no_thread(stream):
    def begun() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name.startswith("grain")]

    batches, forgotten = (stream.train_batches(BATCH, seed=0) for _ in range(2))
    next(batches), next(forgotten)
    found = begun()
    assert found
    batches.close()
    del forgotten
    for thread in found:
        thread.join(timeout=60)  # of what it has begun
    assert not begun()


def test_every_test_image_comes_once_and_padding_does_not_count(stream):
    (first, labels), (last, padded) = stream.test_batches(BATCH)
    assert numbers(first) + numbers(last)[:2] == [0, 3, 6, 1, 4, 2, 5]
    assert labels.tolist() + padded.tolist() == [0, 0, 0, 1, 1, 2, 2, -1, -1, -1]
    assert last.shape == first.shape and not last[2:].any()
    for i, image in by_number([(first, labels)]).items():
        expected = crops.crop_to_test(numbered(i), 10, 8)
        np.testing.assert_array_equal(image, expected)


def test_processes_give_the_test_images_to_the_last(root, stream):
    by_workers = open_stream("folder", str(root), **SIZES, workers=2)
    assert_same(by_workers.test_batches(3), stream.test_batches(3))


def test_the_shards_of_a_batch_are_the_batch_of_one_process(root):
    streams = [
        open_stream("folder", str(root), **SIZES, shard=(i, 3)) for i in range(3)
    ]
    whole = open_stream("folder", str(root), **SIZES)
    for size, first in ((6, "train_batches"), (6, "test_batches")):
        more = {"seed": 1} if first == "train_batches" else {}
        parts = [taken(getattr(s, first)(size, **more), 2) for s in streams]
        joined = [
            tuple(np.concatenate(arrays) for arrays in zip(*shards, strict=True))
            for shards in zip(*parts, strict=True)
        ]
        assert_same(joined, taken(getattr(whole, first)(size, **more), 2))


def test_of_each_part_of_a_batch_every_process_reads_its_share(root):
    streams = [
        open_stream("folder", str(root), **SIZES, shard=(i, 3)) for i in range(3)
    ]
    [whole] = taken(open_stream("folder", str(root), **SIZES).train_batches(6, 1), 1)
    for i, stream in enumerate(streams):
        [share] = taken(stream.train_batches(6, 1, accumulate=2), 1)
        for ours, of_all in zip(share, whole, strict=True):
            np.testing.assert_array_equal(ours, of_all[[i, 3 + i]])


def broken(root: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """Copies the class folders and cuts an image short; that image."""
    shutil.copytree(root, tmp_path / "folders")
    file = tmp_path / "folders" / "val" / "bee" / "01.png"
    file.write_bytes(file.read_bytes()[:60])
    return file


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_also_by_a_process(root, tmp_path, workers):
    folder = broken(root, tmp_path).parents[2]
    stream = open_stream("folder", str(folder), **SIZES, workers=workers)
    with pytest.raises(TPPError, match=r"bee/01.png cannot be read .*: replace it"):
        list(stream.test_batches(4))


def test_what_is_no_image_or_has_gone_is_named(root, tmp_path):
    file = broken(root, tmp_path)
    stream = open_stream("folder", str(file.parents[2]), **SIZES)
    file.write_text("<html>404</html>")
    with pytest.raises(TPPError, match=r"01.png cannot be read .its content is not a"):
        list(stream.test_batches(4))
    file.unlink()
    with pytest.raises(TPPError, match=r"01.png cannot be read .No such file"):
        list(stream.test_batches(4))


SCRIPT = """
import sys
from tpp_jax.data import open_stream

if __name__ == "__main__":
    sizes = {"image_size": 8, "resize": 10}
    stream = open_stream("folder", sys.argv[1], **sizes, workers=int(sys.argv[2]))
    batches = stream.train_batches(5, seed=3)
    print(next(batches)[1].tolist(), flush=True)
    input()
"""


@pytest.mark.parametrize(("by", "workers"), [(signal.SIGKILL, 2), (signal.SIGINT, 1)])
def test_a_scripts_workers_end_with_it(root, undisturbed, tmp_path, by, workers):
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", root, str(workers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    assert process.stdout.readline() == f"{undisturbed[0][1].tolist()}\n"
    process.send_signal(by)
    # The workers share its output: it comes to an end when the last of them is gone.
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -by
    assert errors.count("KeyboardInterrupt") == (by == signal.SIGINT)


def test_imagenet_is_read_as_tfds_prepares_it(tmp_path):
    splits = {
        split: (np.stack([np.asarray(numbered(i)) for i in range(count)]), labels)
        for split, count, labels in (
            ("train", 4, [7, 999, 0, 7]),
            ("validation", 3, [5, 0, 998]),
        )
    }
    _write_prepared(tmp_path, "imagenet2012", splits)
    for workers in (0, 1):  # records are opened anew in a process
        stream = open_stream("imagenet2012", str(tmp_path), **SIZES, workers=workers)
        assert (stream.num_train, stream.num_test, stream.num_classes) == (4, 3, 1000)
        ((images, labels),) = stream.test_batches(3)
        assert labels.tolist() == [5, 0, 998]
        for i, image in enumerate(images):
            expected = crops.crop_to_test(numbered(i), 10, 8)
            np.testing.assert_array_equal(image, expected)
    stream = open_stream("imagenet2012", str(tmp_path), **SIZES)
    ((images, labels),) = taken(stream.train_batches(4, seed=0), 1)
    assert labels.tolist() == [[7, 999, 0, 7][i] for i in numbers(images)]


def test_a_damaged_image_of_imagenet_is_told_by_its_number(tmp_path, monkeypatch):
    image = np.asarray(numbered(0))[None]
    splits = {"train": (image, [0]), "validation": (image, [0])}
    _write_prepared(tmp_path, "imagenet2012", splits)
    stream = open_stream("imagenet2012", str(tmp_path), **SIZES)
    monkeypatch.setattr(crops, "decode", lambda content: Image.open(io.BytesIO(b"")))
    with pytest.raises(TPPError, match="number 0 of imagenet2012, split validation"):
        list(stream.test_batches(1))


def test_imagenet_that_is_not_prepared_says_how_to_prepare_it(tmp_path):
    with pytest.raises(TPPError, match="imagenet2012 is not prepared") as caught:
        open_stream("imagenet2012", str(tmp_path))
    command = f"python -m tpp_jax.data.prepare imagenet2012 --data_dir={tmp_path}"
    assert command in str(caught.value)


def test_imagenets_files_must_be_fetched_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "require", lambda *_: None)
    folder = tmp_path / "downloads" / "manual"
    folder.mkdir(parents=True)
    (folder / "ILSVRC2012_img_train.tar").touch()
    with pytest.raises(TPPError, match=f"put ILSVRC2012_img_val.tar into {folder}"):
        prepare.prepare("imagenet2012", str(tmp_path))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda root: shutil.rmtree(root / "train"), "there is no folder .*train"),
        (lambda root: shutil.rmtree(root / "val"), "there is no folder .*val"),
        (lambda root: shutil.rmtree(root / "val/bee"), "only one of them has bee"),
        (lambda root: (root / "train/dog").mkdir(), "train/dog holds no images"),
        (
            lambda root: [shutil.rmtree(f) for f in (root / "train").iterdir()],
            "train holds no folders: it needs one for each class",
        ),
    ],
)
def test_folders_that_are_not_as_they_should_be_are_named(
    root, tmp_path, mistake, message
):
    folder = shutil.copytree(root, tmp_path / "folders")
    mistake(folder)
    with pytest.raises(TPPError, match=message):
        open_stream("folder", str(folder))


def test_test_images_may_stand_in_val_validation_or_test_and_in_deeper_folders(
    root, tmp_path
):
    folder = shutil.copytree(root, tmp_path / "folders")
    (folder / "val" / "ant").rename(folder / "ants")
    (folder / "val" / "ant").mkdir()
    (folder / "ants").rename(folder / "val" / "ant" / "images")
    (folder / "val" / "ant" / "notes.txt").touch()
    for name in ("val", "validation", "test"):
        (folder / "val").rename(folder / name)
        stream = open_stream("folder", str(folder), **SIZES)
        ((images, _),) = stream.test_batches(TEST)
        assert numbers(images) == [0, 3, 6, 1, 4, 2, 5]
        (folder / name).rename(folder / "val")


def test_the_guides_lines_sort_tiny_imagenets_test_images(root, tmp_path, monkeypatch):
    val = tmp_path / "tiny-imagenet-200" / "val"
    (val / "images").mkdir(parents=True)
    (val.parent / "train").symlink_to(root / "train")
    for i in range(TEST):
        numbered(i).save(val / "images" / f"{i}.png")
    rows = [f"{i}.png\t{CLASSES[i % 3]}\t0\t0\t9\t9\n" for i in range(TEST)]
    (val / "val_annotations.txt").write_text("".join(rows))
    guide = (ROOT / "docs" / "data.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(import pathlib.*?)```", guide, re.DOTALL)[1])
    ((images, _),) = open_stream("folder", str(val.parent), **SIZES).test_batches(TEST)
    assert numbers(images) == [0, 3, 6, 1, 4, 2, 5]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("photographs", {}, "unknown streamed data set 'photographs': folder or im"),
        ("folder", {"data_dir": None}, "'folder' needs data_dir"),
        ("folder", {"image_size": 0}, "image_size 0"),
        ("folder", {"threads": 0}, "threads 0 must be 1 or more"),
        ("folder", {"workers": -1}, "workers -1 not negative"),
        ("folder", {"shard": (2, 2)}, r"shard \(2, 2\) must be an index and"),
    ],
)
def test_wrong_arguments_are_named(root, name, options, message):
    with pytest.raises(TPPError, match=message):
        open_stream(name, **{"data_dir": str(root), **options})


def test_batches_that_cannot_be_are_refused_before_any_is_read(root):
    stream = open_stream("folder", str(root), shard=(0, 2))
    with pytest.raises(TPPError, match="23 training images, which make no batch of 24"):
        stream.train_batches(24, seed=0)
    for batches in (stream.test_batches, lambda n: stream.train_batches(n, seed=0)):
        with pytest.raises(TPPError, match="batch of 5 does not split over 2 proc"):
            batches(5)


def test_a_process_that_dies_is_reported(root):
    stream = open_stream("folder", str(root), **SIZES, workers=1)
    batches = stream.train_batches(BATCH, seed=0)
    next(batches)
    for worker in multiprocessing.active_children():
        worker.kill()
    with pytest.raises(TPPError, match="a process that decodes images has died"):
        collections.deque(batches, maxlen=0)
