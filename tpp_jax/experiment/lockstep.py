"""Runs in lockstep: equal steps of several runs become one program.

A run calls a function to run its steps. Here each run is a thread, and the function
waits until all runs have called it; one program then runs equal steps. Each run does
everything else (the plan, the cut, checkpoints, evaluations) on its own. Only one
thread works at any time, in an order that depends only on the runs, so that several
processes do the same.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpp_jax.experiment.program import Kept, Outcome, Program, Take, alone
from tpp_jax.training.step import TrainState


class Ask(NamedTuple):
    """A request of a run for some steps.

    Attributes:
      program: Program of the run.
      arguments: Arguments of the steps, ``(state, key, n, *data)``.
      left: Number of steps that remain in the run.
    """

    program: Program
    arguments: tuple[Any, ...]
    left: int


class _End(NamedTuple):
    """Result of a run, or the exception that ended it."""

    value: Any
    failed: bool = False


def drive(runs: Sequence[Callable[[Take], Any]]) -> list[Any]:
    """Completes several runs.

    The run with the most remaining steps goes first. So runs that were resumed at
    different steps come together, and runs of different methods do in their last
    phases.

    Several runs do not see thread-local context managers of JAX around this call, such
    as ``jax.default_device(...)``. ``jax.config.update`` has an effect on all.

    Args:
      runs: Functions that complete a run, given the function that runs its steps.

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

    def resume(i: int, reply: Outcome | BaseException | None) -> None:
        asked.pop(i, None)
        post = workers[i].resume(reply)
        if isinstance(post, Ask):
            asked[i] = post
        elif post.failed and not isinstance(post.value, Exception | SystemExit):
            raise post.value
        else:
            ends[i] = post.value  # a failed run does not stop the others

    programs = _Programs()
    try:
        for i in range(len(workers)):
            resume(i, None)
        while asked:
            first = max(asked.values(), key=lambda ask: ask.left)
            group = [i for i, ask in asked.items() if _can_join(ask, first)]
            try:
                results = programs([asked[i] for i in group], asked.values())
            except Exception as error:  # raised in each run
                results = [error] * len(group)
            for i, result in zip(group, results, strict=True):
                resume(i, result)
    finally:
        for worker in workers:
            worker.close()
    return [ends[i] for i in range(len(workers))]


class _Closed(BaseException):
    """Raised in a run to end its thread."""


class _Worker:
    """A run in a thread that works only while :meth:`resume` waits for it."""

    def __init__(self, run: Callable[[Take], Any]) -> None:
        self._replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._posts: queue.SimpleQueue[Ask | _End] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(run,))
        self._thread.start()

    def resume(self, reply: Outcome | BaseException | None) -> Ask | _End:
        """Replies to the run's request; returns its next request or its end."""
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

    def _take(self, program: Program, arguments: tuple[Any, ...], left: int) -> Outcome:
        self._posts.put(Ask(program, arguments, left))
        return self._next_reply()

    def _next_reply(self) -> Any:
        reply = self._replies.get()
        if isinstance(reply, BaseException):
            raise reply
        return reply


def _can_join(ask: Ask, other: Ask) -> bool:
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
    """Programs of groups of runs, each kept while the group may need it again."""

    def __init__(self) -> None:
        self._programs: dict[tuple[Any, ...], Any] = {}

    def __call__(self, asks: Sequence[Ask], of_all: Iterable[Ask]) -> list[Outcome]:
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
        states, keys, counts, orders, examples = zip(
            *(ask.arguments for ask in asks), strict=True
        )
        kept = tuple(ask.program.kept for ask in asks)
        # All have the same number of steps and the same examples.
        program = self._programs[key]
        return list(program(kept, states, keys, counts[0], orders, examples[0]))


def together(
    steps_of: Callable[[Kept], Callable[..., Outcome]], unroll: bool
) -> Callable[..., tuple[Outcome, ...]]:
    """Joins the steps of several runs into one function for a device.

    Args:
      steps_of: Function from kept indices to steps.
      unroll: Whether the runs' steps follow each other; otherwise all operations are
        batched over the runs.

    Returns:
      ``fn(kept, states, keys, n, orders, examples) -> outcomes``. ``n`` and
      ``examples`` are common to all runs; the others are tuples with an entry per run.
    """

    def fn(
        kept: tuple[Kept, ...],
        states: tuple[TrainState, ...],
        keys: tuple[Any, ...],
        n: Any,
        orders: tuple[Any, ...],
        examples: Any,
    ) -> tuple[Outcome, ...]:
        def one(kept: Kept, state: TrainState, key: Any, order: Any) -> Outcome:
            return steps_of(kept)(state, key, n, order, examples)

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
