"""Accuracy and size of a pruned network with int8 numbers, by Qwix; after training.

The networks are those of docs/quantise.md, ResNet-8 on the digits, from five seeds:

    pip install "qwix>=0.1.8"
    python -m benchmarks.quantisation
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine
from benchmarks.recovery_digits import digits, trained

SEEDS = 5
SHARE = 0.5  # of the channels of each group are removed
CALLS = 20


def pruned(model: Any, images: Any) -> Any:
    """Returns a model without half of its channels, refit on 512 images, and folded."""
    batches = [images[start : start + 128] for start in range(0, 512, 128)]
    groups = tpp.channel_groups(model, images[:1])
    moments = tpp.input_moments(model, batches)
    plan = tpp.make_plan(groups, model, SHARE, criterion="obs", statistics=moments)
    small = tpp.compensate(model, plan, batches, moments=moments)
    small = tpp.recalibrate(small, batches, like=model, plan=plan)
    return tpp.fold_norms(small, images[:1])


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


def size(tree: Any) -> int:
    """Returns the number of bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def seconds(run: Callable[[], Any]) -> float:
    """Returns the least processor time of a call."""
    found = []
    for _ in range(CALLS):
        started = time.process_time()
        jax.block_until_ready(run())
        found.append(time.process_time() - started)
    return min(found)


def main() -> None:
    """Measures all networks and writes them."""
    images, labels, test_images, test_labels = digits()
    run = nnx.jit(lambda model, x: model(x))
    rows: dict[str, dict[str, list[float]]] = {}

    def note(name: str, model: Any, stored: Any) -> None:
        right = jnp.argmax(run(model, test_images), -1) == test_labels
        row = rows.setdefault(name, {"accuracy": [], "bytes": [], "seconds": []})
        row["accuracy"].append(round(100 * float(right.mean()), 2))
        row["bytes"].append(size(stored))
        row["seconds"].append(seconds(lambda: run(model, test_images)))
        print(name, {key: values[-1] for key, values in row.items()}, flush=True)

    for seed in range(SEEDS):
        dense = trained(images, labels, seed=seed)
        networks = {"dense": tpp.fold_norms(dense, images[:1])}
        networks["pruned"] = pruned(dense, images)
        for name, model in networks.items():
            note(name, model, nnx.state(model))
            stored = int8_kernels(model)
            note(f"{name}, int8 kernels", with_arrays(model, stored), stored)
            products = int8_products(model, images[:1])
            note(f"{name}, int8 products", products, nnx.state(products))
    result = {
        name: {
            "accuracy": round(float(np.mean(row["accuracy"])), 1),
            "accuracy_of_seeds": row["accuracy"],
            "bytes": row["bytes"][0],
            "milliseconds_for_360_images": round(1e3 * min(row["seconds"]), 2),
        }
        for name, row in rows.items()
    }
    result = {"qwix": qwix.__version__, "seeds": SEEDS, "networks": result}
    print(machine.write("quantisation", result))


if __name__ == "__main__":
    main()
