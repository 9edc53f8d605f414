"""Statistics of norms, measured again, compared with those of the layers' inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import tpp_jax as tpp
from tests.pruning.test_moments import draw
from tests.reference import filled
from tpp_jax.graph.naming import named_leaves


class Net(nnx.Module):
    """Two norms in a row, the second of which sees what the first gives."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(2, 6, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(6, rngs=rngs, epsilon=1e-2)
        self.conv2 = nnx.Conv(6, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = tpp.models.layers.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean((1, 2)))


def net():
    model = filled(lambda: Net(nnx.Rngs(0)))
    model.eval()
    return model


def images(seed=0):
    return draw(8, 5, 5, 2, seed=seed) * 2 + 1


def halved(model):
    groups = tpp.channel_groups(model, images())
    return tpp.make_plan(groups, model, 0.5)


def moments(arrays):
    rows = np.concatenate([np.asarray(x).reshape(-1, x.shape[-1]) for x in arrays])
    return rows.mean(0), rows.var(0)


def test_statistics_are_exact_averages_of_what_the_norms_see():
    model, batches = net(), [images(0), images(1)[:3]]
    before = nnx.state(model)
    new = tpp.recalibrate(model, batches)
    mean, var = moments([model.conv1(x) for x in batches])
    np.testing.assert_allclose(new.norm1.mean[...], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new.norm1.var[...], var, rtol=1e-4)
    # The second sees what the first makes of each batch by itself, as in training.
    seen = []
    for x in batches:
        y = model.conv1(x)
        apart = (y - y.mean((0, 1, 2))) / jnp.sqrt(y.var((0, 1, 2)) + 1e-2)
        y = nnx.relu(apart * model.norm1.scale[...] + model.norm1.bias[...])
        seen.append(model.conv2(y))
    mean, var = moments(seen)
    np.testing.assert_allclose(new.norm2.mean[...], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new.norm2.var[...], var, rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))


def test_a_network_that_is_not_pruned_is_left_as_it_is_by_other_data():
    model = net()
    batches = [images(seed) * 5 - 20 for seed in range(3)]
    new = tpp.recalibrate(model, batches, like=model)
    for name, leaf in named_leaves(nnx.state(new)).items():
        old = named_leaves(nnx.state(model))[name]
        np.testing.assert_allclose(leaf, old, rtol=1e-3, atol=1e-3)
    adapted = tpp.recalibrate(model, batches)
    assert np.abs(adapted(images()) - model(images())).max() > 0.1


def test_outputs_of_each_norm_have_the_moments_of_the_unpruned_network():
    model, batches = net(), [images(seed) for seed in range(3)]
    plan = halved(model)
    small = tpp.prune(model, plan)
    for options in ({}, {"plan": plan}):
        new = tpp.recalibrate(small, batches, like=model, **options)
        got = moments([new.norm1(small.conv1(x)) for x in batches])
        expected = moments([model.norm1(model.conv1(x)) for x in batches])
        for one, other in zip(got, expected, strict=True):
            kept = other[plan.kept["conv1"]]
            np.testing.assert_allclose(one, kept, rtol=1e-3, atol=1e-4)
        read = nnx.relu(new.norm1(small.conv1(batches[0])))
        assert np.isfinite(new.norm2(small.conv2(read))).all()


def test_channels_of_a_refit_network_are_found_by_their_values():
    model, batches = net(), [images(seed) for seed in range(8)]
    plan = halved(model)
    small = tpp.compensate(model, plan, batches)
    one = tpp.recalibrate(small, batches, like=model)
    other = tpp.recalibrate(small, batches, like=model, plan=plan)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(other))


def test_linen_variables_and_those_of_functions_get_statistics():
    class Module(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(6)(x)
            x = linen.BatchNorm(use_running_average=True)(x)
            return linen.Dense(2)(linen.relu(x))

    module, x = Module(), draw(30, 3) + 2
    variables = module.init(jax.random.key(0), x)
    new = tpp.recalibrate(module, [x], variables)
    kernel = variables["params"]["Dense_0"]["kernel"]
    mean, var = moments([x @ kernel])
    np.testing.assert_allclose(
        new["batch_stats"]["BatchNorm_0"]["mean"], mean, rtol=1e-4, atol=1e-5
    )
    groups = tpp.channel_groups(module, x, params=variables)
    plan = tpp.make_plan(groups, variables, 0.5)
    small = tpp.prune(module, plan, variables)
    small = tpp.recalibrate(module, [x], small, like=variables, plan=plan)
    got = small["batch_stats"]["BatchNorm_0"]
    # The cut changes nothing before this norm, and its function is kept.
    np.testing.assert_allclose(got["mean"], 0, atol=1e-5)
    np.testing.assert_allclose(got["var"], 1, rtol=1e-4)

    params = {"w": kernel, "norm": {"mean": jnp.zeros(6), "var": jnp.ones(6)}}

    def fn(p, x):
        return (x @ p["w"] - p["norm"]["mean"]) / jnp.sqrt(p["norm"]["var"])

    new = tpp.recalibrate(fn, [x], params)
    np.testing.assert_allclose(new["norm"]["var"], var, rtol=1e-4)


def test_what_cannot_be_measured_is_refused():
    model = net()
    with pytest.raises(tpp.TPPError, match="no batch to measure"):
        tpp.recalibrate(model, [])
    with pytest.raises(tpp.TPPError, match="no batch norms"):
        tpp.recalibrate(lambda p, x: x @ p["w"], [draw(2, 2)], {"w": draw(2, 2)})
    folded = {"mean": draw(2), "var": draw(2)}
    with pytest.raises(tpp.TPPError, match="norms of mean were not recognised"):
        tpp.recalibrate(lambda p, x: x * p["var"] + p["mean"], [draw(3, 2)], folded)
    small = tpp.prune(model, halved(model))
    small.norm1.scale[...] = small.norm1.scale[...] * 2
    with pytest.raises(tpp.TPPError, match=r"norm1 that were kept .* pass plan="):
        tpp.recalibrate(small, [images()], like=model)
