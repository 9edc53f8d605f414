"""Number of channels that each group loses, from ratios or targets, in three scopes.

The groups that are pruned form *pools*: one per group in scope ``local``, a single one
in scope ``global``, one for all groups of equal shape in scope ``isomorphic``. A ratio
or a target determines how many channels a pool loses; the scores determine which of its
groups lose them. With measured costs there are no pools: each group loses what makes
the sum of costs small.
"""

import bisect
import fnmatch
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tpp_jax.errors import TPPError
from tpp_jax.graph.groups import Group, Groups
from tpp_jax.pruning.allocation import Problem, cheapest_levels
from tpp_jax.pruning.criteria import Scores
from tpp_jax.pruning.flops import Costs, uncounted_work
from tpp_jax.pruning.memory import Memory
from tpp_jax.pruning.times import LatencyTable

Order = Int[np.ndarray, " channels"]

# Numbers of removed channels at which a latency is predicted, at least.
_PLACES = 512

SCOPES = ("local", "global", "isomorphic")

MEASURES = ("params", "flops", "kv_cache", "latency", "memory")
"""What a target may limit: parameters, FLOPs, the outputs that are cached, the time of
a call, and the peak memory of the activations."""

# The original code never removes more than this share of a layer, so that one filter
# of 16 is kept at any ratio.
_LARGEST_SHARE = 0.995


class Limits(NamedTuple):
    """Limits of the number of channels that a group keeps.

    Attributes:
      min_channels: Smallest number of channels that a group keeps.
      round_to: Number of which kept counts are rounded up to a multiple: one for all
        groups, or one by the name of each group; in its place the counts, ascending,
        to the next of which they are rounded up.
    """

    min_channels: int = 1
    round_to: int | Mapping[str, int | Sequence[int]] = 1

    def most(self, group: Group) -> int:
        """Returns the largest number of channels that a group may lose."""
        least, share = max(self.min_channels, group.chosen), _LARGEST_SHARE
        return max(min(math.floor(share * group.size), group.size - least), 0)

    def kept(self, group: Group, removed: int) -> int:
        """Returns the rounded number of channels that a group keeps."""
        step = self.round_to
        if isinstance(step, Mapping):
            step = step.get(group.name, 1)
        if isinstance(step, Sequence):
            least = bisect.bisect_left(step, group.size - removed)
            return step[least] if least < len(step) else group.size
        rounded = math.ceil((group.size - removed) / step) * step
        return min(rounded, group.size)


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
            min(math.ceil(ratios[g.name] * g.size), limits.most(g)) for g in pool
        )
        removed = np.bincount(
            _removals(pool, scores, limits)[:total], minlength=len(pool)
        )
        for group, n in zip(pool, removed, strict=True):
            kept[group.name] = limits.kept(group, int(n))
    return kept


