"""From ratios to counts to the channels that stay: what a run will do, as data."""

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from tpp_jax.pruning.criteria import Criterion, find_criterion, group_scores
from tpp_jax.pruning.groups import Group, Groups
from tpp_jax.pruning.naming import named_leaves

# The original never removes more than this share of a layer, so that one filter of 16
# survives any ratio.
_LARGEST_SHARE = 0.995

Ratios = Mapping[str, float] | str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Which channels stay: a pytree whose leaves are the kept indices.

    The number of channels kept is static (a shape), which channels they are is an
    array: slicing and penalties can be jitted, and vmapped over plans of equal counts.

    Attributes:
      kept: group name → int32 ``[k]``, ascending, for every prunable group.
      groups: the groups of the unpruned model.
    """

    kept: dict[str, Int[Array, " k"]]
    groups: Groups = dataclasses.field(metadata={"static": True})

    @property
    def pruned_groups(self) -> tuple[Group, ...]:
        """The groups that lose at least one channel, in order of execution."""
        return tuple(
            g for g in self.groups if self.kept_count(g) < g.size and g.reason is None
        )

    def kept_count(self, group: Group) -> int:
        """Returns how many of a group's channels stay."""
        kept = self.kept.get(group.name)
        return group.size if kept is None else kept.shape[-1]

    def pruned(self, name: str) -> Int[np.ndarray, " p"]:
        """Returns the channels of a group that go, ascending (concrete plans only)."""
        return np.setdiff1d(np.arange(self.groups[name].size), self.kept[name])

    def to_dict(self) -> dict[str, list[int]]:
        """Returns the kept indices as plain data, ready for JSON."""
        return {name: np.asarray(kept).tolist() for name, kept in self.kept.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Sequence[int]], groups: Groups) -> "Plan":
        """Rebuilds a plan from :meth:`to_dict` and the groups of the same model.

        Raises:
          ValueError: the data names other groups, or channels that they do not have.
        """
        sizes = {g.name: g.size for g in groups if g.reason is None}
        if sizes.keys() != data.keys():
            odd = sorted(sizes.keys() ^ data.keys())
            raise ValueError(f"the plan is of another model: groups {odd} do not match")
        kept = {name: np.asarray(data[name], np.int32) for name in sizes}
        for name, indices in kept.items():
            in_range = indices.size and 0 <= indices[0] and indices[-1] < sizes[name]
            if not in_range or (np.diff(indices) <= 0).any():
                raise ValueError(
                    f"the plan is of another model: {name} has {sizes[name]} channels, "
                    f"and {data[name]} are not ascending indices of them"
                )
        return cls(kept, groups)


def make_plan(
    groups: Groups,
    model: nnx.Module | Any,
    ratios: Ratios,
    *,
    skip: Sequence[str] | str = (),
    criterion: str | Criterion = "l1",
    scope: str = "local",
    seed: int = 0,
    round_to: int = 1,
) -> Plan:
    """Chooses the channels to prune (method section 1: chosen once, from the weights).

    Args:
      groups: from :func:`tpp_jax.channel_groups`.
      model: the model with its weights, or a parameter pytree.
      ratios: pattern → share of the channels to prune, in [0, 1), as a dict or as the
        original's string ``"*layer*.conv1:0.9,*layer3*:0.5"``. Patterns are
        ``fnmatch`` globs over layer names; the last match wins, no match means 0. A
        group is matched by any layer that produces it; an inner group (``layer#2``,
        the dimensions within heads) by its own name only.
      skip: patterns of layers that are left whole, whatever the ratios say.
      criterion: ``"l1"``, ``"l2"``, ``"random"`` or a function from filters ``[n, d]``
        to scores ``[n]``; the lowest scores go.
      scope: ``"local"``: each group loses its own share; ``"global"``: as many channels
        in all, but the lowest scores among all matched groups.
      seed: of the random criterion.
      round_to: kept counts are rounded up to a multiple of this.

    Returns:
      The plan. ``ceil(ratio · n)`` channels of a group of n go, at most
      ``floor(0.995 · n)``.

    Raises:
      ValueError: a ratio outside [0, 1), a pattern that matches no layer, a pattern
        that matches only layers that cannot be pruned, an unknown criterion or scope.
    """
    if round_to < 1:
        raise ValueError(f"round_to is {round_to}, must be at least 1")
    counts = _prune_counts(groups, parse_ratios(ratios), parse_patterns(skip))
    leaves = named_leaves(nnx.state(model) if isinstance(model, nnx.Module) else model)
    _check_leaves(groups, leaves)
    score = find_criterion(criterion, seed)
    scores = {
        group.name: group_scores(group, leaves, score)
        for group in groups
        if group.reason is None and counts[group.name]
    }
    if scope == "global":
        counts |= _global_counts(scores, counts)
    elif scope != "local":
        raise ValueError(f"unknown scope {scope!r}: choose 'local' or 'global'")
    kept = {}
    for group in groups:
        if group.reason is None:
            # Stable sorting breaks ties by index, so that one seed gives one plan.
            order = np.argsort(
                scores.get(group.name, np.arange(group.size)), kind="stable"
            )
            n_kept = group.size - counts[group.name]
            n_kept = min(math.ceil(n_kept / round_to) * round_to, group.size)
            order = order[group.size - n_kept :]
            kept[group.name] = np.sort(order).astype(np.int32)
    return Plan(kept, groups)


