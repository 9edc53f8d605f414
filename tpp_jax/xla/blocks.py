"""Blocks that follow each other, and how a deep network of them is compiled.

XLA compiles every block anew, however many are alike, and of hundreds of them there is
no end to it. Where there are many and the backend runs loops well, alike blocks are
therefore rolled into a loop, which is compiled once.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from tpp_jax.xla.convolution import held

ROLLED_FROM = 50
"""So many alike blocks in a row are rolled; fewer, up to ResNet-152's 35, are not."""


class Blocks(nnx.List):
    """A list of modules, each applied to what the one before returned.

    Args:
      modules: with equal inputs and outputs where they are to be rolled.

    Example:
      >>> blocks = Blocks([nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i in range(3)])
      >>> blocks(jnp.ones((5, 2))).shape
      (5, 2)
    """

    rolled_from: int | None = None  # how many alike in a row are rolled, if any
    hold: bool = False  # whether what each hands on is held

    def __call__(self, x: Any) -> Any:
        """Applies all modules in their order."""
        if self.rolled_from is None:
            for module in self:
                x = held(module(x)) if self.hold else module(x)
            return x
        for _, alike in itertools.groupby(self, _structure):
            modules = list(alike)
            if len(modules) >= self.rolled_from:
                x = _roll(modules, x)
            else:
                for module in modules:
                    x = module(x)
        return x


def roll_blocks(model: nnx.Module, rolled_from: int = ROLLED_FROM) -> None:
    """Makes a model's alike blocks be compiled once, where there are many in a row.

    Changes :class:`Blocks` in place, and not on the CPU, where XLA runs a convolution
    inside a loop some 80 times slower: to be done to the copy in a compiled step. The
    numbers are the same up to float rounding.

    Args:
      model: any module.
      rolled_from: how many alike blocks in a row are rolled.
    """
    if jax.default_backend() == "cpu":
        return
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Blocks):
            module.rolled_from = rolled_from


def hold_blocks(model: nnx.Module) -> None:
    """Makes what a block hands on be computed once, in the evaluation of a model.

    In a residual network a block adds to what it was handed. XLA's CPU backend fuses
    the sum with those of all blocks before, and makes it anew in each block: a third of
    the time of a pruned network. (In a training step too, but there what is held for
    the backward pass costs 14 % more memory and saves 1 % of the time.)

    Changes :class:`Blocks` in place, on the CPU only: to be done to the copy in a
    compiled step. The numbers are the same.
    """
    if jax.default_backend() != "cpu":
        return
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Blocks):
            module.hold = True


def _structure(module: nnx.Module) -> Any:
    """Equal for modules that one program can compute."""
    graphdef, state = nnx.split(module)
    return graphdef, [(x.shape, x.dtype) for x in jax.tree.leaves(state)]


def _roll(modules: Sequence[nnx.Module], x: Any) -> Any:
    """Applies alike modules in a loop; each keeps what it noted (batch statistics)."""
    graphdef = nnx.graphdef(modules[0])
    states = [nnx.split(module, nnx.Param, ...)[1:] for module in modules]
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *states)

    def body(x: Any, state: Any) -> tuple[Any, Any]:
        module = nnx.merge(graphdef, *state, copy=True)
        x = module(x)
        return x, nnx.split(module, nnx.Param, ...)[2]

    x, noted = lax.scan(body, x, stacked)
    for i, module in enumerate(modules):
        nnx.update(module, jax.tree.map(lambda each, i=i: each[i], noted))
    return x
