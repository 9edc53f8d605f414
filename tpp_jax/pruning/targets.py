"""How many channels each group loses: by ratios or to meet a target, in three scopes.

The groups that are pruned are put into *pools*: each into its own in scope ``local``,
all into one in scope ``global``, those of like shape together in scope ``isomorphic``.
A ratio or a target says how many channels a pool loses; which of its groups lose them
is settled by the scores.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tpp_jax.errors import TPPError
from tpp_jax.graph.groups import Group, Groups
from tpp_jax.pruning.flops import Costs, uncounted_work

SCOPES = ("local", "global", "isomorphic")

# The original never removes more than this share of a layer, so that one filter of 16
# survives any ratio.
_LARGEST_SHARE = 0.995


class Limits(NamedTuple):
    """What every group keeps, whatever is asked for.

    Attributes:
      min_channels: the least number of channels that a group keeps.
      round_to: kept counts are rounded up to a multiple of this.
    """

    min_channels: int = 1
    round_to: int = 1

    def most(self, size: int) -> int:
        """Returns how many of a group's channels may go."""
        return max(min(math.floor(_LARGEST_SHARE * size), size - self.min_channels), 0)

    def kept(self, size: int, removed: int) -> int:
        """Returns how many channels a group keeps that is to lose some."""
        rounded = math.ceil((size - removed) / self.round_to) * self.round_to
        return min(rounded, size)


def kept_by_ratios(
    pools: Sequence[Sequence[Group]],
    ratios: Mapping[str, float],
    scores: Mapping[str, np.ndarray],
    limits: Limits,
) -> dict[str, int]:
    """Returns how many channels of each group stay, by ratios.

    Args:
      pools: from :func:`pools_of`.
      ratios: group name → share of its channels to prune. A pool loses as many channels
        as its groups would on their own: ``ceil(ratio · n)`` each.
      scores: group name → score of each channel.
      limits: what stays in any case.
    """
    kept = {}
    for pool in pools:
        total = sum(
            min(math.ceil(ratios[g.name] * g.size), limits.most(g.size)) for g in pool
        )
        removed = np.bincount(
            _removals(pool, scores, limits)[:total], minlength=len(pool)
        )
        for group, n in zip(pool, removed, strict=True):
            kept[group.name] = limits.kept(group.size, int(n))
    return kept


def kept_for_target(
    groups: Groups,
    pools: Sequence[Sequence[Group]],
    weights: Mapping[str, float],
    scores: Mapping[str, np.ndarray],
    limits: Limits,
    *,
    flops: float | None,
    params: float | None,
    allow_uncounted: bool = False,
) -> dict[str, int]:
    """Returns how many channels of each group stay, to meet a target.

    One ratio, times each group's weight, is raised from 0 until the model is small
    enough. Channels go one at a time: without the last the target would be missed.

    Args:
      groups: of the model.
      pools: from :func:`pools_of`.
      weights: group name → its ratio relative to the others'.
      scores: group name → score of each channel.
      limits: what stays in any case.
      flops: share of the whole model's FLOPs to remain; None for any.
      params: likewise of its parameters.
      allow_uncounted: whether a target of FLOPs may leave work out that is not counted.

    Raises:
      TPPError: the target is out of reach, or of FLOPs that are not all counted.
    """
    if flops is not None and not allow_uncounted:
        _check_all_counted(uncounted_work(groups.traced))
    costs = Costs(groups)
    whole = costs({})
    wanted = params, flops
    matched = [group for pool in pools for group in pool]
    order = _removals_of_all(pools, weights, scores, limits)

    def kept(steps: int) -> dict[str, int]:
        removed = np.bincount(order[:steps], minlength=len(matched))
        return {
            g.name: limits.kept(g.size, int(n))
            for g, n in zip(matched, removed, strict=True)
        }

    def shares(steps: int) -> tuple[float, ...]:
        found = costs(kept(steps))
        return tuple(a / b if b else 0.0 for a, b in zip(found, whole, strict=True))

    def small_enough(steps: int) -> bool:
        found = zip(shares(steps), wanted, strict=True)
        return all(want is None or share <= want for share, want in found)

    if not small_enough(len(order)):
        left = _left_out(groups, matched)
        raise TPPError(_out_of_reach(wanted, shares(len(order)), limits) + left)
    return kept(bisect.bisect_left(range(len(order)), True, key=small_enough))


