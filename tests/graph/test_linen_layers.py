"""Every layer of Flax Linen runs on arrays that were cut along each of their axes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import tpp_jax as tpp

# Classes of Flax that are not layers with sizes, and the reasons.
EXCUSED = {
    "Sequential": "holds layers, and no sizes",
    "Dropout": "knows a rate, and no sizes",
    "RNNCellBase": "the base of the cells",
    "_Conv": "the base of the convolutions",
    "DenseParams": "the parameters of OptimizedLSTMCell",
    "CompactNameScope": "part of nn.compact_name_scope",
    "Fp8DotGeneralBase": "the base of the products in 8 bits",
    "Fp8Einsum": "an einsum of two operands, with scales of one number",
    "ToLinen": "holds an NNX module: see test_bridge.py",
}


class Between(nn.Module):
    """A layer between two dense ones, so that all its channels are hidden."""

    layer: Any
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="first")(x)
        keywords = {}
        if isinstance(self.layer, nn.SpectralNorm):
            keywords = {"update_stats": False}
        return nn.Dense(2, name="last")(self.layer(x, **keywords))


class Twice(nn.Module):
    first: Any
    second: Any

    def __call__(self, x):
        return self.second(self.first(x))


class Attention(nn.Module):
    """A network whose layer has to be created where it is called."""

    cls: Any

    @nn.compact
    def __call__(self, x):
        layer = self.cls(num_heads=4, qkv_features=16, out_features=10, name="layer")
        return nn.Dense(2, name="last")(layer(nn.Dense(12, name="first")(x)))


class Looked(nn.Module):
    """An embedding table that is also the output layer."""

    def setup(self):
        self.table, self.hidden = nn.Embed(7, 8), nn.Dense(8)

    def __call__(self, tokens):
        return self.table.attend(nn.relu(self.hidden(self.table(tokens))))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.GroupNorm(4)(nn.Dense(16)(x))
        y = nn.Conv(16, (3,), feature_group_count=16)(y)
        y = nn.Einsum((16, 8), "nta,ab->ntb")(nn.DenseGeneral(16)(nn.relu(y)))
        return x + nn.Dense(12)(y), None


class Lifted(nn.Module):
    """Blocks under one of Flax's transformations."""

    lift: Any

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12, name="first")(x)
        return nn.Dense(2, name="last")(self.lift(Block)(name="blocks")(x, None)[0])


def scanned(axis):
    def lift(block):
        return nn.scan(
            block, variable_axes={"params": axis}, split_rngs={"params": True}, length=3
        )

    return lift


