"""From the penalties through the cut to fine-tuning, with one optimizer."""

import functools
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax.errors import TPPError
from tpp_jax.pruning.readiness import check_ready

SCHEDULE = tpp.growing_schedule(granularity=0.5, every=2, stabilize=7, zero_out_every=3)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.hidden = nnx.Linear(8, 12, rngs=rngs)
        self.out = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.out(nnx.relu(self.hidden(x)))


IMAGES = np.random.default_rng(0).normal(size=(6, 5, 5, 1)).astype(np.float32)


@functools.cache
def planned():
    model = Net(nnx.Rngs(0))
    groups = tpp.channel_groups(model, IMAGES)
    return model, tpp.make_plan(groups, model, {"conv": 0.5, "hidden": 0.25})


def make_tx(plan, *last, momentum=0.9):
    return optax.chain(
        tpp.add_tpp_penalties(plan, SCHEDULE, gram_weight=1.0),
        optax.sgd(0.05, momentum=momentum),
        tpp.zero_pruned(plan, SCHEDULE),
        *last,
    )


@nnx.jit
def train_step(model, optimizer):
    def loss(model):
        labels = jnp.arange(6) % 3
        logits = model(IMAGES)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def test_regularize_status_cut_fine_tune_save_load(tmp_path):
    model, plan = planned()
    model = nnx.clone(model)
    tx = make_tx(plan)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    seen = []
    for _ in range(SCHEDULE.total_steps):
        now = tpp.status(optimizer, plan, nnx.state(model, nnx.Param))
        seen.append((now.step, now.zeroed, now.layers, now.ready))
        train_step(model, optimizer)
    now = tpp.status(optimizer, plan, nnx.state(model, nnx.Param))
    assert [step for step, *_ in seen] == list(range(SCHEDULE.total_steps))
    # conv is due at the update of step 4 + 3, hidden at that of 4 + 6.
    assert [zeroed for _, zeroed, _, _ in seen] == [0] * 8 + [1] * 3 + [2]
    assert [ready for *_, ready in seen] == [False] * 11 + [True]
    assert (now.step, now.strength, now.zeroed, now.layers) == (12, 1.0, 2, 2)
    assert now.ready and now.pruned_norm == 0 and now.reason is None

    # The cut is free, and may be followed by the same optimizer with its momentum.
    small = tpp.prune(model, plan)
    model.eval(), small.eval()
    np.testing.assert_allclose(small(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-6)
    graphdef, state = nnx.split(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = nnx.merge(graphdef, tpp.slice_tree(plan, state))
    small.train()
    before = jax.tree.map(np.asarray, nnx.state(small, nnx.Param))
    for _ in range(3):
        train_step(small, optimizer)
    after = nnx.state(small, nnx.Param)
    assert all(
        np.any(a != b)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )
    now = tpp.status(optimizer, plan, after)
    assert (now.step, now.gram, now.pruned_norm, now.ready) == (15, 0, 0, True)

    small.eval()
    tpp.save_model(tmp_path / "small", small, plan)
    loaded = tpp.load_model(tmp_path / "small", Net(nnx.Rngs(1)))
    loaded.eval()
    np.testing.assert_allclose(loaded(IMAGES), small(IMAGES), rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("fresh", [False, True], ids=["sliced state", "init again"])
def test_after_the_cut_nothing_is_added(jit, fresh):
    model, plan = planned()
    params = nnx.state(model, nnx.Param)
    small = tpp.slice_tree(plan, params)
    grads = jax.tree.map(lambda a: a + 1, small)
    for transform in (
        tpp.add_tpp_penalties(plan, SCHEDULE, kept_weight=1.0),
        tpp.zero_pruned(plan, SCHEDULE),
    ):
        state = transform.init(small if fresh else params)._replace(step=jnp.int32(50))
        state = tpp.slice_tree(plan, state)
        update = jax.jit(transform.update) if jit else transform.update
        updates, after = update(grads, state, small)
        jax.tree.map(np.testing.assert_array_equal, updates, grads)
        assert after.step == 51
    assert after._replace(step=0) == (0, 50, False)


def test_an_update_after_the_cut_is_that_of_the_optimizer_alone():
    model, plan = planned()
    params = nnx.state(model, nnx.Param)
    small = tpp.slice_tree(plan, params)
    grads = jax.tree.map(jnp.ones_like, params)
    tx, plain = make_tx(plan), optax.sgd(0.05, momentum=0.9)
    state = tpp.slice_tree(plan, tx.update(grads, tx.init(params), params)[1])
    trace = state[1]
    found, _ = tx.update(tpp.slice_tree(plan, grads), state, small)
    expected, _ = plain.update(tpp.slice_tree(plan, grads), trace, small)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_parameters_of_another_shape_or_cut_in_part_are_refused():
    model, plan = planned()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    small = tpp.slice_tree(plan, params)
    for transform in (
        tpp.add_tpp_penalties(plan, SCHEDULE),
        tpp.zero_pruned(plan, SCHEDULE),
    ):
        mixed = {**params, "conv": small["conv"]}
        with pytest.raises(
            TPPError, match=r"conv.* has been cut by the plan and .* not"
        ):
            transform.init(mixed)
        other = jax.tree.map(lambda a: jnp.ones((*a.shape[:-1], 7)), params)
        with pytest.raises(
            TPPError, match=r"before the plan's cut it has .*, after it"
        ):
            transform.init(other)
        state = transform.init(params)
        with pytest.raises(TPPError, match="before the plan's cut it has"):
            jax.jit(transform.update)(other, state, other)


CONTAINERS = {
    "bare": lambda tx: tx,
    "chained": lambda tx: optax.chain(optax.clip(1.0), tx),
    "named": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("tpp", tx)),
    "steps": lambda tx: optax.MultiSteps(tx, 1),
    "finite": lambda tx: optax.apply_if_finite(tx, 1),
    "injected": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(tx, optax.sgd(rate))
    )(rate=0.1),
    "masked": lambda tx: optax.masked(tx, True),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("make", [tpp.add_tpp_penalties, tpp.zero_pruned])
def test_the_states_are_found_anywhere(container, make):
    model, plan = planned()
    params = nnx.state(model, nnx.Param)
    state = CONTAINERS[container](make(plan, SCHEDULE)).init(params)
    training = {"epoch": 3, "params": params, "opt_state": state}
    for tree in (state, training):
        if container == "injected" and make is tpp.zero_pruned:
            continue  # stands before the optimizer there
        now = tpp.status(tree, plan, params)
        assert (now.step, now.zeroed, now.layers, now.ready) == (0, 0, 2, False)
        assert (now.strength is None) == (make is tpp.zero_pruned)
        assert now.pruned_norm > 0 and "0 of 2 layers" in now.reason


def test_status_counts_what_is_there():
    model, plan = planned()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tx = make_tx(plan)
    state = tx.init(params)
    gone = {name: plan.pruned(name) for name in ("conv", "hidden")}
    parts = [
        params["conv"]["kernel"][..., gone["conv"]],
        params["conv"]["bias"][gone["conv"]],
        params["norm"]["scale"][gone["conv"]],
        params["norm"]["bias"][gone["conv"]],
        params["hidden"]["kernel"][:, gone["hidden"]],
        params["hidden"]["bias"][gone["hidden"]],
    ]
    norm = np.sqrt(sum(np.sum(np.square(part)) for part in parts))
    np.testing.assert_allclose(tpp.status(state, plan, params).pruned_norm, norm, 1e-6)
    params["conv"]["kernel"] = params["conv"]["kernel"].at[..., gone["conv"]].set(0)
    assert tpp.status(state, plan, params).zeroed == 0  # the norm's scale is not zero
    params["norm"]["scale"] = params["norm"]["scale"].at[gone["conv"]].set(0)
    assert tpp.status(state, plan, params).zeroed == 1
    tiny = params["hidden"]["kernel"].at[:, gone["hidden"]].set(0)
    params["hidden"]["kernel"] = tiny
    assert tpp.status(state, plan, params).ready
    params["hidden"]["kernel"] = tiny.at[0, gone["hidden"][0]].set(1e-30)
    now = tpp.status(state, plan, params)
    assert not now.ready and now.zeroed == 1  # though its square is zero
    assert tpp.status(state, plan, {"params": params, "ema": params}) == now


class Normalised(nnx.Module):
    def __init__(self, norm, act, rngs):
        self.up = nnx.Linear(3, 8, use_bias=False, rngs=rngs)
        self.norm = norm(8, rngs=rngs)
        self.out = nnx.Linear(8, 2, rngs=rngs)
        self.act = act

    def __call__(self, x):
        return self.out(self.act(self.norm(self.up(x))))


@pytest.mark.parametrize(
    ("norm", "act", "why"),
    [
        (nnx.RMSNorm, nnx.gelu, None),
        (nnx.LayerNorm, nnx.gelu, r"'sub' (test_after_the_cut.py:"),
        (nnx.RMSNorm, nnx.sigmoid, r"'dot_general' (test_after_the_cut.py:"),
    ],
    ids=["root mean square", "layer norm", "not zero at zero"],
)
def test_a_normalised_stream_is_ready_if_its_cut_is_free(norm, act, why):
    model = Normalised(norm, act, nnx.Rngs(0))
    plan = tpp.make_plan(
        tpp.channel_groups(model, jnp.ones((1, 3))), model, {"up": 0.5}
    )
    params = nnx.state(model, nnx.Param)
    state = tpp.zero_pruned(plan, SCHEDULE).init(params)
    zero = jax.tree.map(jnp.zeros_like, params)
    now = tpp.status(state, plan, zero)
    assert now.zeroed == now.layers == 1 and now.ready == (why is None)
    assert why is None or why in now.reason
    assert tpp.status(state, plan, tpp.slice_tree(plan, zero)).ready  # is cut
    read = pickle.loads(pickle.dumps(plan))
    assert "comes from a pickle" in tpp.status(state, read, zero).reason


def test_status_without_a_state_of_tpp_is_refused():
    model, plan = planned()
    params = nnx.state(model, nnx.Param)
    with pytest.raises(TPPError, match="no state of add_tpp_penalties or zero_pruned"):
        tpp.status(optax.adam(0.1).init(params), plan, params)
    state = make_tx(plan).init(params)
    with pytest.raises(TPPError, match=r"2 states of add_tpp_penalties, at 0.0, 1.0"):
        tpp.status((state, state), plan, params)
    with pytest.raises(TPPError, match="outside of jit"):
        jax.jit(lambda s: tpp.status(s, plan, params).zeroed)(state)
    with pytest.raises(TPPError, match="the plan prunes"):
        tpp.status(state, plan, {"other": jnp.ones(3)})


def wrong_order(name, plan):
    zeroing, penalties = tpp.zero_pruned(plan, SCHEDULE), None
    penalties = tpp.add_tpp_penalties(plan, SCHEDULE)
    return {
        "before the optimizer": (penalties, zeroing, optax.sgd(0.1, momentum=0.9)),
        "before the penalties": (optax.sgd(0.1), zeroing, penalties),
        "no optimizer between": (optax.sgd(0.1), penalties, zeroing),
    }[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("before the optimizer", "zero_pruned must be last in optax.chain"),
        ("before the penalties", "zero_pruned must be last in optax.chain"),
        ("no optimizer between", "no optimizer between add_tpp_penalties and zero_pr"),
    ],
)
def test_a_wrong_order_shows_in_the_states(name, message):
    model, plan = planned()
    params = nnx.state(model, nnx.Param)
    state = optax.chain(*wrong_order(name, plan)).init(params)
    for call in (tpp.status, check_ready):
        with pytest.raises(TPPError, match=message):
            call(state, plan, params)
        with pytest.raises(TPPError, match=message):
            call({"a": 1, "opt": {"inner": state}}, plan, params)


RIGHT = {
    "the usual": lambda penalties, zeroing: (penalties, optax.sgd(0.1), zeroing),
    "after Adam": lambda penalties, zeroing: (
        optax.scale_by_adam(),
        penalties,
        optax.scale_by_learning_rate(0.1),
        zeroing,
    ),
    "one chain in another": lambda penalties, zeroing: (
        optax.chain(optax.add_decayed_weights(1e-4), penalties),
        optax.adam(0.01),
        zeroing,
    ),
}


@pytest.mark.parametrize("order", RIGHT)
def test_right_orders_pass_and_hold(order):
    model, plan = planned()
    params = nnx.state(model, nnx.Param)
    tx = optax.chain(
        *RIGHT[order](
            tpp.add_tpp_penalties(plan, SCHEDULE, gram_weight=1.0),
            tpp.zero_pruned(plan, SCHEDULE),
        )
    )
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(SCHEDULE.total_steps + 2):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert tpp.status(state, plan, params).ready
    check_ready(state, plan, params)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_zeros_that_do_not_hold_are_found_out(jit):
    model, plan = planned()
    params = nnx.state(model, nnx.Param)
    tx = optax.chain(
        tpp.add_tpp_penalties(plan, SCHEDULE, gram_weight=0.0),
        optax.chain(
            tpp.zero_pruned(plan, SCHEDULE),
            optax.sgd(0.1),  # has no state to tell it by
        ),
    )
    state, update = tx.init(params), jax.jit(tx.update) if jit else tx.update

    def run():
        nonlocal params, state
        for _ in range(SCHEDULE.total_steps):
            updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
            params = optax.apply_updates(params, updates)

    if jit:
        run()
        with pytest.raises(TPPError, match="and the next update found them nonzero"):
            tpp.status(state, plan, params)
    else:
        with pytest.raises(TPPError, match="and the next update found them nonzero"):
            run()


def test_a_step_that_is_set_by_hand_is_no_wrong_order():
    model, plan = planned()
    params = nnx.state(model, nnx.Param)
    tx = make_tx(plan)
    state = optax.tree_utils.tree_set(tx.init(params), step=jnp.int32(11))
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert tpp.status(state, plan, optax.apply_updates(params, updates)).ready


def test_a_cut_that_is_not_free_is_warned_of():
    model, plan = planned()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = make_tx(plan).init(params)
    with pytest.warns(UserWarning, match=r"not zero after 0 updates .* 0 of 2 layers"):
        check_ready(state, plan, params)
    both = {"step": 7, "params": params, "opt_state": state}
    with pytest.warns(UserWarning, match="the cut changes what the network computes"):
        tpp.slice_tree(plan, both)
    with pytest.warns(UserWarning, match="the cut changes"):
        tpp.slice_tree(plan, {**both, "ema": params})
    mask = tpp.mask_tree(plan, params)
    ready = {**both, "params": jax.tree.map(jnp.multiply, params, mask)}
    plain = {**both, "opt_state": optax.adam(0.1).init(params)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tpp.slice_tree(plan, ready)  # what is cut is zero
        tpp.slice_tree(plan, plain)  # nobody said that it should be
        tpp.slice_tree(plan, state)  # no parameters to look at
        tpp.slice_tree(plan, params)
        jax.jit(lambda tree: tpp.slice_tree(plan, tree))(both)
        jax.eval_shape(lambda tree: tpp.slice_tree(plan, tree), both)
        check_ready(optax.adam(0.1).init(params), plan, params)
        check_ready(state, plan, ready["params"])
        small = tpp.slice_tree(plan, ready)
        check_ready(small["opt_state"], plan, small["params"])
