"""How random numbers and their keys tie positions together; see rules.py.

Noise has no channels of its own: it is drawn anew for whatever width it is asked for,
so its axes take on what they meet. But it is not zero where the channels are, so zeros
in their place are not the same as their absence.
"""

import numpy as np

from tpp_jax.graph.labels import Axes, Labels
from tpp_jax.graph.unfolding import Equation


def random_bits(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    # One array of noise for each key.
    keys = operands[0]
    first = len(keys)
    return [[*keys, *_noise(labels, eqn.outputs[0], shapes[0][first:], first)]]


def rng_bit_generator(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    return [list(operands[0]), _noise(labels, eqn.outputs[1], shapes[1])]


def rng_uniform(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    return [_noise(labels, eqn.outputs[0], shapes[0])]


def threefry(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    """Noise made of counters: where these are positions, any width will do."""
    out = []
    for i, n in enumerate(shapes[0]):
        met = [axes[i] for axes in operands if len(axes) > i and len(axes[i]) == n]
        loose = [axis for axis in met if (axis >= 0).any()]
        for axis in loose[1:]:
            labels.tie(loose[0], axis)
        out.append(loose[0] if loose else _noise(labels, eqn.outputs[0], (n,), i)[0])
    return [out for _ in shapes]


def _noise(
    labels: Labels, value: int, shape: tuple[int, ...], first: int = 0
) -> list[np.ndarray]:
    """Returns labels for some axes of a value, which are supposed to take any size.

    Args:
      labels: to be added to.
      value: number of the value.
      shape: the sizes of these axes.
      first: number of the first of them.
    """
    found = []
    for axis, n in enumerate(shape, first):
        own = labels.fresh(n)
        if n > 1:
            labels.suppose(own, axis)
            labels.reduced.append(own)
            labels.noise.append(own)
        found.append(own)
    return found


def random_split(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    keys = operands[0]
    more = [labels.stuck(n, "random keys") for n in shapes[0][len(keys) :]]
    return [[*keys, *more]]


def random_wrap(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    """A key made of its numbers, which are the last axis."""
    rank = len(shapes[0])
    labels.fix_all([operands[0][rank:]], "random keys")
    return [operands[0][:rank]]


def random_unwrap(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    keys = operands[0]
    numbers = [labels.stuck(n, "random keys") for n in shapes[0][len(keys) :]]
    return [[*keys, *numbers]]


def bitcast(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    """The same bits read as another type: wider types have an axis less."""
    axes, rank = operands[0], len(shapes[0])
    reason = "the bits of a number"
    labels.fix_all([axes[rank:]], reason)
    more = [labels.stuck(n, reason) for n in shapes[0][len(axes) :]]
    return [[*axes[:rank], *more]]
