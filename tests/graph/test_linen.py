"""Flax Linen modules: groups, sliced variables that run, optimizer states."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import tpp_jax as tpp


class Block(nn.Module):
    """A transformer block that declares its layers and a parameter in setup()."""

    width: int = 16

    def setup(self):
        self.norm = nn.LayerNorm()
        self.attention = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=16)
        self.up = nn.Dense(32)
        self.down = nn.Dense(self.width)
        self.scale = self.param("scale", nn.initializers.ones, (self.width,))

    def __call__(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y) * self.scale
        return x + self.down(nn.gelu(self.up(x)))


class Text(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(20, 16)(tokens)
        x = x + self.param("places", nn.initializers.normal(), (8, 16))[: x.shape[1]]
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(3)(x.mean(1))


class Images(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        y = nn.Conv(16, (1, 1), name="expand")(x)
        y = nn.Conv(16, (3, 3), feature_group_count=16, name="depthwise")(y)
        y = nn.relu(nn.GroupNorm(4)(y))
        x = x + nn.Conv(8, (1, 1), name="project")(y)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.LSTMCell(8))(x)
        return nn.Dense(3)(nn.RNN(nn.GRUCell(6))(x)[:, -1])


def tokens():
    return (jnp.arange(10).reshape(2, 5),)


def images():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3))), False


def steps():
    return (jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4))),)


def drawn(module, *inputs):
    """Returns variables drawn by NumPy, so that nothing is compiled."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.1, 0.5, leaf.shape), leaf.dtype), shapes
    )


NETWORKS = {
    "text": (
        Text(),
        tokens,
        {
            "Embed_0": 16,
            "Block_0.attention.query": 4,
            "Block_0.attention.query#2": 4,
            "Block_0.up": 32,
            "Block_1.attention.query": 4,
            "Block_1.attention.query#2": 4,
            "Block_1.up": 32,
        },
    ),
    "images": (Images(), images, {"stem": 8, "expand": 4, "expand#2": 4}),
    "recurrent": (Recurrent(), steps, {"LSTMCell_0.ii": 8, "GRUCell_0.ir": 6}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_linen_network_is_pruned_and_runs(name):
    module, inputs, expected = NETWORKS[name]
    inputs = inputs()
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))
    groups = tpp.channel_groups(module, *inputs, params=variables)
    found = {g.name: g.size for g in groups if g.reason is None}
    if name == "text":
        # Linen's own attention allows fewer dimensions of values than of queries.
        values = {key: found.pop(key) for key in list(found) if "value#2" in key}
        assert set(values.values()) == {4}
    assert found == expected
    checks = tpp.check_groups(module, *inputs, params=variables, groups=groups)
    assert checks.masked < 1e-5


