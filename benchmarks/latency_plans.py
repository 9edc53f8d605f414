"""Plans for half of the FLOPs and for half of the time: predicted and measured.

    python -m benchmarks.latency_plans
    python -m benchmarks.latency_plans --networks mobilenet_v2    # one, into the record

The times of each network's layers are measured once (``tpp.latency_table``). Then all
groups are pruned by one ratio, to half of the FLOPs, and to half of the predicted time,
the latter also with counts of channels that are fast on this machine; and to widths
that are drawn at random, far from the networks that the table is fitted to. The pruned
networks are timed in turns: the shortest call of each. Weights are random.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine
from benchmarks.graph import with_weights
from tpp_jax.analysis.latency import forward_call
from tpp_jax.analysis.latency_tables import shortest
from tpp_jax.pruning.memory import activation_bytes

SECONDS = 4.0
"""Least duration of all calls of one network, on average."""

MOST_DRIFT = 0.1
"""Largest change of the machine's speed in a record."""

_DECODER = functools.partial(tpp.models.small_decoder, vocabulary=256)


def _images(batch: int, side: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)


def _tokens(batch: int, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, length), jnp.int32)


def _named(name: str, classes: int) -> nnx.Module:
    return tpp.models.create(name, num_classes=classes, rngs=nnx.Rngs(0))


NETWORKS: Mapping[str, tuple[Callable[[], nnx.Module], Callable[[int], Any], int]] = {
    "cifar_resnet56": (
        lambda: _named("cifar_resnet56", 10),
        lambda batch: _images(batch, 32),
        64,
    ),
    "mobilenet_v2": (
        lambda: _named("mobilenet_v2", 1000),
        lambda batch: _images(batch, 224),
        4,
    ),
    "small_decoder": (
        lambda: _DECODER(nnx.Rngs(0)),
        lambda batch: _tokens(batch, 128),
        8,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=[*NETWORKS])
    options = parser.parse_args()
    file = machine.RESULTS / f"latency_plans_{jax.default_backend()}.json"
    before = json.loads(file.read_text()) if file.exists() else {"networks": {}}
    found = before["networks"]
    for name in options.networks:
        load = machine.load()
        result = measure(*NETWORKS[name]) | {"load_before": load}
        print(table(name, result), flush=True)
        if abs(result["drift"]) > MOST_DRIFT:
            print(f"the machine changed by {result['drift']:+.0%}: not recorded")
        else:
            found[name] = result
    print(machine.write("latency_plans", {"networks": found}))


def measure(
    create: Callable[[], nnx.Module], inputs: Callable[[int], Any], batch: int
) -> dict[str, Any]:
    """Returns the plans of a network, and their predicted and measured times."""
    model = with_weights(create)
    groups = tpp.channel_groups(model, inputs(1))
    start = time.perf_counter()
    times = tpp.latency_table(model, inputs(batch), groups)
    seconds = time.perf_counter() - start
    plans = _plans(groups, model, times)
    networks = {name: tpp.prune(model, plan) for name, plan in plans.items()}
    x = jnp.zeros(inputs(batch).shape, inputs(batch).dtype)
    calls = [forward_call(network, [x], "float32") for network in networks.values()]
    measured = dict(zip(networks, shortest(calls, SECONDS), strict=True))
    rows = {}
    for name, network in networks.items():
        count = tpp.count(network, inputs(1))
        kept = {g.name: plans[name].kept_count(g) for g in groups}
        rows[name] = {
            "predicted_seconds": times.seconds(kept),
            "measured_seconds": measured[name],
            "flops": count.flops,
            "params": count.params,
            "kept": {g.name: kept[g.name] for g in plans[name].pruned_groups},
        }
    return {
        "batch": batch,
        "drift": measured["dense"] / times.dense_seconds - 1,
        "seconds_for_table": seconds,
        "points": sum(len(shape.seconds) for shape in times.shapes),
        "weights": times.weights,
        "fitted": [
            {
                "measured_seconds": network.seconds,
                "predicted_seconds": times.seconds(
                    dict(zip(times.groups, network.counts, strict=True))
                ),
            }
            for network in times.measured
        ],
        "plans": rows,
        "memory": {
            "dense": _memory(model, inputs(batch)),
            "memory=0.5": _memory(
                tpp.prune(model, tpp.make_plan(groups, model, memory=0.5)),
                inputs(batch),
            ),
        },
    }


def _memory(model: nnx.Module, x: jax.ShapeDtypeStruct) -> dict[str, int]:
    """Returns the peak by the jaxpr, and XLA's for the compiled evaluation."""
    evaluated = nnx.clone(model)
    evaluated.eval()
    graphdef, state = nnx.split(evaluated)
    call = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    found = call.lower(state, x).compile().memory_analysis()
    temporary = found.temp_size_in_bytes + found.output_size_in_bytes
    return {"activation_bytes": activation_bytes(model, x), "xla_bytes": temporary}


def _plans(
    groups: tpp.Groups, model: nnx.Module, times: tpp.LatencyTable
) -> dict[str, tpp.Plan]:
    of = functools.partial(tpp.make_plan, groups, model)
    half = {"latency": 0.5, "table": times}
    draws = np.random.default_rng(0)

    def random() -> tpp.Plan:
        shares = {g.name: draws.uniform(0.2, 0.8) for g in groups}
        prunable = [g for g in groups if g.reason is None and not g.inner]
        return of(counts={g.name: round(shares[g.name] * g.size) for g in prunable})

    return {
        "dense": of(0),
        "flops=0.5": of(flops=0.5),
        "latency=0.5": of(**half),
        'latency=0.5, round_to="fast"': of(**half, round_to="fast"),
        'flops=0.5, round_to="fast"': of(flops=0.5, round_to="fast", table=times),
        "random widths 1": random(),
        "random widths 2": random(),
    }


def table(name: str, found: Mapping[str, Any]) -> str:
    """Returns the plans of a network as rows of a table in Markdown."""
    dense = found["plans"]["dense"]
    lines = [
        f"{name}, batch {found['batch']}; table in {found['seconds_for_table']:.0f} s, "
        f"{found['points']} points",
        "| plan | predicted | measured | error | of the dense time | FLOPs | params |",
        "|---|---|---|---|---|---|---|",
    ]
    for plan, row in found["plans"].items():
        predicted, measured = row["predicted_seconds"], row["measured_seconds"]
        cells = [f"{1e3 * predicted:.1f} ms", f"{1e3 * measured:.1f} ms"]
        cells += [f"{predicted / measured - 1:+.0%}"]
        cells += [f"{measured / dense['measured_seconds']:.0%}"]
        cells += [f"{row[key] / dense[key]:.0%}" for key in ("flops", "params")]
        lines.append(f"| `{plan}` | " + " | ".join(cells) + " |")
    before, after = found["memory"].values()
    lines += [f"memory=0.5: {key} {before[key]:,} → {after[key]:,}" for key in before]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
