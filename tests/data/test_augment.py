"""What augmentation does to pixels, and that it does not depend on the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpp_jax.data import augment, normalize
from tpp_jax.errors import TPPError


def _images(batch, height=7, width=5, channels=3, seed=0):
    # No zeros among the pixels, so that zeros in a result come from the padding.
    rng = np.random.default_rng(seed)
    return rng.integers(1, 256, (batch, height, width, channels), dtype=np.uint8)


def _keys(batch, seed=0):
    return jax.random.split(jax.random.key(seed), batch)


def _reference(image, top, left, mirrored, padding):
    """The crop at (top, left) of the zero-padded image, mirrored or not."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    crop = padded[top : top + height, left : left + width]
    return crop[:, ::-1] if mirrored else crop


def _explanations(image, result, padding, flips):
    """All (top, left, mirrored) that explain the result of one image."""
    offsets = range(2 * padding + 1)
    return [
        (top, left, mirrored)
        for top in offsets
        for left in offsets
        for mirrored in flips
        if np.array_equal(_reference(image, top, left, mirrored, padding), result)
    ]


@settings(max_examples=12)
@given(
    padding=st.integers(0, 3),
    flip=st.booleans(),
    height=st.integers(4, 7),
    width=st.integers(4, 7),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**31 - 1),
)
def test_each_image_is_a_crop_and_flip_of_itself(
    padding, flip, height, width, channels, seed
):
    images = _images(6, height, width, channels, seed % 1000)
    result = augment(
        _keys(6, seed), jnp.asarray(images), crop_padding=padding, flip=flip
    )
    assert result.dtype == jnp.uint8
    assert result.shape == images.shape
    for image, augmented in zip(images, np.asarray(result), strict=True):
        flips = (False, True) if flip else (False,)
        assert _explanations(image, augmented, padding, flips)


def test_crop_and_flip_equal_the_numpy_reference_at_the_drawn_offsets():
    padding, images, keys = 4, _images(64), _keys(64)
    result = augment(keys, jnp.asarray(images), crop_padding=padding, flip=True)
    ends = jnp.array([9, 9, 2])
    draws = jax.vmap(lambda key: jax.random.randint(key, (3,), 0, ends))(keys)
    for draw, image, augmented in zip(
        np.asarray(draws), images, np.asarray(result), strict=True
    ):
        top, left, mirrored = draw
        expected = _reference(image, top, left, bool(mirrored), padding)
        np.testing.assert_array_equal(augmented, expected)


def test_every_offset_and_both_directions_are_drawn_about_equally_often():
    image = np.arange(1, 17, dtype=np.uint8).reshape(4, 4, 1)
    batch = np.broadcast_to(image, (1800, 4, 4, 1))
    result = augment(_keys(1800), jnp.asarray(batch), crop_padding=1, flip=True)
    counts = {}
    for augmented in np.asarray(result):
        (choice,) = _explanations(image, augmented, 1, (False, True))
        counts[choice] = counts.get(choice, 0) + 1
    assert len(counts) == 3 * 3 * 2  # 100 of each are expected; 10 is one sigma
    assert min(counts.values()) > 60 and max(counts.values()) < 140


@pytest.mark.parametrize(("padding", "flip"), [(0, True), (4, True), (4, False)])
def test_a_split_batch_is_augmented_as_the_whole(padding, flip):
    images, keys = jnp.asarray(_images(12)), _keys(12)
    run = jax.jit(functools.partial(augment, crop_padding=padding, flip=flip))
    whole = run(keys, images)
    halves = [run(keys[half], images[half]) for half in (slice(0, 6), slice(6, 12))]
    np.testing.assert_array_equal(jnp.concatenate(halves), whole)


def test_a_batch_split_over_devices_is_augmented_as_on_one():
    devices = jax.local_device_count()
    images, keys = jnp.asarray(_images(3 * devices)), _keys(3 * devices)
    run = functools.partial(augment, crop_padding=4, flip=True)
    shards = jax.pmap(run)(
        keys.reshape(devices, 3), images.reshape(devices, 3, *images.shape[1:])
    )
    whole = jax.jit(run)(keys, images)
    np.testing.assert_array_equal(shards.reshape(whole.shape), whole)


def test_the_crop_does_not_depend_on_whether_images_are_flipped():
    images, keys = jnp.asarray(_images(16)), _keys(16)
    plain = augment(keys, images, crop_padding=2, flip=False)
    flipped = augment(keys, images, crop_padding=2, flip=True)
    same = np.all(plain == flipped, axis=(1, 2, 3))
    mirror = np.all(_images(16)[:, :, ::-1] == _images(16), axis=(1, 2, 3))
    assert not mirror.any()
    assert 0 < same.sum() < 16


def test_without_crop_and_flip_nothing_changes():
    images = _images(3)
    result = augment(_keys(3), jnp.asarray(images), crop_padding=0, flip=False)
    np.testing.assert_array_equal(result, images)


def test_padding_is_black_before_normalisation():
    images = jnp.full((8, 4, 4, 1), 255, jnp.uint8)
    result = augment(_keys(8), images, crop_padding=4, flip=False)
    inputs = normalize(result, (0.5,), (0.25,))
    assert set(np.unique(inputs)) == {-2.0, 2.0}


def test_negative_padding_is_an_error():
    with pytest.raises(TPPError, match="crop_padding is -1"):
        augment(_keys(1), jnp.asarray(_images(1)), crop_padding=-1, flip=False)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_normalisation_subtracts_the_mean_and_divides_by_the_deviation(dtype):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = _images(2)
    result = normalize(jnp.asarray(images), mean, std, dtype)
    assert result.dtype == dtype
    expected = (images.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    tolerance = float(jnp.finfo(dtype).eps) * 2
    np.testing.assert_allclose(
        np.asarray(result, np.float64), expected, rtol=tolerance, atol=tolerance
    )


def test_normalisation_needs_one_statistic_per_channel():
    with pytest.raises(TPPError, match="3 channels, but 1 means"):
        normalize(jnp.asarray(_images(1)), (0.5,), (0.25,))
