"""Peak memory of activations, by hand and for pruned forms."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax.errors import TPPError
from tpp_jax.pruning.memory import Memory, activation_bytes


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def chain(p, x):
    x = jnp.tanh(x @ p["w1"])  # 2 · 10 numbers, the tanh beside its operand
    x = jnp.tanh(x @ p["w2"])  # 10 + 30, then 2 · 30
    return x @ p["w3"]  # 30 + 5


CHAIN = {"w1": shape(4, 10), "w2": shape(10, 30), "w3": shape(30, 5)}


def residual(p, x):
    x = x @ p["stem"]  # 6
    y = jnp.tanh(x @ p["up"])  # 6 + 2 · 20, as the stream is needed later
    return x + y @ p["down"]  # 6 + 20 + 6, then 6 + 6 + 6


RESIDUAL = {"stem": shape(3, 6), "up": shape(6, 20), "down": shape(20, 6)}


@pytest.mark.parametrize(
    ("fn", "params", "inputs", "numbers"),
    [(chain, CHAIN, 4, 60), (residual, RESIDUAL, 3, 46)],
    ids=["chain", "residual"],
)
def test_the_peak_is_that_of_a_sum_by_hand(fn, params, inputs, numbers):
    for batch in (1, 7):
        found = activation_bytes(fn, shape(batch, inputs), params=params)
        assert found == 4 * batch * numbers
    halved = jax.tree.map(lambda x: shape(*x.shape, dtype=jnp.bfloat16), params)
    x = shape(1, inputs, dtype=jnp.bfloat16)
    assert activation_bytes(fn, x, params=halved) == 2 * numbers


def test_neither_arguments_nor_what_parameters_make_nor_reshapes_count():
    def fn(p, x):
        kernel = p["w"] / jnp.linalg.norm(p["w"])
        return (x.reshape(2, 6) @ kernel).reshape(-1)

    # The product alone: two rows of five columns.
    assert activation_bytes(fn, shape(3, 4), params={"w": shape(6, 5)}) == 4 * 10


def test_what_no_output_needs_does_not_count():
    def fn(p, x):
        jnp.tanh(x @ p["large"])
        return x @ p["small"]

    params = {"large": shape(4, 100), "small": shape(4, 5)}
    assert activation_bytes(fn, shape(1, 4), params=params) == 4 * 5


@pytest.mark.parametrize("name", ["resnet", "decoder"])
def test_the_peak_of_a_pruned_network_follows_without_another_trace(name):
    if name == "resnet":
        x = shape(2, 8, 8, 1)
        model = nnx.eval_shape(
            lambda: tpp.models.create(
                "cifar_resnet8", image_shape=(8, 8, 1), rngs=nnx.Rngs(0)
            )
        )
    else:
        x = shape(2, 12, dtype=jnp.int32)
        sizes = {"vocabulary": 20, "width": 16, "depth": 2, "hidden": 40}
        model = nnx.eval_shape(lambda: tpp.models.small_decoder(nnx.Rngs(0), **sizes))
    groups = tpp.channel_groups(model, x)
    memory = Memory(groups)
    assert memory({}) == activation_bytes(model, x)
    kept = {g.name: g.size - g.size // 4 for g in groups if not g.reason}
    scores = {g.name: jnp.arange(g.size) for g in groups if not g.reason}
    plan = tpp.make_plan(groups, model, counts=kept, scores=scores)
    assert memory(kept) == activation_bytes(tpp.prune(model, plan), x) < memory({})


def test_a_target_is_met_within_one_channel():
    groups = tpp.channel_groups(chain, shape(1, 4), params=CHAIN)
    params = jax.tree.map(lambda x: jnp.ones(x.shape), CHAIN)
    plan = tpp.make_plan(groups, params, memory=0.5)
    small = tpp.prune(chain, plan, params)
    assert activation_bytes(chain, shape(1, 4), params=small) == 4 * 2 * 15
    both = tpp.make_plan(groups, params, memory=0.5, params=0.2)
    assert both.kept_count(groups["w2"]) < 15
    with pytest.raises(TPPError, match=r"0\.1000 of the memory \(\d+ bytes\) remain"):
        tpp.make_plan(groups, params, memory=0.01)
