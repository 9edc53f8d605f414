"""A primitive of one's own: registered, followed, proved, pruned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

import tpp_jax as tpp
from tpp_jax.graph.rules import RULES


def primitive(name, function, multiple_results=False):
    """A primitive that runs, by its name, what a function computes."""
    made = Primitive(name)
    made.multiple_results = multiple_results
    made.def_impl(jax.jit(function))
    made.def_abstract_eval(lambda *avals: abstract(jax.eval_shape(function, *avals)))
    mlir.register_lowering(
        made, mlir.lower_fun(function, multiple_results=multiple_results)
    )
    return made


def abstract(shapes):
    return jax.tree.map(lambda x: jax.core.ShapedArray(x.shape, x.dtype), shapes)


# All channels, and then all in reverse order.
mirror_p = primitive("mirror", lambda x: jnp.concatenate([x, x[..., ::-1]], -1))
halves_p = primitive(
    "halves", lambda x: [x[..., ::2], x[..., 1::2]], multiple_results=True
)


@pytest.fixture(autouse=True)
def _same_rules_afterwards():
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def network(operation):
    """A network with an operation between two layers, its parameters and inputs."""

    def fn(p, x):
        h = operation(jax.nn.relu(x @ p["before"] + p["bias"]))
        return jnp.tanh(h) @ p["after"]

    rng = np.random.default_rng(0)
    width = jax.eval_shape(operation, jax.ShapeDtypeStruct((4, 8), jnp.float32)).shape
    sizes = {"before": (5, 8), "bias": (8,), "after": (width[-1], 3)}
    params = {name: jnp.asarray(rng.normal(size=s)) for name, s in sizes.items()}
    return fn, params, jnp.asarray(rng.normal(size=(4, 5)))


def mirror_rule(ctx):
    [[*batch, axis]] = ctx.operands
    return [[*batch, ctx.concatenate([axis, axis[::-1]])]]


def test_channels_are_not_followed_through_a_primitive_without_a_rule():
    fn, params, x = network(mirror_p.bind)
    groups = tpp.channel_groups(fn, x, params=params)
    assert "the operation 'mirror'" in groups["before"].reason


def test_a_rule_makes_channels_prunable_and_the_cut_agrees_with_the_mask():
    assert tpp.register_rule("mirror")(mirror_rule) is mirror_rule
    fn, params, x = network(mirror_p.bind)
    groups = tpp.channel_groups(fn, x, params=params, strict=True)
    group = groups["before"]
    assert (group.size, group.reason) == (8, None)
    [after] = [m for m in group.members if m.leaf == "after"]
    pairs = np.sort(after.positions, axis=1).tolist()
    assert pairs == [[k, 15 - k] for k in range(8)]

    checks = tpp.check_groups(fn, x, params=params, groups=groups)
    assert checks.unproved == () and checks.masked < 1e-5
    plan = tpp.make_plan(groups, params, 0.5)
    small = tpp.prune(fn, plan, params)
    assert small["before"].shape == (5, 4) and small["after"].shape == (8, 3)
    mask = tpp.mask_tree(plan, params)
    masked = jax.tree.map(jnp.multiply, params, mask)
    np.testing.assert_allclose(fn(small, x), fn(masked, x), atol=1e-5)


def test_a_rule_of_two_results_follows_both():
    @tpp.register_rule("halves")
    def halves(ctx):
        [[*batch, axis]] = ctx.operands
        ctx.suppose(axis)
        even, odd = axis[::2], axis[1::2]
        ctx.tie(even, odd)  # an equal number of both must be left
        return [[*batch, even], [*batch, odd]]

    fn, params, x = network(lambda h: jnp.multiply(*halves_p.bind(h)))
    groups = tpp.channel_groups(fn, x, params=params)
    assert (groups["before"].size, groups["before"].reason) == (4, None)
    assert tpp.check_groups(fn, x, params=params, groups=groups).unproved == ()
    small = tpp.prune(fn, tpp.make_plan(groups, params, 0.5), params)
    assert fn(small, x).shape == (4, 3)


def test_a_wrong_rule_is_found_by_the_check():
    tpp.register_rule("mirror")(
        lambda ctx: [[*ctx.operands[0][:-1], np.tile(ctx.operands[0][-1], 2)]]
    )
    fn, params, x = network(mirror_p.bind)
    groups = tpp.channel_groups(fn, x, params=params)
    with pytest.raises(tpp.TPPError, match="before"):
        tpp.check_groups(fn, x, params=params, groups=groups)


def test_its_work_is_listed_as_not_counted():
    tpp.register_rule("mirror")(mirror_rule)
    fn, params, x = network(mirror_p.bind)
    [uncounted] = tpp.count(fn, x, params=params).uncounted
    assert uncounted.startswith("mirror (test_register_rule.py:")


WRONG = {
    "returned NoneType, must return a list": lambda ctx: None,
    "returned 2 results, but the operation has 1": lambda ctx: [*ctx.operands] * 2,
    r"returned axes of lengths \(4, 8\) for result 0, whose shape is \(4, 16\)": (
        lambda ctx: ctx.operands
    ),
    r"returned axes of lengths \(8,\) for result 0": lambda ctx: [ctx.operands[0][1:]],
    "returned, as result 0, what is no list of vectors": lambda ctx: [np.arange(4)],
    "returned labels for result 0 that do not exist": lambda ctx: [
        [ctx.operands[0][0], ctx.operands[0][1].repeat(2) + 1000]
    ],
}


@pytest.mark.parametrize("problem", WRONG)
def test_results_that_do_not_fit_are_an_error_that_names_the_rule(problem):
    rule = WRONG[problem]
    rule.__name__ = "my_rule"
    tpp.register_rule("mirror")(rule)
    fn, params, x = network(mirror_p.bind)
    message = f"the rule 'my_rule' of the primitive 'mirror' {problem}"
    with pytest.raises(tpp.TPPError, match=message):
        tpp.channel_groups(fn, x, params=params)


def test_a_rule_is_replaced_only_where_that_is_meant():
    tpp.register_rule("mirror")(mirror_rule)
    with pytest.raises(tpp.TPPError, match="'mirror' has a rule already: pass over"):
        tpp.register_rule("mirror")
    with pytest.raises(tpp.TPPError, match="'sin' has a rule already"):
        tpp.register_rule("sin")

    def keep_all(ctx):
        ctx.fix_all(ctx.operands[0], "a sine")
        return [[ctx.fixed(n, "a sine") for n in ctx.shapes[0]]]

    tpp.register_rule("sin", override=True)(keep_all)
    fn, params, x = network(jnp.sin)
    reason = tpp.channel_groups(fn, x, params=params)["before"].reason
    assert reason.startswith("a sine (test_register_rule.py:")
    assert tpp.count(fn, x, params=params).uncounted == ()


def test_what_is_no_name_of_a_primitive_is_refused():
    with pytest.raises(tpp.TPPTypeError, match=r"pass primitive\.name"):
        tpp.register_rule(mirror_p)
    with pytest.raises(tpp.TPPError, match="'scan' needs no rule"):
        tpp.register_rule("scan")
