"""Moments of what kernels read, compared with the Jacobians of the layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tpp_jax as tpp
from tests.pruning.consumers import KINDS, example, jacobian, repeated
from tests.reference import filled


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


def draw(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def stacked_layers(params, x):
    """Two layers in a loop, each with kernels of its own."""

    def layer(x, p):
        return x + jax.nn.relu(x @ p["up"] + p["b"]) @ p["down"] + p["c"], None

    return lax.scan(layer, x, params)[0]


def stacked_parameters():
    return {
        "up": draw(2, 3, 5),
        "b": draw(2, 5, seed=1),
        "down": draw(2, 5, 3, seed=2),
        "c": draw(2, 3, seed=3),
    }


def test_each_step_of_a_loop_over_layers_has_moments_of_its_own():
    params, x = stacked_parameters(), draw(7, 3)
    moments = tpp.input_moments(stacked_layers, [x, x * 2], params)
    [entry] = moments.of("down")
    rows = [[], []]
    for h in (x, x * 2):
        for i in (0, 1):
            hidden = jax.nn.relu(h @ params["up"][i] + params["b"][i])
            h = h + hidden @ params["down"][i] + params["c"][i]
            rows[i].append(hidden)
    for i in (0, 1):
        own = np.concatenate(rows[i])
        np.testing.assert_allclose(entry.mean[i], own.mean(0), rtol=1e-5, atol=1e-6)
        cov = np.cov(own.T, bias=True)
        np.testing.assert_allclose(entry.covariance[i], cov, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(entry.stacks, [0, 15])
    # The product is added to the stream together with the bias.
    assert entry.bias is None


def test_a_while_loop_adds_what_all_its_steps_read():
    params = {"first": {"kernel": draw(5, 6)}, "second": {"kernel": draw(6, 3, seed=1)}}

    def fn(params, x):
        z = jax.nn.relu(x @ params["first"]["kernel"])
        return repeated(params["second"]["kernel"], z)

    x = draw(4, 5, seed=2)
    [entry] = tpp.input_moments(fn, [x], params).consumers
    z = np.asarray(jax.nn.relu(x @ params["first"]["kernel"]))
    rows = np.concatenate([z * i for i in (1, 2, 3)])
    np.testing.assert_allclose(entry.mean[0], rows.mean(0), rtol=1e-5)
    cov = np.cov(rows.T, bias=True)
    np.testing.assert_allclose(entry.covariance[0], cov, rtol=1e-5, atol=1e-6)


def sorted_experts(params, x):
    """Each expert reads the rows that are sorted to it; the third has none."""
    sizes = jnp.array([len(x) - 15, 15, 0], jnp.int32)
    hidden = jax.nn.relu(lax.ragged_dot(x, params["up"], sizes))
    return lax.ragged_dot(hidden, params["down"], sizes)


@pytest.mark.parametrize("diagonal", [False, True])
def test_experts_of_a_ragged_product_have_moments_of_their_rows(diagonal):
    params = {"up": draw(3, 4, 6), "down": draw(3, 6, 2, seed=1)}
    x = draw(40, 4, seed=2)
    moments = tpp.input_moments(sorted_experts, [x], params, diagonal=diagonal)
    [entry] = moments.of("down")
    np.testing.assert_array_equal(entry.rows, [25, 15, 0])
    for e, own in enumerate((x[:25], x[25:])):
        read = np.asarray(jax.nn.relu(own @ params["up"][e]))
        np.testing.assert_allclose(entry.mean[e], read.mean(0), rtol=1e-5)
        np.testing.assert_allclose(entry.variance[e], read.var(0), rtol=1e-4)
        if entry.covariance is not None:
            cov = np.cov(read.T, bias=True)
            np.testing.assert_allclose(entry.covariance[e], cov, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(entry.variance[2], 0)


class Block(nnx.Module):
    """Convolutions with a bias, with a norm behind them, and with neither."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(4, 6, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.conv3 = nnx.Conv(6, 4, (1, 1), use_bias=False, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.conv1(x))
        y = nnx.relu(self.norm(self.conv2(y)))
        y = nnx.relu(self.conv3(y)) ** 2
        return self.head(y.mean((1, 2)))


