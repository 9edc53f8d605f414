"""A small language model pruned in several ways, with equal numbers of steps.

    nice python -m benchmarks.language_ablation --workdir runs/language_ablation

A decoder of 155 thousand parameters learns bytes of Python's library, which is there
without a download and differs between versions of Python. Of each trained network, half
of the MLPs' units and half of the heads of each layer are removed in several ways; all
take the same number of further steps, before and after the cut together, and the dense
network takes them too. TPP's penalties are added behind Adam's moments, one row says
otherwise.

The networks are saved in ``--workdir``. Results are written after every cell to
``results/language_ablation_cpu.json``; cells that are there already are not measured
again. ``--table`` prints the file as the table of ``docs/results.md``.
"""

import argparse
import functools
import itertools
import json
import pathlib
import time
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine
from tpp_jax.commands.compilation import keep_compiled_programs
from tpp_jax.graph.naming import named_leaves
from tpp_jax.method.gram import Target
from tpp_jax.models.small import small_decoder
from tpp_jax.training.evaluation import Evaluator
from tpp_jax.training.language import LanguageModelling
from tpp_jax.training.optimizers import learning_rate, optimizer
from tpp_jax.training.state import initial_state, with_state
from tpp_jax.training.step import StepConfig, make_train_step
from tpp_jax.training.structure import split, structure_of

NAME = "language_ablation"
FILE = machine.RESULTS / f"{NAME}_cpu.json"
SEEDS = 0, 1, 2
SIZES = {"width": 64, "depth": 3, "heads": 4, "kv_heads": 2, "hidden": 176}
LENGTH, BATCH = 64, 16
RATIOS = {"*.mlp.gate_proj": 0.5, "*.self_attn.q_proj": 0.5}
DENSE_STEPS, DENSE_RATE = 2000, "0.003"
STEPS, RATE, DECAY = 1000, 1e-3, 0.01  # after the dense network
CALIBRATION = 32  # batches
# At the end of its growth, the penalty has shrunk weights by exp(-rate * sum of λ), to
# a twentieth, if the loss does not hold them.
SCHEDULE = tpp.growing_schedule(
    granularity=20 / 30, every=10, ceiling=20.0, stabilize=199, zero_out_every=5
)
# The same number of steps, but the weights are gone after 50.
QUICK = tpp.growing_schedule(
    granularity=100 / 30, every=1, ceiling=100.0, stabilize=469, zero_out_every=5
)
TEXT = tpp.data.load_text("python", held_out=0.04)


class Way(NamedTuple):
    """How a network is pruned.

    Attributes:
      title: Words for the table.
      criterion: Criterion of the plan; "" for a network that is not pruned.
      refit: Whether the layers behind the cut are refit.
      gram: Weight of the Gram penalty; None for a cut at once.
      target: Target of the Gram penalty.
      inside: Whether the penalties are added before Adam's moments.
      schedule: Schedule of their strength.
    """

    title: str
    criterion: str = "l1"
    refit: bool = False
    gram: float | None = None
    target: Target = "decorrelate"
    inside: bool = False
    schedule: tpp.GrowingSchedule = SCHEDULE


