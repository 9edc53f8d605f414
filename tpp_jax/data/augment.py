"""Random crop, flip and normalisation of image batches, inside the compiled step.

Every image has its own PRNG key, which alone determines its augmentation: a batch that
is split over devices is augmented exactly as on one device.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, UInt8

from tpp_jax.errors import TPPError


def augment(
    keys: Key[Array, " b"],
    images: UInt8[Array, "b h w c"],
    *,
    crop_padding: int,
    flip: bool,
) -> UInt8[Array, "b h w c"]:
    """Zero-pads each image, crops it at a random position and mirrors it at random.

    The row and the column of the crop are uniform on ``0 .. 2 * crop_padding``; the
    image is mirrored left to right with probability one half. Padding happens before
    `normalize`, so that the border is black, as in the original recipe. The crop that a
    key draws does not depend on `flip`.

    Args:
      keys: PRNG keys, one per image.
      images: Pixels of the batch, 0 to 255.
      crop_padding: Number of pixels of zeros on each side before the crop; 0 for no
        crop. A Python int, since the compiled program depends on it.
      flip: Whether to mirror at random; a Python bool.

    Returns:
      The augmented batch, of the same shape and type.

    Raises:
      TPPError: If `crop_padding` is negative.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> images = jnp.full((2, 8, 8, 3), 255, jnp.uint8)
      >>> augment(keys, images, crop_padding=2, flip=True).shape
      (2, 8, 8, 3)
    """
    if crop_padding < 0:
        raise TPPError(
            f"crop_padding is {crop_padding}; it must be 0 (no crop) or a positive "
            "number of pixels."
        )
    if crop_padding == 0 and not flip:
        return images
    height, width = images.shape[1:3]
    choices = jnp.array([2 * crop_padding + 1, 2 * crop_padding + 1, 2])
    top, left, mirrored = jax.vmap(
        lambda key: jax.random.randint(key, (3,), 0, choices), out_axes=1
    )(keys)
    # Crop and flip both select rows and columns of the padded image, so two gathers
    # suffice. Measured on the CPU this is the fastest formulation: vmapped
    # dynamic_slice, one joint gather and one-hot matrix products are slower.
    rows = top[:, None] + jnp.arange(height)
    columns = jnp.arange(width)
    if flip:
        columns = jnp.where(mirrored[:, None], columns[::-1], columns)
    columns = left[:, None] + columns
    border = (crop_padding, crop_padding)
    padded = jnp.pad(images, ((0, 0), border, border, (0, 0)))
    cropped = jnp.take_along_axis(
        padded, rows[:, :, None, None], axis=1, mode="promise_in_bounds"
    )
    return jnp.take_along_axis(
        cropped, columns[:, None, :, None], axis=2, mode="promise_in_bounds"
    )


def normalize(
    images: UInt8[Array, "*b h w c"],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*b h w c"]:
    """Maps pixels to network inputs: ``(pixel / 255 - mean) / std`` per channel.

    Args:
      images: Pixels, 0 to 255.
      mean: Mean per channel, in units of pixel / 255.
      std: Standard deviation per channel, in the same units.
      dtype: Type of the result. Computations have at least the precision of float32,
        so that bfloat16 inputs are rounded only once.

    Returns:
      The normalised images.

    Raises:
      TPPError: If `mean` or `std` does not have one number per channel.

    Example:
      >>> import jax.numpy as jnp
      >>> normalize(jnp.full((1, 1, 1, 1), 255, jnp.uint8), (0.5,), (0.25,)).item()
      2.0
    """
    channels = images.shape[-1]
    if len(mean) != channels or len(std) != channels:
        raise TPPError(
            f"The images have {channels} channels, but {len(mean)} means and "
            f"{len(std)} standard deviations were given: one per channel is needed."
        )
    compute = jnp.promote_types(dtype, jnp.float32)
    scaled = images.astype(compute) / 255
    centred = scaled - jnp.asarray(mean, compute)
    return (centred / jnp.asarray(std, compute)).astype(dtype)
