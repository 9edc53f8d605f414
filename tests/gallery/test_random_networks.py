"""Networks put together at random: what holds of groups holds on all of them."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import tpp_jax as tpp
from tpp_jax.graph.naming import named_leaves

IMAGES = (2, 4, 4, 3)


class Builder:
    """Draws parameters by name the first time that a network runs, as shapes ask."""

    def __init__(self):
        self.params = {}
        self.rng = np.random.default_rng(0)

    def array(self, name, *shape):
        if name not in self.params:
            scale = 1 / np.sqrt(np.prod(shape[:-1])) if len(shape) > 1 else 0.3
            self.params[name] = (scale * self.rng.normal(size=shape)).astype(np.float32)
        return self.params[name]


class Given:
    """Hands out the parameters of a network that was drawn before, at any width."""

    def __init__(self, params):
        self.params = params

    def array(self, name, *_):
        return self.params[name]


def conv(p, name, x, width, size=1, groups=1):
    kernel = p.array(f"{name}.kernel", size, size, x.shape[-1] // groups, width)
    if groups > 1:
        groups = x.shape[-1] // kernel.shape[2]
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return y + p.array(f"{name}.bias", width)


def norm(p, name, x):
    scale, bias = (p.array(f"{name}.{kind}", x.shape[-1]) for kind in ("scale", "bias"))
    return x * (1 + scale) + bias


def plain(p, name, x, width):
    return jax.nn.relu(norm(p, f"{name}.norm", conv(p, name, x, width, 3)))


def residual(p, name, x, width):
    y = jax.nn.silu(conv(p, f"{name}.a", x, width))
    return x + conv(p, f"{name}.b", y, x.shape[-1])


def dense_block(p, name, x, width):
    return jnp.concatenate([x, jnp.tanh(conv(p, name, x, width))], axis=-1)


def depthwise(p, name, x, width):
    y = conv(p, f"{name}.expand", x, 2 * width)
    y = jax.nn.relu(conv(p, f"{name}.depthwise", y, 2 * width, 3, groups=2 * width))
    return conv(p, f"{name}.project", y, width)


def excite(p, name, x, width):
    y = jax.nn.relu(x.mean((1, 2)) @ p.array(f"{name}.a.kernel", x.shape[-1], width))
    gate = jax.nn.sigmoid(y @ p.array(f"{name}.b.kernel", width, x.shape[-1]))
    return x * gate[:, None, None]


def gated(p, name, x, width):
    y = conv(p, f"{name}.both", x, 2 * width)
    left, right = jnp.split(y, 2, axis=-1)
    return conv(p, f"{name}.out", jax.nn.gelu(left) * right, width)


def shuffled(p, name, x, width):
    left, right = conv(p, f"{name}.a", x, width), conv(p, f"{name}.b", x, width)
    y = jnp.stack([left, right], axis=-1)
    return y.reshape(*y.shape[:-2], -1)


def layer_norm(p, name, x, width):
    y = conv(p, name, x, width)
    y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + 0.1)
    return norm(p, f"{name}.norm", y)


def attention(p, name, x, width):
    size = 2
    y = x.reshape(x.shape[0], -1, x.shape[-1])
    q, k, v = (
        (y @ p.array(f"{name}.{kind}.kernel", y.shape[-1], 2 * width)).reshape(
            *y.shape[:2], -1, size
        )
        for kind in "qkv"
    )
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*y.shape[:2], -1)
    out = mixed @ p.array(f"{name}.out.kernel", mixed.shape[-1], x.shape[-1])
    return x + out.reshape(x.shape)


def looped(p, name, x, _):
    kernel = p.array(f"{name}.kernel", x.shape[-1], x.shape[-1])
    step = lambda carry, _: (carry + jnp.tanh(carry @ kernel), None)  # noqa: E731
    return jax.lax.scan(step, x, length=2)[0]


BLOCKS = [plain, residual, dense_block, depthwise, excite, gated, shuffled]
BLOCKS += [layer_norm, attention, looped]


def network(blocks, flat):
    def run(p, x):
        x = conv(p, "stem", x, 4)
        for i, (block, width) in enumerate(blocks):
            x = block(p, f"{i}.{block.__name__}", x, width)
        x = x.reshape(x.shape[0], -1) if flat else x.mean((1, 2))
        return x @ p.array("head.kernel", x.shape[-1], 3)

    builder = Builder()
    jax.eval_shape(lambda x: run(builder, x), jax.ShapeDtypeStruct(IMAGES, jnp.float32))
    return lambda params, x: run(Given(params), x), builder.params


@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(st.sampled_from(BLOCKS), st.sampled_from([3, 4, 6])),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_groups_of_random_networks_hold(blocks, flat):
    fn, params = network(blocks, flat)
    images = jax.ShapeDtypeStruct(IMAGES, jnp.float32)
    groups = tpp.channel_groups(fn, images, params=params)
    checks = tpp.check_groups(fn, images, params=params, groups=groups)
    assert checks.masked < 1e-4
    # Every inner layer of every block can be pruned, whatever stands around it.
    for i, (block, _) in enumerate(blocks):
        inner = {residual: "a", depthwise: "expand", excite: "a", gated: "both"}
        if block in inner:
            assert groups[f"{i}.{block.__name__}.{inner[block]}"].reason is None
    # No position of an array belongs to two channels of one group, and none is lost.
    for group in groups:
        for member in group.members:
            taken = member.positions.reshape(-1)
            assert len(np.unique(taken)) == len(taken)
            assert taken.max() < groups.shapes[member.leaf][member.axis]
    produced = {m.leaf for g in groups for m in g.members if m.role == "produced"}
    kernels = {name for name in named_leaves(params) if name.endswith(".kernel")}
    assert {k for k in kernels if "depthwise.depthwise" not in k} <= produced
