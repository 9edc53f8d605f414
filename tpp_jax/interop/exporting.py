"""``export``: a model as a file for another runtime, compared with the model."""

import importlib.metadata
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import linen, nnx

from tpp_jax.errors import TPPError
from tpp_jax.graph.functions import is_array
from tpp_jax.interop import comparing, litert_files
from tpp_jax.interop.onnx_files import OPSET, operations_in, run_onnx, write_onnx
from tpp_jax.interop.programs import Program, program_of, shape_text
from tpp_jax.interop.stablehlo_files import (
    PLATFORMS,
    run_stablehlo,
    write_stablehlo,
)
from tpp_jax.interop.torch_weights import replacing
from tpp_jax.pruning.flops import Count, count


class Exported(NamedTuple):
    """What was checked of an exported file; stored in ``<path>.json`` too.

    Attributes:
      path: Path of the file.
      format: Format of the file, and its version.
      runtime: Program that ran it for the comparison.
      inputs: Type and shape of each input, by name.
      outputs: Type and shape of each output, by name.
      batch_sizes: Sizes of the batches that were compared.
      difference: Largest difference between an output of the file and of the model, in
        standard deviations of that output (of 1/64 of its largest entry, if its entries
        are almost the same).
      params: Number of entries of the model's trainable parameters.
      flops: FLOPs of the model for one example, as :func:`tpp_jax.count` counts them.
      bytes: Size of the file.
      operations: Number of operations of each kind; empty for StableHLO.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "small.stablehlo"
      >>> checked = export(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), path, jnp.ones((4, 3)))
      >>> checked.inputs, checked.batch_sizes, checked.params
      ({'inputs': 'float32[batch, 3]'}, (4, 1), 8)
    """

    path: pathlib.Path
    format: str
    runtime: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    batch_sizes: tuple[int, ...]
    difference: float
    params: int
    flops: int
    bytes: int
    operations: dict[str, int]


def export(
    model: nnx.Module | linen.Module | Callable[..., Any],
    path: str | pathlib.Path,
    *inputs: Any,
    params: Any = None,
    dynamic_batch: bool = True,
    platforms: Sequence[str] = PLATFORMS,
    tolerance: float | None = None,
    **kwargs: Any,
) -> Exported:
    """Writes a model as a file that runs elsewhere, and compares the two.

    The file holds the computation in evaluation mode and the weights. It is run again
    from the disk by its own runtime, and nothing is left at ``path`` if its outputs
    differ from the model's.

    Args:
      model: NNX module, Linen module or function ``fn(params, *inputs)``, pruned or
        not. It is not modified.
      path: Path that ends in ``.stablehlo``, for ``jax.export.deserialize`` (JAX and
        flatbuffers are all that a reader needs), in ``.onnx``, for ONNX Runtime and
        others, or in ``.tflite``, for LiteRT on phones and other small devices. A file
        there is replaced. Missing folders are created.
      *inputs: Example inputs, best real ones. Abstract ones (``jax.ShapeDtypeStruct``)
        are replaced by random numbers for the comparison; their sizes may be symbolic
        (``jax.export.symbolic_shape``). Other arguments (``True``, a string) become
        constants of the file.
      params: Parameter pytree of a function, or variables of a Linen module.
      dynamic_batch: Whether the file accepts batches of any size: the first axis of
        each input that is as long as that of the first input.
      platforms: Platforms that a StableHLO file is for.
      tolerance: Largest difference allowed, in standard deviations of an output: by
        default 1e-4, and 16 times the rounding error of a model in half precision.
      **kwargs: Keyword arguments of the model, like ``inputs``.

    Returns:
      What was checked; also stored as JSON in ``<path>.json``.

    Raises:
      TPPError: The path has another ending; a package is missing; the model's weights
        are abstract; it does not accept batches of any size; an operation, which is
        named, has no equivalent; or the outputs of the file differ.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "small.stablehlo"
      >>> checked = export(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), path, jnp.ones((4, 3)))
      >>> net = jax.export.deserialize(bytearray(path.read_bytes()))
      >>> net.call(jnp.ones((10, 3))).shape
      (10, 2)
    """
    path = pathlib.Path(path)
    if path.suffix not in (".stablehlo", ".onnx", ".tflite"):
        raise TPPError(
            f"the format to write is unknown from {path}: end it in .stablehlo, .onnx "
            "or .tflite"
        )
    if path.is_dir():
        raise TPPError(f"{path} is a folder: name a file that is not there yet")
    program = program_of(model, inputs, kwargs, params, dynamic_batch)
    given = [x for x in jax.tree.leaves((inputs, kwargs)) if is_array(x)]
    examples = comparing.examples_of(program, given)
    expected = [comparing.outputs_of(program, arrays) for arrays in examples]
    comparing.warn_if_constant(program, examples[-1], expected[-1])
    counted = _count(model, params, (inputs, kwargs), examples[-1])
    allowed = comparing.tolerance_of(program) if tolerance is None else tolerance
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        found = _written(program, partial, path.suffix, platforms, examples)
        difference = _checked(program, expected, found, allowed)
        kinds = _operations(partial, path.suffix)
        size = partial.stat().st_size
    checked = Exported(
        path=path,
        format=_format(path, platforms),
        runtime=_runtime(path),
        inputs=_described(program.input_names, program.inputs),
        outputs=_described(program.output_names, jax.tree.leaves(program.outputs)),
        batch_sizes=tuple(x[0].shape[0] if x[0].ndim else 1 for x in examples),
        difference=difference,
        params=counted.params,
        flops=counted.flops,
        bytes=size,
        operations=kinds,
    )
    text = json.dumps(checked._asdict() | {"path": path.name}, indent=2)
    with replacing(path.with_name(f"{path.name}.json")) as partial:
        partial.write_text(text, encoding="utf-8")
    return checked


