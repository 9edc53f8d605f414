"""Growth of the costs with depth, width, batch, and number of devices.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --parts batch devices

There are five parts. The parts that are measured replace the recorded ones, with the
load of the machine before the measurement.

- ``depth`` and ``width``: groups, an L1 plan at 0.5 and the smaller network, of CIFAR
  ResNets up to 1,202 layers, of ResNet-56 at up to 16 times its width, and of a Llama
  of 7 billion parameters (all groups; weights that take no memory, to measure the
  arithmetic and not the disk). Each network has a process of its own.
- ``compile``: tracing and compiling the training step, without any cache, each in a
  process of its own; and again with identical blocks rolled into loops, as on a GPU or
  TPU for fifty or more blocks (``tpp_jax/xla/blocks.py``). (ResNet-1202 is only
  measured rolled, since unrolled it takes more than 16 GiB.)
- ``batch``: the training step of ResNet-20 for different batches, alternating.
- ``devices``: one batch split over simulated devices. They share the machine's cores,
  so this measures the cost of splitting, and not a speedup. Each number of devices has
  its own process; all processes exist at the same time and alternate.

The pictures are written to docs/images/scaling_*.png.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine
from benchmarks.architectures import Llama, LlamaShape
from benchmarks.graph import with_weights
from tpp_jax.training import parallel
from tpp_jax.training import step as steps
from tpp_jax.training.classification import ImageClassification
from tpp_jax.training.optimizers import sgd
from tpp_jax.training.structure import structure_of
from tpp_jax.xla.blocks import Blocks

COMPILED = tuple(f"cifar_resnet{depth}" for depth in (20, 32, 44, 56, 110))
ROLLED = "cifar_resnet56", "cifar_resnet110", "cifar_resnet1202"
DEPTHS = "cifar_resnet20", "cifar_resnet56", "cifar_resnet110", "cifar_resnet1202"
WIDTHS = "cifar_resnet56", *(f"cifar_resnet56_x{k}" for k in (2, 4, 8, 16))
LLAMA = "llama_7b"
BATCHES = 16, 32, 64, 128, 256
DEVICES = 1, 2, 4, 8
STEPPED, BATCH = "cifar_resnet20", 128  # network and batch of the last parts

_REPEATS = 5
_ROUNDS = 9
IMAGES = pathlib.Path(__file__).parents[1] / "docs" / "images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--note", default="", help="recorded with the parts measured")
    parser.add_argument("--child", nargs="*", help="measure one thing, print it")
    options = parser.parse_args()
    if options.child:
        what, *given = options.child
        CHILDREN[what](*given)
        return
    file = machine.RESULTS / f"scaling_{jax.default_backend()}.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    result.pop("machine", None)
    for part in options.parts:
        load = machine.load()
        print(f"\n{part} (load {load})")
        result[part] = {"load": load, "note": options.note, "rows": PARTS[part]()}
    print(f"\n{machine.write('scaling', result)}")
    print("python -m benchmarks.pictures draws it")


def _child(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.scaling", "--child", *arguments]


def _answer(*arguments: str) -> dict[str, Any]:
    """Returns the measurement of a process of its own."""
    done = subprocess.run(
        _child(*arguments), stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _peak() -> float:
    """Returns the peak memory of this process, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _table(*columns: str) -> None:
    print(f"{'':<20}" + "".join(f"{column:>14}" for column in columns))


def _row(name: Any, *values: float) -> None:
    print(f"{name:<20}" + "".join(f"{value:>14.3f}" for value in values), flush=True)


# ------------------------------------------------------------------ depth and width


def _pruning(networks: Sequence[str]) -> dict[str, Any]:
    rows = {}
    _table("groups, s", "plan, s", "prune, s", "M params", "peak GiB")
    for name in networks:
        row = rows[name] = _answer("pruning", name)
        seconds = [row[job] for job in ("groups", "plan", "prune")]
        _row(name, *seconds, row["parameters"] / 1e6, row["peak_gib"])
    return rows


