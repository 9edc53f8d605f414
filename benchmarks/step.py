"""The training step: plain, with TPP's penalties, and compared with PyTorch's.

    python -m benchmarks.step --model=cifar_resnet56 --batch_size=128

All sides crop, flip and normalise images that are on the device, differentiate the loss
and update by SGD. They alternate in one process, so that other load of the machine
affects all sides in the same way. A ratio is the median over the rounds of the ratios
of neighbouring steps, with quartiles.

- ``plain`` and ``tpp`` are the library's own steps; the penalized one is in the middle
  of the regularize phase, with all penalties active.
- ``defaults`` (on a CPU) is the plain step compiled with XLA's default options, so that
  YNNPACK computes the convolutions; ``lax`` in addition has XLA's own convolutions in
  place of those of tpp_jax/xla/convolution.py.
- ``torch`` and ``torch tpp`` are PyTorch's, with ``--compiled`` also through
  ``torch.compile``. Without PyTorch only our sides are measured.

On a GPU several steps run per dispatch, as in a run; ``--half`` computes in bfloat16.
``--ours`` measures only ``plain`` and ``tpp``: the cost of the penalties, in many
rounds and without the threads of other sides in between.

Each time is printed with the rate of the FLOPs of convolutions and dense layers, which
are three times those of an evaluation, and its share of the machine's limit: the rate
of a large matrix product in the same precision, which is measured in the same rounds.

Set GLIBC_TUNABLES=glibc.malloc.hugetlb=1 to allocate memory as launch.py does.
"""

import argparse
import contextlib
import importlib.util
import os
import time
import unittest.mock
from collections.abc import Callable

import jax
import numpy as np
import optax
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine
from tpp_jax.training import parallel
from tpp_jax.training import step as steps
from tpp_jax.training.classification import ImageClassification
from tpp_jax.training.optimizers import sgd
from tpp_jax.training.structure import structure_of

