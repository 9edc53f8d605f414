"""Values of parameters with which what follows a kernel only adds to its channels.

A batch norm in evaluation mode is (x - mean)·(scale/√(var + epsilon)) + bias. With a
mean of 0, a variance of 1 - epsilon and a scale of 1 it only adds the bias. Which
parameters there are, and how the numbers are computed from them, differs from model to
model: values are tried, and what the model itself computes with them decides.
"""

import dataclasses
import itertools
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tpp_jax.graph.arrays import on_host
from tpp_jax.graph.naming import some
from tpp_jax.pruning.chains import Chain, Number, back, find_chains, shorter
from tpp_jax.pruning.dataflow import Graph, Value

_MOST_TRIALS = 60

Values = dict[str, np.ndarray]
"""Values of parameters by name."""


class Fold(NamedTuple):
    """How a chain is folded into its kernel.

    Attributes:
      chain: Chain; without steps if it cannot be folded, with the reason as its end.
      factor: Factor of the kernel along its channels.
      values: New values of the parameters in the chain.
    """

    chain: Chain
    factor: Number
    values: Values


Solver = Generator[Values, Sequence[Any], Any]
"""Yields values of parameters to try; is sent the operands of a chain's steps."""


def find_folds(graph: Graph, leaves: Mapping[str, Any]) -> list[Fold]:
    """Returns how the chain of each product is folded.

    All chains are solved at the same time, since they have no parameters in common:
    what their steps compute is then one program, which is compiled once.
    """
    folds: dict[Chain, Fold] = {}
    chains = find_chains(graph)
    for chain in chains:
        if not chain.scales:
            folds[chain] = _left(chain, chain.end)
    compute = graph.computing([s.operand for c in chains if c.scales for s in c.steps])
    own = {leaf for c in chains if c.scales for s in c.steps for leaf in s.leaves}
    values = {name: on_host(leaves[name]) for name in sorted(own)}
    solvers = {c: _solution(graph, c, values) for c in chains if c not in folds}
    trials = {chain: next(solver) for chain, solver in solvers.items()}
    while len(folds) < len(chains):
        tried = values | {n: x for trial in trials.values() for n, x in trial.items()}
        operands = iter(compute(tried))
        for chain, solver in solvers.items():
            given = [np.asarray(next(operands)) for _ in chain.steps]
            if chain not in folds:
                try:
                    trials[chain] = solver.send(given)
                except StopIteration as end:
                    folds[chain] = end.value
    return [folds[chain] for chain in chains]


def _left(chain: Chain, reason: str) -> Fold:
    return Fold(dataclasses.replace(chain, steps=(), end=reason), np.ones(()), {})


def _solution(graph: Graph, chain: Chain, leaves: Values) -> Solver:
    """Returns how a chain is folded, as far as its parameters allow."""
    given = yield {}
    reason = chain.end
    while chain.scales:
        found = yield from _fold_all(chain, leaves, *chain.affine(given))
        if isinstance(found, Fold):
            return found._replace(chain=dataclasses.replace(chain, end=reason))
        reason = found
        chain = shorter(graph, chain)
    return _left(chain, reason)


def _fold_all(chain: Chain, leaves: Values, factor: Number, offset: Number) -> Solver:
    """Returns how all steps of a chain are folded, or the reason why they cannot be."""
    if not (np.isfinite(factor).all() and np.isfinite(offset).all()):
        return "it multiplies with a number or adds one that is not finite"
    every = [
        (leaf, step)
        for step in chain.steps
        for leaf in step.leaves
        if jnp.issubdtype(leaves[leaf].dtype, jnp.floating)  # not a count of batches
    ]
    scaling = dict.fromkeys(leaf for leaf, step in every if step.multiplies)
    adding = dict.fromkeys(leaf for leaf, _ in every if leaf not in scaling)
    values = {name: np.zeros_like(leaves[name]) for name in adding}
    values = yield from _ones(chain, leaves, scaling, values)
    if values is None:
        return f"no values of {some(scaling)} were found with which it multiplies by 1"
    unit, rest = yield from _affine(chain, values)
    if not unit.all():
        return "it multiplies by 0"
    values = yield from _adding(chain, values, [*adding], rest, offset)
    if values is None:
        return "it has no parameter that can hold what it adds"
    return Fold(chain, factor / unit, values)


def _affine(chain: Chain, values: Values) -> Solver:
    operands = yield values
    return chain.affine(operands)


