"""Tasks: the data, the loss and the metrics that a network is trained for.

The training step, the evaluation step, the feeds and the runs use a task through this
protocol only. :mod:`tpp_jax.training.classification` is the first implementation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Key, Shaped

from tpp_jax.headline import Headline
from tpp_jax.training import parallel

Batch = Any
"""A pytree of arrays whose first axis runs over the examples."""

Metrics = dict[str, Float[Array, ""]]

Loss = Callable[[nnx.Module, Batch, Key[Array, ""]], tuple[Float[Array, ""], Metrics]]
"""See :meth:`Task.loss`."""


class Feed(Protocol):
    """Source of the batches of a step.

    ``train_data`` and ``eval_data`` return, on the host, the arguments of a step;
    ``train_batch`` and ``eval_batch`` are pure functions that make a device's share of
    the batch from these arguments, inside the compiled program. A training batch
    depends only on the seed, the phase and the step, so that the step number is the
    position in the data. :class:`tpp_jax.training.feeds.Resident` and
    :class:`tpp_jax.training.feeds.Streamed` are two implementations.
    """

    @property
    def split(self) -> bool:
        """Whether the data are split over the devices and not replicated."""
        ...

    @property
    def at_once(self) -> int:
        """Largest number of steps in one dispatch."""
        ...

    def begin(self, key: Key[Array, ""], step: int) -> None:
        """Starts a phase.

        Args:
          key: Key of the phase.
          step: Step of the phase to start from.
        """

    def steps_left(self, step: int) -> int:
        """Returns the number of steps from ``step`` on that may share one dispatch."""
        ...

    def train_data(self, step: int) -> tuple[Any, ...]:
        """Returns the arguments of the steps from ``step`` on.

        A feed that is not split returns two: one that depends on the key of the phase,
        and the data, which runs of other seeds share.
        """
        ...

    @property
    def train_batch(self) -> Callable[..., Batch]:
        """Function that makes this device's share of a training batch.

        It is called as ``train_batch(step, key, *data)`` with the step of the phase, a
        key of that step, which is the same on all devices, and the arguments from
        ``train_data``.
        """
        ...

    def eval_data(self) -> Iterator[tuple[Any, ...]]:
        """Yields the arguments of the steps of an evaluation."""
        ...

    @property
    def eval_batch(self) -> Callable[..., tuple[Batch, Bool[Array, " n"]]]:
        """Function that makes this device's share of an evaluation batch.

        It is called as ``eval_batch(*data)`` with the arguments from ``eval_data`` and
        returns a batch of constant size and a mask that is False for padding.
        """
        ...

    def close(self) -> None:
        """Stops background work."""


class Task(Protocol):
    """Data, loss and metrics of a training problem.

    ``loss``, ``metrics`` and ``inputs`` are pure and traced into compiled programs.
    """

    @property
    def headline(self) -> Headline:
        """Reported metric by which a run is judged."""
        ...

    @property
    def examples(self) -> str:
        """Plural noun for what the log counts per second, such as ``"images"``."""
        ...

    @property
    def batch_size(self) -> int:
        """Number of examples in a training batch of all devices together."""
        ...

    @property
    def examples_per_step(self) -> int:
        """Number of what ``examples`` names in a training batch."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in one pass over the training data."""
        ...

    def model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the network with random weights."""
        ...

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns shapes and types of the network's inputs for one example."""
        ...

    def feed(self, devices: Sequence[parallel.Device], accumulate: int = 1) -> Feed:
        """Returns the batches of training and evaluation.

        Args:
          devices: Devices that a step runs on.
          accumulate: Number of parts in which each device computes its share of a
            training batch.
        """
        ...

    def loss(
        self, model: nnx.Module, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Returns the loss to minimise, and metrics to record.

        Args:
          model: Network in training mode.
          batch: One device's share of a batch, or an accumulated part of it.
          key: Key of all random numbers; the same on all devices.

        Returns:
          The mean loss over the batch and means of other metrics. The caller averages
          them over parts, devices and steps.
        """
        ...

    def metrics(
        self, model: nnx.Module, batch: Batch
    ) -> dict[str, Shaped[Array, " n"]]:
        """Returns the metrics of an evaluation, one value per example.

        Values of padding are ignored; the others are averaged over batches and
        devices.

        Args:
          model: Network in evaluation mode.
          batch: One device's share of a batch.
        """
        ...

    def report(self, means: Mapping[str, float]) -> dict[str, float]:
        """Returns the metrics to show and record, computed from means.

        Here a fraction becomes a percentage, a mean negative log-likelihood becomes a
        perplexity, and two means become a ratio.

        Args:
          means: Means of the training metrics, which include ``loss``, or of the
            evaluation metrics.
        """
        ...

    def inputs(self, batch: Batch) -> tuple[Array, ...]:
        """Returns the network's inputs for a batch, as in evaluation."""
        ...

    def probes(self, number: int) -> Batch:
        """Returns the first examples of the evaluation data, at most ``number``."""
        ...

    def samples(self, seed: int) -> Iterator[Batch]:
        """Yields the training batches of one epoch in random order, not augmented.

        Every process gets the same batches, of full size.
        """
        ...
