"""Every group that is reported as prunable was tried on the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.pruning.masking import masked, prunable
from tpp_jax.errors import TPPError

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def reasons(groups):
    return {group.name: group.reason for group in groups}


# Sizes that are hard-coded in a model.


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


def test_a_trial_size_does_not_collide_with_another_size():
    def net(p, x):
        h = x
        for name in ("a", "b"):
            y = jax.nn.relu(h @ p[name])
            h = y + h if y.shape == h.shape else y  # false if 6 is left of 12
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


def test_a_model_that_requires_round_numbers_is_tried_with_one():
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


# Inner groups, and widths of one.


def test_an_inner_group_is_pruned_if_the_coarser_one_cannot_be():
    def net(p, x):
        heads = (x @ p["a"]).reshape(len(x), 4, -1)  # always four heads
        return jax.nn.relu(heads).reshape(len(x), -1) @ p["b"]

    params = {"a": array(5, 24), "b": array(24, 3)}
    groups = tpp.channel_groups(net, array(2, 5), params=params)
    assert reasons(groups)["a"] is not None
    assert not groups["a#2"].inner and groups["a#2"].outer == ("a",)
    for asked in ({"ratios": 0.5}, {"ratios": {"a": 0.5}}, {"flops": 0.5}):
        assert tpp.make_plan(groups, params, **asked).kept["a#2"].shape == (3,)


def test_a_single_head_does_not_hide_its_dimensions():
    def net(p, x):
        heads = (x @ p["a"]).reshape(len(x), 1, -1)
        return jax.nn.relu(heads).reshape(len(x), -1) @ p["b"]

    params = {"a": array(5, 24), "b": array(24, 3)}
    groups = tpp.channel_groups(net, array(2, 5), params=params)
    plan = tpp.make_plan(groups, params, 0.5)
    assert tpp.slice_tree(plan, params)["a"].shape == (5, 12)


# Reductions.


def test_a_cut_that_changes_a_norm_warns():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(5, 16, rngs=rngs)
            self.norm = nnx.LayerNorm(16, rngs=rngs)
            self.b = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x):
            return self.b(self.norm(self.a(x)))

    net, x = Net(nnx.Rngs(0)), array(4, 5)
    plan = tpp.make_plan(tpp.channel_groups(net, x), net, 0.25)
    tpp.prune(net, plan)  # without a warning, since no channels were zero
    graphdef, state = nnx.split(net)
    state = jax.tree.map(jnp.multiply, state, tpp.mask_tree(plan, state))
    with pytest.warns(UserWarning, match="are zero, but the cut changes .* 'sub'"):
        tpp.prune(nnx.merge(graphdef, state), plan)


def test_reduced_groups_are_proved_if_the_reduction_is_a_mean():
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


def test_a_target_out_of_reach_names_the_unpruned_groups():
    def net(p, x):
        return (x @ p["a"]).reshape(-1, 16) @ p["b"] @ p["c"]

    params = {"a": array(30, 16), "b": array(16, 4), "c": array(4, 2)}
    groups = tpp.channel_groups(net, array(2, 30), params=params)
    with pytest.raises(TPPError, match=r"Not pruned: a \(a size written into"):
        tpp.make_plan(groups, params, flops=0.3)


# Widths as numbers in the computation.


class Scaled(nnx.Module):
    """Divides by its width, from an attribute or from the array's shape."""

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


def test_an_attribute_that_scales_the_values_does_not_follow():
    net, x = Scaled(nnx.Rngs(0)), array(4, 5)
    groups = tpp.channel_groups(net, x)
    assert "appears in its computation in place of" in groups["a"].reason
    assert "test_trial.py:" in groups["a"].reason


def test_a_width_that_scales_the_values_is_like_a_mean():
    net, x = Scaled(nnx.Rngs(0), attribute=False), array(4, 5)
    groups = tpp.channel_groups(net, x)
    assert groups["a"].reason is None and groups["a"].reduced
    tpp.prune(net, tpp.make_plan(groups, net, 0.5))
    assert tpp.check_groups(net, x).unproved == ()  # other weights are rescaled


def test_a_factor_that_depends_on_the_width_is_refused():
    def net(p, x):
        h = x @ p["a"]
        return (h * (3.0 if h.shape[-1] < 5 else 1.0)) @ p["b"]

    params = {"a": array(5, 16), "b": array(16, 3)}
    groups = tpp.channel_groups(net, array(2, 5), params=params)
    assert groups["a"].reason is None
    tpp.make_plan(groups, params, 0.5)
    with pytest.raises(TPPError, match="4 of the 16 channels of a: the number 3 "):
        tpp.make_plan(groups, params, 0.75)


def test_an_array_that_depends_on_the_width_is_refused():
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


def test_an_output_whose_shape_is_a_width_is_named_with_its_line():
    def net(p, x):
        h = x @ p["a"]
        return h @ p["b"], jnp.zeros(h.shape[-1])

    params = {"a": array(5, 16), "b": array(16, 3)}
    groups = tpp.channel_groups(net, array(2, 5), params=params)
    reason = groups["a"].reason
    assert "(test_trial.py:" in reason and "library" not in reason