def _measure_pruning(name: str) -> None:
    if name == LLAMA:
        model = nnx.eval_shape(lambda: Llama(LlamaShape(), rngs=nnx.Rngs(0)))
        example = jax.ShapeDtypeStruct((1, 128), np.int32)
    else:
        model = _network(name)
        example = jax.ShapeDtypeStruct((1, *model.spec.image_shape), np.float32)
    groups = tpp.channel_groups(model, example)
    weights: Any = model
    if name == LLAMA:
        one = np.float32(1)
        weights = {leaf: np.broadcast_to(one, s) for leaf, s in groups.shapes.items()}
    seconds: dict[str, list[float]] = {}
    for _ in range(1 if name == LLAMA else _REPEATS):
        found = _timed(seconds, "groups", lambda: tpp.channel_groups(model, example))
        plan = _timed(seconds, "plan", lambda g=found: tpp.make_plan(g, weights, 0.5))
        _timed(seconds, "prune", lambda p=plan: tpp.prune(model, p))
    sizes = jax.tree.leaves(nnx.state(model, nnx.Param))
    each = {job: float(np.median(times)) for job, times in seconds.items()}
    parameters = sum(int(np.prod(leaf.shape)) for leaf in sizes)
    rest = {"parameters": parameters, "found": len(groups), "peak_gib": _peak()}
    print(json.dumps(each | rest))


def _network(name: str) -> nnx.Module:
    def create() -> nnx.Module:
        return tpp.models.create(name, rngs=nnx.Rngs(0))

    # Creating abstract networks is faster only up to some hundred layers: Flax asks
    # tracers for a sharding, and JAX's error message searches all traced operations.
    return create() if name == "cifar_resnet1202" else with_weights(create)


