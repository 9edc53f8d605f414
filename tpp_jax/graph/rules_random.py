"""How random numbers and their keys tie positions together; see rules.py.

Noise has no channels of its own: as many numbers are drawn as an array has entries, so
the axes of noise take on what they meet. But noise is not zero where the channels are,
so zeros in their place are not the same as their absence.
"""

from tpp_jax.graph.context import Context
from tpp_jax.graph.labels import Axes, Axis

_KEYS = "random keys"


def random_bits(ctx: Context) -> list[Axes]:
    """One array of noise for each key."""
    keys = ctx.operands[0]
    first = len(keys)
    return [[*keys, *_noise(ctx, ctx.shapes[0][first:], first)]]


def rng_bit_generator(ctx: Context) -> list[Axes]:
    """The next key, and noise."""
    return [list(ctx.operands[0]), _noise(ctx, ctx.shapes[1])]


def rng_uniform(ctx: Context) -> list[Axes]:
    """Noise between two numbers."""
    return [_noise(ctx, ctx.shapes[0])]


def threefry(ctx: Context) -> list[Axes]:
    """Noise made of counters: where these are positions, any width will do."""
    out = []
    for i, n in enumerate(ctx.shapes[0]):
        met = [axes[i] for axes in ctx.operands if len(axes) > i and len(axes[i]) == n]
        loose = [axis for axis in met if (axis >= 0).any()]
        for axis in loose[1:]:
            ctx.tie(loose[0], axis)
        out.append(loose[0] if loose else _noise(ctx, (n,), i)[0])
    return [out for _ in ctx.shapes]


def random_split(ctx: Context) -> list[Axes]:
    """Several keys made of each key, or the numbers that it consists of."""
    keys = ctx.operands[0]
    more = [ctx.fixed(n, _KEYS) for n in ctx.shapes[0][len(keys) :]]
    return [[*keys, *more]]


def random_wrap(ctx: Context) -> list[Axes]:
    """Keys made of their numbers, which are the last axis."""
    rank = len(ctx.shapes[0])
    ctx.fix_all(ctx.operands[0][rank:], _KEYS)
    return [ctx.operands[0][:rank]]


def bitcast(ctx: Context) -> list[Axes]:
    """The same bits read as another type: an array of a wider type has an axis less."""
    axes, rank = ctx.operands[0], len(ctx.shapes[0])
    reason = "the bits of a number"
    ctx.fix_all(axes[rank:], reason)
    more = [ctx.fixed(n, reason) for n in ctx.shapes[0][len(axes) :]]
    return [[*axes[:rank], *more]]


def _noise(ctx: Context, shape: tuple[int, ...], first: int = 0) -> list[Axis]:
    """Returns axes of noise, which are supposed to take on any size.

    Args:
      ctx: Operation.
      shape: Sizes of these axes.
      first: Number of the first of them in the result.
    """
    found = []
    for axis, n in enumerate(shape, first):
        own = ctx.fresh(n)
        if n > 1:
            ctx.suppose(own, axis)
            ctx.sum_over(own)
            ctx.labels.noise.append(own)
        found.append(own)
    return found
