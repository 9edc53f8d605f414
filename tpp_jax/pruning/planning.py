"""From ratios to counts to the kept channels: ``make_plan``."""

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Int

from tpp_jax.errors import TPPError, TPPTypeError
from tpp_jax.graph.records import Group, Groups
from tpp_jax.pruning.criteria import Criterion, Score, Scores, is_additive
from tpp_jax.pruning.curves import Sensitivity, check_measured
from tpp_jax.pruning.cutting import check_plan
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.scoring import channel_scores, check_mapping
from tpp_jax.pruning.targets import (
    Limits,
    Target,
    kept_by_costs,
    kept_by_ratios,
    kept_for_target,
    pools_of,
    saved_by_channels,
)

Ratios = Mapping[str, float] | str | float


def make_plan(
    groups: Groups,
    model: nnx.Module | Any,
    ratios: Ratios | None = None,
    *,
    counts: Mapping[str, int] | None = None,
    flops: float | None = None,
    params: float | None = None,
    sensitivity: Sensitivity | None = None,
    skip: Sequence[str] | str = (),
    criterion: str | Criterion | Score = "l1",
    statistics: Any = None,
    scores: Mapping[str, ArrayLike] | None = None,
    scope: str = "local",
    reduce: str = "mean",
    seed: int = 0,
    round_to: int = 1,
    min_channels: int = 1,
    allow_uncounted: bool = False,
    check: bool = True,
) -> Plan:
    """Chooses the channels to prune (method section 1: once, from the weights).

    Ratios determine how many channels are pruned, or a target that the ratios are
    solved for.

    Args:
      groups: Groups from :func:`tpp_jax.channel_groups`.
      model: Model with its weights, or parameter pytree; abstract if ``scores`` are
        given for every group that is pruned.
      ratios: Share of the channels to prune, in [0, 1): one number for every group that
        can be pruned and is not inner (the dimensions within heads, if the heads can
        be pruned), or pattern → share, as a dict or as a string in the format of the
        original code, ``"*layer*.conv1:0.9,*layer3*:0.5"``. Patterns are ``fnmatch``
        globs over layer names; the last match wins, no match means 0. A group is
        matched by any layer that produces it, an inner group (``layer#2``) by its own
        name only.
      counts: Group name → number of channels to keep, in place of ratios, targets,
        ``skip``, ``scope`` and limits.
      flops: Target share of the model's FLOPs to *keep*, in (0, 1]. Ratios are then
        relative: all are scaled by one number, as large as necessary. Without ratios,
        all groups that a single number would prune have equal ones.
      params: Target share of the model's parameters to *keep*, in (0, 1]. If both
        targets are given, both are met.
      sensitivity: Result of :func:`tpp_jax.sensitivity`, in place of ratios and scope,
        with a target: the groups that were measured lose unequal shares, so that the
        sum of their costs is small, and no more than was measured. Use the criterion
        that it was measured with.
      skip: Patterns of layers that are not pruned, whatever the ratios are.
      criterion: Name in :data:`tpp_jax.pruning.criteria.CRITERIA`, ``"random"``, a
        function from filters ``[n, d]`` (and their statistics ``[n, d]``, if given) to
        scores ``[n]``, or a :class:`~tpp_jax.pruning.criteria.Criterion`. The lowest
        scores are pruned.
      statistics: Pytree with the names of the parameters, from
        :mod:`tpp_jax.pruning.statistics`, for a criterion that needs more than weights;
        the result of :func:`tpp_jax.input_moments` for ``wanda``, ``variance`` and
        ``obs``.
      scores: Group name → the user's own scores, float ``[group.size]``, or
        ``[group.steps, group.size]``. They replace those of the criterion in the groups
        that they name.
      scope: Set of groups whose scores compete. ``"local"``: each group loses its own
        share; ``"global"``: the same total, but the lowest scores among all matched
        groups; ``"isomorphic"``: the same total among groups of equal shape. With a
        target, scores of ``obs`` are divided by the share of it that a channel is.
      reduce: Function that combines the scores of a channel in the layers that produce
        it: ``"mean"``, ``"sum"``, ``"max"``, or ``"first"``, the score in the first.
      seed: Seed of the random criterion.
      round_to: Number of which kept counts are rounded up to a multiple.
      min_channels: Smallest number of channels that a group keeps.
      allow_uncounted: Whether a FLOPs target is accepted for a model with work that
        :func:`tpp_jax.count` does not count (see :attr:`Count.uncounted`).
      check: Whether to try the plan on the model that the groups were found with, as
        :func:`tpp_jax.check_plan` does; this traces the model once more.

    Returns:
      The plan. With ratios, a group of n channels loses ``ceil(ratio · n)`` of them, at
      most ``floor(0.995 · n)``. With a target, as few channels are pruned as meet it.
      Layers in a loop (:attr:`Group.steps`) lose equally many channels, each those with
      its own lowest scores.

    Raises:
      TPPError: A ratio is outside [0, 1); a pattern matches no layer, or only layers
        that cannot be pruned; a target is out of reach; a criterion, scope or reduction
        is unknown; statistics are missing; counts or a sensitivity are combined with
        an argument that they replace; the sensitivity is that of other groups; scores
        have the wrong shape or are for an unknown group; or the model does not work
        with the plan.
      TPPTypeError: ``groups`` is not the result of :func:`tpp_jax.channel_groups`, or
        ``sensitivity`` not that of :func:`tpp_jax.sensitivity`.

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
    if sensitivity is not None:
        _check_sensitivity_alone(ratios, counts, scope, flops, params)
    _check_arguments(groups, ratios, counts, flops, params)
    _check_limits(round_to, min_channels)
    limits = Limits(min_channels, round_to)
    asked: dict[str, float] = {}
    pools: list[list[Group]] = []
    if sensitivity is not None:
        matched = _measured(groups, sensitivity, parse_patterns(skip), limits)
    elif counts is None:
        given = 0.5 if ratios is None else ratios
        asked = ratios_of(groups, given, parse_patterns(skip))
        matched = [g for g in groups if asked.get(g.name) and limits.most(g.size)]
        pools = pools_of(groups, matched, scope)
    else:
        others = dict(ratios=ratios, flops=flops, params=params, skip=skip, scope=scope)
        _check_counts_alone(others, limits)
        _check_counts(groups, counts)
        matched = [groups[name] for name in counts]
    ranks = channel_scores(
        groups,
        model,
        matched,
        criterion=criterion,
        statistics=statistics,
        scores=scores,
        reduce=reduce,
        seed=seed,
    )
    if scope != "local" and is_additive(criterion):
        others = [g for g in matched if g.name not in (scores or {})]
        saved = saved_by_channels(groups, others, flops=flops, params=params)
        # What a channel costs in each of the layers of a loop is paid in all of them.
        shares = {g.name: saved.get(g.name, 1) / (g.steps or 1) for g in others}
        ranks |= {name: ranks[name] / share for name, share in shares.items()}
    if counts is None and flops is None and params is None:
        counts = kept_by_ratios(pools, asked, ranks, limits)
    elif counts is None:
        target = Target(
            groups, flops=flops, params=params, allow_uncounted=allow_uncounted
        )
        if sensitivity is None:
            counts = kept_for_target(target, pools, asked, ranks, limits)
        else:
            curves = {g.name: sensitivity.curve(g.name) for g in matched}
            counts = kept_by_costs(target, matched, curves, limits)
    plan = Plan(best_channels(groups, counts, ranks), groups)
    if check and groups.source is not None:
        check_plan(plan)
    return plan


def best_channels(
    groups: Groups, counts: Mapping[str, int], scores: Mapping[str, Scores]
) -> dict[str, Int[np.ndarray, "*steps k"]]:
    """Returns the channels of each prunable group with the highest scores.

    In layers of a loop that may keep different channels, they are those of each layer.

    Args:
      groups: All groups of the model.
      counts: Group name → number of kept channels; all of a group that is not named.
      scores: Group name → score of each channel.
    """
    kept = {}
    for group in groups:
        if group.reason is None:
            n_kept = counts.get(group.name, group.size)
            ranking = scores.get(group.name, np.arange(group.size))
            # Stable sorting breaks ties by index, so that one seed gives one plan.
            order = np.argsort(ranking, axis=-1, kind="stable")
            best = order[..., group.size - n_kept :]
            kept[group.name] = np.sort(best, axis=-1).astype(np.int32)
    return kept


def parse_ratios(ratios: Mapping[str, float] | str) -> dict[str, float]:
    """Returns ratios as a dict.

    Args:
      ratios: Pattern → share to prune, or ``"pattern:ratio,pattern:ratio"``, the format
        of the original code.

    Raises:
      TPPError: The text has another format, or a ratio is outside [0, 1).

    Example:
      >>> parse_ratios("*layer*.conv1:0.9, *layer3*:0.5")
      {'*layer*.conv1': 0.9, '*layer3*': 0.5}
    """
    if isinstance(ratios, str):
        ratios = _numbers(ratios, "the pruning ratio")
    check_mapping("ratios", ratios, "share of its channels to remove, or one number")
    for pattern, ratio in ratios.items():
        _check_ratio(ratio, repr(pattern))
    return dict(ratios)


def _check_ratio(ratio: float, of: str) -> None:
    if not is_number(ratio) or not 0 <= ratio < 1:
        raise TPPError(
            f"the pruning ratio {ratio} of {of} is not in [0, 1): it is the share of "
            "filters to remove"
        )


def is_number(value: Any) -> TypeGuard[float]:
    """Reports whether a value is a real number, of Python, NumPy or JAX."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    dtype_kind = getattr(getattr(value, "dtype", None), "kind", "")
    return plain or (np.ndim(value) == 0 and dtype_kind in ("i", "u", "f"))


