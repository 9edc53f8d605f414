"""Groups of small computations, and the operations and sizes that fix channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import tpp_jax as tpp


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def between(operation, width=8, out=None):
    """Returns the groups of a network that applies a function to hidden channels."""

    def fn(p, x):
        hidden = jax.nn.relu(x @ p["before"] + p["bias"])
        return operation(hidden) @ p["after"]

    params = {"before": shape(3, width), "bias": shape(width)}
    after = jax.eval_shape(operation, shape(2, width)).shape[-1]
    params["after"] = shape(after, out or 2)
    return tpp.channel_groups(fn, shape(2, 3), params=params)["before"]


def pairs(group, leaf):
    [found] = [m.positions for m in group.members if m.leaf == leaf and m.axis == 0]
    return found.tolist()


def rotate_half(x):
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return jnp.concatenate([-second, first], axis=-1)


def rotate_neighbours(x):
    return jnp.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)


FOLLOWING = {
    "halves by slices": (rotate_half, [[0, 2], [1, 3]]),
    "neighbours by strides": (rotate_neighbours, [[0, 1], [2, 3]]),
    "halves by split": (lambda x: jnp.multiply(*jnp.split(x, 2, -1)), [[0], [1]]),
    "repeated": (
        lambda x: jnp.repeat(x, 2, -1),
        [[2 * i, 2 * i + 1] for i in range(4)],
    ),
    "tiled": (lambda x: jnp.tile(x, (1, 2)), [[i, i + 4] for i in range(4)]),
    "dynamic slice": (
        lambda x: jax.lax.dynamic_slice(x, (1, 0), (1, x.shape[1])),
        [[0], [1], [2], [3]],
    ),
    "update": (
        lambda x: jax.lax.dynamic_update_slice(x, x[1:], (0, 0)),
        [[0], [1], [2], [3]],
    ),
    "indexed rows": (lambda x: x[jnp.array([1, 0, 1])], [[0], [1], [2], [3]]),
    "summed rows": (
        lambda x: jax.ops.segment_sum(x, jnp.array([0, 0]), 2),
        [[0], [1], [2], [3]],
    ),
    "unstacked rows": (lambda x: sum(jnp.unstack(x)), [[0], [1], [2], [3]]),
    "reversed": (lambda x: x * x[:, ::-1], [[0, 3], [1, 2]]),
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_operations_that_follow_their_channels(name):
    operation, expected = FOLLOWING[name]
    group = between(operation, width=4)
    assert group.reason is None
    assert pairs(group, "after") == expected


def test_wrapping_and_sharding_an_array_does_not_change_its_channels():
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    @jax.custom_vjp
    def own(x):
        return jnp.sin(x)

    own.defvjp(lambda x: (own(x), x), lambda x, g: (g * jnp.cos(x),))

    def wrapped(x):
        x = jax.lax.with_sharding_constraint(x, spec)
        x = jax.lax.optimization_barrier(jax.checkpoint(jnp.tanh)(x))
        x = jax.lax.cond(x.sum() > 0, lambda y: y + 1, own, x)
        return jax.lax.while_loop(lambda y: y.sum() < 0, lambda y: y * 2, x)

    assert between(wrapped).reason is None


WRITTEN = {
    "half": lambda x: x[:, :4],
    "every second": lambda x: x[:, jnp.arange(0, 8, 2)],
    "heads": lambda x: x.reshape(2, 4, -1).transpose(0, 2, 1).reshape(2, -1)[:, :8],
    "a flat size": lambda x: jnp.stack([x, x], 1).reshape(-1, 16),
    "ones": lambda x: jnp.concatenate([x, x], -1) * jnp.ones((2, 16)),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_hard_coded_size_keeps_its_channels(name):
    group = between(WRITTEN[name])
    assert group.reason is not None
    assert "(test_channels.py:" in group.reason


MIXES = "which mixes the positions of an axis"
UNKNOWN = {
    "fft": (lambda x: jnp.abs(jnp.fft.fft(x, axis=-1)), MIXES),
    "lu": (lambda x: lax.linalg.lu(x)[0], MIXES),
    "pure_callback": (
        lambda x: jax.pure_callback(np.sort, shape(*x.shape), x),
        "which is not one that is understood",
    ),
}


@pytest.mark.parametrize("primitive", UNKNOWN)
def test_an_operation_without_a_rule_keeps_all_channels_of_its_operands(primitive):
    operation, why = UNKNOWN[primitive]

    def fn(p, x):
        before = jax.nn.relu(x @ p["before"])
        return jax.nn.relu(operation(before) @ p["after"]) @ p["last"]

    params = {"before": shape(3, 6), "after": shape(6, 6), "last": shape(6, 2)}
    groups = tpp.channel_groups(fn, shape(1, 3), params=params)
    reason = f"the operation '{primitive}', {why}"
    assert groups["before"].reason.startswith(f"{reason} (test_channels.py:")
    with pytest.raises(ValueError, match=f"channels of before meet {reason}"):
        tpp.channel_groups(fn, shape(1, 3), params=params, strict=True)
    # Operations after it are followed again.
    assert groups["after"].reason is None
    assert groups.members.keys() == {"after", "last"}


ORDERED = {
    "sort": (lambda x: jnp.sort(x, axis=-1), "an axis that is sorted"),
    "cumsum": (lambda x: jnp.cumsum(x, axis=-1), "the axis that 'cumsum' runs along"),
    "slice": (lambda x: x[:, :6], "a size written into the model"),
    "top_k": (
        lambda x: lax.top_k(x, 7)[0],
        "an axis of which the largest entries are taken",
    ),
}


@pytest.mark.parametrize("name", ORDERED)
def test_an_axis_whose_positions_have_an_order_is_kept(name):
    operation, reason = ORDERED[name]

    def fn(p, x):
        return operation(jax.nn.relu(x @ p["before"])) @ p["last"]

    params = {"before": shape(3, 7), "last": shape(6 if name == "slice" else 7, 2)}
    groups = tpp.channel_groups(fn, shape(1, 3), params=params)
    assert groups["before"].reason.startswith(f"{reason} (test_channels.py:")


def test_strict_raises_if_channels_would_be_left_unpruned():
    def fn(p, x):
        return jnp.fft.fft(x @ p["a"]).real @ p["b"]

    params = {"a": shape(3, 6), "b": shape(6, 2)}
    with pytest.raises(
        ValueError, match=r"channels of a meet the operation 'fft'.*py:"
    ):
        tpp.channel_groups(fn, shape(1, 3), params=params, strict=True)
    with pytest.raises(ValueError, match=r"before meet a size written into the model"):
        between_strict(WRITTEN["half"])
    # Inputs, outputs and axes that a rule fixes are not mistakes.
    tpp.channel_groups(lambda p, x: x @ p["a"], shape(1, 3), params=params, strict=True)


def between_strict(operation):
    params = {"before": shape(3, 8), "after": shape(4, 2)}
    return tpp.channel_groups(
        lambda p, x: operation(x @ p["before"]) @ p["after"],
        shape(2, 3),
        params=params,
        strict=True,
    )


@jax.jit
def blackbox(x):
    return jnp.linalg.svd(x)[0]


def test_a_reason_names_the_users_line_also_through_jit_and_scan():
    def fn(p, x):
        first = blackbox(x @ p["a"]) @ p["b"]
        second = blackbox(x @ p["c"]) @ p["d"]
        looped = jax.lax.scan(
            lambda carry, _: (blackbox(carry @ p["e"]), None), x @ p["f"], length=2
        )[0]
        return first, second, looped @ p["g"]

    first_line = fn.__code__.co_firstlineno
    params = {name: shape(4, 4) for name in "abcdefg"}
    groups = tpp.channel_groups(fn, shape(4, 4), params=params)
    for name, offset in (("a", 1), ("c", 2), ("f", 4)):
        assert groups[name].reason.endswith(f"(test_channels.py:{first_line + offset})")


class Mixed(nnx.Module):
    """Two blocks of one class: one for exactly 4 heads, one for any number."""

    def __init__(self, rngs, heads):
        self.heads = heads
        self.qkv = nnx.Linear(8, 24, rngs=rngs)
        self.out = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        q, k, v = (y.reshape(*x.shape[:2], *self.heads()) for y in (q, k, v))
        y = nnx.dot_product_attention(q, k, v)
        return x + self.out(y.reshape(*x.shape[:2], -1))


def test_blocks_of_one_class_are_distinguished():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Linear(3, 8, rngs=rngs)
            self.by_number = Mixed(rngs, lambda: (4, -1))
            self.by_size = Mixed(rngs, lambda: (-1, 2))

        def __call__(self, x):
            return self.by_size(self.by_number(self.stem(x)))

    groups = tpp.channel_groups(Two(nnx.Rngs(0)), shape(1, 5, 3))
    prunable = {group.name for group in groups if group.reason is None}
    assert prunable == {"by_number.qkv#2", "by_size.qkv"}
    assert "a size written into the model" in groups["by_number.qkv"].reason
    assert "a size written into the model" in groups["by_size.qkv#2"].reason


def test_a_group_of_one_channel_does_not_affect_others():
    def fn(p, x):
        heads = (x @ p["a"]).reshape(2, 1, -1)  # a single head
        return jax.nn.relu(heads).reshape(2, -1) @ p["b"]

    params = {"a": shape(3, 6), "b": shape(6, 2)}
    groups = tpp.channel_groups(fn, shape(2, 3), params=params)
    assert groups["a"].size == 6 and groups["a"].reason is None

    def gate(p, x):
        return (x @ p["one"]) @ jnp.tile(p["wide"], (1, 2)) @ p["b"]

    params = {"one": shape(3, 1), "wide": shape(1, 3), "b": shape(6, 2)}
    groups = tpp.channel_groups(gate, shape(2, 3), params=params)
    assert groups["wide"].reason is None


def test_a_module_may_have_an_evaluation_mode_of_its_own():
    class Own(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 6, rngs=rngs)
            self.last = nnx.Linear(6, 2, rngs=rngs)
            self.training = True

        def eval(self, **_attributes):
            self.training = False

        def __call__(self, x):
            if self.training:
                raise AssertionError("not in evaluation mode")
            return self.last(jax.nn.relu(self.first(x)))

    groups = tpp.channel_groups(Own(nnx.Rngs(0)), shape(1, 3))
    assert groups["first"].reason is None


def test_arguments_that_are_not_arrays_are_settings():
    def fn(p, x, double, names):
        hidden = jax.nn.relu(x @ p["a"])
        return (hidden * 2 if double else hidden) @ p[names[0]]

    params = {"a": shape(3, 6), "b": shape(6, 2)}
    groups = tpp.channel_groups(fn, shape(1, 3), True, ("b",), params=params)
    assert groups["a"].reason is None
    assert groups.inputs == (shape(1, 3), True, ("b",))


def test_several_kernels_of_one_module_are_named_by_their_leaves():
    def fn(p, x):
        p = p["layers"]
        return jax.nn.relu(jax.nn.relu(x @ p["up"]) @ p["middle"]) @ p["down"]

    params = {"up": shape(3, 6), "middle": shape(6, 5), "down": shape(5, 2)}
    groups = tpp.channel_groups(fn, shape(1, 3), params={"layers": params})
    assert [g.name for g in groups] == ["layers.up", "layers.middle", "layers.down"]


def test_an_embedding_produces_channels_that_a_position_table_follows():
    class Text(nnx.Module):
        def __init__(self, rngs):
            self.tokens = nnx.Embed(20, 8, rngs=rngs)
            self.places = nnx.Embed(5, 8, rngs=rngs)
            self.mix = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, ids):
            x = self.tokens(ids) + self.places(jnp.arange(ids.shape[1]))
            return self.tokens.attend(x + jnp.tanh(self.mix(x)))

    ids = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    stream, vocabulary = tpp.channel_groups(Text(nnx.Rngs(0)), ids)
    assert (stream.name, stream.size, stream.reason) == ("tokens", 8, None)
    assert stream.producers == ("tokens", "mix")
    roles = {(m.leaf, m.axis): m.role for m in stream.members}
    assert roles["tokens.embedding", 1] == "produced"
    assert roles["places.embedding", 1] == "along"
    assert vocabulary.size == 20 and vocabulary.reason is not None
