"""The CPU's convolutions compute what XLA's own do, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import tpp_jax as tpp
from tpp_jax.pruning.replay import evaluate
from tpp_jax.xla import convolution
from tpp_jax.xla.convolution import (
    compiler_options,
    conv_on_cpu,
    use_fast_convolutions,
)
from tpp_jax.xla.shifted import depthwise

CHANNELS_LAST = lax.conv_dimension_numbers(
    (1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC")
)
# Height and width of images and kernel, channels in and out, strides, padding.
CASES = {
    "3x3": ((8, 8, 3, 3, 5, 6), (1, 1), ((1, 1), (1, 1))),
    "stride": ((9, 8, 3, 3, 5, 6), (2, 2), ((1, 1), (1, 1))),
    "uneven": ((7, 9, 5, 2, 5, 6), (2, 1), ((0, 2), (1, 0))),
    "valid": ((6, 6, 3, 3, 5, 6), (1, 1), "VALID"),
    "same": ((7, 7, 3, 3, 5, 6), (2, 2), "SAME"),
    "pixel": ((1, 1, 3, 3, 5, 6), (1, 1), ((1, 1), (1, 1))),
    "four pixels": ((2, 2, 3, 3, 5, 6), (1, 1), ((1, 1), (1, 1))),
    "to four pixels": ((4, 4, 3, 3, 5, 6), (2, 2), ((1, 1), (1, 1))),
    "1x1": ((6, 5, 1, 1, 5, 6), (1, 1), ((0, 0), (0, 0))),
    "1x1 stride": ((7, 6, 1, 1, 5, 6), (2, 2), ((0, 0), (0, 0))),
    "widening": ((8, 8, 3, 3, 1, 9), (1, 1), ((1, 1), (1, 1))),
    "widening stride": ((8, 7, 3, 3, 1, 9), (2, 2), ((1, 1), (1, 1))),
    "narrowing": ((8, 8, 3, 3, 9, 1), (1, 1), ((1, 1), (1, 1))),
    "narrowing stride": ((9, 6, 3, 2, 12, 2), (2, 1), ((1, 1), (0, 1))),
    "narrowing valid": ((8, 8, 3, 3, 9, 1), (2, 2), "VALID"),
    "narrowing both strides": ((9, 8, 3, 3, 16, 3), (2, 2), ((1, 1), (1, 1))),
    "narrowing same": ((8, 8, 3, 3, 16, 3), (2, 2), "SAME"),
    "narrowing in threes": ((8, 9, 3, 5, 16, 2), (1, 3), ((1, 1), (2, 2))),
    "narrowing odd width": ((8, 9, 3, 3, 16, 2), (2, 2), ((1, 1), (1, 1))),
    "narrowing uneven": ((7, 8, 3, 3, 16, 2), (2, 2), ((0, 2), (3, 0))),
    "narrowing cropped": ((9, 12, 3, 3, 16, 2), (1, 2), ((-1, 0), (-3, -2))),
    "few channels": ((8, 8, 3, 3, 4, 5), (1, 1), ((1, 1), (1, 1))),
    "few channels, stride": ((9, 8, 3, 2, 2, 5), (2, 3), ((0, 2), (1, 0))),
    "few channels, cropped": ((9, 8, 3, 3, 3, 5), (2, 1), ((-1, 0), (2, -2))),
    "pairs": ((4, 32, 3, 3, 5, 6), (1, 1), ((1, 1), (1, 1))),
    "pairs uneven": ((5, 34, 3, 2, 5, 6), (2, 1), ((0, 2), (0, 1))),
    "pairs valid": ((6, 34, 3, 3, 5, 6), (1, 1), "VALID"),
    "odd width": ((4, 33, 3, 3, 5, 6), (1, 1), ((1, 1), (1, 1))),
    "1x1 padded": ((4, 4, 1, 1, 5, 6), (1, 1), ((1, 1), (0, 1))),
}
# Height and width of images and kernel, channels, strides, padding.
DEPTHWISE = {
    "3x3": ((8, 7, 3, 3, 5), (1, 1), ((1, 1), (1, 1))),
    "stride": ((9, 8, 3, 3, 5), (2, 2), ((1, 1), (1, 1))),
    "uneven": ((7, 9, 5, 2, 5), (2, 3), ((0, 2), (1, 0))),
    "valid": ((6, 6, 3, 3, 2), (1, 1), "VALID"),
    "same": ((7, 8, 5, 5, 3), (2, 2), "SAME"),
    "cropped": ((9, 9, 3, 3, 4), (2, 1), ((-1, 0), (2, -2))),
    "one tap": ((5, 4, 1, 1, 3), (2, 1), ((0, 0), (0, 0))),
    "all of the image": ((7, 7, 7, 7, 3), (1, 1), "VALID"),
}


def _arrays(name: str) -> tuple[np.ndarray, np.ndarray]:
    h, w, kh, kw, c, n = CASES[name][0]
    draws = np.random.default_rng(0)
    return draws.normal(size=(4, h, w, c)), draws.normal(size=(kh, kw, c, n))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_lax(name: str) -> None:
    images, kernel = _arrays(name)
    _, strides, padding = CASES[name]

    def results(conv):
        def loss(images, kernel):
            y = conv(images, kernel, strides, padding, dimension_numbers=CHANNELS_LAST)
            return jnp.sin(y).sum(), y

        differentiate = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        called = jax.jit(loss)(images, kernel)  # in another form than below
        return called, jax.jit(differentiate)(images, kernel)

    with jax.enable_x64(True):
        images, kernel = jnp.asarray(images), jnp.asarray(kernel)
        ours, theirs = results(conv_on_cpu), results(lax.conv_general_dilated)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-10, 1e-13), ours, theirs
    )


@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_values_and_gradients_are_those_of_lax(name: str) -> None:
    (h, w, kh, kw, c), strides, padding = DEPTHWISE[name]
    options = {"dimension_numbers": CHANNELS_LAST, "feature_group_count": c}
    draws = np.random.default_rng(0)

    def results(conv):
        def loss(images, kernel):
            y = conv(images, kernel, strides, padding, **options)
            return jnp.sin(y).sum(), y

        differentiate = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return jax.jit(differentiate)(images, kernel)

    with jax.enable_x64(True):
        images = jnp.asarray(draws.normal(size=(4, h, w, c)))
        kernel = jnp.asarray(draws.normal(size=(kh, kw, 1, c)))
        ours, theirs = results(conv_on_cpu), results(lax.conv_general_dilated)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-10, 1e-13), ours, theirs
    )


@pytest.mark.parametrize("name", ["few channels", "narrowing both strides"])
def test_thin_convolutions_are_no_convolutions_of_xla(name: str) -> None:
    images, kernel = map(jnp.float32, _arrays(name))
    _, strides, padding = CASES[name]

    def call(images, kernel):
        return conv_on_cpu(
            images, kernel, strides, padding, dimension_numbers=CHANNELS_LAST
        )

    assert "convolution" not in jax.jit(call).lower(images, kernel).as_text()


def test_depthwise_convolutions_are_no_convolutions_of_xla() -> None:
    images, kernel = jnp.ones((2, 8, 8, 5)), jnp.ones((3, 3, 1, 5))

    def loss(images, kernel):
        return (depthwise(images, kernel, (2, 2), ((1, 1), (1, 1))) ** 2).sum()

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(images, kernel).as_text()
    assert "convolution" not in program


@pytest.mark.parametrize(
    "layout", ["NHWC HWIO NHWC", "NCHW OIHW NCHW", "CWNH HOIW WNCH"]
)
def test_depthwise_equations_of_any_layout_are_no_convolutions(layout: str) -> None:
    lhs, rhs, out = layout.split()
    sizes = {"N": 2, "H": 8, "W": 7, "C": 5, "O": 5, "I": 1}
    draws = np.random.default_rng(0)
    images = draws.normal(size=[sizes[axis] for axis in lhs])
    kernel = draws.normal(size=[{**sizes, "H": 3, "W": 2}[axis] for axis in rhs])
    images, kernel = jnp.float32(images), jnp.float32(kernel)

    def call(images, kernel):
        return lax.conv_general_dilated(
            images,
            kernel,
            (2, 1),
            ((1, 1), (0, 1)),
            dimension_numbers=(lhs, rhs, out),
            feature_group_count=5,
        )

    [eqn] = jax.make_jaxpr(call)(images, kernel).eqns
    run = jax.jit(lambda images, kernel: evaluate(eqn, [images, kernel]))
    assert "convolution" not in run.lower(images, kernel).as_text()
    [ours] = run(images, kernel)
    np.testing.assert_allclose(ours, call(images, kernel), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"feature_group_count": 5},
        {"rhs_dilation": (2, 2)},
        {"preferred_element_type": jnp.float64},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_not_plain_is_left_to_lax(options: dict) -> None:
    images, kernel = map(jnp.float32, _arrays("3x3"))
    if "feature_group_count" in options:
        kernel = jnp.tile(kernel[:, :, :1, :5], 2)  # two filters for each channel
    arguments = images, kernel, (1, 1), ((1, 1), (1, 1))
    options |= {"dimension_numbers": CHANNELS_LAST}
    with jax.enable_x64(True):
        ours = conv_on_cpu(*arguments, **options)
        theirs = lax.conv_general_dilated(*arguments, **options)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


def test_a_second_derivative_backwards() -> None:
    images, kernel = map(jnp.float32, _arrays("3x3"))

    def curvature(conv):
        def loss(k):
            y = conv(
                images, k, (1, 1), ((1, 1), (1, 1)), dimension_numbers=CHANNELS_LAST
            )
            return (y**3).sum()

        return jax.jit(jax.grad(lambda k: (jax.grad(loss)(k) ** 2).sum()))(kernel)

    np.testing.assert_allclose(
        curvature(conv_on_cpu), curvature(lax.conv_general_dilated), rtol=1e-4
    )


@pytest.mark.parametrize("name", ["3x3", "widening", "narrowing", "four pixels"])
def test_what_made_the_images_is_not_computed_again(name: str) -> None:
    images, kernel = map(jnp.float32, _arrays(name))
    _, strides, padding = CASES[name]

    def loss(kernel, images):
        made = jnp.abs(images)
        y = conv_on_cpu(made, kernel, strides, padding, dimension_numbers=CHANNELS_LAST)
        return (y**2).sum()

    for fn in (loss, jax.grad(loss)):
        program = jax.jit(fn).lower(kernel, images).compile().as_text()
        assert program.count(" abs(") == 1


def test_in_a_network() -> None:
    """A layer that has a way of its own keeps it."""
    model = tpp.models.create("cifar_resnet8", num_classes=10, rngs=nnx.Rngs(0))
    own = model.layer1[0].conv1
    own.conv_general_dilated = lambda *args, **kw: lax.conv_general_dilated(*args, **kw)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))

    def gradient(model):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def square(params):
            return (nnx.merge(graphdef, params, rest, copy=True)(images) ** 2).mean()

        return jax.jit(jax.grad(square))(params)

    before, mine = gradient(model), own.conv_general_dilated
    use_fast_convolutions(model)
    assert model.conv1.conv_general_dilated is conv_on_cpu
    assert own.conv_general_dilated is mine
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        gradient(model),
        before,
    )


@pytest.fixture
def asked_anew():
    """What the backend accepts is asked once per process; here before and after."""
    compiler_options.cache_clear()
    yield
    compiler_options.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_compiler_options_are_accepted_and_change_rounding_alone() -> None:
    assert compiler_options() == convolution._CPU_OPTIONS
    model = tpp.models.create("cifar_resnet8", num_classes=10, rngs=nnx.Rngs(0))
    use_fast_convolutions(model)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    images = jax.random.normal(jax.random.key(0), (8, 32, 32, 3))

    def square(params):
        return (nnx.merge(graphdef, params, rest, copy=True)(images) ** 2).mean()

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        jax.jit(jax.grad(square), compiler_options=compiler_options())(params),
        jax.jit(jax.grad(square))(params),
    )


@pytest.mark.usefixtures("asked_anew")
def test_no_compiler_options_where_xla_knows_none(monkeypatch) -> None:
    monkeypatch.setattr(convolution, "_CPU_OPTIONS", {"xla_cpu_no_such_option": "1"})
    assert compiler_options() == {}
