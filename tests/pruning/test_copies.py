"""Optimizer states are cut with the parameters, whatever their shapes."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

import tpp_jax as tpp
from tpp_jax.errors import TPPError

SHAPES = {
    "w1": (6, 160),
    "b1": (160,),
    "w2": (160, 200),
    "w3": (200, 136),
    "w4": (136, 3),
}
EXAMPLE = jax.ShapeDtypeStruct((2, 6), jnp.float32)


def net(p, x):
    x = jnp.tanh(x @ p["w1"] + p["b1"])
    return jnp.tanh(jnp.tanh(x @ p["w2"]) @ p["w3"]) @ p["w4"]


def drawn(seed, shapes=None):
    rng = np.random.default_rng(seed)
    draw = {n: rng.normal(size=s) for n, s in (shapes or SHAPES).items()}
    return {name: jnp.asarray(a, jnp.float32) for name, a in draw.items()}


PARAMS = drawn(0)
GROUPS = tpp.channel_groups(net, EXAMPLE, params=PARAMS)
# w2 keeps at least [128, 136], so that Adafactor still factors it.
PLAN = tpp.make_plan(GROUPS, PARAMS, {"w1": 0.2, "w2": 0.3})


def loss(params, obj_fn=None):
    del obj_fn  # optax passes it to every value_fn that has such an argument
    return jnp.mean(jnp.square(net(params, jnp.ones((2, 6)))))


def step(tx, params, state, grads):
    """Returns one update, with the extra arguments that some transforms need."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def update(params, state, grads):
        extra = dict(value=loss(params), grad=grads, value_fn=loss, obj_fn=loss)
        return tx.update(grads, state, params, **extra)

    return update(params, state, grads)


def trained(tx):
    """Returns a state with random moments, without compiling a step."""
    rng = np.random.default_rng(1)

    def moment(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.ndim == 0:
            return leaf
        return jax.device_put(rng.uniform(0.1, 1, leaf.shape).astype(leaf.dtype))

    return jax.tree.map(moment, tx.init(PARAMS))


MAKE = {
    "noisy_sgd": lambda: optax.noisy_sgd(1e-3, key=jax.random.key(0)),
    "lbfgs": lambda: optax.lbfgs(),
}


# Not made from a learning rate alone, or deprecated.
OTHERS = ("dpsgd", "schedule_free", "optimistic_adam")


def optimizers():
    """Every function of optax that makes an optimizer from a learning rate."""
    found = {}
    for place in (optax, optax.contrib):
        for name in sorted(dir(place)):
            make = getattr(place, name)
            if not inspect.isfunction(make) or name.startswith(("scale_by", "_")):
                continue
            parameters = inspect.signature(make).parameters
            if "learning_rate" in parameters and name not in OTHERS:
                found[name] = MAKE.get(name, lambda make=make: make(learning_rate=1e-3))
    return found


OPTIMIZERS = optimizers()


def test_the_list_of_optimizers_is_that_of_optax():
    aliases = {n for n in dir(optax) if n in optax.__all__ and n in OPTIMIZERS}
    assert {"adam", "adafactor", "sm3", "novograd", "lbfgs", "sgd", "lion"} <= aliases
    assert {"muon", "prodigy", "galore", "schedule_free_adamw"} <= OPTIMIZERS.keys()
    assert len(OPTIMIZERS) > 40


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_optimizer_is_cut_or_refused(name):
    tx = OPTIMIZERS[name]()
    state = trained(tx)
    small = tpp.slice_tree(PLAN, PARAMS)
    if name == "galore":
        with pytest.raises(
            TPPError, match=r"projection .* Initialise the optimizer again"
        ):
            tpp.slice_tree(PLAN, state)
        return
    cut = tpp.slice_tree(PLAN, state)
    fresh = tx.init(small)
    assert jax.tree.structure(cut) == jax.tree.structure(fresh)
    for one, other in zip(jax.tree.leaves(cut), jax.tree.leaves(fresh), strict=True):
        assert jnp.shape(one) == jnp.shape(other)
        assert jnp.result_type(one) == jnp.result_type(other)
    updates, after = step(tx, small, cut, tpp.slice_tree(PLAN, drawn(9)))
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, small)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    assert jax.tree.structure(after) == jax.tree.structure(cut)


