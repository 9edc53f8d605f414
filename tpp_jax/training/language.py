"""Language modelling as a task: a network predicts the next token."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from tpp_jax.data.text import Text
from tpp_jax.errors import TPPError
from tpp_jax.headline import Headline
from tpp_jax.training import parallel
from tpp_jax.training.feeds import Resident
from tpp_jax.training.task import Feed, Metrics

PERPLEXITY = Headline("perplexity", better="lower")
"""Headline of language modelling: e to the mean cross-entropy of the next token."""


class Sequences(NamedTuple):
    """A batch of sequences, each of which is read but for its last token.

    Attributes:
      tokens: Unsigned integers ``[n, length + 1]``; each token but the first is the
        target of the one before.
      first: Index of the first target that an evaluation counts, int32 ``[n]``. Those
        before it belong to another sequence too.
    """

    tokens: Array | np.ndarray
    first: Array | np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModelling:
    """Next-token prediction: the loss is the mean cross-entropy in nats.

    A training sequence begins anywhere in the text: an epoch visits all stretches of
    ``length`` tokens in random order and begins at a random token in each. The
    evaluation predicts every held-out token but the first one once, from the tokens
    before it in the same sequence. The tokens reside on every device, the training text
    twice.

    Attributes:
      text: Tokens to train on and to evaluate on.
      network: Function of random streams that returns the network, from tokens
        ``[n, length]`` to logits ``[n, length, vocabulary]``.
      length: Number of tokens that the network reads.
      batch_size: Number of sequences in a training batch of all devices together.
    """

    text: Text
    network: Callable[[nnx.Rngs], nnx.Module]
    length: int = 128
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Checks that the text is long enough.

        Raises:
          TPPError: If a number is not positive, or the text has fewer sequences than a
            batch or nothing to evaluate on.
        """
        for name in ("length", "batch_size"):
            if getattr(self, name) < 1:
                raise TPPError(f"{name} is {getattr(self, name)}, but must be above 0")
        needed = (self.batch_size + 1) * self.length
        if len(self.text.train) < needed:
            raise TPPError(
                f"the text has {len(self.text.train):,} tokens to train on, but a "
                f"batch of {self.batch_size} sequences of {self.length} tokens needs "
                f"{needed:,}: give more text, or make batches smaller or sequences "
                "shorter"
            )
        if len(self.text.held_out) <= self.length:
            raise TPPError(
                f"the held-out text has {len(self.text.held_out):,} tokens, but one "
                f"sequence needs {self.length + 1:,}: give more text, hold out a "
                "larger share or make sequences shorter"
            )

    @property
    def headline(self) -> Headline:
        """Perplexity of the held-out text."""
        return PERPLEXITY

    @property
    def examples(self) -> str:
        """Plural noun for what the log counts per second."""
        return "tokens"

    @property
    def examples_per_step(self) -> int:
        """Number of predicted tokens in a training batch."""
        return self.batch_size * self.length

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in one pass over the training text."""
        return len(self._stretches) // self.batch_size

    def model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the network with random weights.

        Raises:
          TPPError: If it does not return logits for all tokens of the vocabulary.
        """
        network = self.network(rngs)
        [tokens] = self.example_inputs()
        found = nnx.eval_shape(lambda model, x: model(x), network, tokens)
        shape, needed = jnp.shape(found), self.text.vocabulary
        if shape[:-1] != tokens.shape or shape[-1] < needed:
            raise TPPError(
                f"the network returns an array of shape {list(shape)} for tokens of "
                f"shape {list(tokens.shape)}, but language modelling needs logits for "
                f"the {needed} tokens of the text after each of them"
            )
        return network

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns the shape and type of a batch of one sequence."""
        return (jax.ShapeDtypeStruct((1, self.length), jnp.int32),)

    def feed(self, devices: Sequence[parallel.Device], accumulate: int = 1) -> Feed:
        """Returns a feed of sequences that reside on the devices."""
        return Resident(
            _sequences(self._stretches),
            self._evaluation,
            self.batch_size,
            devices,
            accumulate,
            self._random_starts,
        )

    def loss(
        self, model: nnx.Module, batch: Sequences, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Returns the mean cross-entropy of the next token, in nats."""
        del key
        return self._nats(model, batch).mean(), {}

    def metrics(
        self, model: nnx.Module, batch: Sequences
    ) -> dict[str, Shaped[Array, " n"]]:
        """Returns two shares of each sequence's targets.

        They are ``nats``, the cross-entropy of the targets that count, and ``counted``,
        the number of these; both are divided by the number of all targets.
        """
        counts = self._counts(batch)
        nats = jnp.where(counts, self._nats(model, batch), 0)
        return {"nats": nats.mean(-1), "counted": counts.mean(-1)}

    def report(self, means: Mapping[str, float]) -> dict[str, float]:
        """Returns the loss in nats and the perplexity.

        For the evaluation, also the bits for each UTF-8 byte of the text, which may be
        compared between tokenizers.
        """
        if "counted" not in means:
            return {**means, "perplexity": _exp(means["loss"])}
        loss = means["nats"] / means["counted"]
        bits = loss / math.log(2) / self.text.bytes_per_token
        return {"loss": loss, "perplexity": _exp(loss), "bits_per_byte": bits}

    def inputs(self, batch: Sequences) -> tuple[Int[Array, "n length"]]:
        """Returns the tokens that the network reads."""
        return (jnp.asarray(batch.tokens)[:, :-1].astype(jnp.int32),)

    def probes(self, number: int) -> Sequences:
        """Returns the first held-out sequences, at most ``number``."""
        return Sequences(*(array[:number] for array in self._evaluation))

    def samples(self, seed: int) -> Iterator[Sequences]:
        """Yields the training batches of one epoch in random order.

        Each sequence begins where its stretch does.
        """
        stretches, size = self._stretches, self.batch_size
        order = np.random.default_rng(seed).permutation(len(stretches))
        for step in range(self.steps_per_epoch):
            chosen = order[step * size : (step + 1) * size]
            yield _sequences(stretches[chosen, : self.length + 1])

    @property
    def _stretches(self) -> Shaped[np.ndarray, "n two_lengths"]:
        """Stretches of ``length`` tokens, each with the next one; a view."""
        text, length = self.text.train, self.length
        return np.lib.stride_tricks.sliding_window_view(text, 2 * length)[::length]

    @property
    def _evaluation(self) -> Sequences:
        """All held-out sequences; the last begins early, to be of full length."""
        text, length = self.text.held_out, self.length
        windows = np.lib.stride_tricks.sliding_window_view(text, length + 1)
        starts = np.arange(0, len(text) - 1, length)
        within = np.minimum(starts, len(windows) - 1)
        return Sequences(windows[within], (starts - within).astype(np.int32))

    def _random_starts(self, keys: Key[Array, " n"], batch: Sequences) -> Sequences:
        """Takes a sequence out of each stretch, from a random token on."""

        def take(key: Key[Array, ""], tokens: Array) -> Array:
            start = jax.random.randint(key, (), 0, self.length)
            return jax.lax.dynamic_slice_in_dim(tokens, start, self.length + 1)

        return batch._replace(tokens=jax.vmap(take)(keys, jnp.asarray(batch.tokens)))

    def _nats(self, model: nnx.Module, batch: Sequences) -> Float[Array, "n length"]:
        targets = jnp.asarray(batch.tokens)[:, 1:].astype(jnp.int32)
        logits = model(*self.inputs(batch)).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    def _counts(self, batch: Sequences) -> Bool[Array, "n length"]:
        return jnp.arange(self.length) >= jnp.asarray(batch.first)[:, None]


def _sequences(tokens: np.ndarray) -> Sequences:
    """Returns sequences whose targets all count."""
    return Sequences(tokens, np.zeros(len(tokens), np.int32))


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)
