"""Jacobian singular values are the recorded ones, and what linear algebra says."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import tpp_jax as tpp
from tests.reference import GOLDEN, filled, section, with_leaves
from tpp_jax.analysis.jacobian import jacobian_singular_values, summarize
from tpp_jax.errors import TPPError
from tpp_jax.graph.naming import named_leaves
from tpp_jax.models import MLP, CifarResNet

MLPS = ("mlp_linear", "mlp_relu", "mlp_linear_after_orthp")


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def dense(params, x):
    """A linear network without biases: its Jacobian is the product of its kernels."""
    x = x.reshape(len(x), -1)
    for name in sorted(params):
        x = x @ params[name]
    return x


extremes = functools.partial(jacobian_singular_values, method="extremes")


def tanh_layer(params, x):
    return jnp.tanh(x) @ params["kernel"]


class ConvNet(nnx.Module):
    """A convolution, a batch norm and a classifier, for images [4, 4, 3]."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.bn(self.conv(x))).reshape(len(x), -1))


def convnet():
    return filled(lambda: ConvNet(nnx.Rngs(0))), draw(3, 4, 4, 3)


def recorded(name, recording, dtype):
    """(the recorded network, its images as ours)."""
    linear = name != "mlp_relu"
    create = {
        "resnet8A_eval": lambda: CifarResNet((1, 1, 1), rngs=nnx.Rngs(0)),
        "jsv": lambda: CifarResNet((1, 1, 1), rngs=nnx.Rngs(0)),
    }.get(
        name,
        lambda: MLP(
            4, image_shape=(8, 8, 1), hidden=20, linear=linear, rngs=nnx.Rngs(0)
        ),
    )
    part = "model" if name == "jsv" else "weights"
    model = with_leaves(filled(create), section(recording, f"{name}/{part}"), dtype)
    return model, jnp.asarray(recording[f"{name}/images"], dtype).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("name", [*MLPS, "resnet8A_eval"])
def test_singular_values_are_the_recorded_ones_in_float64(name):
    kind = "resnet" if "resnet" in name else "mlp"
    recording = np.load(GOLDEN / f"jsv_{kind}.npz")
    with jax.enable_x64(True):
        values = jacobian_singular_values(*recorded(name, recording, jnp.float64))
    expected = recording[f"{name}/jsv_f64"]
    # Values that are rounding errors themselves are no more than that here.
    np.testing.assert_allclose(values, expected, rtol=1e-11, atol=1e-15)
    alive = expected.min(axis=1) > 1e-15
    np.testing.assert_allclose(
        summarize(values).condition_numbers[alive],
        recording[f"{name}/condition_number_f64"][alive],
        rtol=1e-9,
    )


def test_singular_values_are_the_recorded_ones_in_float32():
    recording = np.load(GOLDEN / "unit.npz")
    values = jacobian_singular_values(*recorded("jsv", recording, jnp.float32))
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, recording["jsv/singular_values"], rtol=1e-5)


@settings(max_examples=6)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.integers(0, 99))
def test_those_of_a_linear_network_are_of_the_product_of_its_kernels(widths, seed):
    rng = np.random.default_rng(seed)
    pairs = itertools.pairwise(widths)
    params = {f"w{i}": rng.normal(size=pair) for i, pair in enumerate(pairs)}
    with jax.enable_x64(True):
        values = jacobian_singular_values(dense, draw(3, widths[0]), params=params)
    product = np.linalg.multi_dot([*params.values(), np.eye(widths[-1])])
    expected = np.linalg.svd(product, compute_uv=False)
    assert values.shape == (3, min(widths[0], widths[-1]))
    for image in values:
        np.testing.assert_allclose(image, expected, rtol=1e-9, atol=1e-12)


def test_they_are_of_the_jacobian_that_jax_computes():
    model, images = convnet()
    model.eval()
    values = jacobian_singular_values(model, images)
    # Image by image, out of the Jacobian of the whole batch.
    jacobian = np.asarray(jax.jit(jax.jacrev(model))(images)).reshape(3, 10, 3, -1)
    for i in range(3):
        expected = np.linalg.svd(jacobian[i, :, i], compute_uv=False)
        np.testing.assert_allclose(values[i], expected, rtol=1e-4, atol=1e-6)


def test_how_many_run_at_once_does_not_matter():
    kernel = {"kernel": draw(6, 5)}
    images = draw(7, 6, seed=1)
    whole = jacobian_singular_values(tanh_layer, images, params=kernel)
    for at_once in (3, 11):  # logits in parts, images in parts
        parts = jacobian_singular_values(
            tanh_layer, images, params=kernel, at_once=at_once
        )
        np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_an_image_does_not_depend_on_the_others_and_the_model_is_untouched():
    model, images = convnet()
    model.train()
    before = jax.tree.map(np.array, named_leaves(nnx.state(model)))
    both = jacobian_singular_values(model, images)
    alone = jacobian_singular_values(model, images[1:])
    np.testing.assert_allclose(both[1:], alone, rtol=1e-4, atol=1e-6)
    assert not model.bn.use_running_average
    for name, leaf in named_leaves(nnx.state(model)).items():
        np.testing.assert_array_equal(leaf, before[name])


def test_a_model_is_compiled_once_whatever_its_weights_are():
    traces = []

    class Counted(nnx.Module):
        def __init__(self, width):
            self.dense = nnx.Linear(3, width, rngs=nnx.Rngs(0))

        def __call__(self, x):
            traces.append(x.shape)
            return self.dense(x)

    jacobian_singular_values(Counted(2), draw(2, 3))
    first = len(traces)
    trained = Counted(2)
    trained.dense.kernel[...] = 2 * trained.dense.kernel[...]
    values = jacobian_singular_values(trained, draw(2, 3))
    assert len(traces) == first + 1  # to count its logits, which runs nothing
    expected = jnp.linalg.svd(trained.dense.kernel[...], compute_uv=False)
    np.testing.assert_allclose(values[1], expected, rtol=1e-5)
    jacobian_singular_values(Counted(4), draw(2, 3))
    assert len(traces) > first + 2