class Expert(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.relu(nn.GroupNorm(4)(nn.Dense(16)(x)))
        return x + nn.DenseGeneral(12)(y), None


def mapped(_):
    return nn.vmap(
        Expert,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=3,
    )


def products_in_8_bits(cls):
    return Between(nn.Dense(6, dot_general_cls=cls), 8)


ROW, WORDS, STEPS, VIDEO = (4, 3), "tokens", (3, 5, 3), (2, 3, 4, 4, 3)

# Name → class of the layer, network, shape of its inputs, number of prunable groups.
NETWORKS = {
    "dense": (nn.Dense, Between(nn.Dense(6), 8), ROW, 2),
    "general": (
        nn.DenseGeneral,
        Between(
            Twice(nn.DenseGeneral((4, 8)), nn.DenseGeneral(16, axis=(-2, -1))),
            6,
        ),
        ROW,
        4,
    ),
    "general, of lists": (
        nn.DenseGeneral,
        Between(
            Twice(nn.DenseGeneral([4, 8]), nn.DenseGeneral([16], axis=[-2, -1])), 6
        ),
        ROW,
        4,
    ),
    "general over a batch": (
        nn.DenseGeneral,
        Between(nn.DenseGeneral(8, batch_dims=0), 6),
        STEPS,
        2,
    ),
    "einsum": (
        nn.Einsum,
        Between(
            Twice(
                nn.Einsum((4, 6, 8), "nta,hab->nthb"),
                nn.Einsum((4, 8, 10), "nthb,hbc->ntc", use_bias=False),
            ),
            6,
        ),
        STEPS,
        4,
    ),
    "conv": (nn.Conv, Between(nn.Conv(6, (3,)), 8), STEPS, 2),
    "depthwise": (
        nn.Conv,
        Between(nn.Conv(16, (3,), feature_group_count=8), 8),
        STEPS,
        1,
    ),
    "grouped": (
        nn.Conv,
        Between(nn.Conv(24, (3,), feature_group_count=4), 16),
        STEPS,
        2,
    ),
    "local": (nn.ConvLocal, Between(nn.ConvLocal(6, (3,)), 8), STEPS, 2),
    "transposed": (
        nn.ConvTranspose,
        Between(nn.ConvTranspose(6, (3,), (2,), transpose_kernel=True), 8),
        STEPS,
        2,
    ),
    "embedding": (nn.Embed, Looked(), WORDS, 1),
    "batch norm": (
        nn.BatchNorm,
        Between(nn.BatchNorm(use_running_average=True), 8),
        ROW,
        1,
    ),
    "layer norm": (nn.LayerNorm, Between(nn.LayerNorm(use_scale=False), 8), ROW, 1),
    "rms norm": (nn.RMSNorm, Between(nn.RMSNorm(), 8), ROW, 1),
    "group norm": (nn.GroupNorm, Between(nn.GroupNorm(4), 16), STEPS, 2),
    "group norm of a group size": (
        nn.GroupNorm,
        Between(nn.GroupNorm(None, group_size=4, use_scale=False), 16),
        STEPS,
        2,
    ),
    "instance norm": (nn.InstanceNorm, Between(nn.InstanceNorm(), 8), STEPS, 1),
    "weight norm": (nn.WeightNorm, Between(nn.WeightNorm(nn.Dense(6)), 8), ROW, 1),
    "spectral norm": (
        nn.SpectralNorm,
        Between(nn.SpectralNorm(nn.Dense(6)), 8),
        ROW,
        1,
    ),
    "attention": (
        nn.MultiHeadDotProductAttention,
        Attention(nn.MultiHeadDotProductAttention),
        STEPS,
        5,
    ),
    "attention, by its other name": (
        nn.MultiHeadAttention,
        Attention(nn.MultiHeadAttention),
        STEPS,
        5,
    ),
    "self-attention": (nn.SelfAttention, Attention(nn.SelfAttention), STEPS, 5),
    "lstm": (nn.LSTMCell, Between(nn.RNN(nn.LSTMCell(6)), 4), STEPS, 2),
    "fast lstm": (
        nn.OptimizedLSTMCell,
        Between(nn.RNN(nn.OptimizedLSTMCell(6)), 4),
        STEPS,
        1,
    ),
    "gru": (nn.GRUCell, Between(nn.RNN(nn.GRUCell(6)), 4), STEPS, 2),
    "mgu": (nn.MGUCell, Between(nn.RNN(nn.MGUCell(6)), 4), STEPS, 2),
    "simple cell": (nn.SimpleCell, Between(nn.RNN(nn.SimpleCell(6)), 4), STEPS, 2),
    "conv lstm": (
        nn.ConvLSTMCell,
        Between(nn.RNN(nn.ConvLSTMCell(6, (3, 3))), 4),
        VIDEO,
        2,
    ),
    "rnn": (nn.RNN, Between(nn.RNN(nn.GRUCell(6), reverse=True), 4), STEPS, 2),
    "both ways": (
        nn.Bidirectional,
        Between(nn.Bidirectional(nn.RNN(nn.GRUCell(6)), nn.RNN(nn.LSTMCell(4))), 4),
        STEPS,
        3,
    ),
    "prelu": (nn.PReLU, Between(nn.PReLU(), 8), ROW, 1),
    "8 bits": (nn.Fp8DotGeneralOp, products_in_8_bits(nn.Fp8DotGeneralOp), ROW, 1),
    "8 bits, direct": (
        nn.Fp8DirectDotGeneralOp,
        products_in_8_bits(nn.Fp8DirectDotGeneralOp),
        ROW,
        1,
    ),
    "8 bits, another format": (
        nn.NANOOFp8DotGeneralOp,
        products_in_8_bits(nn.NANOOFp8DotGeneralOp),
        ROW,
        1,
    ),
    "scanned": (Block, Lifted(scanned(0)), STEPS, 5),
    "scanned along another axis": (Block, Lifted(scanned(1)), STEPS, 5),
    "mapped": (Expert, Lifted(mapped), STEPS, 3),
    "remembered": (Block, Lifted(nn.remat), STEPS, 5),
    "compiled": (Block, Lifted(nn.jit), STEPS, 5),
}


def subclasses(cls):
    for each in cls.__subclasses__():
        yield each
        yield from subclasses(each)


def test_every_layer_of_linen_is_tested_or_excluded():
    layers = {c for c in subclasses(nn.Module) if c.__module__.startswith("flax.")}
    # Transformations create classes with the names of the transformed ones.
    layers = {c for c in layers if "flax.linen.transforms" not in c.__module__}
    assert len(layers) > 30
    covered = {cls.__name__ for cls, *_ in NETWORKS.values()}
    assert not {cls.__name__ for cls in layers} - covered - EXCUSED.keys()
    assert not covered & EXCUSED.keys()


def inputs_of(shape):
    if shape == WORDS:
        return jnp.arange(4)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def drawn(module, *inputs):
    """Returns variables drawn by NumPy, so that nothing is compiled."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))

    def draw(leaf):
        low = 0.2 if len(leaf.shape) < 2 else -0.9
        return jnp.asarray(rng.uniform(low, 0.9, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, shapes)


def times(leaf, keep):
    return leaf * keep if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_sliced_layer_computes_the_same_as_the_masked_one(name):
    _, module, shape, prunable = NETWORKS[name]
    x = inputs_of(shape)
    variables = drawn(module, x)
    whole = jax.jit(lambda v: module.apply(v, x))
    same = jax.jit(lambda v: tpp.linen_apply(module)(v, x))
    np.testing.assert_array_equal(same(variables), whole(variables))

    groups = tpp.channel_groups(module, x, params=variables)
    halves = {g.name: (g.size + 1) // 2 for g in groups if g.reason is None}
    assert len(halves) >= prunable  # not only those of the layers around it
    exact = {name for name in halves if not groups[name].reduced}
    for counts in (
        *({name: halves[name]} for name in halves),
        halves,
        {name: halves[name] for name in exact},
    ):
        plan = tpp.make_plan(groups, variables, counts=counts)
        small = tpp.slice_tree(plan, variables)
        apply = tpp.linen_apply(module, plan)
        if counts.keys() == exact:
            found = jax.jit(lambda v, apply=apply: apply(v, x))(small)
            expected = whole(
                jax.tree.map(times, variables, tpp.mask_tree(plan, variables))
            )
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        else:
            run = jax.eval_shape(apply, small, x)
            assert run.shape == jax.eval_shape(module.apply, variables, x).shape


class MyCell(nn.RNNCellBase):
    """A user's cell whose kernels have the names of Flax's, or other names."""

    features: int
    recurrent: str

    @nn.compact
    def __call__(self, carry, x):
        width = carry.shape[-1]
        both = nn.Dense(width, name=self.recurrent)(carry)
        new = nn.tanh(both + nn.Dense(width, name="to")(x))
        return new, new

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):  # noqa: ARG002  as Flax calls it
        return jnp.zeros((*input_shape[:-1], self.features))

    @property
    def num_feature_axes(self):
        return 1


def test_a_user_s_cell_has_the_width_of_its_arrays():
    module, x = Between(nn.RNN(MyCell(6, "hi")), 4), inputs_of(STEPS)
    variables = drawn(module, x)
    groups = tpp.channel_groups(module, x, params=variables)
    names = [group.name for group in groups if group.reason is None]
    assert names == ["first", "layer.cell.hi"]
    assert tpp.check_groups(module, x, params=variables).masked < 1e-5


class Appended(nn.RNNCellBase):
    """A cell whose layer ``hi`` contracts the inputs along with its state."""

    features: int

    @nn.compact
    def __call__(self, carry, x):
        joined = jnp.concatenate([carry, x], axis=-1)
        new = nn.tanh(nn.Dense(self.features, name="hi")(joined))
        return new, new

    initialize_carry = MyCell.initialize_carry
    num_feature_axes = MyCell.num_feature_axes


def test_a_cell_unlike_flax_s_runs_unchanged():
    module, x = Between(nn.RNN(Appended(6)), 4), inputs_of(STEPS)
    variables = drawn(module, x)
    expected = module.apply(variables, x)
    np.testing.assert_array_equal(tpp.linen_apply(module)(variables, x), expected)
    groups = tpp.channel_groups(module, x, params=variables)
    plan = tpp.make_plan(groups, variables, counts={"first": 4})
    found = tpp.linen_apply(module, plan)(variables, x)
    np.testing.assert_array_equal(found, expected)


class Shift(nn.Module):
    by: int

    def __call__(self, x):
        return jnp.roll(x, self.by, axis=1)


SHIFT = Shift(1, parent=None)


class Helped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="last")(SHIFT(nn.relu(nn.Dense(8, name="first")(x))))


def test_a_module_without_variables_may_be_called_unbound():
    module, x = Helped(), inputs_of(STEPS)
    variables = drawn(module, x)
    groups = tpp.channel_groups(module, x, params=variables)
    assert [group.name for group in groups if group.reason is None] == ["first"]
    assert tpp.check_groups(module, x, params=variables).masked < 1e-5
