"""Moments of the patches that a convolution reads, mostly without forming patches.

The positions of a window with stride 1 overlap: the product of two taps, summed over
all positions of the window, depends on the distance of the taps alone, but for the
borders. So for a 3×3 window the 81 blocks of the covariance matrix of its patches
follow from 15 blocks of an autocorrelation, which is one convolution of the images with
themselves, and from the patches of the positions outside of the output whose windows
touch the image. Means and variances follow from sums over the examples.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from tpp_jax.pruning.sums import Sums, gram

_EXACT = lax.Precision.HIGHEST


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

    def outside(self) -> Iterator[tuple[range, range]]:
        """Yields the positions of a window of stride 1 that see pixels but no output.

        They come in ranges of positions at which the same taps read pixels, with these
        taps.
        """
        found: dict[tuple[bool, range], list[int]] = {}
        farthest = self.low - self.dilation * (self.taps - 1)
        for position in range(farthest, self.size + self.low):
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


def sums_of_windows(
    images: Float[Array, "examples *spatial channels"],
    lines: Sequence[Line],
    groups: int,
    diagonal: bool,
) -> Sums:
    """Returns the sums of patches, whose features are taps by channels.

    Args:
      images: Input of a convolution.
      lines: Window along each spatial axis.
      groups: Number of groups of channels; each is a stack.
      diagonal: Whether only squares are summed up.
    """
    x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    centre = x.mean(range(x.ndim - 1))
    z = x - centre  # so that float32 is enough; zeros of the border become -centre
    n = len(x) * math.prod(line.outputs for line in lines)
    taps = math.prod(line.taps for line in lines)
    reads = [line.reads() for line in lines]
    sums = _over_positions(z.sum(0), [table.sum(1) for table in reads])
    sums = sums.reshape(taps, -1)
    share = _product([table.sum(2).mean(1)[:, None] for table in reads])
    mean = _by_group(sums / n + share * centre, groups)
    rows = jnp.full(groups, n, x.dtype)
    if diagonal:
        squares = jnp.square(z).sum(0)
        squares = _over_positions(squares, [table.sum(1) for table in reads])
        border = centre * (1 - share) * (2 * sums + n * share * centre)
        scatter = squares.reshape(taps, -1) - sums**2 / n + border
        return Sums(rows, mean, _by_group(scatter, groups))
    if groups == 1 and taps > 1 and all(line.stride == 1 for line in lines):
        products = _overlapping(z, lines)[None]
    else:
        products = _apart(z, lines, groups)
    own = _by_group(sums, groups)
    scatter = products - own[:, :, None] * own[:, None, :] / n
    if (share < 1).any():
        # What a tap reads is its z, plus the centre where it reads a pixel at all.
        both = _with_others(z.sum(0), reads) - sums[:, None] * share
        common = _product([_seen_by_both(table) for table in reads]) - share * share.T
        both += n / 2 * common[:, :, None] * centre
        border = both.reshape(taps, taps, groups, -1).transpose(2, 0, 3, 1)[..., None]
        border = border * centre.reshape(groups, 1, 1, 1, -1)
        border = border.reshape(scatter.shape)
        scatter += border + border.swapaxes(1, 2)
    return Sums(rows, mean, scatter)


def _by_group(features: Float[Array, "taps channels"], groups: int) -> Array:
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


def _over_positions(
    totals: Float[Array, "*spatial channels"], tables: Sequence[np.ndarray]
) -> Float[Array, "*taps channels"]:
    """Returns sums of an image over the pixels that ``[*taps, size]`` names by 1."""
    for table in tables:
        weights = jnp.asarray(table, totals.dtype)
        axes = [[0], [table.ndim - 1]]
        totals = jnp.tensordot(totals, weights, axes, precision=_EXACT)
    return jnp.moveaxis(totals, 0, -1)


def _with_others(
    totals: Float[Array, "*spatial channels"], reads: Sequence[np.ndarray]
) -> Float[Array, "taps others channels"]:
    """Returns the sums of what a tap reads where another tap reads a pixel too."""
    tables = [np.einsum("tpq,upr->tuq", table, table) for table in reads]
    sums = _over_positions(totals, tables)
    n = len(reads)
    order = *range(0, 2 * n, 2), *range(1, 2 * n, 2), 2 * n
    taps = math.prod(len(table) for table in reads)
    return sums.transpose(order).reshape(taps, taps, -1)


def _apart(
    z: Float[Array, "examples *spatial channels"], lines: Sequence[Line], groups: int
) -> Float[Array, "groups features features"]:
    """Returns the products of features, from the patches themselves."""
    outputs = [range(line.outputs) for line in lines]
    patches = _patches(z, lines, outputs, [range(line.taps) for line in lines])
    rows = patches.reshape(-1, patches.shape[-2], groups, z.shape[-1] // groups)
    rows = rows.transpose(2, 0, 1, 3).reshape(groups, len(rows), -1)
    return gram(rows)


def _overlapping(
    z: Float[Array, "examples *spatial channels"], lines: Sequence[Line]
) -> Float[Array, "features features"]:
    """Returns the products of features of a window of stride 1.

    The autocorrelation has the products of two taps at all positions of the window at
    which they read pixels. Those at positions that are no outputs are subtracted.
    """
    shape = *(line.taps for line in lines), z.shape[-1]
    by_distance = _autocorrelation(z, lines)
    parts = []
    for tap in np.ndindex(shape[:-1]):
        distances = [
            slice(line.taps - 1 - t, 2 * line.taps - 1 - t)
            for t, line in zip(tap, lines, strict=True)
        ]
        part = by_distance[tuple(distances)]  # [*others, channels, channels of others]
        parts.append(jnp.moveaxis(part, -2, 0))
    products = jnp.stack(parts).reshape(*shape, *shape)
    virtual = [
        range(line.low - line.dilation * (line.taps - 1), line.size + line.low)
        for line in lines
    ]
    for axis, line in enumerate(lines):
        before = [range(other.outputs) for other in lines[:axis]]
        for positions, taps in line.outside():
            where = [*before, positions, *virtual[axis + 1 :]]
            every = [range(other.taps) for other in lines]
            some = [*every[:axis], taps, *every[axis + 1 :]]
            patches = _patches(z, lines, where, some)
            rows = patches.reshape(1, -1, math.prod(patches.shape[-2:]))
            own = *map(len, some), shape[-1]
            around = [(0, 0, 0)] * len(shape)
            around[axis] = (taps[0], line.taps - 1 - taps[-1], 0)
            zero = jnp.zeros((), z.dtype)
            products -= lax.pad(gram(rows).reshape(own * 2), zero, around * 2)
    return products.reshape(math.prod(shape), math.prod(shape))


def _autocorrelation(
    z: Float[Array, "examples *spatial channels"], lines: Sequence[Line]
) -> Float[Array, "*distances channels channels"]:
    """Returns the products of pixels at all distances of two taps, summed up.

    The first channels are those of the pixel, the others those of the distant one.
    """
    n = len(lines)
    reach = [line.dilation * (line.taps - 1) for line in lines]
    here = lax.conv_general_dilated(
        z,
        z,
        [line.dilation for line in lines],
        [(0, reach[0]), *((far, far) for far in reach[1:])],
        dimension_numbers=lax.ConvDimensionNumbers(
            lhs_spec=(n + 1, 0, *range(1, n + 1)),
            rhs_spec=(n + 1, 0, *range(1, n + 1)),
            out_spec=(n + 1, n, *range(n)),
        ),
        precision=_EXACT,
    )
    # A pixel that lies behind along the first axis sees the other in front of it.
    behind = jnp.flip(here[1:], range(n)).swapaxes(-1, -2)
    return jnp.concatenate([behind, here])


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
    around = []
    for line, at, some in zip(lines, positions, taps, strict=True):
        first = line.stride * at[0] + line.dilation * some[0] - line.low
        last = line.stride * at[-1] + line.dilation * some[-1] - line.low
        around.append((-first, last + 1 - line.size, 0))
    x = lax.pad(z, jnp.zeros((), z.dtype), [(0, 0, 0), *around, (0, 0, 0)])
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
