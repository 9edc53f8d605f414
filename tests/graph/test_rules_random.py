"""Random numbers have no channels of their own, and take any width."""

import jax
import jax.numpy as jnp
import pytest

import tpp_jax as tpp


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


PARAMS = {"mean": shape(6, 16), "spread": shape(6, 16), "decode": shape(16, 6)}
KEYS = {
    "typed": jax.eval_shape(lambda: jax.random.key(0)),
    "raw": jax.eval_shape(lambda: jax.random.PRNGKey(0)),
}


def group_of(operation, key="typed"):
    def fn(p, x, key):
        return operation(x @ p["mean"], key) @ p["decode"]

    params = {"mean": shape(6, 16), "decode": shape(16, 6)}
    [first, *_] = tpp.channel_groups(fn, shape(2, 6), KEYS[key], params=params)
    return first


NOISE = {
    "normal": lambda h, key: h + jax.random.normal(key, h.shape),
    "uniform": lambda h, key: h * jax.random.uniform(key, h.shape, minval=-2),
    "dropout": lambda h, key: jnp.where(
        jax.random.bernoulli(key, 0.5, h.shape), h / 0.5, 0
    ),
    "gumbel": lambda h, key: h + jax.random.gumbel(key, (h.shape[-1],)),
    "one key for each example": lambda h, key: (
        h
        + jax.vmap(lambda k: jax.random.normal(k, h.shape[1:]))(
            jax.random.split(key, 2)
        )
    ),
    "truncated": lambda h, key: h + jax.random.truncated_normal(key, -1, 1, h.shape),
    "gamma of the channels": lambda h, key: jax.random.gamma(key, jnp.exp(h)),
    "signs": lambda h, key: h * jax.random.rademacher(key, h.shape, jnp.float32),
    "a key made on the way": lambda h, key: (
        h + jax.random.normal(jax.random.fold_in(key, 3), h.shape)
    ),
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", NOISE)
def test_noise_follows_the_channels_that_it_meets(name, key):
    group = group_of(NOISE[name], key)
    assert (group.name, group.size, group.reason) == ("mean", 16, None)
    assert {m.leaf for m in group.members} == {"mean", "decode"}


def test_noise_where_channels_were_is_not_their_absence():
    assert group_of(NOISE["normal"]).reduced
    assert not group_of(lambda h, key: jax.nn.relu(h)).reduced


def test_a_variational_layer_is_cut():
    def fn(p, x, key):
        mean, spread = x @ p["mean"], x @ p["spread"]
        noise = jax.random.normal(key, mean.shape)
        return (mean + jnp.exp(spread / 2) * noise) @ p["decode"]

    groups = tpp.channel_groups(fn, shape(2, 6), KEYS["typed"], params=PARAMS)
    [latent, _] = groups
    assert latent.producers == ("mean", "spread") and latent.reason is None
    small = tpp.slice_tree(tpp.Plan({"mean": jnp.arange(5)}, groups), PARAMS)
    assert jax.eval_shape(fn, small, shape(2, 6), KEYS["typed"]).shape == (2, 6)


WRITTEN = {
    "a width written into the model": lambda h, key: (
        h + jax.random.normal(key, (2, 16))
    ),
    "a permutation": lambda h, key: jax.random.permutation(key, h, axis=1),
    "a permutation of each row": lambda h, key: jax.random.permutation(
        key, h, axis=1, independent=True
    ),
    "a choice": lambda h, key: jax.random.choice(key, h, (16,), axis=1),
    "a category": lambda h, key: jax.nn.one_hot(jax.random.categorical(key, h), 16),
    "an order": lambda h, key: h[:, jax.random.permutation(key, 16)],
    "a lottery of places": lambda h, key: h[:, jax.random.randint(key, (16,), 0, 16)],
}


@pytest.mark.parametrize("name", WRITTEN)
def test_channels_that_are_shuffled_or_drawn_from_stay(name):
    assert group_of(WRITTEN[name]).reason is not None


def test_bits_read_as_a_wider_or_narrower_type_stay():
    def narrow(h, _key):
        bits = jax.lax.bitcast_convert_type(h, jnp.uint8)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    assert group_of(narrow).reason is None

    def wide(h, _key):
        pairs = jax.lax.bitcast_convert_type(h, jnp.uint16)
        return jnp.tile(pairs[..., 0].astype(jnp.float32), (1, 1))

    assert group_of(wide).reason is None

    def pairs_of_channels(h, _key):
        halves = h.astype(jnp.bfloat16).reshape(2, 8, 2)
        return jnp.tile(
            jax.lax.bitcast_convert_type(halves, jnp.float32).reshape(2, 8), (1, 2)
        )

    assert group_of(pairs_of_channels).reason is not None


def test_noise_is_no_fault_of_a_group_and_no_proof_of_it():
    def fn(p, x, key):
        mean = x @ p["mean"]
        z = mean + jax.random.normal(key, mean.shape)
        return jax.nn.relu(z @ p["hidden"]) @ p["decode"]

    params = {"mean": shape(6, 16), "hidden": shape(16, 8), "decode": shape(8, 6)}
    checks = tpp.check_groups(fn, shape(2, 6), jax.random.key(0), params=params)
    assert checks.unproved == ("mean",)
    assert [one.name for one in checks.groups] == ["hidden"]
    assert checks.masked < 1e-5
