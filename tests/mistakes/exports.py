"""Mistakes in what is exported."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tpp_jax as tpp
from tests.end_to_end.runs import launch
from tests.mistakes.runs import Cases


def _fixed(params: Any, x: jax.Array) -> jax.Array:
    return (x @ params["w"]).reshape(6, 2)


def _called_back(params: Any, x: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(np.sin, shape, x * params["scale"])


def exports() -> Cases:
    """Yields what a user may get wrong about exported files, and a call that does."""
    x, params = jnp.ones((4, 3)), {"w": jnp.ones((3, 3)), "scale": jnp.ones(3)}

    def made(model: Any, name: str, *inputs: Any, **options: Any) -> Any:
        return lambda folder: tpp.export(model, folder / name, *inputs, **options)

    linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    yield "a format that is not known", made(linear, "net.tflite3", x)
    yield "no inputs", made(linear, "net.onnx")
    abstract = nnx.eval_shape(lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    yield "an abstract model", made(abstract, "net.onnx", x)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    scaled = made(lambda p, x: p["scale"] * x, "net.stablehlo", scalar, params=params)
    yield "an input without a batch", scaled
    yield "a model of one batch size", made(_fixed, "net.onnx", x, params=params)
    twice = jax.export.symbolic_shape("2*batch, 3")
    doubled = jax.ShapeDtypeStruct(twice, jnp.float32)
    yield "a symbolic size that is an expression", made(linear, "net.onnx", doubled)
    calling = made(_called_back, "net.onnx", x, params=params)
    yield "an operation that ONNX lacks", calling
    calling = made(_called_back, "net.stablehlo", x, params=params)
    yield "an operation that a file cannot hold", calling
    yield "a random key as an input", made(linear, "net.onnx", x, jax.random.key(0))
    yield "an input of text", made(linear, "net.onnx", np.array(["a", "b"]))
    silent = made(lambda p, x: None, "net.onnx", x, params=params)
    yield "a model without outputs", silent
    cuda = made(linear, "net.stablehlo", x, platforms="cuda")
    yield "platforms of a file that are one string", cuda
    elsewhere = made(linear, "net.stablehlo", x, platforms=("tpu",))
    yield "a file for platforms that are not here", elsewhere

    def folder_of(folder: pathlib.Path) -> Any:
        (folder / "net.onnx").mkdir()
        return tpp.export(linear, folder / "net.onnx", x)

    yield "a file that is a folder", folder_of
    strict = made(linear, "net.onnx", jnp.full((4, 3), 0.1), tolerance=-1.0)
    yield "a tolerance that no file meets", strict

    def unfinished(folder: pathlib.Path) -> Any:
        return launch("--mode=export", f"--workdir={folder / 'none'}")

    yield "`--mode=export` of a folder without a run", unfinished

    def format_of(folder: pathlib.Path) -> Any:
        return launch("--mode=export", "--format=onx", f"--workdir={folder}")

    yield "`--mode=export` in a format that is not known", format_of
