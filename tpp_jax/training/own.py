"""Tasks of a user's own, completed from the few things that they must define."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, Shaped

from tpp_jax.errors import TPPError
from tpp_jax.headline import Headline
from tpp_jax.interop.modules import as_function, as_nnx
from tpp_jax.training import parallel
from tpp_jax.training.calling import one_number, tried, with_key
from tpp_jax.training.feeds import EVAL_BATCH, Resident, Streamed
from tpp_jax.training.task import Batch, Feed, Metrics, Task

LOSS = Headline("loss", better="lower")
"""Headline of a task that names none."""

Source = Any
"""Random access to examples: it has ``__len__`` and ``__getitem__``, as Grain's data
sources have."""


def complete(own: Any, name: str = "", batch_size: int = 128) -> Task:
    """Returns a task made from an object that defines a part of one.

    What the object has is used; the rest is derived.

    Args:
      own: Object with these attributes, of which only the first two and one kind of
        data are needed:

        - ``model(rngs)``: the network with random weights, a module of Flax NNX, of
          Linen or of Equinox;
        - ``loss(model, batch)`` or ``loss(model, batch, key)``: the mean loss of a
          batch, or a tuple of it and a dict of mean metrics;
        - ``train`` and ``evaluation``: all examples, a pytree of arrays whose first
          axis runs over them, or random access to single examples (``len(source)`` and
          ``source[i]``); or ``train_batches(key, step)``, which returns the batch of a
          step, with ``eval_batches()``, which yields all batches of evaluation;
        - ``batch_size``; ``steps_per_epoch``, by default one pass over ``train``, or 1
          with ``train_batches``;
        - ``inputs(batch)``: a tuple of the network's inputs; by default a batch that is
          an array, or the first entry of a tuple;
        - ``metrics(model, batch)``: a dict of values per example, ``[n]``; by default
          the loss and its metrics, example by example;
        - ``report(means)``: the metrics to show, computed from their means;
        - ``headline``: a :class:`tpp_jax.Headline`, or the name of a metric of which
          less is better; by default the loss;
        - ``augment(keys, batch)``: a random change of a training batch from one key per
          example; only with arrays;
        - ``examples``: plural noun for the examples.
      name: Name of the object, for messages.
      batch_size: Number of examples in a training batch, if the object has none.

    Returns:
      The object itself if it is a complete :class:`tpp_jax.training.task.Task`.

    Raises:
      TPPError: Something is missing, or the data do not fit together.
    """
    name = name or type(own).__name__
    if hasattr(own, "feed"):
        needed = [one for one in dir(Task) if not one.startswith("_")]
        if missing := [one for one in needed if not hasattr(own, one)]:
            raise TPPError(
                f"the task {name} has a feed, but lacks {', '.join(missing)}: define "
                "them, or leave out the feed and define train and evaluation"
            )
        return own
    for needed, what in (("model", "model(rngs)"), ("loss", "loss(model, batch)")):
        if not callable(getattr(own, needed, None)):
            raise TPPError(f"the task {name} has no function {what}")
    if not (_has(own, "train", "evaluation") or _has(own, *_BATCHES)):
        raise TPPError(
            f"the task {name} has no data: define train and evaluation, or "
            "train_batches(key, step) and eval_batches()"
        )
    for optional in (*_BATCHES, "inputs", "metrics", "report", "augment"):
        if not callable(getattr(own, optional, str)):
            raise TPPError(f"{optional} of the task {name} is no function")
    return OwnTask(own, name, batch_size)


_BATCHES = "train_batches", "eval_batches"


def _has(own: Any, *names: str) -> bool:
    return all(getattr(own, name, None) is not None for name in names)


class OwnTask:
    """A task that is derived from a user's object, see :func:`complete`."""

    def __init__(self, own: Any, name: str, batch_size: int) -> None:
        """Reads the sizes of the data.

        Args:
          own: The user's object.
          name: Name of the object, for messages.
          batch_size: Number of examples in a batch, if the object has none.

        Raises:
          TPPError: The data do not fit together.
        """
        self._own, self._name = own, name
        self._by_step = _has(own, *_BATCHES)
        if self._by_step:
            self._first = next(iter(own.eval_batches()), None)
            if self._first is None:
                raise TPPError(f"the task {name} yields no batch of evaluation")
            batch = own.train_batches(jax.random.key(0), 0)
            batch_size = _number(batch, f"{name}.train_batches")
        else:
            sizes = [
                _number(getattr(own, part), f"{name}.{part}")
                for part in ("train", "evaluation")
            ]
            if not all(sizes):
                raise TPPError(
                    f"the task {name} has no examples in train or evaluation"
                )
            self._first = self._chosen(own.evaluation, np.arange(1))
        self.batch_size: int = int(getattr(own, "batch_size", None) or batch_size)
        self.examples: str = getattr(own, "examples", "examples")
        self.examples_per_step: int = self.batch_size
        self.headline: Headline = _headline(getattr(own, "headline", LOSS))
        self._per_pass = 1 if self._by_step else self._batches_of_a_pass()
        given = getattr(own, "steps_per_epoch", None)
        self.steps_per_epoch: int = int(given or self._per_pass)
        self._loss = with_key(own.loss)

    def _batches_of_a_pass(self) -> int:
        n = _number(self._own.train, f"{self._name}.train")
        if self.batch_size > n:
            raise TPPError(
                f"the batch size is {self.batch_size}, but {self._name} has {n} "
                f"training {self.examples}"
            )
        return n // self.batch_size

    def model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the network with random weights, as a module of NNX."""
        made = tried(self._own.model, f"the model of {self._name}", rngs)
        return as_nnx(made, *self.inputs(self._one()), rngs=rngs)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns shapes and types of the network's inputs for one example."""
        return jax.eval_shape(self.inputs, self._one())

    def feed(self, devices: Sequence[parallel.Device], accumulate: int = 1) -> Feed:
        """Returns the batches: from arrays on the devices, or made on the host."""
        own, size = self._own, self.batch_size
        augment = getattr(own, "augment", None)
        if not self._by_step and not (
            _is_source(own.train) or _is_source(own.evaluation)
        ):
            if augment is not None:
                batch = self._chosen(own.train, np.zeros(2, int))
                keys = jax.random.split(jax.random.key(0))
                what = f"augment of {self._name} with one key for each example"
                tried(jax.eval_shape, what, augment, keys, batch)
            return Resident(
                own.train, own.evaluation, size, devices, accumulate, augment
            )
        if augment is not None:
            raise TPPError(
                f"{self._name} has augment, which changes data in arrays, but its data "
                "are made on the host: change them there, and leave out augment"
            )
        if jax.process_count() > 1:
            raise TPPError(
                f"the data of {self._name} are made on the host, which works in one "
                "process only: keep them in arrays, or define a feed"
            )
        made = functools.partial(self._made_batches, parts=len(devices) * accumulate)
        return Streamed(made, self._evaluation_batches, self._eval_size(), devices)

    def loss(
        self, model: nnx.Module, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Returns the loss of a batch and its metrics."""
        found: Any = self._loss(model, batch, key)
        pair = isinstance(found, tuple) and len(found) == 2
        value: Any = found[0] if pair else found
        metrics: Any = found[1] if pair else {}
        if not isinstance(metrics, Mapping):
            raise TPPError(
                f"the loss of {self._name} returns a tuple whose second entry is no "
                "dict: it must be a dict of mean metrics"
            )
        if not jnp.issubdtype(getattr(value, "dtype", float), jnp.floating):
            raise TPPError(
                f"the loss of {self._name} is {value.dtype}, which has no gradient"
            )
        what = f"the loss of {self._name}"
        return one_number(value, what), {
            name: one_number(x, f"the metric {name!r} of {what}")
            for name, x in metrics.items()
        }

    def metrics(
        self, model: nnx.Module, batch: Batch
    ) -> dict[str, Shaped[Array, " n"]]:
        """Returns the metrics of each example; by default loss and its metrics."""
        if hasattr(self._own, "metrics"):
            found = self._own.metrics(model, batch)
            return {name: jnp.asarray(x, jnp.float32) for name, x in found.items()}
        graphdef, state = nnx.split(model)

        def one(example: Batch) -> Metrics:
            alone = jax.tree.map(lambda x: x[None], example)
            merged = nnx.merge(graphdef, state, copy=True)
            value, metrics = self.loss(merged, alone, jax.random.key(0))
            return {**metrics, "loss": value}

        return jax.vmap(one)(jax.tree.map(jnp.asarray, batch))

    def report(self, means: Mapping[str, float]) -> dict[str, float]:
        """Returns the metrics to show."""
        report = getattr(self._own, "report", dict)
        return {name: float(x) for name, x in report(means).items()}

    def inputs(self, batch: Batch) -> tuple[Array, ...]:
        """Returns the network's inputs."""
        if hasattr(self._own, "inputs"):
            found = self._own.inputs(batch)
            return found if isinstance(found, tuple) else (found,)
        first = batch[0] if isinstance(batch, tuple | list) else batch
        if not hasattr(first, "shape"):
            raise TPPError(
                f"the batches of {self._name} are of type {type(batch).__name__}, of "
                "which the network's inputs are not known: define inputs(batch)"
            )
        return (first,)

    def probes(self, number: int) -> Batch:
        """Returns the first examples of the evaluation data."""
        if self._by_step:
            return jax.tree.map(lambda x: x[:number], self._first)
        n = _number(self._own.evaluation, self._name)
        return self._chosen(self._own.evaluation, np.arange(min(number, n)))

    def samples(self, seed: int) -> Iterator[Batch]:
        """Yields the training batches of one epoch in random order, not augmented."""
        if self._by_step:
            made = self._made_batches(jax.random.key(seed), 0)
            with contextlib.closing(made):
                yield from itertools.islice(made, self.steps_per_epoch)
            return
        n, size = _number(self._own.train, self._name), self.batch_size
        order = np.random.default_rng(seed).permutation(n)
        for start in range(0, n - size + 1, size):
            yield self._chosen(self._own.train, order[start : start + size])

    def _one(self) -> Batch:
        """Returns a batch of one example."""
        return jax.tree.map(lambda x: np.asarray(x[:1]), self._first)

    def _chosen(self, examples: Any, places: np.ndarray) -> Batch:
        """Returns the examples at some places, as a batch."""
        if not _is_source(examples):
            return jax.tree.map(lambda x: np.asarray(x)[places], examples)
        found = [examples[int(i)] for i in places]
        try:
            return jax.tree.map(lambda *each: np.stack(each), *found)
        except ValueError as error:
            raise TPPError(
                f"the examples of {self._name} cannot be stacked to a batch ({error}): "
                "they must have equal shapes"
            ) from error

    def _made_batches(
        self, key: Key[Array, ""], step: int, parts: int = 1
    ) -> Generator[Batch, None, None]:
        """Yields the batches of a phase from a step on, each of so many equal parts."""
        own = self._own
        if self._by_step:
            for i in itertools.count(step):
                batch = own.train_batches(jax.random.fold_in(key, i), i)
                if (n := _number(batch, f"{self._name}.train_batches")) % parts:
                    raise TPPError(
                        f"the batch of step {i} of {self._name} has {n} examples, "
                        f"which do not split into {parts} equal parts"
                    )
                yield batch
            return
        n, epoch, order = len(own.train), -1, np.arange(0)
        seed = int(jax.random.bits(key, dtype=jnp.uint32))
        for i in itertools.count(step):
            if epoch != i // self._per_pass:
                epoch = i // self._per_pass
                order = np.random.default_rng((seed, epoch)).permutation(n)
            start = i % self._per_pass * self.batch_size
            yield self._chosen(own.train, order[start : start + self.batch_size])

    def _eval_size(self) -> int:
        if self._by_step:
            return max(_number(batch, self._name) for batch in self._own.eval_batches())
        return min(EVAL_BATCH, _number(self._own.evaluation, self._name))

    def _evaluation_batches(self, size: int) -> Iterator[Batch]:
        if self._by_step:
            yield from self._own.eval_batches()
            return
        n = _number(self._own.evaluation, self._name)
        for start in range(0, n, size):
            yield self._chosen(
                self._own.evaluation, np.arange(start, min(start + size, n))
            )


def _is_source(examples: Any) -> bool:
    """Returns whether examples are given by random access and not as arrays."""
    pytree = isinstance(examples, tuple | list | dict) or hasattr(examples, "shape")
    known = pytree or not jax.tree_util.all_leaves([examples])
    return (
        not known and hasattr(examples, "__getitem__") and hasattr(examples, "__len__")
    )


def _number(examples: Any, what: str) -> int:
    """Returns the number of examples."""
    if _is_source(examples):
        if len(examples) > _MOST:
            raise TPPError(
                f"{what} has {len(examples):,} examples, more than can be put in "
                "random order: leave out its repetition"
            )
        return len(examples)
    leaves = jax.tree.leaves(examples)
    shapes: list[Any] = [getattr(x, "shape", ()) for x in leaves]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or sizes == {()}:
        found = [str(getattr(x, "shape", type(x).__name__)) for x in leaves[:4]]
        raise TPPError(
            f"the arrays of {what} have the shapes {', '.join(found) or 'of nothing'}:"
            " their first axes must be the examples, of equal number"
        )
    return sizes.pop()[0]


_MOST = 2**31


def _headline(given: Any) -> Headline:
    if isinstance(given, Headline):
        return given
    if isinstance(given, str) and given and _RISING.isdisjoint(given.split("_")):
        return dataclasses.replace(LOSS, name=given)
    raise TPPError(
        f"the headline of the task is {given!r}: give a tpp_jax.Headline, or the name "
        "of a metric of which less is better"
    )


_RISING = {"accuracy", "acc", "auc", "f1", "iou", "miou", "psnr", "ssim", "recall"}
"""Words in names of metrics of which more is certainly better."""


def check_task(task: Task, model: nnx.Module, name: str) -> None:
    """Tries the loss and the metrics of a task on shapes, before any training.

    Args:
      task: Task from :func:`complete`.
      model: Its network.
      name: Name of the task, for messages.

    Raises:
      TPPError: The loss is not one number, a metric has not one value per example, or
        the headline is not among the metrics.
    """
    graphdef, state = nnx.split(model)
    batch, probes = next(iter(task.samples(0))), task.probes(2)

    def losses(state: Any, batch: Batch, key: Array) -> Any:
        return task.loss(nnx.merge(graphdef, state, copy=True), batch, key)

    def metrics(state: Any, batch: Batch) -> Any:
        copy = nnx.merge(graphdef, state, copy=True)
        copy.eval()
        return task.metrics(copy, batch)

    call = functools.partial(tried, jax.eval_shape)
    inputs = task.example_inputs()
    call(f"the network on the inputs of {name}", as_function(model), *inputs)
    _, trained = call(f"the loss of {name}", losses, state, batch, jax.random.key(0))
    found = call(f"the metrics of {name}", metrics, state, probes)
    n = _number(probes, name)
    for key, value in found.items():
        if value.shape != (n,):
            raise TPPError(
                f"the metric {key!r} of {name} has the shape {value.shape} for {n} "
                f"examples, must be {(n,)}: return one value per example"
            )
    if taken := _ROW & trained.keys():
        raise TPPError(
            f"the loss of {name} has a metric {min(taken)!r}, a name that each row of "
            "metrics.jsonl has itself: choose another name"
        )
    of_training = dict.fromkeys([*trained, "loss"], 0.5)
    tried(task.report, f"the report of {name}, given those of training,", of_training)
    reported = tried(task.report, f"the report of {name}", dict.fromkeys(found, 0.5))
    if task.headline.name not in reported:
        raise TPPError(
            f"the headline of {name} is {task.headline.name!r}, but its metrics are "
            f"{', '.join(reported)}: define a report that returns it"
        )


_ROW = {"step", "phase", "learning_rate", "skipped"}
"""Names of a record that are not metrics of a task."""