def parse_patterns(patterns: Sequence[str] | str) -> list[str]:
    """Returns patterns as a list, from a sequence or a comma-separated string."""
    if isinstance(patterns, str):
        patterns = patterns.split(",")
    return [pattern.strip() for pattern in patterns if pattern.strip()]


def _check_arguments(
    groups: Groups,
    ratios: Ratios | None,
    counts: Mapping[str, int] | None,
    flops: float | None,
    params: float | None,
) -> None:
    if not isinstance(groups, Groups):
        raise TPPTypeError(
            f"the groups are a {type(groups).__name__}: pass the result of "
            "tpp_jax.channel_groups(...) first, and then the model"
        )
    for name, share in (("flops", flops), ("params", params)):
        if share is not None and not 0 < share <= 1:
            raise TPPError(
                f"the target {name}={share} is not in (0, 1]: it is the share of the "
                f"model's {name} that is to remain"
            )
    if ratios is None and flops is None and params is None and counts is None:
        raise TPPError(
            "the amount to prune is missing: give ratios, or the share of the FLOPs or "
            "parameters to remain, as in flops=0.5"
        )


def _check_limits(round_to: int, min_channels: int) -> None:
    for name, least in (("round_to", round_to), ("min_channels", min_channels)):
        if least < 1:
            raise TPPError(f"{name} is {least}, must be at least 1")


