"""Every plan is tried on the model, where it is made and where it is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import tpp_jax as tpp
from tests.pruning.masking import masked
from tpp_jax.errors import TPPError

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


class Projected(linen.Module):
    """Adds its input, after a projection if that has another number of channels."""

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(6, name="stem")(x))
        y = linen.Dense(12, name="expand")(x)
        if x.shape != y.shape:
            x = linen.Dense(12, name="projection")(x)
        return linen.Dense(3, name="head")(linen.relu(x + y))


def test_a_plan_under_which_the_model_takes_another_branch_is_refused():
    x = array(2, 5)
    variables = Projected().init(jax.random.key(0), x)
    groups = tpp.channel_groups(Projected(), x, params=variables)
    assert groups["expand"].reason is None
    with pytest.raises(TPPError, match="6 of the 12 channels of expand: anoth"):
        tpp.make_plan(groups, variables, {"expand": 0.5})
    plan = tpp.make_plan(groups, variables, {"expand": 0.5}, check=False)
    for use in (
        lambda: tpp.check_plan(plan),
        lambda: tpp.check_plan(plan, Projected(), variables),
        lambda: tpp.prune(Projected(), plan, variables),
        lambda: tpp.linen_apply(Projected(), plan),
    ):
        with pytest.raises(TPPError, match="channels of expand"):
            use()
    fits = tpp.make_plan(groups, variables, {"expand": 0.25})
    small = tpp.prune(Projected(), fits, variables)
    np.testing.assert_allclose(
        tpp.linen_apply(Projected(), fits)(small, x),
        masked(Projected().apply, fits, variables, x),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_plan_read_from_a_file_is_checked():
    def net(p, x):
        h = x @ p["a"]
        return (2 * h if h.shape[-1] == 3 else h) @ p["b"]

    params = {"a": array(4, 8), "b": array(8, 2)}
    groups = tpp.channel_groups(net, array(1, 4), params=params)
    good = tpp.Plan.from_dict({"a": [0, 1, 5, 7]}, groups)
    tpp.check_plan(good)
    bad = tpp.Plan.from_dict({"a": [0, 1, 5]}, groups)
    with pytest.raises(TPPError, match="3 of the 8 channels of a: another branch"):
        tpp.check_plan(bad)
    with pytest.raises(TPPError, match="3 of the 8 channels of a: another branch"):
        tpp.prune(net, bad, params)


def test_a_plan_is_checked_on_the_model_that_is_pruned():
    class Net(nnx.Module):
        def __init__(self, rngs, fixed=None):
            self.a = nnx.Linear(4, 8, rngs=rngs)
            self.b = nnx.Linear(8, 2, rngs=rngs)
            self.fixed = fixed

        def __call__(self, x):
            h = self.a(x)
            return self.b(h if self.fixed is None else h.reshape(-1, self.fixed))

    free, x = Net(nnx.Rngs(0)), array(3, 4)
    plan = tpp.make_plan(tpp.channel_groups(free, x), free, 0.5)
    assert tpp.prune(free, plan).a.kernel.shape == (4, 4)
    with pytest.raises(TPPError):
        tpp.prune(Net(nnx.Rngs(0), fixed=8), plan)


def test_an_order_of_products_that_depends_on_the_sizes_is_not_another_branch():
    def net(p, x):
        # The order of a product of three arrays depends on their sizes.
        return jnp.einsum("ni,ij,jk->nk", x, p["a"], p["b"])

    params = {"a": array(40, 64), "b": array(64, 3)}
    groups = tpp.channel_groups(net, array(2, 40), params=params)
    assert groups["a"].reason is None
    tpp.make_plan(groups, params, 0.9)
