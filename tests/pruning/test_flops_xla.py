"""FLOPs compared with XLA's own cost analysis, network by network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import tpp_jax as tpp
from tests.gallery import others, test_convnets, test_others, transformers
from tpp_jax.graph.functions import as_function
from tpp_jax.graph.tracing import layers, trace

ATTENTION = {**transformers.MODELS, **others.MODELS, **others.FUNCTIONS}
MODELS = ["cifar_resnet20", "cifar_vgg11", "mobilenet_v2", "resnet18", "vit_s_16"]
# XLA counts one step of a loop, and nothing else of a recurrent network is large.
LOOPS = {"LSTM", "GRU", "two-layer GRU", "bidirectional LSTM", "plain decoder"}


@functools.cache
def network(name):
    if name in MODELS:
        model = nnx.eval_shape(lambda: tpp.models.create(name, rngs=nnx.Rngs(0)))
        return model, None, (shape(1, *model.spec.image_shape),)
    if name in ATTENTION:
        return test_others.network(name)
    images = shape(*test_convnets.NETWORKS[name][1])
    return *test_convnets.network(name), (images,)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def xla_flops(call, *arguments):
    analysis = jax.jit(call).lower(*arguments).cost_analysis()
    return analysis["flops"]


@functools.cache
def product_flops(primitive, operands, params):
    """Returns XLA's FLOPs of one product, with borders computed as they are counted."""
    params = {name: value for name, value in params}
    shapes = [list(sizes) for sizes in operands]
    if primitive == "dot_general":
        call = functools.partial(lax.dot_general, **params)
    else:
        dims = params["dimension_numbers"]
        # XLA does not count products with padding, unless the input is padded first.
        # (Those of transposed convolutions here meet padding only.)
        if set(params["lhs_dilation"]) == {1}:
            for axis, pads in zip(dims.lhs_spec[2:], params["padding"], strict=True):
                shapes[0][axis] += sum(pads)
            params["padding"] = [(0, 0)] * len(params["padding"])
        call = functools.partial(lax.conv_general_dilated, **params)
    return xla_flops(call, *(shape(*sizes) for sizes in shapes))


_KEPT = ("dimension_numbers", "window_strides", "padding", "lhs_dilation")
_KEPT += ("rhs_dilation", "feature_group_count")


@pytest.mark.parametrize("name", [*ATTENTION, *test_convnets.NETWORKS, *MODELS])
def test_layers_cost_what_xla_counts(name):
    model, params, inputs = network(name)
    traced = trace(model, *inputs, params=params)
    total = 0
    for layer in layers(traced, repeated=True):
        eqn = layer.equation
        kept = tuple((k, eqn.params[k]) for k in _KEPT if k in eqn.params)
        operands = tuple(traced.shapes[n] for n in eqn.inputs)
        total += eqn.times * product_flops(eqn.primitive, operands, kept)
    assert tpp.count(model, *inputs, params=params).flops == total


@pytest.mark.parametrize(
    "name", sorted({*ATTENTION, *test_convnets.NETWORKS} - LOOPS) + MODELS
)
def test_the_uncounted_work_of_a_network_is_a_fraction(name):
    # Less by products with borders (much of VGG's last maps of 2 by 2 pixels), more by
    # norms, activations and attention.
    model, params, inputs = network(name)
    function = as_function(model, params)
    abstract = [
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        for tree in (function.params, *inputs)
    ]
    whole = xla_flops(function.call, *abstract)
    ours = tpp.count(model, *inputs, params=params)
    assert 0.6 < ours.flops / whole < 1.4
    assert ours.uncounted == ()


def transposed(window, stride, padding, dilation=1):
    def fn(p, x):
        return lax.conv_general_dilated(
            x,
            p["k"],
            (1,),
            [padding],
            lhs_dilation=(stride,),
            rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )

    return fn, {"k": np.ones((window, 4, 6), np.float32)}


@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_zeros_between_the_inputs_of_a_transposed_convolution_are_not_counted(
    window, stride, dilation
):
    fn, params = transposed(window, stride, (0, 0), dilation)
    x = shape(2, 16, 4)
    assert tpp.count(fn, x, params=params).flops == xla_flops(fn, params, x)


def test_a_transposed_convolution_counts_each_input_once_for_each_weight():
    net = nnx.ConvTranspose(8, 12, (4, 4), strides=(2, 2), rngs=nnx.Rngs(0))
    # 5 by 5 inputs, 16 weights for each pair of channels.
    assert tpp.count(net, jnp.ones((1, 5, 5, 8))).flops == 2 * 25 * 16 * 8 * 12


def test_a_dilated_convolution_counts_its_weights_and_not_its_extent():
    net = nnx.Conv(3, 5, (3, 3), kernel_dilation=4, rngs=nnx.Rngs(0))
    assert tpp.count(net, jnp.ones((1, 16, 16, 3))).flops == 2 * 256 * 9 * 3 * 5
