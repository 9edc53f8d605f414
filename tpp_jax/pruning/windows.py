"""Sums over the patches that a convolution reads, mostly without forming patches.

The positions of a window with stride 1 overlap: the product of two taps, summed over
all positions whose windows touch the image, depends on the distance of the taps alone.
So for a 3×3 window the 81 blocks of the matrix of its patches follow from 15 blocks of
an autocorrelation, which is one convolution of the images with themselves. Positions
outside of the output are subtracted: of those that are outside along the first axis,
and of those along the second, the products depend on the distance along the other axis
alone; those that are outside along both are then added again. Means and variances
follow from sums over the examples. What batches have in common is therefore added up in
this form, and the matrix is built once, at the end.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from tpp_jax.pruning.sums import Sums, filled, gram
from tpp_jax.xla.holding import held

_Outside = tuple[range, range]
"""Positions outside of an output that see pixels, and the taps that read them."""


class Line(NamedTuple):
    """A window along one axis of an image.

    Attributes:
      size: Size of the image.
      taps: Size of the window.
      outputs: Number of positions of the window.
      low: Zeros in front of the image; negative if pixels are left out.
      stride: Distance of positions.
      dilation: Distance of taps.
    """

    size: int
    taps: int
    outputs: int
    low: int
    stride: int
    dilation: int

    def reads(self) -> Int[np.ndarray, "taps outputs size"]:
        """Returns 1 where a tap at a position of the window reads a pixel, else 0."""
        tap, position = np.arange(self.taps), np.arange(self.outputs)
        at = self.stride * position + self.dilation * tap[:, None] - self.low
        return (at[:, :, None] == np.arange(self.size)).astype(int)

    def touching(self) -> range:
        """Returns the positions at which a window of stride 1 sees pixels."""
        farthest = self.low - self.dilation * (self.taps - 1)
        return range(farthest, self.size + self.low)

    def outside(self) -> Iterator[_Outside]:
        """Yields the positions of a window of stride 1 that see pixels but no output.

        They come in ranges of positions at which the same taps read pixels, with these
        taps.
        """
        found: dict[tuple[bool, range], list[int]] = {}
        for position in self.touching():
            if position not in range(self.outputs):
                first = position - self.low
                taps = range(
                    max(0, -(first // self.dilation)),
                    min(self.taps, -((first - self.size) // self.dilation)),
                )
                found.setdefault((position < 0, taps), []).append(position)
        for (_, taps), positions in found.items():
            if taps:
                yield range(positions[0], positions[-1] + 1), taps


class PatchSums(NamedTuple):
    """Sums over the patches of images, from which those of features follow.

    Attributes:
      rows: Number of patches, of all examples.
      centre: Value that is subtracted from the pixels of each channel, ``[channels]``.
      pixels: Sum of the pixels over examples, ``[*spatial, channels]``.
      products: Sum of their squares, ``[*spatial, channels]``; or products of pixels by
        distance, ``[*distances, channels, channels]``; or strips of those of the
        features of patches, ``[groups, some, rest]``.
      borders: Products of pixels by distance at positions outside of the output, as
        :func:`_borders` lists them, ``[*distances, features, features]``.
    """

    rows: Any
    centre: Any
    pixels: Any
    products: Any
    borders: tuple[Any, ...]


def patch_sums(
    images: Float[Array, "examples *spatial channels"],
    lines: Sequence[Line],
    groups: int,
    diagonal: bool,
    centre_of: Callable[[Float[Array, " channels"]], Float[Array, " channels"]],
) -> PatchSums:
    """Returns the sums over the patches of a batch.

    Args:
      images: Input of a convolution.
      lines: Window along each spatial axis.
      groups: Number of groups of channels.
      diagonal: Whether only squares are summed up.
      centre_of: Function of the mean of each channel that returns a value near it, so
        that float32 is enough; the same for all batches.
    """
    pixels = _over_examples(images)
    centre = centre_of(pixels.mean(range(len(lines))) / len(images))
    z, pixels, borders = images - centre, pixels - len(images) * centre, ()
    n = jnp.asarray(len(z) * math.prod(line.outputs for line in lines), z.dtype)
    if diagonal:
        products = _over_examples(jnp.square(z))
    elif _overlap(lines, groups):
        products = _autocorrelation(z, lines)
        borders = tuple(_border(z, lines, each) for each in _borders(lines))
    else:
        products = jax.vmap(gram)(held(patch_rows(z, lines, groups)))
    return PatchSums(n, centre, pixels, products, borders)


def _over_examples(
    images: Float[Array, "examples *spatial channels"],
) -> Float[Array, "*spatial channels"]:
    """Returns a sum over the first axis; XLA's reduction is up to 19 times slower."""
    ones = jnp.ones(len(images), images.dtype)
    return jnp.tensordot(ones, images, 1, precision=lax.Precision.HIGHEST)


