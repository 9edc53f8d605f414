"""Mixup and cutmix: batches in which pairs of images, and their labels, are combined.

Position 2i is mixed with position 2i + 1. A batch is in random order, so all fixed
pairings are equally good, and with this one both images of a pair are on one device.
With a key that all devices share, a batch split over eight devices equals the batch on
one device.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from tpp_jax.errors import TPPError

Images = Float[Array, "b h w c"]
Labels = Float[Array, "b classes"]


def mix(
    key: Key[Array, ""],
    images: Images,
    labels: Labels,
    *,
    mixup: float,
    cutmix: float,
) -> tuple[Images, Labels]:
    """Mixes each image of a batch with its partner, in one of two ways.

    With λ ~ Beta(α, α), drawn once for the batch:

    - mixup (Zhang et al. 2018): ``λ·image + (1 - λ)·partner``, the same for labels;
    - cutmix (Yun et al. 2019): a rectangle of the partner, with the image's proportions
      and a share ``1 - λ`` of its area, replaces the same pixels of the image. Its
      centre is any pixel, so the border may cut it; labels are mixed by the share of
      the area that was actually replaced.

    If both are used, one of them is chosen for each batch, with probability one half.
    This choice and the rounding of the rectangle are as in torchvision's reference,
    where the partner is the previous image in the batch instead of the other of a pair.

    Args:
      key: PRNG key of the batch, the same on all devices.
      images: Normalised images, an even number of them.
      labels: One-hot or smoothed labels.
      mixup: Parameter α of mixup; 0 for none. A Python float, as is `cutmix`, since the
        compiled program depends on them.
      cutmix: Parameter α of cutmix; 0 for none.

    Returns:
      The mixed images and labels, of the same shapes and types.

    Raises:
      TPPError: If an α is negative, or the number of images is odd.

    Example:
      >>> images, labels = jnp.ones((2, 8, 8, 3)), jnp.eye(2)
      >>> _, mixed = mix(jax.random.key(0), images, labels, mixup=0.2, cutmix=1.0)
      >>> bool(jnp.allclose(mixed.sum(axis=1), 1))
      True
    """
    if min(mixup, cutmix) < 0:
        raise TPPError(
            f"mixup is {mixup} and cutmix is {cutmix}; each must be 0 (none) or a "
            "positive number"
        )
    if mixup == cutmix == 0:
        return images, labels
    if len(images) % 2:
        raise TPPError(
            f"mixup and cutmix work on pairs, but there are {len(images)} images on a "
            "device; choose an even number"
        )
    choice_key, share_key, place_key = jax.random.split(key, 3)
    both = mixup > 0 and cutmix > 0
    pastes = jax.random.bernoulli(choice_key) if both else cutmix > 0
    alpha = jnp.where(pastes, cutmix, mixup)
    share = 1 - jax.random.beta(share_key, alpha, alpha)
    weights = jnp.where(pastes, _rectangle(place_key, share, *images.shape[1:3]), share)

    def towards_partner(x: Array, weight: Array) -> Array:
        # In this form a weight of 0 or 1 gives one of the two exactly.
        return ((1 - weight) * x + weight * partners(x)).astype(x.dtype)

    return (
        towards_partner(images, weights[:, :, None]),
        towards_partner(labels, weights.mean()),
    )


def partners(batch: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Returns the batch with each entry replaced by its partner: 2i by 2i + 1.

    >>> partners(jnp.arange(6)).tolist()
    [1, 0, 3, 2, 5, 4]
    """
    pairs = batch.reshape(-1, 2, *batch.shape[1:])
    return pairs[:, ::-1].reshape(batch.shape)


def _rectangle(
    key: Key[Array, ""], share: Float[Array, ""], height: int, width: int
) -> Float[Array, "h w"]:
    """Returns 1 inside a random rectangle of a share of the area, and 0 outside."""

    def inside(key: Key[Array, ""], size: int) -> Bool[Array, " size"]:
        half = (jnp.sqrt(share) * size / 2).astype(int)
        distance = jnp.arange(size) - jax.random.randint(key, (), 0, size)
        return (distance >= -half) & (distance < half)

    row_key, column_key = jax.random.split(key)
    return jnp.outer(inside(row_key, height), inside(column_key, width)).astype(float)
