"""Layers that a loop runs through keep channels of their own, as unrolled ones do.

The reference is the same network with its layers written out: what is found, chosen,
penalised, refit or cut in the loop is the stack of what it is there.
"""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tpp_jax as tpp
from tpp_jax.method.rivals import add_group_lasso

LAYERS, WIDTH, UNITS, HEADS, SIZE = 3, 8, 10, 4, 2


def block(x, p):
    """Attention and a gated MLP, each behind a norm and with a shortcut."""
    y = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
    q, k, v = (jnp.einsum("bnd,dhs->bnhs", y, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bnhs,bmhs->bhnm", q, k))
    z = jnp.einsum("bhnm,bmhs->bnhs", weights, v)
    x = x + jnp.einsum("bnhs,hsd->bnd", z, p["o"])
    hidden = jax.nn.relu(x @ p["gate"] + p["bias"]) * (x @ p["up"])
    return x + (hidden * p["scale"]) @ p["down"]


def looped(p, x):
    step = jax.checkpoint(lambda x, own: (block(x, own), None))
    return jax.lax.scan(step, x @ p["in"], p["layers"])[0] @ p["out"]


def unrolled(p, x):
    x = x @ p["in"]
    for own in p["layers"]:
        x = block(x, own)
    return x @ p["out"]


def _params():
    rng = np.random.default_rng(0)

    def draw(*shape):
        drawn = rng.normal(size=shape).astype(np.float32)
        return drawn * np.float32(1 / np.sqrt(shape[-2]))

    head = (LAYERS, WIDTH, HEADS, SIZE)
    layers = {
        **{name: draw(*head) for name in "qkv"},
        "o": draw(LAYERS, HEADS, SIZE, WIDTH),
        "gate": draw(LAYERS, WIDTH, UNITS),
        "bias": draw(LAYERS, UNITS),
        "up": draw(LAYERS, WIDTH, UNITS),
        "scale": 1 + 0.1 * draw(LAYERS, UNITS),
        "down": draw(LAYERS, UNITS, WIDTH),
    }
    return {"in": draw(5, WIDTH), "layers": layers, "out": draw(WIDTH, 4)}


def written_out(tree):
    """Returns a tree with a list of layers in place of their stacks."""
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"]) for i in range(3)]
    return tree | {"layers": layers}


PARAMS = _params()
X = np.random.default_rng(1).normal(size=(6, 7, 5)).astype(np.float32)
GROUPS = tpp.channel_groups(looped, X, params=PARAMS)
OTHER = tpp.channel_groups(unrolled, X, params=written_out(PARAMS))
OWN = tuple(group.name for group in GROUPS if group.steps)
RATIOS = {"layers.q": 0.5, "layers.gate": 0.5}


def of_layers(plan):
    """Returns the channels that layers of the unrolled network keep, stacked."""
    found = {}
    for name in OWN:
        names = [name.replace("layers.", f"layers.{i}.") for i in range(LAYERS)]
        found[name] = np.stack([plan.kept[one] for one in names])
    return found


def assert_alike(tree, other, **tolerance):
    """Asserts that a tree with stacks is one with lists of layers."""
    for a, b in zip(*map(jax.tree.leaves, (written_out(tree), other)), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def random_plan(ratio=0.5):
    rng = np.random.default_rng(2)
    scores = {name: rng.random((LAYERS, GROUPS[name].size)) for name in OWN}
    ratios = dict.fromkeys(OWN, ratio)
    plan = tpp.make_plan(GROUPS, PARAMS, ratios, scores=scores)
    kept = {
        name.replace("layers.", f"layers.{i}."): plan.kept[name][i]
        for name in OWN
        for i in range(LAYERS)
    }
    return plan, tpp.Plan(
        {**tpp.make_plan(OTHER, written_out(PARAMS), {}).kept, **kept}, OTHER
    )


PLAN, PLAN_OF_OTHER = random_plan()


def test_groups_inside_the_loop_have_steps_and_the_stream_has_none():
    assert set(OWN) == {"layers.q", "layers.q#2", "layers.v#2", "layers.gate"}
    assert all(GROUPS[name].steps == LAYERS for name in OWN)
    assert GROUPS["in"].reason is None and GROUPS["in"].steps is None
    text = tpp.describe_groups(GROUPS, PLAN)
    assert "3×10 → 3×5" in text


def test_the_groups_are_right():
    checks = tpp.check_groups(looped, X, params=PARAMS, groups=GROUPS)
    assert not checks.unproved


def loss(fn, params, batch):
    return jnp.mean(fn(params, batch) ** 2)


@functools.cache
def statistics(kind):
    pairs = (looped, PARAMS), (unrolled, written_out(PARAMS))
    if kind == "moments":
        return [tpp.input_moments(fn, [X, -X], params) for fn, params in pairs]
    gradients = [
        tpp.loss_gradient(functools.partial(loss, fn), params, [X])
        for fn, params in pairs
    ]
    # The sums of a loop are in another order: to the same bits, or ties differ.
    return [gradients[0], written_out(gradients[0])]


KINDS = {"taylor": "gradient", "taylor_fo": "gradient"}
KINDS |= dict.fromkeys(("wanda", "variance", "obs"), "moments")


@pytest.mark.parametrize(
    "criterion",
    ["l1", "fpgm", "lamp", "taylor", "taylor_fo", "wanda", "variance", "obs"],
)
def test_each_layer_loses_the_channels_with_its_own_lowest_scores(criterion):
    own = other = None
    if criterion in KINDS:
        own, other = statistics(KINDS[criterion])
    chosen = dict(criterion=criterion)
    names = ["layers.gate", "layers.q"]
    plan = tpp.make_plan(
        GROUPS, PARAMS, dict.fromkeys(names, 0.5), statistics=own, **chosen
    )
    ratios = {f"layers.{i}.{name}": 0.5 for name in ("gate", "q") for i in range(3)}
    expected = tpp.make_plan(
        OTHER, written_out(PARAMS), ratios, statistics=other, **chosen
    )
    for name in names:
        np.testing.assert_array_equal(plan.kept[name], of_layers(expected)[name])


@pytest.mark.parametrize("criterion", ["l1", "obs"])
@pytest.mark.parametrize("target", [{}, {"params": 0.7}])
def test_groups_compete_by_the_means_of_their_layers(criterion, target):
    moments = statistics("moments")[0] if criterion == "obs" else None
    chosen = dict(criterion=criterion, statistics=moments, scope="global")
    plan = tpp.make_plan(GROUPS, PARAMS, RATIOS, **chosen, **target)
    tpp.prune(looped, plan, PARAMS)
    for group in plan.pruned_groups:
        assert plan.kept[group.name].shape == (LAYERS, plan.kept_count(group))
    if target:
        small = tpp.slice_tree(plan, PARAMS)
        count = [sum(map(np.size, jax.tree.leaves(p))) for p in (small, PARAMS)]
        assert 0.6 < count[0] / count[1] <= 0.7


def test_slicing_is_that_of_the_layers_by_themselves():
    small = tpp.prune(looped, PLAN, PARAMS)
    expected = tpp.prune(unrolled, PLAN_OF_OTHER, written_out(PARAMS))
    assert_alike(small, expected)
    np.testing.assert_allclose(looped(small, X), unrolled(expected, X), atol=1e-5)
    masked = jax.tree.map(jnp.multiply, PARAMS, tpp.mask_tree(PLAN, PARAMS))
    assert_alike(masked, masked_other())


def masked_other():
    params = written_out(PARAMS)
    return jax.tree.map(jnp.multiply, params, tpp.mask_tree(PLAN_OF_OTHER, params))


def test_a_traced_plan_slices_like_a_concrete_one():
    expected = tpp.slice_tree(PLAN, PARAMS)
    for fn in (tpp.slice_tree, lambda plan, tree: tpp.slice_tree(plan, tree)):
        small = jax.jit(fn)(PLAN, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, small, expected)
    both = jax.tree.map(lambda kept: jnp.stack([kept, kept]), PLAN)
    small = jax.vmap(tpp.slice_tree, (0, None))(both, PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b), small, expected)
    mask = jax.jit(tpp.mask_tree)(PLAN, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, mask, tpp.mask_tree(PLAN, PARAMS))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_stacks_are_cut_where_they_are(axis_type):
    mesh = jax.make_mesh((2, 2), ("a", "b"), (axis_type,) * 2)

    def place(leaf):
        leaf = jnp.asarray(leaf)
        spec = PartitionSpec(*(None,) * (leaf.ndim - 2), "a", "b")
        spec = spec if leaf.ndim > 2 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    params = jax.tree.map(place, PARAMS)
    small = tpp.slice_tree(PLAN, params)
    jax.tree.map(np.testing.assert_allclose, small, tpp.slice_tree(PLAN, PARAMS))
    assert small["layers"]["v"].sharding.spec == PartitionSpec(None, None, "a", None)
    with jax.set_mesh(mesh):
        small = jax.jit(functools.partial(tpp.slice_tree, PLAN))(params)
    jax.tree.map(np.testing.assert_allclose, small, tpp.slice_tree(PLAN, PARAMS))


@pytest.mark.parametrize("target", ["decorrelate", "orthogonal", "relative"])
def test_penalties_are_those_of_the_layers_by_themselves(target):
    schedule = tpp.growing_schedule(granularity=0.5, every=1, stabilize=99)
    updates = []
    pairs = (PLAN, PARAMS), (PLAN_OF_OTHER, written_out(PARAMS))
    for plan, params in pairs:
        tx = tpp.add_tpp_penalties(
            plan, schedule, gram_weight=10.0, target=target, kept_weight=0.1
        )
        zeros = jax.tree.map(jnp.zeros_like, params)
        state = tx.init(params)._replace(step=jnp.int32(1))
        updates.append(tx.update(zeros, state, params))
    (own, state), (other, state_of_other) = updates
    assert_alike(own, other, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.gram, state_of_other.gram, rtol=1e-5)


def test_rivals_shrink_the_filters_of_each_layer():
    updates = []
    pairs = (PLAN, PARAMS), (PLAN_OF_OTHER, written_out(PARAMS))
    for plan, params in pairs:
        tx = add_group_lasso(plan, 0.1)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates.append(tx.update(zeros, tx.init(params), params)[0])
    assert_alike(*updates, rtol=1e-5, atol=1e-7)


def test_a_run_ends_with_a_cut_that_changes_nothing():
    schedule = tpp.growing_schedule(
        granularity=1.0, every=1, stabilize=14, zero_out_every=1
    )
    tx = optax.chain(
        tpp.add_tpp_penalties(PLAN, schedule),
        optax.adam(1e-3),
        tpp.zero_pruned(PLAN, schedule),
    )
    state, params = tx.init(PARAMS), PARAMS
    gradient = jax.jit(jax.grad(functools.partial(loss, looped)))
    update = jax.jit(tx.update)
    for _ in range(schedule.total_steps):
        updates, state = update(gradient(params, X), state, params)
        params = optax.apply_updates(params, updates)
    status = tpp.status(state, PLAN, params)
    assert status.ready and status.pruned_norm == 0, status
    small = tpp.prune(looped, PLAN, params, opt_state=state)
    np.testing.assert_allclose(looped(small, X), looped(params, X), atol=1e-5)
    state = tpp.slice_tree(PLAN, state)
    updates, _ = tx.update(gradient(small, X), state, small)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), updates, small)


