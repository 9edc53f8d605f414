"""How much of the speedup in FLOPs is realised as a speedup in time.

    python -m benchmarks.pruned_speed

Dense and pruned networks with random weights are evaluated in one process, alternating:
at batch 1 and at a large batch; with the paper's ratios, and with the numbers of
channels rounded up to multiples of eight. ``launch.py --mode=profile`` measures the
networks of a run in the same way, layer by layer. "Realised" is the speedup in time
divided by the speedup in FLOPs here, as when the results were recorded; in
``--mode=profile`` it is the time saved divided by the FLOPs saved.
"""

import argparse
import fnmatch
import functools

import jax
import jax.numpy as jnp
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine
from benchmarks.graph import with_weights
from tpp_jax.analysis.latency import Pair, as_json, compare

_BOTTLENECKS = "*layer[123]*.conv[12]:0.6,*layer4*.conv[12]:0.21"
CASES = (
    ("cifar_resnet56", "*layer*.conv1:0.5", ""),
    ("cifar_resnet56", "*layer*.conv1:0.9", ""),
    ("cifar_vgg19", "*features*:0.5", "features.0"),
    ("resnet50", _BOTTLENECKS, ""),
)
_COLUMNS = "dense, ms", "pruned, ms", "faster", "FLOPs", "realised"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--imagenet_batch_size", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--networks", default="*", help="pattern of their names")
    options = parser.parse_args()
    title = "network, ratios, rounding, batch"
    print(f"{title:<64}" + "".join(f"{column:>12}" for column in _COLUMNS))
    results = {}
    for name, ratios, skip in CASES:
        if not fnmatch.fnmatchcase(name, options.networks):
            continue
        dense = with_weights(functools.partial(_create, name))
        shape = dense.spec.image_shape
        example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        groups = tpp.channel_groups(dense, example)
        large = options.imagenet_batch_size if shape[0] > 64 else options.batch_size
        for round_to in (1, 8):
            plan = tpp.make_plan(groups, dense, ratios, skip=skip, round_to=round_to)
            pruned = tpp.prune(dense, plan)
            for batch in (1, large):
                pair = compare(dense, pruned, [example], batch, options.dtype)
                row = f"{name}, {ratios}, {round_to}, {batch}"
                results[row] = pair
                print(
                    f"{row:<64}{1e3 * pair.dense_seconds:>12.2f}"
                    f"{1e3 * pair.pruned_seconds:>12.2f}{pair.speedup:>12.2f}"
                    f"{pair.flops_speedup:>12.2f}{_realised(pair):>12.0%}",
                    flush=True,
                )
    half = "" if options.dtype == "float32" else f"_{options.dtype}"
    rows = as_json(results)
    for row, pair in results.items():
        rows[row]["realised"] = _realised(pair)
    print(machine.write(f"pruned_speed{half}", {"rows": rows}))


def _realised(pair: Pair) -> float:
    return pair.speedup / pair.flops_speedup


def _create(name: str) -> nnx.Module:
    return tpp.models.create(name, rngs=nnx.Rngs(0))


if __name__ == "__main__":
    main()