def parse_ratios(ratios: Ratios) -> dict[str, float]:
    """Reads ratios: a dict, or the original's string ``"pattern:ratio,pattern:ratio"``.

    Raises:
      ValueError: text of another form, or a ratio outside [0, 1).

    Example:
      >>> parse_ratios("*layer*.conv1:0.9, *layer3*:0.5")
      {'*layer*.conv1': 0.9, '*layer3*': 0.5}
    """
    if isinstance(ratios, str):
        pairs = []
        for part in parse_patterns(ratios):
            pattern, colon, number = part.rpartition(":")
            try:
                pairs.append((pattern.strip(), float(number)))
            except ValueError:
                colon = ""
            if not colon or not pattern.strip():
                raise ValueError(
                    f"cannot read the pruning ratio {part!r}: write pattern:ratio, as "
                    "in '*layer*.conv1:0.5', several separated by commas"
                )
        ratios = dict(pairs)
    for pattern, ratio in ratios.items():
        if not 0 <= ratio < 1:
            raise ValueError(
                f"the pruning ratio {ratio} of {pattern!r} is not in [0, 1): it is the "
                "share of filters to remove"
            )
    return dict(ratios)


def parse_patterns(patterns: Sequence[str] | str) -> list[str]:
    """Reads patterns: a sequence, or one string with commas between them."""
    if isinstance(patterns, str):
        patterns = patterns.split(",")
    return [pattern.strip() for pattern in patterns if pattern.strip()]


def _prune_counts(
    groups: Groups, ratios: dict[str, float], skip: list[str]
) -> dict[str, int]:
    """Returns group name → number of channels to prune, for the prunable groups."""
    for pattern in [*ratios, *skip]:
        _check_pattern(groups, pattern, must_prune=ratios.get(pattern, 0) > 0)
    counts = {}
    for group in groups:
        if group.reason is not None:
            continue
        matching = [ratio for p, ratio in ratios.items() if _matches(p, group)]
        if any(_matches(pattern, group) for pattern in skip):
            matching = []
        n = group.size
        ratio = matching[-1] if matching else 0.0
        counts[group.name] = min(math.ceil(ratio * n), math.floor(_LARGEST_SHARE * n))
    return counts


def _matches(pattern: str, group: Group) -> bool:
    names = (group.name,) if group.inner else (group.name, *group.producers)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _check_pattern(groups: Groups, pattern: str, must_prune: bool) -> None:
    matched = [group for group in groups if _matches(pattern, group)]
    if not matched:
        names = list(dict.fromkeys(name for g in groups for name in g.producers))
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:5]
        raise ValueError(
            f"the pattern {pattern!r} matches no layer; there are for example "
            f"{', '.join(near)}"
        )
    if must_prune and all(group.reason for group in matched):
        group = matched[0]
        raise ValueError(
            f"the pattern {pattern!r} asks to prune {group.name}, which cannot be "
            f"pruned: its channels are tied to {group.reason}"
        )


def _check_leaves(groups: Groups, leaves: Mapping[str, Any]) -> None:
    for name, shape in groups.shapes.items():
        found = np.shape(leaves[name]) if name in leaves else None
        if found != shape and name in groups.members:
            raise ValueError(
                f"the groups are of another model: they were made with {name} of shape "
                f"{shape}, here it is {found or 'missing'}"
            )


def _global_counts(
    scores: dict[str, np.ndarray], counts: dict[str, int]
) -> dict[str, int]:
    """Spends the total on the lowest scores of all groups; no group is emptied."""
    names = list(scores)
    pool = []
    for i, name in enumerate(names):
        ranked = np.sort(scores[name])[: math.floor(_LARGEST_SHARE * len(scores[name]))]
        pool += [(score, i) for score in ranked]
    chosen = [i for _, i in sorted(pool)[: sum(counts[name] for name in names)]]
    return {name: chosen.count(i) for i, name in enumerate(names)}
