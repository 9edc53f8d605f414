"""What is checked of trees of arrays that a mesh divides."""

import re

import numpy as np

from tpp_jax.graph.naming import named_leaves


def assert_equal(tree, other, tolerance=1e-5):
    for (name, leaf), wanted in zip(
        named_leaves(tree).items(), named_leaves(other).values(), strict=True
    ):
        np.testing.assert_allclose(
            leaf, wanted, rtol=tolerance, atol=tolerance, err_msg=name
        )


def assert_divided_alike(tree, other):
    """Arrays are divided as those of the other tree with these names."""
    others = named_leaves(other)
    for name, leaf in named_leaves(tree).items():
        like = others[name].sharding
        assert leaf.sharding.is_equivalent_to(like, leaf.ndim), (name, leaf.sharding)
        parts = {shard.data.shape for shard in leaf.addressable_shards}
        assert parts == {leaf.sharding.shard_shape(leaf.shape)}


def collectives(text):
    """Returns the kind and the number of entries of each exchange between devices."""
    found = re.findall(
        r"= \(?\w+\[([\d,]*)\]\S* (all-gather|all-reduce|all-to-all|reduce-scatter|"
        r"collective-permute)(?:-start)?\(",
        text,
    )
    return [
        (kind, int(np.prod([int(n) for n in shape.split(",") if n])))
        for shape, kind in found
    ]
