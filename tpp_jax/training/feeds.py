"""Feeds of batches: from arrays on the devices, or streamed from the host.

A batch may be any pytree of arrays. :class:`tpp_jax.training.task.Feed` documents the
methods.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from tpp_jax.training import parallel
from tpp_jax.training.task import Batch

EVAL_BATCH = 512
"""Largest number of examples in one evaluation step, before it is rounded up to split
evenly over the devices."""


class Resident:
    """Data that reside on every device; batches are selected and augmented there.

    The order of an epoch is a permutation computed on the device.

    Attributes:
      split: Whether the data are split over the devices.
      at_once: Largest number of steps in one dispatch.
    """

    split = False
    at_once = 100

    def __init__(
        self,
        train: Batch,
        evaluation: Batch,
        batch_size: int,
        devices: Sequence[parallel.Device],
        accumulate: int = 1,
        augment: Callable[[Key[Array, " n"], Batch], Batch] | None = None,
    ) -> None:
        """Puts the data on the devices.

        Args:
          train: All training examples.
          evaluation: All evaluation examples.
          batch_size: Number of examples in a training batch of all devices together.
          devices: Devices that a step runs on.
          accumulate: Number of parts in which each device computes its share of a
            training batch.
          augment: Function that randomly changes a batch, given one key for each
            example. The change of an example may depend only on its own key, so that a
            batch split over devices equals the batch of a single device.
        """
        self._batch_size, self._accumulate = batch_size, accumulate
        self._augment = augment
        self._axis, self._devices = parallel.axis_name(devices), devices
        self._n, self._n_eval = _length(train), _length(evaluation)
        self._eval_size = _filling(min(EVAL_BATCH, self._n_eval), devices)
        steps = math.ceil(self._n_eval / self._eval_size)
        self._train, self._eval = parallel.replicate(
            (train, _padded(evaluation, steps * self._eval_size)), devices
        )
        self._key, self._epoch = None, -1

    def begin(self, key: Key[Array, ""], step: int) -> None:
        """Starts a phase; ``train_data`` is given the step."""
        del step
        self._key, self._epoch = key, -1

    def steps_left(self, step: int) -> int:
        """Returns the number of steps to the end of the epoch.

        An epoch's order is an argument of its steps.
        """
        per_epoch = self._n // self._batch_size
        return per_epoch - step % per_epoch

    @property
    def train_examples(self) -> Batch:
        """All training examples, on the first device."""
        return parallel.local(self._train)

    def train_data(self, step: int) -> tuple[Any, ...]:
        """Returns the order of the step's epoch and the data."""
        epoch = step // (self._n // self._batch_size)
        if epoch != self._epoch:
            order = _order(self._key, epoch, self._n)
            self._order = parallel.replicate(order, self._devices)
            self._epoch = epoch
        return self._order, self._train

    def train_batch(
        self,
        step: Int[Array, ""],
        key: Key[Array, ""],
        order: Int[Array, " n"],
        examples: Batch,
    ) -> Batch:
        """Returns the next examples of the epoch's order, augmented."""
        batch = self._batch_size
        steps_per_epoch = order.shape[0] // batch
        start = step % steps_per_epoch * batch
        keys = jax.random.split(key, batch)
        chosen = jax.lax.dynamic_slice_in_dim(order, start, batch)
        if self._axis is not None:
            device = jax.lax.axis_index(self._axis)
            n = jax.lax.axis_size(self._axis)
            mine = parallel.places_of(device, n, batch, self._accumulate)
            keys, chosen = keys[mine], chosen[mine]
        examples = jax.tree.map(lambda x: x[chosen], examples)
        return examples if self._augment is None else self._augment(keys, examples)

    def eval_data(self) -> Iterator[tuple[Any, ...]]:
        """Yields the data and the index of a step's first example."""
        for start in range(0, self._n_eval, self._eval_size):
            yield self._eval, np.int32(start)

    def eval_batch(
        self, examples: Batch, start: Int[Array, ""]
    ) -> tuple[Batch, Bool[Array, " n"]]:
        """Returns this device's share of the examples from ``start`` on."""
        size = self._eval_size
        if self._axis is not None:
            size //= jax.lax.axis_size(self._axis)
            start = start + jax.lax.axis_index(self._axis) * size
        batch = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), examples
        )
        return batch, start + jnp.arange(size) < self._n_eval

    def close(self) -> None:
        """Does nothing, since there is no background work."""


