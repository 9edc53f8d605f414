"""Training of a language model in sittings, for the table of a pruned language model.

A run that is interrupted continues from its last checkpoint and ends with the same
numbers: the order of the text depends on the seed and the step alone.
"""

import os
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import tpp_jax as tpp
from tpp_jax.data.text import Text
from tpp_jax.method.gram import Target
from tpp_jax.saving import with_arrays
from tpp_jax.training.distillation import Teacher
from tpp_jax.training.language import LanguageModelling
from tpp_jax.training.optimizers import optimizer
from tpp_jax.training.state import arrays_of, initial_state, unprefixed, with_state
from tpp_jax.training.step import StepConfig, make_train_step
from tpp_jax.training.structure import structure_of

LENGTH, BATCH = 256, 2
CHECKPOINT_EVERY, LOG_EVERY = 50, 10
MOMENTUM, DECAY = 0.9, 0.01


class Taught(NamedTuple):
    """How a network is distilled.

    Attributes:
      teacher: Network that it learns from.
      weight: Share of the distillation in the loss.
      activations: Patterns of the layers whose outputs are distilled too.
    """

    teacher: nnx.Module
    weight: float = 0.5
    activations: str = ""


class Trainer:
    """Trains networks on one text.

    Args:
      tokens: Text to train on.
      vocabulary: Number of tokens that exist.
      folder: Folder of the checkpoints.
    """

    def __init__(
        self, tokens: np.ndarray, vocabulary: int, folder: pathlib.Path
    ) -> None:
        ids = tokens.astype(np.min_scalar_type(vocabulary - 1))
        text = Text(ids, ids[: LENGTH + 1], vocabulary, bytes_per_token=1.0)

        def none(rngs: nnx.Rngs) -> nnx.Module:
            raise NotImplementedError("networks are read from files here")

        self.task = LanguageModelling(text, none, LENGTH, BATCH)
        self.feed = self.task.feed(jax.devices()[:1])
        self.folder = folder

    def __call__(
        self,
        model: nnx.Module,
        tx: optax.GradientTransformation,
        steps: int,
        seed: int,
        name: str,
        taught: Taught | None = None,
    ) -> nnx.Module:
        """Returns a network after some steps; continues from a checkpoint.

        Args:
          model: Network to start from.
          tx: Optimizer.
          steps: Number of steps.
          seed: Seed of the order of the text.
          name: Name of the checkpoint.
          taught: What is distilled; None for the next token alone.
        """
        file = self.folder / f"{name}.npz"
        arrays, done = None, 0
        if file.exists():
            with np.load(file) as found:
                arrays = dict(found)
            done = int(arrays.pop("step"))
            model = with_arrays(model, unprefixed(arrays, "model."))
        teacher = None if taught is None else taught.teacher
        state = initial_state(model, tx, False, done, arrays, teacher)
        del arrays
        step = make_train_step(
            structure_of(model, training=True),
            tx,
            self.task.loss,
            StepConfig(),
            self.feed.train_batch,
            teacher=_settings(taught),
        )
        run = jax.jit(step, donate_argnums=0)
        self.feed.begin(jax.random.key(seed), done)
        before, losses = time.perf_counter(), []
        for i in range(done, steps):
            data = self.feed.train_data(i)
            state, metrics = run(state, jax.random.key(seed), *data)
            losses.append(metrics["loss"])
            if (i + 1) % LOG_EVERY == 0:
                mean = float(jnp.stack(losses).mean())
                pace = (time.perf_counter() - before) / len(losses)
                print(f"{name} {i + 1}/{steps} {mean:.4f} {pace:.1f} s", flush=True)
                before, losses = time.perf_counter(), []
            if (i + 1) % CHECKPOINT_EVERY == 0 or i + 1 == steps:
                _keep(file, arrays_of(state), i + 1)
        return with_state(model, state)

    def forget(self, name: str) -> None:
        """Deletes the checkpoints whose names begin with some text."""
        for file in self.folder.glob(f"{name}*.npz"):
            file.unlink()


def _settings(taught: Taught | None) -> Teacher | None:
    if taught is None:
        return None
    structure = structure_of(taught.teacher, training=False)
    return Teacher(structure, taught.weight, 1.0, taught.activations)


def _keep(file: pathlib.Path, arrays: dict[str, Any], step: int) -> None:
    """Writes a checkpoint that is complete or not there."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.savez(stream, step=step, **jax.device_get(arrays))
    os.replace(partial, file)


def falling(rate: float, steps: int) -> optax.GradientTransformation:
    """Returns AdamW with a rate that rises for a tenth and falls to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(steps // 10, 1), steps)
    return optimizer("adamw", schedule, momentum=MOMENTUM, weight_decay=DECAY)


def penalized(
    plan: tpp.Plan,
    schedule: tpp.GrowingSchedule,
    rate: float,
    gram_weight: float,
    target: Target,
) -> optax.GradientTransformation:
    """Returns AdamW with TPP's penalties behind its moments, at a constant rate."""
    penalty = tpp.add_tpp_penalties(plan, schedule, gram_weight, target=target)
    return optimizer(
        "adamw", rate, momentum=MOMENTUM, weight_decay=DECAY, penalty=penalty
    )
