"""Rules of single operations: which axes pass, are tied or are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import tpp_jax as tpp


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def groups_around(operation):
    """Groups of a network over images, with an operation between two of its layers."""

    def fn(p, x):
        h = jax.nn.relu(x @ p["before"] + p["bias"])
        return operation(h).mean((1, 2)) @ p["after"]

    params = {"before": shape(3, 8), "bias": shape(8), "after": shape(8, 2)}
    return fn, params, tpp.channel_groups(fn, shape(2, 4, 4, 3), params=params)


def pooled_by(reduce, start):
    def operation(h):
        return lax.reduce_window(h, start, reduce, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    return operation


def solved(h):
    # A system of 4 equations for each image, row and channel.
    matrix = jnp.eye(4) + jnp.tril(jnp.ones((4, 4)))
    rows = h.reshape(2, 4, -1)
    matrix = jnp.broadcast_to(matrix, (2, 4, 4))
    solution = lax.linalg.triangular_solve(matrix, rows, left_side=True, lower=True)
    return solution.reshape(h.shape)


def whitened(h):
    columns = jnp.moveaxis(h, -1, 1).reshape(2, -1, 16)
    squares = columns[..., None, :] * jnp.eye(16) + jnp.eye(16)
    return h * jnp.linalg.cholesky(squares).mean((2, 3))[:, None, None]


PASSING = {
    "smallest of a window": pooled_by(lax.min, jnp.inf),
    "a function of a window": pooled_by(lambda a, b: jnp.maximum(a, 1.0 * b), -jnp.inf),
    "a Fourier transform of places": lambda h: jnp.fft.fft2(h, axes=(1, 2)).real,
    "triangular systems of places": solved,
    "decompositions of a batch of matrices": whitened,
    "a reduction of two arrays at once": lambda h: (
        h
        + lax.reduce(
            (h, -h),
            (-jnp.inf, jnp.inf),
            lambda a, b: (jnp.maximum(a[0], b[0]), jnp.minimum(a[1], b[1])),
            (1, 2),
        )[0][:, None, None]
    ),
    "the gradient of pooling": lambda h: (
        h + jax.grad(lambda h: pooled_by(lax.max, -jnp.inf)(h).sum())(h)
    ),
    "special functions": lambda h: (
        lax.igamma(1.0 + h, 1.0 + h)
        + lax.bessel_i1e(h)
        + jax.scipy.special.zeta(2.0 + h, 1.0)
    ),
    "largest places": lambda h: lax.approx_max_k(
        h.reshape(2, 16, -1), 4, reduction_dimension=1
    )[0][:, None],
    "an exclusive or": lambda h: (
        h * lax.reduce_xor((h > 0).astype(jnp.int32), (1, 2))[:, None, None]
    ),
    "other bits": lambda h: jnp.nextafter(h, h + 1.0) + lax.reduce_precision(h, 5, 10),
}


@pytest.mark.parametrize("name", PASSING)
def test_channels_pass_operations_over_other_axes(name):
    fn, params, groups = groups_around(PASSING[name])
    group = groups["before"]
    assert (group.size, group.reason) == (8, None)
    assert {(m.leaf, m.axis) for m in group.members} == {
        ("before", 1),
        ("bias", 0),
        ("after", 0),
    }
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)))
    checks = tpp.check_groups(fn, images, params=params, groups=groups)
    assert checks.unproved == ()


STAYING = {
    "a Fourier transform of channels": (
        lambda h: jnp.fft.fft(h, axis=-1).real,
        "the operation 'fft', which mixes the positions of an axis",
    ),
    "systems of channels": (
        lambda h: lax.linalg.triangular_solve(
            jnp.broadcast_to(jnp.eye(8), (2, 4, 8, 8)), h
        ),
        "the operation 'triangular_solve', which mixes the positions of an axis",
    ),
    "places of the largest channels": (
        lambda h: jnp.tile(lax.approx_max_k(h, 4)[1].astype(h.dtype), 2),
        "an axis of which the largest entries are taken",
    ),
    "pooling over channels": (
        lambda h: jnp.repeat(
            lax.reduce_window(h, jnp.inf, lax.min, (1, 1, 1, 2), (1, 1, 1, 2), "VALID"),
            2,
            axis=-1,
        ),
        "an axis that pooling runs over",
    ),
}


@pytest.mark.parametrize("name", STAYING)
def test_channels_that_are_mixed_by_their_places_are_kept(name):
    operation, reason = STAYING[name]
    *_, groups = groups_around(operation)
    assert groups["before"].reason.startswith(f"{reason} (test_rules.py:")
