"""Re-initialised kernels are the recorded ones, and isometries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import tpp_jax as tpp
from tests.reference import GOLDEN, filled, section, with_leaves
from tpp_jax.errors import TPPError
from tpp_jax.graph.naming import named_leaves
from tpp_jax.method.isometry import (
    GAINS,
    RECIPES,
    approximate_isometry,
    delta_orthogonalize,
    kernels_of,
    orthogonalize,
    reinitialize,
)
from tpp_jax.models import MLP, CifarResNet

RECORDED = np.load(GOLDEN / "isometry.npz")
UNIT = np.load(GOLDEN / "unit.npz")
CONVOLUTIONS = ("conv_wide", "conv_tall", "conv1x1_tall", "conv1x1_sq")
KERNELS = (*CONVOLUTIONS, "linear_wide", "linear_tall", "linear_sq")
KEY = jax.random.key(0)


def filters_last(weight):
    return weight.transpose((2, 3, 1, 0) if weight.ndim == 4 else (1, 0))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def gram(kernel):
    """The smaller Gram matrix of the filters."""
    columns = kernel.reshape(-1, kernel.shape[-1])
    wide = columns.shape[0] >= columns.shape[1]
    return columns.T @ columns if wide else columns @ columns.T


def assert_near(ours, theirs, rtol):
    """Relative to the largest entry: single ones cancel to nearly nothing."""
    np.testing.assert_allclose(ours, theirs, rtol, rtol * np.abs(theirs).max())


@pytest.mark.parametrize("name", KERNELS)
def test_orthp_is_the_recorded_one_for_every_activation(name):
    kernel = filters_last(RECORDED[f"{name}/w"])
    got = jax.jit(lambda k: {a: orthogonalize(k, a) for a in GAINS})(kernel)
    for activation, fresh in got.items():
        expected = filters_last(RECORDED[f"{name}/orthogonalize_{activation}"])
        assert_near(fresh, expected, 5e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_orthp_is_the_recorded_one_in_float64(name):
    with jax.enable_x64(True):
        kernel = jnp.asarray(filters_last(RECORDED[f"{name}/w"]), jnp.float64)
        got = jax.jit(orthogonalize)(kernel)
    assert_near(got, filters_last(RECORDED[f"{name}/orthogonalize_relu_f64"]), 1e-13)


@pytest.mark.parametrize("name", ["conv3x3", "conv1x1", "linear", "wide"])
def test_orthp_of_the_penalties_kernels_is_the_recorded_one(name):
    kernel = filters_last(UNIT[f"{name}/weight"])
    got = jax.jit(orthogonalize)(kernel)
    assert_near(got, filters_last(UNIT[f"{name}/orthp_relu"]), 5e-6)
    assert_near(got / 2**0.5, filters_last(UNIT[f"{name}/orthp_linear"]), 5e-6)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_delta_orthogonal_is_the_recorded_one(name):
    kernel = filters_last(RECORDED[f"{name}/w"])
    got = jax.jit(delta_orthogonalize)(kernel, RECORDED[f"{name}/delta_gauss"])
    expected = filters_last(RECORDED[f"{name}/delta_orthogonalize_relu"])
    assert_near(got, expected, 5e-6)


@pytest.mark.parametrize("name", ["0", "1"])
def test_approximate_isometry_is_the_recorded_one(name):
    kernel = filters_last(RECORDED[f"AI_before/{name}.weight"])
    expected = filters_last(RECORDED[f"AI_after40_lr0.001/{name}.weight"])
    assert_near(approximate_isometry(kernel, 40, 1e-3), expected, 1e-5)


def test_a_whole_mlp_after_orthp_is_the_recorded_one():
    create = filled(
        lambda: MLP(4, image_shape=(8, 8, 1), hidden=20, linear=True, rngs=nnx.Rngs(0))
    )
    model = with_leaves(create, section(RECORDED, "mlp_before"), jnp.float32)
    got = named_leaves(nnx.state(reinitialize(model, "orthp", activation="linear")))
    expected = section(RECORDED, "mlp_after_orthp_linear")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert_near(got[name], value, 5e-6)


def test_orthp_of_a_resnet_is_the_recorded_one_and_leaves_norms_alone():
    before = section(RECORDED, "resnet8B_before")
    got = reinitialize(before, "orthp")
    expected = section(RECORDED, "resnet8B_after_orthp_relu")
    assert got.keys() == expected.keys()
    assert {"linear.kernel", "bn1.mean", "layer2.0.downsample.0.kernel"} <= got.keys()
    for name, value in expected.items():
        assert_near(got[name], value, 5e-6)


@pytest.mark.parametrize("shape", [(3, 3, 4, 8), (3, 3, 8, 4), (10, 20)])
@pytest.mark.parametrize("recipe", ["orthp", "orthogonal", "delta_orthogonal"])
def test_recipes_make_the_smaller_side_orthogonal_with_the_gain(recipe, shape):
    remake = functools.partial(reinitialize, recipe=recipe, activation="tanh", key=KEY)
    got = np.asarray(jax.jit(remake)({"kernel": draw(*shape)})["kernel"])
    if recipe == "delta_orthogonal" and len(shape) == 4:
        assert np.count_nonzero(got) == np.count_nonzero(got[1, 1])
        got = got[1, 1]
    expected = (5 / 3) ** 2 * np.eye(min(got.size // shape[-1], shape[-1]))
    np.testing.assert_allclose(gram(got), expected, atol=1e-5)


def test_a_delta_orthogonal_convolution_keeps_the_length_of_an_image():
    kernel = delta_orthogonalize(jnp.ones((3, 3, 2, 5)), draw(5, 5), "linear")
    image = draw(1, 6, 6, 2, seed=1)
    out = jax.lax.conv_general_dilated(
        image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(jnp.linalg.norm(out), jnp.linalg.norm(image), rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 3, 4, 6), (2, 6)])
def test_filters_that_are_zero_stay_zero(shape):
    kernel = draw(*shape).at[..., 2].set(0)
    got = jax.jit(orthogonalize)(kernel)
    np.testing.assert_allclose(got[..., 2], 0, atol=1e-6)
    assert jnp.isfinite(got).all()


@pytest.mark.parametrize(("recipe", "fan"), [("kaiming", 600), ("xavier", 350)])
def test_drawn_kernels_have_the_variance_of_their_fan(recipe, fan):
    kernel = {"kernel": jnp.ones((600, 100))}
    got = reinitialize(kernel, recipe, activation="relu", key=KEY)["kernel"]
    np.testing.assert_allclose(jnp.var(got), 2 / fan, rtol=0.02)


def test_approximate_isometry_comes_nearer_and_moves_no_weight_farther():
    kernel = draw(3, 3, 2, 5) / 5
    got = approximate_isometry(kernel, 50, 1e-3)
    assert jnp.abs(got - kernel).max() <= 50 * 1e-3 + 1e-6
    error, before = (jnp.linalg.norm(gram(k) - jnp.eye(5)) for k in (got, kernel))
    assert error < 0.7 * before


def test_a_kernel_is_drawn_by_its_name_alone():
    two = {"a": {"kernel": jnp.ones((4, 3))}, "b": {"kernel": jnp.ones((4, 3))}}
    both = reinitialize(two, "orthogonal", key=KEY)
    one = reinitialize(two, "orthogonal", layers="b", key=KEY)
    np.testing.assert_array_equal(one["b"]["kernel"], both["b"]["kernel"])
    assert (both["a"]["kernel"] != both["b"]["kernel"]).any()
    assert (one["a"]["kernel"] == 1).all()


def test_half_precision_stays_and_is_orthogonal():
    got = orthogonalize(draw(20, 4).astype(jnp.bfloat16), "linear")
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(gram(got.astype(jnp.float32)), np.eye(4), atol=0.02)


def test_a_module_is_left_untouched_and_its_layers_chosen_by_pattern_or_plan():
    model = filled(lambda: CifarResNet((1, 1, 1), width=0.25, rngs=nnx.Rngs(0)))
    groups = tpp.channel_groups(model, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
    plan = tpp.make_plan(groups, model, "*layer*.conv1:0.5")
    before = jax.tree.map(np.array, named_leaves(nnx.state(model)))
    wanted = {f"layer{stage}.0.conv1.kernel" for stage in (1, 2, 3)}
    small = tpp.prune(model, plan)
    for layers, of in (("layer?.0.conv1", model), (["*.conv1"], model), (plan, small)):
        old = named_leaves(nnx.state(of))
        new = named_leaves(nnx.state(reinitialize(of, "orthp", layers=layers)))
        assert {name for name in old if (old[name] != new[name]).any()} == wanted
    for name, leaf in named_leaves(nnx.state(model)).items():
        np.testing.assert_array_equal(leaf, before[name])


def test_kernels_of_a_module_are_those_of_convolutions_and_dense_layers():
    class Attention(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
            self.head = nnx.Linear(8, 3, rngs=rngs)

    model = nnx.eval_shape(lambda: Attention(nnx.Rngs(0)))
    assert kernels_of(model) == {"head.kernel"}  # a query's is no matrix [D, N]


def test_linens_variables_are_known_by_the_names_of_their_layers():
    module = linen.Sequential([linen.Dense(4), linen.BatchNorm(True), linen.Dense(3)])
    variables = module.init(KEY, jnp.ones((1, 5)))
    assert kernels_of(variables, "layers_0") == {"params.layers_0.kernel"}
    got = reinitialize(variables, "orthp", activation="linear")
    np.testing.assert_allclose(
        gram(got["params"]["layers_2"]["kernel"]), np.eye(3), atol=1e-5
    )


def test_a_recipe_of_ones_own_can_be_given():
    got = reinitialize({"kernel": jnp.ones((2, 2))}, lambda w, activation, key: 3 * w)
    assert (got["kernel"] == 3).all()


@pytest.mark.parametrize(
    ("recipe", "kwargs", "message"),
    [
        ("qr", {}, "unknown recipe 'qr': choose one of orthp, "),
        ("xavier", {}, r"'xavier' draws kernels: pass key=jax.random.key\(seed\)"),
        ("orthp", {"activation": "gelu"}, "unknown activation 'gelu': choose one of"),
        ("orthp", {"layers": "b, a"}, r"'b' matches no layer.*\['a'\]"),
    ],
)
def test_mistakes_are_told(recipe, kwargs, message):
    with pytest.raises(TPPError, match=message):
        reinitialize({"a": {"kernel": jnp.eye(2)}}, recipe, **kwargs)


def test_a_plan_of_another_model_and_a_wrong_random_matrix_are_told():
    model = filled(lambda: MLP(2, image_shape=(2, 2, 1), hidden=4, rngs=nnx.Rngs(0)))
    groups = tpp.channel_groups(model, jnp.ones((1, 2, 2, 1)))
    plan = tpp.make_plan(groups, model, 0.5)
    with pytest.raises(TPPError, match="prunes no filter of this model's kernels"):
        reinitialize({"a": {"kernel": jnp.eye(2)}}, "orthp", layers=plan)
    with pytest.raises(ValueError, match=r"\[3, 3, 2, 4\] needs a random .*\[4, 4\]"):
        delta_orthogonalize(jnp.ones((3, 3, 2, 4)), jnp.eye(2))


def test_every_recipe_has_a_name_and_runs_under_jit():
    params = {"dense": {"kernel": draw(6, 4), "bias": jnp.ones(4)}}
    for recipe in RECIPES:
        got = jax.jit(lambda p, r=recipe: reinitialize(p, r, key=KEY))(params)
        assert got["dense"]["kernel"].shape == (6, 4)
        assert (got["dense"]["bias"] == 1).all()
