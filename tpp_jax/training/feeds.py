"""Feeds of batches: from arrays on the devices, or streamed from the host.

Both take any pytree of arrays as a batch; :class:`tpp_jax.training.task.Feed` says what
their methods are for.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from tpp_jax.training import parallel
from tpp_jax.training.task import Batch

EVAL_BATCH = 512
"""Number of examples in one step of an evaluation, at most; it is rounded up to fill
the devices evenly."""


class Resident:
    """Data that live on every device; batches are chosen and augmented there.

    The order of an epoch is one permutation, made on the device.

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
        devices: Sequence[jax.Device],
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
          augment: Random change of a batch, given one key for each example. What is
            done to an example may depend on its own key only, so that a batch that is
            split over devices is the batch of a single one.
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
        """Starts a phase; its position is the step that ``train_data`` is given."""
        del step
        self._key, self._epoch = key, -1

    def steps_left(self, step: int) -> int:
        """Returns the number of steps to the end of the epoch.

        The order of the epoch is one of the arguments.
        """
        per_epoch = self._n // self._batch_size
        return per_epoch - step % per_epoch

    def train_data(self, step: int) -> tuple[Any, ...]:
        """Returns the order of the step's epoch, and the data."""
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
        """Yields the data and the place of a step's first example."""
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
        """Does nothing: nothing runs in the background."""


class Streamed:
    """Data that the host makes batch by batch.

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
        devices: Sequence[jax.Device],
    ) -> None:
        """Reads nothing yet.

        Args:
          train_batches: Function of the key of a phase and a step that yields the
            training batches from that step on, without end; in each, this process's
            share of every accumulated part. Closing the generator ends what it does in
            the background.
          eval_batches: Function of a number of examples that yields all evaluation
            data in batches of so many examples, of which each process gets its share.
            A process's last batch may be smaller. All processes get equally many.
          eval_size: Number of examples in an evaluation batch of all processes
            together; it is rounded up to fill the devices evenly.
          devices: Devices that a step runs on.
        """
        self._train_batches, self._eval_batches = train_batches, eval_batches
        self._eval_size = _filling(eval_size, devices)
        self._batches: Generator[Batch, None, None] | None = None

    def begin(self, key: Key[Array, ""], step: int) -> None:
        """Starts to read the batches of a phase from a step on."""
        self.close()
        self._batches = self._train_batches(key, step)

    def steps_left(self, step: int) -> int:
        """Returns 1, since each step has a batch of its own as its argument."""
        del step
        return 1

    def train_data(self, step: int) -> tuple[Any, ...]:
        """Returns the next batch; the steps that are asked for must be consecutive."""
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
        """Yields each batch, padded, with the examples in it that count."""
        size = self._eval_size // jax.process_count()
        for batch in self._eval_batches(self._eval_size):
            yield ((_padded(batch, size), np.arange(size) < _length(batch)),)

    def eval_batch(
        self, batch: tuple[Batch, Bool[Array, " n"]]
    ) -> tuple[Batch, Bool[Array, " n"]]:
        """Returns the batch and the examples in it that count."""
        return batch

    def close(self) -> None:
        """Stops what is made in the background."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def epoch_order(key: Key[Array, ""], epoch: int, n: int) -> Int[Array, " n"]:
    """Returns the order in which an epoch visits n examples, a permutation."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), n)


_order = jax.jit(epoch_order, static_argnums=2)


def _length(batch: Batch) -> int:
    return len(jax.tree.leaves(batch)[0])


def _filling(size: int, devices: Sequence[jax.Device]) -> int:
    """Returns a size of evaluation batches, rounded up to split over the devices."""
    return math.ceil(size / len(devices)) * len(devices)


def _padded(batch: Batch, size: int) -> Batch:
    """Appends zeros to all arrays, up to a number of examples."""
    missing = size - _length(batch)
    if not missing:
        return batch
    return jax.tree.map(
        lambda x: np.pad(x, ((0, missing), *[(0, 0)] * (np.ndim(x) - 1))), batch
    )