def _ones(chain: Chain, leaves: Values, names: Iterable[str], values: Values) -> Solver:
    """Returns values of parameters with which a chain multiplies with 1.

    Args:
      chain: Chain.
      leaves: Parameters.
      names: Names of those that it multiplies with.
      values: Values of the others.

    Returns:
      Values of all parameters, with which every step that multiplies with parameters
      multiplies with exactly 1 where that is possible, otherwise with the next number;
      None if there are no such values.
    """
    constants = _constants(chain)
    choices = {name: _units(leaves[name], constants.get(name, ())) for name in names}
    trials = itertools.product(*choices.values())
    for trial in itertools.islice(trials, _MOST_TRIALS):
        tried = values | dict(zip(names, trial, strict=True))
        operands = yield tried
        if not _others(chain, operands):
            return tried
    values = values | {name: choice[0] for name, choice in choices.items()}
    for i in _others(chain, (yield values)):
        for name in set(names).intersection(chain.steps[i].leaves):
            found = yield from _inverse(i, name, values)
            if found is not None:
                values = found
                break
        else:
            return None
    return values


def _others(chain: Chain, operands: Sequence[Any]) -> list[int]:
    """Returns the steps that multiply with parameters, and not with 1."""
    pairs = enumerate(zip(chain.steps, operands, strict=False))
    return [i for i, (s, x) in pairs if s.scales and not (np.asarray(x) == 1).all()]


def _inverse(i: int, name: str, values: Values) -> Solver:
    """Returns values with which a step multiplies with 1, by a proportional parameter.

    Args:
      i: Number of the step.
      name: Name of the parameter.
      values: Values of all parameters.

    Returns:
      Values of all parameters; None if the step's operand is not proportional to it.
    """
    one = np.ones_like(values[name])
    once = np.asarray((yield values | {name: one})[i])
    twice = np.asarray((yield values | {name: 2 * one})[i])
    if not (once != 0).all() or not (twice == 2 * once).all():
        return None
    inverse = _in_leaf(1 / np.asarray(once, np.float64), one)
    if inverse is None:
        return None
    best, least = inverse, np.full(one.shape, np.inf)
    for tried in (inverse, _next(inverse, 0), _next(inverse, np.inf)):
        operand = np.asarray((yield values | {name: tried})[i], np.float64)
        error = _in_leaf(np.abs(operand - 1), least)
        if error is None:
            return None
        best, least = np.where(error < least, tried, best), np.minimum(error, least)
    near = least.max(initial=0) <= 4 * jnp.finfo(one.dtype).eps
    return values | {name: best} if near else None


def _adding(
    chain: Chain, values: Values, names: Sequence[str], rest: Number, offset: Number
) -> Solver:
    """Returns values of parameters with which a chain adds a given offset.

    Args:
      chain: Chain.
      values: Values of its parameters.
      names: Names of those that only add, which are 0 so far.
      rest: What it adds with these values.
      offset: What it is to add.

    Returns:
      Values of all parameters; None if none of them can be the offset.
    """
    if np.array_equal(rest, offset):
        return values
    for name in reversed(names):
        one = np.ones_like(values[name])
        _, found = yield from _affine(chain, values | {name: one})
        slope = found - rest
        if not np.isfinite(slope).all() or not (slope != 0).all():
            continue
        needed = _in_leaf((offset - rest) / slope, one)
        if needed is not None:
            _, found = yield from _affine(chain, values | {name: needed})
            largest = np.abs(offset).max(initial=0)
            if np.abs(found - offset).max() <= 4 * jnp.finfo(one.dtype).eps * largest:
                return values | {name: needed}
    return None


def _constants(chain: Chain) -> dict[str, list[float]]:
    """Returns the numbers that a chain adds to parameters before it uses them."""
    found: dict[str, list[float]] = {}
    seen: set[Value] = set()
    values = [step.operand for step in chain.steps]
    while values:
        value = values.pop()
        if value in seen or value.maker is None:
            continue
        seen.add(value)
        values += value.maker.operands
        if value.maker.primitive in ("add", "add_any"):
            for one, other in itertools.permutations(value.maker.operands):
                number = back(other)[1].array
                if one.leaves and number is not None and np.size(number) == 1:
                    for leaf in one.leaves:
                        found.setdefault(leaf, []).append(float(np.reshape(number, ())))
    return found


def _units(leaf: np.ndarray, constants: Iterable[float]) -> list[np.ndarray]:
    """Returns values of a parameter with which a factor may be 1."""
    one = np.ones_like(leaf)
    found = []
    for constant in constants:
        rest = one - np.asarray(constant, leaf.dtype)
        found += [rest, _next(rest, 0), _next(rest, 2)]
    return [*found, one, np.zeros_like(leaf)]


def _next(values: np.ndarray, towards: float) -> np.ndarray:
    """Returns the next numbers of the same type."""
    return np.nextafter(values, np.asarray(towards, values.dtype))


def _in_leaf(values: Number, leaf: np.ndarray) -> np.ndarray | None:
    """Returns values of the channels as those of a parameter; None if it has others."""
    if leaf.size != values.size:  # the same along some axes of the channels
        for axis in range(values.ndim):
            first = values.take([0], axis)
            values = first if (values == first).all() else values
    if leaf.size != values.size:
        return None
    return values.reshape(leaf.shape).astype(leaf.dtype)
