"""Networks of all kinds, cut to half with a refit, beat those that are only cut.

The networks are those of convnets.py, grouped_convnets.py, transformers.py, others.py.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.gallery import test_convnets as convnets
from tests.gallery import test_others as others

CONVNETS = list(convnets.NETWORKS)


def network(name):
    """``(model, parameters or None, groups, inputs)``."""
    if name in CONVNETS:
        model, params = convnets.network(name)
        shape = jax.ShapeDtypeStruct(convnets.NETWORKS[name][1], jnp.float32)
        return model, params, convnets.groups_of(name), [shape]
    model, params, inputs = others.network(name)
    return model, params, others.groups_of(name), inputs


def batch(inputs, seed):
    """Numbers in place of the shapes of a network's inputs."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if leaf.dtype == jnp.float32:
            return rng.normal(size=leaf.shape).astype(np.float32)
        if leaf.dtype == bool:
            return np.arange(leaf.size).reshape(leaf.shape) % 4 > 0
        return rng.integers(2, size=leaf.shape).astype(leaf.dtype)

    return tuple(draw(leaf) for leaf in inputs)


@pytest.mark.parametrize("name", [*CONVNETS, *others.EVERY])
def test_outputs_are_nearer_to_those_of_the_unpruned_network(name):
    model, params, groups, inputs = network(name)
    outer = {g.name: 0.5 for g in groups if g.reason is None and not g.inner}
    plan = tpp.make_plan(groups, model if params is None else params, outer)
    batches = [batch(inputs, seed) for seed in range(4)]
    with warnings.catch_warnings():
        # Tied heads are not refit, and the batches are small.
        warnings.filterwarnings("ignore", ".*(are not refit|fewer than 3 rows)")
        refit = tpp.compensate(model, plan, batches, params)
    given = () if params is None else (params,)
    plain = tpp.prune(model, plan, *given)

    if isinstance(model, nnx.Module):
        whole = cut = nnx.jit(lambda net, *inputs: net(*inputs))
        for net in (model, refit, plain):
            net.eval()
    else:
        whole, cut = (
            jax.jit(others.callable_of(model, params, p)[0]) for p in (None, plan)
        )

    def outputs(call, net):
        results = [call(net, *each) for each in batches]
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(results)])

    dense = outputs(whole, model if params is None else params)
    errors = [np.mean((outputs(cut, net) - dense) ** 2) for net in (refit, plain)]
    assert errors[0] < 0.9 * errors[1]
