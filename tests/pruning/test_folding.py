"""Batch norms folded into the kernels before them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

import tpp_jax as tpp
from tests.reference import filled
from tests.small_net import Net

IMAGES = (2, 5, 5, 4)


def conv(p, x, layout=("NHWC", "HWIO", "NHWC"), **kwargs):
    return lax.conv_general_dilated(
        x, p["kernel"], kwargs.pop("strides", (1, 1)), "SAME", **kwargs,
        dimension_numbers=layout,
    )  # fmt: skip


def transposed(p, x):
    return lax.conv_transpose(x, p["kernel"], (2, 2), "SAME", transpose_kernel=True)


# Name → the shape of the kernel, the product with it, and the axis of the channels.
KERNELS = {
    "convolution": ((3, 3, 4, 6), lambda p, x: conv(p, x, strides=(2, 2)), -1),
    "depthwise": ((3, 3, 1, 4), lambda p, x: conv(p, x, feature_group_count=4), -1),
    "grouped": ((3, 3, 2, 6), lambda p, x: conv(p, x, feature_group_count=2), -1),
    "transposed": ((3, 3, 6, 4), transposed, -1),
    "PyTorch's layout": (
        (6, 4, 3, 3),
        lambda p, x: conv(p, x.transpose(0, 3, 1, 2), ("NCHW", "OIHW", "NCHW")),
        1,
    ),
    "dense": ((4, 6), lambda p, x: x @ p["kernel"], -1),
    "on the left": ((6, 4), lambda p, x: p["kernel"] @ x.reshape(-1, 4).T, 0),
    "transposed matrix": ((6, 4), lambda p, x: x @ p["kernel"].T, -1),
    "flattened": ((100, 6), lambda p, x: x.reshape(2, -1) @ p["kernel"], -1),
    "with a bias": ((4, 6), lambda p, x: x @ p["kernel"] + p["own_bias"], -1),
    "one for each row": (
        (5, 4, 6),
        lambda p, x: jnp.einsum("bhwc,hcd->bhwd", x, p["kernel"]),
        -1,
    ),
    "in other axes": (
        (4, 6),
        lambda p, x: (x @ p["kernel"]).reshape(2, 25, 6).transpose(2, 0, 1)[:, :, 1:],
        0,
    ),
}


def usual(p, x):
    return (x - p["mean"]) * (lax.rsqrt(p["var"] + 1e-5) * p["scale"]) + p["bias"]


def two_steps(p, x):
    return (x - p["mean"]) / jnp.sqrt(p["var"] + 1e-3) * p["scale"] + p["bias"]


def factor_first(p, x):
    factor = p["scale"] / jnp.sqrt(p["var"] + 1e-5)
    return x * factor + (p["bias"] - p["mean"] * factor)


NORMS = {
    "usual": usual,
    "in two steps": two_steps,
    "the factor first": factor_first,
    "without scale": lambda p, x: usual(p | {"scale": 1.0}, x),
    "without bias": lambda p, x: usual(p | {"bias": 0.0}, x),
    "fixed statistics": lambda p, x: usual(p | {"mean": 0.5, "var": 3.0}, x),
    "one plus a scale": lambda p, x: x * (1 + p["scale"]) + p["bias"],
    "the logarithm of a scale": lambda p, x: p["bias"] - x * jnp.exp(p["scale"]),
    "only a scale": lambda p, x: x * p["scale"],
    "a number for all": lambda p, x: x * p["scale"][0] + p["bias"],
    "followed by numbers": lambda p, x: 2.0 * usual(p, x) + 1.0,
}
PAIRS = [(kernel, "usual") for kernel in KERNELS]
PAIRS += [("with a bias", norm) for norm in NORMS]
PAIRS += [("convolution", "the factor first"), ("transposed", "in two steps")]


def drawn(shape, width, axis=-1, rank=4):
    """Parameters of a kernel and of a norm behind it."""
    rng = np.random.default_rng(0)
    ones = [1] * rank
    ones[axis] = width
    params = {"kernel": rng.normal(size=shape), "own_bias": rng.normal(size=width)}
    params |= {name: rng.normal(size=ones) for name in ("mean", "scale", "bias")}
    params["var"] = rng.uniform(0.01, 4, ones)
    return {name: np.asarray(leaf, np.float32) for name, leaf in params.items()}


def images(seed=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=IMAGES), jnp.float32)


def assert_close(found, expected):
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found / largest, expected / largest, atol=1e-5)


@pytest.mark.parametrize(("kernel", "norm"), dict.fromkeys(PAIRS))
def test_kernels_of_all_kinds_take_up_norms_of_all_kinds(kernel, norm):
    shape, product, axis = KERNELS[kernel]
    made = jax.eval_shape(
        lambda x: product(drawn(shape, 1), x), jax.ShapeDtypeStruct(IMAGES, "float32")
    )
    params = drawn(shape, made.shape[axis], axis, len(made.shape))

    def net(p, x):
        return NORMS[norm](p, product(p, x))

    folded = tpp.fold_norms(net, jax.ShapeDtypeStruct(IMAGES, "float32"), params=params)
    assert_close(net(folded, images()), net(params, images()))
    # What is left of the norm adds a number to each channel.
    last = {"followed by numbers": 2.0, "the logarithm of a scale": -1.0}.get(norm, 1.0)
    x = jnp.asarray(np.random.default_rng(2).integers(-8, 8, made.shape), jnp.float32)
    added = NORMS[norm](folded, jnp.zeros_like(x))
    assert_close(NORMS[norm](folded, x) - added, last * x)


def test_an_nnx_module_is_not_modified_and_comes_back_in_evaluation_mode():
    net = filled(lambda: Net(6))
    before = jax.tree.map(np.array, nnx.state(net))
    folded = tpp.fold_norms(net, jnp.ones((1, 3)))
    norm = folded.norm
    assert (norm.mean[...] == 0).all()
    assert (norm.scale[...] == 1).all()
    assert (lax.rsqrt(norm.var[...] + norm.epsilon) == 1).all()
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(net))
    assert not net.norm.use_running_average
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    found = folded(x)  # and no call of eval()
    net.eval()
    assert_close(found, net(x))


def test_a_folded_model_is_folded_into_itself():
    once = tpp.fold_norms(filled(lambda: Net(6)), jnp.ones((1, 3)))
    twice = tpp.fold_norms(once, jnp.ones((1, 3)))
    pairs = nnx.state(once), nnx.state(twice)
    jax.tree.map(np.testing.assert_array_equal, *pairs)


def test_channels_of_scale_zero_become_kernels_of_zeros():
    params = drawn((4, 6), 6, rank=2)
    params["scale"][0, 2] = 0

    def net(p, x):
        return usual(p, x @ p["kernel"])

    x = images()[0, 0]
    folded = tpp.fold_norms(net, x, params=params)
    assert (folded["kernel"][:, 2] == 0).all()
    assert (folded["scale"] == 1).all()
    assert_close(net(folded, x), net(params, x))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.Conv(6, (3, 3), use_bias=False)(x)
        x = linen.BatchNorm(use_running_average=not train)(x)
        x = linen.Dense(5)(linen.relu(x))
        return linen.BatchNorm(use_running_average=not train, use_scale=False)(x)


def test_variables_of_a_linen_module():
    net = LinenNet()
    shapes = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, False), images())
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.2, 1, x.shape), x.dtype), shapes
    )
    folded = tpp.fold_norms(net, images(), params=variables, train=False)
    assert jax.tree.structure(folded) == jax.tree.structure(variables)
    assert (folded["batch_stats"]["BatchNorm_0"]["mean"] == 0).all()
    assert (folded["params"]["BatchNorm_0"]["scale"] == 1).all()
    found = jax.jit(net.apply, static_argnums=2)(folded, images(3), False)
    assert_close(found, net.apply(variables, images(3), False))


def test_a_pruned_network_and_one_in_half_precision():
    net = filled(lambda: tpp.models.create("cifar_resnet8", rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    small = tpp.prune(net, tpp.make_plan(tpp.channel_groups(net, x), net, 0.5))
    folded = tpp.fold_norms(small, x)
    assert all(norm.reason is None for norm in tpp.find_norms(folded, x))
    small.eval()
    assert_close(nnx.jit(folded)(x), nnx.jit(small)(x))
    graphdef, state = nnx.split(small)
    half = nnx.merge(
        graphdef, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), state)
    )
    tpp.fold_norms(half, x.astype("bfloat16"))


@pytest.mark.parametrize("name", ["cifar_resnet56", "mobilenet_v2", "cifar_vgg11"])
def test_all_norms_of_these_networks_can_be_folded(name):
    net = filled(lambda: tpp.models.create(name, rngs=nnx.Rngs(0)))
    norms = tpp.find_norms(net, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    layers = {
        ".".join(map(str, path))
        for path, module in nnx.iter_modules(net)
        if isinstance(module, nnx.BatchNorm)
    }
    assert {norm.name for norm in norms} == layers
    assert [norm.reason for norm in norms if norm.reason] == []


def in_a_loop(p, x):
    return lax.scan(lambda x, own: (usual(own, x @ own["kernel"]), None), x, p)[0]


# What is done to rows of four numbers → the reason why nothing is folded.
LEFT = {
    "kernel is also used": lambda p, x: usual(p, x @ p["kernel"]) @ p["kernel"],
    "kernel is also used ": lambda p, x: (usual(p, x @ p["kernel"]), p["kernel"]),
    "scale is also used": lambda p, x: jnp.tanh(usual(p, x @ p["kernel"])) * p["scale"],
    "mean is also used": lambda p, x: jnp.tanh(usual(p, x @ p["kernel"])) + p["mean"],
    "the kernel is also read": lambda p, x: usual(p, y := x @ p["kernel"]) + y,
    "a result of add": lambda p, x: usual(p, x + x @ p["kernel"]),
    "a result of tanh": lambda p, x: usual(p, jnp.tanh(x @ p["kernel"])),
    "before all products": lambda p, x: usual(p, x) @ p["kernel"],
    "do the same to all": lambda p, x: (x @ p["kernel"]) * p["square"],
    "several parameters": lambda p, x: usual(p, x @ (p["kernel"] * p["square"])),
    "kernel by abs": lambda p, x: usual(p, x @ jnp.abs(p["kernel"])),
    "can hold": lambda p, x: (x @ p["kernel"] + 1.0) * p["scale"],
    "multiplies by 1": lambda p, x: (x @ p["kernel"]) * jnp.cosh(p["scale"] + 1),
    "a result of split": lambda p, x: usual(p, jnp.split(x @ p["kernel"], 2)[0]),
    "reduce_max": lambda p, x: usual(p, (x @ p["kernel"]).max(0)),
    "not finite": lambda p, x: (x @ p["kernel"]) * jnp.log(p["scale"] * 0),
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_is_not_a_norm_behind_its_own_kernel_is_left_and_named(reason):
    params = drawn((4, 4), 4, rank=2) | {"square": np.ones((4, 4), np.float32)}
    rows = images()[0, 0, :4]
    norms = tpp.find_norms(LEFT[reason], rows, params=params)
    assert any(reason.strip() in (norm.reason or "") for norm in norms), norms
    assert not any(norm.kernel for norm in norms)
    with pytest.raises(tpp.TPPError, match="no norm can be folded"):
        tpp.fold_norms(LEFT[reason], rows, params=params)


def test_the_first_of_two_norms_is_folded_though_the_second_is_shared():
    def net(p, x):
        y = usual(p, x @ p["kernel"]) * p["own_bias"]
        return jnp.tanh(y) * p["own_bias"]

    params = drawn((4, 6), 6, rank=2)
    norms = tpp.find_norms(net, images(), params=params)
    assert [norm[:2] for norm in norms] == [
        ("scale, var", "kernel"),
        ("own_bias", None),
    ]
    folded = tpp.fold_norms(net, images(), params=params)
    np.testing.assert_array_equal(folded["own_bias"], params["own_bias"])
    assert_close(net(folded, images()), net(params, images()))


def test_loops_are_left_and_a_model_without_norms_is_refused():
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), drawn((4, 4), 4, rank=2))
    with pytest.raises(tpp.TPPError, match="there is no norm to fold"):
        tpp.fold_norms(in_a_loop, images()[0, 0], params=stacked)


def test_abstract_parameters_are_refused():
    net = nnx.eval_shape(lambda: Net(6))
    with pytest.raises(tpp.TPPError, match="these are abstract"):
        tpp.fold_norms(net, jnp.ones((1, 3)))
