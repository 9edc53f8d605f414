"""Runs that advance together: equal steps of several become one program.

A run takes its steps by a function that it is given. Here each run is a thread, and the
function waits until all runs want steps; equal ones are then taken by one program. What
is not a step (the plan, the cut, checkpoints, evaluations) each run does by itself.
Only one thread works at any time, in an order that depends on the runs alone, so that
several processes do the same.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpp_jax.experiment.program import Kept, Program, Result, Take, alone
from tpp_jax.training.step import TrainState


class Ask(NamedTuple):
    """What a run waits for: some steps from here on.

    Attributes:
      program: The run's own program.
      arguments: Arguments of the steps, ``(state, key, n, *data)``.
      left: Number of steps of the run that are still to be done.
    """

    program: Program
    arguments: tuple[Any, ...]
    left: int


class _End(NamedTuple):
    """What a run returned, or the exception that ended it."""

    value: Any
    failed: bool = False


def drive(runs: Sequence[Callable[[Take], Any]]) -> list[Any]:
    """Carries runs to their ends.

    Those with the most steps left go first, so that runs that were resumed at different
    steps meet, and those of different methods in the phases that they end with.

    Several runs do not see the context managers that JAX keeps by thread
    (``jax.default_device(...)`` and the like) around this call; ``jax.config.update``
    reaches them.

    Args:
      runs: Functions that carry out a run, given how to take its steps.

    Returns:
      The result of each run, or the exception that ended it.
    """
    if len(runs) == 1:
        try:
            return [runs[0](alone)]
        except (Exception, SystemExit) as error:
            return [error]
    workers = [_Worker(run) for run in runs]
    asked: dict[int, Ask] = {}
    ends: dict[int, Any] = {}

    def go_on(i: int, reply: Result | BaseException | None) -> None:
        asked.pop(i, None)
        post = workers[i].resume(reply)
        if isinstance(post, Ask):
            asked[i] = post
        elif post.failed and not isinstance(post.value, Exception | SystemExit):
            raise post.value
        else:
            ends[i] = post.value  # whatever it is, the others may still go on

    programs = _Programs()
    try:
        for i in range(len(workers)):
            go_on(i, None)
        while asked:
            first = max(asked.values(), key=lambda ask: ask.left)
            group = [i for i, ask in asked.items() if _go_together(ask, first)]
            try:
                results = programs([asked[i] for i in group], asked.values())
            except Exception as error:  # each run knows what to make of it
                results = [error] * len(group)
            for i, result in zip(group, results, strict=True):
                go_on(i, result)
    finally:
        for worker in workers:
            worker.close()
    return [ends[i] for i in range(len(workers))]


class _Closed(BaseException):
    """Ends a run that nobody waits for any more."""


class _Worker:
    """A run in a thread, which works only while :meth:`resume` waits for it."""

    def __init__(self, run: Callable[[Take], Any]) -> None:
        self._replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._posts: queue.SimpleQueue[Ask | _End] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(run,))
        self._thread.start()

    def resume(self, reply: Result | BaseException | None) -> Ask | _End:
        """Hands over what the run waits for; returns what it wants next, or its end."""
        self._replies.put(reply)
        return self._posts.get()

    def close(self) -> None:
        """Ends the run if it has not ended."""
        self._replies.put(_Closed())
        self._thread.join()

    def _work(self, run: Callable[[Take], Any]) -> None:
        try:
            self._next_reply()
            end = _End(run(self._take))
        except BaseException as error:
            end = _End(error, failed=True)
        self._posts.put(end)

    def _take(self, program: Program, arguments: tuple[Any, ...], left: int) -> Result:
        self._posts.put(Ask(program, arguments, left))
        return self._next_reply()

    def _next_reply(self) -> Any:
        reply = self._replies.get()
        if isinstance(reply, BaseException):
            raise reply
        return reply


def _go_together(ask: Ask, other: Ask) -> bool:
    if ask is other:
        return True
    likeness = ask.program.likeness
    alike = likeness is not None and likeness == other.program.likeness
    return alike and _shapes(ask) == _shapes(other)


def _shapes(ask: Ask) -> Any:
    _, _, n, *_ = ask.arguments
    leaves, structure = jax.tree.flatten((ask.program.kept, ask.arguments))
    return int(n), structure, [(np.shape(x), x.dtype) for x in leaves]


class _Programs:
    """Programs of groups of runs, each kept while the group may ask for it again."""

    def __init__(self) -> None:
        self._programs: dict[tuple[Any, ...], Any] = {}

    def __call__(self, asks: Sequence[Ask], of_all: Iterable[Ask]) -> list[Result]:
        if len(asks) == 1:
            return [alone(*asks[0])]
        current = {ask.program.steps for ask in of_all}
        for key in [key for key in self._programs if not current.issuperset(key)]:
            del self._programs[key]
        key = tuple(ask.program.steps for ask in asks)
        if key not in self._programs:
            own = asks[0].program
            self._programs[key] = own.compile(
                together(own.steps_of, own.unroll), donate=1
            )
        states, keys, counts, orders, images = zip(
            *(ask.arguments for ask in asks), strict=True
        )
        kept = tuple(ask.program.kept for ask in asks)
        # They count alike, and their images are the same.
        program = self._programs[key]
        return list(program(kept, states, keys, counts[0], orders, images[0]))


def together(
    steps_of: Callable[[Kept], Callable[..., Result]], unroll: bool
) -> Callable[..., tuple[Result, ...]]:
    """Makes the steps of several replicas one function for a device.

    Args:
      steps_of: Function from kept indices to steps.
      unroll: Whether the replicas follow each other; otherwise all operations run along
        a new leading axis.

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
