"""Alike blocks in a loop compute what they compute one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import tpp_jax as tpp
from tests.reference import filled
from tests.training.test_step import assert_alike, small_resnet, trained
from tpp_jax.models import CifarResNet
from tpp_jax.training import step as steps
from tpp_jax.xla.blocks import Blocks, hold_blocks, roll_blocks

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)


def deep_resnet():
    return filled(
        lambda: CifarResNet((5, 3, 3), width=0.25, in_channels=1, rngs=nnx.Rngs(0))
    )


def rolled(model, rolled_from=2):
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Blocks):
            module.rolled_from = rolled_from


def loops_and_results(model, roll):
    """How many loops the program has; loss, gradients and new batch statistics."""
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        copy = nnx.merge(graphdef, params, rest, copy=True)
        if roll:
            rolled(copy)
        return jnp.square(copy(IMAGES)).mean(), nnx.state(copy, nnx.BatchStat)

    loops = str(jax.make_jaxpr(loss)(params)).count("scan[")
    return loops, jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def test_rolled_blocks_give_the_same_loss_gradients_and_statistics():
    none, one_by_one = loops_and_results(deep_resnet(), roll=False)
    loops, at_once = loops_and_results(deep_resnet(), roll=True)
    # In every stage but the first, the first block differs: it halves the image.
    assert (none, loops) == (0, 3)
    assert jax.tree.structure(one_by_one) == jax.tree.structure(at_once)
    assert_alike(at_once, one_by_one, rtol=1e-4, atol=5e-6)  # of values up to 6


def test_only_blocks_of_equal_widths_are_rolled():
    model = deep_resnet()
    groups = tpp.channel_groups(model, IMAGES)
    pruned = tpp.prune(model, tpp.make_plan(groups, model, "layer1.2.conv1:0.5"))
    _, one_by_one = loops_and_results(pruned, roll=False)
    loops, at_once = loops_and_results(pruned, roll=True)
    assert loops == 4  # blocks 0 and 1, 3 and 4 of the first stage
    assert_alike(at_once, one_by_one, rtol=1e-4, atol=5e-6)  # of values up to 6


def test_rolled_blocks_train_like_others_on_several_devices(monkeypatch):
    def train():
        model = CifarResNet((3, 1, 1), width=0.25, in_channels=1, rngs=nnx.Rngs(0))
        return trained(model, optax.sgd(0.01), jax.devices()[:4], 3)

    losses, state = train()
    monkeypatch.setattr(steps, "roll_blocks", rolled)
    found, other = train()
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    assert_alike(other, state, rtol=1e-3, atol=1e-5)


def test_blocks_are_rolled_where_loops_are_fast_and_blocks_are_many(monkeypatch):
    model = small_resnet()
    roll_blocks(model)
    assert model.layer1.rolled_from is None  # the CPU runs convolutions in loops slowly
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    roll_blocks(model)
    assert model.layer1.rolled_from == 50


class _Residual(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 4, (3, 3), rngs=rngs)

    def __call__(self, x):
        return jnp.abs(x + self.conv(x))


def test_held_blocks_compute_once_what_they_hand_on():
    blocks = Blocks([_Residual(nnx.Rngs(i)) for i in range(4)])
    images = jnp.ones((2, 8, 8, 4))

    def evaluated():
        # A function of its own each time: JAX would remember what it compiled.
        program = jax.jit(lambda x: blocks(x)).lower(images).compile()
        return program.as_text().count(" abs("), program(images)

    before, expected = evaluated()
    hold_blocks(blocks)
    after, result = evaluated()
    assert after == 4 < before
    np.testing.assert_array_equal(result, expected)
