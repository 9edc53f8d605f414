"""Steps of models with dropout, with constants, and with norms of Flax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from tpp_jax.errors import TPPError
from tpp_jax.interop.modules import as_nnx
from tpp_jax.training import parallel
from tpp_jax.training.state import initial_state, with_state
from tpp_jax.training.step import StepConfig, make_train_step
from tpp_jax.training.structure import split, structure_of


class Net(nnx.Module):
    """A layer with a constant factor and dropout, and a norm of Flax's own."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.factor = nnx.Variable(jnp.full(8, 2.0))

    def __call__(self, x):
        return self.dropout(self.norm(self.layer(x))) * self.factor


class Norm(linen.Module):
    """A Linen norm, whose devices cannot be told to normalise together."""

    @linen.compact
    def __call__(self, x, train):
        return linen.BatchNorm(use_running_average=not train)(linen.Dense(8)(x))


class Bridged(nnx.Module):
    def __init__(self, rngs):
        x = jnp.ones((1, 6))
        self.inner = nnx.bridge.ToNNX(Norm(), rngs).lazy_init(x, train=False)

    def __call__(self, x):
        return self.inner(x, train=True, mutable=["batch_stats"])


class Modes(linen.Module):
    """A Linen module with two arguments for its mode, and attributes."""

    widths: tuple = (4,)

    @linen.compact
    def __call__(self, x, train=False, deterministic=True):
        x = linen.Dense(self.widths[0])(x)
        x = linen.BatchNorm(use_running_average=not train)(x)
        return linen.Dropout(0.5)(x, deterministic=deterministic)


class Fixed(linen.Module):
    training: bool = False

    def __call__(self, x):
        return x


def test_a_module_of_linen_gets_its_mode_in_all_arguments_for_it():
    x = jax.random.normal(jax.random.key(0), (64, 6))
    model = as_nnx(Modes(), x[:1], rngs=nnx.Rngs(0))
    model.train()
    assert 0.3 < np.mean(np.asarray(model(x)) == 0) < 0.7
    assert not np.allclose(model.module.BatchNorm_0["mean"], 0)
    model.eval()
    assert np.all(np.asarray(model(x)) != 0)


def test_a_bound_module_of_linen_keeps_its_variables():
    x = jnp.ones((2, 6))
    variables = Modes().init(jax.random.key(5), x)
    variables["batch_stats"]["BatchNorm_0"]["mean"] += 1
    model = as_nnx(Modes().bind(variables), x[:1], rngs=nnx.Rngs(0))
    model.eval()
    np.testing.assert_array_equal(model(x), Modes().apply(variables, x))
    hash(nnx.graphdef(model))
    with pytest.raises(TPPError, match="are not those that its initialisation makes"):
        as_nnx(Modes((5,)).bind(variables), x[:1], rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Modes([4]), "attribute 'widths' of Modes is of type list, which has no hash"),
        (Fixed(), "Fixed has its mode in the attribute 'training', which a run"),
    ],
)
def test_modules_of_linen_that_a_run_cannot_use(module, message):
    with pytest.raises(TPPError, match=message):
        as_nnx(module, jnp.ones((1, 6)), rngs=nnx.Rngs(0))


def trained(model, devices, steps=1, **config):
    """Returns the loss of each step and the model after the last."""

    def loss(model, batch, key):
        del key
        return jnp.square(model(batch)).mean(), {}

    def batch_of(step, key, x):
        del step, key
        axis = parallel.axis_name(devices)
        n = len(x) // len(devices)
        start = 0 if axis is None else jax.lax.axis_index(axis) * n
        return jax.lax.dynamic_slice_in_dim(x, start, n)

    tx, axis = optax.sgd(0.1), parallel.axis_name(devices)
    structure = structure_of(model, training=True)
    step = make_train_step(
        structure, tx, loss, StepConfig(**config), batch_of, axis, None
    )
    run = parallel.on_devices(step, devices, 0, None, 1, "pmap")
    state = initial_state(model, tx, average="ema" in config, step=0, arrays=None)
    x = jax.random.normal(jax.random.key(3), (8, 6))
    state, key, x = parallel.replicate((state, jax.random.key(1), x), devices)
    losses = []
    for _ in range(steps):
        state, metrics = run(state, key, x)
        losses.append(float(metrics["loss"]))
    params, stats = state.network
    state = state._replace(params=params, stats=stats)
    return losses, with_state(model, parallel.local(state))


