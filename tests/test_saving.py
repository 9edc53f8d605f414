"""A saved model comes back as it was."""

import collections
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.core import FrozenDict

import tpp_jax as tpp
from tests.experiment.records.test_checkpoints import Grouped
from tests.small_net import Net
from tpp_jax.errors import TPPError

OLD = pathlib.Path(__file__).parent / "saved_by_0_1"


def assert_equal_trees(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for ours, theirs in pairs:
        assert type(ours) is type(theirs)
        assert getattr(ours, "dtype", None) == getattr(theirs, "dtype", None)
        assert np.shape(ours) == np.shape(theirs)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


# Everything that a model may hold


class Noisy(nnx.Module):
    """Layers with random keys: dropout, attention, a recurrent cell."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(
            2, 8, dropout_rate=0.5, decode=False, rngs=rngs
        )
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(8, 6, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return self.rnn(self.dropout(self.attention(x)))


def noisy(key):
    model = Noisy(nnx.Rngs(key))
    model.train()
    return model


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_random_keys_go_on_where_they_were(tmp_path, impl):
    model = noisy(jax.random.key(3, impl=impl))
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    model(x)  # moves the counters
    tpp.save_model(tmp_path / "m", model)
    other = noisy(jax.random.key(9, impl=impl))
    loaded = tpp.load_model(tmp_path / "m", other)
    assert not np.array_equal(other(x), model(x))
    loaded(x)
    np.testing.assert_array_equal(loaded(x), model(x))
    np.testing.assert_array_equal(loaded(x), model(x))


def test_a_key_of_another_kind_is_refused(tmp_path):
    tpp.save_model(tmp_path / "m", Noisy(nnx.Rngs(jax.random.key(3, impl="rbg"))))
    with pytest.raises(TPPError, match=r"key was saved as key<rbg> and is key<fry>"):
        tpp.load_model(tmp_path / "m", Noisy(nnx.Rngs(0)))


TYPES = [
    *("bool", "int8", "uint8", "int16", "int32", "uint32", "float16", "float32"),
    *("bfloat16", "complex64", "float8_e4m3fn", "float8_e5m2", "int4", "uint4"),
]


def test_arrays_of_all_types_come_back(tmp_path):
    numbers = np.arange(6).reshape(2, 3) % 2
    tree = {name: jnp.asarray(numbers.astype(name)) for name in TYPES}
    tree |= {"empty": jnp.zeros((0, 3)), "scalar": jnp.float32(2.5)}
    tpp.save_model(tmp_path / "m", tree)
    assert_equal_trees(tpp.load_model(tmp_path / "m"), tree)
    assert_equal_trees(tpp.load_model(tmp_path / "m", tree), tree)


def test_arrays_of_numpy_come_back_bit_for_bit(tmp_path):
    tree = {
        "wide": np.array([1 / 3, np.nan, -0.0]),
        "long": np.array([2**62 + 1]),
        "swapped": np.array([1.5, 2.5], ">f4"),
        "text": np.array(["a", "bcd"]),
        "time": np.array(["2024-05-01"], "datetime64[D]"),
        "one": np.float64(0.1),
        "small": np.array([0.5], ml_dtypes.bfloat16),
        "empty": np.zeros((2, 0), np.int64),
    }
    tpp.save_model(tmp_path / "m", tree)
    loaded = tpp.load_model(tmp_path / "m")
    assert_equal_trees(loaded, tree)
    assert loaded["wide"].tobytes() == tree["wide"].tobytes()


def test_a_variable_may_hold_more_than_an_array(tmp_path):
    class Odd(nnx.Module):
        def __init__(self, start):
            self.many = nnx.Variable({"a": jnp.full(2, start), "b": [3, "text", None]})
            self.number = nnx.Variable(2.5)
            self.nothing = nnx.Variable(None)
            self.imaginary = nnx.Variable(1 - 2j)

    tpp.save_model(tmp_path / "m", Odd(1.0))
    loaded = tpp.load_model(tmp_path / "m", Odd(0.0))
    assert_equal_trees(nnx.state(loaded), nnx.state(Odd(1.0)))


def test_64_bits_need_jax_to_have_them(tmp_path):
    with jax.enable_x64(True):
        tpp.save_model(tmp_path / "m", {"w": jnp.array([1 / 3])})
        assert tpp.load_model(tmp_path / "m")["w"].dtype == jnp.float64
    with pytest.raises(TPPError, match="w was saved as float64, which JAX has only"):
        tpp.load_model(tmp_path / "m")


class Odd:
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nnx.eval_shape(Net), "first.bias cannot be saved, since it is abs"),
        (lambda: {"a": Odd()}, "a cannot be saved, since it is a Odd"),
        (lambda: {"a": np.array([Odd()])}, "a cannot be saved, since it is a ndarray"),
        (lambda: {}, "this dict holds no arrays"),
        (lambda: linen.Dense(3), "for a Linen module pass its variables"),
        (lambda: jnp.sin, "saves an nnx.Module or a tree of arrays"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path, make, message):
    with pytest.raises(TPPError, match=message):
        tpp.save_model(tmp_path / "m", make())
    assert not any(tmp_path.iterdir())


def test_a_donated_array_and_a_traced_one_are_refused(tmp_path):
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(TPPError, match="w cannot be saved, since it is deleted"):
        tpp.save_model(tmp_path / "m", {"w": gone})

    @jax.jit
    def inside(x):
        tpp.save_model(tmp_path / "m", {"w": x})

    with pytest.raises(TPPError, match="traced: save_model cannot be called inside"):
        inside(jnp.ones(3))


def test_numbers_as_keys_of_the_config_do_not_damage_a_model(tmp_path):
    """JSON makes text of them, which sorts in another way."""
    config = {9: "a", 10: "b"}
    tpp.save_model(tmp_path / "m", Net(), config=config, metrics={"n": float("nan")})
    assert tpp.load_model_info(tmp_path / "m")["config"] == {"9": "a", "10": "b"}
    with pytest.raises(TPPError, match="kept as JSON, which cannot represent"):
        tpp.save_model(tmp_path / "m", Net(), config={"fn": jnp.sin})


# The mode


def modes_of(model):
    return {
        path: (getattr(m, "deterministic", ""), getattr(m, "use_running_average", ""))
        for path, m in nnx.iter_modules(model)
    }


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_model_comes_back_in_its_mode(tmp_path, mode):
    model, given = Noisy(nnx.Rngs(0)), Noisy(nnx.Rngs(1))
    getattr(model, mode)()
    given.eval() if mode == "train" else given.train()
    tpp.save_model(tmp_path / "m", model)
    loaded = tpp.load_model(tmp_path / "m", given)
    assert modes_of(loaded) == modes_of(model) != modes_of(given)


def test_so_does_one_of_ours_and_one_with_a_flag_of_its_own(tmp_path):
    model = tpp.models.create("cifar_resnet8", rngs=nnx.Rngs(0))
    model.eval()
    tpp.save_model(tmp_path / "m", model)
    assert modes_of(tpp.load_model(tmp_path / "m")) == modes_of(model)

    class Own(Net):
        training = True

        def eval(self, **attributes):
            self.training = False
            super().eval(**attributes)

    own, given = Own(), Own()
    given.training = True
    own.eval()
    tpp.save_model(tmp_path / "own", own)
    assert tpp.load_model(tmp_path / "own", given).training is False
    assert given.training is True


def test_numbers_that_pruning_has_set_come_back(tmp_path):
    class Heads(nnx.Module):
        def __init__(self, heads):
            self.project = nnx.Linear(6, 4 * heads, rngs=nnx.Rngs(0))
            self.heads, self.size, self.grid, self.rate = heads, 4, (heads, 4), 0.5

        def __call__(self, x):
            return self.project(x).reshape(*x.shape[:-1], self.heads, self.size).sum(-2)

    tpp.save_model(tmp_path / "m", Heads(2))
    given = Heads(3)
    given.rate = 0.25
    loaded = tpp.load_model(tmp_path / "m", given)
    assert (loaded.heads, loaded.grid, loaded.rate) == (2, (2, 4), 0.25)
    assert given.heads == 3
    np.testing.assert_array_equal(loaded(jnp.ones((1, 6))), Heads(2)(jnp.ones((1, 6))))


@pytest.mark.parametrize(
    "make",
    [
        lambda n: nnx.Dict(a=nnx.Linear(2, 3, rngs=nnx.Rngs(n))),
        lambda n: nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(n)), Net(rngs=nnx.Rngs(n))]),
        nnx.Rngs,
        lambda n: nnx.state(Net(rngs=nnx.Rngs(n))),
        lambda n: {"net": Net(rngs=nnx.Rngs(n)), "step": jnp.int32(n)},
        lambda n: nnx.Optimizer(Net(rngs=nnx.Rngs(n)), optax.adam(0.1), wrt=nnx.Param),
    ],
)
def test_other_things_of_flax_come_back(tmp_path, make):
    tpp.save_model(tmp_path / "m", make(0))
    loaded = tpp.load_model(tmp_path / "m", make(1))
    assert type(loaded) is type(make(0))
    leaves, expected = (
        [jax.random.key_data(x) if "key" in str(x.dtype) else x for x in found]
        for found in map(jax.tree.leaves, (nnx.state(loaded), nnx.state(make(0))))
    )
    for ours, theirs in zip(leaves, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# Trees


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=True)(linen.Dense(5)(x))
        return linen.Dense(2)(x)


def test_linen_variables_come_back_with_and_without_a_template(tmp_path):
    net, x = LinenNet(), jnp.ones((1, 3))
    variables = net.init(jax.random.key(0), x)
    tpp.save_model(tmp_path / "m", variables)
    abstract = jax.eval_shape(net.init, jax.random.key(1), x)
    for given in (None, net.init(jax.random.key(1), x), abstract):
        loaded = tpp.load_model(tmp_path / "m", given)
        assert_equal_trees(loaded, variables)
        np.testing.assert_array_equal(net.apply(loaded, x), net.apply(variables, x))
    frozen = FrozenDict(variables)
    tpp.save_model(tmp_path / "m", frozen)
    assert isinstance(tpp.load_model(tmp_path / "m"), FrozenDict)
    assert_equal_trees(tpp.load_model(tmp_path / "m"), frozen)


def test_pruned_linen_variables_fill_unpruned_ones(tmp_path):
    net, x = linen.Sequential([linen.Dense(5), linen.Dense(2)]), jnp.ones((1, 3))
    variables = net.init(jax.random.key(0), x)
    groups = tpp.channel_groups(net, x, params=variables)
    plan = tpp.make_plan(groups, variables["params"], 0.4)
    small = tpp.slice_tree(plan, variables)
    tpp.save_model(tmp_path / "m", small, plan)
    assert_equal_trees(tpp.load_model(tmp_path / "m", variables), small)
    assert_equal_trees(tpp.load_model(tmp_path / "m"), small)


TREES = {
    "nested": {"a": [jnp.ones(2), (jnp.zeros(1), None)], "b": {}, "c": ()},
    "one array": jnp.arange(3),
    "numbered": {2: jnp.ones(1), 10: jnp.zeros(2)},
    "ordered": collections.OrderedDict(z=jnp.ones(1), a=jnp.zeros(2)),
    "names that are alike": {"a": {"b": jnp.ones(1)}, "a.b": jnp.zeros(2)},
    "odd names": {"": jnp.ones(1), "a/b": jnp.ones(2), "ä\n\x1b": jnp.zeros(3)},
    "flat": {"params/dense/kernel": jnp.ones(2)},
    "numbers": {"step": 3, "rate": 0.5, "name": "net", "on": True, "w": jnp.ones(1)},
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_trees_of_plain_containers_need_no_template(tmp_path, tree):
    tpp.save_model(tmp_path / "m", tree)
    loaded = tpp.load_model(tmp_path / "m")
    assert_equal_trees(loaded, tree)
    if isinstance(tree, dict):
        assert list(loaded) == list(tree)
    assert_equal_trees(tpp.load_model(tmp_path / "m", tree), tree)


def test_trees_of_other_containers_need_a_template(tmp_path):
    params = {"w": jnp.ones(3)}
    state = optax.adam(1e-3).init(params)
    tpp.save_model(tmp_path / "m", {"params": params, "opt": state})
    with pytest.raises(TPPError, match="holds a ScaleByAdamState: pass load_model a"):
        tpp.load_model(tmp_path / "m")
    given = {"params": params, "opt": optax.adam(1e-2).init(params)}
    expected = {"params": params, "opt": state}
    assert_equal_trees(tpp.load_model(tmp_path / "m", given), expected)


def test_an_equinox_module_keeps_its_functions(tmp_path):
    eqx = pytest.importorskip("equinox")
    make = lambda seed: eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(seed))  # noqa: E731
    tpp.save_model(tmp_path / "m", make(0))
    loaded = tpp.load_model(tmp_path / "m", make(1))
    x = jnp.ones(2)
    np.testing.assert_array_equal(loaded(x), make(0)(x))
    with pytest.raises(TPPError, match="MLP: pass load_model a tree of the same"):
        tpp.load_model(tmp_path / "m")


# What the template says


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: Net(3), r"first.bias was saved as \(4,\) and is \(3,\) here"),
        (lambda: Net(param_dtype=jnp.bfloat16), "saved as float32 and is bfloat16"),
        (lambda: Net(layer=nnx.LoRALinear, lora_rank=1), "a Linear and the given one"),
        (lambda: tpp.models.create("lenet5", rngs=nnx.Rngs(0)), "not .* this LeNet5"),
        (lambda: {"w": jnp.ones(3)}, "is a Net: pass load_model an unpruned module"),
        (lambda: Net, "is a Net: pass load_model an unpruned module"),
    ],
)
def test_a_template_that_differs_is_refused(tmp_path, given, message):
    tpp.save_model(tmp_path / "m", Net())
    with pytest.raises(TPPError, match=message):
        tpp.load_model(tmp_path / "m", given())


def test_a_layer_of_another_class_with_the_same_arrays_is_refused(tmp_path):
    def make(norm):
        return nnx.List([nnx.Linear(2, 4, rngs=nnx.Rngs(0)), norm(4)])

    layer = make(lambda n: nnx.LayerNorm(n, rngs=nnx.Rngs(0)))
    group = make(lambda n: nnx.GroupNorm(n, 2, rngs=nnx.Rngs(0)))
    tpp.save_model(tmp_path / "m", layer)
    message = "the saved model, at 1, is a LayerNorm and the given one is a GroupNorm"
    with pytest.raises(TPPError, match=message):
        tpp.load_model(tmp_path / "m", group)


def test_a_plan_says_which_unpruned_shapes_fit(tmp_path):
    x = jnp.ones((1, 3))
    plan = tpp.make_plan(tpp.channel_groups(Net(8), x), Net(8), 0.5)
    small = tpp.prune(Net(8), plan)
    tpp.save_model(tmp_path / "m", small, plan)
    for given in (Net(8), small):
        np.testing.assert_array_equal(
            tpp.load_model(tmp_path / "m", given)(x), small(x)
        )
    with pytest.raises(TPPError, match=r"saved as \(4,\) and is \(9,\) here"):
        tpp.load_model(tmp_path / "m", Net(9))


def test_without_a_plan_layers_may_be_narrower_but_not_windows(tmp_path):
    def conv(width, window):
        return nnx.List([nnx.Conv(3, width, window, rngs=nnx.Rngs(0))])

    tpp.save_model(tmp_path / "m", conv(4, (3, 3)))
    assert tpp.load_model(tmp_path / "m", conv(8, (3, 3)))[0].kernel.shape[-1] == 4
    with pytest.raises(TPPError, match=r"0.kernel was saved as"):
        tpp.load_model(tmp_path / "m", conv(8, (5, 5)))


def test_a_tree_of_another_structure_or_a_module_is_refused(tmp_path):
    tpp.save_model(tmp_path / "m", {"a": jnp.ones(3)})
    with pytest.raises(TPPError, match=r"not those of this tree \(dict\): a, b do not"):
        tpp.load_model(tmp_path / "m", {"b": jnp.ones(3)})
    with pytest.raises(TPPError, match=r"a was saved as \(3,\) and is \(2,\) here"):
        tpp.load_model(tmp_path / "m", {"a": jnp.ones(2)})
    with pytest.raises(TPPError, match="is a tree of arrays, and not a module"):
        tpp.load_model(tmp_path / "m", Net())


# Models of version 0.1, which said less


def test_models_of_the_first_version_can_be_loaded():
    outputs = np.load(OLD / "outputs.npz")
    mlp = tpp.load_model(OLD / "mlp")
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    np.testing.assert_allclose(mlp(x), outputs["mlp"], rtol=1e-5)
    info = tpp.load_model_info(OLD / "mlp")
    assert info["config"] == {"seed": 7} and info["metrics"] == {"accuracy": 90.5}
    grouped = tpp.load_model(OLD / "grouped", Grouped())
    assert grouped.norm.num_groups == 2
    x = jnp.arange(75.0).reshape(1, 5, 5, 3) / 75
    np.testing.assert_allclose(grouped(x), outputs["grouped"], rtol=1e-4, atol=1e-5)
