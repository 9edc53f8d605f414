"""Which blocks of a network do least: ``depth_scores`` and ``least_blocks``.

A block is removed by a plan that keeps no channel of the groups inside it, so that what
it adds to the residual stream is empty. Its score is the change that it makes to the
stream, or what a loss gains without it.
"""

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jaxtyping import Array, Float

from tpp_jax.errors import TPPError, TPPTypeError
from tpp_jax.graph.functions import as_function
from tpp_jax.graph.records import Groups
from tpp_jax.graph.unfolding import check_length
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.planning import best_channels
from tpp_jax.pruning.ratios import parse_patterns, ratios_of
from tpp_jax.pruning.replay import evaluate, replay
from tpp_jax.pruning.sensitivity import all_kept_masks, masks_of, mean_loss, with_loss


def depth_scores(
    model: nnx.Module | linen.Module | Callable[..., Any],
    groups: Groups,
    batches: Iterable[Any],
    blocks: Sequence[str] | str = "layers.{}.*",
    *,
    loss: Callable[[Any, Any], Float[Array, ""]] | None = None,
    params: Any = None,
) -> dict[str, float]:
    """Measures how much each block of a network does.

    Without a loss it is the change of the residual stream ("block influence"): the mean
    over positions of 1 - cos(x, x + f(x)), where x is the stream and f the block. The
    place where f(x) is added to x is found in the computation. With a loss it is the
    increase of the loss without the block, each block removed alone.

    Args:
      model: Model that the groups were found with: NNX module (runs in evaluation mode,
        not modified), Linen module or function ``fn(params, *inputs)``.
      groups: Groups from :func:`tpp_jax.channel_groups`.
      batches: Batches of equal size: inputs of the model, a tuple if it takes several;
        with a loss, in the form that the loss takes.
      blocks: Patterns of the blocks, in which ``{}`` stands for every number that
        occurs: ``"layers.{}.*"``, or ``["layers.{}.self_attn.*", "layers.{}.mlp.*"]``
        for the sublayers.
      loss: Function ``loss(model, batch)``, as for :func:`tpp_jax.sensitivity`; None
        for the change of the stream.
      params: Variables of a Linen module, or parameter pytree of a function.

    Returns:
      Pattern of each block → its score, for :func:`least_blocks`.

    Raises:
      TPPError: A pattern matches nothing that can be removed; there is no batch; or a
        block adds nothing to a stream that it reads, and there is no loss.
      TPPTypeError: ``groups`` is not the result of :func:`tpp_jax.channel_groups`.

    References:
      Men et al. 2024, "ShortGPT: Layers in large language models are more redundant
      than you expect", section 3.2.

    Example:
      >>> import tpp_jax as tpp
      >>> def net(p, x):
      ...     for block in p["layers"]:
      ...         x = x + jax.nn.relu(x @ block["up"]) @ block["down"]
      ...     return x
      >>> weights = [jnp.ones((2, 3)), 1e-3 * jnp.ones((2, 3))]
      >>> p = {"layers": [{"up": w, "down": jnp.eye(3, 2)} for w in weights]}
      >>> x = jnp.array([[1.0, 0.0]])
      >>> groups = tpp.channel_groups(net, x, params=p)
      >>> scores = depth_scores(net, groups, [x], "layers.{}.*", params=p)
      >>> least_blocks(scores, 1)
      {'layers.1.*': 1}
    """
    if not isinstance(groups, Groups):
        raise TPPTypeError(
            f"the groups are a {type(groups).__name__}: pass the result of "
            "tpp_jax.channel_groups(...) after the model"
        )
    inside = {
        block: tuple(ratios_of(groups, {block: 1}, [], emptying=True))
        for block in _numbered(groups, parse_patterns(blocks))
    }
    given = list(batches)
    if not given:
        raise TPPError("there is no batch to measure the blocks on")
    if loss is not None:
        return _by_loss(model, groups, given, inside, loss, params)
    function = as_function(model, params)
    measure = jax.jit(
        functools.partial(_changes, function.call, function.names, groups, inside)
    )
    runs = (batch if isinstance(batch, tuple) else (batch,) for batch in given)
    changes = [measure(function.params, inputs) for inputs in runs]
    means = np.asarray(jax.device_get(changes), np.float64).mean(axis=0)
    return dict(zip(inside, means.tolist(), strict=True))


def least_blocks(scores: Mapping[str, float], number: int) -> dict[str, int]:
    """Returns the blocks with the lowest scores, as ratios of :func:`make_plan`.

    Args:
      scores: Result of :func:`depth_scores`, or of a measure of the user's own.
      number: Number of blocks to remove.

    Returns:
      Pattern of each block → 1, to be merged with other ratios and passed with
      ``min_channels=0``; the patterns of blocks must come last.

    Raises:
      TPPError: There are fewer blocks.

    Example:
      >>> least_blocks({"layers.0.*": 0.4, "layers.1.*": 0.1, "layers.2.*": 0.2}, 2)
      {'layers.1.*': 1, 'layers.2.*': 1}
    """
    if not 0 <= number <= len(scores):
        raise TPPError(
            f"cannot remove {number} of {len(scores)} blocks: choose a number between "
            f"0 and {len(scores)}"
        )
    lowest = sorted(scores, key=lambda block: scores[block])[:number]
    return {block: 1 for block in scores if block in lowest}