class Taught(NamedTuple):
    """A batch with what a teacher returns for it.

    Attributes:
      examples: Batch.
      outputs: Outputs of the teacher, ``[n, …]``.
    """

    examples: Batch
    outputs: Array


class TaughtResident(Resident):
    """Resident data that are not augmented, with the outputs of a teacher."""

    def __init__(self, feed: Resident, outputs: Array) -> None:
        """Puts the outputs on the devices.

        Args:
          feed: Data, which are shared and not copied.
          outputs: Outputs of the teacher for all training examples, in their order.
        """
        vars(self).update(vars(feed))
        self._augment = None
        self._outputs = parallel.replicate(outputs, self._devices)

    def train_data(self, step: int) -> tuple[Any, ...]:
        """Returns the order of the step's epoch with the outputs, and the data."""
        order, examples = super().train_data(step)
        return (order, self._outputs), examples

    def train_batch(
        self, step: Int[Array, ""], key: Key[Array, ""], order: Any, examples: Batch
    ) -> Taught:
        """Returns the next examples of the epoch's order, and their outputs."""
        places, outputs = order
        batch = super().train_batch(step, key, places, (examples, outputs))
        return Taught(*batch)


class Streamed:
    """Data that the host produces batch by batch.

    Attributes:
      split: Whether the data are split over the devices.
      at_once: Largest number of steps in one dispatch.
    """

    split = True
    at_once = 1

    def __init__(
        self,
        train_batches: Callable[[Key[Array, ""], int], Generator[Batch, None, None]],
        eval_batches: Callable[[int], Iterable[Batch]],
        eval_size: int,
        devices: Sequence[parallel.Device],
    ) -> None:
        """Keeps the arguments; reading starts with :meth:`begin`.

        Args:
          train_batches: Function of a phase's key and a step that yields training
            batches from that step on, without end. Each batch holds this process's
            share of every accumulated part. Closing the generator ends its background
            work.
          eval_batches: Function of a batch size that yields this process's share of
            all evaluation batches of that size. The last share may be smaller. All
            processes get the same number of batches.
          eval_size: Number of examples in an evaluation batch of all processes
            together, before it is rounded up to split evenly over the devices.
          devices: Devices that a step runs on.
        """
        self._train_batches, self._eval_batches = train_batches, eval_batches
        self._eval_size = _filling(eval_size, devices)
        self._batches: Generator[Batch, None, None] | None = None

    def begin(self, key: Key[Array, ""], step: int) -> None:
        """Starts reading the batches of a phase from a step on."""
        self.close()
        self._batches = self._train_batches(key, step)

    def steps_left(self, step: int) -> int:
        """Returns 1, since each step takes its own batch as an argument."""
        del step
        return 1

    def train_data(self, step: int) -> tuple[Any, ...]:
        """Returns the next batch; successive calls must ask for consecutive steps."""
        del step
        assert self._batches is not None, "begin() comes first"
        return (next(self._batches),)

    def train_batch(
        self, step: Int[Array, ""], key: Key[Array, ""], batch: Batch
    ) -> Batch:
        """Returns the batch, which the host has augmented."""
        del step, key
        return batch

    def eval_data(self) -> Iterator[tuple[Any, ...]]:
        """Yields each batch, padded, with a mask of its examples."""
        size = self._eval_size // jax.process_count()
        for batch in self._eval_batches(self._eval_size):
            yield ((_padded(batch, size), np.arange(size) < _length(batch)),)

    def eval_batch(
        self, batch: tuple[Batch, Bool[Array, " n"]]
    ) -> tuple[Batch, Bool[Array, " n"]]:
        """Returns the batch and the mask of its examples."""
        return batch

    def close(self) -> None:
        """Stops reading in the background."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def epoch_order(key: Key[Array, ""], epoch: int, n: int) -> Int[Array, " n"]:
    """Returns the order in which an epoch visits n examples, a permutation."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), n)


_order = jax.jit(epoch_order, static_argnums=2)


def _length(batch: Batch) -> int:
    return len(jax.tree.leaves(batch)[0])


def _filling(size: int, devices: Sequence[parallel.Device]) -> int:
    """Returns an evaluation batch size rounded up to split over the devices."""
    return math.ceil(size / len(devices)) * len(devices)


def _padded(batch: Batch, size: int) -> Batch:
    """Appends zeros to all arrays, up to a number of examples."""
    missing = size - _length(batch)
    if not missing:
        return batch
    return jax.tree.map(
        lambda x: np.pad(x, ((0, missing), *[(0, 0)] * (np.ndim(x) - 1))), batch
    )