def pools_of(groups: Groups, matched: Sequence[Group], scope: str) -> list[list[Group]]:
    """Returns the pools of the groups that are pruned.

    Args:
      groups: all groups of the model.
      matched: those that are pruned.
      scope: ``"local"``, ``"global"`` or ``"isomorphic"``.

    Raises:
      TPPError: an unknown scope.
    """
    if scope not in SCOPES:
        raise TPPError(
            f"unknown scope {scope!r}: choose "
            f"{', '.join(map(repr, SCOPES[:-1]))} or {SCOPES[-1]!r}"
        )
    if scope == "local":
        return [[group] for group in matched]
    if scope == "global":
        return [list(matched)] if matched else []
    # What other groups run through does not count: the first block of a stage, whose
    # input is narrower, is like the others.
    others = {(m.leaf, m.axis) for group in groups for m in group.members}
    alike: dict[object, list[Group]] = {}
    for group in matched:
        like = []
        for member in group.members:
            leaf, axis = member.leaf, member.axis
            shape = tuple(
                0 if i != axis and (leaf, i) in others else n
                for i, n in enumerate(groups.shapes[leaf])
            )
            like.append((member.role, axis, member.positions.shape, shape))
        alike.setdefault(tuple(sorted(like)), []).append(group)
    return list(alike.values())


def _removals(
    pool: Sequence[Group], scores: Mapping[str, np.ndarray], limits: Limits
) -> np.ndarray:
    """Returns int ``[channels]``: which group of the pool loses the next channel."""
    if len(pool) == 1:
        return np.zeros(limits.most(pool[0].size), np.int64)
    lowest = [np.sort(scores[g.name])[: limits.most(g.size)] for g in pool]
    group = np.repeat(np.arange(len(pool)), [len(ranked) for ranked in lowest])
    return group[np.argsort(np.concatenate(lowest), kind="stable")]


def _removals_of_all(
    pools: Sequence[Sequence[Group]],
    weights: Mapping[str, float],
    scores: Mapping[str, np.ndarray],
    limits: Limits,
) -> np.ndarray:
    """Returns int ``[channels]``: which group of all pools loses the next channel."""
    when, which, before = [np.zeros(0)], [np.zeros(0, np.int64)], 0
    for pool in pools:
        # A group's k-th channel goes when the ratio is nearest to k of its n channels.
        times = [
            (np.arange(limits.most(g.size)) + 0.5) / (g.size * weights[g.name])
            for g in pool
        ]
        when.append(np.sort(np.concatenate(times)))
        which.append(before + _removals(pool, scores, limits))
        before += len(pool)
    return np.concatenate(which)[np.argsort(np.concatenate(when), kind="stable")]


def _check_all_counted(left_out: Sequence[str]) -> None:
    if left_out:
        more = ", …" if len(left_out) > 3 else ""
        raise TPPError(
            f"a target of FLOPs needs all of them counted, and the work of "
            f"{', '.join(left_out[:3])}{more} is not: give a target of parameters or "
            "ratios, or pass allow_uncounted=True to meet it with the others alone"
        )


def _out_of_reach(
    wanted: tuple[float | None, ...], least: tuple[float, ...], limits: Limits
) -> str:
    asked, reached = [], []
    for name, want, share in zip(("params", "flops"), wanted, least, strict=True):
        if want is not None:
            asked.append(f"{name}={want}")
            reached.append(f"{share:.4f} of the {name}")
    mends = ["match more layers"]
    mends += ["lower round_to"] if limits.round_to > 1 else []
    mends += ["lower min_channels"] if limits.min_channels > 1 else []
    return (
        f"the target {' and '.join(asked)} is out of reach: with all channels gone "
        f"that may go, {' and '.join(reached)} remain; {' or '.join(mends)}"
    )


def _left_out(groups: Groups, matched: Sequence[Group]) -> str:
    """Names the groups that a target left as they are, and why."""
    names = {group.name for group in matched}
    rest = [g for g in groups if g.name not in names]
    said = [
        f"{g.name} ({g.reason})" if g.reason else g.name
        for g in sorted(rest, key=lambda g: g.reason is not None)
    ]
    more = f" and {len(said) - 4} more" if len(said) > 4 else ""
    return f". Left as they are: {', '.join(said[:4])}{more}" if said else ""
