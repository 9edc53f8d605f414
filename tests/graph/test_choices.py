"""Experts that a router chooses among, and other places that a model chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp

WIDTH, EXPERTS, HIDDEN, CHOSEN = 8, 6, 5, 2


def run_all(p, h, gates):
    """Runs all experts on all tokens, and adds their outputs with their gates."""
    up = jnp.einsum("bd,edf->bef", h, p["up"])
    y = jnp.einsum("bef,efd->bed", jax.nn.relu(up), p["down"])
    return jnp.einsum("be,bed->bd", gates, y)


def one_hot(p, h):
    best, places = jax.lax.top_k(jax.nn.softmax(h @ p["router"]), CHOSEN)
    choices = jax.nn.one_hot(places, p["router"].shape[1])
    return run_all(p, h, jnp.einsum("bk,bke->be", best, choices))


def looked_up(p, h):
    best, places = jax.lax.top_k(h @ p["router"], CHOSEN)
    up = jax.nn.relu(jnp.einsum("bd,bkdf->bkf", h, p["up"][places]))
    y = jnp.einsum("bkf,bkfd->bkd", up, p["down"][places])
    return jnp.einsum("bk,bkd->bd", jax.nn.softmax(best), y)


def single(p, h):
    scores = h @ p["router"]
    places = jnp.argmax(scores, -1)
    gate = jnp.take_along_axis(jax.nn.sigmoid(scores), places[:, None], -1)
    up = jnp.einsum("bd,bdf->bf", h, jnp.take(p["up"], places, axis=0))
    down = jnp.take(p["down"], places, axis=0)
    return gate * jnp.einsum("bf,bfd->bd", jax.nn.relu(up), down)


def scattered(p, h):
    scores = jax.nn.sigmoid(h @ p["router"])
    best, places = jax.lax.top_k(scores, CHOSEN)
    rows = jnp.arange(len(h))[:, None]
    return run_all(p, h, jnp.zeros_like(scores).at[rows, places].set(best))


def sorted_rows(p, h):
    best, places = jax.lax.top_k(jax.nn.softmax(h @ p["router"]), CHOSEN)
    order = jnp.argsort(places.reshape(-1))
    sizes = jnp.bincount(places.reshape(-1), length=p["router"].shape[1])
    up = jax.lax.ragged_dot(h[order // CHOSEN], p["up"], sizes)
    y = jax.lax.ragged_dot(jax.nn.relu(up), p["down"], sizes)
    y = y[jnp.argsort(order)].reshape(*places.shape, -1)
    return (y * best[..., None]).sum(1)


def threshold(p, h):
    scores = jax.nn.softmax(h @ p["router"])
    best, _ = jax.lax.top_k(scores, CHOSEN)
    return run_all(p, h, jnp.where(scores >= best[:, -1:], scores, 0))


def mapped(p, h):
    p = jax.tree.map(jnp.asarray, p)

    def of_token(token):
        best, places = jax.lax.top_k(token @ p["router"], CHOSEN)

        def expert(place, gate):
            return gate * (jax.nn.relu(token @ p["up"][place]) @ p["down"][place])

        return jax.vmap(expert)(places, jax.nn.softmax(best)).sum(0)

    return jax.vmap(of_token)(h)


def in_buffers(p, h):
    """Each expert has room for some tokens, as in GShard; more are left out."""
    shares = jax.nn.softmax(h @ p["router"])
    best, places = jax.lax.top_k(shares, CHOSEN)
    chosen = jax.nn.one_hot(places, shares.shape[-1], dtype=jnp.int32)
    before = jnp.cumsum(chosen.reshape(-1, shares.shape[-1]), 0).reshape(chosen.shape)
    taken = jax.nn.one_hot(before * chosen - 1, 20) * chosen[..., None]
    inputs = jnp.einsum("td,tkec->ecd", h, taken)
    up = jax.nn.relu(jnp.einsum("ecd,edf->ecf", inputs, p["up"]))
    y = jnp.einsum("ecf,efd->ecd", up, p["down"])
    return jnp.einsum("tk,tkec,ecd->td", best, taken, y)


STYLES = (
    *(one_hot, looked_up, single, scattered, sorted_rows, threshold),
    *(mapped, in_buffers),
)


def network(layer):
    def call(p, x):
        h = x @ p["in"]
        return (h + layer(p, h)) @ p["out"]

    return call


def weights(**shapes):
    """Returns weights; the last two experts are never chosen, if ``x[:, 0]`` is 1."""
    rng = np.random.default_rng(0)
    shapes = {
        "in": (5, WIDTH),
        "router": (WIDTH, EXPERTS),
        "up": (EXPERTS, WIDTH, HIDDEN),
        "down": (EXPERTS, HIDDEN, WIDTH),
        "out": (WIDTH, 3),
    } | shapes
    drawn = {k: rng.normal(size=n).astype(np.float32) for k, n in shapes.items()}
    drawn["in"][:, 0] = 0
    drawn["in"][0, 0] = 1
    drawn["router"][0, -2:] = -40
    return drawn


@pytest.fixture(scope="module")
def x():
    tokens = np.random.default_rng(1).normal(size=(7, 5)).astype(np.float32)
    tokens[:, 0] = 1
    return tokens


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_experts_are_a_group_however_they_are_run(style, x):
    params, model = weights(), network(style)
    groups = tpp.channel_groups(model, x, params=params)
    experts = groups["router"]
    slots = {(member.leaf, member.axis) for member in experts.members}
    assert slots == {("router", 1), ("up", 0), ("down", 0)}
    assert experts.reason is None
    assert experts.chosen == (1 if style is single else CHOSEN)

    checks = tpp.check_groups(model, x, params=params, groups=groups)
    [proof] = [one for one in checks.groups if one.name == "router"]
    assert proof.permuted < 1e-5 < 1e-2 < proof.influence
    assert "router" in checks.unproved

    plan = tpp.make_plan(groups, params, counts={"router": EXPERTS - 2})
    unused = np.arange(EXPERTS - 2, dtype=np.int32)
    plan = tpp.Plan({**plan.kept, "router": unused}, groups)
    small = tpp.prune(model, plan, params)
    assert small["up"].shape[0] == small["router"].shape[1] == EXPERTS - 2
    np.testing.assert_allclose(model(small, x), model(params, x), rtol=1e-5)


def test_experts_are_only_pruned_by_name_and_enough_are_kept(x):
    params, model = weights(), network(one_hot)
    groups = tpp.channel_groups(model, x, params=params)
    assert {g.name for g in tpp.make_plan(groups, params, 0.5).pruned_groups} == {
        "in",
        "up",
    }
    by_layer = tpp.make_plan(groups, params, {"up": 0.5})
    assert [group.name for group in by_layer.pruned_groups] == ["up"]
    most = tpp.make_plan(groups, params, {"router": 0.9})
    assert most.kept_count(groups["router"]) == CHOSEN
    whole = tpp.make_plan(groups, params, {"[ud]*": 1}, min_channels=0)
    assert [group.name for group in whole.pruned_groups] == ["up"]
    with pytest.raises(tpp.TPPError, match="the model chooses 2 for each example"):
        tpp.make_plan(groups, params, counts={"router": 1})


def test_the_experts_with_the_lowest_scores_of_ones_own_are_removed(x):
    params, model = weights(), network(one_hot)
    groups = tpp.channel_groups(model, x, params=params)
    frequency = np.array([5.0, 1.0, 4.0, 2.0, 0.0, 3.0])
    plan = tpp.make_plan(groups, params, {"router": 0.5}, scores={"router": frequency})
    np.testing.assert_array_equal(plan.kept["router"], [0, 2, 5])


class Mixture(nnx.Module):
    """Experts whose number is written in the module's configuration."""

    def __init__(self, rngs):
        self.num_experts, self.chosen = EXPERTS, CHOSEN
        self.router = nnx.Linear(WIDTH, EXPERTS, use_bias=False, rngs=rngs)
        self.up = nnx.Param(rngs.normal((EXPERTS, WIDTH, HIDDEN)))
        self.down = nnx.Param(rngs.normal((EXPERTS, HIDDEN, WIDTH)))

    def __call__(self, x):
        best, places = jax.lax.top_k(self.router(x), self.chosen)
        choices = jax.nn.one_hot(places, self.num_experts)
        gates = jnp.einsum("bk,bke->be", jax.nn.softmax(best), choices)
        return run_all({"up": self.up[...], "down": self.down[...]}, x, gates)


