"""Finding coupled channels and pruning by half, compared with Torch-Pruning.

    python -m benchmarks.graph

There are two jobs on ResNet-50 and -152, DenseNet-121, MobileNetV2, ViT-B/16 and
ConvNeXt-T, at 224×224 pixels. *groups* leads from a model to its groups of coupled
channels. *prune* leads from a model with weights to one with half of every group's
channels, chosen by L1. Our side includes two steps that only it has: the model is tried
with fewer channels, and the groups of the pruned model are compared with the plan.

Each network has a process of its own, in which both sides alternate, so that other load
of the machine affects both in the same way. *Cold* is the first call in that process.
The other times are medians, and the ratio is the median over pairs of neighbouring
calls. The last measurement is the groups of a Llama of 7 billion parameters, from
abstract shapes, with the peak memory of the process.

The peer needs PyTorch; without it only our side is measured.
"""

import argparse
import functools
import gc
import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine
from benchmarks.architectures import ConvNeXt, DenseNet, Llama, LlamaShape

SIDE = 224
RATIO = 0.5
LLAMA = "llama_7b"

_IMAGES = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), np.float32)
_TOKENS = 128


def _named(name: str) -> nnx.Module:
    return tpp.models.create(name, num_classes=1000, rngs=nnx.Rngs(0))


NETWORKS: dict[str, Callable[[], nnx.Module]] = {
    "resnet50": functools.partial(_named, "resnet50"),
    "resnet152": functools.partial(_named, "resnet152"),
    "densenet121": lambda: DenseNet(rngs=nnx.Rngs(0)),
    "mobilenet_v2": functools.partial(_named, "mobilenet_v2"),
    "vit_b_16": functools.partial(_named, "vit_b_16"),
    "convnext_tiny": lambda: ConvNeXt(rngs=nnx.Rngs(0)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--networks", nargs="*", default=[*NETWORKS, LLAMA])
    parser.add_argument("--child", help="measure one network, print it as JSON")
    options = parser.parse_args()
    if options.child == LLAMA:
        print(json.dumps(_llama()))
        return
    if options.child:
        print(json.dumps(_network(options.child, options.repeats)))
        return

    if missing := _missing():
        names = ", ".join(missing)
        print(f"Ours alone: cannot import {names}. To have the peer too:")
        print("  pip install torch torchvision 'torch-pruning==1.6.*'\n")
    print(f"{'':<22} {'cold, seconds':>19} {'median, seconds':>19}")
    print(f"{'network':<14} {'job':<7}" + f" {'ours':>9} {'peer':>9}" * 2 + "    ratio")
    load = _load()
    results: dict[str, Any] = {}
    for name in options.networks:
        results[name] = _measured_apart(name, options.repeats)
        _show(name, results[name])
    record: dict[str, Any] = {"repeats": options.repeats, "load": [load, _load()]}
    if not missing:
        from benchmarks.peers import torch_pruning_graph

        record["peer"] = torch_pruning_graph.versions()
    if results.keys() == {*NETWORKS, LLAMA}:
        print(machine.write("graph", record | {"networks": results}))


def _load() -> float:
    """Returns the mean number of runnable processes in the last minute.

    Other load slows the peer down more than our side, because its threads wait for one
    another. A record should therefore come from an idle machine.
    """
    return round(os.getloadavg()[0], 2)


def _missing() -> list[str]:
    """Returns the packages of the peer that are not installed."""
    packages = ("torch", "torchvision", "torch_pruning")
    return [name for name in packages if importlib.util.find_spec(name) is None]


def _measured_apart(name: str, repeats: int) -> dict[str, Any]:
    """Measures one network in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.graph"]
    command += ["--child", name, "--repeats", str(repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


class Job(NamedTuple):
    """Work to be timed: ``run(prepare())``, without the preparation."""

    prepare: Callable[[], Any]
    run: Callable[[Any], int]


def _network(name: str, repeats: int) -> dict[str, Any]:
    model = with_weights(NETWORKS[name])
    ours = {"groups": Job(lambda: model, _groups), "prune": Job(lambda: model, _prune)}
    if not _missing():
        from benchmarks.peers.torch_pruning_graph import Peer

        peer = Peer(name, SIDE)
        theirs = {
            "groups": Job(peer.copy, peer.groups),
            "prune": Job(peer.copy, lambda model: peer.prune(model, RATIO)),
        }
        sides = {job: {"ours": ours[job], "peer": theirs[job]} for job in ours}
    else:
        sides = {job: {"ours": ours[job]} for job in ours}
    return {job: _in_turn(pair, repeats) for job, pair in sides.items()}


def _groups(model: nnx.Module) -> int:
    """Finds the groups and returns their number."""
    return len(tpp.channel_groups(model, _IMAGES))


def _prune(model: nnx.Module) -> int:
    """Prunes every group by half (heads, not their dimensions); returns the rest."""
    groups = tpp.channel_groups(model, _IMAGES)
    plan = tpp.make_plan(groups, model, RATIO)
    return _parameters(tpp.prune(model, plan))


def _parameters(model: nnx.Module) -> int:
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def with_weights(create: Callable[[], nnx.Module]) -> nnx.Module:
    """Returns the network of ``create``, with arrays filled by NumPy.

    Compiling JAX's generator for every shape would take longer than the benchmark.
    """
    graphdef, state = nnx.split(nnx.eval_shape(create))
    draws = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(draws.uniform(0.1, 1.0, leaf.shape), leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map(draw, state))


def _in_turn(sides: dict[str, Job], repeats: int) -> dict[str, Any]:
    """Times both sides alternately.

    Returns:
      For each side the seconds of its first call and the median of the others, and what
      the job returned; with two sides also the ratio, and its quartiles.
    """
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    returned = {}
    for turn in range(repeats + 1):
        # The order alternates, so that each side is first in half of the pairs.
        for side in sides if turn % 2 else reversed(sides):
            model = sides[side].prepare()
            gc.collect()
            start = time.perf_counter()
            returned[side] = sides[side].run(model)
            seconds[side].append(time.perf_counter() - start)
    found: dict[str, Any] = {
        side: {"cold": cold, "median": float(np.median(warm)), "found": returned[side]}
        for side, (cold, *warm) in seconds.items()
    }
    if "peer" in sides:
        ratios = np.divide(seconds["ours"][1:], seconds["peer"][1:])
        low, ratio, high = np.percentile(ratios, (25, 50, 75)).tolist()
        found |= {"ratio": ratio, "ratio_quartiles": [low, high]}
    return found


def _llama() -> dict[str, Any]:
    model = nnx.eval_shape(lambda: Llama(LlamaShape(), rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((1, _TOKENS), np.int32)
    start = time.perf_counter()
    groups = tpp.channel_groups(model, tokens)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "parameters": _parameters(model),
        "groups": len(groups),
        "cold": seconds,
        "peak_gib": peak / 2**30,
    }


def _show(name: str, result: dict[str, Any]) -> None:
    if name == LLAMA:
        print(
            f"{name}: {result['groups']} groups of {result['parameters']:,} parameters "
            f"in {result['cold']:.2f} s, peak memory {result['peak_gib']:.2f} GiB"
        )
        return
    for job, found in result.items():
        row = [f"{name:<14} {job:<7}"]
        for column in ("cold", "median"):
            for side in ("ours", "peer"):
                value = found.get(side, {}).get(column)
                row.append(f"{'-' if value is None else f'{value:.3f}':>9}")
        row.append(f"{found['ratio']:>8.2f}" if "ratio" in found else f"{'-':>8}")
        print(" ".join(row), flush=True)


if __name__ == "__main__":
    main()