def _numbered(groups: Groups, patterns: Sequence[str]) -> list[str]:
    """Returns the patterns with ``{}`` replaced by each number that occurs."""
    names = [name for group in groups for name in (group.name, *group.producers)]
    found: dict[str, None] = {}
    for pattern in patterns:
        if "{}" not in pattern:
            found[pattern] = None
            continue
        sign = "NUMBER"
        text = fnmatch.translate(pattern.replace("{}", sign))
        regex = re.compile(text.replace(sign, r"(\d+)"))
        matches = [match for name in names if (match := regex.match(name))]
        numbers = sorted({tuple(map(int, match.groups())) for match in matches})
        if not numbers:
            raise TPPError(
                f"the pattern {pattern!r} of blocks matches no layer; groups are, for "
                f"example, {', '.join(dict.fromkeys(names[:5]))}"
            )
        found |= dict.fromkeys(pattern.format(*n) for n in numbers)
    return list(found)


def _by_loss(
    model: Any,
    groups: Groups,
    batches: Sequence[Any],
    inside: Mapping[str, Sequence[str]],
    loss: Callable[[Any, Any], Any],
    params: Any,
) -> dict[str, float]:
    """Returns what the loss gains without each block."""
    function, run = with_loss(model, params, loss)
    leaves = dict(zip(function.names, jax.tree.leaves(function.params), strict=True))
    loss_of = mean_loss(function, run, batches)
    names = dict.fromkeys(name for own in inside.values() for name in own)
    kept = all_kept_masks(groups, [groups[name] for name in names])
    baseline, scores = loss_of(leaves, kept), {}
    for block, own in inside.items():
        plan = Plan(best_channels(groups, dict.fromkeys(own, 0), {}), groups)
        scores[block] = loss_of(leaves, masks_of(plan, kept)) - baseline
    return scores


class _Value(NamedTuple):
    """An array, and what it is computed from.

    Attributes:
      array: Value of the array.
      groups: Names of the groups whose channels it depends on.
      before: Values that it depends on and itself, as a set of bits.
      varies: Whether it depends on an input.
    """

    array: Any
    groups: frozenset[str]
    before: int
    varies: bool


class _Sum(NamedTuple):
    """The place where what a group does is added to the stream."""

    order: int
    stream: Any
    result: Any


class _Streams:
    """Runs a jaxpr, and finds where groups add to a stream that they read.

    Attributes:
      found: Group name → the first such place.
      nearly: Group name → the first place where they add to anything that depends on
        the inputs, such as a shortcut that is computed too.
    """

    def __init__(self) -> None:
        self.found: dict[str, _Sum] = {}
        self.nearly: dict[str, _Sum] = {}
        self._values = 0

    def value(
        self, array: Any, groups: frozenset[str] = frozenset(), varies: bool = False
    ) -> _Value:
        """Returns a value that is computed from no other."""
        self._values += 1
        return _Value(array, groups, 1 << self._values, varies)

    def step(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        """Returns the results of an equation."""
        results = evaluate(eqn, [value.array for value in values])
        groups = frozenset().union(*(value.groups for value in values))
        if eqn.primitive.name in ("add", "add_any"):
            for one, other in (values, values[::-1]):
                new = one.groups - other.groups - self.found.keys()
                if not new or not other.varies:
                    continue
                place = dict.fromkeys(new, _Sum(self._values, other.array, results[0]))
                self.nearly = place | self.nearly
                # A bit of its own is the highest of what a value depends on.
                if _own(other) & one.before:
                    self.found |= place
        groups -= self.found.keys()
        before = functools.reduce(lambda a, b: a | b.before, values, 0)
        varies = any(value.varies for value in values)
        made = []
        for result in results:
            self._values += 1
            made.append(_Value(result, groups, before | 1 << self._values, varies))
        return made


def _own(value: _Value) -> int:
    return 1 << value.before.bit_length() - 1


def _changes(
    call: Callable[..., Any],
    names: Sequence[str],
    groups: Groups,
    inside: Mapping[str, Sequence[str]],
    params: Any,
    inputs: tuple[Any, ...],
) -> Float[Array, " blocks"]:
    """Returns the change that each block makes to the stream."""
    closed = jax.make_jaxpr(call)(params, *inputs)
    check_length(closed.jaxpr)
    of_leaf: dict[str, set[str]] = {}
    for name in (name for own in inside.values() for name in own):
        for member in groups[name].members:
            if member.role == "produced":
                of_leaf.setdefault(member.leaf, set()).add(name)
    streams = _Streams()
    leaves = zip(names, jax.tree.leaves(params), strict=True)
    arguments = [
        streams.value(leaf, frozenset(of_leaf.get(name, ()))) for name, leaf in leaves
    ]
    arguments += [streams.value(x, varies=True) for x in jax.tree.leaves(inputs)]
    replay(closed.jaxpr, closed.consts, arguments, streams.value, streams.step)
    changes, found = [], streams.nearly | streams.found
    for block, own in inside.items():
        places = [found[name] for name in own if name in found]
        if not places:
            raise TPPError(
                f"what {block!r} computes is not added to a stream that it reads, or "
                "is in a loop: there is no change to measure. Pass loss=, which is "
                "measured without each block"
            )
        first = min(places, key=lambda place: place.order)
        last = max(places, key=lambda place: place.order)
        changes.append(_angle(first.stream, last.result))
    return jnp.stack(changes)


def _angle(before: Array, after: Array) -> Float[Array, ""]:
    """Returns the mean of 1 - cos between two streams, along their last axis."""
    x, y = (array.astype(jnp.float32) for array in (before, after))
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    cosine = jnp.sum(x * y, axis=-1) / jnp.maximum(norms, 1e-30)
    return jnp.mean(1 - jnp.where(norms > 0, cosine, 1))