def test_the_number_of_experts_in_a_module_follows_them():
    model = Mixture(nnx.Rngs(0))
    tokens = jax.random.normal(jax.random.key(0), (7, WIDTH))
    groups = tpp.channel_groups(model, tokens)
    small = tpp.prune(model, tpp.make_plan(groups, model, {"router": 0.5}))
    assert small.num_experts == 3 and model.num_experts == EXPERTS
    assert small.up[...].shape == (3, WIDTH, HIDDEN)
    assert small(tokens).shape == tokens.shape


def test_each_layer_of_a_loop_keeps_experts_of_its_own(x):
    def stacked(p, x):
        def layer(h, own):
            return h + 0.1 * one_hot(own, h), None

        h, _ = jax.lax.scan(layer, x @ p["in"], p["layers"])
        return h @ p["out"]

    params = weights()
    names = "router", "up", "down"
    layers = {k: np.stack([params[k] * n for n in (1, 2, 3)]) for k in names}
    params = {"in": params["in"], "out": params["out"], "layers": layers}
    groups = tpp.channel_groups(stacked, x, params=params)
    experts = groups["layers.router"]
    assert (experts.steps, experts.chosen, experts.reason) == (3, CHOSEN, None)
    scores = {"layers.router": np.random.default_rng(0).uniform(size=(3, EXPERTS))}
    plan = tpp.make_plan(groups, params, {"layers.router": 0.5}, scores=scores)
    assert plan.kept["layers.router"].shape == (3, 3)
    small = tpp.prune(stacked, plan, params)
    assert small["layers"]["down"].shape == (3, 3, HIDDEN, WIDTH)
    assert stacked(small, x).shape == (7, 3)


