"""Accuracy, size and time of a pruned network in LiteRT, in float32 and in int8.

The networks are those of docs/quantise.md, ResNet-8 on the digits, from five seeds:

    pip install '.[litert]' litert-quantizer
    python -m benchmarks.litert
"""

import functools
import importlib.metadata
import pathlib
import tempfile
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from flax import nnx
from litert_quantizer import quantizer, recipe

from benchmarks import machine
from benchmarks.digits_rows import SEEDS, Rows, networks, size_of
from benchmarks.recovery_digits import digits
from tpp_jax.interop.exporting import export

PACKAGES = "ai-edge-litert", "litert-converter", "litert-quantizer"


def int8(file: pathlib.Path) -> bytes:
    """Returns a file whose kernels are int8, and whose products round activations."""
    quantised = quantizer.Quantizer(str(file))
    quantised.load_quantization_recipe(recipe.dynamic_wi8_afp32())
    return bytes(quantised.quantize().quantized_model)


def runner(content: bytes, images: Any) -> Any:
    """Returns a function that runs a file on images, in one thread."""
    run = Interpreter(model_content=content, num_threads=1).get_signature_runner()
    return lambda: next(iter(run(x=images).values()))


def main() -> None:
    """Measures all networks and writes them."""
    images = np.asarray(digits()[2])
    rows, run = Rows(), nnx.jit(lambda model, x: model(x))
    for name, model in networks():
        call = functools.partial(run, model, images)
        rows.note(f"{name}, JAX", call, size_of(nnx.state(model)))
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder, "network.tflite")
            export(model, file, images, dynamic_batch=False)
            content, small = file.read_bytes(), int8(file)
        rows.note(f"{name}, LiteRT", runner(content, images), len(content))
        rows.note(f"{name}, LiteRT in int8", runner(small, images), len(small))
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    result = {**versions, "seeds": SEEDS, "networks": rows.summary()}
    print(machine.write("litert", result))


if __name__ == "__main__":
    main()