WAYS = {
    "dense": Way("not pruned", criterion=""),
    "l1": Way("cut at once, `l1`"),
    "wanda": Way("cut at once, `wanda`, refit", "wanda", refit=True),
    "gram 0": Way("TPP, no Gram penalty", gram=0.0),
    "gram 1": Way("TPP, Gram 1", gram=1.0),
    "gram 1000": Way("TPP, Gram 1000 (paper)", gram=1000.0),
    "relative 1": Way("TPP, relative Gram 1", gram=1.0, target="relative"),
}
FURTHER = {
    "quick": Way(
        "TPP, no Gram penalty, λ to 100 in 30 steps", gram=0.0, schedule=QUICK
    ),
    "quick wanda": Way("the same, `wanda`", "wanda", gram=0.0, schedule=QUICK),
    "inside": Way("TPP, no Gram penalty, before Adam", gram=0.0, inside=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, help="folder of the networks")
    parser.add_argument("--table", action="store_true", help="print the recorded table")
    options = parser.parse_args()
    record = json.loads(FILE.read_text()) if FILE.exists() else {"cells": {}}
    if options.table:
        print(table(record))
        return
    if options.workdir is None:
        parser.error("--workdir is needed")
    keep_compiled_programs()
    for ways, seed in itertools.product((WAYS, FURTHER), SEEDS):
        dense = trained(options.workdir / f"dense{seed}", seed)
        for key, way in ways.items():
            name = f"{key}, seed {seed}"
            if name not in record["cells"]:
                before = time.process_time()
                cell = measured(way, dense, seed)
                cell["processor_seconds"] = round(time.process_time() - before, 1)
                record["cells"][name] = cell
                machine.write(NAME, record)
                print(name, json.dumps(cell), flush=True)
    if "the paper's weight" not in record:
        record["the paper's weight"] = {
            "this network": paper_weights(trained(options.workdir / "dense0", 0)),
            "cifar_resnet56, not trained": paper_weights(
                tpp.models.create("cifar_resnet56", rngs=nnx.Rngs(0))
            ),
        }
        machine.write(NAME, record)
    print(table(record))


TASK = LanguageModelling(TEXT, functools.partial(small_decoder, **SIZES), LENGTH, BATCH)
DEVICES = jax.devices()[:1]


@functools.cache
def feed() -> Any:
    return TASK.feed(DEVICES)


@functools.cache
def evaluator() -> Evaluator:
    return Evaluator(TASK, feed(), StepConfig(), DEVICES)


def nats(model: nnx.Module) -> float:
    """Returns the mean loss on the held-out text."""
    return evaluator()(model, *split(model))["loss"]


def fitted(
    model: nnx.Module, tx: optax.GradientTransformation, steps: int, seed: int
) -> nnx.Module:
    """Returns the network after some steps."""
    structure = structure_of(model, training=True)
    select = feed().train_batch
    step = make_train_step(structure, tx, TASK.loss, StepConfig(), select)
    run = jax.jit(step, donate_argnums=0)
    state = initial_state(model, tx, average=False, step=0, arrays=None)
    feed().begin(jax.random.key(seed + steps), 0)
    for i in range(steps):
        state, _ = run(state, jax.random.key(seed), *feed().train_data(i))
    return with_state(model, state)


def falling(steps: int, peak: str | float, penalty: Any = None) -> Any:
    """Returns AdamW with a rate that rises for a twentieth and falls to zero."""
    rate = learning_rate(peak, steps, schedule="cosine", epochs=1, warmup_epochs=0.05)
    return optimizer("adamw", rate, momentum=0.9, weight_decay=DECAY, penalty=penalty)


def trained(folder: pathlib.Path, seed: int) -> nnx.Module:
    """Returns the dense network of a seed, saved in a folder."""
    model = TASK.model(nnx.Rngs(seed))
    if folder.exists():
        return tpp.load_model(folder, model)
    model = fitted(model, falling(DENSE_STEPS, DENSE_RATE), DENSE_STEPS, seed)
    tpp.save_model(folder, model, metrics={"loss": nats(model)})
    return model


def measured(way: Way, dense: nnx.Module, seed: int) -> dict[str, float]:
    """Returns the losses of a way of pruning, in nats per byte."""
    found = {"start": nats(dense)}
    if not way.criterion:
        return found | {"end": nats(fitted(dense, falling(STEPS, RATE), STEPS, seed))}
    inputs = list(itertools.islice(map(TASK.inputs, TASK.samples(seed)), CALIBRATION))
    groups = tpp.channel_groups(dense, *inputs[0])
    moments = None if way.criterion == "l1" else tpp.input_moments(dense, inputs)
    plan = tpp.make_plan(
        groups, dense, RATIOS, criterion=way.criterion, statistics=moments
    )
    model, left = dense, STEPS
    if way.gram is not None:
        model = fitted(model, penalized(way, plan), way.schedule.total_steps, seed)
        found["before the cut"] = nats(model)
        left -= way.schedule.total_steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a cut at once changes the function
        if way.refit:
            model = tpp.compensate(model, plan, moments=moments)
        else:
            model = tpp.prune(model, plan)
    found["after the cut"] = nats(model)
    found["end"] = nats(fitted(model, falling(left, RATE), left, seed))
    counted = [tpp.count(m, inputs[0][0][:1]).params for m in (dense, model)]
    return found | {"parameters": counted[1] / counted[0]}


def penalized(way: Way, plan: tpp.Plan) -> optax.GradientTransformation:
    """Returns AdamW with TPP's penalties, at a constant rate."""
    penalty = tpp.add_tpp_penalties(
        plan, way.schedule, gram_weight=way.gram or 0.0, target=way.target
    )
    make = functools.partial(optimizer, "adamw", RATE, momentum=0.9, weight_decay=DECAY)
    descent = optax.chain(penalty, make()) if way.inside else make(penalty=penalty)
    return optax.chain(descent, tpp.zero_pruned(plan, way.schedule))


def paper_weights(model: nnx.Module) -> dict[str, float]:
    """Returns, by kernel, the relative weight that pulls as the paper's 1000 does."""
    convolutions = not isinstance(model, tpp.models.Decoder)
    x = jnp.ones((1, 32, 32, 3)) if convolutions else jnp.ones((1, LENGTH), int)
    ratios = {"*layer*.conv1": 0.5} if convolutions else RATIOS
    plan = tpp.make_plan(tpp.channel_groups(model, x), model, ratios)
    params = nnx.state(model, nnx.Param)
    zeros = jax.tree.map(jnp.zeros_like, params)

    def norms(target: Target, weight: float) -> dict[str, float]:
        tx = tpp.add_tpp_penalties(
            plan, SCHEDULE, weight, target=target, bn=False, l2=False
        )
        state: Any = tx.init(params)
        pulls = tx.update(zeros, state._replace(step=jnp.int32(20)), params)[0]
        named = named_leaves(pulls).items()
        return {name: float(jnp.linalg.norm(x.ravel())) for name, x in named}

    relative = norms("relative", 1.0)
    paper = norms("decorrelate", 1000.0)
    return {name: paper[name] / x for name, x in relative.items() if x}


def table(record: dict[str, Any]) -> str:
    """Returns the record as a table in Markdown.

    Its last column is the loss at the end minus that of TPP without a Gram penalty, of
    the same seed.
    """
    columns = "before the cut", "after the cut", "end"
    lines = [
        f"| | parameters | {' | '.join(columns)} | difference |",
        "|---" * (3 + len(columns)) + "|",
    ]
    found = record["cells"]
    for key, way in {**WAYS, **FURTHER}.items():
        seeds = [seed for seed in SEEDS if f"{key}, seed {seed}" in found]
        cells = [found[f"{key}, seed {seed}"] for seed in seeds]
        plain = [found[f"gram 0, seed {seed}"]["end"] for seed in seeds]
        words = [_mean([c[x] for c in cells if x in c]) for x in columns]
        if key != "gram 0":
            ends = zip(cells, plain, strict=True)
            words.append(_mean([cell["end"] - other for cell, other in ends], "+"))
        else:
            words.append("–")
        share = np.mean([cell.get("parameters", 1.0) for cell in cells])
        lines.append(f"| {way.title} | {share:.0%} | {' | '.join(words)} |")
    return "\n".join(lines)


def _mean(values: list[float], sign: str = "") -> str:
    """Returns mean and standard deviation over seeds."""
    if not values:
        return "–"
    mean = f"{np.mean(values):{sign}.3f}".replace("-", "−")
    return f"{mean} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