def test_entries_of_a_codebook_are_channels(x):
    """The nearest code is looked up, as in a VQ-VAE."""

    def quantised(p, x):
        h = x @ p["in"]
        distances = ((h[:, None] - p["codes"]) ** 2).sum(-1)
        code = p["codes"][jnp.argmin(distances, -1)]
        return (h + jax.lax.stop_gradient(code - h)) @ p["out"]

    params = weights(codes=(10, WIDTH))
    groups = tpp.channel_groups(quantised, x, params=params)
    [codes] = [group for group in groups if group.chosen]
    assert (codes.size, codes.chosen, codes.reason) == (10, 1, None)
    used = np.unique(
        np.argmin(
            ((x @ params["in"])[:, None] - params["codes"]) ** 2 @ np.ones(WIDTH), -1
        )
    )
    plan = tpp.make_plan(groups, params, counts={})
    plan = tpp.Plan({**plan.kept, codes.name: used.astype(np.int32)}, groups)
    small = tpp.prune(quantised, plan, params)
    np.testing.assert_allclose(
        quantised(small, x), quantised(params, x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("choose", [jnp.argmax, jnp.argmin])
def test_places_that_a_loop_hands_on_are_of_one_axis(choose, x):
    """Each step runs the expert that the step before has chosen."""

    def layer(p, h):
        def step(carry, _):
            h, places = carry
            return (h + chosen_by(p, h, places), choose(h @ p["next"], -1)), None

        start = h, choose(h @ p["router"], -1)
        return jax.lax.scan(step, start, None, length=2)[0][0]

    params, model = weights(next=(WIDTH, EXPERTS)), network(layer)
    groups = tpp.channel_groups(model, x, params=params)
    slots = {(member.leaf, member.axis) for member in groups["router"].members}
    assert slots == {("router", 1), ("next", 1), ("up", 0), ("down", 0)}
    checks = tpp.check_groups(model, x, params=params, groups=groups)
    [proof] = [one for one in checks.groups if one.name == "router"]
    assert proof.permuted < 1e-5 < 1e-2 < proof.influence


def returned(p, h):
    return one_hot(p, h) + jax.lax.top_k(h @ p["router"], CHOSEN)[1][:, :1]


def one_by_one(p, h):
    best, places = jax.lax.top_k(h @ p["router"], CHOSEN)
    y = 0
    for i in range(EXPERTS):
        gate = jnp.where(places == i, best, 0).sum(-1, keepdims=True)
        y += gate * (jax.nn.relu(h @ p["up"][i]) @ p["down"][i])
    return y


def paired(p, h):
    best, places = jax.lax.top_k(h @ p["router"], CHOSEN)
    up = jnp.einsum("bd,bkdf->bkf", h, p["up"][places // 2 * 2])
    return jnp.einsum("bk,bkf,bkfd->bd", best, up, p["down"][places])


def padded(p, h):
    best, places = jax.lax.top_k(h @ p["router"], CHOSEN)
    places = jnp.where(h[:, :1] > 0, places, 0)  # the first expert is special
    return run_all(p, h, (jax.nn.one_hot(places, EXPERTS) * best[..., None]).sum(1))


def switched(p, h):
    place = jnp.argmax((h @ p["router"]).sum(0))
    branches = [lambda h, i=i: h @ p["up"][i] @ p["down"][i] for i in range(EXPERTS)]
    return jax.lax.switch(place, branches, h)


def ranked(p, h):
    best, places = jax.lax.top_k(h @ p["router"], EXPERTS)
    return run_all(p, h, jnp.einsum("bk,bke->be", best, jax.nn.one_hot(places, 6)))


def in_groups(p, h):
    """Experts of the best group only, as in DeepSeek-V3."""
    scores = jax.nn.sigmoid(h @ p["router"]).reshape(-1, 3, 2)
    _, groups = jax.lax.top_k(scores.max(-1), 2)
    allowed = jax.nn.one_hot(groups, 3).sum(1)[..., None] > 0
    scores = jnp.where(allowed, scores, 0).reshape(-1, EXPERTS)
    best, places = jax.lax.top_k(scores, CHOSEN)
    choices = jax.nn.one_hot(places, EXPERTS)
    return run_all(p, h, jnp.einsum("bk,bke->be", best, choices))


def share(p, h):
    """The number of chosen experts is a share of theirs."""
    experts = p["router"].shape[1]
    best, places = jax.lax.top_k(h @ p["router"], experts // 2)
    choices = jax.nn.one_hot(places, experts)
    return run_all(p, h, jnp.einsum("bk,bke->be", best, choices))


def embedded(p, h):
    best, places = jax.lax.top_k(h @ p["router"], CHOSEN)
    return h * (places / EXPERTS * best).sum(-1, keepdims=True)


def offset(p, h):
    """A shared expert comes first in the same arrays."""
    best, places = jax.lax.top_k((h @ p["router"])[:, 1:], CHOSEN)
    up = jax.nn.relu(jnp.einsum("bd,bkdf->bkf", h, p["up"][places + 1]))
    y = jnp.einsum("bkf,bkfd->bkd", up, p["down"][places + 1])
    return jnp.einsum("bk,bkd->bd", best, y) + h @ p["up"][0] @ p["down"][0]


def fixed_sizes(p, h):
    order = jnp.argsort(jnp.argmax(h @ p["router"], -1))
    sizes = jnp.full(p["router"].shape[1], 1).at[0].set(2)
    up = jax.lax.ragged_dot(h[order], p["up"], sizes)
    return jax.lax.ragged_dot(jax.nn.relu(up), p["down"], sizes)


def one_more(p, h):
    """Each expert has one row more than tokens."""
    places = jnp.argmax(h @ p["router"], -1)
    sizes = jnp.bincount(places, length=p["router"].shape[1]) + 1
    up = jax.lax.ragged_dot(h[jnp.argsort(places)], p["up"], sizes)
    return jax.lax.ragged_dot(jax.nn.relu(up), p["down"], sizes)


def counted_from_one(p, h):
    places = jnp.argmax(h @ p["router"], -1)
    sizes = jnp.ones(p["router"].shape[1], jnp.int32).at[places].add(1)
    up = jax.lax.ragged_dot(h[jnp.argsort(places)], p["up"], sizes)
    return jax.lax.ragged_dot(jax.nn.relu(up), p["down"], sizes)


def without_the_first(p, h):
    best, places = jax.lax.top_k(h @ p["router"], CHOSEN)
    best = jnp.where(jnp.less(0, places), best, 0)
    choices = jax.nn.one_hot(places, p["router"].shape[1])
    return run_all(p, h, jnp.einsum("bk,bke->be", best, choices))


def chosen_by(p, h, places):
    up = jnp.einsum("bd,bdf->bf", h, jnp.take(p["up"], places, axis=0, mode="clip"))
    down = jnp.take(p["down"], places, axis=0, mode="clip")
    return jnp.einsum("bf,bfd->bd", jax.nn.relu(up), down)


def sometimes_the_last(p, h):
    places = jnp.argmax(h @ p["router"], -1)
    return chosen_by(p, h, jnp.where(h[:, 1] > 0, places + EXPERTS, places))


def first_above(p, h):
    return chosen_by(p, h, jnp.argmax(h @ p["router"] > 1, -1))


def first_marked(p, h):
    marks = jax.nn.sigmoid(h @ p["router"]) > 0.7
    return chosen_by(p, h, jnp.argmax(marks.astype(float), -1))


def lowest_chosen(p, h):
    places = jax.lax.top_k(h @ p["router"], CHOSEN)[1]
    chosen = jax.nn.one_hot(places, p["router"].shape[1]).sum(1)
    return chosen_by(p, h, jnp.argmax(chosen, -1))


def first_for_others(p, h):
    places = jnp.argmax(h @ p["router"], -1)
    rows = jnp.arange(0, 2 * len(h), 2)
    return chosen_by(p, h, places.at[rows].get(mode="fill", fill_value=0))


def counted_on(p, h):
    """In step i of a loop, experts before the i-th are left out."""

    def step(carry, _):
        h, i = carry
        best, places = jax.lax.top_k(h @ p["router"], CHOSEN)
        choices = jax.nn.one_hot(places, p["router"].shape[1])
        gates = (jnp.where(jax.lax.lt(places, i), 0, best)[..., None] * choices).sum(1)
        return (h + run_all(p, h, gates), i + 1), None

    zeros = jax.jit(lambda: jnp.zeros((len(h), CHOSEN), jnp.int32))()
    return jax.lax.scan(step, (h, zeros), None, length=2)[0][0]


def sorted_by_place(p, h):
    places = jnp.sort(jax.lax.top_k(h @ p["router"], CHOSEN)[1], -1)
    return chosen_by(p, h, places[:, 0]) - chosen_by(p, h, places[:, 1])


def first_unless_large(p, h):
    """A loop without steps leaves the place that it starts from."""

    def step(carry):
        h, _ = carry
        return h / 2, jnp.argmax((h @ p["router"]).sum(0))

    h, place = jax.lax.while_loop(lambda c: jnp.abs(c[0]).max() > 99, step, (h, 0))
    return chosen_by(p, h, jnp.broadcast_to(place, len(h)))


STRANGE = (
    *(returned, one_by_one, paired, padded, switched, ranked, embedded, offset),
    *(fixed_sizes, in_groups, share, one_more, without_the_first, first_above),
    *(sometimes_the_last, lowest_chosen, sorted_by_place, first_unless_large),
    *(first_for_others, counted_on, counted_from_one, first_marked),
)


@pytest.mark.parametrize("layer", STRANGE, ids=lambda layer: layer.__name__)
def test_experts_whose_places_are_used_otherwise_are_kept(layer, x):
    params, model = weights(), network(layer)
    groups = tpp.channel_groups(model, x, params=params)
    for leaf, axis in (("router", 1), ("up", 0), ("down", 0)):
        along = [
            g for g in groups if (leaf, axis) in {(m.leaf, m.axis) for m in g.members}
        ]
        assert all(g.reason is not None for g in along if g.size > 1), leaf
    plan = tpp.make_plan(groups, params, 0.5)
    assert model(tpp.prune(model, plan, params), x).shape == (7, 3)
