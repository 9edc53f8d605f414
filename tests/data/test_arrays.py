"""Labelled images of a user's own."""

import numpy as np
import pytest

import tpp_jax as tpp
from tpp_jax.data.arrays import labelled_images
from tpp_jax.errors import TPPError

PIXELS = np.random.default_rng(0).integers(256, size=(12, 6, 5), dtype=np.uint8)
LABELS = np.arange(12) % 4
PART = PIXELS, LABELS
SOURCE = list(zip(PIXELS, LABELS, strict=True))


@pytest.mark.parametrize(
    "found",
    [
        (PART, PART),
        {"train": SOURCE, "test": [{"image": x, "label": y} for x, y in SOURCE]},
        dict(
            zip(
                ("train_images", "train_labels", "test_images", "test_labels"),
                PART + PART,
                strict=True,
            )
        ),
    ],
)
def test_all_forms_give_the_same_data(found):
    dataset = labelled_images(found, "make")
    np.testing.assert_array_equal(dataset.train_images[..., 0], PIXELS)
    np.testing.assert_array_equal(dataset.test_labels, LABELS)
    assert dataset.num_classes == 4 and dataset.image_shape == (6, 5, 1)
    assert dataset.mean == pytest.approx((PIXELS.mean() / 255,))
    assert dataset.std == pytest.approx((PIXELS.std() / 255,))
    assert labelled_images(dataset, "make") is dataset


def test_a_file_of_arrays(tmp_path):
    file = tmp_path / "own.npz"
    arrays = {"train_images": PIXELS, "train_labels": LABELS}
    arrays |= {"test_images": PIXELS, "test_labels": LABELS, "num_classes": 7}
    np.savez(file, **arrays)
    assert tpp.data.read_arrays(str(file)).num_classes == 7
    del arrays["test_labels"]
    np.savez(file, **arrays)
    with pytest.raises(TPPError, match="has no array test_labels"):
        tpp.data.read_arrays(str(file))
    file.write_bytes(b"PK")
    with pytest.raises(TPPError, match="cannot be read"):
        tpp.data.read_arrays(str(file))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (3, "returned a int"),
        ((PART, (PIXELS, LABELS[:3])), "12 test images and 3 labels"),
        ((PART, (PIXELS[:, :4], LABELS)), "must be equal"),
        (((PIXELS / 255, LABELS), PART), "must be uint8"),
        (((PIXELS, LABELS - 1), PART), "have the class -1"),
        (((PIXELS, LABELS / 2), PART), r"must be \[n\]"),
        (((PIXELS[:0], LABELS[:0]), PART), "at least one image"),
        ({"train": [(PIXELS[0], 1), (PIXELS[0, :3], 1)], "test": SOURCE}, "different"),
    ],
)
def test_what_does_not_fit_is_named(found, message):
    with pytest.raises(TPPError, match=message):
        labelled_images(found, "make")
