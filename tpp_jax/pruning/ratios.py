"""Ratios of groups by patterns over the names of their layers."""

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from tpp_jax.errors import TPPError
from tpp_jax.graph.records import Group, Groups
from tpp_jax.pruning.scoring import check_mapping

Ratios = Mapping[str, float] | str | float


def ratios_of(
    groups: Groups, ratios: Ratios, skip: list[str], *, emptying: bool = False
) -> dict[str, float]:
    """Returns group name → share to prune, for the prunable groups.

    Args:
      groups: All groups of the model.
      ratios: Ratios of :func:`make_plan`.
      skip: Patterns of layers that are not pruned.
      emptying: Whether a ratio of a pattern may be 1. It applies to the groups inside
        what the pattern names: those of that name whose layers all match it or are
        parts of the same module. Groups within the filters of such a group are left
        out.

    Raises:
      TPPError: A ratio is outside [0, 1), or a pattern matches no layer.
    """
    for pattern in skip:
        _check_pattern(groups, pattern, must_prune=False)
    asked: dict[str, float] = {}
    if isinstance(ratios, int | float) or is_number(ratios):
        _check_ratio(ratios, "every group")
        asked = {g.name: ratios for g in groups if g.reason is None and not _own(g)}
    else:
        by_pattern = parse_ratios(ratios, emptying=emptying)
        for pattern, ratio in by_pattern.items():
            _check_pattern(groups, pattern, must_prune=ratio > 0)
            if ratio == 1:
                _check_inside(groups, pattern)
        for group in groups:
            matching = [
                ratio
                for pattern, ratio in by_pattern.items()
                if _matches(pattern, group)
                and (ratio < 1 or (_inside(pattern, group) and not group.chosen))
            ]
            if group.reason is None and matching:
                asked[group.name] = matching[-1]
    for group in groups:
        if any(_matches(pattern, group) for pattern in skip):
            asked.pop(group.name, None)
    emptied = {name for name, ratio in asked.items() if ratio == 1}
    return {
        name: ratio
        for name, ratio in asked.items()
        if emptied.isdisjoint(groups[name].outer)
    }


def _inside(pattern: str, group: Group) -> bool:
    """Reports whether a group lies inside what a pattern names.

    The channels of a residual stream do not: layers of other blocks produce them too.
    """
    module = group.name.rpartition(".")[0]
    return fnmatch.fnmatchcase(group.name, pattern) and all(
        fnmatch.fnmatchcase(name, pattern) or name.rpartition(".")[0] == module
        for name in group.producers
    )


def _check_inside(groups: Groups, pattern: str) -> None:
    matched = [g for g in groups if g.reason is None and _matches(pattern, g)]
    if matched and not any(_inside(pattern, group) for group in matched):
        names = ", ".join(group.name for group in matched[:3])
        raise TPPError(
            f"the pattern {pattern!r} asks to remove all channels, but those that it "
            f"matches ({names}) are produced by layers outside of it too: name a block "
            "that has channels of its own"
        )


def parse_ratios(
    ratios: Mapping[str, float] | str, *, emptying: bool = False
) -> dict[str, float]:
    """Returns ratios as a dict.

    Args:
      ratios: Pattern → share to prune, or ``"pattern:ratio,pattern:ratio"``, the format
        of the original code.
      emptying: Whether a ratio may be 1.

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
        if not (emptying and is_number(ratio) and ratio == 1):
            _check_ratio(ratio, repr(pattern))
    return dict(ratios)


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


def parse_patterns(patterns: Sequence[str] | str) -> list[str]:
    """Returns patterns as a list, from a sequence or a comma-separated string."""
    if isinstance(patterns, str):
        patterns = patterns.split(",")
    return [pattern.strip() for pattern in patterns if pattern.strip()]


def is_number(value: Any) -> TypeGuard[float]:
    """Reports whether a value is a real number, of Python, NumPy or JAX."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    dtype_kind = getattr(getattr(value, "dtype", None), "kind", "")
    return plain or (np.ndim(value) == 0 and dtype_kind in ("i", "u", "f"))


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


def _check_ratio(ratio: float, of: str) -> None:
    if not is_number(ratio) or not 0 <= ratio < 1:
        raise TPPError(
            f"the pruning ratio {ratio} of {of} is not in [0, 1): it is the share of "
            f"filters to remove{_hint(ratio, of)}"
        )


def _hint(ratio: object, of: str) -> str:
    if ratio != 1 or of == "every group":
        return ""
    return "; tpp_jax.make_plan(..., min_channels=0) takes 1, which removes all"


def _own(group: Group) -> bool:
    """Reports whether only a ratio that names it prunes a group."""
    return group.inner or group.chosen > 0


def _matches(pattern: str, group: Group) -> bool:
    names = (group.name,) if _own(group) else (group.name, *group.producers)
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
