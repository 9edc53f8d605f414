"""Accuracy on the digits right after a cut, by criterion and repair; no labels.

The network and the data are those of docs/recovery.md:

    python -m benchmarks.recovery_digits
"""

import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine
from tpp_jax.pruning.obs import reader_of, removals

SHARES = (0.3, 0.5, 0.6, 0.7)
CRITERIA = ("l1", "wanda", "obs")
# Number of images in each of the batches without labels.
LARGE, SMALL = (128,) * 4, (16,) * 4


def digits() -> tuple[Any, Any, jax.Array, jax.Array]:
    """Returns the images and labels for training and for the test."""
    data = tpp.data.load("digits")
    images, test_images = (
        jnp.asarray(x, jnp.float32) / 16 for x in (data.train_images, data.test_images)
    )
    return images, data.train_labels, test_images, jnp.asarray(data.test_labels)


def trained(images: Any, labels: Any, steps: int = 80, seed: int = 0) -> nnx.Module:
    """Returns a ResNet-8 after some steps of training."""
    model = tpp.models.create(
        "cifar_resnet8", num_classes=10, image_shape=(8, 8, 1), rngs=nnx.Rngs(seed)
    )
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def train_step(model: Any, optimizer: Any, images: Any, labels: Any) -> None:
        def loss(model: Any) -> jax.Array:
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels
            return cross_entropy(model(images), labels).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    model.train()
    order = np.random.default_rng(seed)
    for _ in range(steps):
        batch = order.permutation(len(images))[:128]
        train_step(model, optimizer, images[batch], labels[batch])
    model.eval()
    return model


def order_seconds(channels: int = 1152, outputs: int = 192) -> float:
    """Returns the processor time of the order in which channels are removed."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2 * channels, channels))
    moments, weights = rows.T @ rows, rng.normal(size=(channels, outputs))
    started = time.process_time()
    reader = reader_of(moments, weights, np.arange(channels)[:, None], 1e-4)
    removals([reader] if reader else [], channels)
    return round(time.process_time() - started, 2)


def main() -> None:
    """Measures all rows and writes them."""
    warnings.filterwarnings("ignore", "there are fewer than 3 rows")
    images, labels, test_images, test_labels = digits()
    model = trained(images, labels)
    groups = tpp.channel_groups(model, images[:1])

    def percent(network: Any) -> float:
        network.eval()
        logits = nnx.jit(lambda net, x: net(x))(network, test_images)
        return round(100 * float(jnp.mean(jnp.argmax(logits, -1) == test_labels)), 1)

    def rows(
        sizes: tuple[int, ...],
        repairs: dict[str, dict[str, Any]],
        shares: tuple[float, ...] = SHARES,
        criteria: tuple[str, ...] = CRITERIA,
    ) -> list[Any]:
        ends = np.cumsum(sizes)
        batches = [images[end - n : end] for end, n in zip(ends, sizes, strict=True)]
        moments = tpp.input_moments(model, batches)
        found = []
        for share in shares:
            for criterion in criteria:
                statistics = None if criterion == "l1" else moments
                plan = tpp.make_plan(
                    groups, model, share, criterion=criterion, statistics=statistics
                )
                cut = tpp.prune(model, plan)
                networks = {"cut": cut} | {
                    name: tpp.compensate(
                        model, plan, batches, moments=moments, **options
                    )
                    for name, options in repairs.items()
                }
                row: dict[str, Any] = {"removed": share, "criterion": criterion}
                for name, network in networks.items():
                    row[name] = percent(network)
                    again = tpp.recalibrate(network, batches, like=model, plan=plan)
                    row[f"{name}, recalibrated"] = percent(again)
                print(row, flush=True)
                found.append(row)
        return found

    at_once, in_order = {"sequential": False}, {"sequential": True}
    chosen = {"damping": "held-out"}
    repairs = {"compensated": at_once, "sequential": in_order}
    started = time.process_time()
    result = {
        "order_of_1152_channels_seconds": order_seconds(),
        "unpruned": percent(model),
        "images_512": rows(LARGE, repairs),
        "images_64": rows(
            SMALL,
            {**repairs, "held-out": chosen, "both": {**in_order, **chosen}},
            shares=(0.5,),
            criteria=("obs",),
        ),
        "processor_seconds": round(time.process_time() - started, 1),
    }
    print(machine.write("recovery_digits", result))


if __name__ == "__main__":
    main()
