"""What tests of cuts compare: a network with its pruned channels multiplied by zero."""

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx

import tpp_jax as tpp


def masked(call, plan, params, *inputs, **kwargs):
    """Returns the output of a function with masked parameters."""
    arrays, rest = eqx.partition(params, eqx.is_array)
    arrays = jax.tree.map(jnp.multiply, arrays, tpp.mask_tree(plan, arrays))
    return call(eqx.combine(arrays, rest), *inputs, **kwargs)


def masked_module(net, plan, *inputs):
    """Returns the output of an NNX module with masked parameters."""
    graphdef, state = nnx.split(net)
    state = jax.tree.map(jnp.multiply, state, tpp.mask_tree(plan, state))
    return nnx.merge(graphdef, state)(*inputs)


def prunable(groups):
    """Returns the names of the groups that can be pruned."""
    return {group.name for group in groups if group.reason is None}