def _timed(seconds: dict[str, list[float]], job: str, call: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = call()
    seconds.setdefault(job, []).append(time.perf_counter() - start)
    return result


# ----------------------------------------------------------------------- the step


class Training:
    """The library's training step of a network on some devices, with its state."""

    def __init__(
        self, name: str, batch: int, devices: list[jax.Device], kind: str = "pmap"
    ) -> None:
        model = tpp.models.create(name, rngs=nnx.Rngs(0))
        shape, classes = model.spec.image_shape, model.spec.num_classes
        draws = np.random.default_rng(0)
        pixels = draws.integers(256, size=(batch, *shape), dtype=np.uint8)
        labels = draws.integers(classes, size=batch, dtype=np.int32)
        each = (0.5,) * shape[-1]
        images = tpp.data.Dataset(pixels, labels, pixels, labels, classes, each, each)
        task = ImageClassification(images, batch_size=batch, crop_padding=4, flip=True)
        feed = task.feed(devices)
        feed.begin(jax.random.key(1), 0)
        tx = sgd(1e-3, momentum=0.9, weight_decay=5e-4)
        config, select = steps.StepConfig(), feed.train_batch
        graphdef = structure_of(model, training=True)
        axis = parallel.axis_name(devices)
        step = steps.make_train_step(graphdef, tx, task.loss, config, select, axis)
        params, stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
        state = steps.TrainState(jax.numpy.int32(0), params, stats, tx.init(params))
        self.program = parallel.on_devices(step, devices, donate=0, api=kind)
        self.state, key = parallel.replicate((state, jax.random.key(0)), devices)
        self.arguments = key, *feed.train_data(0)

    def time(self) -> float:
        """Runs one step to its end; returns its seconds."""
        start = time.perf_counter()
        self.state, metrics = self.program(self.state, *self.arguments)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start


def _compiling() -> dict[str, Any]:
    rows: dict[str, Any] = {}
    _table("trace, s", "compile, s", "its MiB", "peak GiB")
    for kind, names in (("compile", COMPILED), ("rolled", ROLLED)):
        for name in names:
            row = _answer(kind, name)
            values = (row[each] for each in ("trace", kind, "mebibytes", "peak_gib"))
            _row(f"{name} {kind}", *values)
            if kind == "rolled":
                row = {"rolled": row.pop("rolled"), "rolled_program": row}
            rows.setdefault(name, {}).update(row)
    return rows


def _measure_rolled(name: str) -> None:
    with unittest.mock.patch.object(steps, "roll_blocks", _roll):
        _measure_compiling(name, "rolled")


def _roll(model: nnx.Module) -> None:
    """Rolls blocks on any backend; here they are compiled and not run."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Blocks):
            module.rolled_from = 2


def _measure_compiling(name: str, job: str = "compile") -> None:
    training = Training(name, BATCH, jax.devices()[:1])
    seconds: dict[str, list[float]] = {}
    arguments = training.state, *training.arguments
    lowered = _timed(seconds, "trace", lambda: training.program.lower(*arguments))
    compiled = _timed(seconds, job, lowered.compile)
    found = compiled.memory_analysis()
    size = (found.argument_size_in_bytes + found.temp_size_in_bytes) / 2**20
    each = {job: times[0] for job, times in seconds.items()}
    print(json.dumps(each | {"mebibytes": size, "peak_gib": _peak()}))


def _batches() -> dict[str, Any]:
    trainings = {n: Training(STEPPED, n, jax.devices()[:1]) for n in BATCHES}
    sides = {n: training.time for n, training in trainings.items()}
    seconds = _in_turn(sides)
    _table("step, s", "images/s", "ms per image")
    rows = {}
    for n, times in seconds.items():
        low, middle, high = (float(x) for x in np.percentile(times, (25, 50, 75)))
        rows[str(n)] = {"seconds": middle, "quartiles": [low, high]}
        _row(f"batch {n}", middle, n / middle, 1e3 * middle / n)
    return rows


def _devices() -> dict[str, Any]:
    kinds = {n: ["jit"] if n == 1 else ["pmap", "shard_map"] for n in DEVICES}
    workers = {
        (kind, n): _Worker("devices", str(n), kind, devices=n)
        for n in DEVICES
        for kind in kinds[n]
    }
    seconds = _in_turn({name: worker.time for name, worker in workers.items()})
    for worker in workers.values():
        worker.close()
    _table("step, s", "over one", "25 %", "75 %")
    rows = {}
    for (kind, n), times in seconds.items():
        ratios = np.divide(times, seconds["jit", 1])
        low, ratio, high = (float(x) for x in np.percentile(ratios, (25, 50, 75)))
        name, median = f"{n}, {kind}", float(np.median(times))
        rows[name] = {"seconds": median, "ratio": ratio, "quartiles": [low, high]}
        _row(name, median, ratio, low, high)
    return rows


class _Worker:
    """A process that runs one step for each line that it receives."""

    def __init__(self, *arguments: str, devices: int) -> None:
        flag = f"--xla_force_host_platform_device_count={devices}"
        self._process = subprocess.Popen(
            _child(*arguments),
            env=os.environ | {"XLA_FLAGS": flag},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.time()

    def time(self) -> float:
        """Returns the seconds of a step."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def _serve_steps(n: str, kind: str) -> None:
    devices = jax.devices()
    assert len(devices) == int(n)
    training = Training(STEPPED, BATCH, devices, "pmap" if kind == "jit" else kind)
    for _ in sys.stdin:
        print(training.time(), flush=True)


def _in_turn(sides: dict[Any, Callable[[], float]]) -> dict[Any, list[float]]:
    """Returns the seconds of all rounds by name, without the first two."""
    seconds: dict[Any, list[float]] = {name: [] for name in sides}
    for turn in range(_ROUNDS + 2):
        # The order alternates, so that no side always follows the same side.
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            seconds[name].append(sides[name]())
    return {name: times[2:] for name, times in seconds.items()}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "depth": lambda: _pruning(DEPTHS),
    "width": lambda: _pruning((*WIDTHS, LLAMA)),
    "compile": _compiling,
    "batch": _batches,
    "devices": _devices,
}
CHILDREN: dict[str, Callable[..., None]] = {
    "pruning": _measure_pruning,
    "compile": _measure_compiling,
    "rolled": _measure_rolled,
    "devices": _serve_steps,
}

if __name__ == "__main__":
    main()
