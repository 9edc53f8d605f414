"""Tokens per second of SmolLM2-135M, dense and pruned, compared with PyTorch's.

    python -m benchmarks.language_speed --half --compiled

The forward pass and a training step (next-token loss, AdamW) of the network as it is,
and without a quarter and half of the units of every MLP. The peer is the same
architecture in transformers, eager and, with ``--compiled``, the dense one compiled
too, which takes a minute. Weights are random, since speed does not depend on them;
tokens are on the device. All sides alternate in one process; a number is the median
over the rounds. ``--half`` computes in bfloat16 on both sides, with parameters in
float32 for training. Without PyTorch and transformers only our side is measured.
``--tiny`` has one narrow layer.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine
from tpp_jax.commands.compilation import keep_compiled_programs
from tpp_jax.models.decoder import DecoderConfig

SMOLLM2 = DecoderConfig(
    vocabulary=49_152,
    width=576,
    depth=30,
    heads=9,
    kv_heads=3,
    head_size=64,
    hidden=1536,
    rope_base=100_000.0,
    epsilon=1e-5,
    tied=True,
)
TINY = DecoderConfig(
    vocabulary=256,
    width=48,
    depth=1,
    heads=3,
    kv_heads=1,
    head_size=16,
    hidden=96,
    tied=True,
)
RATIOS = 0.0, 0.25, 0.5
UNITS = "layers.*.mlp.gate_proj"
RATE = 1e-4
Timed = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    keep_compiled_programs()
    config = TINY if options.tiny else SMOLLM2
    draws = np.random.default_rng(0)
    shape = options.batch_size, options.length
    tokens = draws.integers(config.vocabulary, size=shape, dtype=np.int32)
    sides: dict[str, Timed] = {}
    for ratio in RATIOS:
        ours = _pruned(config, ratio, options.half)
        sides |= _our_sides(ours, tokens, f"ours, {ratio:.0%} of the units")
        if importlib.util.find_spec("torch") and importlib.util.find_spec(
            "transformers"
        ):
            from benchmarks.peers import torch_language

            hidden = config.hidden - round(ratio * config.hidden)
            compiled = options.compiled and not ratio
            for how in ("torch", "torch compiled")[: 1 + compiled]:
                peer = torch_language.Peer(
                    config,
                    hidden,
                    tokens,
                    compiled="compiled" in how,
                    half=options.half,
                )
                name = f"{how}, {ratio:.0%} of the units"
                sides[f"{name}, forward"] = peer.forward
                sides[f"{name}, step"] = peer.step
    speeds = {
        name: tokens.size / x for name, x in _times(sides, options.rounds).items()
    }
    for name, speed in speeds.items():
        print(f"{name:<44}{speed:>14,.0f} tokens/s")
    settings = {"batch_size": options.batch_size, "length": options.length}
    settings |= {"precision": "bfloat16" if options.half else "float32"}
    settings |= {"network": "tiny" if options.tiny else "SmolLM2-135M"}
    result = {**settings, "rounds": options.rounds, "tokens_per_second": speeds}
    print(machine.write("language_speed", result))


def _pruned(config: DecoderConfig, ratio: float, half: bool) -> nnx.Module:
    dtype = jnp.bfloat16 if half else None
    model = tpp.models.Decoder(config, dtype=dtype, rngs=nnx.Rngs(0))
    if not ratio:
        return model
    groups = tpp.channel_groups(model, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    return tpp.prune(model, tpp.make_plan(groups, model, {UNITS: ratio}))


def _our_sides(model: nnx.Module, tokens: np.ndarray, name: str) -> dict[str, Timed]:
    """Returns functions that run the forward pass and a training step to their ends."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    ids = jnp.asarray(tokens)

    @jax.jit
    def forward(params: Any) -> jax.Array:
        return nnx.merge(graphdef, params, rest)(ids)

    return {
        f"{name}, forward": lambda: jax.block_until_ready(forward(params)),
        f"{name}, step": steps(model, optax.adamw(RATE), ids),
    }


def steps(
    model: nnx.Module, tx: optax.GradientTransformation, ids: jax.Array, number: int = 1
) -> Timed:
    """Returns a function that takes some training steps, from where it was.

    Args:
      model: Network to start from.
      tx: Optimizer.
      ids: Tokens of the batch, ``[sequences, length]``.
      number: Number of steps.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: Any) -> jax.Array:
        logits = nnx.merge(graphdef, params, rest)(ids[:, :-1]).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return losses.mean()

    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    # The step gives its arguments away, so it has parameters of its own.
    held = [jax.tree.map(jnp.copy, params), tx.init(params)]

    def run() -> None:
        for _ in range(number):
            held[:] = compiled(*held)
        jax.block_until_ready(held)

    return run


def _times(sides: dict[str, Timed], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
        run()
    for turn in range(rounds):
        # The order alternates, so that no side always follows the same side.
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times)) for name, times in seconds.items()}


if __name__ == "__main__":
    main()
