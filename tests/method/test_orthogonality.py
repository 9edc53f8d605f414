"""KernOrth and OrthConv are the original's, in value and gradient."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.reference import GOLDEN, filled
from tpp_jax.errors import TPPError
from tpp_jax.graph.naming import named_leaves
from tpp_jax.method.isometry import delta_orthogonalize, orthogonalize
from tpp_jax.method.orthogonality import (
    add_orthogonality,
    convolution_orthogonality,
    kernel_orthogonality,
)
from tpp_jax.models import MLP

UNIT = np.load(GOLDEN / "unit.npz")
RECORDED = np.load(GOLDEN / "orthogonality.npz")
mean_square = functools.partial(kernel_orthogonality, norm="mean_square")
ORIGINALS = {  # its names: ours
    "kernorth_frobenius": kernel_orthogonality,
    "orth_dist": kernel_orthogonality,
    "kernorth_notranspose": functools.partial(mean_square, side="filters"),
    "orthconv_frobenius": functools.partial(
        convolution_orthogonality, stride=2, padding=1
    ),
    "deconv_orth_dist": functools.partial(
        convolution_orthogonality, stride=2, padding=1
    ),
    "deconv_orth_dist_stride1": functools.partial(
        convolution_orthogonality, stride=1, padding=1
    ),
}


def transposing(kernel):
    """The original's mean of squares, which looks at input channels for its side."""
    return mean_square(
        kernel, side="inputs" if kernel.shape[-1] < kernel.shape[-2] else "filters"
    )


ORIGINALS |= {
    "kernel_orthogonality_mse": transposing,
    "kernorth_transpose": transposing,
}


def filters_last(weight):
    return weight.transpose((2, 3, 1, 0) if weight.ndim == 4 else (1, 0))


def cases(recording, suffix):
    return sorted(
        (tensor, name)
        for tensor, name, part in (k.split("/") for k in recording if k.count("/") == 2)
        if part == suffix and name in ORIGINALS
    )


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def overlap(shift, window):
    """The part of a window that the window shifted by so much covers."""
    pairs = zip(shift, window, strict=True)
    return tuple(slice(max(s, 0), w + min(s, 0)) for s, w in pairs)


def value_and_grad(penalty, kernel):
    return jax.jit(jax.value_and_grad(penalty))(kernel)


def assert_near(ours, theirs, rtol):
    np.testing.assert_allclose(ours, theirs, rtol, rtol * np.abs(theirs).max())


@pytest.mark.parametrize(("tensor", "name"), cases(UNIT, "value"))
def test_value_and_gradient_are_the_recorded_ones(tensor, name):
    kernel = filters_last(UNIT[f"{tensor}/weight"])
    value, gradient = value_and_grad(ORIGINALS[name], kernel)
    assert value.dtype == gradient.dtype == jnp.float32
    np.testing.assert_allclose(value, UNIT[f"{tensor}/{name}/value"], rtol=1e-5)
    assert_near(gradient, filters_last(UNIT[f"{tensor}/{name}/grad"]), 1e-5)


@pytest.mark.parametrize(("tensor", "name"), cases(RECORDED, "loss_f64"))
def test_value_and_gradient_are_the_recorded_ones_in_float64(tensor, name):
    with jax.enable_x64(True):
        kernel = jnp.asarray(filters_last(RECORDED[f"{tensor}/w"]), jnp.float64)
        value, gradient = value_and_grad(ORIGINALS[name], kernel)
    np.testing.assert_allclose(value, RECORDED[f"{tensor}/{name}/loss_f64"], rtol=1e-12)
    assert_near(gradient, filters_last(RECORDED[f"{tensor}/{name}/grad_f64"]), 1e-11)


def test_every_recorded_penalty_is_compared():
    compared = cases(UNIT, "value") + cases(RECORDED, "loss_f64")
    assert {name for _, name in compared} == ORIGINALS.keys()


@pytest.mark.parametrize("shape", [(3, 3, 2, 5), (4, 9), (9, 4)])
def test_both_sides_have_one_minimum(shape):
    """Their squares differ by N − D alone."""
    kernel = draw(*shape)
    n, d = shape[-1], kernel.size // shape[-1]
    filters = mean_square(kernel, side="filters") * n**2
    inputs = mean_square(kernel, side="inputs") * d**2
    np.testing.assert_allclose(filters - inputs, n - d, rtol=1e-4, atol=1e-3)
    smaller = kernel_orthogonality(kernel) ** 2
    np.testing.assert_allclose(smaller, min(filters, inputs), rtol=1e-5)


