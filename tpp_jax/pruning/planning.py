"""From ratios to counts to the kept channels: ``make_plan``."""

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Int

from tpp_jax.errors import TPPError, TPPTypeError
from tpp_jax.graph.naming import longest_known_suffix, named_leaves
from tpp_jax.graph.records import Group, Groups
from tpp_jax.pruning.criteria import (
    CRITERIA,
    REDUCTIONS,
    Criterion,
    Score,
    Scores,
    find_criterion,
    group_scores,
)
from tpp_jax.pruning.cutting import check_plan
from tpp_jax.pruning.moments import Moments
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.targets import (
    Limits,
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
      skip: Patterns of layers that are not pruned, whatever the ratios are.
      criterion: Name in :data:`tpp_jax.pruning.criteria.CRITERIA`, ``"random"``, a
        function from filters ``[n, d]`` (and their statistics ``[n, d]``, if given) to
        scores ``[n]``, or a :class:`~tpp_jax.pruning.criteria.Criterion`. The lowest
        scores are pruned.
      statistics: Pytree with the names of the parameters, from
        :mod:`tpp_jax.pruning.statistics`, for a criterion that needs more than weights;
        the result of :func:`tpp_jax.input_moments` for ``wanda``, ``variance`` and
        ``obs``.
      scores: Group name → the user's own scores, float ``[group.size]``. They replace
        those of the criterion in the groups that they name.
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

    Raises:
      TPPError: A ratio is outside [0, 1); a pattern matches no layer, or only layers
        that cannot be pruned; a target is out of reach; a criterion, scope or reduction
        is unknown; statistics are missing; counts are combined with an argument that
        they replace; scores have the wrong shape or are for an unknown group; or the
        model does not work with the plan.
      TPPTypeError: ``groups`` is not the result of :func:`tpp_jax.channel_groups`.

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
    _check_arguments(groups, ratios, counts, flops, params)
    _check_limits(round_to, min_channels)
    if reduce not in REDUCTIONS:
        raise TPPError(
            f"unknown reduce {reduce!r}: choose one of {', '.join(REDUCTIONS)}"
        )
    limits = Limits(min_channels, round_to)
    asked: dict[str, float] = {}
    pools: list[list[Group]] = []
    if counts is None:
        given = 0.5 if ratios is None else ratios
        asked = _ratios_of(groups, given, parse_patterns(skip))
        matched = [g for g in groups if asked.get(g.name) and limits.most(g.size)]
        pools = pools_of(groups, matched, scope)
    else:
        others = dict(ratios=ratios, flops=flops, params=params, skip=skip, scope=scope)
        _check_counts_alone(others, limits)
        _check_counts(groups, counts)
        matched = [groups[name] for name in counts]
    tree = nnx.state(model) if isinstance(model, nnx.Module) else model
    leaves = _by_parameter(tree, groups)
    ranks = _own_scores(groups, scores or {})
    unscored = [g for g in matched if g.name not in ranks]
    _check_leaves(groups, leaves, unscored)
    if unscored or not ranks:
        scorer = find_criterion(criterion, seed, statistics is not None)
        extra = statistics
        if statistics is not None and not isinstance(statistics, Moments):
            extra = _by_parameter(statistics, groups)
        for group in unscored:
            ranks[group.name] = group_scores(group, leaves, scorer, reduce, extra)
        if scorer.additive and scope != "local":
            saved = saved_by_channels(groups, unscored, flops=flops, params=params)
            ranks |= {name: ranks[name] / share for name, share in saved.items()}
    elif isinstance(criterion, str) and criterion not in (*CRITERIA, "random"):
        find_criterion(criterion, seed)  # not needed, but an unknown name is a mistake
    if counts is None and flops is None and params is None:
        counts = kept_by_ratios(pools, asked, ranks, limits)
    elif counts is None:
        counts = kept_for_target(
            groups,
            pools,
            asked,
            ranks,
            limits,
            flops=flops,
            params=params,
            allow_uncounted=allow_uncounted,
        )
    plan = Plan(_best_channels(groups, counts, ranks), groups)
    if check and groups.source is not None:
        check_plan(plan)
    return plan


def _best_channels(
    groups: Groups, counts: Mapping[str, int], scores: Mapping[str, Scores]
) -> dict[str, Int[np.ndarray, " k"]]:
    """Returns the channels of each prunable group with the highest scores."""
    kept = {}
    for group in groups:
        if group.reason is None:
            n_kept = counts.get(group.name, group.size)
            ranking = scores.get(group.name, np.arange(group.size))
            # Stable sorting breaks ties by index, so that one seed gives one plan.
            order = np.argsort(ranking, kind="stable")
            kept[group.name] = np.sort(order[group.size - n_kept :]).astype(np.int32)
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
    _check_mapping("ratios", ratios, "share of its channels to remove, or one number")
    for pattern, ratio in ratios.items():
        _check_ratio(ratio, repr(pattern))
    return dict(ratios)


def _check_ratio(ratio: float, of: str) -> None:
    if not _is_number(ratio) or not 0 <= ratio < 1:
        raise TPPError(
            f"the pruning ratio {ratio} of {of} is not in [0, 1): it is the share of "
            "filters to remove"
        )


def _is_number(value: Any) -> TypeGuard[float]:
    """Reports whether a value is a real number, of Python, NumPy or JAX."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    dtype_kind = getattr(getattr(value, "dtype", None), "kind", "")
    return plain or (np.ndim(value) == 0 and dtype_kind in ("i", "u", "f"))


def _check_mapping(name: str, value: Any, of: str) -> None:
    if not isinstance(value, Mapping):
        raise TPPError(f"{name} is {value!r}, must be a dict of group → {of}")


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


def _ratios_of(groups: Groups, ratios: Ratios, skip: list[str]) -> dict[str, float]:
    """Returns group name → share to prune, for the prunable groups."""
    for pattern in skip:
        _check_pattern(groups, pattern, must_prune=False)
    asked: dict[str, float] = {}
    if isinstance(ratios, int | float) or _is_number(ratios):
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


def _by_parameter(tree: Any, groups: Groups) -> dict[str, Any]:
    """Returns the leaves of a tree by the names of the parameters that they belong to.

    The names of a Linen module's variables start with the collection's name.
    """
    found: dict[str, Any] = {}
    for name, leaf in named_leaves(tree).items():
        parameter = longest_known_suffix(name, groups.shapes) or name
        # A copy of a parameter in another collection does not replace the parameter.
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
            f"the pattern {pattern!r} matches no layer; layers are, for example, "
            f"{', '.join(near)}"
        )
    if must_prune and all(group.reason for group in matched):
        group = matched[0]
        raise TPPError(
            f"the pattern {pattern!r} asks to prune {group.name}, which cannot be "
            f"pruned: its channels are tied to {group.reason}"
        )


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
    _check_mapping("counts", counts, "number of its channels to keep")
    sizes = {g.name: g.size for g in groups if g.reason is None}
    for name, count in counts.items():
        if name not in sizes:
            raise TPPError(
                f"there is no prunable group {name!r}: the prunable groups are "
                f"{', '.join(sizes)}"
            )
        if not _is_number(count) or not 1 <= count <= sizes[name] or count % 1:
            raise TPPError(
                f"cannot keep {count} channels of {name}, which has {sizes[name]}"
            )


def _own_scores(groups: Groups, scores: Mapping[str, Any]) -> dict[str, Scores]:
    """Returns the user's scores as arrays.

    Raises:
      TPPError: The scores name no group, or are not one number for each of its
        channels.
    """
    found = {}
    _check_mapping("scores", scores, "scores of its channels")
    for name, score in scores.items():
        if name not in {group.name for group in groups}:
            raise TPPError(
                f"scores name {name!r}, which is not a group: the groups are "
                f"{', '.join(group.name for group in groups)}"
            )
        size = groups[name].size
        abstract = isinstance(score, jax.ShapeDtypeStruct)
        array = np.zeros(0) if abstract else np.asarray(score)
        if array.dtype.kind not in "biuf" and not jnp.issubdtype(
            array.dtype, jnp.floating
        ):
            raise TPPError(
                f"the scores of {name} have dtype {array.dtype}: give real numbers"
            )
        if array.shape != (size,):
            raise TPPError(
                f"the scores of {name} have shape {np.shape(score)}, but it has {size} "
                f"channels: give an array of shape ({size},)"
            )
        if np.isnan(array).any():
            raise TPPError(f"the scores of {name} contain nan and cannot be ranked")
        # Half precision and booleans do not sort or compare correctly.
        found[name] = array.astype(np.float64)
    return found


def _check_leaves(
    groups: Groups, leaves: Mapping[str, Any], scored: Sequence[Group]
) -> None:
    needed = {m.leaf for group in scored for m in group.members}
    for name, shape in groups.shapes.items():
        found = np.shape(leaves[name]) if name in leaves else None
        if found != shape and name in groups.members:
            here = "missing" if found is None else f"of shape {found}"
            raise TPPError(
                f"the groups are for another model: there {name} is of shape {shape}, "
                f"here it is {here}"
            )
        if name in needed and isinstance(leaves[name], jax.ShapeDtypeStruct):
            raise TPPError(
                f"{name} is abstract: give the weights, or scores for every group that "
                "is pruned"
            )
