"""Numbers that follow widths: those that are explained need no further trial."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpp_jax as tpp
from tpp_jax.pruning.source import Source

X = jnp.ones((2, 6))
PARAMS = {"up": jnp.ones((6, 16)), "down": jnp.ones((16, 4))}


def _mean(p, x):
    h = x @ p["up"]
    return (h - h.mean(-1, keepdims=True)) @ p["down"]


def _root_of_reduced(p, x):
    h = x @ p["up"]
    norm = jnp.sqrt(jnp.square(h).sum(-1, keepdims=True))
    return (h * p["up"].shape[1] ** 0.5 / norm) @ p["down"]


def _root_of_plain(p, x):
    h = x @ p["up"]
    return (h * p["up"].shape[1] ** -0.5) @ p["down"]


def _other_factor(p, x):
    h = x @ p["up"]
    return (h * (p["up"].shape[1] + 3.0)) @ p["down"]


def _traces(monkeypatch, network):
    """Returns the group of ``up``, and how often the cut model was traced."""
    count = 0
    trace_cut = Source.trace_cut

    def counted(self, *args):
        nonlocal count
        count += 1
        return trace_cut(self, *args)

    monkeypatch.setattr(Source, "trace_cut", counted)
    groups = tpp.channel_groups(network, X, params=PARAMS)
    return groups["up"], count


@pytest.mark.parametrize("network", [_mean, _root_of_reduced])
def test_numbers_that_follow_reduced_groups_need_no_separate_trial(
    monkeypatch, network
):
    group, count = _traces(monkeypatch, network)
    assert group.reason is None and group.reduced
    assert count == 1


@pytest.mark.parametrize("network", [_root_of_plain, _other_factor])
def test_groups_whose_width_scales_the_values_count_as_reduced(network):
    group = tpp.channel_groups(network, X, params=PARAMS)["up"]
    assert group.reason is None and group.reduced


def test_a_number_is_ascribed_to_its_own_group_among_several():
    params = {
        "one": jnp.ones((6, 16)),
        "two": jnp.ones((16, 24)),
        "three": jnp.ones((24, 4)),
    }

    def network(p, x):
        h = jax.nn.relu(x @ p["one"]) @ p["two"]
        return (h * p["two"].shape[1] ** -0.5) @ p["three"]

    groups = tpp.channel_groups(network, X, params=params)
    assert {g.name: g.reduced for g in groups if g.reason is None} == {
        "one": False,
        "two": True,
    }


def test_no_cut_is_traced_twice(monkeypatch):
    seen = []
    trace_cut = Source.trace_cut

    def recorded(self, plan, shapes):
        kept = {name: np.asarray(k).tobytes() for name, k in plan.kept.items()}
        seen.append((kept, plan.groups.sizes))
        return trace_cut(self, plan, shapes)

    monkeypatch.setattr(Source, "trace_cut", recorded)

    def network(p, x):
        h = (x @ p["up"]).reshape(2, 4, 4)
        return h.reshape(2, -1) @ p["down"]

    tpp.channel_groups(network, X, params=PARAMS)
    assert all(one not in seen[:i] for i, one in enumerate(seen))
