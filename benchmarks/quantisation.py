"""Accuracy and size of a pruned network with int8 numbers, by Qwix; after training.

The networks are those of docs/quantise.md, ResNet-8 on the digits, from five seeds:

    pip install "qwix>=0.1.8"
    python -m benchmarks.quantisation
"""

import functools
from typing import Any

import jax
import qwix
from flax import nnx

from benchmarks import machine
from benchmarks.digits_rows import SEEDS, Rows, networks, size_of
from benchmarks.recovery_digits import digits


def int8_kernels(model: Any) -> Any:
    """Returns the arrays of a model, its kernels as int8 with a scale per channel."""
    return jax.tree.map(
        lambda x: (
            qwix.quantize(x, "int8", channelwise_axes=[x.ndim - 1]) if x.ndim > 1 else x
        ),
        nnx.state(model),
    )


def with_arrays(model: Any, stored: Any) -> Any:
    """Returns a model with such arrays, computed with in float32."""

    def read(x: Any) -> Any:
        return qwix.dequantize(x) if isinstance(x, qwix.QArray) else x

    arrays = jax.tree.map(read, stored, is_leaf=lambda x: isinstance(x, qwix.QArray))
    return nnx.merge(nnx.graphdef(model), arrays)


def int8_products(model: Any, images: Any) -> Any:
    """Returns a model that multiplies int8 numbers with int8 numbers."""
    rule = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")
    return qwix.quantize_model(model, qwix.PtqProvider([rule]), images)


def main() -> None:
    """Measures all networks and writes them."""
    images = digits()[2]
    rows, run = Rows(), nnx.jit(lambda model, x: model(x))
    for name, model in networks():
        stored = int8_kernels(model)
        products = int8_products(model, images[:1])
        for kind, network, arrays in (
            ("", model, nnx.state(model)),
            (", int8 kernels", with_arrays(model, stored), stored),
            (", int8 products", products, nnx.state(products)),
        ):
            call = functools.partial(run, network, images)
            rows.note(f"{name}{kind}", call, size_of(arrays))
    result = {"qwix": qwix.__version__, "seeds": SEEDS, "networks": rows.summary()}
    print(machine.write("quantisation", result))


if __name__ == "__main__":
    main()
