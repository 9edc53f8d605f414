"""Dense and pruned networks in several runtimes: latency, and size of the files.

    python -m benchmarks.runtimes
    python -m benchmarks.runtimes --networks='cifar*'
    python -m benchmarks.runtimes --table

The same weights run in one process, in turns: JAX as users call a model (``jax.jit``),
the exported StableHLO file in JAX, the exported ONNX file in ONNX Runtime, and PyTorch,
eager and compiled. Outputs are compared. Times are the least of several rounds, after
a pause, in which the threads of the runtime before have come to rest. Needs PyTorch,
torchvision, transformers, ONNX Runtime and jax2onnx. Results are kept in
``results/runtimes_cpu.json``; what is there already is not measured again.
"""

import argparse
import fnmatch
import functools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import onnxruntime
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine
from benchmarks.peers import torch_inference
from tests.reference import filled
from tpp_jax.graph.functions import as_function

BATCHES = 1, 64
LENGTH = 64  # number of tokens of a sequence
FILE = machine.RESULTS / "runtimes_cpu.json"
_ROUNDS, _SECONDS, _PAUSE = 3, 1.0, 0.2
RUNTIMES = {
    "jit": "`jax.jit`",
    "stablehlo": "StableHLO in JAX",
    "onnx": "ONNX Runtime",
    "torch": "PyTorch",
    "torch.compile": "`torch.compile`",
}


class Case(NamedTuple):
    """A network, dense or pruned.

    Attributes:
      network: Name of the network.
      pruned: How it is pruned, in words; "" for the dense one.
      plan: Arguments of :func:`tpp_jax.make_plan`.
    """

    network: str
    pruned: str = ""
    plan: dict[str, Any] = {}  # noqa: RUF012  never changed

    @property
    def name(self) -> str:
        """Name in the record."""
        return f"{self.network}, {self.pruned or 'dense'}"


CASES = (
    Case("cifar_resnet56"),
    Case("cifar_resnet56", "0.5", {"ratios": "*layer*.conv1:0.5"}),
    Case("cifar_resnet56", "0.9", {"ratios": "*layer*.conv1:0.9"}),
    Case("mobilenet_v2"),
    Case("mobilenet_v2", "half of the FLOPs", {"flops": 0.5}),
    Case("mobilenet_v2", "half, in sixteens", {"flops": 0.5, "round_to": 16}),
    Case("small_decoder"),
    Case("small_decoder", "MLPs 0.75", {"ratios": "*gate_proj:0.75"}),
)


def model_of(case: Case) -> nnx.Module:
    """Returns the network of a case, with random weights."""
    if case.network == "small_decoder":
        # As it is created: its rotary frequencies are an array too.
        dense: nnx.Module = tpp.models.small_decoder(nnx.Rngs(0))
    else:
        create = functools.partial(tpp.models.create, case.network)
        dense = filled(lambda: create(rngs=nnx.Rngs(0)))
    if case.plan:
        groups = tpp.channel_groups(dense, _inputs(dense, 1))
        dense = tpp.prune(dense, tpp.make_plan(groups, dense, **case.plan))
    dense.eval()
    return dense


def _inputs(model: nnx.Module, batch: int) -> np.ndarray:
    draws = np.random.default_rng(0)
    if isinstance(model, tpp.models.Decoder):
        size = model.config.vocabulary
        return draws.integers(size, size=(batch, LENGTH)).astype(np.int32)
    shape = (batch, *model.spec.image_shape)
    return draws.normal(size=shape).astype(np.float32)


def measure(case: Case, folder: pathlib.Path) -> dict[str, Any]:
    """Returns the sizes of a network's files, and its latency in every runtime.

    Args:
      case: Network.
      folder: Empty folder.
    """
    model = model_of(case)
    files = {kind: folder / f"net.{kind}" for kind in ("stablehlo", "onnx")}
    checked = {k: tpp.export(model, f, _inputs(model, 2)) for k, f in files.items()}
    if isinstance(model, tpp.models.Decoder):
        tpp.save_hf(model, folder / "hf")
        network = torch_inference.language_model(folder / "hf")
    else:
        weights = folder / "net.safetensors"
        tpp.save_torch(model, weights)
        network = torch_inference.image_network(case.network, weights)
    found: dict[str, Any] = {
        "params": checked["onnx"].params,
        "flops": checked["onnx"].flops,
        "bytes": {kind: one.bytes for kind, one in checked.items()},
        "milliseconds": {},
    }
    for batch in BATCHES:
        inputs = _inputs(model, batch)
        calls = {**_own(model, files, inputs)}
        for name, compiled in (("torch", False), ("torch.compile", True)):
            calls[name] = torch_inference.call_of(network, inputs, compiled=compiled)
        found["milliseconds"][str(batch)] = _measured(calls)
    return found


def _own(
    model: nnx.Module, files: dict[str, pathlib.Path], inputs: np.ndarray
) -> dict[str, Callable[[], np.ndarray]]:
    """Returns functions that run a network and its files."""
    function = as_function(model)
    run = jax.jit(function.call)
    net = jax.export.deserialize(bytearray(files["stablehlo"].read_bytes()))
    loaded = jax.jit(net.call)
    session = onnxruntime.InferenceSession(files["onnx"].read_bytes())
    [name] = [one.name for one in session.get_inputs()]
    return {
        "jit": lambda: np.asarray(run(function.params, inputs)),
        "stablehlo": lambda: np.asarray(loaded(inputs)),
        "onnx": lambda: session.run(None, {name: inputs})[0],
    }


def _measured(calls: dict[str, Callable[[], np.ndarray]]) -> dict[str, float]:
    """Returns the milliseconds of each call; raises if their results differ."""
    expected = calls["jit"]()
    best = dict.fromkeys(calls, float("inf"))
    for name, call in calls.items():
        error = np.abs(call() - expected).max() / expected.std()
        assert error < 1e-3, f"{name} differs by {error}"
        call()
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            time.sleep(_PAUSE)
            begun = time.perf_counter()
            while time.perf_counter() - begun < _SECONDS:
                start = time.perf_counter()
                call()
                best[name] = min(best[name], time.perf_counter() - start)
    return {name: 1e3 * seconds for name, seconds in best.items()}


def table(record: dict[str, Any]) -> str:
    """Returns the results as a table in Markdown."""
    heads = ["network", "batch", "FLOPs", *RUNTIMES.values(), "MB of ONNX"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    for name, one in record["networks"].items():
        dense = record["networks"][f"{name.partition(',')[0]}, dense"]
        share = one["flops"] / dense["flops"]
        for batch, times in one["milliseconds"].items():
            before = dense["milliseconds"][batch]
            cells = [name, batch, f"{share:.0%}"]
            for runtime in RUNTIMES:
                faster = before[runtime] / times[runtime]
                gain = "" if one is dense else f" ({faster:.1f}×)"
                cells.append(f"{times[runtime]:.2f}{gain}")
            cells.append(f"{one['bytes']['onnx'] / 1e6:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
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
    for case in CASES:
        if not fnmatch.fnmatch(case.name, options.networks):
            continue
        if case.name not in record["networks"]:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(case, pathlib.Path(folder))
            record["networks"][case.name] = found
            record["versions"] = torch_inference.describe() | {
                "onnxruntime": onnxruntime.__version__
            }
            record.pop("machine", None)
            machine.write("runtimes", record)
            print(case.name, found["milliseconds"], flush=True)


if __name__ == "__main__":
    main()
