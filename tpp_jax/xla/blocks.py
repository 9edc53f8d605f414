"""Sequences of blocks, and how a deep network of them is compiled.

XLA compiles every block separately, even if all are identical, which takes very long
for hundreds of them. Where there are many and the backend runs loops well, identical
blocks are therefore rolled into a loop, which is compiled once.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from tpp_jax.xla.holding import held

ROLLED_FROM = 50
"""Least number of identical blocks in a row to roll; ResNet-152 has 35 at most."""


class Blocks(nnx.List):
    """A list of modules, each applied to the output of the one before.

    Args:
      modules: The modules, in order. A module that is to be rolled has outputs of the
        same shape as its inputs.

    Attributes:
      rolled_from: Least number of identical modules in a row to roll into a loop; None
        to roll none.
      hold: Whether the output of each module is computed once and kept.

    Example:
      >>> blocks = Blocks([nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i in range(3)])
      >>> blocks(jnp.ones((5, 2))).shape
      (5, 2)
    """

    rolled_from: int | None = None
    hold: bool = False

    def __call__(self, x: Any) -> Any:
        """Applies all modules in order."""
        if self.rolled_from is None:
            x = held(x) if self.hold else x
            for module in self:
                x = held(module(x)) if self.hold else module(x)
            return x
        for _, identical in itertools.groupby(self, _structure):
            modules = list(identical)
            if len(modules) >= self.rolled_from:
                x = _roll(modules, x)
            else:
                for module in modules:
                    x = module(x)
        return x


def roll_blocks(model: nnx.Module, rolled_from: int = ROLLED_FROM) -> None:
    """Rolls long sequences of identical blocks into loops that are compiled once.

    Changes the :class:`Blocks` of the model in place, so apply it to the copy of the
    model inside a compiled step. Does nothing on the CPU, where XLA runs a convolution
    inside a loop some 80 times slower. Results are the same up to float rounding.

    Args:
      model: Any module.
      rolled_from: Least number of identical blocks in a row to roll.
    """
    if jax.default_backend() == "cpu":
        return
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Blocks):
            module.rolled_from = rolled_from


def hold_blocks(model: nnx.Module) -> None:
    """Makes XLA compute the output of each block once, for the evaluation of a model.

    In a residual network a block adds to its input. XLA's CPU backend fuses the sum
    with those of all earlier blocks and recomputes it in each block: a third of the
    time of a pruned network. (It does so in a training step too, but keeping the
    outputs for the backward pass costs 14 % more memory and saves 1 % of the time.)

    Changes the :class:`Blocks` of the model in place, on the CPU only, so apply it to
    the copy of the model inside a compiled step. Results are the same.

    Args:
      model: Any module.
    """
    if jax.default_backend() != "cpu":
        return
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Blocks):
            module.hold = True


def _structure(module: nnx.Module) -> Any:
    """Returns a value that is equal for modules that one program can compute."""
    graphdef, state = nnx.split(module)
    return graphdef, [(x.shape, x.dtype) for x in jax.tree.leaves(state)]


def _roll(modules: Sequence[nnx.Module], x: Any) -> Any:
    """Applies identical modules in a loop; each keeps its state (batch statistics)."""
    graphdef = nnx.graphdef(modules[0])
    states = [nnx.split(module, nnx.Param, ...)[1:] for module in modules]
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *states)

    def body(x: Any, state: Any) -> tuple[Any, Any]:
        module = nnx.merge(graphdef, *state, copy=True)
        x = module(x)
        return x, nnx.split(module, nnx.Param, ...)[2]

    x, new_states = lax.scan(body, x, stacked)
    for i, module in enumerate(modules):
        nnx.update(module, jax.tree.map(lambda each, i=i: each[i], new_states))
    return x
