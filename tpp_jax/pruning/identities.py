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
    every = [(leaf, step) for step in chain.steps for leaf in step.leaves]
    scaling = dict.fromkeys(leaf for leaf, step in every if step.multiplies)
    adding = dict.fromkeys(leaf for leaf, _ in every if leaf not in scaling)
    values = {name: np.zeros_like(leaves[name]) for name in adding}
    found = yield from _unit(chain, leaves, scaling, values)
    if found is None:
        return f"no values of {some(scaling)} make its factor 1"
    values, unit, rest = found
    values = yield from _adding(chain, values, [*adding], rest, offset)
    if values is None:
        return "it has no parameter that can hold what it adds"
    return Fold(chain, factor / unit, values)


def _affine(chain: Chain, values: Values) -> Solver:
    operands = yield values
    return chain.affine(operands)


def _unit(chain: Chain, leaves: Values, names: Iterable[str], values: Values) -> Solver:
    """Returns values of parameters with which a chain's factor is 1.

    Args:
      chain: Chain.
      leaves: Parameters.
      names: Names of those that the factor is computed from.
      values: Values of the others.

    Returns:
      Values of all parameters, the factor (exactly 1 where possible), and what is
      added; None if no such values were found.
    """
    constants = _constants(chain)
    choices = {name: _units(leaves[name], constants.get(name, ())) for name in names}
    trials = itertools.product(*choices.values())
    for trial in itertools.islice(trials, _MOST_TRIALS):
        tried = values | dict(zip(names, trial, strict=True))
        unit, rest = yield from _affine(chain, tried)
        if (unit == 1).all():
            return tried, unit, rest
    values = values | {name: choice[0] for name, choice in choices.items()}
    for name in names:  # one that the factor is proportional to
        one = np.ones_like(leaves[name])
        once, _ = yield from _affine(chain, values | {name: one})
        twice, _ = yield from _affine(chain, values | {name: 2 * one})
        if (once != 0).all() and (twice == 2 * once).all():
            inverse = _in_leaf(1 / once, one)
            if inverse is not None:
                return (yield from _nearest(chain, values, name, inverse))
    return None


def _nearest(chain: Chain, values: Values, name: str, inverse: np.ndarray) -> Solver:
    """Returns what :func:`_unit` does, with the values around some that are best."""
    best, errors = inverse, None
    for towards in (None, 0, np.inf):
        tried = inverse if towards is None else _next(inverse, towards)
        unit, _ = yield from _affine(chain, values | {name: tried})
        error = _in_leaf(np.abs(unit - 1), inverse)
        if error is None:
            return None
        if errors is not None:
            best = np.where(error < errors, tried, best)
            error = np.minimum(error, errors)
        errors = error
    values = values | {name: best}
    unit, rest = yield from _affine(chain, values)
    if np.abs(unit - 1).max(initial=0) > 4 * jnp.finfo(best.dtype).eps:
        return None
    return values, unit, rest


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
    if leaf.size == 1:
        values = np.unique(values)
    if leaf.size != values.size:
        return None
    return values.reshape(leaf.shape).astype(leaf.dtype)