def _written(
    program: Program,
    path: pathlib.Path,
    suffix: str,
    platforms: Sequence[str],
    examples: Sequence[Sequence[Any]],
) -> list[list[Any]]:
    """Writes a file, and returns its outputs for some inputs."""
    match suffix:
        case ".onnx":
            write_onnx(program, path)
            run = run_onnx
        case ".tflite":
            litert_files.write_litert(program, path)
            run = litert_files.run_litert
        case _:
            write_stablehlo(program, path, platforms)
            run = run_stablehlo
    return [run(path, program, arrays) for arrays in examples]


def _checked(
    program: Program,
    expected: Sequence[Sequence[Any]],
    found: Sequence[Sequence[Any]],
    allowed: float,
) -> float:
    """Returns the largest difference of the outputs; raises if it is not allowed."""
    difference = max(
        comparing.difference(*pair, program.output_names)
        for pair in zip(expected, found, strict=True)
    )
    if not difference <= allowed:
        raise TPPError(
            f"the outputs of the exported model differ from the model's by "
            f"{difference:.2g} standard deviations, which is more than the tolerance "
            f"of {allowed:g}, so that nothing was written: if a deep network may round "
            "that much, pass a larger tolerance"
        )
    return difference


def _operations(path: pathlib.Path, suffix: str) -> dict[str, int]:
    """Returns the number of operations of each kind in a file, if that is known."""
    match suffix:
        case ".onnx":
            return operations_in(path)
        case ".tflite":
            return litert_files.operations_in(path)
    return {}


def _count(
    model: Any, params: Any, arguments: tuple[Any, Any], arrays: Sequence[Any]
) -> Count:
    """Returns the size and cost of the model for the given arrays."""
    drawn = iter(arrays)
    inputs, kwargs = jax.tree.map(
        lambda leaf: next(drawn) if is_array(leaf) else leaf, arguments
    )
    return count(model, *inputs, params=params, **kwargs)


def _described(names: Sequence[str], shapes: Sequence[Any]) -> dict[str, str]:
    return {name: shape_text(x) for name, x in zip(names, shapes, strict=True)}


def _format(path: pathlib.Path, platforms: Sequence[str]) -> str:
    if path.suffix == ".onnx":
        return f"ONNX, opset {OPSET}"
    if path.suffix == ".tflite":
        return "LiteRT, version 3 of TFLite's schema"
    return f"StableHLO for {', '.join(platforms)}"


def _runtime(path: pathlib.Path) -> str:
    """Returns the program that ran the file, and the platform that it ran on."""
    if path.suffix == ".onnx":
        return f"onnxruntime {importlib.metadata.version('onnxruntime')} on cpu"
    if path.suffix == ".tflite":
        return f"ai-edge-litert {importlib.metadata.version('ai-edge-litert')} on cpu"
    return f"jax {jax.__version__} on {jax.default_backend()}"
