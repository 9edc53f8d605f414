"""What the cut after TPP changes where norms run over the pruned channels.

    python -m benchmarks.free_cut
    python -m benchmarks.free_cut --seeds 0

A small transformer is trained on the digits, with root mean squares or layer norms over
its residual stream. TPP drives half of the channels of the stream and half of the
dimensions of every head's queries and keys to zero. Then they are cut in two ways:
arrays are sliced and nothing else, and as ``prune`` does it. Accuracies are in percent
of 360 test digits; a change is the largest of a logit, in standard deviations.
"""

import argparse
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine

WIDTH, HEADS, DEPTH = 48, 4, 2
DENSE_STEPS, BATCH = 300, 128
NORMS = {
    "RMSNorm": nnx.RMSNorm,
    "RMSNorm, epsilon 0.1": functools.partial(nnx.RMSNorm, epsilon=0.1),
    "LayerNorm": nnx.LayerNorm,
}


class Block(nnx.Module):
    """Attention and a dense layer, each on a norm of the stream."""

    def __init__(self, norm: Any, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = norm(WIDTH, rngs=rngs), norm(WIDTH, rngs=rngs)
        self.qk = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.v = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm1(x)
        heads = (*y.shape[:2], HEADS, -1)
        q, k = (part.reshape(heads) for part in jnp.split(self.qk(y), 2, axis=-1))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        v = self.v(y).reshape(heads)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        x = x + self.out(y.reshape(*y.shape[:2], -1))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """Sixteen patches of two by two pixels, and a norm before the logits."""

    def __init__(self, norm: Any, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(4, WIDTH, rngs=rngs)
        self.place = nnx.Param(0.1 * jax.random.normal(rngs.params(), (16, WIDTH)))
        self.blocks = nnx.List([Block(norm, rngs) for _ in range(DEPTH)])
        self.norm = norm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        x = self.embed(x) + self.place[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def measure(norm: Any, seed: int) -> dict[str, float]:
    """Trains, prunes and cuts one network."""
    data = tpp.data.load("digits")
    images, test = (
        jnp.asarray(x, jnp.float32) / 16 for x in (data.train_images, data.test_images)
    )
    model = Transformer(norm, nnx.Rngs(seed))
    order = np.random.default_rng(seed)

    def train(optimizer: nnx.Optimizer, steps: int) -> None:
        @nnx.jit
        def step(model: Any, optimizer: Any, images: Any, labels: Any) -> None:
            def loss(model: Any) -> jax.Array:
                logits = model(images)
                return optax.softmax_cross_entropy_with_integer_labels(
                    logits, labels
                ).mean()

            optimizer.update(model, nnx.grad(loss)(model))

        for _ in range(steps):
            batch = order.permutation(len(images))[:BATCH]
            step(model, optimizer, images[batch], data.train_labels[batch])

    def logits(model: nnx.Module) -> np.ndarray:
        return np.asarray(nnx.jit(lambda model, x: model(x))(model, test))

    def accuracy(found: np.ndarray) -> float:
        return float(100 * np.mean(found.argmax(-1) == data.test_labels))

    train(nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param), DENSE_STEPS)
    dense = accuracy(logits(model))
    groups = tpp.channel_groups(model, images[:1])
    ratios = {"embed": 0.5, "blocks.*.qk": 0.5}
    plan = tpp.make_plan(groups, model, ratios)
    schedule = tpp.growing_schedule(
        granularity=0.05, every=5, stabilize=100, zero_out_every=5
    )
    tx = optax.chain(
        tpp.add_tpp_penalties(plan, schedule, gram_weight=10.0),
        optax.sgd(0.05, momentum=0.9),
        tpp.zero_pruned(plan, schedule),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    train(optimizer, schedule.total_steps)
    now = tpp.status(optimizer, plan, nnx.state(model, nnx.Param))
    before = logits(model)
    graphdef, state = nnx.split(model)
    sliced = logits(nnx.merge(graphdef, tpp.slice_tree(plan, state)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layer norms
        pruned = logits(tpp.prune(model, plan))
    return {
        "dense": dense,
        "ready": float(now.ready),
        "before": accuracy(before),
        "sliced": accuracy(sliced),
        "pruned": accuracy(pruned),
        "change sliced": float(np.abs(sliced - before).max() / before.std()),
        "change pruned": float(np.abs(pruned - before).max() / before.std()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    seeds = parser.parse_args().seeds
    rows = {
        name: [measure(norm, seed) for seed in seeds] for name, norm in NORMS.items()
    }
    for name, found in rows.items():
        print(name)
        for one in found:
            print("  " + ", ".join(f"{key} {value:.3g}" for key, value in one.items()))
    result = {"seeds": seeds, "networks": rows}
    machine.write("free_cut", result)


if __name__ == "__main__":
    main()
