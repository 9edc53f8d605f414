"""Which channels occupy the same positions of the same axes, and which positions.

The vectors here come from :class:`tpp_jax.graph.labels.Channels`, which numbers the
channels of a model.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, Shaped

from tpp_jax.graph.labels import Axis, Channels

Row = tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]
"""Positions along an axis, and the channel at each; a position may have several."""


def alike_channels(
    rows: list[Row], stuck: Int[np.ndarray, " channels"]
) -> Iterator[tuple[Int[np.ndarray, " size"], list[int]]]:
    """Bundles channels that occupy the same slots equally often.

    Args:
      rows: For each slot, positions along it and the channel at each.
      stuck: Index of the reason why each channel is fixed, or -1.

    Yields:
      The channels of each bundle, and the indices of their slots.
    """
    if not rows:
        return
    slot_of = np.repeat(np.arange(len(rows)), [len(row[1]) for row in rows])
    channel_at = np.concatenate([channels for _, channels in rows])
    # A channel's signature is the sum of a random 64-bit number for each of its slots.
    # Equal sums mean equal slots, except with a probability of 2^-64 for each pair.
    weights = np.random.default_rng(0).integers(
        2**63, size=len(rows) + stuck.max(initial=-1) + 2, dtype=np.uint64
    )
    signature = weights[len(rows) + stuck + 1]
    np.add.at(signature, channel_at, weights[slot_of])
    seen = np.zeros(len(stuck), bool)
    seen[channel_at] = True
    present = np.flatnonzero(seen)
    bundle = np.zeros(len(stuck), np.int64)
    # Neighbours are most often alike: only the first of a run is sorted.
    values, starts = _runs(signature[present])
    _, number = np.unique(values, return_inverse=True)
    bundle[present] = np.repeat(number, np.diff([*starts, len(present)]))
    met = np.unique(_runs(bundle[channel_at] * len(rows) + slot_of)[0])
    slots_of: dict[int, list[int]] = {}
    for number, slot in zip(*np.divmod(met, len(rows)), strict=True):
        slots_of.setdefault(int(number), []).append(int(slot))
    by_bundle = present[np.argsort(bundle[present], kind="stable")]
    ends = (np.flatnonzero(np.diff(bundle[by_bundle])) + 1).tolist()
    for first, last in zip([0, *ends], [*ends, len(by_bundle)], strict=True):
        chosen = by_bundle[first:last]
        slots = slots_of.get(int(bundle[chosen[0]]), [])
        for channels in _apart(chosen, *rows[slots[0]]):
            yield channels, slots


def _runs(
    values: Shaped[np.ndarray, " n"],
) -> tuple[Shaped[np.ndarray, " runs"], Int[np.ndarray, " runs"]]:
    """Returns the value and the start of each run of equal neighbours."""
    first = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    starts = np.flatnonzero(first)
    return values[starts], starts


def rows_of(solution: Channels, axes: list[Axis]) -> list[Row]:
    """Returns the result of :meth:`Channels.of` for each axis, computed together."""
    if not axes:
        return []
    ends = np.cumsum([len(axis) for axis in axes])
    positions, channels = solution.of(np.concatenate(axes))
    if (np.diff(positions) < 0).any():  # some channels are defined by others
        order = np.argsort(positions, kind="stable")
        positions, channels = positions[order], channels[order]
    cuts = positions.searchsorted(ends).tolist()
    return [
        (positions[first:last] - start, channels[first:last])
        for first, last, start in zip(
            [0, *cuts], cuts, [0, *ends.tolist()], strict=False
        )
    ]


def _apart(
    channels: Int[np.ndarray, " size"],
    positions: Int[np.ndarray, " n"],
    row: Int[np.ndarray, " n"],
) -> list[Int[np.ndarray, " _"]]:
    """Separates channels that share positions, such as four heads and four dimensions.

    The positions are all combinations of a head and a dimension. Channels of the same
    group are those that share positions with the same others.

    Args:
      channels: Channels in ascending order.
      positions: Positions along an axis that all of them run through.
      row: Channel at each of these positions.
    """
    if (positions[1:] > positions[:-1]).all():
        return [channels]
    here = np.isin(row, channels)
    positions, row = positions[here], np.searchsorted(channels, row[here])
    if len(np.unique(positions)) == len(positions):
        return [channels]
    incidence = np.zeros((len(channels), positions.max() + 1), np.int64)
    incidence[row, positions] = 1
    sharing = incidence @ incidence.T > 0
    np.fill_diagonal(sharing, False)
    _, part = np.unique(sharing, axis=0, return_inverse=True)
    return [channels[part == i] for i in range(part.max() + 1)]


def sorted_by_channel(
    row: Row,
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], bool]:
    """Returns a row sorted by channel, and whether each channel occurs once."""
    positions, channels = row
    if (channels[1:] > channels[:-1]).all():  # the most common case
        return positions, channels, True
    order = np.lexsort((positions, channels))
    return positions[order], channels[order], False


def positions_of(
    channels: Int[np.ndarray, " size"],
    positions: Int[np.ndarray, " n"],
    at: Int[np.ndarray, " n"],
    once: bool,
) -> Int[np.ndarray, "size m"]:
    """Returns the positions of each channel along an axis.

    Args:
      channels: Channels of one group, in any order.
      positions: Positions along the axis, sorted by channel.
      at: Channel at each position.
      once: Whether each channel occurs once; see :func:`sorted_by_channel`.
    """
    start = at.searchsorted(channels[0])
    there = slice(start, start + len(channels))
    if once and len(at) >= there.stop and (at[there] == channels).all():
        return positions[there, None]
    starts = at.searchsorted(channels)
    m = 1 if once else at.searchsorted(channels[0], side="right") - starts[0]
    return positions[starts[:, None] + np.arange(m)]
