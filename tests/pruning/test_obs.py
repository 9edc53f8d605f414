"""The order of an optimal brain surgeon, compared with a search that always refits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from flax import nnx

import tpp_jax as tpp
from tests.pruning.consumers import KINDS, example, jacobian
from tests.pruning.test_moments import draw
from tpp_jax.pruning import obs
from tpp_jax.pruning.criteria import CRITERIA, group_scores
from tpp_jax.pruning.obs import reader_of, removals


def least_error(damped, weights, lost):
    """The smallest damped error of the outputs without the features that are lost."""
    kept = np.setdiff1d(np.arange(len(damped)), lost)
    across = damped[np.ix_(lost, kept)]
    inside = damped[np.ix_(kept, kept)]
    left = damped[np.ix_(lost, lost)] - across @ np.linalg.solve(inside, across.T)
    return np.trace(weights[lost].T @ left @ weights[lost])


def search(problems, size):
    """Order and costs, where every removal tries all channels and refits all layers.

    Of problems, each has damped moments, weights, and features of each channel.
    """
    order, total = [], [0.0]

    def error(channels):
        return sum(
            least_error(damped, weights, np.concatenate([of[c] for c in channels]))
            for damped, weights, of in problems
        )

    for _ in range(size):
        rest = [c for c in range(size) if c not in order]
        errors = [error([*order, c]) for c in rest]
        order.append(rest[int(np.argmin(errors))])
        total.append(min(errors))
    return order, np.diff(total)


def correlated(rng, n):
    rows = rng.normal(size=(4 * n, n)) @ rng.normal(size=(n, n))
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("sizes", [(1,), (3,), (1, 2), (1, 1, 1)])
def test_downdates_are_refits(sizes, monkeypatch):
    """Several layers, with features that belong to no channel, in several blocks."""
    monkeypatch.setattr(obs, "_COLUMNS", 5)
    rng, n = np.random.default_rng(0), 12
    readers, problems = [], []
    for size in sizes:
        count = n * size + 2
        moments, weights = correlated(rng, count), rng.normal(size=(count, 4))
        features = rng.permutation(count)[: n * size].reshape(n, size)
        readers.append(reader_of(moments, weights, features, 0.01))
        damped = moments + 0.01 * np.trace(moments) / count * np.eye(count)
        problems.append((damped, weights, features))
    order, costs = removals(readers, n)
    expected = search(problems, n)
    assert order.tolist() == expected[0]
    np.testing.assert_allclose(costs, expected[1], rtol=1e-8, atol=1e-9)


def test_channels_that_are_combinations_of_others_are_removed_first_and_cost_nothing():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 5))
    rows = np.concatenate([rows, rows @ rng.normal(size=(5, 3))], axis=1)
    features = np.arange(8)[:, None]
    weights = rng.normal(size=(8, 4))
    reader = reader_of(rows.T @ rows / 200, weights, features, 1e-12)
    _, costs = removals([reader], 8)
    assert costs[:3].max() < 1e-9
    assert costs[3:].min() > 1e-3


def test_channels_may_have_unequal_numbers_of_features():
    rng = np.random.default_rng(1)
    moments, weights = correlated(rng, 6), rng.normal(size=(6, 2))
    features = np.array([[0, 3], [1, -1], [2, 5], [-1, -1]])
    order, costs = removals([reader_of(moments, weights, features, 0.01)], 4)
    damped = moments + 0.01 * np.trace(moments) / 6 * np.eye(6)
    of = [np.array([f for f in own if f >= 0], int) for own in features]
    expected = search([(damped, weights, of)], 4)
    assert order.tolist() == expected[0]
    assert order[0] == 3
    np.testing.assert_allclose(costs, expected[1], rtol=1e-8, atol=1e-12)


def materialised(entry, rows, kernel, member):
    """One problem for each stack, from the rows that were read, as relative errors."""
    problems, energy = [], 0.0
    index = entry.weight_index()
    at = np.unravel_index(index[0, :, 0], kernel.shape)[member.axis]
    of = [np.flatnonzero(np.isin(at, own)) for own in member.positions]
    count = len(rows) / (len(entry.stacks) * len(entry.outputs))
    for s in range(len(entry.stacks)):
        own = rows[:, index[s, :, 0]]
        moments = own.T @ own / count
        weights = np.asarray(kernel, np.float64).reshape(-1)[index[s]]
        energy += np.trace(weights.T @ moments @ weights)
        damping = max(0.1 * len(moments) / entry.rows[s], 1e-4)
        damped = moments + damping * np.trace(moments) / len(moments) * np.eye(len(at))
        problems.append([damped, weights, of])
    for problem in problems:
        problem[1] = problem[1] / np.sqrt(energy)
    return problems


@pytest.mark.parametrize("kind", list(KINDS))
def test_scores_follow_from_what_layers_of_all_kinds_read(kind):
    fn, params, batches, reader = example(kind)
    groups = tpp.channel_groups(fn, batches[0], params=params)
    moments = tpp.input_moments(fn, batches, params)
    kernel = params["second"]["kernel"]
    leaves = {"second.kernel": kernel}
    rows = jacobian(params, batches, reader)
    outputs = sum(len(e.stacks) * len(e.outputs) for e in moments.consumers)
    for group in (g for g in groups if g.reason is None):
        found = moments.readers_of(group)
        problems = []
        for member, entry in found:
            own = rows * (outputs / (len(entry.stacks) * len(entry.outputs))) ** 0.5
            problems += materialised(entry, own, kernel, member)
        order, costs = search(problems, group.size)
        scores = group_scores(group, leaves, CRITERIA["obs"], statistics=moments)
        assert np.argsort(scores).tolist() == order
        expected = scipy.optimize.isotonic_regression(costs).x
        np.testing.assert_allclose(scores[order], expected, rtol=1e-3, atol=1e-6)


class Branches(nnx.Module):
    """A residual branch with a norm, and one without anything."""

    def __init__(self, rngs):
        self.up = nnx.Linear(3, 6, rngs=rngs)
        self.down = nnx.Linear(6, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs, epsilon=0.1)
        self.wide = nnx.Linear(3, 6, rngs=rngs)
        self.narrow = nnx.Linear(6, 4, use_bias=False, rngs=rngs)

    def __call__(self, x):
        stem = 5 * x[..., :1]
        y = stem + self.norm(self.down(nnx.relu(self.up(x))))
        return y, stem + self.narrow(nnx.relu(self.wide(x)))


def branches():
    model = Branches(nnx.Rngs(0))
    model.norm.scale[...] = jnp.array([0.0, 0.0, 2.0, -3.0])
    model.norm.var[...] = jnp.array([1.0, 2.0, 3.0, 4.0])
    model.eval()
    return model, draw(200, 3)


def test_what_is_behind_a_kernel_is_measured():
    model, x = branches()
    moments = tpp.input_moments(model, [x[:80], x[80:]])
    [down], [narrow] = moments.of("down.kernel"), moments.of("narrow.kernel")
    np.testing.assert_allclose(
        down.gain[0], [0, 0, 2 / 3.1**0.5, 3 / 4.1**0.5], rtol=1e-6
    )
    np.testing.assert_array_equal(narrow.gain, np.ones((1, 4)))
    for entry, output in zip((down, narrow), model(x), strict=True):
        y = np.asarray(output, np.float64)
        square, rows = np.mean(y**2), np.mean(y**2, axis=1)
        harmonic = square if entry is down else 1 / np.mean(1 / rows)
        expected = square, np.mean(y.var(axis=0)), harmonic
        np.testing.assert_allclose(entry.stream[0], expected, rtol=1e-5)


def test_errors_are_those_behind_a_norm_relative_to_the_stream():
    model, x = branches()
    groups = tpp.channel_groups(model, x)
    moments = tpp.input_moments(model, [x])
    for name, reader in (("up", "down"), ("wide", "narrow")):
        read = np.asarray(nnx.relu(getattr(model, name)(x)), np.float64)
        kernel = np.asarray(getattr(model, reader).kernel, np.float64)
        output = np.asarray(model(x)[name == "wide"], np.float64)
        if name == "up":  # its mean can be taken up, and the norm scales its outputs
            read -= read.mean(axis=0)
            kernel *= np.asarray(
                model.norm.scale[...] / (model.norm.var[...] + 0.1) ** 0.5
            )
            output -= output.mean(axis=0)
        square = read.T @ read / 200
        damped = square + 0.1 * 6 / 200 * np.trace(square) / 6 * np.eye(6)
        if name == "up":
            variance = np.trace(read.T @ read / 200) / 6
            damped = square + 0.1 * 6 / 200 * variance * np.eye(6)
        size = np.sum(output**2, axis=1)
        if name == "wide":  # as a norm of each row sees it
            size = 1 / np.mean(1 / size)
        weights = kernel / np.sqrt(np.mean(size))
        order, costs = search([(damped, weights, np.arange(6)[:, None])], 6)
        leaves = {f"{reader}.kernel": getattr(model, reader).kernel[...]}
        scores = group_scores(groups[name], leaves, CRITERIA["obs"], statistics=moments)
        expected = scipy.optimize.isotonic_regression(costs).x
        np.testing.assert_allclose(scores[order], expected, rtol=1e-3)


def test_layers_of_a_loop_count_as_if_they_were_written_out():
    rng = np.random.default_rng(0)
    params = {"up": draw(2, 3, 6), "down": draw(2, 6, 3, seed=1) * 0.3}
    x = jnp.asarray(rng.normal(size=(50, 3)), jnp.float32)

    def layer(x, p):
        return x + jax.nn.relu(x @ p["up"]) @ p["down"], None

    def looped(p, x):
        return jax.lax.scan(layer, x, p)[0]

    def written_out(p, x):
        for i in range(2):
            x, _ = layer(x, {"up": p["up"][i], "down": p["down"][i]})
        return x

    scores = []
    for fn in (looped, written_out):
        groups = tpp.channel_groups(fn, x, params=params)
        group = dataclasses.replace(
            groups["up"], steps=None
        )  # the layers share one set
        moments = tpp.input_moments(fn, [x], params)
        scores.append(group_scores(group, params, CRITERIA["obs"], statistics=moments))
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-4)


def test_with_a_target_errors_are_weighed_against_what_channels_cost():
    """Two equal layers, one of which is read at one position of sixteen alone."""
    w = {"up": draw(3, 8), "down": draw(8, 4, seed=1)}
    params = {"far": w, "near": w}

    def fn(p, x):
        def read(q, x):
            return jax.nn.relu(x @ q["up"]) @ q["down"]

        return read(p["far"], x), read(p["near"], x[:, :1])

    x = draw(60, 16, 3)
    groups = tpp.channel_groups(fn, x, params=params)
    moments = tpp.input_moments(fn, [x], params)
    arguments = dict(criterion="obs", statistics=moments, scope="global")
    plan = tpp.make_plan(groups, params, flops=0.7, **arguments)
    assert len(plan.pruned("far.up")) > len(plan.pruned("near.up")) == 0
    plan = tpp.make_plan(groups, params, params=0.7, **arguments)
    assert abs(len(plan.pruned("far.up")) - len(plan.pruned("near.up"))) <= 1
    plan = tpp.make_plan(groups, params, 0.3, **arguments)
    assert abs(len(plan.pruned("far.up")) - len(plan.pruned("near.up"))) <= 1


def test_variances_alone_do_not_make_an_order():
    params = {"w1": draw(3, 6), "w2": draw(6, 2)}
    fn = lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"]  # noqa: E731
    x = draw(40, 3)
    groups = tpp.channel_groups(fn, x, params=params)
    moments = tpp.input_moments(fn, [x], params, diagonal=True)
    with pytest.raises(tpp.TPPError, match="without diagonal=True"):
        tpp.make_plan(groups, params, 0.5, criterion="obs", statistics=moments)


def test_of_equal_channels_one_remains():
    """The refit of the others makes up for them, which sizes alone do not see."""
    w1 = np.repeat(np.asarray(draw(3, 3)), 2, axis=1)
    params = {"w1": jnp.asarray(w1), "w2": draw(6, 2, seed=1)}
    fn = lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"]  # noqa: E731
    x = draw(4000, 3)
    groups = tpp.channel_groups(fn, x, params=params)
    moments = tpp.input_moments(fn, [x], params)
    plan = tpp.make_plan(groups, params, 0.5, criterion="obs", statistics=moments)
    assert sorted(plan.kept["w1"] // 2) == [0, 1, 2]
    small = tpp.compensate(fn, plan, params=params, moments=moments, damping=0)
    np.testing.assert_allclose(fn(small, x), fn(params, x), atol=1e-4)
