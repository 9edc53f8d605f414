"""From ratios to counts to the channels that stay: what a run will do, as data."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from tpp_jax.errors import TPPError
from tpp_jax.pruning.criteria import (
    REDUCTIONS,
    Criterion,
    find_criterion,
    group_scores,
)
from tpp_jax.pruning.groups import Group, Groups
from tpp_jax.pruning.naming import longest_known_suffix, named_leaves
from tpp_jax.pruning.targets import Limits, kept_by_ratios, kept_for_target, pools_of

Ratios = Mapping[str, float] | str | float


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

    def kept_blocks(self, leaf: str, blocks: int) -> int | None:
        """Returns how many equal blocks of a parameter's channels keep something.

        Args:
          leaf: name of a parameter: a group norm's scale, whose channels may lie along
            any axis (under ``nn.scan`` it has two), or a kernel with its outputs last.
          blocks: number of blocks of neighbouring positions.

        Returns:
          The number; None if there is no such parameter or it has no such blocks.
        """
        shape = self.groups.shapes.get(leaf)
        here = self.groups.members.get(leaf, ())
        axes = {member.axis for _, member in here}
        along = len(axes) == 1 and all(member.role == "along" for _, member in here)
        axis = axes.pop() if along else -1
        if not shape or shape[axis] % blocks:
            return None
        stays = np.ones(shape[axis], bool)
        for group, member in here:
            if member.axis == axis % len(shape):
                stays[member.positions[self.pruned(group.name)]] = False
        return int(stays.reshape(blocks, -1).any(axis=1).sum())

    def pruned(self, name: str) -> Int[np.ndarray, " p"]:
        """Returns the channels of a group that go, ascending (concrete plans only)."""
        return np.setdiff1d(np.arange(self.groups[name].size), self.kept[name])

    def then(self, later: "Plan") -> "Plan":
        """Returns the plan that does at once what this and a plan of its result do.

        Args:
          later: made for the model that this plan leaves.
        """
        whole = {name: np.arange(len(kept)) for name, kept in self.kept.items()}
        kept = {
            name: np.asarray(ours)[np.asarray(later.kept.get(name, whole[name]))]
            for name, ours in self.kept.items()
        }
        return Plan(kept, self.groups)

    def to_dict(self) -> dict[str, list[int]]:
        """Returns the kept indices as plain data, ready for JSON."""
        return {name: np.asarray(kept).tolist() for name, kept in self.kept.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Sequence[int]], groups: Groups) -> "Plan":
        """Rebuilds a plan from :meth:`to_dict` and the groups of the same model.

        Raises:
          TPPError: the data names other groups, or channels that they do not have.
        """
        sizes = {g.name: g.size for g in groups if g.reason is None}
        if not isinstance(data, Mapping):
            raise TPPError(f"a plan is a dict of group → kept indices, not {data!r}")
        if sizes.keys() != data.keys():
            odd = sorted(sizes.keys() ^ data.keys())
            raise TPPError(f"the plan is of another model: groups {odd} do not match")
        for name, indices in data.items():
            numbers = isinstance(indices, Sequence) and all(
                type(i) is int and 0 <= i < sizes[name] for i in indices
            )
            if not numbers or not indices or (np.diff(indices) <= 0).any():
                raise TPPError(
                    f"the plan is of another model: {name} has {sizes[name]} channels, "
                    f"and {indices!r} are not ascending indices of them"
                )
        kept = {name: np.asarray(data[name], np.int32) for name in sizes}
        return cls(kept, groups)


def make_plan(
    groups: Groups,
    model: nnx.Module | Any,
    ratios: Ratios | None = None,
    *,
    counts: Mapping[str, int] | None = None,
    flops: float | None = None,
    params: float | None = None,
    skip: Sequence[str] | str = (),
    criterion: str | Criterion = "l1",
    statistics: Any = None,
    scope: str = "local",
    reduce: str = "mean",
    seed: int = 0,
    round_to: int = 1,
    min_channels: int = 1,
) -> Plan:
    """Chooses the channels to prune (method section 1: chosen once, from the weights).

    How much goes is said by ratios, or by a target that the ratios are solved for.

    Args:
      groups: from :func:`tpp_jax.channel_groups`.
      model: the model with its weights, or a parameter pytree.
      ratios: share of the channels to prune, in [0, 1): one number for every group that
        can be pruned and is not inner, or pattern → share, as a dict or as the
        original's string ``"*layer*.conv1:0.9,*layer3*:0.5"``. Patterns are
        ``fnmatch`` globs over layer names; the last match wins, no match means 0. A
        group is matched by any layer that produces it; an inner group (``layer#2``,
        the dimensions within heads) by its own name only.
      counts: group name → how many of its channels stay, in place of ratios.
      flops: target: share of the model's FLOPs that is to *remain*, in (0, 1]. Ratios
        are then relative: all are scaled by one number, as large as it takes. Without
        ratios, all groups that a single number would prune get equal ones.
      params: likewise, of its parameters. With both targets, both are met.
      skip: patterns of layers that are left whole, whatever the ratios say.
      criterion: a name in :data:`tpp_jax.pruning.criteria.CRITERIA`, ``"random"``, or a
        function from filters ``[n, d]`` (and their statistics ``[n, d]``, if given) to
        scores ``[n]``; the lowest scores go.
      statistics: for a criterion that needs more than weights: a pytree named like the
        parameters, from :mod:`tpp_jax.pruning.statistics`.
      scope: where scores compete. ``"local"``: each group loses its own share;
        ``"global"``: as many channels in all, but the lowest scores among all matched
        groups; ``"isomorphic"``: as many in all among groups of like shape.
      reduce: how a channel's scores in the layers that produce it become one:
        ``"mean"``, ``"sum"``, ``"max"``, or ``"first"``, the score in the first layer.
      seed: of the random criterion.
      round_to: kept counts are rounded up to a multiple of this.
      min_channels: no group is left with fewer.

    Returns:
      The plan. By ratios, ``ceil(ratio · n)`` channels of a group of n go, at most
      ``floor(0.995 · n)``. For a target, as few go as meet it.

    Raises:
      TPPError: a ratio outside [0, 1), a pattern that matches no layer, a pattern
        that matches only layers that cannot be pruned, a target that is out of reach,
        an unknown criterion, scope or reduction, statistics that are missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from tpp_jax.pruning.channels import channel_groups
      >>> def mlp(p, x):
      ...     return x @ p["w1"] @ p["w2"]
      >>> p = {"w1": jnp.arange(32.0).reshape(4, 8), "w2": jnp.ones((8, 2))}
      >>> groups = channel_groups(mlp, jnp.ones((1, 4)), params=p)
      >>> make_plan(groups, p, {"w1": 0.25}).to_dict()
      {'w1': [2, 3, 4, 5, 6, 7]}
      >>> make_plan(groups, p, flops=0.5).to_dict()
      {'w1': [4, 5, 6, 7]}
    """
    _check_numbers(flops, params, round_to, min_channels)
    if reduce not in REDUCTIONS:
        raise TPPError(
            f"unknown reduce {reduce!r}: choose one of {', '.join(REDUCTIONS)}"
        )
    if ratios is None and flops is None and params is None and counts is None:
        raise TPPError(
            "nothing says how much to prune: give ratios, or the share of the FLOPs or "
            "parameters to remain, as in flops=0.5"
        )
    limits = Limits(min_channels, round_to)
    if counts is not None:
        _check_counts(groups, counts)
        matched = [groups[name] for name in counts]
    else:
        whole = 0.5 if ratios is None else ratios
        asked = _ratios_of(groups, whole, parse_patterns(skip))
        matched = [g for g in groups if asked.get(g.name) and limits.most(g.size)]
        pools = pools_of(groups, matched, scope)
    leaves = _by_parameter(
        nnx.state(model) if isinstance(model, nnx.Module) else model, groups
    )
    _check_leaves(groups, leaves)
    score = find_criterion(criterion, seed, statistics is not None)
    extra = None if statistics is None else _by_parameter(statistics, groups)
    scores = {g.name: group_scores(g, leaves, score, reduce, extra) for g in matched}
    if counts is not None:
        pass
    elif flops is None and params is None:
        counts = kept_by_ratios(pools, asked, scores, limits)
    else:
        counts = kept_for_target(
            groups, pools, asked, scores, limits, flops=flops, params=params
        )
    kept = {}
    for group in groups:
        if group.reason is None:
            n_kept = counts.get(group.name, group.size)
            # Stable sorting breaks ties by index, so that one seed gives one plan.
            order = np.argsort(
                scores.get(group.name, np.arange(group.size)), kind="stable"
            )
            kept[group.name] = np.sort(order[group.size - n_kept :]).astype(np.int32)
    return Plan(kept, groups)


def parse_ratios(ratios: Mapping[str, float] | str) -> dict[str, float]:
    """Reads ratios: a dict, or the original's string ``"pattern:ratio,pattern:ratio"``.

    Raises:
      TPPError: text of another form, or a ratio outside [0, 1).

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
                raise TPPError(
                    f"cannot read the pruning ratio {part!r}: write pattern:ratio, as "
                    "in '*layer*.conv1:0.5', several separated by commas"
                )
        ratios = dict(pairs)
    for pattern, ratio in ratios.items():
        _check_ratio(ratio, repr(pattern))
    return dict(ratios)


