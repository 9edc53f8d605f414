"""The cost per seed of training several seeds in one program.

    python -m benchmarks.replicas

A TPP step on scikit-learn's digits, alone and as 3 and 8 replicas: batched along a new
axis (vmap), and one after the other in one program (unrolled). All variants alternate
in one process. A number is the median time of a step divided by the numbers of replicas
and images. The default of sweeps follows from the results: on the CPU, one run after
the other.
"""

import argparse
import functools
import statistics
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
from tpp_jax.experiment import lockstep
from tpp_jax.pruning.plan import Plan
from tpp_jax.training import parallel
from tpp_jax.training.classification import ImageClassification
from tpp_jax.training.step import (
    StepConfig,
    TrainState,
    make_train_step,
    make_train_steps,
)
from tpp_jax.training.structure import structure_of

CASES = (("mlp7_linear", "*net*:0.5", "net.12"), ("cifar_resnet20", "*conv1:0.5", ""))
NUMBERS = 1, 3, 8
SETTINGS = {"batch_size": 128, "crop_padding": 1, "flip": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{'network':<16}{'program':<10}{'replicas':>9}{'µs/image':>10}{'to one':>8}")
    rows = []
    for name, ratios, skip in CASES:
        programs, steps = _programs(name, ratios, skip)
        seconds = _measure(programs, steps * SETTINGS["batch_size"], options.rounds)
        for (kind, n), each in seconds.items():
            ratio = each / seconds["alone", 1]
            rows.append(
                {
                    "network": name,
                    "program": kind,
                    "replicas": n,
                    "us_per_image": 1e6 * each,
                    "to_one": ratio,
                }
            )
            print(f"{name:<16}{kind:<10}{n:>9}{1e6 * each:>10.2f}{ratio:>8.2f}")
    print(machine.write("replicas", {"batch_size": 128, "rows": rows}))


def _programs(
    name: str, ratios: str, skip: str
) -> tuple[dict[tuple[str, int], Callable[[], Any]], int]:
    """Returns dispatches by kind and number of replicas, and the steps in each."""
    dataset = tpp.data.load("digits")
    shape = dataset.image_shape
    models = [
        tpp.models.create(name, num_classes=10, image_shape=shape, rngs=nnx.Rngs(seed))
        for seed in range(max(NUMBERS))
    ]
    groups = tpp.channel_groups(models[0], jnp.zeros((1, *shape)))
    plans = [tpp.make_plan(groups, model, ratios, skip=skip) for model in models]
    schedule = tpp.growing_schedule()
    task = ImageClassification(dataset, **SETTINGS)
    feed = task.feed(jax.devices()[:1])
    feed.begin(jax.random.key(0), 0)
    order, images = feed.train_data(0)
    loss, config = task.loss, StepConfig()
    graphdef = structure_of(models[0], training=True)
    # On the CPU convolutions in a loop are slow, and dispatching costs little.
    loop = jax.default_backend() != "cpu" or name.startswith("mlp")
    n = np.int32(10 if loop else 1)

    def optimizer(kept: dict[str, Any]) -> optax.GradientTransformation:
        plan = Plan(kept, groups)
        penalties = tpp.add_tpp_penalties(plan, schedule)
        return optax.chain(penalties, optax.sgd(1e-3, momentum=0.9))

    def steps_of(kept: dict[str, Any]) -> Callable[..., Any]:
        step = make_train_step(
            graphdef, optimizer(kept), loss, config, feed.train_batch
        )
        return make_train_steps(step, loop=loop)

    def state_of(model: nnx.Module, plan: Plan) -> TrainState:
        params = nnx.state(model, nnx.Param)
        opt_state = optimizer(plan.kept).init(params)
        stats = nnx.state(model, nnx.BatchStat)
        return TrainState(jnp.int32(0), params, stats, opt_state)

    states = [state_of(*pair) for pair in zip(models, plans, strict=True)]
    keys = [jax.random.key(seed) for seed in range(len(models))]
    compiled = functools.partial(parallel.on_devices, devices=jax.devices()[:1])
    alone = compiled(steps_of(plans[0].kept))
    found = {("alone", 1): lambda: alone(states[0], keys[0], n, order, images)}
    for unroll, kind in ((False, "batched"), (True, "unrolled")):
        for number in NUMBERS[1:]:
            arguments = (
                tuple(plan.kept for plan in plans[:number]),
                tuple(states[:number]),
                tuple(keys[:number]),
                n,
                (order,) * number,
                images,
            )
            program = compiled(lockstep.together(steps_of, unroll))
            found[kind, number] = lambda p=program, a=arguments: p(*a)
    return found, int(n)


def _measure(
    programs: dict[tuple[str, int], Callable[[], Any]], images: int, rounds: int
) -> dict[tuple[str, int], float]:
    """Returns seconds per image and replica, medians over alternating rounds."""
    times: dict[tuple[str, int], list[float]] = {key: [] for key in programs}
    for program in programs.values():
        jax.block_until_ready(program())
    for _ in range(rounds):
        for key, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            times[key].append(time.perf_counter() - start)
    return {
        (kind, number): statistics.median(found) / number / images
        for (kind, number), found in times.items()
    }


if __name__ == "__main__":
    main()
