"""What a network is trained for: its data, its loss and the metrics it is judged by.

The training and the evaluation step, the feeds and the runs know a task by this
protocol alone. :mod:`tpp_jax.training.classification` is the first implementation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Key, Shaped

from tpp_jax.reports.headline import Headline

Batch = Any
"""A pytree of arrays whose first axis runs over the examples."""

Metrics = dict[str, Float[Array, ""]]


class Feed(Protocol):
    """How batches reach a step.

    ``train_data`` and ``eval_data`` give, on the host, the arguments of a step;
    ``train_batch`` and ``eval_batch`` are pure functions that make a device's share of
    the batch from these arguments, inside the compiled program. A training batch
    depends on the seed, the phase and the step alone, so that the position in the data
    is the number of the step. Two are ready: :class:`tpp_jax.training.feeds.Resident`
    and :class:`tpp_jax.training.feeds.Streamed`.
    """

    @property
    def split(self) -> bool:
        """Whether the data are split over the devices, or each device has all."""
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
        """Returns how many steps from a step on may share one dispatch."""
        ...

    def train_data(self, step: int) -> tuple[Any, ...]:
        """Returns the arguments of the steps from ``step`` on.

        A feed that is not split gives two: one that depends on the key of the phase,
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
        returns a batch of constant size, and which of its examples count: the others
        are padding.
        """
        ...

    def close(self) -> None:
        """Stops what runs in the background."""


class Task(Protocol):
    """Data, loss and metrics of what a network is trained for.

    ``loss``, ``metrics`` and ``inputs`` are pure and traced into compiled programs.
    """

    @property
    def headline(self) -> Headline:
        """The reported metric that a run is judged by."""
        ...

    @property
    def examples(self) -> str:
        """What the examples are, in the plural: ``"images"``."""
        ...

    @property
    def batch_size(self) -> int:
        """Number of examples in a training batch of all devices together."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches that go through the training data once."""
        ...

    def model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the network with random weights."""
        ...

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns shapes and types of the network's inputs for one example."""
        ...

    def feed(self, devices: Sequence[jax.Device], accumulate: int = 1) -> Feed:
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
          key: Key for whatever is random; the same on all devices.

        Returns:
          The mean of the loss over the batch, and means of other metrics; all are
          averaged over parts, devices and steps.
        """
        ...

    def metrics(
        self, model: nnx.Module, batch: Batch
    ) -> dict[str, Shaped[Array, " n"]]:
        """Returns the metrics of an evaluation, one value per example.

        Values of examples that are padding are ignored; the others are summed over
        batches and devices and divided by their number.

        Args:
          model: Network in evaluation mode.
          batch: One device's share of a batch.
        """
        ...

    def report(self, means: Mapping[str, float]) -> dict[str, float]:
        """Returns the metrics as they are shown and recorded, from their means.

        Here a share becomes a percentage, a mean of negative log-likelihoods a
        perplexity, and two means a ratio.

        Args:
          means: Means of the metrics of training, ``loss`` among them, or of an
            evaluation.
        """
        ...

    def inputs(self, batch: Batch) -> tuple[Array, ...]:
        """Returns the network's inputs for a batch, as evaluation computes them."""
        ...

    def probes(self, number: int) -> Batch:
        """Returns the first examples of the evaluation data, at most ``number``."""
        ...

    def samples(self, seed: int) -> Iterator[Batch]:
        """Yields the training batches of one epoch in random order, not augmented.

        Every process gets the same batches of full size.
        """
        ...
