"""Number of channels that each group loses, from ratios or targets, in three scopes.

The groups that are pruned form *pools*: one per group in scope ``local``, a single one
in scope ``global``, one for all groups of equal shape in scope ``isomorphic``. A ratio
or a target determines how many channels a pool loses; the scores determine which of its
groups lose them.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from tpp_jax.errors import TPPError
from tpp_jax.graph.groups import Group, Groups
from tpp_jax.pruning.criteria import Scores
from tpp_jax.pruning.flops import Costs, uncounted_work

Order = Int[np.ndarray, " channels"]

SCOPES = ("local", "global", "isomorphic")

# The original code never removes more than this share of a layer, so that one filter
# of 16 is kept at any ratio.
_LARGEST_SHARE = 0.995


class Limits(NamedTuple):
    """Limits of the number of channels that a group keeps.

    Attributes:
      min_channels: Smallest number of channels that a group keeps.
      round_to: Number of which kept counts are rounded up to a multiple.
    """

    min_channels: int = 1
    round_to: int = 1

    def most(self, size: int) -> int:
        """Returns the largest number of channels that a group may lose."""
        return max(min(math.floor(_LARGEST_SHARE * size), size - self.min_channels), 0)

    def kept(self, size: int, removed: int) -> int:
        """Returns the rounded number of channels that a group keeps."""
        rounded = math.ceil((size - removed) / self.round_to) * self.round_to
        return min(rounded, size)


def kept_by_ratios(
    pools: Sequence[Sequence[Group]],
    ratios: Mapping[str, float],
    scores: Mapping[str, Scores],
    limits: Limits,
) -> dict[str, int]:
    """Returns the number of kept channels of each group, from ratios.

    Args:
      pools: Pools from :func:`pools_of`.
      ratios: Group name → share of its channels to prune. A pool loses as many channels
        as its groups would on their own: ``ceil(ratio · n)`` each.
      scores: Group name → score of each channel.
      limits: Limits of the kept counts.
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
    scores: Mapping[str, Scores],
    limits: Limits,
    *,
    flops: float | None,
    params: float | None,
    allow_uncounted: bool = False,
) -> dict[str, int]:
    """Returns the number of kept channels of each group, to meet a target.

    One ratio, times the weight of each group, is raised from 0 until the model is small
    enough. Channels are removed one at a time: one channel fewer would miss the target.

    Args:
      groups: All groups of the model.
      pools: Pools from :func:`pools_of`.
      weights: Group name → its ratio relative to the others.
      scores: Group name → score of each channel.
      limits: Limits of the kept counts.
      flops: Share of the unpruned model's FLOPs to keep; None for any.
      params: Share of the unpruned model's parameters to keep; None for any.
      allow_uncounted: Whether a FLOPs target is accepted for a model with work that is
        not counted.

    Raises:
      TPPError: The target is out of reach, or it is a FLOPs target and some work is not
        counted.
    """
    if flops is not None and not allow_uncounted:
        _check_all_counted(uncounted_work(groups.traced))
    costs = Costs(groups)
    unpruned = costs({})
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
        return tuple(a / b if b else 0.0 for a, b in zip(found, unpruned, strict=True))

    def small_enough(steps: int) -> bool:
        pairs = zip(shares(steps), wanted, strict=True)
        return all(want is None or share <= want for share, want in pairs)

    if not small_enough(len(order)):
        message = _out_of_reach(wanted, shares(len(order)), limits)
        raise TPPError(message + _unpruned(groups, matched))
    return kept(bisect.bisect_left(range(len(order)), True, key=small_enough))


def saved_by_channels(
    groups: Groups,
    scored: Sequence[Group],
    *,
    flops: float | None,
    params: float | None,
) -> dict[str, float]:
    """Returns the share of the model that one channel of each group is.

    Args:
      groups: All groups of the model.
      scored: Groups of interest.
      flops: Target of FLOPs; None if they are of no interest.
      params: Target of parameters, like the FLOPs. Of two targets shares are added.
    """
    if flops is None and params is None:
        return {}
    costs = Costs(groups)
    unpruned, saved = costs({}), {}
    for group in scored:
        without = costs({group.name: group.size - 1})
        saved[group.name] = sum(
            1 - a / b
            for a, b, target in zip(without, unpruned, (params, flops), strict=True)
            if target is not None and b
        )
    return {name: share for name, share in saved.items() if share > 0}