def as_sums(sums: PatchSums, lines: Sequence[Line], groups: int) -> Sums:
    """Returns the sums of features, which are taps by channels; on the host.

    Args:
      sums: Sums over all patches, float64.
      lines: Window along each spatial axis.
      groups: Number of groups of channels; each is a stack.
    """
    reads = [line.reads() for line in lines]
    taps = math.prod(line.taps for line in lines)
    n, centre = sums.rows, sums.centre
    own = [table.sum(1) for table in reads]
    totals = _over_pixels(sums.pixels, own).reshape(taps, -1)
    # A tap reads its pixel less the centre, plus the centre if it reads a pixel at all.
    share = _product([table.sum(2).mean(1)[:, None] for table in reads])
    mean = _by_group(totals / n + share * centre, groups)
    rows = np.full(groups, n)
    grouped = _by_group(totals, groups)
    if isinstance(sums.products, tuple):
        products = filled(Sums(rows, grouped, sums.products)).scatter
    elif sums.products.shape != sums.pixels.shape:
        products = _by_taps(sums, lines)[None]
    else:
        squares = _over_pixels(sums.products, own).reshape(taps, -1)
        border = centre * (1 - share) * (2 * totals + n * share * centre)
        scatter = squares - totals**2 / n + border
        return Sums(rows, mean, _by_group(scatter, groups))
    scatter = products - grouped[:, :, None] * (grouped / n)[:, None, :]
    if (share < 1).any():
        both = _with_others(sums.pixels, reads) - totals[:, None] * share
        common = _product([_seen_by_both(table) for table in reads]) - share * share.T
        both += n / 2 * common[:, :, None] * centre
        both = both.reshape(taps, taps, groups, -1).transpose(2, 0, 3, 1)
        border = both[..., None] * centre.reshape(groups, 1, 1, 1, -1)
        border = border.reshape(scatter.shape)
        scatter += border
        scatter += border.swapaxes(1, 2)
    return Sums(rows, mean, scatter)