def test_layers_are_refit_by_themselves():
    pairs = (looped, PLAN, PARAMS), (unrolled, PLAN_OF_OTHER, written_out(PARAMS))
    moments = statistics("moments")
    small = [
        tpp.compensate(*pair[:2], None, pair[2], moments=own, damping=0.01)
        for pair, own in zip(pairs, moments, strict=True)
    ]
    assert_alike(*small, rtol=1e-3, atol=1e-4)
    cut = tpp.slice_tree(PLAN, PARAMS)
    assert not np.allclose(small[0]["layers"]["down"], cut["layers"]["down"])


def test_sensitivity_masks_each_layer_by_its_own_scores():
    def fn(call, batch):
        return jnp.mean((call(batch) - looped(PARAMS, X)) ** 2)

    ratios = (0.5,)
    skip = ["in", "layers.q", "layers.v#2"]
    found = tpp.sensitivity(looped, GROUPS, [X], fn, PARAMS, ratios=ratios, skip=skip)
    plan = tpp.make_plan(GROUPS, PARAMS, {"layers.gate": 0.5})
    mask = tpp.mask_tree(plan, PARAMS)
    masked = jax.tree.map(jnp.multiply, PARAMS, mask)
    curve, expected = found.curve("layers.gate"), fn(lambda x: looped(masked, x), X)
    np.testing.assert_allclose(curve[UNITS // 2], expected, rtol=1e-3, atol=1e-6)


def test_plans_are_read_compared_and_composed():
    assert tpp.Plan.from_dict(PLAN.to_dict(), GROUPS) == PLAN
    again = pickle.loads(pickle.dumps(PLAN))
    assert again == PLAN and hash(again) == hash(PLAN)
    small = tpp.slice_tree(PLAN, PARAMS)
    groups = tpp.channel_groups(looped, X, params=small)
    later = tpp.make_plan(groups, small, {"layers.gate": 0.4})
    at_once = tpp.slice_tree(PLAN.then(later), PARAMS)
    twice = tpp.slice_tree(later, small)
    jax.tree.map(np.testing.assert_array_equal, at_once, twice)


def test_a_plan_may_keep_the_same_channels_in_all_layers():
    data = PLAN.to_dict() | {"layers.gate": [0, 3, 4]}
    plan = tpp.Plan.from_dict(data, GROUPS)
    tpp.check_plan(plan)
    small = tpp.slice_tree(plan, PARAMS)
    expected = PARAMS["layers"]["up"][:, :, [0, 3, 4]]
    np.testing.assert_array_equal(small["layers"]["up"], expected)


@pytest.mark.parametrize(
    "rows", [[[0, 1], [2, 3]], [[0, 1], [2, 3], [4]], [[0, 1], [2, 3], [4, 99]], [[0]]]
)
def test_a_plan_of_other_layers_is_refused(rows):
    data = PLAN.to_dict() | {"layers.gate": rows}
    with pytest.raises(tpp.TPPError, match=r"10 channels in each of 3 layers"):
        tpp.Plan.from_dict(data, GROUPS)


def test_scores_of_another_shape_are_refused():
    scores = {"layers.gate": np.ones((2, UNITS))}
    with pytest.raises(tpp.TPPError, match=r"\(10,\) or \(3, 10\)"):
        tpp.make_plan(GROUPS, PARAMS, {"layers.gate": 0.5}, scores=scores)


STACK = {"up": np.ones((3, 4, 6), np.float32), "down": np.ones((3, 6, 4), np.float32)}
SHARED = STACK | {"mask": np.ones(6, np.float32)}
CARRIED = {"w": np.ones((3, 6, 6), np.float32), "in": np.ones((4, 6), np.float32)}


def mlp(h, own):
    return h + jax.nn.relu(h @ own["up"]) @ own["down"]


def shared_mask(p, x):
    def step(h, own):
        return h + (jax.nn.relu(h @ own["up"]) * p["mask"]) @ own["down"], None

    return jax.lax.scan(step, x, {"up": p["up"], "down": p["down"]})[0]


def handed_on(p, x):
    start = x @ p["in"]
    return jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), start, p["w"])[0].sum()