def test_sliced_variables_can_be_trained_with_their_optimizer_state():
    module, (x, _) = Images(), images()
    variables = drawn(module, x)
    groups = tpp.channel_groups(module, x, False, params=variables)
    plan = tpp.make_plan(groups, variables, {"*": 0.5}, skip="*#2")
    optimizer = optax.adamw(1e-3)
    state = optimizer.init(variables["params"])
    state = optimizer.update(variables["params"], state, variables["params"])[1]

    small, state = tpp.slice_tree(plan, variables), tpp.slice_tree(plan, state)
    assert small["params"]["expand"]["kernel"].shape == (1, 1, 4, 8)
    assert small["batch_stats"]["BatchNorm_0"]["mean"].shape == (4,)
    np.testing.assert_array_equal(
        state[0].mu["expand"]["kernel"], 0.1 * small["params"]["expand"]["kernel"]
    )

    apply = tpp.linen_apply(module, plan)

    @jax.jit
    def step(variables, state):
        def loss(params):
            logits, updated = apply(
                variables | {"params": params}, x, mutable=["batch_stats"]
            )
            return jnp.square(logits).mean(), updated

        (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(
            variables["params"]
        )
        updates, state = optimizer.update(grads, state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, **updated}, state, value

    losses = []
    for _ in range(3):
        small, state, value = step(small, state)
        losses.append(float(value))
    assert losses[2] < losses[0]


def test_the_module_itself_still_checks_its_widths():
    module, (x, _) = Images(), images()
    variables = drawn(module, x)
    same = tpp.linen_apply(module)(variables, x, False)
    np.testing.assert_array_equal(same, module.apply(variables, x, False))
    groups = tpp.channel_groups(module, x, False, params=variables)
    plan = tpp.make_plan(groups, variables, {"stem": 0.5})
    small = tpp.slice_tree(plan, variables)
    with pytest.raises(Exception, match="stem"):
        module.apply(small, x, False)
    assert tpp.linen_apply(module, plan)(small, x, False).shape == (2, 5)


class Sharded(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        x = nn.Dense(8, kernel_init=init, name="wide")(x)
        return nn.Dense(2, name="last")(nn.relu(x))


def test_boxed_parameters_keep_their_boxes():
    module, x = Sharded(), jnp.ones((3, 4))
    variables = drawn(module, x)
    groups = tpp.channel_groups(module, x, params=variables)
    plan = tpp.make_plan(groups, variables, {"wide": 0.5})
    small = tpp.slice_tree(plan, variables)
    kernel = small["params"]["wide"]["kernel"]
    assert isinstance(kernel, nn.Partitioned) and kernel.value.shape == (4, 4)
    assert tpp.linen_apply(module)(small, x).shape == (3, 2)


def test_a_linen_module_without_variables_is_refused():
    with pytest.raises(TypeError, match="Linen module needs its variables"):
        tpp.channel_groups(Text(), *tokens())


class Averaged(nn.Module):
    """Has a moving average of a parameter under the same path as the parameter."""

    reads: str = "params"

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (4, 8))
        average = self.variable("average", "kernel", lambda: kernel)
        if self.reads == "average":
            x = x @ average.value
        elif self.reads == "both":
            x = nn.relu(x @ kernel) + nn.relu(x @ average.value)
        else:
            x = x @ kernel
        x = nn.BatchNorm(use_running_average=True, name="norm")(nn.relu(x))
        return nn.Dense(2, name="last")(x)


@pytest.mark.parametrize("reads", ["params", "average", "both"])
def test_collections_with_equal_paths_are_cut_equally(reads):
    module, x = Averaged(reads), jnp.ones((3, 4))
    variables = dict(drawn(module, x))
    # The model never reads them. They are not in alphabetical order either.
    variables["target"] = jax.tree.map(jnp.zeros_like, variables["params"])
    variables["old_stats"] = variables["batch_stats"]
    groups = tpp.channel_groups(module, x, params=variables)
    [group] = [group for group in groups if group.reason is None]
    assert group.name == "kernel"
    names = {member.leaf for member in group.members}
    assert {"norm.mean", "norm.scale", "last.kernel"} < names
    assert ("average.kernel" in names) == (reads == "both")

    plan = tpp.make_plan(groups, variables, 0.5)
    scores = np.abs(np.asarray(variables["params"]["kernel"])).sum(0)
    if reads != "both":
        np.testing.assert_array_equal(
            plan.kept["kernel"], np.sort(scores.argsort()[4:])
        )
    small = tpp.slice_tree(plan, variables)
    assert jax.tree.map(jnp.shape, small["params"]) == {
        "kernel": (4, 4),
        "norm": {"scale": (4,), "bias": (4,)},
        "last": {"kernel": (4, 2), "bias": (2,)},
    }
    assert jax.tree.map(jnp.shape, small["target"]) == jax.tree.map(
        jnp.shape, small["params"]
    )
    assert small["average"]["kernel"].shape == (4, 4)
    assert small["old_stats"]["norm"]["mean"].shape == (4,)
    checks = tpp.check_groups(module, x, params=variables, groups=groups)
    assert checks.masked < 1e-5 and not checks.unproved
    apply = tpp.linen_apply(module, plan)
    masked = jax.tree.map(jnp.multiply, variables, tpp.mask_tree(plan, variables))
    np.testing.assert_allclose(apply(small, x), module.apply(masked, x), rtol=1e-5)
    # An optimizer names its moments by the parameters without their collection.
    state = optax.adam(1e-3).init(variables["params"])
    assert tpp.slice_tree(plan, state)[0].mu["kernel"].shape == (4, 4)


def test_a_collection_with_equal_paths_and_other_shapes_is_not_cut():
    module, x = Averaged(), jnp.ones((3, 4))
    variables = dict(drawn(module, x))
    variables["sizes"] = {"last": {"kernel": jnp.ones(3)}}
    groups = tpp.channel_groups(module, x, params=variables)
    plan = tpp.make_plan(groups, variables, 0.5)
    small = tpp.slice_tree(plan, variables)
    assert small["sizes"]["last"]["kernel"].shape == (3,)
    assert small["params"]["last"]["kernel"].shape == (4, 2)


class Attending(nn.Module):
    """Attention with four heads and the width of its input."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        return nn.Dense(3)(x + nn.MultiHeadDotProductAttention(num_heads=4)(x, x))


def test_a_stream_need_not_be_a_multiple_of_the_heads_that_read_it():
    module, x = Attending(), jnp.ones((2, 5, 6)) * jnp.arange(5.0)[:, None]
    variables = drawn(module, x)
    groups = tpp.channel_groups(module, x, params=variables)
    stream = next(group.name for group in groups if group.size == 16)
    plan = tpp.make_plan(groups, variables, counts={stream: 9})
    small = tpp.prune(module, plan, variables)
    masked = jax.tree.map(jnp.multiply, variables, tpp.mask_tree(plan, variables))
    found = tpp.linen_apply(module, plan)(small, x)
    np.testing.assert_allclose(found, module.apply(masked, x), rtol=1e-4, atol=1e-5)
