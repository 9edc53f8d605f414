"""TPP on channels of any kind: a residual stream, heads, an embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import tpp_jax as tpp
from tests.reference import filled
from tpp_jax.graph.naming import named_leaves
from tpp_jax.method.gram import gram_penalty_and_grad


class Text(nnx.Module):
    """Two residual blocks on an embedding; nothing runs over the channels."""

    def __init__(self, rngs):
        self.tokens = nnx.Embed(12, 8, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(8))
        self.qkv = nnx.Linear(8, 24, rngs=rngs)
        self.out = nnx.Linear(8, 8, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, tokens):
        x = self.tokens(tokens) * self.scale
        q, k, v = (
            y.reshape(*x.shape[:2], -1, 2) for y in jnp.split(self.qkv(x), 3, -1)
        )
        y = nnx.dot_product_attention(q, k, v).reshape(*x.shape[:2], -1)
        x = x + self.out(y)
        x = x + self.down(jax.nn.relu(self.up(x)))
        return self.head(x[:, 0])


TOKENS = np.random.default_rng(0).integers(12, size=(16, 5))
LABELS = TOKENS[:, 0] % 3
SCHEDULE = tpp.growing_schedule(
    granularity=0.25, every=2, stabilize=8, zero_out_every=1
)


def test_a_residual_stream_heads_and_units_shrink_together_and_are_cut_for_nothing():
    model = filled(lambda: Text(nnx.Rngs(0)))
    groups = tpp.channel_groups(model, TOKENS)
    plan = tpp.make_plan(groups, model, {"tokens": 0.25, "qkv": 0.5, "up": 0.5})
    assert groups["tokens"].producers == ("tokens", "out", "down")
    graphdef, params = nnx.split(model)
    tx = optax.chain(
        tpp.add_tpp_penalties(plan, SCHEDULE, gram_weight=0.1),
        optax.sgd(0.05, momentum=0.9),
        tpp.zero_pruned(plan, SCHEDULE),
    )

    @jax.jit
    def step(params, state):
        def loss(params):
            logits = nnx.merge(graphdef, params, copy=True)(TOKENS)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, LABELS
            ).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(SCHEDULE.total_steps):
        params, state = step(params, state)

    # One set of channels of the stream is gone from all that make it or belong to it.
    gone = plan.pruned("tokens")
    leaves = named_leaves(params)
    for leaf in ("tokens.embedding", "out.kernel", "down.kernel"):
        assert not np.asarray(leaves[leaf])[:, gone].any()
        assert np.abs(np.asarray(leaves[leaf])[:, plan.kept["tokens"]]).min() > 0
    for leaf in ("scale", "out.bias", "down.bias"):
        assert not np.asarray(leaves[leaf])[gone].any()

    trained = nnx.merge(graphdef, params)
    small = tpp.prune(trained, plan)
    assert small.qkv.kernel.shape == (6, 12)
    np.testing.assert_allclose(small(TOKENS), trained(TOKENS), atol=1e-6)
    momentum = tpp.slice_tree(plan, state)[1][0].trace
    assert named_leaves(momentum)["tokens.embedding"].shape == (12, 6)


def test_every_producer_of_a_stream_gets_its_gram_rows():
    model = filled(lambda: Text(nnx.Rngs(0)))
    groups = tpp.channel_groups(model, TOKENS)
    plan = tpp.make_plan(groups, model, {"tokens": 0.25})
    params = nnx.state(model)
    tx = tpp.add_tpp_penalties(plan, SCHEDULE, gram_weight=2.0)
    state = tx.init(params)._replace(step=jnp.int32(6))
    zeros = jax.tree.map(jnp.zeros_like, params)
    added, state = tx.update(zeros, state, params)
    strength = float(SCHEDULE(6))
    assert strength == 0.75
    added, leaves = named_leaves(added), named_leaves(params)
    pruned = np.zeros(8, bool)
    pruned[plan.pruned("tokens")] = True
    total = 0.0
    for leaf in ("tokens.embedding", "out.kernel", "down.kernel"):
        penalty, grad = gram_penalty_and_grad(leaves[leaf], pruned)
        total += penalty
        expected = 2.0 * strength * grad + strength * leaves[leaf] * pruned
        np.testing.assert_allclose(added[leaf], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(added["scale"], strength * leaves["scale"] * pruned)
    np.testing.assert_allclose(state.gram, total, rtol=1e-6)
    for leaf in ("qkv.kernel", "up.kernel", "head.kernel", "up.bias"):
        assert not np.asarray(added[leaf]).any()