class Target:
    """What is to remain of a model, in shares of the measures in :data:`MEASURES`.

    Attributes:
      wanted: Name of a measure → share of the unpruned model to keep.
    """

    def __init__(
        self,
        groups: Groups,
        wanted: Mapping[str, float | None],
        cached: Sequence[str] = (),
        emptied: Collection[str] = (),
        allow_uncounted: bool = False,
        table: LatencyTable | None = None,
    ) -> None:
        """Prepares a target.

        Args:
          groups: All groups of the model.
          wanted: Name in :data:`MEASURES` → share of the unpruned model to keep; None
            for any.
          cached: Names of the layers whose outputs are cached.
          emptied: Names of groups that lose all channels in any case.
          allow_uncounted: Whether a FLOPs target is accepted for a model with work that
            is not counted.
          table: Times of the model, for a target of the latency.

        Raises:
          TPPError: It is a FLOPs target and some work is not counted.
        """
        if wanted.get("flops") is not None and not allow_uncounted:
            _check_all_counted(uncounted_work(groups.traced))
        shares = {name: wanted.get(name) for name in MEASURES}
        self.wanted = {n: share for n, share in shares.items() if share is not None}
        self._measures = _measures(groups, self.wanted, cached, table)
        self._groups = groups
        self._unpruned = {name: of({}) for name, of in self._measures.items()}
        self._emptied = dict.fromkeys(emptied, 0)

    def amounts(self, kept: Mapping[str, int]) -> dict[str, float]:
        """Returns what remains by each measure that is wanted, in its own unit.

        Args:
          kept: Group name → number of kept channels; other groups are not pruned.
        """
        kept = self._emptied | dict(kept)
        return {name: of(kept) for name, of in self._measures.items()}

    def shares(self, kept: Mapping[str, int]) -> dict[str, float]:
        """Returns what remains by each measure that is wanted, as a share.

        Args:
          kept: Group name → number of kept channels; other groups are not pruned.
        """
        unpruned = self._unpruned
        return {
            name: found / unpruned[name] if unpruned[name] else 0.0
            for name, found in self.amounts(kept).items()
        }

    def met(self, kept: Mapping[str, int]) -> bool:
        """Reports whether the model is small enough."""
        shares = self.shares(kept)
        return all(shares[name] <= want for name, want in self.wanted.items())

    def check_reachable(
        self, fewest: Mapping[str, int], limits: Limits, more: str
    ) -> None:
        """Raises if the target is out of reach.

        Args:
          fewest: Group name → the smallest number of channels that it may keep.
          limits: Limits of the kept counts.
          more: What would let more channels be pruned.
        """
        if not self.met(fewest):
            pruned = {*fewest, *self._emptied}
            raise TPPError(
                self._out_of_reach(fewest, limits, more)
                + _unpruned(self._groups, pruned)
            )

    def _out_of_reach(
        self, fewest: Mapping[str, int], limits: Limits, more: str
    ) -> str:
        amounts, shares = self.amounts(fewest), self.shares(fewest)
        asked = [f"{name}={want}" for name, want in self.wanted.items()]
        reached = [
            f"{share:.4f} of the {name}" + _in_units(name, amounts[name])
            for name, share in shares.items()
        ]
        fixes = [more]
        fixes += ["lower round_to"] if limits.round_to != 1 else []
        fixes += ["lower min_channels"] if limits.min_channels > 1 else []
        return (
            f"the target {' and '.join(asked)} is out of reach: with all channels "
            f"removed that may be, {' and '.join(reached)} remain; {' or '.join(fixes)}"
        )


def _in_units(measure: str, amount: float) -> str:
    """Returns an amount in brackets for measures that are known by their units."""
    match measure:
        case "latency":
            return f" ({1e3 * amount:.3g} ms)"
        case "memory":
            return f" ({int(amount):,} bytes)"
    return ""


def _measures(
    groups: Groups,
    wanted: Collection[str],
    cached: Sequence[str],
    table: LatencyTable | None,
) -> dict[str, Callable[[Mapping[str, int]], float]]:
    """Returns the functions of kept counts that measure a model."""
    found: dict[str, Callable[[Mapping[str, int]], float]] = {}
    if not {"params", "flops", "kv_cache"}.isdisjoint(wanted):
        costs = Costs(groups, cached)
        found["params"] = lambda kept: costs(kept)[0]
        found["flops"] = lambda kept: costs(kept)[1]
        found["kv_cache"] = costs.cache
    if "latency" in wanted and table is not None:
        found["latency"] = table.seconds
    if "memory" in wanted:
        found["memory"] = Memory(groups)
    return {name: found[name] for name in wanted}


def kept_for_target(
    target: Target,
    pools: Sequence[Sequence[Group]],
    weights: Mapping[str, float],
    scores: Mapping[str, Scores],
    limits: Limits,
) -> dict[str, int]:
    """Returns the number of kept channels of each group, to meet a target.

    One ratio, times the weight of each group, is raised from 0 until the model is small
    enough. Channels are removed one at a time: one channel fewer would miss the target.

    Args:
      target: Shares of the model to keep.
      pools: Pools from :func:`pools_of`.
      weights: Group name → its ratio relative to the others.
      scores: Group name → score of each channel.
      limits: Limits of the kept counts.

    Raises:
      TPPError: The target is out of reach.
    """
    matched = [group for pool in pools for group in pool]
    order = _removals_of_all(pools, weights, scores, limits)

    def kept(steps: int) -> dict[str, int]:
        removed = np.bincount(order[:steps], minlength=len(matched))
        return {
            g.name: limits.kept(g, int(n))
            for g, n in zip(matched, removed, strict=True)
        }

    def met(steps: int) -> bool:
        return target.met(kept(steps))

    target.check_reachable(kept(len(order)), limits, "match more layers")
    low, high = 0, len(order)
    if "latency" in target.wanted:
        # A narrower network may be slower: the widest that is fast enough is looked
        # for along the way, and not only where bisection would lead.
        places = np.linspace(0, high, min(high, _PLACES) + 1).astype(int).tolist()
        first = next(i for i, steps in enumerate(places) if met(steps))
        low, high = places[max(first - 1, 0)], places[first]
    return kept(bisect.bisect_left(range(high), True, low, key=met))


