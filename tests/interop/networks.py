"""Networks to put weights into, and how they are compared."""

import functools

import numpy as np
from flax import nnx

import tpp_jax as tpp
from tpp_jax.graph.naming import named_leaves
from tpp_jax.models.layers import BatchNorm, conv, dense


class Tiny(nnx.Module):
    """The module of tests/interop/make_files.py."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv1 = conv(3, 4, 3, stride=2, padding=1, rngs=rngs)
        self.bn1 = BatchNorm(4, rngs=rngs)
        self.blocks = nnx.List([conv(4, 4, 3, groups=4, bias=True, rngs=rngs)])
        self.fc = dense(4, 2, rngs=rngs)

    def __call__(self, x):
        x = self.blocks[0](nnx.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((1, 2)))


def abstract(create):
    return nnx.eval_shape(create)


@functools.cache
def network(name, image_shape=None, num_classes=10):
    return abstract(
        lambda: tpp.models.create(
            name, num_classes=num_classes, image_shape=image_shape, rngs=nnx.Rngs(0)
        )
    )


def assert_same(found, expected):
    found, expected = (named_leaves(nnx.state(model)) for model in (found, expected))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)
