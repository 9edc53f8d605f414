"""Refits compared with NumPy's least squares on what the layers read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import tpp_jax as tpp
from tests.pruning.consumers import KINDS, example, jacobian
from tests.pruning.test_moments import (
    Block,
    draw,
    sorted_experts,
    stacked_layers,
    stacked_parameters,
)
from tests.reference import filled

FEW_ROWS = "ignore:there are fewer than 3 rows"


def half(fn, params, batches):
    """A plan that removes half of the channels of every group."""
    groups = tpp.channel_groups(fn, batches[0], params=params)
    return tpp.make_plan(groups, params, 0.5)


def kept_weights(plan, params):
    """Which weights of the second kernel are kept, flat."""
    mask = np.asarray(tpp.mask_tree(plan, params)["second"]["kernel"])
    return mask.reshape(-1) > 0


def ridge(rows, keep, weights, damping, outputs):
    """The refit weights, by ridge regression around those that are there.

    Of ``outputs``, each has the indices of its weights. Those of others have zeros in
    its rows.
    """
    refit = weights.copy()
    for index in outputs:
        own, lost = index[keep[index]], index[~keep[index]]
        gram = rows[:, own].T @ rows[:, own]
        gram += damping * np.trace(gram) / len(own) * np.eye(len(own))
        target = rows[:, own].T @ rows[:, lost] @ weights[lost]
        refit[own] += np.linalg.solve(gram, target)
    return refit[keep]


@pytest.mark.filterwarnings(FEW_ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_kept_weights_are_those_of_ridge_regression(kind):
    fn, params, batches, reader = example(kind)
    plan = half(fn, params, batches)
    small = tpp.compensate(fn, plan, batches, params, damping=0.1)
    rows, keep = jacobian(params, batches, reader), kept_weights(plan, params)
    weights = np.asarray(params["second"]["kernel"], np.float64).reshape(-1)
    entries = tpp.input_moments(fn, batches, params).consumers
    outputs = [i for e in entries for each in e.weight_index() for i in each.T]
    expected = ridge(rows, keep, weights, 0.1, outputs)
    got = np.asarray(small["second"]["kernel"]).reshape(-1)
    assert keep.sum() < keep.size
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings(FEW_ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_without_damping_the_outputs_are_those_of_least_squares(kind):
    fn, params, batches, reader = example(kind)
    plan = half(fn, params, batches)
    small = tpp.compensate(fn, plan, batches, params, damping=0)
    rows, keep = jacobian(params, batches, reader), kept_weights(plan, params)
    target = rows @ np.asarray(params["second"]["kernel"], np.float64).reshape(-1)
    best = np.linalg.lstsq(rows[:, keep], target, rcond=None)[0]
    fitted = rows[:, keep] @ np.asarray(small["second"]["kernel"]).reshape(-1)
    np.testing.assert_allclose(fitted, rows[:, keep] @ best, rtol=1e-3, atol=2e-4)


def test_with_a_bias_the_fit_has_an_intercept():
    """The biases of a convolution and of a dense layer, and the mean of a norm."""
    model = filled(lambda: Block(nnx.Rngs(0)))
    model.eval()
    batches = [draw(6, 5, 5, 2, seed=i) + 0.5 for i in range(3)]
    groups = tpp.channel_groups(model, batches[0])
    plan = tpp.make_plan(groups, model, {"conv1": 0.5, "conv3": 0.5})
    small = tpp.compensate(model, plan, batches, damping=0)

    x = jnp.concatenate(batches)
    read = nnx.relu(model.conv1(x))
    y = np.asarray(model.conv2(read) - model.norm.mean[...])
    kept = read[..., plan.kept["conv1"]]
    kernel = small.conv2.kernel[...]
    derivative = jax.jacobian(
        lambda w: jax.lax.conv_general_dilated(
            kept, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )[..., :1]
    )(kernel)[..., :1]
    rows = np.asarray(derivative, np.float64).reshape(y[..., 0].size, -1)
    rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    best = rows @ np.linalg.lstsq(rows, y.reshape(len(rows), -1), rcond=None)[0]
    got = np.asarray(small.conv2(kept) - small.norm.mean[...]).reshape(best.shape)
    np.testing.assert_allclose(got, best, rtol=1e-4, atol=1e-4)

    y = nnx.relu(model.norm(model.conv2(read)))
    read = jnp.mean(nnx.relu(model.conv3(y)) ** 2, (1, 2))
    kept = read[:, plan.kept["conv3"]]
    rows = np.concatenate([kept, np.ones((len(read), 1))], axis=1)
    best = rows @ np.linalg.lstsq(rows, np.asarray(model.head(read)), rcond=None)[0]
    np.testing.assert_allclose(small.head(kept), best, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings(FEW_ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_channels_that_are_combinations_of_others_cost_nothing(kind):
    """Without a ReLU, the channels of one input are all multiples of each other."""
    reader, _ = KINDS[kind]
    _, params, batches, _ = example(kind)
    params["first"]["kernel"] = params["first"]["kernel"][:1]
    batches = [x[..., :1] for x in batches]

    def fn(p, x):
        return reader(p["second"]["kernel"], x @ p["first"]["kernel"])

    plan = half(fn, params, batches)
    small = tpp.compensate(fn, plan, batches, params, damping=0)
    for x in batches:
        np.testing.assert_allclose(fn(small, x), fn(params, x), rtol=1e-4, atol=2e-4)


@pytest.mark.filterwarnings(FEW_ROWS)
def test_every_layer_of_a_stack_is_refit_by_itself():
    params, x = stacked_parameters(), draw(40, 3)
    plan = half(stacked_layers, params, [x])
    small = tpp.compensate(stacked_layers, plan, [x], params, damping=0)
    h = x
    for i in (0, 1):
        read = np.asarray(jax.nn.relu(h @ params["up"][i] + params["b"][i]))
        target = read @ params["down"][i]
        best = np.linalg.lstsq(read[:, plan.kept["up"][i]], target, rcond=None)[0]
        np.testing.assert_allclose(small["down"][i], best, rtol=1e-4, atol=1e-4)
        h = h + target + params["c"][i]


@pytest.mark.filterwarnings(FEW_ROWS)
def test_an_expert_is_refit_to_its_own_rows_and_left_alone_without_any():
    params = {"up": draw(3, 4, 6), "down": draw(3, 6, 2, seed=1)}
    x = draw(40, 4, seed=2)
    plan = half(sorted_experts, params, [x])
    small = tpp.compensate(sorted_experts, plan, [x], params, damping=0)
    kept = plan.kept["up"]
    for e, own in enumerate((x[:25], x[25:])):
        read = np.asarray(jax.nn.relu(own @ params["up"][e]))
        best = np.linalg.lstsq(read[:, kept], read @ params["down"][e], rcond=None)[0]
        np.testing.assert_allclose(small["down"][e], best, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(small["down"][2], params["down"][2][kept])


def test_linen_variables_are_refit():
    net = linen.Sequential([linen.Dense(6), linen.relu, linen.Dense(2)])
    x = draw(40, 3)
    variables = net.init(jax.random.key(0), x)
    groups = tpp.channel_groups(net, x, params=variables)
    plan = tpp.make_plan(groups, variables, 0.5)
    small = tpp.compensate(net, plan, [x], variables)
    apply = tpp.linen_apply(net, plan)
    plain = tpp.prune(net, plan, variables)

    def error(v):
        return float(jnp.mean((apply(v, x) - net.apply(variables, x)) ** 2))

    assert error(small) < 0.7 * error(plain)
    shapes = functools.partial(jax.tree.map, jnp.shape)
    assert shapes(small) == shapes(plain)


def test_the_model_is_not_modified_and_moments_can_be_given():
    model = filled(lambda: Block(nnx.Rngs(0)))
    before = jax.tree.map(jnp.copy, nnx.state(model))
    batches = [draw(20, 5, 5, 2)]
    plan = tpp.make_plan(tpp.channel_groups(model, batches[0]), model, 0.5)
    small = tpp.compensate(model, plan, batches)
    moments = tpp.input_moments(model, batches)
    again = tpp.compensate(model, plan, moments=moments)
    for one, other in (
        (before, nnx.state(model)),
        (nnx.state(small), nnx.state(again)),
    ):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert type(small) is Block
    assert not small.norm.use_running_average


def test_means_alone_move_into_biases():
    """Of moments in diagonal mode: FLAP's compensation."""
    params = {"w1": draw(3, 6), "w2": draw(6, 2), "b": draw(2)}
    fn = lambda p, x: jnp.exp(x @ p["w1"]) @ p["w2"] + p["b"]  # noqa: E731
    x = draw(40, 3)
    plan = half(fn, params, [x])
    moments = tpp.input_moments(fn, [x], params, diagonal=True)
    with pytest.warns(UserWarning, match="not refit: w2 .of its 6 features only"):
        small = tpp.compensate(fn, plan, params=params, moments=moments)
    lost = plan.pruned("w1")
    mean = jnp.exp(x @ params["w1"]).mean(0)
    expected = params["b"] + mean[lost] @ params["w2"][lost]
    np.testing.assert_allclose(small["b"], expected, rtol=1e-5)
    np.testing.assert_array_equal(small["w2"], params["w2"][plan.kept["w1"]])


