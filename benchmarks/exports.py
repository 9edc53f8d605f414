"""Exports of networks of many kinds, dense and pruned: differences and refusals.

    python -m benchmarks.exports
    python -m benchmarks.exports --networks='ViT*'
    python -m benchmarks.exports --table

Each network of ``tpp_jax.models`` (one of each family) and of the tests' gallery, with
random weights, is exported as StableHLO and as ONNX, dense and pruned by a random plan
of 40 % of the channels of each group. The file is run by its runtime and compared with
the network. Results are kept in ``results/exports_cpu.json``; those that are there
already are not measured again. ``--table`` prints the table of docs/export.md.
"""

import argparse
import fnmatch
import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import tpp_jax as tpp
from benchmarks import machine
from tests.gallery import convnet_groups, others, transformers
from tests.reference import filled

FILE = machine.RESULTS / "exports_cpu.json"
FORMATS = "stablehlo", "onnx"
# One of each family of tpp_jax.models, with the shape of its images.
FAMILIES = {
    "cifar_resnet20": (32, 32, 3),
    "cifar_wrn16_1": (32, 32, 3),
    "cifar_vgg11": (32, 32, 3),
    "cifar_mobilenet_v2": (32, 32, 3),
    "mlp7_relu": (32, 32, 1),
    "lenet5": (32, 32, 1),
    "resnet18": (64, 64, 3),
    "resnet50": (64, 64, 3),
    "vgg11_bn": (224, 224, 3),
    "mobilenet_v2": (64, 64, 3),
    "efficientnet_lite0": (64, 64, 3),
    "vit_s_16": (64, 64, 3),
}
# Their inputs are no batch: the first axis has nodes and edges.
GRAPHS = "GCN", "message passing"


class Network(NamedTuple):
    """A network with its parameters, if they are apart, and abstract inputs."""

    model: Any
    params: Any
    inputs: tuple[Any, ...]


def networks() -> dict[str, Callable[[], Network]]:
    """Returns a function that makes each network, by name."""
    found: dict[str, Callable[[], Network]] = {}

    def add(name: str, create: Callable[[], Any], inputs: tuple[Any, ...]) -> None:
        found[name] = lambda: Network(filled(create), None, inputs)

    for name, shape in FAMILIES.items():
        images = (jax.ShapeDtypeStruct((2, *shape), jnp.float32),)
        add(
            name,
            lambda name=name, shape=shape: tpp.models.create(
                name, image_shape=shape, rngs=nnx.Rngs(0)
            ),
            images,
        )
    tokens = (jax.ShapeDtypeStruct((2, 16), jnp.int32),)
    add("decoder", lambda: tpp.models.small_decoder(rngs=nnx.Rngs(0)), tokens)
    for name, (create, shape, _) in convnet_groups.NETWORKS.items():
        images = (jax.ShapeDtypeStruct(shape, jnp.float32),)
        if issubclass(getattr(create, "func", create), linen.Module):
            found[name] = lambda c=create, x=images: _linen(c(), x)
        else:
            add(name, lambda create=create: create(rngs=nnx.Rngs(0)), images)
    for name, (create, inputs) in {**transformers.MODELS, **others.MODELS}.items():
        add(name, lambda create=create: create(rngs=nnx.Rngs(0)), inputs)
    for name, (function, params, inputs) in others.FUNCTIONS.items():
        found[name] = lambda f=function, p=params, x=inputs: Network(f, _drawn(p), x)
    return found


def _linen(model: linen.Module, inputs: tuple[Any, ...]) -> Network:
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return Network(model, _drawn(variables), inputs)


def _drawn(tree: Any) -> Any:
    draws = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        spread = 1 / np.sqrt(np.prod(leaf.shape[:-1]))
        array = draws.normal(size=leaf.shape) * spread
        return jnp.asarray(np.abs(array) if len(leaf.shape) == 1 else array, leaf.dtype)

    return jax.tree.map(draw, tree)


def measure(name: str, network: Network) -> dict[str, Any]:
    """Returns what came of the exports of a network, dense and pruned."""
    model, params, inputs = network
    groups = tpp.channel_groups(model, *inputs, params=params)
    plan = tpp.make_plan(groups, params or model, 0.4, criterion="random")
    found: dict[str, Any] = {}
    for kind in ("dense", "pruned"):
        if kind == "pruned":
            model, params = _pruned(network, plan)
        for suffix in FORMATS:
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder, f"net.{suffix}")
                try:
                    checked = tpp.export(
                        model,
                        path,
                        *inputs,
                        params=params,
                        dynamic_batch=name not in GRAPHS,
                    )
                except tpp.TPPError as error:
                    found[f"{kind}, {suffix}"] = {"refused": str(error)}
                else:
                    found[f"{kind}, {suffix}"] = {
                        "difference": checked.difference,
                        "bytes": checked.bytes,
                        "operations": checked.operations,
                    }
    return found


def _pruned(network: Network, plan: tpp.Plan) -> tuple[Any, Any]:
    model, params, _ = network
    if params is None:
        return tpp.prune(model, plan), None
    if isinstance(model, linen.Module):
        return tpp.linen_apply(model, plan), tpp.prune(model, plan, params)
    return model, tpp.prune(model, plan, params)


def table(record: dict[str, Any]) -> str:
    """Returns the results as a table in Markdown."""
    columns = [
        f"{kind}, {suffix}" for kind in ("dense", "pruned") for suffix in FORMATS
    ]
    lines = [f"| network | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, found in record["networks"].items():
        cells = []
        for column in columns:
            one = found[column]
            refused = one.get("refused", "").partition(":")[0]
            cells.append(refused or f"{one['difference']:.0e}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="*", help="pattern of names")
    parser.add_argument("--table", action="store_true", help="print the table")
    options = parser.parse_args()
    record = json.loads(FILE.read_text()) if FILE.exists() else {"networks": {}}
    if options.table:
        print(table(record))
        return
    for name, create in networks().items():
        if fnmatch.fnmatch(name, options.networks) and name not in record["networks"]:
            record["networks"][name] = measure(name, create())
            record["machine"] = machine.describe()
            FILE.write_text(json.dumps(record, indent=1) + "\n")
            print(name, *map(_line, record["networks"][name].values()), sep=" | ")


def _line(one: dict[str, Any]) -> str:
    return one.get("refused") or f"{one['difference']:.0e}"


if __name__ == "__main__":
    main()
