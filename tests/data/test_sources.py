"""Facts about the data sets, reading prepared ones, and what errors tell the user."""

import io
import json
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from tpp_jax.data import load
from tpp_jax.data import prepare as prepare_module
from tpp_jax.errors import TPPError, install_command


def _write_prepared(root, name, splits, file_format="array_record"):
    """Writes what TFDS writes when it prepares images, without TensorFlow.

    Args:
      root: the data_dir.
      name: the data set.
      splits: split name to (images, labels).
      file_format: what the metadata says.
    """
    folder = root / name / str(tfds.builder(name, data_dir=root).version)
    folder.mkdir(parents=True)
    info = {"name": name, "version": folder.name, "fileFormat": file_format}
    info["splits"] = [
        {
            "name": split,
            "numBytes": "1",
            "shardLengths": [str(len(labels))],
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }
        for split, (_, labels) in splits.items()
    ]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    if file_format != "array_record":
        return
    for split, (images, labels) in splits.items():
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            png = io.BytesIO()
            Image.fromarray(image.squeeze()).save(png, "png")
            example = tf_example_pb2.Example()
            feature = example.features.feature
            feature["image"].bytes_list.value.append(png.getvalue())
            feature["label"].int64_list.value.append(int(label))
            feature["id"].bytes_list.value.append(f"{split}_{i}".encode())
            writer.write(example.SerializeToString())
        writer.close()


def _random_split(count, shape, seed, classes=10):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    return images, rng.integers(0, classes, count)


def test_digits_has_the_documented_shapes_and_types():
    digits = load("digits")
    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.test_images.shape == (360, 8, 8, 1)
    assert digits.train_labels.shape == (1437,)
    assert digits.test_labels.shape == (360,)
    assert digits.train_images.dtype == digits.test_images.dtype == np.uint8
    assert digits.train_labels.dtype == digits.test_labels.dtype == np.int32
    assert digits.num_classes == 10
    # 0..16 becomes 0..255, so there are 17 grey levels.
    levels = np.unique(digits.train_images)
    np.testing.assert_array_equal(levels, np.rint(np.arange(17) * 255 / 16))


def test_digits_classes_are_shared_out_evenly():
    digits = load("digits")
    train = np.bincount(digits.train_labels, minlength=10)
    test = np.bincount(digits.test_labels, minlength=10)
    assert np.all(np.abs(test - (train + test) / 5) < 1)


def test_digits_splits_are_the_same_every_time_and_share_out_the_source():
    from sklearn.datasets import load_digits

    first, second = load("digits"), load("digits")
    for a, b in zip(first[:4], second[:4], strict=True):
        np.testing.assert_array_equal(a, b)
    # Together the splits hold every image of the source exactly as often as it does.
    source, _ = load_digits(return_X_y=True)
    ours = np.concatenate([first.train_images, first.test_images]).reshape(1797, 64)
    theirs = np.rint(source * 255 / 16)
    np.testing.assert_array_equal(
        ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)]
    )


def test_digits_statistics_are_those_of_the_training_pixels():
    digits = load("digits")
    pixels = digits.train_images / 255
    assert digits.mean == pytest.approx((pixels.mean(),))
    assert digits.std == pytest.approx((pixels.std(),))


def test_images_are_padded_symmetrically_with_zeros():
    plain, padded = load("digits"), load("digits", pad_to=11)
    assert padded.train_images.shape == (1437, 11, 11, 1)
    np.testing.assert_array_equal(padded.test_images[:, 1:9, 1:9], plain.test_images)
    assert padded.test_images.sum() == plain.test_images.sum()
    assert padded.mean == plain.mean


@pytest.mark.parametrize(
    ("name", "shape"), [("cifar10", (32, 32, 3)), ("mnist", (28,) * 2)]
)
def test_prepared_data_is_read_as_it_was_written(tmp_path, name, shape):
    splits = {
        "train": _random_split(7, shape, seed=0),
        "test": _random_split(4, shape, seed=1),
    }
    _write_prepared(tmp_path, name, splits)
    dataset = load(name, str(tmp_path))
    for split, (images, labels) in splits.items():
        read = getattr(dataset, f"{split}_images")
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, images.reshape(read.shape))
        np.testing.assert_array_equal(getattr(dataset, f"{split}_labels"), labels)
    assert dataset.train_labels.dtype == np.int32


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("cifar10", (32, 32, 3), 10),
        ("cifar100", (32, 32, 3), 100),
        ("emnist/balanced", (28, 28, 1), 47),
        ("fashion_mnist", (28, 28, 1), 10),
        ("kmnist", (28, 28, 1), 10),
        ("mnist", (28, 28, 1), 10),
        ("svhn_cropped", (32, 32, 3), 10),
    ],
)
def test_every_tfds_set_loads(name, shape, classes):
    with tfds.testing.mock_data(num_examples=6):
        dataset = load(name, pad_to=32)
    assert (
        dataset.train_images.shape
        == dataset.test_images.shape
        == (6, 32, 32, shape[-1])
    )
    assert dataset.num_classes == classes
    assert len(dataset.mean) == len(dataset.std) == shape[-1]


def test_cifar10_is_normalised_with_imagenet_statistics():
    with tfds.testing.mock_data(num_examples=1):
        dataset = load("cifar10")
    assert dataset.mean == (0.485, 0.456, 0.406)
    assert dataset.std == (0.229, 0.224, 0.225)