def ratios_of(groups: Groups, ratios: Ratios, skip: list[str]) -> dict[str, float]:
    """Returns group name → share to prune, for the prunable groups.

    Args:
      groups: All groups of the model.
      ratios: Ratios of :func:`make_plan`.
      skip: Patterns of layers that are not pruned.

    Raises:
      TPPError: A ratio is outside [0, 1), or a pattern matches no layer.
    """
    for pattern in skip:
        _check_pattern(groups, pattern, must_prune=False)
    asked: dict[str, float] = {}
    if isinstance(ratios, int | float) or is_number(ratios):
        _check_ratio(ratios, "every group")
        asked = {g.name: ratios for g in groups if g.reason is None and not g.inner}
    else:
        by_pattern = parse_ratios(ratios)
        for pattern, ratio in by_pattern.items():
            _check_pattern(groups, pattern, must_prune=ratio > 0)
        for group in groups:
            matching = [ratio for p, ratio in by_pattern.items() if _matches(p, group)]
            if group.reason is None and matching:
                asked[group.name] = matching[-1]
    for group in groups:
        if any(_matches(pattern, group) for pattern in skip):
            asked.pop(group.name, None)
    return asked


def strengths_of(
    groups: Groups, strengths: Mapping[str, float] | str
) -> dict[str, float]:
    """Returns group name → factor on the strength of its penalties; 1 if none is given.

    Args:
      groups: All groups of the model.
      strengths: Pattern → factor, or ``"pattern:factor,pattern:factor"``; the last
        pattern that matches a group counts.

    Raises:
      TPPError: A factor is not a number of at least 0, or a pattern matches no layer.
    """
    if isinstance(strengths, str):
        strengths = _numbers(strengths, "the strength")
    check_mapping("strengths", strengths, "factor on the strength of its penalties")
    found = {group.name: 1.0 for group in groups}
    for pattern, factor in strengths.items():
        if not (is_number(factor) and 0 <= factor < float("inf")):
            raise TPPError(
                f"the strength {factor!r} of {pattern!r} must be a number of at least 0"
            )
        _check_pattern(groups, pattern, must_prune=False)
        found |= {g.name: float(factor) for g in groups if _matches(pattern, g)}
    return found