def kept_by_costs(
    target: Target,
    matched: Sequence[Group],
    curves: Mapping[str, Float[np.ndarray, " removed"]],
    limits: Limits,
) -> dict[str, int]:
    """Returns the number of kept channels of each group, to meet a target cheaply.

    The sum of the groups' costs is made small; no group could keep one step more.

    Args:
      target: Shares of the model to keep.
      matched: Groups that are pruned.
      curves: Group name → cost of removing 0, 1, 2, … of its channels.
      limits: Limits of the kept counts.

    Raises:
      TPPError: The target is out of reach.
    """
    levels = []
    for group in matched:
        most = min(limits.most(group), len(curves[group.name]) - 1)
        kept = {limits.kept(group, removed) for removed in range(most + 1)}
        levels.append(np.sort([group.size - n for n in kept]))

    def kept_at(chosen: Sequence[int]) -> dict[str, int]:
        return {
            group.name: group.size - int(own[level])
            for group, own, level in zip(matched, levels, chosen, strict=True)
        }

    more = "measure larger ratios or more groups"
    target.check_reachable(kept_at([-1] * len(levels)), limits, more)
    problem = Problem(
        levels,
        [curves[g.name][own] for g, own in zip(matched, levels, strict=True)],
        lambda chosen: np.array([*target.shares(kept_at(chosen)).values()]),
        np.array([*target.wanted.values()]),
    )
    return kept_at(cheapest_levels(problem))


def saved_by_channels(
    groups: Groups,
    scored: Sequence[Group],
    wanted: Mapping[str, float | None],
    cached: Sequence[str] = (),
    table: LatencyTable | None = None,
) -> dict[str, float]:
    """Returns the share of the model that one channel of each group is.

    Args:
      groups: All groups of the model.
      scored: Groups of interest.
      wanted: Targets, as for :class:`Target`; measures with a target are of interest.
        Of several, shares are added.
      cached: Names of the layers whose outputs are cached.
      table: Times of the model, for a target of the latency.
    """
    if all(share is None for share in wanted.values()):
        return {}
    target = Target(groups, wanted, cached, allow_uncounted=True, table=table)
    unpruned, saved = target.shares({}), {}
    for group in scored:
        without = target.shares({group.name: group.size - 1})
        saved[group.name] = sum(unpruned[name] - without[name] for name in without)
    return {name: share for name, share in saved.items() if share > 0}


def cached_layers(groups: Groups, patterns: Sequence[str]) -> list[str]:
    """Returns the names of the layers whose outputs are cached.

    Args:
      groups: All groups of the model.
      patterns: Patterns over the names of layers.

    Raises:
      TPPError: A pattern matches no layer.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        matched = fnmatch.filter(groups.layers, pattern)
        if not matched:
            raise TPPError(
                f"a target of the key-value cache needs the layers that make keys and "
                f"values, and {pattern!r} matches no layer: name them, as in "
                "cached='*.key,*.value'"
            )
        found.update(dict.fromkeys(matched))
    return list(found)


def groups_of_outputs(groups: Groups, names: Collection[str]) -> set[str]:
    """Returns the names of the groups that run along the outputs of some layers."""
    return {g.name for g in groups if set(names).intersection(g.producers)}


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
        return np.zeros(limits.most(pool[0]), np.int64)
    lowest = [_ladder(scores[g.name])[: limits.most(g)] for g in pool]
    group = np.repeat(np.arange(len(pool)), [len(ranked) for ranked in lowest])
    return group[np.argsort(np.concatenate(lowest), kind="stable")]


def _ladder(scores: Scores) -> Scores:
    """Returns the ascending scores of a group; means over the layers of a loop."""
    return np.atleast_2d(np.sort(scores, axis=-1)).mean(axis=0)


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
            (np.arange(limits.most(g)) + 0.5) / (g.size * weights[g.name]) for g in pool
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


def _unpruned(groups: Groups, matched: Collection[str]) -> str:
    """Returns a sentence that names the groups that are not pruned, and why."""
    rest = [g for g in groups if g.name not in matched]
    described = [
        f"{g.name} ({g.reason})" if g.reason else g.name
        for g in sorted(rest, key=lambda g: g.reason is not None)
    ]
    more = f" and {len(described) - 4} more" if len(described) > 4 else ""
    return f". Not pruned: {', '.join(described[:4])}{more}" if described else ""
