"""What TPP's penalties add to a training step of SmolLM2-135M.

    python -m benchmarks.language_penalties

A step (next-token loss, AdamW) of 512 tokens, plain and with the penalties on a quarter
of the units of every MLP: without the Gram penalty, with it in every step, and with
that of every fourth step. All alternate in one process; four steps at a time are
timed, so that each has the same share of them. A ratio is the median over the rounds of
the ratios to the plain steps of the same round, followed by quartiles. ``--tiny`` has
one narrow layer.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine
from benchmarks.language_speed import RATE, SMOLLM2, TINY, UNITS, Timed, steps
from tpp_jax.commands.compilation import keep_compiled_programs
from tpp_jax.training.optimizers import optimizer

WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "no Gram penalty": {"gram_weight": 0.0},
    "Gram penalty": {"gram_weight": 1.0, "target": "relative"},
    "Gram penalty, every fourth step": {
        "gram_weight": 1.0,
        "target": "relative",
        "gram_every": 4,
    },
}
STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    keep_compiled_programs()
    config = TINY if options.tiny else SMOLLM2
    model = tpp.models.Decoder(config, rngs=nnx.Rngs(0))
    groups = tpp.channel_groups(model, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    plan = tpp.make_plan(groups, model, {UNITS: 0.25})
    shape = options.batch_size, options.length + 1
    tokens = np.random.default_rng(0).integers(config.vocabulary, size=shape)
    load = machine.load()
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    runs = {name: _run(model, plan, tokens, way) for name, way in WAYS.items()}
    for turn in range(options.rounds + 1):  # the first round compiles
        for name in list(WAYS)[:: 1 if turn % 2 else -1]:
            before = time.perf_counter()
            runs[name]()
            if turn:
                seconds[name].append((time.perf_counter() - before) / STEPS)
    rows = {}
    for name, times in seconds.items():
        ratios = np.divide(times, seconds["plain"])
        low, ratio, high = (float(x) for x in np.percentile(ratios, (25, 50, 75)))
        rows[name] = {"seconds": float(np.median(times)), "ratio": ratio}
        rows[name]["quartiles"] = [low, high]
        print(f"{name:34}{np.median(times):8.2f} s{ratio:8.3f} ({low:.3f}–{high:.3f})")
    settings = {"batch_size": options.batch_size, "length": options.length}
    settings |= {"rounds": options.rounds, "load": load}
    settings |= {"network": "tiny" if options.tiny else "SmolLM2-135M"}
    machine.write("language_penalties", {**settings, "steps": rows})


def _run(
    model: nnx.Module, plan: tpp.Plan, tokens: np.ndarray, way: dict[str, Any] | None
) -> Timed:
    """Returns a function that takes some steps with the penalties of a row."""
    schedule = tpp.growing_schedule(granularity=1e-4, every=1, stabilize=100)
    penalty = None
    if way is not None:
        penalty = tpp.add_tpp_penalties(plan, schedule, **way)
    tx = optimizer("adamw", RATE, momentum=0.9, weight_decay=0.01, penalty=penalty)
    return steps(model, tx, jnp.asarray(tokens), STEPS)


if __name__ == "__main__":
    main()
