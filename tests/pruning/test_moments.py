"""Moments of what kernels read, compared with the Jacobians of the layers."""

import jax.numpy as jnp
import numpy as np
import pytest

import tpp_jax as tpp
from tests.pruning.consumers import KINDS, example, jacobian


def check(entry, rows, n):
    """Compares moments with those of the rows of a Jacobian.

    Rows of other outputs are zero in the columns of one, and add nothing.
    """
    for s, o in np.ndindex(len(entry.stacks), len(entry.outputs)):
        own = rows[:, entry.weight_index()[s, :, o]]
        mean, second = own.sum(0) / n, own.T @ own / n
        got = entry.covariance[s] + np.outer(entry.mean[s], entry.mean[s])
        assert entry.rows[s] == n
        np.testing.assert_allclose(entry.mean[s], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got, second, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            entry.second_moment[s], np.diag(second), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_what_is_multiplied(kind):
    fn, params, batches, reader = example(kind)
    moments = tpp.input_moments(fn, batches, params)
    assert not moments.skipped
    assert {entry.leaf for entry in moments.consumers} == {"second.kernel"}
    covered = np.concatenate([e.weight_index().ravel() for e in moments.consumers])
    assert sorted(covered) == list(range(params["second"]["kernel"].size))
    rows = jacobian(params, batches, reader)
    outputs = sum(len(e.stacks) * len(e.outputs) for e in moments.consumers)
    for entry in moments.consumers:
        assert entry.fixed is None
        check(entry, rows, len(rows) / outputs)


@pytest.mark.parametrize("kind", ["window", "grouped", "experts"])
def test_the_diagonal_alone_is_that_of_all_moments(kind):
    fn, params, batches, _ = example(kind)
    full = tpp.input_moments(fn, batches, params)
    for options in ({"diagonal": True}, {"max_features": 5}):
        part = tpp.input_moments(fn, batches, params, **options)
        for one, all_ in zip(part.consumers, full.consumers, strict=True):
            assert one.covariance is None
            assert "only variances" in one.fixed
            np.testing.assert_allclose(one.mean, all_.mean, rtol=1e-6)
            np.testing.assert_allclose(one.variance, all_.variance, rtol=1e-5)


def test_a_large_mean_costs_no_digits():
    params = {"w1": jnp.eye(3), "w2": jnp.ones((3, 1))}
    x = np.random.default_rng(0).normal(size=(4, 50, 3)).astype(np.float32) + 1000
    [entry] = tpp.input_moments(lambda p, x: x @ p["w1"] @ p["w2"], x, params).consumers
    expected = np.cov(x.astype(np.float64).reshape(-1, 3).T, bias=True)
    np.testing.assert_allclose(entry.covariance[0], expected, rtol=1e-4, atol=1e-5)