def kept(parameter, array, axes):
    """Returns an array cut in NumPy along the given axes like the parameter's."""
    named = {"w1": (None, "w1"), "w2": ("w1", "w2"), "w3": ("w2", None), "b1": ("w1",)}
    for i, axis in enumerate(axes):
        group = None if axis is None else named[parameter][axis]
        if group is not None:
            array = np.take(np.asarray(array), PLAN.kept[group], axis=i)
    return array


def test_adafactor_keeps_the_moments_of_the_kept_rows_and_columns():
    [state, *_] = trained(optax.adafactor(1e-3))
    [cut, *_] = tpp.slice_tree(PLAN, trained(optax.adafactor(1e-3)))
    # w2 is [160, 200]: its rows' moments lie along axis 0. w3 is [200, 136], and still
    # has its larger axis first after the cut.
    for name, rows, columns in (("w2", 0, 1), ("w3", 1, 0)):
        np.testing.assert_array_equal(
            cut.v_row[name], kept(name, state.v_row[name], (rows,))
        )
        np.testing.assert_array_equal(
            cut.v_col[name], kept(name, state.v_col[name], (columns,))
        )
    np.testing.assert_array_equal(cut.v["w1"], kept("w1", state.v["w1"], (0, 1)))


def one_layer(first, second):
    shapes = {"a": (4, first), "b": (first, second), "c": (second, 2)}
    params = drawn(3, shapes)

    def fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    groups = tpp.channel_groups(fn, jnp.ones((1, 4)), params=params)
    return params, groups


def with_moments(tx, params):
    state = tx.init(params)
    for _ in range(2):
        grads = {n: a + jnp.arange(a.shape[-1]) for n, a in params.items()}
        _, state = tx.update(grads, state, params)
    return state


def test_adafactor_s_rows_and_columns_are_swapped_with_the_larger_axis():
    params, groups = one_layer(256, 192)
    plan = tpp.make_plan(groups, params, counts={"a": 128})
    tx = optax.adafactor(1e-3)
    state = with_moments(tx, params)
    cut, small = tpp.slice_tree(plan, state), tpp.slice_tree(plan, params)
    # b was [256, 192] and is [128, 192]: "rows" are those of the axis that is shorter.
    assert cut[0].v_row["b"].shape == (128,) and cut[0].v_col["b"].shape == (192,)
    np.testing.assert_array_equal(
        cut[0].v_row["b"], state[0].v_col["b"][plan.kept["a"]]
    )
    np.testing.assert_array_equal(cut[0].v_col["b"], state[0].v_row["b"])
    # A rank-1 second moment is cut exactly: the next step is the uncut one's, cut.
    shapes = jax.tree.map(jnp.shape, tx.init(small))
    assert jax.tree.map(jnp.shape, cut) == shapes
    # The same for a square, where shapes alone would not show a mistake.
    params, groups = one_layer(256, 128)
    plan = tpp.make_plan(groups, params, counts={"a": 128})
    state = with_moments(tx, params)
    cut = tpp.slice_tree(plan, state)
    np.testing.assert_array_equal(
        cut[0].v_row["b"], state[0].v_col["b"][plan.kept["a"]]
    )


@pytest.mark.parametrize("limit", [128, 64, 200])
def test_adafactor_is_refused_if_it_may_no_longer_be_factored(limit):
    params, groups = one_layer(256, 256)
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=limit)
    state = tx.init(params)
    plan = tpp.make_plan(groups, params, counts={"a": 100})
    with pytest.raises(TPPError, match=r"become too small .* Initialise the optimizer"):
        tpp.slice_tree(plan, state)
    assert tpp.slice_tree(plan, {"w": params})["w"]["b"].shape == (100, 256)


