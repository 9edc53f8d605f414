"""Runs that advance together: equal steps of several become one program.

A run does not call its training steps: it is a generator that asks for them, and is
sent what they give. So a single run and several go the same way, and what is not a step
(the plan, the cut, checkpoints, evaluations) each does by itself.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpp_jax.training.step import TrainState

Kept = dict[str, Any]
Result = tuple[TrainState, dict[str, Any]]


class Ask(NamedTuple):
    """What a run asks for: some steps from here on.

    Attributes:
      steps: the program of this run alone; called with ``arguments``.
      arguments: ``(state, key, n, *data)``, see
        :func:`tpp_jax.training.step.make_train_steps`.
      likeness: equal for runs whose steps differ in ``arguments`` and plan only; None
        for one that goes alone.
      steps_of: kept indices → steps for one device, to be traced with any of their
        counts.
      compile: makes a program of a function for one device, given the index of the
        argument to donate.
      unroll: whether a program of several runs has their steps one after the other, and
        not as one of batched operations, which are slow on the CPU.
      kept: the indices that its plan keeps, by group.
      left: steps of the whole run that are still to be done.
    """

    steps: Callable[..., Result]
    arguments: tuple[Any, ...]
    likeness: Any
    steps_of: Callable[[Kept], Callable[..., Result]]
    compile: Callable[..., Callable[..., Any]]
    unroll: bool
    kept: Kept
    left: int


Work = Generator[Ask, Result, Any]


def drive(works: Sequence[Work]) -> list[Any]:
    """Carries runs to their ends.

    Those with the most steps left go first, so that runs that were resumed at different
    steps meet, and those of different methods in the phases that they end with.

    Args:
      works: the runs, not begun.

    Returns:
      What each returned, or the exception that ended it.
    """
    asked: dict[int, Ask] = {}
    ends: dict[int, Any] = {}

    def go_on(i: int, resume: Callable[[], Ask]) -> None:
        asked.pop(i, None)
        try:
            asked[i] = resume()
        except StopIteration as end:
            ends[i] = end.value
        except (Exception, SystemExit) as error:  # the others may still go on
            ends[i] = error

    programs = _Programs()
    try:
        for i, work in enumerate(works):
            go_on(i, lambda work=work: next(work))
        while asked:
            first = max(asked.values(), key=lambda ask: ask.left)
            group = [i for i, ask in asked.items() if _go_together(ask, first)]
            try:
                results = programs([asked[i] for i in group], asked.values())
            except Exception as error:  # each run knows what to make of it
                for i in group:
                    go_on(i, lambda i=i, error=error: works[i].throw(error))
                continue
            for i, result in zip(group, results, strict=True):
                go_on(i, lambda i=i, result=result: works[i].send(result))
    finally:
        for work in works:
            work.close()
    return [ends[i] for i in range(len(works))]


def _go_together(ask: Ask, other: Ask) -> bool:
    if ask is other:
        return True
    alike = ask.likeness is not None and ask.likeness == other.likeness
    return alike and _shapes(ask) == _shapes(other)


def _shapes(ask: Ask) -> Any:
    _, _, n, *_ = ask.arguments
    leaves, structure = jax.tree.flatten((ask.kept, ask.arguments))
    return int(n), structure, [(np.shape(x), x.dtype) for x in leaves]


class _Programs:
    """Programs of groups of runs, each as long as the group may ask for it again."""

    def __init__(self) -> None:
        self._programs: dict[tuple[Any, ...], Any] = {}

    def __call__(self, asks: Sequence[Ask], of_all: Iterable[Ask]) -> list[Result]:
        if len(asks) == 1:
            return [asks[0].steps(*asks[0].arguments)]
        current = {ask.steps for ask in of_all}
        for key in [key for key in self._programs if not current.issuperset(key)]:
            del self._programs[key]
        key = tuple(ask.steps for ask in asks)
        if key not in self._programs:
            self._programs[key] = asks[0].compile(
                together(asks[0].steps_of, asks[0].unroll), donate=1
            )
        states, keys, counts, orders, images = zip(
            *(ask.arguments for ask in asks), strict=True
        )
        kept = tuple(ask.kept for ask in asks)
        # They count alike, and their images are the same.
        program = self._programs[key]
        return list(program(kept, states, keys, counts[0], orders, images[0]))


def together(
    steps_of: Callable[[Kept], Callable[..., Result]], unroll: bool
) -> Callable[..., tuple[Result, ...]]:
    """Makes the steps of several replicas one function for a device.

    Args:
      steps_of: kept indices → steps.
      unroll: whether the replicas follow each other, or all operations run along a new
        leading axis.

    Returns:
      ``fn(kept, states, keys, n, orders, images) -> results``, each a tuple with an
      entry for a replica; ``n`` and ``images`` are common to all.
    """

    def fn(
        kept: tuple[Kept, ...],
        states: tuple[TrainState, ...],
        keys: tuple[Any, ...],
        n: Any,
        orders: tuple[Any, ...],
        images: Any,
    ) -> tuple[Result, ...]:
        def one(kept: Kept, state: TrainState, key: Any, order: Any) -> Result:
            return steps_of(kept)(state, key, n, order, images)

        if unroll:
            parts = zip(kept, states, keys, orders, strict=True)
            return tuple(one(*part) for part in parts)
        stacked = [
            jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
            for trees in (kept, states, keys, orders)
        ]
        results = jax.vmap(one)(*stacked)
        return tuple(
            jax.tree.map(lambda x, i=i: x[i], results) for i in range(len(kept))
        )

    return fn
