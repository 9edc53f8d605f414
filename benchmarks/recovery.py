"""Cost of input moments and of compensation, compared with plain forward passes.

    python -m benchmarks.recovery

*Moments* is the time that ``input_moments`` takes for one batch, of all groups, once it
is compiled; with all covariances (full) and with variances alone (diagonal). Before
each batch, the same process runs a plain compiled forward pass over it, and one with
the package's convolutions for the CPU, which ``input_moments`` uses as well (fast). So
other load of the machine affects all in the same way. Ratios are medians over batches,
of processor time. *Compensate* is the time to prune all groups by half and to refit
what reads them, from moments that were measured before; it is compared with the number
of examples whose forward pass takes as long.

Peak memory is that of the process while it runs forward passes, and during the complete
call of ``input_moments``, with compilation. Each network and mode has a process of its
own. Results are written after each of them to ``results/recovery_cpu.json``; those that
are there are not measured again.
"""

import argparse
import ctypes
import functools
import gc
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine
from benchmarks.architectures import Llama, LlamaShape
from tpp_jax.xla.convolution import use_fast_convolutions

MODES = "full", "diagonal"
FILE = machine.RESULTS / "recovery_cpu.json"
_STATUS = pathlib.Path("/proc/self/status")
_CLEAR = pathlib.Path("/proc/self/clear_refs")
# Sizes of SmolLM2-135M, with fewer layers and tokens.
_LLAMA = LlamaShape(6, 576, 9, 3, 1536, 4096)


class Case(NamedTuple):
    """A network with the shape of a batch; integers are drawn below ``tokens``."""

    create: Callable[[], nnx.Module]
    shape: tuple[int, ...]
    tokens: int = 0


def _named(name: str, classes: int = 1000) -> Callable[[], nnx.Module]:
    return lambda: tpp.models.create(name, num_classes=classes, rngs=nnx.Rngs(0))


CASES = {
    "resnet50": Case(_named("resnet50"), (8, 224, 224, 3)),
    "mobilenet_v2": Case(_named("mobilenet_v2"), (8, 224, 224, 3)),
    "vit_s_16": Case(_named("vit_s_16"), (8, 224, 224, 3)),
    "cifar_resnet56": Case(_named("cifar_resnet56", 10), (128, 32, 32, 3)),
    "cifar_vgg19": Case(_named("cifar_vgg19", 100), (128, 32, 32, 3)),
    "mlp7_relu": Case(_named("mlp7_relu", 10), (1024, 32, 32, 1)),
    "llama": Case(lambda: Llama(_LLAMA, rngs=nnx.Rngs(0)), (4, 256), 4096),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=7)
    parser.add_argument("--networks", nargs="*", default=list(CASES))
    parser.add_argument("--child", nargs=2, help="measure one, print it as JSON")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_measure(*options.child, options.batches)))
        return
    columns = "forward, s", "fast, s", "moments, s", "ratio", "to fast"
    columns += "GiB", "GiB", "refit, s", "examples"
    print(f"{'network':<16}{'':<10}" + "".join(f"{name:>12}" for name in columns))
    record = json.loads(FILE.read_text()) if FILE.exists() else {"networks": {}}
    for name, mode in itertools.product(options.networks, MODES):
        found = record["networks"].setdefault(name, {})
        if mode not in found:
            load = machine.load()
            measured = _apart(name, mode, options.batches)
            cores = len(os.sched_getaffinity(0))
            found[mode] = measured | {"load": load, "cores_used": cores}
            machine.write("recovery", record)
        _show(name, mode, found[mode])