def pools_of(groups: Groups, matched: Sequence[Group], scope: str) -> list[list[Group]]:
    """Returns the pools of the groups that are pruned.

    Args:
      groups: All groups of the model.
      matched: Groups that are pruned.
      scope: Name of the scope: ``"local"``, ``"global"`` or ``"isomorphic"``.

    Raises:
      TPPError: The scope is unknown.
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
    # The sizes of other groups' axes are ignored: the first block of a stage, whose
    # input is narrower, has the shape of the other blocks.
    prunable_axes = {(m.leaf, m.axis) for group in groups for m in group.members}
    pools: dict[object, list[Group]] = {}
    for group in matched:
        members = []
        for member in group.members:
            leaf, axis = member.leaf, member.axis
            shape = tuple(
                0 if i != axis and (leaf, i) in prunable_axes else n
                for i, n in enumerate(groups.shapes[leaf])
            )
            members.append((member.role, axis, member.positions.shape, shape))
        pools.setdefault(tuple(sorted(members)), []).append(group)
    return list(pools.values())


def _removals(
    pool: Sequence[Group], scores: Mapping[str, Scores], limits: Limits
) -> Order:
    """Returns the index of the group of a pool that loses the next channel."""
    if len(pool) == 1:
        return np.zeros(limits.most(pool[0].size), np.int64)
    lowest = [np.sort(scores[g.name])[: limits.most(g.size)] for g in pool]
    group = np.repeat(np.arange(len(pool)), [len(ranked) for ranked in lowest])
    return group[np.argsort(np.concatenate(lowest), kind="stable")]


def _removals_of_all(
    pools: Sequence[Sequence[Group]],
    weights: Mapping[str, float],
    scores: Mapping[str, Scores],
    limits: Limits,
) -> Order:
    """Returns the index of the group of all pools that loses the next channel."""
    ratios: list[np.ndarray] = [np.zeros(0)]
    losers, before = [np.zeros(0, np.int64)], 0
    for pool in pools:
        # A group of n channels loses its k-th at the ratio (k - ½) / n, where k is the
        # nearest number of channels.
        thresholds = [
            (np.arange(limits.most(g.size)) + 0.5) / (g.size * weights[g.name])
            for g in pool
        ]
        ratios.append(np.sort(np.concatenate(thresholds)))
        losers.append(before + _removals(pool, scores, limits))
        before += len(pool)
    return np.concatenate(losers)[np.argsort(np.concatenate(ratios), kind="stable")]


def _check_all_counted(left_out: Sequence[str]) -> None:
    if left_out:
        more = ", …" if len(left_out) > 3 else ""
        raise TPPError(
            f"a FLOPs target needs all work counted, but the work of "
            f"{', '.join(left_out[:3])}{more} is not: give ratios or a target of "
            "parameters, or pass allow_uncounted=True to ignore uncounted work"
        )


def _out_of_reach(
    wanted: tuple[float | None, ...], least: tuple[float, ...], limits: Limits
) -> str:
    asked, reached = [], []
    for name, want, share in zip(("params", "flops"), wanted, least, strict=True):
        if want is not None:
            asked.append(f"{name}={want}")
            reached.append(f"{share:.4f} of the {name}")
    fixes = ["match more layers"]
    fixes += ["lower round_to"] if limits.round_to > 1 else []
    fixes += ["lower min_channels"] if limits.min_channels > 1 else []
    return (
        f"the target {' and '.join(asked)} is out of reach: with all channels removed "
        f"that may be, {' and '.join(reached)} remain; {' or '.join(fixes)}"
    )


def _unpruned(groups: Groups, matched: Sequence[Group]) -> str:
    """Returns a sentence that names the groups that are not pruned, and why."""
    names = {group.name for group in matched}
    rest = [g for g in groups if g.name not in names]
    described = [
        f"{g.name} ({g.reason})" if g.reason else g.name
        for g in sorted(rest, key=lambda g: g.reason is not None)
    ]
    more = f" and {len(described) - 4} more" if len(described) > 4 else ""
    return f". Not pruned: {', '.join(described[:4])}{more}" if described else ""