def test_a_shift_is_taken_up_by_a_bias_or_by_the_mean_of_a_norm():
    model = filled(lambda: Block(nnx.Rngs(0)))
    moments = tpp.input_moments(model, [draw(3, 5, 5, 2)])
    found = {e.leaf: e.bias and (e.bias.leaf, e.bias.sign) for e in moments.consumers}
    assert found == {
        "conv2.kernel": ("norm.mean", -1),
        "conv3.kernel": None,
        "head.kernel": ("head.bias", 1),
    }
    [head] = moments.of("head.kernel")
    np.testing.assert_array_equal(head.bias.index, [[0, 1, 2]])
    assert not model.norm.use_running_average


def test_a_bias_of_several_layers_takes_up_nothing():
    params = {"w1": draw(3, 5), "w2": draw(5, 4), "w3": draw(4, 4), "w4": draw(4, 2)}

    def fn(p, x):
        y = jnp.tanh(jax.nn.relu(x @ p["w1"]) @ p["w2"] + p["b"])
        return jnp.tanh(y @ p["w3"] + p["b"]) @ p["w4"] + p["c"]

    params |= {"b": draw(4), "c": draw(2)}
    moments = tpp.input_moments(fn, [draw(6, 3)], params)
    found = {entry.leaf: entry.bias and entry.bias.leaf for entry in moments.consumers}
    assert found == {"w2": None, "w3": None, "w4": "c"}


def test_a_tied_head_is_measured_and_cannot_be_refit():
    params = {"table": draw(7, 6), "w": draw(6, 6)}

    def fn(p, tokens):
        h = p["table"][tokens]
        return (h + jax.nn.relu(h @ p["w"])) @ p["table"].T

    moments = tpp.input_moments(fn, [jnp.arange(6).reshape(2, 3)], params)
    fixed = {entry.leaf: entry.fixed for entry in moments.consumers}
    assert fixed["table"] == "its weights are used for something else too"
    assert fixed["w"] is None


def test_a_kernel_that_is_computed_is_skipped_with_the_reason():
    params = {"w1": draw(3, 5), "v": draw(5, 2), "g": jnp.ones(2)}

    def fn(p, x):
        kernel = p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=0)
        return jax.nn.relu(x @ p["w1"]) @ kernel

    moments = tpp.input_moments(fn, [draw(4, 3)], params)
    assert not moments.consumers
    assert "computed by more than moves" in moments.skipped["v"]


def test_kernels_of_which_there_is_no_data_are_not_measured():
    """Factors of low rank: what the second is multiplied with is the first."""
    params = {"w1": draw(3, 6), "a": draw(6, 2), "b": draw(2, 4)}
    fn = lambda p, x: jax.nn.relu(x @ p["w1"]) @ (p["a"] @ p["b"])  # noqa: E731
    assert not tpp.input_moments(fn, [draw(4, 3)], params).consumers


def test_only_the_given_groups_are_measured():
    params = {"w1": draw(3, 5), "w2": draw(5, 4), "w3": draw(4, 2)}
    fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["w1"]) @ p["w2"]) @ p["w3"]  # noqa: E731
    groups = tpp.channel_groups(fn, draw(4, 3), params=params)
    moments = tpp.input_moments(fn, [draw(4, 3)], params, [groups["w2"]])
    assert [entry.leaf for entry in moments.consumers] == ["w3"]