def test_dropout_draws_anew_in_each_step_and_repeats_with_the_key():
    model = Net(nnx.Rngs(0))
    losses, _ = trained(model, jax.devices()[:1], steps=3)
    assert len(set(losses)) == 3
    assert trained(model, jax.devices()[:1], steps=3)[0] == losses


def test_constants_are_kept_and_batch_statistics_renewed():
    model = Net(nnx.Rngs(0))
    _, after = trained(model, jax.devices()[:1])
    np.testing.assert_array_equal(after.factor[...], model.factor[...])
    assert not np.allclose(after.norm.mean[...], model.norm.mean[...])
    assert not np.allclose(after.layer.kernel[...], model.layer.kernel[...])
    # The streams of dropout are still there, for training outside a run.
    assert after.dropout.rngs is not None
    params, stats = split(after)
    assert {path[-1] for path, _ in nnx.to_flat_state(stats)} == {
        *("mean", "var", "factor")
    }
    assert len(jax.tree.leaves(params)) == 4


def test_a_norm_of_flax_uses_the_batch_of_all_devices():
    model = Net(nnx.Rngs(0))
    model.dropout.rate = 0.0
    one = trained(model, jax.devices()[:1], steps=2)
    two = trained(model, jax.devices()[:2], steps=2)
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    for a, b in zip(*(jax.tree.leaves(split(x[1])) for x in (one, two)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


class Centred(nnx.Module):
    """A layer with a mean of its own kind, a counter, and a constant."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(6, 4, rngs=rngs)
        self.mean, self.count = nnx.Variable(jnp.zeros(4)), nnx.Variable(jnp.int32(0))
        self.bound = nnx.Variable(jnp.array([0.1, jnp.inf]))
        self.mask = nnx.Variable(jnp.array([True, False]))
        self.half = jnp.ones(3, "bfloat16")  # an array that is in no variable

    def __call__(self, x):
        x = self.layer(x)
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * x.mean(0)
        self.count[...] += 1
        return jnp.minimum(x, self.bound[1])


def test_variables_that_a_step_changes_are_averaged_over_devices():
    model = Centred(nnx.Rngs(0))
    _, one = trained(model, jax.devices()[:1])
    _, more = trained(model, jax.devices()[:4])
    for name in ("mean", "count"):
        a, b = (getattr(x, name)[...] for x in (one, more))
        np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_array_equal(more.bound[...], model.bound[...])


def test_averages_keep_the_types_of_all_arrays():
    model = Centred(nnx.Rngs(0))
    _, last = trained(model, jax.devices()[:1], steps=2)
    _, after = trained(model, jax.devices()[:1], steps=2, ema=0.9)
    for name in ("count", "bound", "mask"):
        a, b = (getattr(x, name)[...] for x in (after, last))
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert after.half.dtype == "bfloat16"
    assert not np.allclose(after.mean[...], last.mean[...])


def test_statistics_of_a_norm_in_linen_are_averaged_over_devices():
    model = Bridged(nnx.Rngs(0))
    _, one = trained(model, jax.devices()[:1])
    _, two = trained(model, jax.devices()[:2])
    means = [x.inner.BatchNorm_0["mean"][...] for x in (one, two)]
    np.testing.assert_allclose(*means, rtol=1e-5)  # means of equal halves
    assert structure_of(model, training=True).local
