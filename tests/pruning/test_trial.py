"""Every group that is called prunable was tried on the model, and every plan is."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import tpp_jax as tpp
from tpp_jax.errors import TPPError

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def reasons(groups):
    return {group.name: group.reason for group in groups}


def prunable(groups):
    return {group.name for group in groups if group.reason is None}


def masked(call, plan, params, *inputs, **kwargs):
    """Returns what the network computes with its pruned channels multiplied by zero."""
    arrays, rest = eqx.partition(params, eqx.is_array)
    arrays = jax.tree.map(jnp.multiply, arrays, tpp.mask_tree(plan, arrays))
    return call(eqx.combine(arrays, rest), *inputs, **kwargs)


# Sizes that are written into a model.


SIZES = {
    "one-to-one reshape": lambda h: h.reshape(-1, 12),
    "broadcast_to": lambda h: h + jnp.broadcast_to(jnp.zeros(()), (4, 12)),
    "assertion": lambda h: asserted(h, 12),
    "array of ones": lambda h: h * jnp.ones((4, 12)),
}


def asserted(h, width):
    if h.shape[-1] != width:
        raise RuntimeError(f"the width is {h.shape[-1]}")
    return h


@pytest.mark.parametrize("name", SIZES)
def test_a_size_written_into_the_model_gives_its_line_as_the_reason(name):
    def net(p, x):
        return SIZES[name](x @ p["a"]) @ p["b"] @ p["c"]

    params = {"a": array(5, 12), "b": array(12, 6), "c": array(6, 3)}
    groups = tpp.channel_groups(net, array(4, 5), params=params)
    assert prunable(groups) == {"b"}
    assert "a size written into the model (test_trial.py:" in groups["a"].reason
    with pytest.raises(TPPError, match="channels of a meet a size written into"):
        tpp.channel_groups(net, array(4, 5), params=params, strict=True)


def test_groups_at_fault_are_found_among_many():
    names = [f"layer{i}" for i in range(12)]

    def net(p, x):
        for i, name in enumerate(names):
            x = jax.nn.relu(x @ p[name])
            if i in (3, 7):
                x = asserted(x, 10 + i)
        return x @ p["last"]

    widths = [5, *(10 + i for i in range(12)), 3]
    params = {
        name: array(a, b)
        for name, a, b in zip([*names, "last"], widths[:-1], widths[1:], strict=True)
    }
    groups = tpp.channel_groups(net, array(2, 5), params=params)
    assert prunable(groups) == set(names) - {"layer3", "layer7"}


def test_outputs_keep_their_shapes():
    def towers(p, x, y):
        return (x @ p["left"]).reshape(-1, 8) @ (y @ p["right"]).reshape(-1, 8).T

    params = {"left": array(5, 8), "right": array(6, 8)}
    groups = tpp.channel_groups(towers, array(4, 5), array(4, 6), params=params)
    assert not prunable(groups)


def test_a_trial_does_not_collide_with_another_size():
    def net(p, x):
        h = x
        for name in ("a", "b"):
            y = jax.nn.relu(h @ p[name])
            h = y + h if y.shape == h.shape else y  # not where half of 12 is the input
        return h @ p["c"]

    params = {"a": array(6, 12), "b": array(12, 12), "c": array(12, 3)}
    x = array(2, 6)
    groups = tpp.channel_groups(net, x, params=params)
    assert groups["a"].reason is None
    plan = tpp.make_plan(groups, params, {"a": 0.25})
    small = tpp.prune(net, plan, params)
    np.testing.assert_allclose(
        net(small, x), masked(net, plan, params, x), rtol=1e-5, atol=1e-5
    )


def test_a_model_that_wants_round_numbers_gets_one():
    def net(p, x):
        h = x @ p["a"]
        if h.shape[-1] % 4:
            raise ValueError("not a multiple of four")
        return h @ p["b"]

    params = {"a": array(8, 16), "b": array(16, 3)}
    groups = tpp.channel_groups(net, array(2, 8), params=params)
    assert groups["a"].reason is None
    assert tpp.make_plan(groups, params, 0.5).kept["a"].shape == (8,)
    with pytest.raises(TPPError, match="13 of the 16 channels of a: not a multiple of"):
        tpp.make_plan(groups, params, counts={"a": 13})


# Plans are tried where they are made, and where they are used.


class Projected(linen.Module):
    """Adds its input where that has as many channels, after a projection elsewhere."""

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(6, name="stem")(x))
        y = linen.Dense(12, name="expand")(x)
        if x.shape != y.shape:
            x = linen.Dense(12, name="projection")(x)
        return linen.Dense(3, name="head")(linen.relu(x + y))


def test_a_plan_under_which_the_model_takes_another_branch_is_refused():
    x = array(2, 5)
    variables = Projected().init(jax.random.key(0), x)
    groups = tpp.channel_groups(Projected(), x, params=variables)
    assert groups["expand"].reason is None
    with pytest.raises(TPPError, match="6 of the 12 channels of expand: anoth"):
        tpp.make_plan(groups, variables, {"expand": 0.5})
    plan = tpp.make_plan(groups, variables, {"expand": 0.5}, check=False)
    for use in (
        lambda: tpp.check_plan(plan),
        lambda: tpp.check_plan(plan, Projected(), variables),
        lambda: tpp.prune(Projected(), plan, variables),
        lambda: tpp.linen_apply(Projected(), plan),
    ):
        with pytest.raises(TPPError, match="channels of expand"):
            use()
    fits = tpp.make_plan(groups, variables, {"expand": 0.25})
    small = tpp.prune(Projected(), fits, variables)
    np.testing.assert_allclose(
        tpp.linen_apply(Projected(), fits)(small, x),
        masked(Projected().apply, fits, variables, x),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_plan_read_from_a_file_is_checked():
    def net(p, x):
        h = x @ p["a"]
        return (2 * h if h.shape[-1] == 3 else h) @ p["b"]

    params = {"a": array(4, 8), "b": array(8, 2)}
    groups = tpp.channel_groups(net, array(1, 4), params=params)
    good = tpp.Plan.from_dict({"a": [0, 1, 5, 7]}, groups)
    tpp.check_plan(good)
    bad = tpp.Plan.from_dict({"a": [0, 1, 5]}, groups)
    with pytest.raises(TPPError, match="3 of the 8 channels of a: another branch"):
        tpp.check_plan(bad)
    with pytest.raises(TPPError, match="3 of the 8 channels of a: another branch"):
        tpp.prune(net, bad, params)


def test_a_plan_is_checked_on_the_model_that_is_pruned():
    class Net(nnx.Module):
        def __init__(self, rngs, fixed=None):
            self.a = nnx.Linear(4, 8, rngs=rngs)
            self.b = nnx.Linear(8, 2, rngs=rngs)
            self.fixed = fixed

        def __call__(self, x):
            h = self.a(x)
            return self.b(h if self.fixed is None else h.reshape(-1, self.fixed))

    free, x = Net(nnx.Rngs(0)), array(3, 4)
    plan = tpp.make_plan(tpp.channel_groups(free, x), free, 0.5)
    assert tpp.prune(free, plan).a.kernel.shape == (4, 4)
    with pytest.raises(TPPError):
        tpp.prune(Net(nnx.Rngs(0), fixed=8), plan)


def test_an_order_of_products_that_follows_the_sizes_is_no_other_branch():
    def net(p, x):
        # The order of a product of three depends on their sizes.
        return jnp.einsum("ni,ij,jk->nk", x, p["a"], p["b"])

    params = {"a": array(40, 64), "b": array(64, 3)}
    groups = tpp.channel_groups(net, array(2, 40), params=params)
    assert groups["a"].reason is None
    tpp.make_plan(groups, params, 0.9)


# Arguments and parameter trees as users have them.


class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(5, 12, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.b = nnx.Linear(12, 2, rngs=rngs)

    def __call__(self, x, *, scale, train):
        h = self.drop(nnx.relu(self.a(x)), deterministic=not train)
        return self.b(h * scale)


def test_keyword_arguments_go_to_the_model():
    net, x, scale = Noisy(nnx.Rngs(0)), array(3, 5), jnp.ones((1, 1))
    kwargs = {"scale": scale, "train": False}
    groups = tpp.channel_groups(net, x, **kwargs)
    assert prunable(groups) == {"a"}
    assert tpp.count(net, x, **kwargs).flops == 2 * 3 * (5 * 12 + 12 * 2)
    assert tpp.check_groups(net, x, **kwargs).masked < 1e-5
    assert tpp.jacobian_singular_values(net, x, **kwargs).min() > 0
    means = tpp.activation_means(net, [x], **kwargs)
    assert means["a.kernel"].shape == (1, 12)
    small = tpp.prune(net, tpp.make_plan(groups, net, 0.5))
    assert small.a.kernel.shape == (5, 6)
    assert small(x, **kwargs).shape == (3, 2)


def test_a_call_that_lacks_an_argument_is_not_blamed_on_sizes():
    net, x = Noisy(nnx.Rngs(0)), array(3, 5)
    graphdef, state = nnx.split(net)

    def call(state, x):
        return nnx.merge(graphdef, state)(x, scale=1.0, train=False)

    plan = tpp.make_plan(tpp.channel_groups(call, x, params=state), net, 0.5)
    with pytest.raises(TPPError, match=r"cannot be called with the inputs.*'scale'"):
        tpp.prune(net, plan)


def test_equinox_modules_are_taken_with_their_functions_and_settings():
    key = jax.random.key(0)
    net = eqx.nn.Sequential(
        [
            eqx.nn.MLP(4, 10, 16, 2, key=key),
            eqx.nn.Dropout(0.3, inference=True),
            eqx.nn.LayerNorm(10),
            eqx.nn.Linear(10, 3, key=key),
        ]
    )
    x = array(5, 4)

    def call(net, x):
        return jax.vmap(lambda x: net(x, key=key))(x)

    groups = tpp.channel_groups(call, x, params=net)
    plan = tpp.make_plan(groups, net, {"layers.0.layers.[01]": 0.5})
    small = tpp.prune(call, plan, net)
    assert small.layers[0].activation is net.layers[0].activation
    np.testing.assert_allclose(
        call(small, x), masked(call, plan, net, x), rtol=1e-5, atol=1e-5
    )
    assert tpp.check_groups(call, x, params=net).masked < 1e-5
    # The norm compares its input with a shape of its own, which follows.
    plan = tpp.make_plan(groups, net, {"layers.0.layers.2": 0.5})
    small = tpp.prune(call, plan, net)
    assert small.layers[2].shape == (5,)
    assert call(small, x).shape == (5, 3)
    assert net.layers[2].shape == (10,)


# Attributes that follow the channels.


class Attention(nnx.Module):
    """Attention that keeps its numbers as attributes."""

    def __init__(self, rngs, width=24, heads=6, kv_heads=3):
        size = width // heads
        self.heads, self.kv_heads, self.size = heads, kv_heads, size
        self.layers = 3  # equal to the number of key-value heads, and nothing to it
        self.q = nnx.Linear(width, heads * size, rngs=rngs)
        self.k = nnx.Linear(width, kv_heads * size, rngs=rngs)
        self.v = nnx.Linear(width, kv_heads * size, rngs=rngs)
        self.o = nnx.Linear(heads * size, width, rngs=rngs)

    def __call__(self, x):
        n, t, _ = x.shape
        q = self.q(x).reshape(n, t, self.heads, self.size)
        k = self.k(x).reshape(n, t, self.kv_heads, self.size)
        v = self.v(x).reshape(n, t, self.kv_heads, self.size)
        for _ in range(self.layers):
            x = x + 1.0
        return self.o(nnx.dot_product_attention(q, k, v).reshape(n, t, -1)) + x


def heads_of(groups, layer):
    return [g for g in groups if layer in g.producers and g.reason is None]


def test_numbers_of_heads_that_are_attributes_follow():
    net, x = Attention(nnx.Rngs(0)), array(2, 5, 24)
    groups = tpp.channel_groups(net, x)
    found = {(g.size, *g.producers) for g in groups if g.reason is None}
    assert (3, "q", "k", "v") in found  # key-value heads with their queries
    [group] = [g for g in groups if (g.size, *g.producers) == (3, "q", "k", "v")]
    plan = tpp.make_plan(groups, net, counts={group.name: 2})
    small = tpp.prune(net, plan)
    assert (small.heads, small.kv_heads, small.size) == (4, 2, 4)
    assert (net.heads, net.kv_heads, net.size, small.layers) == (6, 3, 4, 3)
    graphdef, state = nnx.split(net)
    state = jax.tree.map(jnp.multiply, state, tpp.mask_tree(plan, state))
    np.testing.assert_allclose(
        small(x), nnx.merge(graphdef, state)(x), rtol=1e-4, atol=1e-5
    )


def test_attributes_of_a_pruned_module_are_saved(tmp_path):
    net, x = Attention(nnx.Rngs(0)), array(2, 5, 24)
    groups = tpp.channel_groups(net, x)
    group = heads_of(groups, "k")[0]
    plan = tpp.make_plan(groups, net, counts={group.name: 2})
    small = tpp.prune(net, plan)
    tpp.save_model(tmp_path / "small", small, plan)
    loaded = tpp.load_model(tmp_path / "small", Attention(nnx.Rngs(1)))
    assert (loaded.heads, loaded.kv_heads) == (4, 2)
    np.testing.assert_array_equal(loaded(x), small(x))


class Config:
    def __init__(self, heads, width):
        self.heads, self.width = heads, width


class LinenAttention(linen.Module):
    """Attention whose number of heads is in a configuration, its size set by setup."""

    config: Config

    def setup(self):
        self.size = self.config.width // self.config.heads
        self.qkv = linen.Dense(3 * self.config.width)
        self.o = linen.Dense(self.config.width)

    def __call__(self, x):
        n, t, _ = x.shape
        parts = jnp.split(self.qkv(x), 3, axis=-1)
        q, k, v = (y.reshape(n, t, self.config.heads, self.size) for y in parts)
        return self.o(linen.dot_product_attention(q, k, v).reshape(n, t, -1))


class LinenNet(linen.Module):
    config: Config

    @linen.compact
    def __call__(self, x):
        return LinenAttention(self.config, name="attention")(x) + x


def test_fields_of_linen_modules_follow():
    config = Config(heads=4, width=32)
    net, x = LinenNet(config), array(2, 5, 32)
    variables = net.init(jax.random.key(0), x)
    groups = tpp.channel_groups(net, x, params=variables)
    heads, *_ = heads_of(groups, "attention.qkv")
    assert heads.size == 4
    plan = tpp.make_plan(groups, variables, counts={heads.name: 3})
    small = tpp.prune(net, plan, variables)
    found = tpp.linen_apply(net, plan)(small, x)
    np.testing.assert_allclose(
        found, masked(net.apply, plan, variables, x), rtol=1e-4, atol=1e-5
    )
    assert config.heads == 4


class EquinoxAttention(eqx.Module):
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width, heads, key):
        self.qkv = eqx.nn.Linear(width, 3 * width, key=key)
        self.out = eqx.nn.Linear(width, width, key=key)
        self.heads = heads

    def __call__(self, x):
        parts = jnp.split(jax.vmap(self.qkv)(x), 3, axis=-1)
        q, k, v = (part.reshape(len(x), self.heads, -1) for part in parts)
        y = jax.nn.dot_product_attention(q[None], k[None], v[None])[0]
        return jax.vmap(self.out)(y.reshape(len(x), -1))


def test_static_fields_of_equinox_modules_follow_also_in_a_training_state():
    net, x = EquinoxAttention(24, 4, jax.random.key(0)), array(3, 5, 24)

    def call(net, x):
        return jax.vmap(net)(x)

    groups = tpp.channel_groups(call, x, params=net)
    heads, *_ = heads_of(groups, "qkv")
    plan = tpp.make_plan(groups, net, counts={heads.name: 3})
    small = tpp.slice_tree(plan, {"model": net, "step": 3})["model"]
    assert (small.heads, net.heads) == (3, 4)
    np.testing.assert_allclose(
        call(small, x), masked(call, plan, net, x), rtol=1e-4, atol=1e-5
    )


class Halves(nnx.Module):
    """A fused projection that is split at an attribute, in unequal parts."""

    def __init__(self, rngs, left=12, right=6):
        self.left = left
        self.both = nnx.Linear(5, left + right, rngs=rngs)
        self.one = nnx.Linear(left, 2, rngs=rngs)
        self.other = nnx.Linear(right, 2, rngs=rngs)

    def __call__(self, x):
        left, right = jnp.split(self.both(x), [self.left], axis=-1)
        return self.one(nnx.relu(left)) + self.other(nnx.relu(right))


def test_unequal_parts_follow_their_attributes():
    net, x = Halves(nnx.Rngs(0)), array(3, 5)
    groups = tpp.channel_groups(net, x)
    assert sorted(g.size for g in groups if g.reason is None) == [6, 12]
    plan = tpp.make_plan(groups, net, 0.5)
    small = tpp.prune(net, plan)
    assert (small.left, small.both.kernel.shape) == (6, (5, 9))
    graphdef, state = nnx.split(net)
    state = jax.tree.map(jnp.multiply, state, tpp.mask_tree(plan, state))
    np.testing.assert_allclose(
        small(x), nnx.merge(graphdef, state)(x), rtol=1e-4, atol=1e-5
    )


def test_unequal_parts_of_written_sizes_stay():
    def net(p, x):
        left, right = jnp.split(x @ p["both"], [12], axis=-1)
        return left @ p["one"] + right @ p["other"]

    params = {"both": array(5, 18), "one": array(12, 2), "other": array(6, 2)}
    groups = tpp.channel_groups(net, array(3, 5), params=params)
    left = next(g for g in groups if g.size == 12)
    assert "a size written into the model (test_trial.py:" in left.reason


# Inner groups, and widths of one.


def test_an_inner_group_counts_where_the_coarser_cannot_be_pruned():
    def net(p, x):
        heads = (x @ p["a"]).reshape(len(x), 4, -1)  # four heads, whatever is left
        return jax.nn.relu(heads).reshape(len(x), -1) @ p["b"]

    params = {"a": array(5, 24), "b": array(24, 3)}
    groups = tpp.channel_groups(net, array(2, 5), params=params)
    assert reasons(groups)["a"] is not None
    assert not groups["a#2"].inner and groups["a#2"].outer == ("a",)
    for asked in ({"ratios": 0.5}, {"ratios": {"a": 0.5}}, {"flops": 0.5}):
        assert tpp.make_plan(groups, params, **asked).kept["a#2"].shape == (3,)


def test_one_head_is_no_group_that_hides_its_dimensions():
    def net(p, x):
        heads = (x @ p["a"]).reshape(len(x), 1, -1)
        return jax.nn.relu(heads).reshape(len(x), -1) @ p["b"]

    params = {"a": array(5, 24), "b": array(24, 3)}
    groups = tpp.channel_groups(net, array(2, 5), params=params)
    plan = tpp.make_plan(groups, params, 0.5)
    assert tpp.slice_tree(plan, params)["a"].shape == (5, 12)


# Reductions.


def test_a_cut_that_a_norm_sees_is_warned_of():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(5, 16, rngs=rngs)
            self.norm = nnx.RMSNorm(16, rngs=rngs)
            self.b = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x):
            return self.b(self.norm(self.a(x)))

    net, x = Net(nnx.Rngs(0)), array(4, 5)
    plan = tpp.make_plan(tpp.channel_groups(net, x), net, 0.25)
    tpp.prune(net, plan)  # nobody expects it to be free
    graphdef, state = nnx.split(net)
    state = jax.tree.map(jnp.multiply, state, tpp.mask_tree(plan, state))
    with pytest.warns(UserWarning, match="norm, softmax or other reduction .* of a:"):
        tpp.prune(nnx.merge(graphdef, state), plan)


def test_reduced_groups_are_proved_where_the_reduction_is_a_mean():
    def normed(p, x):
        h = x @ p["a"]
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6)
        return h @ p["b"]

    def softmaxed(p, x):
        return jax.nn.softmax(x @ p["a"]) @ p["b"]

    params = {"a": array(5, 12), "b": array(12, 3)}
    assert tpp.check_groups(normed, array(4, 5), params=params).unproved == ()
    assert tpp.check_groups(softmaxed, array(4, 5), params=params).unproved == ("a",)


def test_haiku_is_refused_by_name():
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 3])(x)))
    x = array(2, 6)
    params = net.init(jax.random.key(0), x)
    groups = tpp.channel_groups(net.apply, x, params=params)
    assert not prunable(groups)
    assert groups["mlp/~/linear_0"].reason.startswith("Haiku, whose modules compare")


def test_a_target_out_of_reach_names_what_it_left_out():
    def net(p, x):
        return (x @ p["a"]).reshape(-1, 16) @ p["b"] @ p["c"]

    params = {"a": array(30, 16), "b": array(16, 4), "c": array(4, 2)}
    groups = tpp.channel_groups(net, array(2, 30), params=params)
    with pytest.raises(TPPError, match=r"Not pruned: a \(a size written into"):
        tpp.make_plan(groups, params, flops=0.3)


# Widths that enter the values.


class Scaled(nnx.Module):
    """Divides by a number that equals its width: an attribute, or from the array."""

    def __init__(self, rngs, width=12, attribute=True):
        self.width = width
        self.attribute = attribute
        self.a = nnx.Linear(5, width, rngs=rngs)
        self.b = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        h = nnx.relu(self.a(x))
        if self.attribute:
            return self.b(h.reshape(len(x), self.width) / self.width)
        return self.b(h / h.shape[-1])


def test_an_attribute_that_enters_the_values_does_not_follow():
    net, x = Scaled(nnx.Rngs(0)), array(4, 5)
    groups = tpp.channel_groups(net, x)
    assert "enters its values in place of" in groups["a"].reason
    assert "test_trial.py:" in groups["a"].reason


def test_a_width_that_enters_the_values_is_like_a_mean():
    net, x = Scaled(nnx.Rngs(0), attribute=False), array(4, 5)
    groups = tpp.channel_groups(net, x)
    assert groups["a"].reason is None and groups["a"].reduced
    tpp.prune(net, tpp.make_plan(groups, net, 0.5))
    assert tpp.check_groups(net, x).unproved == ("a",)


def test_a_factor_that_depends_on_the_width_is_another_branch():
    def net(p, x):
        h = x @ p["a"]
        return (h * (3.0 if h.shape[-1] < 5 else 1.0)) @ p["b"]

    params = {"a": array(5, 16), "b": array(16, 3)}
    groups = tpp.channel_groups(net, array(2, 5), params=params)
    assert groups["a"].reason is None
    tpp.make_plan(groups, params, 0.5)
    with pytest.raises(TPPError, match="4 of the 16 channels of a: the number 3 "):
        tpp.make_plan(groups, params, 0.75)


def test_an_array_that_depends_on_the_width_is_like_a_number():
    few, many = array(2, 1), array(2, 1) + 1

    def net(p, x):
        h = x @ p["a"]
        return jax.nn.relu(h * (many if h.shape[-1] > 5 else few)) @ p["b"]

    params = {"a": array(5, 16), "b": array(16, 3)}
    groups = tpp.channel_groups(net, array(2, 5), params=params)
    assert groups["a"].reason is None
    tpp.make_plan(groups, params, 0.5)
    with pytest.raises(TPPError, match="4 of the 16 channels of a: an array "):
        tpp.make_plan(groups, params, 0.75)


def test_a_shape_that_an_output_has_from_a_width_is_named_with_its_line():
    def net(p, x):
        h = x @ p["a"]
        return h @ p["b"], jnp.zeros(h.shape[-1])

    params = {"a": array(5, 16), "b": array(16, 3)}
    groups = tpp.channel_groups(net, array(2, 5), params=params)
    reason = groups["a"].reason
    assert "(test_trial.py:" in reason and "library" not in reason
