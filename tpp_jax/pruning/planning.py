"""From ratios to counts to the kept channels: ``make_plan``."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Int

from tpp_jax.errors import TPPError, TPPTypeError
from tpp_jax.graph.records import Group, Groups
from tpp_jax.pruning.criteria import Criterion, Score, Scores, is_additive
from tpp_jax.pruning.curves import Sensitivity, check_measured
from tpp_jax.pruning.cutting import check_plan
from tpp_jax.pruning.multiples import multiples_of
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.ratios import Ratios, is_number, parse_patterns, ratios_of
from tpp_jax.pruning.scoring import channel_scores, check_mapping
from tpp_jax.pruning.targets import (
    Limits,
    Target,
    cached_layers,
    groups_of_outputs,
    kept_by_costs,
    kept_by_ratios,
    kept_for_target,
    pools_of,
    saved_by_channels,
)
from tpp_jax.pruning.times import LatencyTable, check_table


def make_plan(
    groups: Groups,
    model: nnx.Module | Any,
    ratios: Ratios | None = None,
    *,
    counts: Mapping[str, int] | None = None,
    flops: float | None = None,
    params: float | None = None,
    kv_cache: float | None = None,
    cached: Sequence[str] | str = ("*.k_proj", "*.v_proj"),
    latency: float | None = None,
    memory: float | None = None,
    table: LatencyTable | None = None,
    sensitivity: Sensitivity | None = None,
    skip: Sequence[str] | str = (),
    criterion: str | Criterion | Score = "l1",
    statistics: Any = None,
    scores: Mapping[str, ArrayLike] | None = None,
    scope: str = "local",
    reduce: str = "mean",
    seed: int = 0,
    round_to: int | Literal["sharding", "fast"] = 1,
    min_channels: int = 1,
    allow_uncounted: bool = False,
    check: bool = True,
) -> Plan:
    """Chooses the channels to prune.

    Ratios determine how many channels are pruned, or a target that the ratios are
    solved for.

    Args:
      groups: Groups from :func:`tpp_jax.channel_groups`.
      model: Model with its weights, or parameter pytree; abstract if ``scores`` are
        given for every group that is pruned.
      ratios: Share of the channels to prune, in [0, 1): one number for every group that
        can be pruned and is not inner (the dimensions within heads, if the heads can
        be pruned) or chosen among (:attr:`Group.chosen`), or pattern → share, as a dict
        or as a string in the format of the original code,
        ``"*layer*.conv1:0.9,*layer3*:0.5"``. Patterns are ``fnmatch``
        globs over layer names; the last match wins, no match means 0. A group is
        matched by any layer that produces it; an inner group (``layer#2``), and one
        that is chosen among, by its own name only.
      counts: Group name → number of channels to keep, in place of ratios, targets,
        ``skip``, ``scope`` and limits.
      flops: Target share of the model's FLOPs to *keep*, in (0, 1]. Ratios are then
        relative: all are scaled by one number, as large as necessary. Without ratios,
        all groups that a single number would prune have equal ones.
      params: Target share of the model's parameters to *keep*, in (0, 1]. If several
        targets are given, all are met.
      kv_cache: Target share of the key-value cache to *keep* for each token, in (0, 1].
        If it is the only target and there are no ratios, only groups that run through
        keys or values are pruned.
      cached: Patterns of the layers that make keys and values.
      latency: Target share of the time of a call to *keep*, in (0, 1], as predicted by
        ``table``. A narrower network may be slower: of the plans along the way, the
        first one that meets the target is looked for.
      memory: Target share of the peak memory of the activations to *keep*, in (0, 1]
        (:func:`tpp_jax.pruning.memory.activation_bytes`), for the inputs that the
        groups were found with.
      table: Result of :func:`tpp_jax.latency_table`, for ``latency`` and
        ``round_to="fast"``.
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
        ``"sharding"``: for each group the number that leaves its arrays divided over
        the axes of a mesh as they are. With other numbers, a cut array is replicated
        along axes of the mesh that do not divide it any more. ``"fast"``: each group
        keeps the next larger number that is worthwhile on the machine of ``table``
        (:meth:`LatencyTable.fast_widths`).
      min_channels: Smallest number of channels that a group keeps. 0 permits patterns
        with a ratio of 1: ``{"layers.3.*": 1}`` removes all channels of the groups that
        are produced nowhere else, so that the block contributes nothing or a bias.
        Such a ratio is not scaled by a target. All other groups keep at least 1.
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
        an argument that they replace; the sensitivity or the table is that of other
        groups; a table is missing or not used; scores have the wrong shape or are for
        an unknown group; or the model does not work with the plan.
      TPPTypeError: ``groups`` is not the result of :func:`tpp_jax.channel_groups`,
        ``sensitivity`` not that of :func:`tpp_jax.sensitivity`, or ``table`` not that
        of :func:`tpp_jax.latency_table`.

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
    wanted = {"params": params, "flops": flops, "kv_cache": kv_cache}
    wanted |= {"latency": latency, "memory": memory}
    if sensitivity is not None:
        _check_sensitivity_alone(ratios, counts, scope, wanted)
    _check_arguments(groups, ratios, counts, wanted)
    _check_limits(round_to, min_channels)
    _check_table(groups, table, latency, round_to)
    limits = Limits(max(min_channels, 1), 1 if isinstance(round_to, str) else round_to)
    layers = [] if kv_cache is None else cached_layers(groups, parse_patterns(cached))
    asked: dict[str, float] = {}
    if sensitivity is not None:
        matched = _measured(groups, sensitivity, parse_patterns(skip), limits)
    elif counts is None:
        emptying = min_channels == 0
        given = 0.5 if ratios is None else ratios
        asked = ratios_of(groups, given, parse_patterns(skip), emptying=emptying)
        if ratios is None and [n for n, x in wanted.items() if x] == ["kv_cache"]:
            through = groups_of_outputs(groups, layers)
            asked = {name: r for name, r in asked.items() if name in through}
        matched = [g for g in groups if 0 < asked.get(g.name, 0) < 1 and limits.most(g)]
    else:
        limited = {"round_to": round_to, "min_channels": min_channels}
        others = dict(ratios=ratios, skip=skip, scope=scope, **wanted, **limited)
        _check_counts_alone(others)
        _check_counts(groups, counts)
        matched = [groups[name] for name in counts]
    rounding = _rounding(groups, matched, model, round_to, table)
    limits = limits._replace(round_to=rounding)
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
    if counts is None:
        if scope != "local" and is_additive(criterion):
            others = [g for g in matched if g.name not in (scores or {})]
            saved = saved_by_channels(groups, others, wanted, layers, table)
            # What a channel costs in each layer of a loop is paid in all of them.
            shares = {g.name: saved.get(g.name, 1) / (g.steps or 1) for g in others}
            ranks |= {name: ranks[name] / share for name, share in shares.items()}
        emptied = [name for name, ratio in asked.items() if ratio == 1]
        target = None
        if _any(wanted):
            target = Target(groups, wanted, layers, emptied, allow_uncounted, table)
        pools = pools_of(groups, matched, scope)
        if target is None:
            counts = kept_by_ratios(pools, asked, ranks, limits)
        elif sensitivity is None:
            counts = kept_for_target(target, pools, asked, ranks, limits)
        else:
            curves = {g.name: sensitivity.curve(g.name) for g in matched}
            counts = kept_by_costs(target, matched, curves, limits)
        counts |= dict.fromkeys(emptied, 0)
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
            if n_kept in (0, group.size):  # the same in all layers of a loop
                ranking = np.arange(group.size)
            # Stable sorting breaks ties by index, so that one seed gives one plan.
            order = np.argsort(ranking, axis=-1, kind="stable")
            best = order[..., group.size - n_kept :]
            kept[group.name] = np.sort(best, axis=-1).astype(np.int32)
    return kept


def _check_arguments(
    groups: Groups,
    ratios: Ratios | None,
    counts: Mapping[str, int] | None,
    wanted: Mapping[str, float | None],
) -> None:
    if not isinstance(groups, Groups):
        raise TPPTypeError(
            f"the groups are a {type(groups).__name__}: pass the result of "
            "tpp_jax.channel_groups(...) first, and then the model"
        )
    for name, share in wanted.items():
        if share is not None and not 0 < share <= 1:
            raise TPPError(
                f"the target {name}={share} is not in (0, 1]: it is the share of the "
                f"model's {name} that is to remain"
            )
    if ratios is None and counts is None and not _any(wanted):
        raise TPPError(
            "the amount to prune is missing: give ratios, or the share of the FLOPs or "
            "parameters to remain, as in flops=0.5"
        )


def _check_limits(round_to: int | str, min_channels: int) -> None:
    if isinstance(round_to, str):
        if round_to not in ("sharding", "fast"):
            raise TPPError(
                f"round_to is {round_to!r}: give a number, or 'sharding' for what the "
                "mesh of the model's arrays divides, or 'fast' for what a latency "
                "table shows to be worthwhile"
            )
    elif round_to < 1:
        raise TPPError(f"round_to is {round_to}, must be at least 1")
    if min_channels < 0:
        raise TPPError(f"min_channels is {min_channels}, must be at least 0")


def _check_table(
    groups: Groups,
    table: LatencyTable | None,
    latency: float | None,
    round_to: int | str,
) -> None:
    """Raises if a table is missing, is that of other groups, or would be ignored."""
    uses = [f"latency={latency}"] if latency is not None else []
    uses += ["round_to='fast'"] if round_to == "fast" else []
    if table is not None:
        check_table(table, groups)
        if not uses:
            raise TPPError(
                "a latency table is used by the target latency=… and by "
                "round_to='fast', and neither is given"
            )
    elif uses:
        raise TPPError(
            f"{' and '.join(uses)} needs the times of this machine: pass table=, the "
            "result of tpp_jax.latency_table(model, inputs, groups)"
        )


def _rounding(
    groups: Groups,
    matched: Sequence[Group],
    model: nnx.Module | Any,
    round_to: int | str,
    table: LatencyTable | None,
) -> int | Mapping[str, int | Sequence[int]]:
    """Returns what numbers of kept channels are rounded up to; see :class:`Limits`."""
    if round_to == "fast" and table is not None:
        return {group.name: table.fast_widths(group.name) for group in matched}
    if isinstance(round_to, str):
        return multiples_of(groups, matched, model)
    return round_to


def _any(wanted: Mapping[str, float | None]) -> bool:
    return any(share is not None for share in wanted.values())


def _check_sensitivity_alone(
    ratios: Ratios | None,
    counts: Mapping[str, int] | None,
    scope: str,
    wanted: Mapping[str, float | None],
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
    if not _any(wanted):
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
    return [g for g in groups if g.name in asked and limits.most(g)]


def _check_counts_alone(others: Mapping[str, Any]) -> None:
    """Raises if counts are combined with arguments that they replace."""
    defaults = {"skip": (), "scope": "local", "round_to": 1, "min_channels": 1}
    given = [
        name
        for name, value in others.items()
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
        if not is_number(count) or not 0 <= count <= sizes[name] or count % 1:
            raise TPPError(
                f"cannot keep {count} channels of {name}, which has {sizes[name]}"
            )
        if count < (chosen := groups[name].chosen):
            raise TPPError(
                f"cannot keep {count} channels of {name}, of which the model chooses "
                f"{chosen} for each example"
            )