def _numbers(text: str, what: str) -> dict[str, float]:
    """Returns pattern → number of a text ``"pattern:number,pattern:number"``."""
    pairs = []
    for part in parse_patterns(text):
        pattern, colon, number = part.rpartition(":")
        try:
            pairs.append((pattern.strip(), float(number)))
        except ValueError:
            colon = ""
        if not colon or not pattern.strip():
            last = what.rpartition(" ")[2]
            raise TPPError(
                f"cannot read {what} {part!r}: write pattern:{last}, as in "
                "'*layer*.conv1:0.5', several separated by commas"
            )
    return dict(pairs)


def _matches(pattern: str, group: Group) -> bool:
    names = (group.name,) if group.inner else (group.name, *group.producers)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _check_pattern(groups: Groups, pattern: str, must_prune: bool) -> None:
    matched = [group for group in groups if _matches(pattern, group)]
    if not matched:
        names = list(dict.fromkeys(name for g in groups for name in g.producers))
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:5]
        raise TPPError(
            f"the pattern {pattern!r} matches no layer; layers are, for example, "
            f"{', '.join(near)}"
        )
    if must_prune and all(group.reason for group in matched):
        group = matched[0]
        raise TPPError(
            f"the pattern {pattern!r} asks to prune {group.name}, which cannot be "
            f"pruned: its channels are tied to {group.reason}"
        )


def _check_sensitivity_alone(
    ratios: Ratios | None,
    counts: Mapping[str, int] | None,
    scope: str,
    flops: float | None,
    params: float | None,
) -> None:
    """Raises if a sensitivity has no target, or is combined with what it replaces."""
    given = {"ratios": ratios is not None, "counts": counts is not None}
    given["scope"] = scope != "local"
    found = [name for name, is_given in given.items() if is_given]
    if found:
        raise TPPError(
            f"a sensitivity determines how much each group loses, so "
            f"{' and '.join(found)} would be ignored: give one or the other"
        )
    if flops is None and params is None:
        raise TPPError(
            "a sensitivity needs a target: give the share of the FLOPs or parameters "
            "to remain, as in flops=0.5"
        )


def _measured(
    groups: Groups, sensitivity: Sensitivity, skip: list[str], limits: Limits
) -> list[Group]:
    """Returns the groups that were measured and may lose channels."""
    check_measured(sensitivity, groups)
    asked = ratios_of(groups, 0.5, skip).keys() & set(sensitivity.groups)
    return [g for g in groups if g.name in asked and limits.most(g.size)]


def _check_counts_alone(others: Mapping[str, Any], limits: Limits) -> None:
    """Raises if counts are combined with arguments that they replace."""
    defaults = {"skip": (), "scope": "local", "round_to": 1, "min_channels": 1}
    given = [
        name
        for name, value in {**others, **limits._asdict()}.items()
        if value is not None and value != defaults.get(name) and value not in ("", [])
    ]
    if given:
        raise TPPError(
            f"counts specify how many channels are kept, so {' and '.join(given)} "
            "would be ignored: give one or the other. Groups that counts do not name "
            "are not pruned"
        )


def _check_counts(groups: Groups, counts: Mapping[str, int]) -> None:
    check_mapping("counts", counts, "number of its channels to keep")
    sizes = {g.name: g.size for g in groups if g.reason is None}
    for name, count in counts.items():
        if name not in sizes:
            raise TPPError(
                f"there is no prunable group {name!r}: the prunable groups are "
                f"{', '.join(sizes)}"
            )
        if not is_number(count) or not 1 <= count <= sizes[name] or count % 1:
            raise TPPError(
                f"cannot keep {count} channels of {name}, which has {sizes[name]}"
            )
