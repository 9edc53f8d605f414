"""Labels of positions: definitions of any depth, circles, and computations too long."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpp_jax as tpp
from tpp_jax.graph.labels import Labels, solve


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize("depth", [3, 16, 17])
def test_definitions_within_definitions_are_followed_to_the_end(depth):
    labels = Labels()
    whole = rest = labels.fresh(2**depth)
    halves = []
    for left in range(depth - 1, 0, -1):
        half, rest = labels.split(rest, (2, 2**left))
        halves.append(half)
    positions, channels = solve(labels).of(whole)
    # Each position is a tuple of one half of each split and a rest of two.
    assert len(positions) == depth * 2**depth
    assert np.bincount(positions).tolist() == [depth] * 2**depth
    assert len(np.unique(channels)) == 2 * depth


def test_an_axis_that_becomes_a_part_of_itself_stays():
    def fn(p, x):
        h = x @ p["w"]
        mean = h.reshape(len(x), 4, -1).mean(1)
        return (h + jnp.tile(mean, (1, 4))) @ p["v"]

    params = {"w": shape(3, 32), "v": shape(32, 2)}
    groups = tpp.channel_groups(fn, shape(2, 3), params=params)
    [group] = [g for g in groups if g.name == "w"]
    assert "a part of itself" in group.reason


def calls(depth, inner):
    f = inner
    for _ in range(depth):
        f = jax.jit(functools.partial(lambda g, x: g(g(x)), f))
    return f


PARAMS = {"w": shape(4, 8), "v": shape(8, 3)}


@pytest.mark.parametrize("find", ["groups", "count"])
def test_a_computation_that_is_too_long_when_written_out_is_refused(find):
    def fn(p, x):
        return calls(26, jnp.tanh)(x @ p["w"]) @ p["v"]

    find = {"groups": tpp.channel_groups, "count": tpp.count}[find]
    with pytest.raises(
        tpp.errors.TPPError, match=r"too long: .* 2,000,000 are the most"
    ):
        find(fn, shape(2, 4), params=PARAMS)


def test_activations_of_such_a_computation_are_refused_too():
    def fn(p, x):
        return calls(26, jnp.tanh)(x @ p["w"]) @ p["v"]

    params = jax.tree.map(lambda x: jnp.ones(x.shape), PARAMS)
    with pytest.raises(tpp.errors.TPPError, match="too long"):
        tpp.activation_means(fn, [jnp.ones((2, 4))], params=params)


def test_calls_that_are_nested_less_deeply_are_written_out():
    def fn(p, x):
        return calls(8, jnp.tanh)(x @ p["w"]) @ p["v"]

    groups = tpp.channel_groups(fn, shape(2, 4), params=PARAMS)
    assert groups["w"].reason is None
    assert sum(e.primitive == "tanh" for e in groups.traced.equations) == 256