def test_a_function_that_holds_weights_of_its_own_is_read_anew():
    held = {"kernel": jnp.eye(3)}

    def function(params, x):
        return x @ held["kernel"] + params["bias"]

    for scale in (1, 2):
        held["kernel"] = scale * jnp.eye(3)
        values = jacobian_singular_values(
            function, draw(1, 3), params={"bias": jnp.zeros(3)}
        )
        np.testing.assert_allclose(values, scale * np.ones((1, 3)), rtol=1e-6)


def test_linen_modules_and_feature_maps_as_outputs_are_measured_too():
    module = linen.Conv(2, (1, 1), use_bias=False)
    images = draw(2, 2, 2, 3)
    variables = module.init(jax.random.key(0), images)
    values = jacobian_singular_values(module, images, params=variables)
    one = jnp.linalg.svd(variables["params"]["kernel"][0, 0], compute_uv=False)
    np.testing.assert_allclose(values[1], jnp.repeat(one, 4), rtol=1e-5)


def test_the_extremes_lie_within_the_exact_ones_and_the_largest_comes_near():
    kernel, images = {"kernel": draw(90, 60) / 10}, draw(2, 90, seed=1)
    exact = jacobian_singular_values(tanh_layer, images, params=kernel)
    largest, smallest = exact[:, 0], exact[:, -1]
    got = extremes(tanh_layer, images, params=kernel, iterations=20)
    assert got.shape == (2, 2)
    assert (got[:, 0] <= largest * (1 + 1e-5)).all()
    assert (got[:, 1] >= smallest * (1 - 1e-5)).all()
    np.testing.assert_allclose(got[:, 0], largest, rtol=2e-3)
    np.testing.assert_allclose(got[:, 1], smallest, rtol=1)


def test_the_extremes_of_a_network_come_near_and_with_a_step_a_logit_are_exact():
    model, images = convnet()
    exact = jacobian_singular_values(model, images)
    ends = exact[:, jnp.array([0, -1])]
    largest = extremes(model, images, iterations=5, at_once=2)[:, 0]
    np.testing.assert_allclose(largest, ends[:, 0], rtol=0.05)
    got = extremes(model, images, iterations=10)
    np.testing.assert_allclose(got, ends, rtol=1e-4, atol=1e-6)


def test_the_extremes_of_an_isometry_are_equal_and_of_a_dead_direction_zero():
    """Where a Krylov space closes early, the search goes on from another direction."""
    q = jnp.linalg.qr(draw(12, 8))[0]

    images = jnp.ones((1, 12))
    for kernel, ends in (
        (3 * q, [3, 3]),
        (q.at[:, :6].set(0), [1, 0]),
        (0 * q, [0, 0]),
    ):
        got = extremes(dense, images, params={"w": kernel}, iterations=7)
        np.testing.assert_allclose(got, [ends], atol=1e-5)


def test_a_summary_is_of_all_values_and_condition_numbers_are_of_images():
    summary = summarize(np.array([[4.0, 2.0], [3.0, 0.0]]))
    assert (summary.mean, summary.min, summary.max) == (2.25, 0.0, 4.0)
    np.testing.assert_allclose(summary.std, np.std([4, 2, 3, 0]))
    np.testing.assert_array_equal(summary.condition_numbers, [2, np.inf])


def test_pruning_shrinks_them_and_the_order_of_magnitude_shows():
    model = filled(
        lambda: MLP(3, image_shape=(4, 4, 1), hidden=32, linear=True, rngs=nnx.Rngs(0))
    )
    images = draw(2, 4, 4, 1)
    groups = tpp.channel_groups(model, images)
    small = tpp.prune(model, tpp.make_plan(groups, model, 0.8))
    before, after = (
        summarize(jacobian_singular_values(m, images)) for m in (model, small)
    )
    assert after.mean < before.mean / 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"at_once": 0}, "at_once is 0, must be at least 1"),
        ({"iterations": 0}, "iterations is 0"),
        ({"method": "auto"}, "unknown method 'auto': choose 'exact' or 'extremes'"),
        ({"images": np.ones((2, 3), np.uint8)}, r"images are uint8\[2, 3\]: pass a"),
        ({"images": np.ones(3, np.float32)}, r"float32\[3\]: pass a batch"),
        ({"images": np.ones((0, 3), np.float32)}, r"float32\[0, 3\]: pass a batch"),
    ],
)
def test_mistakes_are_told(kwargs, message):
    arguments = {"images": np.ones((2, 3), np.float32), "params": {"w": jnp.eye(3)}}
    with pytest.raises(TPPError, match=message):
        jacobian_singular_values(dense, **{**arguments, **kwargs})


def test_a_model_that_returns_more_than_its_logits_is_told():
    def two(params, x):
        return {"logits": dense(params, x), "features": x}

    with pytest.raises(TPPError, match=r"'float32\[1, 3\]'.*only logits"):
        jacobian_singular_values(two, jnp.ones((2, 3)), params={"w": jnp.eye(3)})
    with pytest.raises(TPPError, match=r"float32\[\] for one image"):
        jacobian_singular_values(
            lambda p, x: x.sum(), jnp.ones((2, 3)), params={"w": jnp.eye(3)}
        )