def test_an_unknown_name_is_met_with_near_ones():
    with pytest.raises(TPPError, match=r"named 'cifar-10'. Did you mean cifar10"):
        load("cifar-10")
    with pytest.raises(TPPError, match=r"Known: cifar10, .*digits"):
        load("photographs")


def test_a_missing_folder_is_named(tmp_path):
    missing = tmp_path / "nowhere"
    with pytest.raises(TPPError, match=r"nowhere does not exist. Point data_dir at"):
        load("mnist", str(missing))


def test_an_unprepared_set_says_which_command_prepares_it(tmp_path):
    with pytest.raises(TPPError, match="cifar10 is not prepared") as caught:
        load("cifar10", str(tmp_path))
    command = f"python -m tpp_jax.data.prepare cifar10 --data_dir={tmp_path}"
    assert command in str(caught.value)
    assert f"{install_command('prepare')} && {command}" in str(caught.value)


def test_a_set_prepared_as_tfrecord_says_how_to_prepare_it_anew(tmp_path):
    split = _random_split(1, (28, 28), seed=0)
    _write_prepared(tmp_path, "mnist", {"train": split, "test": split}, "tfrecord")
    with pytest.raises(TPPError, match="prepared as tfrecord; only array_record"):
        load("mnist", str(tmp_path))


def test_a_set_without_a_test_split_is_reported(tmp_path):
    split = _random_split(2, (28, 28), seed=0)
    _write_prepared(tmp_path, "mnist", {"train": split})
    with pytest.raises(TPPError, match=r"mnist in .* cannot be opened"):
        load("mnist", str(tmp_path))


@pytest.mark.parametrize("text", ["hello", "{}", "[]", "", "\xff\xfe"])
def test_metadata_that_is_none_says_what_to_do(tmp_path, text):
    split = _random_split(2, (28, 28), seed=0)
    _write_prepared(tmp_path, "mnist", {"train": split, "test": split})
    [info] = tmp_path.rglob("dataset_info.json")
    info.write_text(text, encoding="latin-1")
    with pytest.raises(
        TPPError, match=r"mnist in .* cannot be opened .*data.prepare mnist"
    ):
        load("mnist", str(tmp_path))


@pytest.mark.parametrize("damage", ["gone", "cut short", "empty", "a byte", "others"])
def test_examples_that_are_damaged_say_what_to_do(tmp_path, damage):
    train, test = (_random_split(n, (28, 28), seed=n) for n in (20, 5))
    _write_prepared(tmp_path, "mnist", {"train": train, "test": test})
    [file] = tmp_path.rglob("*train.array_record*")
    [other] = tmp_path.rglob("*test.array_record*")
    content = bytearray(file.read_bytes())
    content[3000] ^= 1
    match damage:
        case "gone":
            file.unlink()
        case "cut short":
            file.write_bytes(file.read_bytes()[:5000])
        case "empty":
            file.write_bytes(b"")
        case "a byte":
            file.write_bytes(bytes(content))
        case "others":  # fewer than the metadata says
            file.write_bytes(other.read_bytes())
    with pytest.raises(TPPError, match=r"example \d+ of mnist in .*data.prepare mnist"):
        load("mnist", str(tmp_path))


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record", "PIL"])
def test_a_missing_package_is_named_with_the_mend(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TPPError, match=rf"package {package}.*pip install .*\[train"):
        load("mnist")


def test_labels_out_of_range_are_refused(tmp_path):
    images, _ = _random_split(3, (28, 28), seed=0)
    good, bad = (images, [0, 1, 9]), (images, [0, 10, 3])
    _write_prepared(tmp_path, "mnist", {"train": good, "test": bad})
    with pytest.raises(TPPError, match="test labels of mnist run from 0 to 10"):
        load("mnist", str(tmp_path))


def test_images_larger_than_the_padded_size_are_refused():
    with pytest.raises(TPPError, match="pad_to is 6, but the images of digits are 8x8"):
        load("digits", pad_to=6)


def _pretend_installed(monkeypatch):
    monkeypatch.setattr(prepare_module, "require", lambda *names: None)


def test_preparing_needs_tensorflow_and_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert prepare_module.main(["cifar10"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: the package tensorflow, which is needed")
    assert install_command("prepare") in message


@pytest.mark.parametrize("name", ["digits", "photographs"])
def test_only_tfds_sets_are_prepared(name):
    with pytest.raises(TPPError, match=f"'{name}' cannot be prepared"):
        prepare_module.prepare(name)


def test_preparing_leaves_a_prepared_set_alone(monkeypatch, tmp_path, capsys):
    _pretend_installed(monkeypatch)
    split = _random_split(1, (28, 28), seed=0)
    _write_prepared(tmp_path, "mnist", {"train": split, "test": split})
    assert prepare_module.main(["mnist", f"--data_dir={tmp_path}"]) == 0
    assert f"mnist is ready in {tmp_path}" in capsys.readouterr().out


def test_preparing_does_not_overwrite_another_format(monkeypatch, tmp_path):
    _pretend_installed(monkeypatch)
    split = _random_split(1, (28, 28), seed=0)
    _write_prepared(tmp_path, "mnist", {"train": split, "test": split}, "tfrecord")
    with pytest.raises(TPPError, match="holds mnist as tfrecord"):
        prepare_module.prepare("mnist", str(tmp_path))


def test_a_failed_download_is_one_clear_error(monkeypatch, tmp_path):
    _pretend_installed(monkeypatch)

    def fail(_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(TPPError, match=r"mnist could not be .* \(no route to host\)"):
        prepare_module.prepare("mnist", str(tmp_path))
