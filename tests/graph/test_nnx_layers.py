"""Every layer of Flax NNX runs after pruning each axis and has its new sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax.graph.bridge import follow_arrays
from tpp_jax.graph.naming import named_leaves
from tpp_jax.graph.nnx_layers import modules

# Classes of Flax that are not layers with sizes, and the reasons.
EXCUSED = {
    "Module": "the base of all, twice: nnx.Module and nnx.bridge.Module",
    "Sequential": "holds layers, and no sizes",
    "List": "holds layers, and no sizes",
    "Dict": "holds layers, and no sizes",
    "Dropout": "knows a rate, and no sizes",
    "RoPE": "tables of the user's own attention, in Flax 0.12.12 and later",
    "RNNCellBase": "the base of the cells",
    "LiftedModule": "the base of transformed modules",
    "ToNNX": "holds a Linen module: see test_bridge.py",
}


def rngs():
    return nnx.Rngs(0)


def dense(inputs, outputs):
    return nnx.Linear(inputs, outputs, rngs=rngs())


class Between(nnx.Module):
    """A layer between two dense ones, so that all its channels are hidden."""

    def __init__(self, layer, into, out_of):
        self.first, self.layer, self.last = dense(3, into), layer, dense(out_of, 2)

    def __call__(self, x):
        return self.last(self.layer(self.first(x)))


class Looked(nnx.Module):
    """An embedding table that is also the output layer."""

    def __init__(self):
        self.table, self.hidden = nnx.Embed(7, 8, rngs=rngs()), dense(8, 8)

    def __call__(self, tokens):
        return self.table.attend(nnx.relu(self.hidden(self.table(tokens))))


class Crossed(nnx.Module):
    """Attention to other inputs, with fewer heads of keys than of queries."""

    def __init__(self):
        self.queries, self.keys = dense(3, 12), dense(3, 10)
        self.attention = nnx.MultiHeadAttention(
            4, 12, 16, 10, in_kv_features=10, num_kv_heads=2, decode=False, rngs=rngs()
        )
        self.last = dense(10, 2)

    def __call__(self, x):
        return self.last(self.attention(self.queries(x), self.keys(x)))


class Reversed(nnx.Linear):
    """A user's layer with a transposed kernel."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, rngs=rngs())
        self.kernel = nnx.Param(self.kernel[...].T)

    def __call__(self, x):
        return x @ self.kernel[...].T + self.bias[...]


