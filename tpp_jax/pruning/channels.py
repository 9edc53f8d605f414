"""The groups of a model, tried: ``channel_groups``.

A jaxpr tells that an axis of 32 was reshaped to (4, 8), but not whether the model would
make it (2, 8) or (4, 4) if 16 were left. So what was read off the computation is tried
on the model itself, abstractly: it is traced once more with fewer channels.
"""

import collections
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen, nnx

from tpp_jax.errors import TPPError
from tpp_jax.pruning.functions import is_array
from tpp_jax.pruning.groups import Group, Groups, Slot, Supposition, read_groups
from tpp_jax.pruning.modules import arrangement, sliced_call
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.slicing import slice_tree
from tpp_jax.pruning.tracing import Trace, source_line, trace


def channel_groups(
    model: nnx.Module | linen.Module | Callable[..., Any],
    *inputs: Any,
    params: Any = None,
    strict: bool = False,
) -> Groups:
    """Finds the coupled-channel groups of a model.

    Args:
      model: an NNX module (run in evaluation mode, left untouched), a Linen module or a
        function ``fn(params, *inputs)``.
      *inputs: example inputs; arrays or ``jax.ShapeDtypeStruct``, only shapes matter.
        Whatever else is among them (``True``, a string) is handed over as it is.
      params: for a function, its parameter pytree, for a Linen module its variables
        (abstract will do).
      strict: whether to raise where channels meet an operation that is not understood
        or a size that is written into the model, instead of leaving them whole and
        saying why.

    Returns:
      The groups that have a producing layer, in order of execution. Channels that
      cannot be removed (outputs of the model, axes that meet an operation that is not
      understood) are there too, with the reason.

    Raises:
      TPPError: with ``strict``, see there.

    Example:
      >>> import jax.numpy as jnp
      >>> def mlp(p, x):
      ...     return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"]
      >>> p = {"w1": jnp.ones((4, 8)), "b1": jnp.ones(8), "w2": jnp.ones((8, 2))}
      >>> for g in channel_groups(mlp, jnp.ones((1, 4)), params=p):
      ...     print(g.name, g.size, g.reason)
      w1 8 None
      w2 2 an output of the model
    """
    traced = trace(model, *inputs, params=params)
    groups, suppositions = read_groups(traced, inputs, strict)
    if not suppositions:
        return groups
    reasons, joined = _tried(model, params, groups, suppositions)
    if joined:
        groups, suppositions = read_groups(traced, inputs, strict, joined)
        reasons, _ = _tried(model, params, groups, suppositions)
    if strict and reasons:
        i, reason = min(reasons.items())
        raise TPPError(
            f"the channels of {groups[i].name} meet {reason}. Without strict=True they "
            "are left whole"
        )
    return Groups(
        tuple(
            group._replace(reason=reasons.get(i, group.reason))
            for i, group in enumerate(groups)
        ),
        groups.layers,
        groups.shapes,
        groups.inputs,
        groups.traced,
        groups.joined,
    )


class _Trial:
    """Traces a model with fewer channels of some groups.

    Attributes:
      fewer: index of a group → how many channels it has then.
      refuted: groups that were told their old size in the last trial, where they had
        fewer channels: an operation that is supposed to be told their number was told
        what it was before.
    """

    def __init__(
        self, model: Any, params: Any, groups: Groups, suppositions: list[Supposition]
    ) -> None:
        self.model, self.params, self.groups = model, params, groups
        self.suppositions = suppositions
        self.fewer: dict[int, int] = {}
        self.refuted: set[int] = set()

    def __call__(self, chosen: Iterable[int]) -> str:
        """Returns what goes wrong with fewer of the chosen ones, ``""`` if nothing."""
        sizes = {i: self.fewer[i] for i in chosen}
        kept = {
            group.name: np.arange(sizes.get(i, group.size), dtype=np.int32)
            for i, group in enumerate(self.groups)
            if group.reason is None
        }
        plan = Plan(kept, self.groups)
        self.refuted = set()
        try:
            traced = _trace_sliced(self.model, plan, self.params)
            self.refuted = self._told_their_old_size(traced, sizes)
            found = None if self.refuted else _read(traced, plan)
        except Exception as error:  # whatever the user's code raises of odd shapes
            return str(error).partition("\n")[0] or type(error).__name__
        if found and arrangement(found).issuperset(arrangement(self.groups, plan)):
            return ""
        return "with fewer channels they would be arranged in another way"

    def _told_their_old_size(
        self, traced: Trace, chosen: Mapping[int, int]
    ) -> set[int]:
        old, new = self.groups.traced.shapes, traced.shapes
        if len(new) != len(old):
            return set()
        return {
            one.group
            for one in self.suppositions
            if one.told is not None
            and chosen.get(one.group, math.inf) < self.groups[one.group].size
            and new[one.told[0]][one.told[1]] == old[one.told[0]][one.told[1]]
        }


def retraced(model: Any, plan: Plan, params: Any = None) -> Groups:
    """Returns the groups of the sliced model, from abstract arrays."""
    return _read(_trace_sliced(model, plan, params), plan)