def test_a_threshold_that_the_state_contradicts_is_not_assumed():
    # a is [64, 256] and factored from 32 on: the threshold is not 128, but an unknown
    # number between 32 and 64.
    shapes = {"a": (64, 256), "b": (256, 2)}
    params = drawn(4, shapes)

    def fn(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    groups = tpp.channel_groups(fn, jnp.ones((1, 64)), params=params)
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=32)
    for count, fine in ((70, True), (40, False)):
        plan = tpp.make_plan(groups, params, counts={"a": count})
        if fine:
            cut = tpp.slice_tree(plan, tx.init(params))
            fresh = tx.init(tpp.slice_tree(plan, params))
            assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, fresh)
        else:
            with pytest.raises(TPPError, match="Initialise the optimizer again"):
                tpp.slice_tree(plan, tx.init(params))


def test_sm3_s_vectors_are_cut_each_along_its_axis():
    [state, *_] = trained(optax.sm3(0.1))
    [cut, *_] = tpp.slice_tree(PLAN, trained(optax.sm3(0.1)))
    for i in range(2):
        np.testing.assert_array_equal(
            cut.mu["w2"][i], kept("w2", state.mu["w2"][i], (i,))
        )
    assert cut.nu["w2"].shape == (128, 140)


def test_novograd_s_numbers_are_kept():
    [state, *_] = trained(optax.novograd(0.1))
    [cut, *_] = tpp.slice_tree(PLAN, trained(optax.novograd(0.1)))
    assert cut.nu == state.nu
    assert cut.mu["w2"].shape == (128, 140)


def test_lbfgs_remembers_the_kept_channels_and_forgets_the_old_loss():
    state = optax.lbfgs().init(PARAMS)
    rng = np.random.default_rng(5)
    steps = {n: rng.normal(size=(10, *s)) for n, s in SHAPES.items()}
    # The first pair has positive curvature on all channels, negative on the kept ones.
    slopes = {name: 2 * array for name, array in steps.items()}
    slopes["w1"][0] = -100 * steps["w1"][0]
    slopes["w1"][0][:, PLAN.pruned("w1")] *= -100

    def as_jax(tree):
        return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)

    memory = state[0]._replace(
        diff_params_memory=as_jax(steps),
        diff_updates_memory=as_jax(slopes),
        weights_memory=jnp.ones(10).at[9].set(0),
    )
    search = state[-1]._replace(value=jnp.float32(3))
    cut = tpp.slice_tree(PLAN, (memory, *state[1:-1], search))
    small, whole = cut[0].diff_params_memory, memory.diff_params_memory["w2"]
    np.testing.assert_array_equal(
        small["w2"], [kept("w2", one, (0, 1)) for one in whole]
    )
    pairs = [(small[n], cut[0].diff_updates_memory[n]) for n in SHAPES]
    products = [sum(np.vdot(a[i], b[i]) for a, b in pairs) for i in range(10)]
    assert products[0] < 0
    expected = [0, *(1 / p for p in products[1:9]), 0]
    np.testing.assert_allclose(cut[0].weights_memory, expected, rtol=1e-4)
    assert cut[-1].value == jnp.inf and search.value == 3


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sm3", "lbfgs", "novograd"])
def test_the_state_of_an_nnx_optimizer_is_cut_in_every_form(name):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(160, 200, rngs=rngs)
            self.down = nnx.Linear(200, 5, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))

    model = Net(nnx.Rngs(0))
    plan = tpp.make_plan(tpp.channel_groups(model, jnp.ones((1, 160))), model, 0.25)
    optimizer = nnx.Optimizer(model, OPTIMIZERS[name](), wrt=nnx.Param)
    fresh = nnx.Optimizer(tpp.prune(model, plan), OPTIMIZERS[name](), wrt=nnx.Param)
    graphdef, state = nnx.split(optimizer)
    merged = nnx.merge(graphdef, tpp.slice_tree(plan, state))
    for cut in (merged, tpp.slice_tree(plan, optimizer)):
        shapes = [jax.tree.map(jnp.shape, one.opt_state) for one in (cut, fresh)]
        assert shapes[0] == shapes[1]


SOME = {"w1": True, "b1": False, "w2": True, "w3": False, "w4": True}
LABELS = {name: "yes" if chosen else "no" for name, chosen in SOME.items()}