@pytest.mark.parametrize("norm", ["frobenius", "mean_square"])
def test_an_orthogonal_kernel_costs_nothing_and_is_left_alone(norm):
    for kernel in (orthogonalize(draw(3, 3, 2, 5), "linear"), jnp.eye(4)):
        penalty = functools.partial(kernel_orthogonality, norm=norm)
        value, gradient = value_and_grad(penalty, kernel)
        np.testing.assert_allclose(value, 0, atol=1e-5)
        assert jnp.isfinite(gradient).all()
    identity = jnp.zeros((3, 3, 4, 4)).at[1, 1].set(jnp.eye(4))
    penalty = functools.partial(convolution_orthogonality, norm=norm)
    value, gradient = value_and_grad(penalty, identity)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(
    ("window", "stride"),
    [((3,), 1), ((3, 3), 2), ((5, 3), 1), ((4, 4), 3), ((2,) * 3, 1)],
)
def test_filters_are_compared_at_every_shift_at_which_they_overlap(window, stride):
    kernel = np.asarray(draw(*window, 2, 3), np.float64)
    steps = [range(-((w - 1) // stride) * stride, w, stride) for w in window]
    total = 0.0
    for shift in np.stack(np.meshgrid(*steps), -1).reshape(-1, len(window)):
        here, there = overlap(shift, window), overlap(-shift, window)
        products = kernel[here].reshape(-1, 3).T @ kernel[there].reshape(-1, 3)
        total += np.sum((products - np.eye(3) * (not shift.any())) ** 2)
    value = convolution_orthogonality(jnp.asarray(kernel, jnp.float32), stride)
    np.testing.assert_allclose(value, np.sqrt(total), rtol=1e-5)


def test_a_delta_orthogonal_convolution_is_orthogonal():
    kernel = delta_orthogonalize(jnp.ones((3, 3, 6, 4)), draw(6, 6), "linear")
    np.testing.assert_allclose(convolution_orthogonality(kernel), 0, atol=1e-5)
    assert convolution_orthogonality(orthogonalize(draw(3, 3, 6, 4), "linear")) > 1


def test_a_window_of_one_pixel_leaves_kernorth():
    kernel = draw(1, 1, 7, 4)
    np.testing.assert_allclose(
        convolution_orthogonality(kernel), kernel_orthogonality(kernel), rtol=1e-6
    )


PARAMS = {
    "conv": {"kernel": draw(3, 3, 2, 4), "bias": jnp.ones(4)},
    "dense": {"kernel": draw(5, 4, seed=1)},
    "norm": {"scale": jnp.ones(4)},
}
GRADIENTS = jax.tree.map(jnp.ones_like, PARAMS)


@pytest.mark.parametrize("kind", ["kernorth", "orthconv"])
def test_the_transform_adds_the_weighted_gradient_to_the_kernels_alone(kind):
    of_conv = {"kernorth": kernel_orthogonality, "orthconv": convolution_orthogonality}
    tx = add_orthogonality(0.3, kind)
    updates, state = jax.jit(tx.update)(GRADIENTS, tx.init(PARAMS), PARAMS)
    total = 0.0
    for layer, penalty in (("conv", of_conv[kind]), ("dense", kernel_orthogonality)):
        value, gradient = value_and_grad(penalty, PARAMS[layer]["kernel"])
        expected = 1 + 0.3 * gradient
        np.testing.assert_allclose(updates[layer]["kernel"], expected, rtol=1e-5)
        total += value
    np.testing.assert_allclose(state.penalty, total, rtol=1e-5)
    assert (updates["conv"]["bias"] == 1).all() and (
        updates["norm"]["scale"] == 1
    ).all()


def test_the_transform_can_be_told_layers_norm_stride_and_padding():
    tx = add_orthogonality(
        1.0, "orthconv", layers="conv", norm="mean_square", stride=2, padding=1
    )
    updates, state = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)
    expected = convolution_orthogonality(
        PARAMS["conv"]["kernel"], 2, 1, norm="mean_square"
    )
    np.testing.assert_allclose(state.penalty, expected, rtol=1e-6)
    assert (updates["dense"]["kernel"] == 1).all()
    but_dense = add_orthogonality(1.0, "orthconv", skip="d*", stride=2, padding=1)
    skipped, _ = but_dense.update(GRADIENTS, but_dense.init(PARAMS), PARAMS)
    assert (skipped["dense"]["kernel"] == 1).all()


def test_descending_makes_a_networks_kernels_orthogonal_and_compiles_once():
    model = filled(lambda: MLP(3, image_shape=(3, 3, 1), hidden=6, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    tx = optax.chain(add_orthogonality(1.0, norm="mean_square"), optax.sgd(0.5))
    nothing = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, state):
        updates, state = tx.update(nothing, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(300):
        params, state = step(params, state)
    assert state[0].penalty < 1e-3
    for name, leaf in named_leaves(params).items():
        if name.endswith("kernel"):
            lengths = jnp.linalg.svd(leaf, compute_uv=False)
            np.testing.assert_allclose(lengths, 1, atol=0.1)


def test_parameters_in_half_precision_keep_their_type():
    params = {"dense": {"kernel": draw(5, 4).astype(jnp.bfloat16)}}
    tx = add_orthogonality()
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["dense"]["kernel"].dtype == jnp.bfloat16
    assert state.penalty.dtype == jnp.float32


def test_mistakes_are_told():
    kernel = jnp.eye(3)
    with pytest.raises(TPPError, match="unknown kind 'conv': choose 'kernorth' or"):
        add_orthogonality(kind="conv")
    with pytest.raises(TPPError, match="unknown norm 'l1': choose frobenius or"):
        add_orthogonality(norm="l1")
    with pytest.raises(TPPError, match="unknown norm 'l1'"):
        kernel_orthogonality(kernel, "l1")
    with pytest.raises(TPPError, match="unknown side 'rows': choose smaller, filters"):
        kernel_orthogonality(kernel, side="rows")
    with pytest.raises(TPPError, match="no window to shift: use kernel_orthogonality"):
        convolution_orthogonality(kernel)
    with pytest.raises(TPPError, match="stride 0 and padding None"):
        convolution_orthogonality(jnp.ones((3, 3, 1, 1)), stride=0)
    with pytest.raises(TPPError, match="the pattern 'fc' matches no layer"):
        add_orthogonality(layers="fc").init(PARAMS)
    with pytest.raises(TPPError, match="the pattern 'fc' matches no layer"):
        add_orthogonality(skip="fc").init(PARAMS)
    tx = add_orthogonality()
    with pytest.raises(ValueError, match="needs the parameters: call update"):
        tx.update(GRADIENTS, tx.init(PARAMS))
