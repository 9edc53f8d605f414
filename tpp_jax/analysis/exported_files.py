"""Latency of exported files, dense and pruned, each in its own runtime."""

import importlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from tpp_jax.analysis.latency import Pair, medians, zeros_of
from tpp_jax.errors import TPPError, require

SUFFIXES = "stablehlo", "onnx", "tflite"


def compare_files(
    dense: pathlib.Path,
    pruned: pathlib.Path,
    inputs: Sequence[jax.ShapeDtypeStruct],
    batch_size: int,
    flops: tuple[int, int],
) -> Pair:
    """Measures two files that :func:`tpp_jax.export` wrote, with alternating calls.

    Args:
      dense: File of the dense network.
      pruned: File of the pruned network, of the same format.
      inputs: Shapes and types of the networks' inputs for a batch of one example.
      batch_size: Number of examples per call.
      flops: FLOPs of the dense and of the pruned network for one example.

    Raises:
      TPPError: The runtime is not installed, or a file does not accept the batch.
    """
    arrays = zeros_of(inputs, batch_size, "float32")
    calls = [_call(path, arrays) for path in (dense, pruned)]
    try:
        before, after = medians(calls)
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        raise TPPError(
            f"{dense} or {pruned} does not run a batch of {batch_size}: {line}"
        ) from error
    return Pair(before, after, *flops)


def _call(path: pathlib.Path, arrays: Sequence[ArrayLike]) -> Callable[[], Any]:
    """Returns a function that runs a file."""
    match path.suffix:
        case ".stablehlo":
            exported = jax.export.deserialize(bytearray(path.read_bytes()))
            run = jax.jit(exported.call)
            return lambda: run(*arrays)
        case ".onnx":
            require("onnx", "onnxruntime")
            import onnxruntime

            session = onnxruntime.InferenceSession(
                path.read_bytes(), providers=["CPUExecutionProvider"]
            )
            names = [one.name for one in session.get_inputs()]
            given = dict(zip(names, map(np.asarray, arrays), strict=True))
            return lambda: session.run(None, given)
        case _:
            require("litert", "ai_edge_litert")
            module = importlib.import_module("ai_edge_litert.interpreter")
            runner = module.Interpreter(str(path)).get_signature_runner()
            names = runner.get_input_details()
            given = dict(zip(names, map(np.asarray, arrays), strict=True))
            return lambda: runner(**given)