def test_linen_modules_and_several_inputs_are_measured():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, y, scale=1.0):
            return linen.Dense(2)(linen.relu(linen.Dense(5)(x)) * scale + y)

    net, x, y = Net(), draw(4, 3), draw(4, 1, seed=1)
    variables = net.init(jax.random.key(0), x, y)
    moments = tpp.input_moments(net, [(x, y)], variables, scale=2.0)
    [entry] = moments.consumers
    assert entry.leaf == "Dense_0.kernel"
    assert entry.bias.leaf == "Dense_0.bias"
    first = variables["params"]["Dense_1"]
    hidden = jax.nn.relu(x @ first["kernel"] + first["bias"]) * 2 + y
    np.testing.assert_allclose(entry.mean[0], hidden.mean(0), rtol=1e-5)


@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_batches_that_are_sharded_over_devices_have_the_same_moments(axes):
    fn, params, batches, _ = example("window")
    x = jnp.concatenate(batches + batches[:1])
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(getattr(AxisType, axes),))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
    copies = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    [one] = tpp.input_moments(fn, [x], params).consumers
    [other] = tpp.input_moments(fn, [sharded], copies).consumers
    np.testing.assert_allclose(one.covariance, other.covariance, rtol=1e-4, atol=1e-5)


def two_layers(params, x):
    return jnp.tanh(jnp.tanh(x @ params["w1"]) @ params["w2"]) @ params["w3"]


def divided_batch(params, x):
    """The program of each device, whose loop reads with the same kernel."""
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    split, same = PartitionSpec("batch"), PartitionSpec()

    @jax.shard_map(mesh=mesh, in_specs=(split, same), out_specs=split)
    def of_shard(x, params):
        h = jnp.tanh(x @ params["w1"])
        _, (h,) = lax.scan(lambda c, rows: (c, (rows @ params["w2"],)), 0.0, h[None])
        return jnp.tanh(h[0])

    return of_shard(x, params) @ params["w3"]


def replicas(params, x):
    parts = jax.pmap(two_layers, in_axes=(None, 0))(params, x.reshape(8, -1, 3))
    return parts.reshape(len(x), -1)


@pytest.mark.parametrize("program", [divided_batch, replicas])
def test_moments_of_what_devices_read_are_those_of_the_batch(program):
    params = {"w1": draw(3, 6), "w2": draw(6, 4), "w3": draw(4, 2)}
    batches = [draw(16, 3), 2 + draw(24, 3, seed=1)]
    moments = tpp.input_moments(program, batches, params)
    expected = tpp.input_moments(two_layers, batches, params)
    assert not moments.skipped
    for one, other in zip(moments.consumers, expected.consumers, strict=True):
        assert (one.leaf, one.fixed) == (other.leaf, other.fixed)
        np.testing.assert_array_equal(one.rows, other.rows)
        np.testing.assert_allclose(one.mean, other.mean, rtol=1e-5)
        np.testing.assert_allclose(one.covariance, other.covariance, atol=1e-6)


def test_kernels_that_a_mesh_divides_are_skipped_with_the_reason():
    mesh = jax.make_mesh((2, 4), ("batch", "model"), axis_types=(AxisType.Auto,) * 2)
    split, part = PartitionSpec("batch"), PartitionSpec("model")

    @jax.shard_map(mesh=mesh, in_specs=(split, part), out_specs=split)
    def over_channels(h, w):
        first = lax.axis_index("model") * len(w)
        own = lax.dynamic_slice_in_dim(h, first, len(w), axis=1)
        return lax.psum(own @ w, "model")

    def fn(p, x):
        h = over_channels(jnp.tanh(x @ p["w1"]), p["w2"])
        return jnp.tanh(h) @ p["w3"]

    params = {"w1": draw(3, 8), "w2": draw(8, 4), "w3": draw(4, 2)}
    moments = tpp.input_moments(fn, [draw(16, 3)], params)
    assert [entry.leaf for entry in moments.consumers] == ["w3"]


def test_without_batches_there_are_no_moments():
    with pytest.raises(tpp.TPPError, match="no batch"):
        tpp.input_moments(lambda p, x: x @ p["w"], [], {"w": draw(2, 2)})