def injected(tx):
    def make(rate):
        return optax.chain(tx, optax.scale(rate))

    return optax.inject_hyperparams(make)(rate=0.1)


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "masked": lambda tx: optax.masked(tx, SOME),
    "inject": injected,
    "multi steps": lambda tx: optax.MultiSteps(tx, 2),
    "apply if finite": lambda tx: optax.apply_if_finite(tx, 3),
    "by label": lambda tx: optax.partition({"yes": tx, "no": optax.sgd(0.1)}, LABELS),
    "named": lambda tx: optax.named_chain(("inner", tx)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["adam", "adafactor", "sm3"])
def test_wrapped_optimizers_are_cut_too(wrapper, name):
    tx = WRAPPERS[wrapper](OPTIMIZERS[name]())
    cut = tpp.slice_tree(PLAN, tx.init(PARAMS))
    fresh = tx.init(tpp.slice_tree(PLAN, PARAMS))
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, fresh)


def test_states_without_arrays_of_parameters_are_accepted():
    for state in (
        (),
        optax.EmptyState(),
        optax.sgd(0.1).init(PARAMS),
        optax.noisy_sgd(0.1, key=jax.random.key(0)).init(PARAMS),
        optax.adam(0.1).init({}),
        {"step": np.int64(3), "rate": 0.1, "name": "run", "key": jax.random.PRNGKey(1)},
    ):
        out = tpp.slice_tree(PLAN, state)
        assert jax.tree.structure(out) == jax.tree.structure(state)
        tpp.mask_tree(PLAN, state)


@pytest.mark.parametrize(
    "tree",
    [
        optax.flatten(optax.adam(0.1)).init(PARAMS),
        {"layer_1": PARAMS["w1"], "layer_2": PARAMS["w2"]},
        list(PARAMS.values()),
        PARAMS["w1"],
        {"quantised": np.ones((6, 160), np.int8)},
    ],
    ids=["flatten", "other names", "list", "bare array", "integers"],
)
def test_a_tree_without_matching_names_is_refused(tree):
    for apply in (tpp.slice_tree, tpp.mask_tree):
        with pytest.raises(
            TPPError, match=r"no leaf of the tree has the name .* w1, b1"
        ):
            apply(PLAN, tree)
    nothing = tpp.make_plan(GROUPS, PARAMS, {})
    assert jax.tree.structure(tpp.slice_tree(nothing, tree)) == jax.tree.structure(tree)


def test_statistics_of_an_unknown_shape_are_refused_by_name():
    for shape in ((6,), (160, 6), (2, 6, 160), (3, 6, 160), (6, 161)):
        with pytest.raises(
            TPPError, match=r"cannot slice 0\.mu\.w1 .* initialise the opt"
        ):
            tpp.slice_tree(PLAN, {"0": {"mu": {"w1": jnp.ones(shape)}}})


def test_keys_that_contain_a_path_are_matched():
    tree = {"params": {"block": PARAMS}}
    expected = tpp.slice_tree(PLAN, PARAMS)
    by_text = tpp.slice_tree(PLAN, flatten_dict(tree, sep="/"))
    by_tuple = tpp.slice_tree(PLAN, flatten_dict(tree))
    for name, leaf in expected.items():
        np.testing.assert_array_equal(by_text[f"params/block/{name}"], leaf)
        np.testing.assert_array_equal(by_tuple["params", "block", name], leaf)


def test_keys_with_a_path_match_a_parameter_whose_name_has_one():
    """Haiku's module names contain paths."""
    up, down = "mlp/~/linear_0", "mlp/~/linear_1"
    params = {up: {"w": jnp.ones((4, 8))}, down: {"w": jnp.ones((8, 2))}}

    def fn(p, x):
        return jax.nn.relu(x @ p[up]["w"]) @ p[down]["w"]

    groups = tpp.channel_groups(fn, jnp.ones((1, 4)), params=params)
    plan = tpp.make_plan(groups, params, 0.5)
    for tree in (params, {"mu": params}):
        for form in (tree, flatten_dict(tree, sep="/")):
            small = jax.tree.leaves(tpp.slice_tree(plan, form))
            assert sorted(map(jnp.shape, small)) == [(4, 2), (4, 4)]