class Stacked(nnx.Module):
    """Three equal blocks as one, whose arrays have one more axis in front."""

    def __init__(self):
        self.blocks = nnx.vmap(lambda key: Block(nnx.Rngs(key)))(
            jax.random.split(jax.random.key(0), 3)
        )
        self.first, self.last = dense(3, 12), dense(12, 2)

    def __call__(self, x):
        run = nnx.scan(
            lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry
        )
        return self.last(run(self.blocks, self.first(x)))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(12, 16, rngs=rngs)
        self.depthwise = nnx.Conv(16, 16, (3,), feature_group_count=16, rngs=rngs)
        self.mix = nnx.Einsum("nta,ab->ntb", (16, 8), (8,), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.down = nnx.Linear(8, 12, rngs=rngs)

    def __call__(self, x):
        return x + self.down(self.norm(self.mix(self.depthwise(self.up(x)))))


def recurrent(cell):
    return Between(nnx.RNN(cell(4, 6, rngs=rngs())), 4, 6)


def both_ways():
    forward = nnx.RNN(nnx.GRUCell(4, 6, rngs=rngs()))
    backward = nnx.RNN(nnx.LSTMCell(4, 8, rngs=rngs()))
    return Between(nnx.Bidirectional(forward, backward), 4, 14)


ROW, WORDS, STEPS = (4, 3), "tokens", (2, 5, 3)

# Name → class of the layer, network, shape of its inputs.
NETWORKS = {
    "dense": (nnx.Linear, lambda: Between(dense(8, 6), 8, 6), ROW),
    "no bias": (
        nnx.Linear,
        lambda: Between(nnx.Linear(8, 6, use_bias=False, rngs=rngs()), 8, 6),
        ROW,
    ),
    "general": (
        nnx.LinearGeneral,
        lambda: Between(
            nnx.Sequential(
                nnx.LinearGeneral(6, (4, 8), rngs=rngs()),
                nnx.LinearGeneral((4, 8), 16, axis=(-2, -1), rngs=rngs()),
            ),
            6,
            16,
        ),
        ROW,
    ),
    "general over a batch": (
        nnx.LinearGeneral,
        lambda: Between(nnx.LinearGeneral(6, 8, batch_axis={0: 2}, rngs=rngs()), 6, 8),
        STEPS,
    ),
    "einsum": (
        nnx.Einsum,
        lambda: Between(
            nnx.Sequential(
                nnx.Einsum("nta,hab->nthb", (4, 6, 8), (4, 8), rngs=rngs()),
                nnx.Einsum("nthb,hbc->ntc", (4, 8, 10), rngs=rngs()),
            ),
            6,
            10,
        ),
        STEPS,
    ),
    "conv": (nnx.Conv, lambda: Between(nnx.Conv(8, 6, 3, rngs=rngs()), 8, 6), STEPS),
    "depthwise": (
        nnx.Conv,
        lambda: Between(nnx.Conv(8, 16, 3, feature_group_count=8, rngs=rngs()), 8, 16),
        STEPS,
    ),
    "grouped": (
        nnx.Conv,
        lambda: Between(
            nnx.Conv(16, 24, 3, feature_group_count=4, rngs=rngs()), 16, 24
        ),
        STEPS,
    ),
    "masked": (
        nnx.Conv,
        lambda: Between(nnx.Conv(8, 6, 3, mask=jnp.ones((3, 8, 6)), rngs=rngs()), 8, 6),
        STEPS,
    ),
    "transposed": (
        nnx.ConvTranspose,
        lambda: Between(nnx.ConvTranspose(8, 6, 3, 2, rngs=rngs()), 8, 6),
        STEPS,
    ),
    "transposed, its kernel too": (
        nnx.ConvTranspose,
        lambda: Between(
            nnx.ConvTranspose(8, 6, 3, 2, transpose_kernel=True, rngs=rngs()), 8, 6
        ),
        STEPS,
    ),
    "embedding": (nnx.Embed, Looked, WORDS),
    "batch norm": (
        nnx.BatchNorm,
        lambda: Between(nnx.BatchNorm(8, use_bias=False, rngs=rngs()), 8, 8),
        ROW,
    ),
    "layer norm": (
        nnx.LayerNorm,
        lambda: Between(nnx.LayerNorm(8, use_scale=False, rngs=rngs()), 8, 8),
        ROW,
    ),
    "rms norm": (
        nnx.RMSNorm,
        lambda: Between(nnx.RMSNorm(8, rngs=rngs()), 8, 8),
        ROW,
    ),
    "group norm": (
        nnx.GroupNorm,
        lambda: Between(nnx.GroupNorm(16, 4, rngs=rngs()), 16, 16),
        STEPS,
    ),
    "group norm of a group size": (
        nnx.GroupNorm,
        lambda: Between(
            nnx.GroupNorm(16, None, group_size=2, use_scale=False, rngs=rngs()), 16, 16
        ),
        STEPS,
    ),
    "instance norm": (
        nnx.InstanceNorm,
        lambda: Between(nnx.InstanceNorm(8, rngs=rngs()), 8, 8),
        STEPS,
    ),
    "weight norm": (
        nnx.WeightNorm,
        lambda: Between(nnx.WeightNorm(dense(8, 6), rngs=rngs()), 8, 6),
        ROW,
    ),
    "spectral norm": (
        nnx.SpectralNorm,
        lambda: Between(nnx.SpectralNorm(dense(8, 6), rngs=rngs()), 8, 6),
        ROW,
    ),
    "attention": (
        nnx.MultiHeadAttention,
        lambda: Between(
            nnx.MultiHeadAttention(
                4, 12, 16, 10, normalize_qk=True, decode=False, rngs=rngs()
            ),
            12,
            10,
        ),
        STEPS,
    ),
    "attention to others": (nnx.MultiHeadAttention, Crossed, STEPS),
    "lstm": (nnx.LSTMCell, lambda: recurrent(nnx.LSTMCell), STEPS),
    "fast lstm": (
        nnx.OptimizedLSTMCell,
        lambda: recurrent(nnx.OptimizedLSTMCell),
        STEPS,
    ),
    "gru": (nnx.GRUCell, lambda: recurrent(nnx.GRUCell), STEPS),
    "simple cell": (nnx.SimpleCell, lambda: recurrent(nnx.SimpleCell), STEPS),
    "rnn": (nnx.RNN, lambda: recurrent(nnx.GRUCell), STEPS),
    "both ways": (nnx.Bidirectional, both_ways, STEPS),
    "prelu": (nnx.PReLU, lambda: Between(nnx.PReLU(), 8, 8), ROW),
    "lora": (
        nnx.LoRA,
        lambda: Between(nnx.LoRA(8, 4, 6, base_module=dense(8, 6), rngs=rngs()), 8, 6),
        ROW,
    ),
    "lora, a layer": (
        nnx.LoRALinear,
        lambda: Between(nnx.LoRALinear(8, 6, lora_rank=4, rngs=rngs()), 8, 6),
        ROW,
    ),
    "stacked": (nnx.Linear, Stacked, STEPS),
}

# Functions that create a layer from the sizes in its attributes.
AGAIN = {
    nnx.Linear: lambda m: nnx.Linear(
        m.in_features, m.out_features, use_bias=m.use_bias, rngs=rngs()
    ),
    nnx.LinearGeneral: lambda m: nnx.LinearGeneral(
        m.in_features,
        m.out_features,
        axis=m.axis,
        batch_axis=m.batch_axis,
        rngs=rngs(),
    ),
    nnx.Einsum: lambda m: nnx.Einsum(
        m.einsum_str, m.kernel_shape, m.bias_shape, rngs=rngs()
    ),
    nnx.Conv: lambda m: nnx.Conv(
        m.in_features,
        m.out_features,
        m.kernel_size,
        feature_group_count=m.feature_group_count,
        mask=m.mask,
        rngs=rngs(),
    ),
    nnx.ConvTranspose: lambda m: nnx.ConvTranspose(
        m.in_features,
        m.out_features,
        m.kernel_size,
        m.strides,
        transpose_kernel=m.transpose_kernel,
        rngs=rngs(),
    ),
    nnx.Embed: lambda m: nnx.Embed(m.num_embeddings, m.features, rngs=rngs()),
    nnx.BatchNorm: lambda m: nnx.BatchNorm(
        m.num_features, use_bias=m.use_bias, rngs=rngs()
    ),
    nnx.LayerNorm: lambda m: nnx.LayerNorm(
        m.num_features, use_bias=m.use_bias, use_scale=m.use_scale, rngs=rngs()
    ),
    nnx.RMSNorm: lambda m: nnx.RMSNorm(m.num_features, rngs=rngs()),
    nnx.GroupNorm: lambda m: nnx.GroupNorm(
        m.num_groups * m.group_size, m.num_groups, use_scale=m.use_scale, rngs=rngs()
    ),
    nnx.InstanceNorm: lambda m: nnx.InstanceNorm(m.num_features, rngs=rngs()),
    nnx.MultiHeadAttention: lambda m: nnx.MultiHeadAttention(
        m.num_heads,
        m.in_features,
        m.qkv_features,
        m.out_features,
        in_kv_features=m.in_kv_features,
        num_kv_heads=m.num_kv_heads,
        normalize_qk=m.normalize_qk,
        decode=False,
        rngs=rngs(),
    ),
    nnx.LoRA: lambda m: nnx.LoRA(
        m.in_features,
        m.lora_a.shape[-1],
        m.out_features,
        base_module=m.base_module,
        rngs=rngs(),
    ),
    nnx.LoRALinear: lambda m: nnx.LoRALinear(
        m.in_features, m.out_features, lora_rank=m.lora.lora_a.shape[-1], rngs=rngs()
    ),
} | {
    cell: lambda m: type(m)(m.in_features, m.hidden_features, rngs=rngs())
    for cell in (nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell)
}


def subclasses(cls):
    for each in cls.__subclasses__():
        yield each
        yield from subclasses(each)


def test_every_layer_of_nnx_is_tested_or_excluded():
    layers = {c for c in subclasses(nnx.Module) if c.__module__.startswith("flax.")}
    assert len(layers) > 25
    covered = {cls for cls, _, _ in NETWORKS.values()}
    missing = {cls.__name__ for cls in layers - covered} - EXCUSED.keys()
    assert not missing
    assert not {cls.__name__ for cls in covered} & EXCUSED.keys()


def inputs_of(shape):
    if shape == WORDS:
        return jnp.arange(4)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def drawn(make):
    """Returns a network with arrays drawn by NumPy, so that nothing is compiled."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.uniform(0.2, 0.9, leaf.shape), leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.zeros(leaf.shape, leaf.dtype)

    # nnx.eval_shape loses an array that is not in a variable, such as a mask.
    abstract = make not in (NETWORKS["masked"][1], NETWORKS["weight norm"][1])
    graphdef, state = nnx.split(nnx.eval_shape(make) if abstract else make())
    network = nnx.merge(graphdef, jax.tree.map(draw, state))
    network.eval()
    return network


def halves(groups, network, wanted=lambda group: True):
    """Returns a plan that keeps half of the channels of some groups."""
    counts = {
        group.name: (group.size + 1) // 2
        for group in groups
        if group.reason is None and wanted(group)
    }
    return tpp.make_plan(groups, network, counts=counts)


def assert_sizes_are_true(network):
    for path, module in modules(network):
        if type(module) not in AGAIN:
            continue
        again = nnx.eval_shape(lambda module=module: AGAIN[type(module)](module))
        stack = 1 if path.startswith("blocks.") else 0
        shapes = {
            name: leaf.shape[stack:]
            for name, leaf in named_leaves(nnx.state(module)).items()
        }
        expected = named_leaves(nnx.state(again))
        assert shapes == {name: leaf.shape for name, leaf in expected.items()}, path
        for name, value in vars(again).items():
            if type(value) in (int, tuple):
                assert getattr(module, name) == value, (path, name)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pruned_layer_has_its_new_sizes_and_computes_the_same_as_the_masked_one(name):
    cls, make, shape = NETWORKS[name]
    network, x = drawn(make), inputs_of(shape)
    assert any(type(module) is cls for _, module in modules(network))
    assert_sizes_are_true(network)
    groups = tpp.channel_groups(network, x)
    prunable = [group for group in groups if group.reason is None]
    assert prunable
    for one in prunable:
        plan = halves(groups, network, lambda group, one=one: group is one)
        assert_sizes_are_true(tpp.prune(network, plan))
    plan = halves(groups, network)
    assert len(plan.pruned_groups) == len(prunable)
    assert_sizes_are_true(tpp.prune(network, plan))

    plan = halves(groups, network, lambda group: not group.reduced)
    graphdef, state = nnx.split(network)
    mask = tpp.mask_tree(plan, state)
    masked = jax.tree.map(
        lambda leaf, keep: (
            leaf * keep if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        ),
        state,
        mask,
    )
    expected = jax.jit(lambda state: nnx.merge(graphdef, state)(x))(masked)
    graphdef, state = nnx.split(tpp.prune(network, plan))
    found = jax.jit(lambda state: nnx.merge(graphdef, state)(x))(state)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("graphs")
def test_a_layer_in_two_places_follows_its_arrays():
    class Twice(nnx.Module):
        def __init__(self):
            self.norms = nnx.List([nnx.GroupNorm(16, 4, rngs=rngs())])
            self.again = self.norms[0]
            self.first, self.last = dense(3, 16), dense(16, 2)

        def __call__(self, x):
            return self.last(self.again(nnx.relu(self.norms[0](self.first(x)))))

    network, x = drawn(Twice), inputs_of(STEPS)
    groups = tpp.channel_groups(network, x)
    small = tpp.prune(network, halves(groups, network, lambda g: not g.inner))
    assert small.again is small.norms[0]
    assert (small.again.num_groups, small.again.group_size) == (2, 4)
    small = tpp.prune(network, halves(groups, network, lambda g: g.inner))
    assert (small.again.num_groups, small.again.group_size) == (4, 2)


def test_a_user_s_class_keeps_the_sizes_that_it_set_itself():
    network = drawn(lambda: Between(Reversed(8, 6), 8, 6))
    groups = tpp.channel_groups(network, inputs_of(ROW))
    small = tpp.prune(network, halves(groups, network))
    assert small.layer.kernel.shape == (3, 4)
    assert (small.layer.in_features, small.layer.out_features) == (8, 6)
    assert (small.first.out_features, small.last.in_features) == (4, 3)


def test_sizes_follow_arrays_without_a_plan():
    """For instance with a depthwise convolution whose weights come from a file."""
    network = nnx.Conv(8, 8, 3, feature_group_count=8, rngs=rngs())
    network.kernel = nnx.Param(jnp.ones((3, 1, 5)))
    network.bias = nnx.Param(jnp.ones(5))
    follow_arrays(network, lambda leaf, number: None)
    assert (network.in_features, network.out_features) == (5, 5)
    assert network.feature_group_count == 5
    assert network(jnp.ones((1, 4, 5))).shape == (1, 4, 5)


@pytest.mark.parametrize("norm", [nnx.LayerNorm, nnx.RMSNorm, nnx.InstanceNorm])
def test_a_norm_without_arrays_has_the_width_of_its_input(norm, tmp_path):
    bare = {"use_scale": False}
    if norm is not nnx.RMSNorm:
        bare["use_bias"] = False
    network = drawn(lambda: Between(norm(8, **bare, rngs=rngs()), 8, 8))
    groups = tpp.channel_groups(network, inputs_of(STEPS))
    plan = halves(groups, network)
    small = tpp.prune(network, plan)
    assert small.layer.num_features == small.last.in_features == 4
    assert network.layer.num_features == 8
    assert small.layer.promote_dtype is network.layer.promote_dtype
    tpp.save_model(tmp_path / "model", small, plan)
    assert tpp.load_model(tmp_path / "model", network).layer.num_features == 4
