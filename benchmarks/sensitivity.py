"""Unequal ratios by measured costs, compared with other ways to share out a cut.

    python -m benchmarks.sensitivity
    python -m benchmarks.sensitivity --cifar cifar10.npz --models runs/dense

Networks are trained and then pruned to equal FLOPs: all groups by one ratio, by scores
that compete everywhere (``scope="global"``) or among equal shapes (``"isomorphic"``),
and by the measured sensitivity, raw or after a refit. The table shows the accuracy
right after the cut, and after compensation and recalibration. Everything is measured on
512 training images without labels: the loss compares outputs with those of the unpruned
network. Digits come with scikit-learn; ``--cifar`` names an ``.npz`` file with the
arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``, and takes its images at 16×16
pixels to save time. Trained networks are kept in the folder ``--models``, if it is
given. Most programs run once: ``JAX_DISABLE_MOST_OPTIMIZATIONS=1`` saves time.
"""

import argparse
import pathlib
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine

TARGETS = (0.6, 0.4, 0.25)
CRITERIA = ("l1", "wanda")
WAYS = ("uniform", "global", "isomorphic", "sensitivity", "sensitivity, refit")


class Images(NamedTuple):
    """Images as the network takes them, and their labels."""

    train: jax.Array
    train_labels: np.ndarray
    test: jax.Array
    test_labels: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="of the digits")
    parser.add_argument("--cifar", help="file with the arrays of CIFAR-10")
    parser.add_argument("--epochs", type=int, default=5, help="of CIFAR-10")
    parser.add_argument("--models", type=pathlib.Path, help="folder of networks")
    options = parser.parse_args()
    if options.cifar:
        name, seeds, images = "cifar_resnet20", [0], _cifar(options.cifar)
        train = _train_cifar
    else:
        name, seeds, images = "cifar_resnet8", range(options.seeds), _digits()
        train = _train_digits
    measured = []
    for seed in seeds:
        model = _trained(name, images, seed, train, options)
        measured.append(measure(model, images))
        print(table(measured), flush=True)
    result = {"network": name, "epochs": options.epochs if options.cifar else None}
    data = "cifar10" if options.cifar else "digits"
    print(machine.write(f"sensitivity_{data}", {**result, "seeds": measured}))


def measure(model: nnx.Module, images: Images) -> dict[str, Any]:
    """Returns the accuracies of every way, criterion and target, and the costs."""
    model.eval()
    groups = tpp.channel_groups(model, images.test[:1])
    batches = [images.train[i : i + 128] for i in range(0, 512, 128)]
    outputs = nnx.jit(lambda model, x: model(x))
    with_outputs = [(batch, outputs(model, batch)) for batch in batches]
    moments = tpp.input_moments(model, batches)
    rows: dict[str, Any] = {}
    known: dict[tpp.Plan, Any] = {}
    found: dict[str, Any] = {"dense": accuracy(model, images), "rows": rows}
    for criterion in CRITERIA:
        scored = {"criterion": criterion}
        if criterion == "wanda":
            scored["statistics"] = moments
        costs = {}
        for way, refit in zip(WAYS[3:], (None, moments), strict=True):
            start = time.process_time()
            costs[way] = tpp.sensitivity(
                model, groups, with_outputs, divergence, moments=refit, **scored
            )
            seconds = time.process_time() - start
            found[f"{way}, {criterion}"] = costs[way].to_json() | {"seconds": seconds}
        for way in WAYS:
            how = {"sensitivity": costs[way]} if way in costs else {}
            if way in ("global", "isomorphic"):
                how = {"scope": way}
            for target in TARGETS:
                plan = tpp.make_plan(groups, model, flops=target, **how, **scored)
                if plan not in known:
                    known[plan] = _after(model, plan, images, batches, moments)
                rows[f"{target}, {criterion}, {way}"] = known[plan]
    return found


