"""Sums over patches, compared with those of patches cut out one by one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpp_jax as tpp
from tpp_jax.pruning.sums import Sums, filled, gram
from tpp_jax.pruning.windows import Line, as_sums, patch_sums, some_of

# Name → (window along each axis, groups of the 4 channels).
WINDOWS = {
    "same": ([Line(5, 3, 5, 1, 1, 1), Line(4, 3, 4, 1, 1, 1)], 1),
    "valid": ([Line(5, 3, 3, 0, 1, 1), Line(6, 4, 3, 0, 1, 1)], 1),
    "full": ([Line(3, 3, 5, 2, 1, 1), Line(2, 2, 3, 1, 1, 1)], 1),
    "beyond": ([Line(3, 3, 7, 3, 1, 1)], 1),
    "cut": ([Line(6, 3, 3, -1, 1, 1), Line(6, 2, 5, 0, 1, 1)], 1),
    "larger than the image": ([Line(2, 5, 2, 2, 1, 1), Line(1, 3, 1, 1, 1, 1)], 1),
    "dilated": ([Line(7, 3, 7, 2, 1, 2), Line(6, 3, 6, 3, 1, 3)], 1),
    "dilated, valid": ([Line(7, 3, 3, 0, 1, 2)], 1),
    "one axis": ([Line(6, 3, 6, 1, 1, 1), Line(3, 1, 3, 0, 1, 1)], 1),
    "three axes": ([Line(3, 2, 2, 0, 1, 1), Line(3, 3, 3, 1, 1, 1),
                    Line(4, 2, 3, 0, 1, 1)], 1),
    "strided": ([Line(6, 3, 3, 0, 2, 1), Line(5, 3, 3, 1, 2, 1)], 1),
    "grouped": ([Line(4, 3, 4, 1, 1, 1), Line(4, 3, 4, 1, 1, 1)], 2),
}  # fmt: skip


def cut_out(images, lines):
    """Returns ``[examples * positions, taps, channels]``, pixel by pixel."""
    rows = []
    for image in images:
        for position in itertools.product(*(range(line.outputs) for line in lines)):
            taps = []
            for tap in itertools.product(*(range(line.taps) for line in lines)):
                at = tuple(
                    p * line.stride + t * line.dilation - line.low
                    for p, t, line in zip(position, tap, lines, strict=True)
                )
                inside = all(0 <= i < x.size for i, x in zip(at, lines, strict=True))
                taps.append(image[at] if inside else np.zeros(image.shape[-1]))
            rows.append(taps)
    return np.array(rows)


@pytest.mark.parametrize("name", WINDOWS)
def test_sums_are_those_of_patches(name):
    lines, groups = WINDOWS[name]
    rng = np.random.default_rng(0)
    # The channels have means of their own, so that zeros of the border count.
    shape = 2, *(line.size for line in lines), 4
    batches = rng.normal(size=(2, *shape)) + np.array([3.0, -1.0, 0.0, 10.0])
    own = [np.split(cut_out(x, lines), groups, axis=-1) for x in batches]
    for diagonal in (True, False):
        kept = jnp.mean(batches[0], axis=range(len(lines) + 1), dtype=jnp.float32)
        measure = jax.jit(
            lambda x, diagonal=diagonal, kept=kept: patch_sums(
                x, lines, groups, diagonal, lambda mean: kept
            )
        )
        one, other = (measure(x.astype(np.float32)) for x in batches)
        total = jax.tree.map(lambda a, b: np.float64(a) + np.float64(b), one, other)
        sums = as_sums(total._replace(centre=np.float64(kept)), lines, groups)
        for group in range(groups):
            rows = np.concatenate([parts[group] for parts in own])
            rows = rows.reshape(len(rows), -1)
            assert sums.rows[group] == len(rows)
            np.testing.assert_allclose(sums.mean[group], rows.mean(0), atol=1e-5)
            scatter = (rows - rows.mean(0)).T @ (rows - rows.mean(0))
            scatter = np.diagonal(scatter) if diagonal else scatter
            got = sums.scatter[group] / len(rows)
            np.testing.assert_allclose(got, scatter / len(rows), rtol=1e-5, atol=2e-5)


def test_products_of_wide_rows_are_built_of_strips():
    rows = np.random.default_rng(0).normal(size=(2, 5, 1027)).astype(np.float32)
    strips = jax.vmap(gram)(jnp.asarray(rows))
    assert [strip.shape for strip in strips] == [
        (2, 343, 1027),
        (2, 343, 684),
        (2, 341, 341),
    ]
    sums = filled(Sums(np.full(2, 5), rows[:, 0], strips))
    np.testing.assert_allclose(sums.scatter, rows.swapaxes(1, 2) @ rows, atol=1e-4)


def test_some_examples_are_enough_but_at_least_a_quarter():
    lines = (Line(8, 3, 8, 1, 1, 1),) * 2
    images = jnp.arange(40.0).reshape(40, 1, 1, 1) * jnp.ones((1, 8, 8, 2))
    # 18 features, 64 rows for each example
    assert some_of(images, lines, 1, 64)[:, 0, 0, 0].tolist() == [
        *(i * 40 // 18 for i in range(18))
    ]
    assert len(some_of(images, lines, 1, 1)) == 10
    assert some_of(images, lines, 1, 200) is images
    assert len(some_of(images, lines, 2, 64)) == 10


def test_rows_bound_what_a_window_reads():
    params = {"a": jnp.ones((1, 1, 1, 2)), "b": jnp.ones((3, 3, 2, 1))}

    def fn(p, x):
        dims = "NHWC", "HWIO", "NHWC"
        conv = jax.lax.conv_general_dilated
        h = conv(x, p["a"], (1, 1), "SAME", dimension_numbers=dims)
        return conv(jax.nn.relu(h), p["b"], (1, 1), "SAME", dimension_numbers=dims)

    x = np.random.default_rng(0).normal(size=(2, 40, 8, 8, 1)).astype(np.float32)
    [every] = tpp.input_moments(fn, x, params, rows=None).consumers
    [some] = tpp.input_moments(fn, x, params).consumers
    [few] = tpp.input_moments(fn, x[:, np.arange(18) * 40 // 18], params).consumers
    assert every.rows == 2 * 40 * 64
    assert some.rows == few.rows == 2 * 18 * 64
    np.testing.assert_allclose(some.covariance, few.covariance, atol=1e-6)
    assert not np.allclose(some.covariance, every.covariance, atol=1e-3)


def test_batches_of_images_of_several_sizes_are_added_up():
    params = {"a": jnp.eye(2)[None, None], "b": jnp.ones((3, 3, 2, 1))}

    def fn(p, x):
        dims = "NHWC", "HWIO", "NHWC"
        conv = jax.lax.conv_general_dilated
        h = conv(x, p["a"], (1, 1), "SAME", dimension_numbers=dims)
        return conv(h, p["b"], (1, 1), "SAME", dimension_numbers=dims).mean((1, 2))

    rng = np.random.default_rng(0)
    shapes = (2, 5, 5, 2), (3, 4, 6, 2), (1, 5, 5, 2)
    batches = [rng.normal(size=shape).astype(np.float32) + 1 for shape in shapes]
    [entry] = tpp.input_moments(fn, batches, params).consumers
    rows = []
    for x in batches:
        lines = [Line(n, 3, n, 1, 1, 1) for n in x.shape[1:3]]
        rows.append(cut_out(x, lines).reshape(-1, 18))
    rows = np.concatenate(rows)
    assert entry.rows == len(rows)
    np.testing.assert_allclose(entry.mean[0], rows.mean(0), atol=1e-6)
    cov = np.cov(rows.T, bias=True)
    np.testing.assert_allclose(entry.covariance[0], cov, atol=1e-5)