def _apart(name: str, mode: str, batches: int) -> dict[str, Any]:
    """Measures one network and mode in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.recovery"]
    command += ["--child", name, mode, "--batches", str(batches)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(name: str, mode: str, n: int) -> dict[str, Any]:
    case = CASES[name]
    model = _with_weights(case.create)
    model.eval()
    graphdef, state = nnx.split(model)

    def call(state: nnx.State, x: jax.Array, fast: bool) -> jax.Array:
        merged = nnx.merge(graphdef, state)
        if fast:
            use_fast_convolutions(merged)
        return merged(x)

    compiled = jax.jit(call, static_argnames="fast")
    forward, fast = (functools.partial(compiled, state, fast=x) for x in (False, True))
    batches = [_draw(case, seed) for seed in range(n + 1)]
    for batch in batches[:2]:
        jax.block_until_ready([forward(batch), fast(batch)])
    groups = tpp.channel_groups(model, batches[0])
    _reset_peak()
    times: dict[str, list[float]] = {"forward": [], "fast": [], "moments": []}
    each = _timed(batches, {"forward": forward, "fast": fast}, times)
    forward(batches[0]).block_until_ready()
    peak = {"forward": _peak()}
    _reset_peak()
    moments = tpp.input_moments(model, each, groups=groups, diagonal=mode == "diagonal")
    peak["moments"] = _peak()
    plain, quick, ours = (np.array(some[1:]) for some in times.values())
    found = {
        "shape": list(case.shape),
        "batches": n,
        "consumers": len(moments.consumers),
        "largest": max(len(entry.features) for entry in moments.consumers),
        "forward_seconds": float(np.median(plain)),
        "fast_forward_seconds": float(np.median(quick)),
        "moments_seconds": float(np.median(ours)),
        "first_batch_seconds": times["moments"][0],
        "ratio": float(np.median(ours / plain)),
        "ratio_to_fast": float(np.median(ours / quick)),
        "peak_gib": peak,
    }
    if mode == "full":
        found["compensate"] = _compensated(model, groups, moments)
        seconds = found["compensate"]["seconds"] / found["forward_seconds"]
        found["compensate"]["examples"] = seconds * case.shape[0]
    return found


def _with_weights(create: Callable[[], nnx.Module]) -> nnx.Module:
    """Returns a network of random weights, through which values keep their scale."""
    graphdef, state = nnx.split(nnx.eval_shape(create))
    draws = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if len(leaf.shape) < 2:
            return jnp.asarray(draws.uniform(0.5, 1.0, leaf.shape), leaf.dtype)
        scale = (2 / np.prod(leaf.shape[:-1])) ** 0.5
        return jnp.asarray(draws.normal(scale=scale, size=leaf.shape), leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map(draw, state))


def _draw(case: Case, seed: int) -> jax.Array:
    rng = np.random.default_rng(seed)
    if case.tokens:
        return jnp.asarray(rng.integers(case.tokens, size=case.shape), jnp.int32)
    return jnp.asarray(rng.normal(size=case.shape), jnp.float32)


def _timed(
    batches: list[jax.Array],
    passes: dict[str, Callable[[jax.Array], jax.Array]],
    times: dict[str, list[float]],
) -> Iterator[jax.Array]:
    """Yields batches; notes the time of forward passes and of what is done with each.

    ``input_moments`` asks for a batch when it is done with the one before.
    """
    for batch in batches:
        for name, forward in passes.items():
            start = time.process_time()
            forward(batch).block_until_ready()
            times[name].append(time.process_time() - start)
        start = time.process_time()
        yield batch
        times["moments"].append(time.process_time() - start)


def _compensated(
    model: nnx.Module, groups: tpp.Groups, moments: tpp.Moments
) -> dict[str, float]:
    plan = tpp.make_plan(groups, model, 0.5)
    _reset_peak()
    start = time.process_time()
    with warnings.catch_warnings():  # of few rows: the batches are few
        warnings.simplefilter("ignore", UserWarning)
        tpp.compensate(model, plan, moments=moments)
    return {"seconds": time.process_time() - start, "peak_gib": _peak()}


def _reset_peak() -> None:
    """Resets the peak memory of the process to what it uses now (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")


def _peak() -> float:
    [row] = [row for row in _STATUS.read_text().splitlines() if "VmHWM" in row]
    return int(row.split()[1]) / 2**20


def _show(name: str, mode: str, found: dict[str, Any]) -> None:
    refit = found.get("compensate", {"seconds": np.nan, "examples": np.nan})
    fast, to_fast = (
        found.get(key, np.nan) for key in ("fast_forward_seconds", "ratio_to_fast")
    )
    print(
        f"{name:<16}{mode:<10}{found['forward_seconds']:>12.3f}{fast:>12.3f}"
        f"{found['moments_seconds']:>12.3f}{found['ratio']:>12.2f}{to_fast:>12.2f}"
        f"{found['peak_gib']['forward']:>12.2f}{found['peak_gib']['moments']:>12.2f}"
        f"{refit['seconds']:>12.2f}{refit['examples']:>12.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
