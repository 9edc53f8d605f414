"""Experts of a mixture, removed: a small language model of bytes, trained here.

    python -m benchmarks.experts_language --workdir runs/experts

The text is the documentation of Python's own library; its last tenth is held out. A
token is sent to two of eight experts in each of two blocks, and the usual term of the
loss sends equally many tokens to each. Half or a quarter of the experts are removed by
several scores; the same number of parameters is removed from within the experts for
comparison. Then all are trained for as many steps.

Results are written to ``results/experts_language_cpu.json``; ``--table`` prints the
file as the table of ``docs/results.md``.
"""

import argparse
import functools
import json
import pathlib
import pydoc_data.topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine

NAME = "experts_language"
FILE = machine.RESULTS / f"{NAME}_cpu.json"
WIDTH, HEADS, EXPERTS, HIDDEN, CHOSEN, BLOCKS = 48, 4, 8, 64, 2, 2
LENGTH, BATCH = 64, 16
STEPS, MORE, RATE, SEEDS = 1000, 100, 3e-3, 3
KEPT = 6, 4
SCORES = "random", "l1", "tokens", "gates"


class Experts(nnx.Module):
    """Gated networks of which each token is sent to two."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.router = nnx.Linear(WIDTH, EXPERTS, use_bias=False, rngs=rngs)
        draw = nnx.initializers.lecun_normal(batch_axis=0)
        self.gate = nnx.Param(draw(rngs(), (EXPERTS, WIDTH, HIDDEN)))
        self.up = nnx.Param(draw(rngs(), (EXPERTS, WIDTH, HIDDEN)))
        self.down = nnx.Param(draw(rngs(), (EXPERTS, HIDDEN, WIDTH)))

    def gates(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the weight of each expert for each token, and the router's shares."""
        scores = self.router(x)
        best, places = jax.lax.top_k(scores, CHOSEN)
        choices = jax.nn.one_hot(places, scores.shape[-1])
        gates = jnp.einsum("btk,btke->bte", jax.nn.softmax(best), choices)
        return gates, jax.nn.softmax(scores)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        gates, shares = self.gates(x)
        hidden = nnx.silu(jnp.einsum("btd,edh->bteh", x, self.gate[...]))
        hidden *= jnp.einsum("btd,edh->bteh", x, self.up[...])
        y = jnp.einsum("bteh,ehd->bted", hidden, self.down[...])
        return jnp.einsum("bte,bted->btd", gates, y), gates, shares


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, decode=False, use_bias=False, rngs=rngs
        )
        self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.experts = Experts(rngs)


class Model(nnx.Module):
    """A decoder of bytes."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(256, WIDTH, rngs=rngs)
        self.places = nnx.Param(0.02 * rngs.normal((LENGTH, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(BLOCKS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 256, use_bias=False, rngs=rngs)

    def run(self, tokens: jax.Array) -> tuple[jax.Array, list[tuple[Any, Any]]]:
        """Returns the logits, and the gates and the router's shares of each block."""
        x = self.embed(tokens) + self.places[: tokens.shape[1]]
        mask = nnx.make_causal_mask(tokens)
        routed = []
        for block in self.blocks:
            x += block.attention(block.norm1(x), mask=mask)
            y, *own = block.experts(block.norm2(x))
            x += y
            routed.append(tuple(own))
        return self.head(self.norm(x)), routed

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.run(tokens)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, help="folder of the networks")
    parser.add_argument("--table", action="store_true", help="print the recorded table")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(FILE.read_text())))
        return
    record: dict[str, Any] = {"cells": {}}
    if FILE.exists():
        record = json.loads(FILE.read_text())
    for seed in range(SEEDS):
        dense = trained(options.workdir / f"dense{seed}", seed)
        for name in ways():
            if (cell := f"{name}, seed {seed}") not in record["cells"]:
                record["cells"][cell] = found = measured(dense, name, seed)
                machine.write(NAME, record)
                print(cell, json.dumps(found), flush=True)
    print(table(record))