def _check_ratio(ratio: float, of: str) -> None:
    if not 0 <= ratio < 1:
        raise TPPError(
            f"the pruning ratio {ratio} of {of} is not in [0, 1): it is the share of "
            "filters to remove"
        )


def parse_patterns(patterns: Sequence[str] | str) -> list[str]:
    """Reads patterns: a sequence, or one string with commas between them."""
    if isinstance(patterns, str):
        patterns = patterns.split(",")
    return [pattern.strip() for pattern in patterns if pattern.strip()]


def _check_numbers(
    flops: float | None, params: float | None, round_to: int, min_channels: int
) -> None:
    for name, least in (("round_to", round_to), ("min_channels", min_channels)):
        if least < 1:
            raise TPPError(f"{name} is {least}, must be at least 1")
    for name, share in (("flops", flops), ("params", params)):
        if share is not None and not 0 < share <= 1:
            raise TPPError(
                f"the target {name}={share} is not in (0, 1]: it is the share of the "
                f"model's {name} that is to remain"
            )


def _ratios_of(groups: Groups, ratios: Ratios, skip: list[str]) -> dict[str, float]:
    """Returns group name → share to prune, for the prunable groups."""
    for pattern in skip:
        _check_pattern(groups, pattern, must_prune=False)
    if isinstance(ratios, (int, float)):
        _check_ratio(ratios, "every group")
        asked = {g.name: ratios for g in groups if g.reason is None and not g.inner}
    else:
        ratios = parse_ratios(ratios)
        for pattern, ratio in ratios.items():
            _check_pattern(groups, pattern, must_prune=ratio > 0)
        asked = {}
        for group in groups:
            matching = [ratio for p, ratio in ratios.items() if _matches(p, group)]
            if group.reason is None and matching:
                asked[group.name] = matching[-1]
    for group in groups:
        if any(_matches(pattern, group) for pattern in skip):
            asked.pop(group.name, None)
    return asked