def _read(traced: Trace, plan: Plan) -> Groups:
    inputs, joined = plan.groups.inputs, plan.groups.joined
    return read_groups(traced, inputs, joined=joined, unpruned=plan.groups)[0]


def _trace_sliced(model: Any, plan: Plan, params: Any) -> Trace:
    def abstract(leaf: Any) -> Any:
        shaped = is_array(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if shaped else leaf

    if isinstance(model, nnx.Module):
        graphdef, params = nnx.split(model)
        model = sliced_call(graphdef, plan)
    small = slice_tree(plan, jax.tree.map(abstract, params))
    return trace(model, *plan.groups.inputs, params=small, plan=plan)


def _tried(
    model: Any, params: Any, groups: Groups, suppositions: list[Supposition]
) -> tuple[dict[int, str], tuple[tuple[Slot, Slot], ...]]:
    """Finds the groups whose suppositions do not hold.

    Groups that rest on the same lines of code are of one *kind*. Each kind loses
    another number of channels, lest two that are wrong make up for each other.

    Returns:
      Index of a group → why it cannot be pruned; or pairs of axes that can be pruned,
      but only together.
    """
    trial = _Trial(model, params, groups, suppositions)
    lines: dict[int, dict[tuple[str, int], None]] = {}
    for group, part, source, _ in suppositions:
        lines.setdefault(group, {})[source_line(source), part] = None
    by_lines: dict[frozenset[tuple[str, int]], list[int]] = {}
    for group, line in lines.items():
        by_lines.setdefault(frozenset(line), []).append(group)
    # What is written into a model most often is the size of a head.
    kinds = sorted(by_lines.values(), key=lambda kind: not groups[kind[0]].inner)
    met: collections.Counter[int] = collections.Counter()
    for kind in kinds:
        sizes = {groups[i].size for i in kind}
        for i in kind:
            size = groups[i].size
            trial.fewer[i] = max(size - max(size // 2 - met[size], 1), 1)
        met.update(sizes)
    suspects = set(lines)
    error = trial(suspects)
    if not error:
        return {}, ()
    # Most often the sizes themselves tell what is wrong: that of heads is the old one.
    refuted = trial.refuted
    if refuted and not trial(suspects - refuted):
        return _explained(dict.fromkeys(refuted, error), lines), ()
    wrong: dict[int, str] = {}
    one_kind = next((k for k in kinds if not trial(suspects.difference(k))), None)
    if one_kind is not None:
        # The others hold, so this kind does not: all of it, if the first does not.
        wrong = _wrong_among(trial, one_kind, error, one_kind[:1])
    else:
        errors = [trial(kind) for kind in kinds]
        failed = [(k, error) for k, error in zip(kinds, errors, strict=True) if error]
        joined = _only_together(trial, [kind for kind, _ in failed])
        if joined:
            return {}, joined
        for kind, error in failed:
            wrong |= _wrong_among(trial, kind, error, [kind[0], kind[-1]])
    rest = suspects - wrong.keys()
    if one_kind is None and (error := trial(rest)):
        # What is right for each kind alone is not right for all together.
        wrong |= dict.fromkeys(rest, error)
    return _explained(wrong, lines), ()


def _explained(
    wrong: dict[int, str], lines: dict[int, dict[tuple[str, int], None]]
) -> dict[int, str]:
    return {
        group: f"a size written into the model ({', '.join(_places(lines[group]))}): "
        + error
        for group, error in wrong.items()
    }


def _only_together(
    trial: _Trial, failed: list[list[int]]
) -> tuple[tuple[Slot, Slot], ...]:
    """Pairs groups of two kinds that are wrong alone and right together.

    The dimensions of queries and of values are such, for a function of attention that
    refuses to run unless there are as many of both.
    """
    for kind, other in itertools.combinations(failed, 2):
        sizes = [[trial.groups[i].size for i in members] for members in (kind, other)]
        if sizes[0] != sizes[1]:
            continue
        before = dict(trial.fewer)
        trial.fewer |= {j: before[i] for i, j in zip(kind, other, strict=True)}
        error = trial([*kind, *other])
        trial.fewer = before
        slots = [
            (_own_slot(trial.groups[i]), _own_slot(trial.groups[j]))
            for i, j in zip(kind, other, strict=True)
        ]
        if not error and all(None not in pair for pair in slots):
            return tuple(slots)
    return ()


def _own_slot(group: Group) -> Slot | None:
    """Returns an axis that is made of the group's channels and nothing else."""
    for member in group.members:
        if member.role == "produced" and member.positions.shape[1] == 1:
            return member.leaf, member.axis
    return None


def _wrong_among(
    trial: _Trial, kind: list[int], error: str, samples: list[int]
) -> dict[int, str]:
    """Returns those of a kind that do not hold, and why; together they do not.

    If none of the samples holds, most likely none of them does: a size of heads that is
    written into every block of a transformer.
    """
    if len(kind) > 1 and not all(trial([i]) for i in samples):
        return {i: text for i in kind if (text := trial([i]))}
    return dict.fromkeys(kind, error)


def _places(lines: dict[tuple[str, int], None]) -> list[str]:
    """Returns the first two lines, which is enough to find the place."""
    return list(dict.fromkeys(line for line, _ in lines if line))[:2] or ["a library"]