def ways() -> list[str]:
    """Returns the names of the rows."""
    experts = [f"{n} of {EXPERTS} experts, {score}" for n in KEPT for score in SCORES]
    return ["nothing", *experts, *(f"{n} of {EXPERTS} units, wanda" for n in KEPT)]


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray]:
    """Returns the bytes to train on and those of the test."""
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    whole = np.frombuffer(text, np.uint8)
    return whole[: len(whole) * 9 // 10], whole[len(whole) * 9 // 10 :]


def samples(seed: int, steps: int) -> Any:
    """Yields batches of sequences from random places of the text."""
    rng, (text, _) = np.random.default_rng(seed), data()
    for _ in range(steps):
        starts = rng.integers(len(text) - LENGTH - 1, size=(BATCH, 1))
        yield jnp.asarray(text[starts + np.arange(LENGTH + 1)], jnp.int32)


def loss(model: Model, sequences: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the loss with the term that balances experts, and without."""
    logits, routed = model.run(sequences[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels
    nats = losses(logits, sequences[:, 1:]).mean()
    balance = sum(
        (jnp.mean(gates > 0, (0, 1)) * shares.mean((0, 1))).sum() * shares.shape[-1]
        for gates, shares in routed
    )
    return nats + 0.01 * balance, nats


def fitted(model: Model, steps: int, peak: float, seed: int) -> Model:
    """Returns the network after some steps of AdamW."""
    rate = optax.warmup_cosine_decay_schedule(0, peak, steps // 20, steps)
    model = nnx.clone(model)
    optimizer = nnx.Optimizer(model, optax.adamw(rate), wrt=nnx.Param)

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer, batch: jax.Array) -> None:
        gradients, _ = nnx.grad(loss, has_aux=True)(model, batch)
        optimizer.update(model, gradients)

    for batch in samples(seed, steps):
        step(model, optimizer, batch)
    return model


def trained(folder: pathlib.Path, seed: int) -> Model:
    """Returns the dense network of a seed, kept in a folder."""
    model = Model(nnx.Rngs(seed))
    if folder.exists():
        return tpp.load_model(folder, model)
    model = fitted(model, STEPS, RATE, seed)
    tpp.save_model(folder, model)
    return model


def tested(model: Model) -> float:
    """Returns the bits per byte of the held-out text."""
    text = data()[1]
    size = BATCH * (LENGTH + 1)
    batches = text[: len(text) // size * size].reshape(-1, BATCH, LENGTH + 1)
    read = nnx.jit(lambda model, batch: loss(model, batch)[1])
    nats = [float(read(model, jnp.asarray(b, jnp.int32))) for b in batches]
    return float(np.mean(nats) / np.log(2))


def measured(dense: Model, name: str, seed: int) -> dict[str, float]:
    """Returns the bits per byte after a cut, and after training what is left."""
    small = dense if name == "nothing" else pruned(dense, name, seed)
    counted = [tpp.count(m, jnp.zeros((1, LENGTH), int)).params for m in (dense, small)]
    return {
        "parameters": counted[1] / counted[0],
        "after the cut": tested(small),
        "trained": tested(fitted(small, MORE, RATE / 2, 100 + seed)),
    }


def pruned(dense: Model, name: str, seed: int) -> Model:
    """Returns the network without some experts, or some of the units in each."""
    what, score = name.split(", ")
    ratio = 1 - int(what[0]) / EXPERTS
    batches = [batch[:, :-1] for batch in samples(seed, 4)]
    groups = tpp.channel_groups(dense, batches[0])
    routers = [group.name for group in groups if group.chosen]
    if "units" in what:
        moments = tpp.input_moments(dense, batches, diagonal=True)
        ratios = {"*.experts.gate": ratio}
        plan = tpp.make_plan(
            groups, dense, ratios, criterion="wanda", statistics=moments
        )
    elif score in ("tokens", "gates"):
        own = dict(zip(routers, routed(dense, batches, score), strict=True))
        plan = tpp.make_plan(groups, dense, {"*.router": ratio}, scores=own)
    else:
        plan = tpp.make_plan(
            groups, dense, {"*.router": ratio}, criterion=score, seed=seed
        )
    return tpp.prune(dense, plan)


def routed(model: Model, batches: list[jax.Array], what: str) -> list[np.ndarray]:
    """Returns for each block how much is sent to each expert: tokens, or gates."""
    run = nnx.jit(lambda model, tokens: [gates for gates, _ in model.run(tokens)[1]])
    blocks = zip(*(run(model, tokens) for tokens in batches), strict=True)
    gates = [np.concatenate(list(own)) for own in blocks]
    return [np.mean(x > 0 if what == "tokens" else x, (0, 1)) for x in gates]


def table(record: dict[str, Any]) -> str:
    """Returns the record as a table in Markdown."""
    lines = [
        "| kept | score | parameters | after the cut | trained on |",
        "|---" * 5 + "|",
    ]
    for name in ways():
        rows = [record["cells"].get(f"{name}, seed {s}") for s in range(SEEDS)]
        known = [row for row in rows if row]
        if known:
            what, _, score = name.partition(", ")
            values = [[r[k] for r in known] for k in ("after the cut", "trained")]
            spread = [f"{np.mean(v):.3f} ± {np.std(v):.3f}" for v in values]
            share = f"{100 * known[0]['parameters']:.0f} %"
            what = "all" if what == "nothing" else what
            lines.append(
                f"| {what} | {score or '–'} | {share} | {' | '.join(spread)} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
