"""Gradients, curvature and activations, compared with JAX and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

import tpp_jax as tpp
from tests.reference import filled
from tpp_jax.graph.naming import named_leaves
from tpp_jax.pruning.activations import activation_means
from tpp_jax.pruning.statistics import hessian_diagonal, loss_gradient


def draw(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


class Small(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm(self.conv(x)))
        return self.head(y.mean((1, 2)))


def small():
    return filled(lambda: Small(nnx.Rngs(0)))


def square(model, batch):
    return jnp.mean(model(batch) ** 2)


def test_the_gradient_of_a_module_is_that_of_its_evaluation_mode():
    model = small()
    x = draw(2, 4, 4, 2)
    got = named_leaves(loss_gradient(square, model, [x]))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def evaluated(params):
        merged = nnx.merge(graphdef, params, rest, copy=True)
        merged.eval()
        return square(merged, x)

    expected = named_leaves(jax.jit(jax.grad(evaluated))(params))
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(got[name], gradient, rtol=1e-5, atol=1e-7)
    assert (
        not model.norm.use_running_average
    )  # the module itself is still in training mode


def test_statistics_are_means_over_batches():
    model, batches = small(), [draw(2, 4, 4, 2, seed=i) for i in range(3)]
    for statistic in (
        lambda some: loss_gradient(square, model, some),
        lambda some: activation_means(model, some),
    ):
        parts = [named_leaves(statistic([batch])) for batch in batches]
        for name, mean in named_leaves(statistic(batches)).items():
            expected = sum(part[name] for part in parts) / 3
            np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-7)


def test_the_hessian_of_a_sum_of_functions_of_single_weights_is_exact():
    params = {"a": draw(3), "b": {"c": draw(2, 2, seed=1)}}

    def loss(p, batch):
        return batch * (jnp.sum(p["a"] ** 3) + jnp.sum(jnp.cos(p["b"]["c"])))

    got = hessian_diagonal(loss, params, [1.0, 3.0], probes=1)
    np.testing.assert_allclose(got["a"], 2 * 6 * params["a"], rtol=1e-5)
    np.testing.assert_allclose(got["b"]["c"], -2 * jnp.cos(params["b"]["c"]), rtol=1e-5)


def test_the_hessian_s_diagonal_is_approached_with_more_probes():
    a = draw(6, 6)
    params = {"w": draw(6, seed=1)}

    def loss(p, batch):
        return batch * p["w"] @ (a @ a.T) @ p["w"] / 2

    def error(probes):
        got = hessian_diagonal(loss, params, [1.0], probes=probes)["w"]
        return float(jnp.abs(got - jnp.diag(a @ a.T)).mean())

    assert error(100) < 0.5 * error(2)
    again = [hessian_diagonal(loss, params, [1.0], seed=s)["w"] for s in (1, 1, 2)]
    np.testing.assert_array_equal(again[0], again[1])
    assert not np.array_equal(again[0], again[2])


def test_a_hessian_of_a_module_has_the_names_of_its_parameters():
    model = small()
    diagonal = hessian_diagonal(square, model, [draw(2, 4, 4, 2)], probes=1)
    groups = tpp.channel_groups(model, jnp.ones((1, 4, 4, 2)))
    plan = tpp.make_plan(
        groups, model, {"conv": 0.5}, criterion="hessian", statistics=diagonal
    )
    kernel = np.asarray(model.conv.kernel[...])
    curvature = np.asarray(named_leaves(diagonal)["conv.kernel"])
    scores = (kernel**2 * curvature).sum((0, 1, 2)) / 2
    np.testing.assert_array_equal(plan.pruned("conv"), np.sort(np.argsort(scores)[:2]))


def test_without_a_batch_there_are_no_statistics():
    for statistic in (
        lambda: loss_gradient(square, small(), []),
        lambda: hessian_diagonal(square, small(), []),
        lambda: activation_means(small(), []),
    ):
        with pytest.raises(ValueError, match="there is no batch"):
            statistic()


def test_activations_of_a_module_are_its_layers_outputs_without_the_bias():
    model = small()
    x = draw(2, 4, 4, 2)
    got = activation_means(model, [x])
    model.eval()
    conv = model.conv(x) - model.conv.bias[...]
    assert got["conv.kernel"].shape == (1, 1, 1, 4)
    np.testing.assert_allclose(
        got["conv.kernel"][0, 0, 0], jnp.abs(conv).mean((0, 1, 2)), rtol=1e-5
    )
    head = model(x) - model.head.bias[...]
    np.testing.assert_allclose(got["head.kernel"][0], jnp.abs(head).mean(0), rtol=1e-5)


def means_of(fn, params, *inputs):
    return activation_means(fn, [inputs], params=params)


def test_a_transposed_kernel_s_means_lie_along_its_own_axes():
    w, x = draw(5, 3), draw(7, 3, seed=1)
    got = means_of(lambda p, x: x @ p["w"].T, {"w": w}, x)
    np.testing.assert_allclose(got["w"][:, 0], jnp.abs(x @ w.T).mean(0), rtol=1e-5)
    assert got["w"].shape == (5, 1)


def test_heads_and_their_dimensions_have_separate_means():
    w, x = draw(6, 2, 3), draw(4, 5, 6, seed=1)

    def fn(p, x):
        return jnp.einsum("bti,iho->bhto", x, p["w"])

    got = means_of(fn, {"w": w}, x)["w"]
    expected = jnp.abs(fn({"w": w}, x)).mean((0, 2))
    assert got.shape == (1, 2, 3)
    np.testing.assert_allclose(got[0], expected, rtol=1e-5)


def test_experts_in_a_batch_axis_have_separate_means():
    w, x = draw(2, 3, 4), draw(5, 2, 3, seed=1)
    got = means_of(lambda p, x: jnp.einsum("nei,eio->eno", x, p["w"]), {"w": w}, x)
    expected = jnp.abs(jnp.einsum("nei,eio->eno", x, w)).mean(1)
    np.testing.assert_allclose(got["w"][:, 0], expected, rtol=1e-5)


def test_a_layer_that_runs_twice_is_averaged_over_both_runs():
    w, x = draw(3, 3), draw(4, 3, seed=1)
    got = means_of(lambda p, x: x @ p["w"] @ p["w"], {"w": w}, x)["w"]
    expected = (jnp.abs(x @ w).mean(0) + jnp.abs(x @ w @ w).mean(0)) / 2
    np.testing.assert_allclose(got[0], expected, rtol=1e-5)


def test_the_outputs_of_an_embedding_are_its_rows_tied_or_not():
    table, tokens = draw(7, 3), jnp.array([[1, 1, 4]])
    got = means_of(
        lambda p, t: jnp.take(p["table"], t, axis=0) @ p["table"].T,
        {"table": table},
        tokens,
    )
    expected = jnp.abs(table[jnp.array([1, 1, 4])]).mean(0)
    assert got["table"].shape == (1, 3)
    np.testing.assert_allclose(got["table"][0], expected, rtol=1e-5)


def test_layers_are_found_in_nested_calls_but_not_in_loops():
    params = {name: draw(3, 3, seed=i) for i, name in enumerate("abc")}

    @jax.jit
    def inner(p, x):
        return jax.checkpoint(lambda x: jax.nn.relu(x @ p["b"]))(x)

    def fn(p, x):
        x = inner(p, jax.nn.silu(x @ p["a"]))
        return lax.fori_loop(0, 2, lambda _, y: y @ p["c"], x)

    got = means_of(fn, params, draw(2, 3, seed=9))
    assert got.keys() == {"a", "b"}
    groups = tpp.channel_groups(fn, jnp.ones((1, 3)), params=params)
    plan = tpp.make_plan(
        groups, params, {"a": 0.3}, criterion="activation", statistics=got
    )
    lowest = int(jnp.argmin(got["a"]))
    np.testing.assert_array_equal(plan.pruned("a"), [lowest])


def test_a_linen_module_and_several_inputs():
    class Two(linen.Module):
        @linen.compact
        def __call__(self, x, y):
            return linen.Dense(3)(linen.Dense(4, name="a")(x) + linen.Dense(4)(y))

    model, x, y = Two(), draw(2, 3), draw(2, 5, seed=1)
    variables = model.init(jax.random.key(0), x, y)
    got = activation_means(model, [(x, y)], params=variables)
    kernel = variables["params"]["a"]["kernel"]
    np.testing.assert_allclose(
        got["a.kernel"][0], jnp.abs(x @ kernel).mean(0), rtol=1e-5
    )
    assert got.keys() == {"a.kernel", "Dense_0.kernel", "Dense_1.kernel"}


def test_all_criteria_make_plans_of_a_network_with_data():
    model = filled(lambda: tpp.models.create("lenet5", rngs=nnx.Rngs(0)))
    x = draw(2, *model.spec.image_shape)
    groups = tpp.channel_groups(model, x)
    trees = {
        "taylor": loss_gradient(square, model, [x]),
        "activation": activation_means(model, [x]),
    }
    kept = {
        name: tpp.make_plan(
            groups, model, flops=0.5, criterion=name, statistics=tree
        ).to_dict()
        for name, tree in trees.items()
    }
    assert kept["taylor"] != kept["activation"]
    assert {k: len(v) for k, v in kept["taylor"].items()} == {
        k: len(v) for k, v in kept["activation"].items()
    }


def test_activations_of_kernels_that_are_computed_from_several_leaves():
    x = jnp.array([[1.0, -2.0], [3.0, 1.0]])
    way = jnp.array([[3.0, 0.0, 1.0], [4.0, 2.0, 0.0]])
    params = {"way": way, "length": jnp.array([1.0, 2.0, 3.0]), "seen": way > 0}

    def normed(p, x):
        return x @ (p["way"] / jnp.linalg.norm(p["way"], axis=0) * p["length"])

    kernel = way / jnp.array([5.0, 2.0, 1.0]) * params["length"]
    got = activation_means(normed, [x], params=params)
    expected = jnp.abs(x @ kernel).mean(0, keepdims=True)
    np.testing.assert_allclose(got["way"], expected, rtol=1e-6)
    assert got.keys() == {"way"}

    def masked(p, x):
        return x @ jnp.where(p["seen"], p["way"], 0)

    got = activation_means(masked, [x], params=params)
    assert got.keys() == {"way", "seen"}
    np.testing.assert_allclose(got["way"], jnp.abs(x @ way).mean(0, keepdims=True))

    def adapted(p, x):
        return x @ (p["way"] + p["down"] @ p["up"])

    params = {"way": way, "down": jnp.ones((2, 1)), "up": jnp.ones((1, 3))}
    got = activation_means(adapted, [x], params=params)
    expected = jnp.abs(x @ (way + 1)).mean(0, keepdims=True)
    np.testing.assert_allclose(got["way"], expected)
    np.testing.assert_allclose(got["up"], expected)


def test_activations_choose_the_channels_of_a_normed_kernel():
    net = nnx.Sequential(
        nnx.WeightNorm(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)),
        nnx.relu,
        nnx.Linear(6, 2, rngs=nnx.Rngs(1)),
    )
    x = jax.random.normal(jax.random.key(0), (8, 4))
    groups = tpp.channel_groups(net, x)
    means = activation_means(net, [x])
    plan = tpp.make_plan(groups, net, 0.5, criterion="activation", statistics=means)
    [kept] = plan.kept.values()
    size = means["layers.0.layer_instance.kernel"].reshape(-1)
    assert sorted(np.argsort(size)[3:].tolist()) == kept.tolist()
