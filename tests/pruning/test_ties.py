"""Groups of equal size that a model can only cut together are found, and joined."""

import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpp_jax as tpp
from tests.pruning.masking import masked, prunable
from tpp_jax.pruning import search
from tpp_jax.pruning.widths import apart, separated

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


X = array(4, 5)


def branches(width, out=3):
    """Parameters of two branches of a network."""
    into, back = (5, width), (width, out)
    return {"a": array(*into), "b": array(*into), "c": array(*back), "d": array(*back)}


def added(p, a, b):
    return jax.nn.relu(a) @ p["c"] + jax.nn.relu(b) @ p["d"]


def compared(a, b):
    if a.shape[-1] != b.shape[-1]:
        raise ValueError("the widths differ")
    return b


TIES = {
    "assertion": compared,
    "branch": lambda a, b: b * b if a.shape[-1] == b.shape[-1] else b,
    "size in a reshape": lambda a, b: b.reshape(len(b), a.shape[-1]),
    "size in a broadcast": lambda a, b: b + jnp.ones((1, a.shape[-1])),
}


@pytest.mark.parametrize("width", [2, 3, 12])
@pytest.mark.parametrize("name", TIES)
def test_two_groups_that_run_only_together_are_one(name, width):
    def net(p, x):
        a, b = x @ p["a"], x @ p["b"]
        return added(p, a, TIES[name](a, b))

    params = branches(width)
    groups = tpp.channel_groups(net, X, params=params)
    assert prunable(groups) == {"a"}
    assert (groups["a"].size, groups["a"].producers) == (width, ("a", "b"))
    plan = tpp.make_plan(groups, params, 0.5)
    small = tpp.prune(net, plan, params)
    np.testing.assert_allclose(net(small, X), masked(net, plan, params, X), rtol=1e-5)


def test_two_groups_of_a_round_number_of_channels_are_one():
    def net(p, x):
        a, b = x @ p["a"], x @ p["b"]
        if a.shape[-1] % 4:
            raise ValueError("not a multiple of four")
        return added(p, a, compared(a, b))

    groups = tpp.channel_groups(net, X, params=branches(16))
    assert groups["a"].producers == ("a", "b")


def test_three_groups_that_run_only_together_are_one():
    def net(p, x):
        a, b, c = x @ p["a"], x @ p["b"], x @ p["e"]
        return added(p, a, compared(a, b)) + compared(b, c) @ p["f"]

    params = branches(12) | {"e": array(5, 12), "f": array(12, 3)}
    groups = tpp.channel_groups(net, X, params=params)
    assert groups["a"].producers == ("a", "b", "e")


@pytest.mark.parametrize("width", [4, 12])
def test_each_pair_of_many_is_joined_alone(width):
    def net(p, x):
        for own in p:
            a, b = x @ own["a"], x @ own["b"]
            x = added(own, a, compared(a, b))
        return x

    params = [branches(width, 5) for _ in range(4)]
    groups = tpp.channel_groups(net, X, params=params)
    joined = [g.producers for g in groups if g.reason is None and g.size == width]
    assert joined == [(f"{i}.a", f"{i}.b") for i in range(4)]


def test_groups_that_cannot_be_joined_are_refused():
    def gated(x, kernel, parts):
        return math.prod(jnp.split(x @ kernel, parts, axis=1))

    def net(p, x):
        a, b = gated(x, p["a"], 2), gated(x, p["b"], 3)
        return added(p, a, compared(a, b))

    params = branches(12) | {"a": array(5, 24), "b": array(5, 36)}
    groups = tpp.channel_groups(net, X, params=params)
    assert not prunable(groups)
    assert "works only with as many channels of a and b" in groups["a"].reason
    assert groups["a"].reason == groups["b"].reason


def test_independent_groups_take_one_trial(monkeypatch):
    def net(p, x):
        for own in p:
            x = added(own, x @ own["a"], x @ own["b"])
        return x

    tried = []

    class Counted(search.Trial):
        def of(self, kept):
            tried.append({(self.groups[i].size, len(n)) for i, n in kept.items()})
            return super().of(kept)

    monkeypatch.setattr(search, "Trial", Counted)
    params = [branches(12, 5) for _ in range(4)]
    groups = tpp.channel_groups(net, X, params=params)
    assert len(prunable(groups)) == 8 + 3
    [numbers] = tried
    assert len(numbers) == 8 + 3, "groups of equal size lose different numbers"


def test_groups_with_equal_numbers_are_separated():
    sizes, fewer = [8] * 5 + [4, 8], dict.fromkeys(range(5), 5) | {5: 2, 6: 3}
    groups = [types.SimpleNamespace(size=size) for size in sizes]
    family_of = {0: 0, 1: 1, 2: 0, 3: 1, 4: 2, 5: 3, 6: 3}
    choices = list(apart(groups, set(fewer), fewer, family_of))
    assert len(choices) == 3
    assert all({5, 6} <= chosen for chosen in choices), "these differ from all others"
    for pair in itertools.combinations(range(5), 2):
        assert any(len({*pair} & chosen) == 1 for chosen in choices)


def test_repeated_groups_far_from_each_other_take_no_further_trial():
    fewer = {i: 20 + i % 8 for i in range(16)}
    groups = [types.SimpleNamespace(size=32)] * 16
    assert not list(apart(groups, set(fewer), fewer, dict.fromkeys(fewer, 0)))
    fewer = {i: 20 + i % 7 for i in range(16)}
    assert len(list(apart(groups, set(fewer), fewer, dict.fromkeys(fewer, 0)))) == 1


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0], [1, 2, 3], [4]], [[0, 1]]])
def test_groups_are_separated_into_those_that_hold_together(parts):
    def holds(some):
        return all(len({*part} & {*some}) in (0, len(part)) for part in parts)

    members = [i for part in parts for i in part]
    assert list(separated(members, holds)) == parts