def some_of(
    images: Float[Array, "examples *spatial channels"],
    lines: Sequence[Line],
    groups: int,
    enough: int,
) -> Float[Array, "some *spatial channels"]:
    """Returns examples at equal distances, at least a quarter of them.

    Args:
      images: Input of a convolution.
      lines: Window along each spatial axis.
      groups: Number of groups of channels.
      enough: Number of rows for each feature that the examples shall give.
    """
    features = math.prod(line.taps for line in lines) * images.shape[-1] // groups
    each = math.prod(line.outputs for line in lines)
    n = max(-(-enough * features // each), -(-len(images) // 4))
    if n >= len(images):
        return images
    return images[np.arange(n) * len(images) // n]


def patch_rows(
    images: Float[Array, "examples *spatial channels"],
    lines: Sequence[Line],
    groups: int,
) -> Float[Array, "groups rows features"]:
    """Returns patches with their zero padding as rows of features.

    Args:
      images: Input of a convolution.
      lines: Window along each spatial axis.
      groups: Number of groups of channels; each is a stack.
    """
    where = [range(line.outputs) for line in lines]
    patches = _patches(images, lines, where, [range(line.taps) for line in lines])
    rows = patches.reshape(-1, patches.shape[-2], groups, images.shape[-1] // groups)
    return rows.transpose(2, 0, 1, 3).reshape(groups, len(rows), -1)


def _overlap(lines: Sequence[Line], groups: int) -> bool:
    """Returns whether the products of a window follow from an autocorrelation."""
    several = any(line.taps > 1 for line in lines)
    return groups == 1 and several and all(line.stride == 1 for line in lines)


def _borders(lines: Sequence[Line]) -> Iterator[tuple[_Outside | None, ...]]:
    """Yields where positions are outside of the output, along one axis or several.

    Along an axis that is None they are any. So positions come several times: with the
    sign (-1)ⁿ for n axes, what is left of all positions is the output.
    """
    yield from itertools.islice(
        itertools.product(*([None, *line.outside()] for line in lines)), 1, None
    )


def _border(
    z: Array, lines: Sequence[Line], outside: Sequence[_Outside | None]
) -> Float[Array, "*distances features features"]:
    """Returns the products of pixels by distance at positions outside of the output.

    Features are taps along the axes along which positions are outside, by channels.
    """
    read, positions, taps = [], [], []
    for line, part in zip(lines, outside, strict=True):
        read.append(line if part else Line(line.size, 1, line.size, 0, 1, 1))
        at, some = part or (range(line.size), range(1))
        positions.append(at)
        taps.append(some)
    patches = _patches(z, read, positions, taps)
    features = patches.reshape(*patches.shape[:-2], -1)
    return _autocorrelation(features, _across(lines, outside))


def _across(lines: Sequence[Line], outside: Sequence[_Outside | None]) -> list[Line]:
    """Returns the lines along which products depend on distances, others as one tap."""
    return [
        Line(len(part[0]), 1, len(part[0]), 0, 1, 1) if part else line
        for part, line in zip(outside, lines, strict=True)
    ]


def _by_taps(
    sums: PatchSums, lines: Sequence[Line]
) -> Float[np.ndarray, "features features"]:
    """Returns the products of features from those of pixels by distance."""
    n, shape = len(lines), (*(line.taps for line in lines), len(sums.centre))
    products = _spread(sums.products, lines)
    # Each axis has taps of one kind alone: by distance, or outside of the output.
    order = *(i + kind for i in range(n) for kind in (0, n)), 2 * n
    order += tuple(2 * n + 1 + i for i in order)
    for outside, border in zip(_borders(lines), sums.borders, strict=True):
        taps = [
            part[1] if part else range(line.taps)
            for part, line in zip(outside, lines, strict=True)
        ]
        across = _across(lines, outside)
        own = [len(part[1]) if part else 1 for part in outside]
        kinds = *(line.taps for line in across), *own, shape[-1]
        part = _spread(border, across).reshape(kinds * 2).transpose(order)
        at = *(slice(some.start, some.stop) for some in taps), slice(None)
        target = products[at * 2]
        target += (-1) ** (n - outside.count(None)) * part.reshape(target.shape)
    size = math.prod(shape)
    return products.reshape(size, size)


def _spread(
    by_distance: Float[np.ndarray, "*distances features features"],
    lines: Sequence[Line],
) -> np.ndarray:
    """Returns products by pairs of taps, ``[*taps, features, *taps, features]``."""
    shape = *(line.taps for line in lines), by_distance.shape[-1]
    # A pixel that lies behind along the first axis sees the other in front of it.
    axes = tuple(range(len(lines)))
    behind = np.flip(by_distance[1:], axes).swapaxes(-1, -2)
    by_distance = np.concatenate([behind, by_distance])
    products = np.empty((*shape, *shape), by_distance.dtype)
    for tap in np.ndindex(shape[:-1]):
        distances = [
            slice(line.taps - 1 - t, 2 * line.taps - 1 - t)
            for t, line in zip(tap, lines, strict=True)
        ]
        products[tap] = np.moveaxis(by_distance[tuple(distances)], -2, 0)
    return products


def _by_group(features: np.ndarray, groups: int) -> np.ndarray:
    """Returns features by group of channels, ``[groups, taps * width]``."""
    parts = features.reshape(len(features), groups, -1)
    return parts.swapaxes(0, 1).reshape(groups, -1)


def _product(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Returns a table of taps along several axes, the product of those along each."""
    return functools.reduce(np.kron, tables, np.ones((1, 1)))


def _seen_by_both(reads: np.ndarray) -> np.ndarray:
    """Returns the share of positions at which two taps both read a pixel."""
    seen = reads.sum(2)
    return seen @ seen.T / seen.shape[1]


def _over_pixels(pixels: np.ndarray, tables: Sequence[np.ndarray]) -> np.ndarray:
    """Returns sums, ``[*taps, channels]``, over the pixels that tables name by 1.

    Args:
      pixels: Image, ``[*spatial, channels]``.
      tables: Pixels of each tap along each axis, ``[*taps, size]``.
    """
    for table in tables:
        pixels = np.tensordot(pixels, table, ((0,), (table.ndim - 1,)))
    return np.moveaxis(pixels, 0, -1)


def _with_others(pixels: np.ndarray, reads: Sequence[np.ndarray]) -> np.ndarray:
    """Returns what a tap reads where another tap reads a pixel too, summed up.

    Returns:
      Sums, ``[taps, others, channels]``.
    """
    tables = [np.einsum("tpq,upr->tuq", table, table) for table in reads]
    n, taps = len(reads), math.prod(len(table) for table in reads)
    order = *range(0, 2 * n, 2), *range(1, 2 * n, 2), 2 * n
    sums = _over_pixels(pixels, tables).transpose(order)
    return sums.reshape(taps, taps, -1)


def _autocorrelation(
    z: Float[Array, "examples *spatial channels"], lines: Sequence[Line]
) -> Float[Array, "*distances channels channels"]:
    """Returns the products of pixels at the distances of two taps, summed up.

    The first channels are those of the pixel, the others those of the distant one,
    which along the first axis never lies behind.
    """
    n = len(lines)
    reach = [line.dilation * (line.taps - 1) for line in lines]
    channels_first = n + 1, 0, *range(1, n + 1)
    return lax.conv_general_dilated(
        z,
        z,
        [line.dilation for line in lines],
        [(0, reach[0]), *((far, far) for far in reach[1:])],
        dimension_numbers=lax.ConvDimensionNumbers(
            lhs_spec=channels_first,
            rhs_spec=channels_first,
            out_spec=(n + 1, n, *range(n)),
        ),
        precision=lax.Precision.HIGHEST,
    )


def _patches(
    z: Float[Array, "examples *spatial channels"],
    lines: Sequence[Line],
    positions: Sequence[range],
    taps: Sequence[range],
) -> Float[Array, "examples *positions taps channels"]:
    """Returns patches of images with their zero padding.

    By slices: a convolution with unit kernels would round on some devices.

    Args:
      z: Images.
      lines: Window along each spatial axis.
      positions: Positions of the window along each axis.
      taps: Taps along each axis that are part of a patch.
    """
    seen, around = [slice(None)], [(0, 0, 0)]
    for line, at, some in zip(lines, positions, taps, strict=True):
        first = line.stride * at[0] + line.dilation * some[0] - line.low
        end = line.stride * at[-1] + line.dilation * some[-1] - line.low + 1
        # First cut, so that a few rows of an image cost no copy of it.
        seen.append(slice(max(first, 0), max(end, 0)))
        around.append((max(-first, 0), max(end - line.size, 0), 0))
    x = lax.pad(z[tuple(seen)], jnp.zeros((), z.dtype), [*around, (0, 0, 0)])
    strides = [1, *(line.stride for line in lines), 1]
    parts = []
    for tap in np.ndindex(*map(len, taps)):
        first = [i * line.dilation for i, line in zip(tap, lines, strict=True)]
        last = [
            start + (len(at) - 1) * line.stride + 1
            for start, at, line in zip(first, positions, lines, strict=True)
        ]
        ends = [len(x), *last, x.shape[-1]]
        parts.append(lax.slice(x, [0, *first, 0], ends, strides))
    return jnp.stack(parts, axis=-2)