def divergence(model: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Kullback-Leibler divergence from the outputs of the unpruned network."""
    images, logits = batch
    expected = jax.nn.log_softmax(logits)
    change = expected - jax.nn.log_softmax(model(images))
    return jnp.mean(jnp.sum(jnp.exp(expected) * change, axis=-1))


def _after(
    model: nnx.Module, plan: tpp.Plan, images: Images, batches: Any, moments: Any
) -> dict[str, Any]:
    cut = tpp.prune(model, plan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few rows for some features: as they are
        refit = tpp.compensate(model, plan, moments=moments)
    refit = tpp.recalibrate(refit, batches, like=model, plan=plan)
    example = images.test[:1]
    return {
        "flops": tpp.count(cut, example).flops / tpp.count(model, example).flops,
        "kept": {g.name: plan.kept_count(g) for g in plan.pruned_groups},
        "cut": accuracy(cut, images),
        "repaired": accuracy(refit, images),
    }


@nnx.jit
def _predict(model: nnx.Module, images: jax.Array) -> jax.Array:
    return jnp.argmax(model(images), -1)


def accuracy(model: nnx.Module, images: Images) -> float:
    """Returns the accuracy on the test images, in percent."""
    model.eval()
    starts = range(0, len(images.test), 500)
    found = [_predict(model, images.test[i : i + 500]) for i in starts]
    return 100 * float(np.mean(np.concatenate(found) == images.test_labels))


def table(measured: list[dict[str, Any]]) -> str:
    """Returns the mean accuracies over seeds as a table in Markdown."""
    dense = np.mean([one["dense"] for one in measured])
    lines = [
        f"dense: {dense:.1f}",
        "| FLOPs | criterion | " + " | ".join(WAYS) + " |",
        "|---|---|" + "---|" * len(WAYS),
    ]
    for target in TARGETS:
        for criterion in CRITERIA:
            cells = []
            for way in WAYS:
                rows = [
                    one["rows"][f"{target}, {criterion}, {way}"] for one in measured
                ]
                means = [np.mean([r[key] for r in rows]) for key in ("cut", "repaired")]
                cells.append(" / ".join(f"{mean:.1f}" for mean in means))
            lines.append(
                f"| {target:.0%} | `{criterion}` | " + " | ".join(cells) + " |"
            )
    return "\n".join(lines)


def _digits() -> Images:
    data = tpp.data.load("digits")
    train, test = (
        jnp.asarray(x, jnp.float32) / 16 for x in (data.train_images, data.test_images)
    )
    return Images(train, data.train_labels, test, data.test_labels)


def _cifar(file: str) -> Images:
    arrays = np.load(file)

    def pixels(name: str) -> jax.Array:
        half = arrays[name].reshape(-1, 16, 2, 16, 2, 3).mean((2, 4), np.float32)
        return jnp.asarray((half / 255 - 0.473) / 0.251)

    labels, test_labels = (arrays[name].reshape(-1) for name in ("y_train", "y_test"))
    # 2,000 test images are enough for a comparison of many networks.
    test = pixels("x_test")[:2000], test_labels[:2000]
    return Images(pixels("x_train"), labels, *test)


def _trained(
    name: str, images: Images, seed: int, train: Callable[..., None], options: Any
) -> nnx.Module:
    shape = images.train.shape[1:]
    folder = options.models and options.models / f"{name}_{seed}"
    if folder and folder.exists():
        return tpp.load_model(folder)
    model = tpp.models.create(
        name, num_classes=10, image_shape=shape, rngs=nnx.Rngs(seed)
    )
    model.train()
    train(model, images, seed, options.epochs)
    if folder:
        tpp.save_model(folder, model)
    return model


@nnx.jit
def _step(
    model: nnx.Module, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> None:
    def loss(model: nnx.Module) -> jax.Array:
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def _train_digits(model: nnx.Module, images: Images, seed: int, epochs: int) -> None:
    del epochs  # the training of docs/recovery.md
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    order = np.random.default_rng(seed)
    for _ in range(80):
        batch = order.permutation(len(images.train))[:128]
        _step(model, optimizer, images.train[batch], images.train_labels[batch])


def _train_cifar(model: nnx.Module, images: Images, seed: int, epochs: int) -> None:
    steps = epochs * (len(images.train) // 128)
    rate = optax.cosine_onecycle_schedule(steps, 0.2, pct_start=0.2)
    chain = optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(rate, 0.9, nesterov=True)
    )
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    order = np.random.default_rng(seed)
    for _ in range(epochs):
        shuffled = order.permutation(len(images.train))
        for i in range(len(shuffled) // 128):
            batch = shuffled[128 * i : 128 * (i + 1)]
            mirrored = order.integers(2, size=(128, 1, 1, 1), dtype=bool)
            shown = images.train[batch]
            shown = jnp.where(mirrored, shown[:, :, ::-1], shown)
            _step(model, optimizer, shown, images.train_labels[batch])


if __name__ == "__main__":
    main()