def test_it_warns_of_what_is_not_refit_and_of_too_little_data():
    params = {"w1": draw(3, 6), "w2": draw(6, 2)}
    fn = lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"]  # noqa: E731
    x = draw(8, 3)
    plan = half(fn, params, [x])
    with pytest.warns(UserWarning, match="fewer than 3 rows of data .* in w2"):
        tpp.compensate(fn, plan, [x], params)
    normed = lambda p, x: jnp.tanh(x @ p["w1"]) @ (p["w2"] / jnp.sum(p["w2"]))  # noqa: E731
    plan = half(normed, params, [x])
    with pytest.warns(UserWarning, match="not refit: w2 .its kernel is computed"):
        small = tpp.compensate(normed, plan, [x], params)
    np.testing.assert_array_equal(small["w2"], params["w2"][plan.kept["w1"]])


def test_wrong_arguments_are_refused():
    params = {"w1": draw(3, 6), "w2": draw(6, 6), "w3": draw(6, 2)}
    fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["w1"]) @ p["w2"]) @ p["w3"]  # noqa: E731
    x = draw(40, 3)
    plan = half(fn, params, [x])
    for damping in (-1, "heldout"):
        with pytest.raises(tpp.TPPError, match="at least 0"):
            tpp.compensate(fn, plan, [x], params, damping=damping)
    with pytest.raises(tpp.TPPError, match="pass batches, or moments"):
        tpp.compensate(fn, plan, params=params)
    moments = tpp.input_moments(fn, [x], params, [plan.groups["w1"]])
    with pytest.raises(tpp.TPPError, match="not those of w3"):
        tpp.compensate(fn, plan, params=params, moments=moments)


def test_arrays_keep_their_types():
    params = {"w1": np.ones((3, 6), np.float16), "w2": jnp.ones((6, 2), jnp.bfloat16)}
    fn = lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"]  # noqa: E731
    plan = half(fn, params, [draw(40, 3)])
    small = tpp.compensate(fn, plan, [draw(40, 3)], params)
    assert isinstance(small["w1"], np.ndarray)
    assert (small["w1"].dtype, small["w2"].dtype) == (np.float16, jnp.bfloat16)
    # All channels are equal: the kept half does the work of both.
    np.testing.assert_allclose(np.asarray(small["w2"], np.float32), 2, rtol=1e-2)