def given_back(p, x):
    def step(h, own):
        units = jax.nn.relu(h @ own["up"])
        return h + units @ own["down"], units

    h, units = jax.lax.scan(step, x, p)
    return h, units.sum(axis=(0, 2))


def read_outside(p, x):
    h = jax.lax.scan(lambda h, own: (mlp(h, own), None), x, p)[0]
    return h * jnp.mean(jnp.square(p["up"]))


def backwards(p, x):
    return jax.lax.scan(lambda h, own: (mlp(h, own), None), x, p, reverse=True)[0]


def twice(p, x):
    return backwards(p, jax.lax.scan(lambda h, own: (mlp(h, own), None), x, p)[0])


@pytest.mark.parametrize(
    ("fn", "params", "steps"),
    [
        (shared_mask, SHARED, None),
        (handed_on, CARRIED, None),
        (given_back, STACK, None),
        (read_outside, STACK, None),
        (backwards, STACK, 3),
        (twice, STACK, 3),
    ],
)
def test_what_layers_have_in_common_they_keep_in_common(fn, params, steps):
    x = jnp.ones((2, 4))
    groups = tpp.channel_groups(fn, x, params=params)
    prunable = [group for group in groups if group.reason is None]
    assert [group.steps for group in prunable] == [steps] * len(prunable) and prunable
    rng = np.random.default_rng(0)
    drawn = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in params.items()}
    tpp.check_groups(fn, x, params=drawn)


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return x + linen.Dense(6)(linen.relu(linen.Dense(8)(x))), None


