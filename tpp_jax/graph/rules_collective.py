"""How what devices exchange ties positions together; see rules.py.

Inside of a ``shard_map`` every device has its part of an array. The positions of all
parts that are at the same place go together: the devices keep equal shapes.
"""

import functools

import numpy as np

from tpp_jax.graph.labels import Axes, Labels
from tpp_jax.graph.unfolding import Equation

_ALONG = "an axis along which devices exchange their parts"


def shard(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    """One device's part of an array."""
    shards = eqn.params["shards"]
    axes = enumerate(zip(operands[0], shards, strict=True))
    return [[_part(labels, axis, parts, i) for i, (axis, parts) in axes]]


def unshard(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    """The parts of all devices, put together."""
    shards = eqn.params["shards"]
    pairs = zip(operands[0], shards, strict=True)
    return [[np.tile(axis, n) if n > 1 else axis for axis, n in pairs]]


def all_gather(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    out = list(operands[0])
    along, parts = eqn.params["all_gather_dimension"], eqn.params["axis_size"]
    if eqn.params["tiled"]:
        out[along] = np.tile(out[along], parts)
        labels.suppose(out[along])
    else:
        out.insert(along, labels.stuck(parts, _ALONG))
    return [out]


def reduce_scatter(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    out = list(operands[0])
    along, parts = eqn.params["scatter_dimension"], eqn.params["axis_size"]
    if eqn.params["tiled"]:
        out[along] = _part(labels, out[along], parts, 0)
    else:
        labels.fix(out.pop(along), _ALONG)
    return [out]


def all_to_all(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    moved = {eqn.params["split_axis"], eqn.params["concat_axis"]}
    out = []
    for i, (axis, n) in enumerate(zip(operands[0], shapes[0], strict=True)):
        if i in moved:
            labels.fix(axis, _ALONG)
            axis = labels.stuck(n, _ALONG)
        out.append(axis)
    return [out]


def axis_index(
    labels: Labels, eqn: Equation, operands: list[Axes], shapes: list[tuple[int, ...]]
) -> list[Axes]:
    return [[]]


def _part(labels: Labels, axis: np.ndarray, parts: int, which: int) -> np.ndarray:
    if parts == 1:
        return axis
    labels.suppose(axis, which)
    return functools.reduce(labels.tie, np.split(axis, parts))
