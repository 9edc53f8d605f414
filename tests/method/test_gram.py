"""The Gram penalties and their closed-form gradients are the original's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tpp_jax as tpp
from tests.reference import GOLDEN
from tpp_jax.method.gram import gram_penalty_and_grad

RECORDED = np.load(GOLDEN / "unit.npz")
TENSORS = ("conv3x3", "conv1x1", "linear", "wide")
TARGETS = {
    "decorrelate": "tpp_decorrelate",
    "orthogonal": "kernel_orthogonality_for_pruning",
}


def recorded(tensor):
    """(kernel with its filters on the last axis, which of them are pruned)."""
    weight = filters_last(RECORDED[f"{tensor}/weight"])
    pruned = np.zeros(weight.shape[-1], bool)
    pruned[RECORDED[f"{tensor}/pruned"]] = True
    return weight, pruned


def filters_last(weight):
    return weight.transpose((2, 3, 1, 0) if weight.ndim == 4 else (1, 0))


def draw(shape, seed=0):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=shape).astype(np.float32)
    return kernel, rng.random(shape[-1]) < 0.5


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tensor", TENSORS)
def test_value_and_gradient_are_the_recorded_ones(tensor, target):
    kernel, pruned = recorded(tensor)
    key = f"{tensor}/{TARGETS[target]}"
    value, gradient = gram_penalty_and_grad(kernel, pruned, target)
    assert value.dtype == gradient.dtype == jnp.float32
    np.testing.assert_allclose(value, RECORDED[f"{key}/value"], rtol=1e-5)
    expected = filters_last(RECORDED[f"{key}/grad"])
    # Relative to the size of the gradient: single entries cancel to nearly nothing.
    np.testing.assert_allclose(
        gradient, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(3, 3, 4, 6), (1, 1, 2, 5), (7, 3), (1, 4)])
def test_the_closed_form_is_the_derivative_of_the_penalty(shape, target):
    with jax.enable_x64(True):
        kernel, pruned = draw(shape)
        kernel = jnp.asarray(kernel, jnp.float64)
        expected = jax.grad(tpp.gram_penalty)(kernel, pruned, target)
        gradient = tpp.gram_penalty_grad(kernel, pruned, target)
        np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-12)


def test_the_definition_of_the_decorrelation():
    kernel, pruned = draw((3, 3, 2, 5))
    filters = kernel.reshape(-1, 5).T.astype(np.float64)
    total = sum(
        float(filters[i] @ filters[j]) ** 2
        for i in range(5)
        for j in range(5)
        if pruned[i] or pruned[j]
    )
    value = tpp.gram_penalty(kernel, pruned)
    np.testing.assert_allclose(value, total / 25, rtol=1e-5)


def test_decorrelation_leaves_the_kept_filters_among_themselves_alone():
    kernel, _ = draw((4, 3))
    none = np.zeros(3, bool)
    assert tpp.gram_penalty(kernel, none) == 0
    np.testing.assert_array_equal(tpp.gram_penalty_grad(kernel, none), 0)


def test_kept_filters_too_are_turned_away_from_the_pruned_ones():
    kernel, _ = draw((4, 3))
    gradient = tpp.gram_penalty_grad(kernel, np.array([True, False, False]))
    assert np.abs(gradient).min(axis=0).all()
    # Along the pruned filter alone: nothing else is asked of the kept ones.
    pruned = np.asarray(kernel[:, 0])
    for i in (1, 2):
        kept = np.asarray(gradient[:, i])
        np.testing.assert_allclose(kept, pruned * (kept @ pruned) / (pruned @ pruned))


def test_each_target_is_zero_where_it_should_be():
    pruned = np.array([False, True, False])
    orthonormal = np.eye(4, 3, dtype=np.float32)
    orthonormal[:, 1] = 0
    assert tpp.gram_penalty(orthonormal, pruned, "orthogonal") == 0
    assert tpp.gram_penalty(7 * orthonormal, pruned, "decorrelate") == 0
    assert tpp.gram_penalty(7 * orthonormal, pruned, "orthogonal") > 0


def test_a_relative_penalty_is_measured_by_the_kept_filters():
    kernel, pruned = draw((3, 3, 2, 5))
    w = kernel.reshape(-1, 5).T.astype(np.float64)
    residual = np.where(pruned[:, None] | pruned, w @ w.T, 0)
    energy = np.square(w[~pruned]).sum(1).mean()
    value, gradient = gram_penalty_and_grad(kernel, pruned, "relative")
    np.testing.assert_allclose(value, np.square(residual).sum() / 4 / energy, 1e-5)
    expected = (residual @ w / energy).T.reshape(kernel.shape)
    np.testing.assert_allclose(gradient, expected, 1e-4, 1e-5)
    # Like L2's, it grows with the kernel itself and not with a power of it.
    larger = gram_penalty_and_grad(10 * kernel, pruned, "relative")
    np.testing.assert_allclose(larger[1], 10 * gradient, 1e-4, 1e-4)
    paper = [tpp.gram_penalty_grad(c * kernel, pruned) for c in (1, 10)]
    np.testing.assert_allclose(paper[1], 1000 * paper[0], 1e-4, 1e-2)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("n_kept", [2, 5])
def test_a_relative_weight_of_1_is_l2_in_the_span_of_orthogonal_filters(scale, n_kept):
    rng = np.random.default_rng(0)
    kept = scale * np.linalg.qr(rng.normal(size=(8, 8)))[0][:, :n_kept]
    small = 1e-3 * scale * rng.normal(size=(8, 3))
    kernel = np.concatenate([small, kept], axis=1).astype(np.float32)
    pruned = np.arange(kernel.shape[1]) < 3
    gradient = tpp.gram_penalty_grad(kernel, pruned, "relative")
    within = kept @ (kept.T @ small) / scale**2
    np.testing.assert_allclose(gradient[:, :3], within, 1e-3, 1e-5 * scale)


def test_a_relative_penalty_of_zeros_is_zero():
    pruned = np.array([True, False, False])
    value, gradient = gram_penalty_and_grad(jnp.zeros((4, 3)), pruned, "relative")
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@settings(max_examples=20)
@given(st.permutations(range(5)))
def test_the_order_of_filters_does_not_matter(order):
    kernel, pruned = draw((3, 5))
    value, gradient = gram_penalty_and_grad(kernel, pruned)
    permuted = gram_penalty_and_grad(kernel[:, order], pruned[list(order)])
    np.testing.assert_allclose(permuted[0], value, rtol=1e-5)
    np.testing.assert_allclose(permuted[1], gradient[:, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_penalties_can_be_jitted_and_vmapped_over_kernels_and_masks(target):
    drawn = [draw((3, 3, 2, 4), seed) for seed in range(3)]
    kernels, masks = (np.stack(arrays) for arrays in zip(*drawn, strict=True))
    one = jax.jit(lambda kernel, mask: gram_penalty_and_grad(kernel, mask, target))
    values, gradients = jax.jit(jax.vmap(one))(kernels, masks)
    for i, (kernel, mask) in enumerate(drawn):
        value, gradient = one(kernel, mask)
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        np.testing.assert_allclose(gradients[i], gradient, rtol=1e-4, atol=1e-4)


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="'identity': decorrelate, ortho"):
        tpp.gram_penalty(np.eye(3), np.ones(3, bool), "identity")
