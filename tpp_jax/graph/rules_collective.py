"""How the primitives by which devices exchange data tie positions; see rules.py.

Inside a ``shard_map`` every device has its part of an array. Positions at the same
place of all parts are tied: the devices keep equal shapes.
"""

import numpy as np

from tpp_jax.graph.context import Context
from tpp_jax.graph.labels import Axes, Axis

_ALONG = "an axis along which devices exchange their parts"


def shard(ctx: Context) -> list[Axes]:
    """One device's part of an array."""
    pairs = zip(ctx.operands[0], ctx.params["shards"], strict=True)
    return [[_part(ctx, axis, parts, i) for i, (axis, parts) in enumerate(pairs)]]


def unshard(ctx: Context) -> list[Axes]:
    """The parts of all devices, put together."""
    pairs = zip(ctx.operands[0], ctx.params["shards"], strict=True)
    return [[np.tile(axis, n) if n > 1 else axis for axis, n in pairs]]


def all_gather(ctx: Context) -> list[Axes]:
    """The arrays of all devices, concatenated or stacked."""
    out = list(ctx.operands[0])
    along, parts = ctx.params["all_gather_dimension"], ctx.params["axis_size"]
    if ctx.params["tiled"]:
        out[along] = np.tile(out[along], parts)
        ctx.suppose(out[along])
    else:
        out.insert(along, ctx.fixed(parts, _ALONG))
    return [out]


def reduce_scatter(ctx: Context) -> list[Axes]:
    """A sum over all devices, of which each keeps a part."""
    out = list(ctx.operands[0])
    along, parts = ctx.params["scatter_dimension"], ctx.params["axis_size"]
    if ctx.params["tiled"]:
        out[along] = _part(ctx, out[along], parts, 0)
    else:
        ctx.fix(out.pop(along), _ALONG)
    return [out]


def all_to_all(ctx: Context) -> list[Axes]:
    """Parts along one axis exchanged for parts along another."""
    moved = {ctx.params["split_axis"], ctx.params["concat_axis"]}
    out = []
    for i, (axis, n) in enumerate(zip(ctx.operands[0], ctx.shapes[0], strict=True)):
        if i in moved:
            ctx.fix(axis, _ALONG)
            out.append(ctx.fixed(n, _ALONG))
        else:
            out.append(axis)
    return [out]


def axis_index(ctx: Context) -> list[Axes]:
    """The number of a device, a scalar."""
    del ctx
    return [[]]


def _part(ctx: Context, axis: Axis, parts: int, which: int) -> Axis:
    """Returns one of several equal parts of an axis, all tied to each other."""
    if parts == 1:
        return axis
    ctx.suppose(axis, which)
    return ctx.tie_all(np.split(axis, parts))