def _by_parameter(tree: Any, groups: Groups) -> dict[str, Any]:
    """Returns the leaves of a tree by the parameters that they are named like."""
    # A Linen module's variables have the collection's name in front of each leaf's.
    found: dict[str, Any] = {}
    for name, leaf in named_leaves(tree).items():
        parameter = longest_known_suffix(name, groups.shapes) or name
        # Of a parameter and its copy in another collection, the parameter counts.
        if parameter not in found or name in (parameter, f"params.{parameter}"):
            found[parameter] = leaf
    return found


def _matches(pattern: str, group: Group) -> bool:
    names = (group.name,) if group.inner else (group.name, *group.producers)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _check_pattern(groups: Groups, pattern: str, must_prune: bool) -> None:
    matched = [group for group in groups if _matches(pattern, group)]
    if not matched:
        names = list(dict.fromkeys(name for g in groups for name in g.producers))
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:5]
        raise TPPError(
            f"the pattern {pattern!r} matches no layer; there are for example "
            f"{', '.join(near)}"
        )
    if must_prune and all(group.reason for group in matched):
        group = matched[0]
        raise TPPError(
            f"the pattern {pattern!r} asks to prune {group.name}, which cannot be "
            f"pruned: its channels are tied to {group.reason}"
        )


def _check_counts(groups: Groups, counts: Mapping[str, int]) -> None:
    sizes = {g.name: g.size for g in groups if g.reason is None}
    for name, count in counts.items():
        if name not in sizes:
            raise TPPError(f"no group {name!r} can be pruned: there are {list(sizes)}")
        if not 1 <= count <= sizes[name]:
            raise TPPError(
                f"{count} channels of {name} are to stay, but it has {sizes[name]}"
            )


def _check_leaves(groups: Groups, leaves: Mapping[str, Any]) -> None:
    for name, shape in groups.shapes.items():
        found = np.shape(leaves[name]) if name in leaves else None
        if found != shape and name in groups.members:
            raise TPPError(
                f"the groups are of another model: they were made with {name} of shape "
                f"{shape}, here it is {found or 'missing'}"
            )
        if name in groups.members and isinstance(leaves[name], jax.ShapeDtypeStruct):
            raise TPPError(
                f"{name} is abstract: to choose channels, the weights are needed"
            )
