"""A function of a tree of parameters that a mesh divides, quick to compile."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.sharded.decoder import Case, place

_SIZES = {"w1": (6, 16), "b1": (16,), "w2": (16, 24), "b2": (24,), "w3": (24, 4)}
_SPECS = {
    "w1": P(None, "model"),
    "b1": P("model"),
    "w2": P("model", "data"),
    "b2": P("data"),
    "w3": P(("data", "model")),
}
RATIOS = {"w1": 0.25, "w2": 0.5}


def call(params, x):
    x = jnp.tanh(x @ params["w1"] + params["b1"])
    return jnp.tanh(x @ params["w2"] + params["b2"]) @ params["w3"]


def loss(params, x):
    return jnp.mean(jnp.square(call(params, x) - 1))


def on_one_device():
    rng = np.random.default_rng(0)
    draw = {name: rng.normal(size=shape) for name, shape in _SIZES.items()}
    params = {name: jnp.asarray(x, jnp.float32) for name, x in draw.items()}
    return Case(call, params, jnp.asarray(rng.normal(size=(64, 6)), jnp.float32), loss)


def divided(mesh):
    """The same, divided over a mesh with the axes ``data`` and ``model``."""
    case = on_one_device()
    params = {
        name: place(leaf, NamedSharding(mesh, spec_of(name)))
        for name, leaf in case.params.items()
    }
    x = place(case.tokens, NamedSharding(mesh, P("data")))
    fns = [call, loss]
    if AxisType.Explicit in mesh.axis_types:
        outs = [NamedSharding(mesh, spec) for spec in (P("data"), P())]
        fns = [
            jax.sharding.auto_axes(fn, out_sharding=out)
            for fn, out in zip(fns, outs, strict=True)
        ]
    return Case(fns[0], params, x, fns[1], mesh)


def spec_of(name):
    """The division of a parameter."""
    return _SPECS[name]
