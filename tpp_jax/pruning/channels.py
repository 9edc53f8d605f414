"""The groups of a model, tried: ``channel_groups``.

A jaxpr tells that an axis of 32 was reshaped to (4, 8), but not whether the model would
make it (2, 8) or (4, 4) if 16 were left. So what was read off the computation is tried
on the model itself, abstractly: it is traced once more with half of the channels.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen, nnx

from tpp_jax.pruning.groups import Groups, Supposition, read_groups
from tpp_jax.pruning.modules import arrangement, sliced_module
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.slicing import slice_tree
from tpp_jax.pruning.tracing import is_array, source_line, trace


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
      ValueError: with ``strict``, see there.

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
    reasons = _tried(_Trial(model, params, groups), suppositions)
    if strict and reasons:
        i, reason = min(reasons.items())
        raise ValueError(
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
    )


class _Trial:
    """Traces a model with half of the channels of some groups."""

    def __init__(self, model: Any, params: Any, groups: Groups) -> None:
        self.model, self.params, self.groups = model, params, groups

    def __call__(self, chosen: set[int]) -> str:
        """Returns what goes wrong with half of the chosen groups, ``""`` if nothing."""
        kept = {
            group.name: np.arange(
                (group.size + 1) // 2 if i in chosen else group.size, dtype=np.int32
            )
            for i, group in enumerate(self.groups)
            if group.reason is None
        }
        plan = Plan(kept, self.groups)
        try:
            found = retraced(self.model, plan, self.params)
        except Exception as error:  # whatever the user's code raises of odd shapes
            return str(error).partition("\n")[0] or type(error).__name__
        if not arrangement(found).issuperset(arrangement(self.groups, plan)):
            return "with fewer channels they would be arranged in another way"
        return ""


def retraced(model: Any, plan: Plan, params: Any = None) -> Groups:
    """Returns the groups of the sliced model, from abstract arrays."""

    def abstract(leaf: Any) -> Any:
        shaped = is_array(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if shaped else leaf

    inputs = plan.groups.inputs
    if isinstance(model, nnx.Module):
        graphdef, state = nnx.split(model)
        model = sliced_module(graphdef, jax.tree.map(abstract, state), plan)
        return read_groups(trace(model, *inputs), inputs)[0]
    small = slice_tree(plan, jax.tree.map(abstract, params))
    return read_groups(trace(model, *inputs, params=small, plan=plan), inputs)[0]


def _tried(trial: _Trial, suppositions: list[Supposition]) -> dict[int, str]:
    """Finds the groups whose suppositions do not hold.

    Most often all of them do, which one trial tells. Otherwise groups that rest on the
    same lines of code are tried together, and alone only where they differ.

    Returns:
      Index of a group → why it cannot be pruned.
    """
    suspects = {one.group for one in suppositions}
    if not trial(suspects):
        return {}
    lines: dict[int, dict[tuple[str, int], None]] = {}
    for group, part, source in suppositions:
        lines.setdefault(group, {})[source_line(source), part] = None
    alike: dict[frozenset[tuple[str, int]], list[int]] = {}
    for group, line in lines.items():
        alike.setdefault(frozenset(line), []).append(group)
    wrong: dict[int, str] = {}
    for members in alike.values():
        wrong |= _wrong_among(trial, members)
    while True:
        # What is right for each alone may still not be right for all together.
        error = trial(suspects - wrong.keys())
        if not error:
            break
        wrong |= dict.fromkeys(suspects - wrong.keys(), error)
    return {
        group: f"a size written into the model ({', '.join(_places(lines[group]))}): "
        + error
        for group, error in wrong.items()
    }


def _wrong_among(trial: _Trial, members: list[int]) -> dict[int, str]:
    error = trial(set(members))
    if not error or len(members) == 1:
        return dict.fromkeys(members, error) if error else {}
    first, last = trial({members[0]}), trial({members[-1]})
    if first and last:  # as a number of heads in every block of a transformer
        return dict.fromkeys(members, error)
    return {i: text for i in members if (text := trial({i}))}


def _places(lines: dict[tuple[str, int], None]) -> list[str]:
    """Returns the first two lines, which is enough to find the place."""
    return list(dict.fromkeys(line for line, _ in lines if line))[:2] or ["a library"]
