"""Refits in order of execution, compared with least squares; held-out data."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import tpp_jax as tpp
from tests.pruning.consumers import example
from tests.pruning.test_compensation import half
from tests.pruning.test_moments import Block, draw, stacked_layers, stacked_parameters
from tests.reference import filled

FEW_ROWS = "ignore:there are fewer than 3 rows"
ONCE = "dense strided grouped transposed experts".split()
ONCE += ["transposed, gradient", "channels first", "attention output", "cut and turned"]


def chain(p, x):
    """Three layers, the last of which has a bias."""
    h = jax.nn.relu(x @ p["w1"])
    h = jnp.tanh(h @ p["w2"])
    return h, h @ p["w3"] + p["b3"]


def chain_and_data():
    params = {
        "w1": draw(4, 10),
        "w2": draw(10, 8, seed=1) / 3,
        "w3": draw(8, 2, seed=2),
        "b3": draw(2, seed=3),
    }
    return params, [draw(60, 4, seed=i) for i in (4, 5, 6)]


def with_ones(rows):
    return np.concatenate([rows, np.ones((len(rows), 1))], axis=1)


def least_squares(rows, targets):
    return rows @ np.linalg.lstsq(rows, targets, rcond=None)[0]


def test_each_layer_is_refit_to_what_the_refit_layers_before_it_give():
    params, batches = chain_and_data()
    fn = lambda p, x: chain(p, x)[1]  # noqa: E731
    plan = half(fn, params, batches)
    small = tpp.compensate(fn, plan, batches, params, damping=0, sequential=True)
    x = jnp.concatenate(batches)
    read = np.asarray(jax.nn.relu(x @ small["w1"]), np.float64)
    target = jax.nn.relu(x @ params["w1"]) @ params["w2"]
    best = least_squares(read, np.asarray(target)[:, plan.kept["w2"]])
    np.testing.assert_allclose(read @ small["w2"], best, rtol=1e-3, atol=1e-4)
    read, got = chain(small, x)
    best = least_squares(with_ones(np.asarray(read, np.float64)), fn(params, x))
    np.testing.assert_allclose(got, best, rtol=1e-3, atol=1e-4)
    at_once = tpp.compensate(fn, plan, batches, params, damping=0)
    errors = [jnp.mean((fn(p, x) - fn(params, x)) ** 2) for p in (small, at_once)]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.filterwarnings(FEW_ROWS)
@pytest.mark.parametrize("kind", ONCE)
def test_the_first_layer_of_any_kind_is_refit_as_by_itself(kind):
    """Its inputs are those of the unpruned network."""
    fn, params, batches, _ = example(kind)
    plan = half(fn, params, batches)
    moments = tpp.input_moments(fn, batches, params)
    assert all(entry.once for entry in moments.consumers)
    trees = [
        tpp.compensate(
            fn,
            plan,
            batches,
            params,
            moments=moments,
            damping=0.1,
            sequential=sequential,
        )
        for sequential in (False, True)
    ]
    one, other = (tree["second"]["kernel"] for tree in trees)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings(FEW_ROWS)
@pytest.mark.parametrize("kind", ["shared", "scanned", "branch"])
def test_layers_in_loops_or_of_several_uses_keep_their_first_refit(kind):
    fn, params, batches, _ = example(kind)
    plan = half(fn, params, batches)
    assert not any(e.once for e in tpp.input_moments(fn, batches, params).consumers)
    one, other = (
        tpp.compensate(fn, plan, batches, params, sequential=sequential)
        for sequential in (False, True)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.filterwarnings(FEW_ROWS)
def test_what_surrounds_a_loop_is_refit():
    params = {"in": draw(3, 8), "out": draw(8, 3, seed=5), "loop": stacked_parameters()}

    def fn(p, x):
        return stacked_layers(p["loop"], jnp.tanh(x @ p["in"]) @ p["out"])

    batches = [draw(40, 3), draw(30, 3, seed=1)]  # of unequal sizes
    plan = half(fn, params, batches)
    small = tpp.compensate(fn, plan, batches, params, damping=0, sequential=True)
    x = jnp.concatenate(batches)
    read = np.asarray(jnp.tanh(x @ small["in"]), np.float64)
    best = least_squares(read, np.asarray(jnp.tanh(x @ params["in"]) @ params["out"]))
    np.testing.assert_allclose(read @ small["out"], best, rtol=1e-3, atol=1e-4)


def test_biases_and_means_of_norms_take_up_what_is_left():
    model = filled(lambda: Block(nnx.Rngs(0)))
    model.eval()
    batches = [draw(30, 5, 5, 2, seed=i) + 0.5 for i in range(3)]
    groups = tpp.channel_groups(model, batches[0])
    plan = tpp.make_plan(groups, model, {"conv1": 0.5, "conv2": 0.5, "conv3": 0.5})
    small = tpp.compensate(model, plan, batches, damping=0, sequential=True)
    assert type(small) is Block
    small.eval()
    x = jnp.concatenate(batches)

    def read_by_head(net):
        y = nnx.relu(net.norm(net.conv2(nnx.relu(net.conv1(x)))))
        return jnp.mean(nnx.relu(net.conv3(y)) ** 2, (1, 2))

    def behind_conv2(net):
        y = net.conv2(nnx.relu(net.conv1(x))) - net.norm.mean[...]
        return np.asarray(y).reshape(-1, y.shape[-1])

    # An intercept leaves nothing of the mean.
    kept = plan.kept["conv2"]
    apart = behind_conv2(small) - behind_conv2(model)[:, kept]
    np.testing.assert_allclose(apart.mean(0), 0, atol=1e-5)
    rows = with_ones(np.asarray(read_by_head(small), np.float64))
    best = least_squares(rows, np.asarray(model.head(read_by_head(model))))
    np.testing.assert_allclose(small(x), best, rtol=1e-4, atol=1e-4)


def test_linen_variables_are_refit_in_order():
    net = linen.Sequential(
        [linen.Dense(8), linen.relu, linen.Dense(8), linen.LayerNorm(), linen.Dense(2)]
    )
    x = draw(100, 3)
    variables = net.init(jax.random.key(0), x)
    plan = tpp.make_plan(tpp.channel_groups(net, x, params=variables), variables, 0.5)
    apply = tpp.linen_apply(net, plan)
    errors = []
    for sequential in (False, True):
        small = tpp.compensate(net, plan, [x], variables, sequential=sequential)
        errors.append(jnp.mean((apply(small, x) - net.apply(variables, x)) ** 2))
    assert errors[1] < 0.9 * errors[0]
    # A layer norm over pruned channels is a reason to do so without being asked.
    by_default = tpp.compensate(net, plan, [x], variables)
    jax.tree.map(np.testing.assert_array_equal, by_default, small)


def test_the_damping_that_is_chosen_is_best_on_other_data():
    """With fewer rows than features, no fixed damping is near it for all noises."""
    rng = np.random.default_rng(0)
    for noise in (0.01, 3.0):
        w1 = rng.normal(size=(20, 12))
        w1[:, 6:] = w1[:, :6] + noise * w1[:, 6:]
        params = {"w1": jnp.float32(w1), "w2": draw(12, 4, seed=1)}
        fn = lambda p, x: (x @ p["w1"]) @ p["w2"]  # noqa: E731
        batches = [draw(5, 20, seed=i) for i in range(3)]
        groups = tpp.channel_groups(fn, batches[0], params=params)
        scores = {"w1": np.arange(12)[::-1]}
        plan = tpp.make_plan(groups, params, 0.5, scores=scores)
        other = draw(2000, 20, seed=9)

        def error(damping, plan=plan, fn=fn, params=params, batches=batches, x=other):
            small = tpp.compensate(fn, plan, batches, params, damping=damping)
            return float(jnp.mean((fn(small, x) - fn(params, x)) ** 2))

        chosen = error("held-out")  # without a warning of the few rows
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "there are fewer than 3 rows")
            fixed = [error(delta) for delta in (1e-4, 1e-2, 1.0, 100.0)]
        assert chosen < 1.3 * min(fixed)
        assert chosen < 0.8 * max(fixed)


def test_what_cannot_be_done_without_batches_is_refused():
    params, batches = chain_and_data()
    fn = lambda p, x: chain(p, x)[1]  # noqa: E731
    plan = half(fn, params, batches)
    moments = tpp.input_moments(fn, batches, params)
    for options in ({"sequential": True}, {"damping": "held-out"}):
        with pytest.raises(tpp.TPPError, match="there are 0 batches"):
            tpp.compensate(fn, plan, params=params, moments=moments, **options)
    with pytest.raises(tpp.TPPError, match="at least two"):
        tpp.compensate(fn, plan, batches[:1], params, damping="held-out")


def test_a_cut_of_zeros_is_left_as_it_is():
    """It is free already: a norm over the channels was rescaled."""
    params = {"in": draw(3, 8), "scale": draw(8, seed=1), "out": draw(8, 2, seed=2)}
    params["in"] = params["in"].at[:, 4:].set(0)
    params["scale"] = params["scale"].at[4:].set(0)

    def fn(p, x):
        x = x @ p["in"]
        size = jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 0.1)
        return (x / size * p["scale"]) @ p["out"]

    x = draw(40, 3, seed=3)
    groups = tpp.channel_groups(fn, x, params=params)
    plan = tpp.make_plan(groups, params, 0.5)
    small = tpp.compensate(fn, plan, [x], params, sequential=True)
    np.testing.assert_allclose(fn(small, x), fn(params, x), rtol=1e-5, atol=1e-5)