class Looped(linen.Module):
    """Stacked along the second axis, as large models of others are."""

    @linen.compact
    def __call__(self, x):
        axes, split = {"params": 1}, {"params": True}
        loop = linen.scan(Block, axes, split_rngs=split, length=3)
        return linen.Dense(2)(loop()(linen.Dense(6)(x), None)[0])


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.down = nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class NNXLooped(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(5, 6, rngs=rngs)
        self.blocks = nnx.vmap(NNXBlock, in_axes=0, out_axes=0)(rngs.split(3))

    def __call__(self, x):
        step = nnx.scan(
            lambda x, own: own(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        return step(self.first(x), self.blocks)


def test_loops_of_flax_keep_the_units_that_matter_in_each_layer():
    x = jnp.ones((2, 5))
    module = Looped()
    variables = module.init(jax.random.key(0), x)
    model = NNXLooped(nnx.Rngs(0))
    for net, params in ((module, variables), (model, None)):
        groups = tpp.channel_groups(net, x, params=params)
        [group] = [g for g in groups if g.steps]
        assert (group.size, group.steps) == (8, 3)
        tpp.check_groups(net, x, params=params, groups=groups)
        rng = np.random.default_rng(3)
        alive = np.stack([np.sort(rng.permutation(8)[:4]) for _ in range(3)])
        tree = nnx.state(net) if params is None else params
        plan = tpp.Plan(
            {**tpp.make_plan(groups, tree, {}).kept, group.name: alive}, groups
        )
        tree = jax.tree.map(jnp.multiply, tree, tpp.mask_tree(plan, tree))
        chosen = tpp.make_plan(groups, tree, {group.name: 0.5})
        np.testing.assert_array_equal(chosen.kept[group.name], alive)
        if params is None:
            nnx.update(net, tree)
            small = tpp.prune(net, chosen)
            np.testing.assert_allclose(small(x), net(x), atol=1e-5)
        else:
            small = tpp.prune(net, chosen, tree)
            found = tpp.linen_apply(net, chosen)(small, x)
            np.testing.assert_allclose(found, net.apply(tree, x), atol=1e-5)


def test_groups_without_a_choice_have_one_set_for_all_layers():
    by_ratio = tpp.make_plan(GROUPS, PARAMS, {"layers.gate": 1.0}, min_channels=0)
    by_count = tpp.make_plan(GROUPS, PARAMS, counts={"layers.gate": 0})
    assert by_ratio == by_count
    assert by_count.kept["layers.gate"].shape == (0,)
    small = tpp.prune(looped, by_count, PARAMS)
    assert small["layers"]["up"].shape == (LAYERS, WIDTH, 0)
    assert np.isfinite(looped(small, X)).all()