_PRODUCT = "matrix product"
_PRODUCT_SIZE = 2048 if jax.default_backend() == "cpu" else 16384
_PRODUCT_FLOPS = 2 * _PRODUCT_SIZE**3
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_COMPARED = (
    ("tpp", "plain"),
    ("plain", "defaults"),
    ("plain", "lax"),
    ("plain", "torch"),
    ("tpp", "torch tpp"),
    ("plain", "torch compiled"),
    ("torch tpp", "torch"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cifar_resnet56")
    parser.add_argument("--ratios", default="*layer*.conv1:0.9")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--ours", action="store_true")
    options = parser.parse_args()

    with contextlib.suppress(AttributeError):
        load = os.getloadavg()[0]
    sides, mebibytes, flops = _sides(options)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.rounds):
        # The order alternates, so that no side always follows the same side.
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            seconds[name].append(sides[name]())
    result = {
        "model": options.model,
        "pruned": options.ratios,
        "batch_size": options.batch_size,
        "precision": "bfloat16" if options.half else "float32",
        "rounds": options.rounds,
        "load": round(load, 2),
        "seconds": {name: float(np.median(times)) for name, times in seconds.items()},
        "mebibytes": mebibytes,
        "gflops": flops / 1e9,
        "utilisation": {},
        "ratios": {},
    }
    if "torch" in sides:
        from benchmarks.peers import torch_step

        result["peer"] = torch_step.describe()
    limit = _PRODUCT_FLOPS / result["seconds"][_PRODUCT]
    print(f"{_PRODUCT:<16} {limit / 1e9:9.1f} GFLOP/s: the limit")
    for name in list(sides)[1:]:
        rate = flops / result["seconds"][name]
        result["utilisation"][name] = rate / limit
        memory = f"{mebibytes[name]:9.1f} MiB" if name in mebibytes else ""
        print(
            f"{name:<16} {result['seconds'][name]:9.4f} s {rate / 1e9:9.1f} GFLOP/s "
            f"{rate / limit:6.1%} {memory}"
        )
    for side, other in _COMPARED:
        if {side, other} <= seconds.keys():
            each = np.divide(seconds[side], seconds[other])
            low, ratio, high = (float(x) for x in np.percentile(each, (25, 50, 75)))
            result["ratios"][f"{side} / {other}"] = [ratio, low, high]
            print(f"{side + ' / ' + other:<26} {ratio:7.3f}   ({low:.3f}–{high:.3f})")
    name = "cost" if options.ours else "step"
    half = "_bfloat16" if options.half else ""
    print(machine.write(f"{name}_{options.model}{half}", result))


def _sides(
    options: argparse.Namespace,
) -> tuple[dict[str, Callable[[], float]], dict[str, float], float]:
    """Returns functions by name that run a step, or the matrix product, to its end and
    return its seconds; the memory of our programs in MiB, including state and images;
    and the FLOPs of a step.
    """
    model = tpp.models.create(options.model, rngs=nnx.Rngs(0))
    shape = model.spec.image_shape
    groups = tpp.channel_groups(model, jax.ShapeDtypeStruct((1, *shape), np.float32))
    flops = 3.0 * options.batch_size * tpp.count(model, groups.inputs[0]).flops
    plan = tpp.make_plan(groups, model, options.ratios)
    schedule = tpp.growing_schedule()
    plain = sgd(1e-3, momentum=0.9, weight_decay=5e-4)
    penalized = optax.chain(
        tpp.add_tpp_penalties(plan, schedule), plain, tpp.zero_pruned(plan, schedule)
    )
    draws = np.random.default_rng(0)
    count = 2 * options.batch_size
    pixels = draws.integers(256, size=(count, *shape), dtype=np.uint8)
    labels = draws.integers(10, size=count, dtype=np.int32)
    classes = model.spec.num_classes
    images = tpp.data.Dataset(pixels, labels, pixels, labels, classes, _MEAN, _STD)
    ours = {
        "plain": _Ours(model, plain, images, options),
        "tpp": _Ours(model, penalized, images, options),
    }
    if jax.default_backend() == "cpu" and not options.ours:
        untouched = unittest.mock.patch.object(steps, "use_fast_convolutions")
        no_options = unittest.mock.patch.object(parallel, "compiler_options", dict)
        with no_options:  # while the step is compiled
            ours["defaults"] = _Ours(model, plain, images, options)
            with untouched:
                ours["lax"] = _Ours(model, plain, images, options)
    sides: dict[str, Callable[[], float]] = {_PRODUCT: _matrix_product(options.half)}
    sides |= {name: x.time for name, x in ours.items()}
    if importlib.util.find_spec("torch") and not options.ours:
        from benchmarks.peers.torch_step import Peer

        pruned = {g.name: plan.pruned(g.name) for g in plan.pruned_groups}
        given = options.model, pixels, labels, options.batch_size
        peers = {
            "torch": Peer(*given, {}, half=options.half),
            "torch tpp": Peer(*given, pruned, half=options.half),
        }
        if options.compiled:
            peers["torch compiled"] = Peer(*given, {}, compiled=True, half=options.half)
        at_once = _at_once()
        for name, peer in peers.items():
            sides[name] = lambda peer=peer: _timed(peer, at_once)
            sides[name]()
            sides[name]()
    return sides, {name: x.mebibytes for name, x in ours.items()}, flops


def _matrix_product(half: bool) -> Callable[[], float]:
    """Returns a function that multiplies two large matrices and returns its seconds."""
    dtype = jax.numpy.bfloat16 if half else jax.numpy.float32
    matrix = jax.numpy.ones((_PRODUCT_SIZE, _PRODUCT_SIZE), dtype)
    product = jax.jit(lambda a, b: a @ b)

    def time_it() -> float:
        start = time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        return time.perf_counter() - start

    time_it()
    return time_it


def _at_once() -> int:
    return 1 if jax.default_backend() == "cpu" else 20


def _timed(peer: "object", at_once: int) -> float:
    start = time.perf_counter()
    for _ in range(at_once):
        peer.step()
    peer.wait()
    return (time.perf_counter() - start) / at_once


class _Ours:
    """One compiled step, with its state."""

    def __init__(
        self,
        model: nnx.Module,
        tx: optax.GradientTransformation,
        images: tpp.data.Dataset,
        options: argparse.Namespace,
    ) -> None:
        dtype = "bfloat16" if options.half else "float32"
        task = ImageClassification(
            images,
            batch_size=options.batch_size,
            crop_padding=4,
            flip=True,
            dtype=dtype,
        )
        feed = task.feed(jax.devices()[:1])
        feed.begin(jax.random.key(1), 0)
        config = steps.StepConfig(dtype)
        graphdef = structure_of(model, training=True)
        step = steps.make_train_step(graphdef, tx, task.loss, config, feed.train_batch)
        params, stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
        state = steps.TrainState(jax.numpy.int32(0), params, stats, tx.init(params))
        self._arguments = feed.train_data(0)
        self._state = jax.tree.map(jax.numpy.copy, state)
        self._at_once = _at_once()
        program = steps.make_train_steps(step, loop=self._at_once > 1)
        arguments = self._state, jax.random.key(0), np.int32(0), *self._arguments
        jitted = parallel.on_devices(program, jax.devices()[:1], donate=0)
        self._program = jitted.lower(*arguments).compile()
        found = self._program.memory_analysis()
        self.mebibytes = (
            found.argument_size_in_bytes + found.temp_size_in_bytes
        ) / 2**20
        for _ in range(2):
            self.time()

    def time(self) -> float:
        """Runs one dispatch to its end; returns seconds per step."""
        start = time.perf_counter()
        n = np.int32(self._at_once)
        key = jax.random.key(0)
        self._state, metrics = self._program(self._state, key, n, *self._arguments)
        jax.block_until_ready((self._state, metrics))
        return (time.perf_counter() - start) / self._at_once


if __name__ == "__main__":
    main()
