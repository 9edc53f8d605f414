"""Programs as ONNX files: converted by jax2onnx, simplified and run by ONNX Runtime.

jax2onnx gets operations on inputs only, in the forms that it converts best. ONNX
Runtime then folds biases into convolutions, and removes the transpositions between
them.
"""

import functools
import logging
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import lax

from tpp_jax.errors import TPPError, require
from tpp_jax.interop.onnx_graphs import with_shared_constants, without_expansions
from tpp_jax.interop.onnx_operations import emitter
from tpp_jax.interop.programs import Program, check_size, named

OPSET = 21
_PACKAGES = "onnx", "onnx_ir", "onnxruntime"


def write_onnx(program: Program, path: pathlib.Path) -> None:
    """Writes a program as an ONNX file, simplified.

    Args:
      program: Program.
      path: Path of the file.

    Raises:
      TPPError: A package is missing, the weights are too large for one file, or an
        operation has no equivalent.
    """
    _check_packages()
    check_size(program)
    _check_operations(program)
    with _quiet_logs():
        from jax2onnx import to_onnx

        try:
            converted = to_onnx(
                lambda *arrays: _unshared(arrays, program.run(arrays, emitter())),
                inputs=program.inputs,
                opset=OPSET,
                input_names=program.input_names,
                output_names=program.output_names,
                enable_double_precision=_is_double(program),
            )
            lean = without_expansions(with_shared_constants(converted))
        except Exception as error:
            raise _refused(program, "jax2onnx does not convert", error) from error
        try:
            path.write_bytes(_simplified(lean))
        except Exception as error:
            raise _refused(program, "ONNX Runtime does not run", error) from error


def run_onnx(
    path: pathlib.Path, program: Program, arrays: Sequence[Any]
) -> list[np.ndarray]:
    """Returns the outputs of a file in ONNX Runtime on the CPU.

    Args:
      path: Path of a file that was written with the same program.
      program: Program, for the names of its inputs.
      arrays: Arrays of the inputs, in order.

    Raises:
      TPPError: ONNX Runtime does not run it.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(
            path.read_bytes(), _options(), providers=["CPUExecutionProvider"]
        )
        given = dict(zip(program.input_names, map(np.asarray, arrays), strict=True))
        return [np.asarray(x) for x in session.run(None, given)]
    except Exception as error:
        raise _refused(program, "ONNX Runtime does not run", error) from error


def _is_double(program: Program) -> bool:
    """Reports whether a program has numbers of 64 bits."""
    return any(x in (np.float64, np.int64, np.uint64) for x in program.met.types)


def _unshared(inputs: Sequence[Any], outputs: Sequence[Any]) -> tuple[Any, ...]:
    """Returns outputs none of which is an input, or the same as another.

    Values of ONNX have one name each.
    """
    met, found = {id(x) for x in inputs}, []
    for x in outputs:
        found.append(lax.copy_p.bind(x) if id(x) in met else x)
        met.add(id(x))
    return tuple(found)


def _refused(program: Program, what: str, error: Exception) -> TPPError:
    """Returns the error for a program that others cannot convert or run."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    text = f"{what} the model: {line.rstrip('.')}"
    for dtype, at in program.met.types.items():
        where = f" ({at})" if at else ""
        if dtype == jnp.bfloat16:
            return TPPError(
                f"{text}. It computes in bfloat16{where}: convert its weights and "
                "inputs to float32, or export to .stablehlo"
            )
        if jnp.issubdtype(dtype, np.complexfloating):
            return TPPError(
                f"{text}. It has complex numbers{where}: export to .stablehlo"
            )
    return TPPError(
        f"{text}. Export to .stablehlo, or with dynamic_batch=False if a size of the "
        "inputs is the cause"
    )


def operations_in(path: pathlib.Path) -> dict[str, int]:
    """Returns the number of operations of each kind in an ONNX file."""
    import onnx

    counts: dict[str, int] = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))


def _check_packages() -> None:
    require("onnx", *_PACKAGES)
    try:
        require("onnx", "jax2onnx")
    except TPPError as error:
        raise TPPError(
            "the package jax2onnx, which is needed here, is not installed: pip install "
            "--no-deps jax2onnx. It asks for an old orbax-checkpoint, which it does "
            "not need"
        ) from error


@functools.cache
def _convertible() -> frozenset[str]:
    """Returns the names of the primitives that jax2onnx converts."""
    # Importing a plugin of jax2onnx 0.17 replaces jnp.cumsum for good.
    before = [(module, dict(vars(module))) for module in (jnp, jax.nn, lax, nnx, linen)]
    from jax2onnx.plugins.plugin_system import PLUGIN_REGISTRY, import_all_plugins

    import_all_plugins()
    for module, own in before:
        for name, value in own.items():
            if vars(module)[name] is not value:
                setattr(module, name, value)
    return frozenset(PLUGIN_REGISTRY)


def _check_operations(program: Program) -> None:
    """Raises if an operation that depends on the inputs has no equivalent."""
    with _quiet_logs():
        known = _convertible()
    found = program.met.operations
    missing = {name: line for name, line in found.items() if name not in known}
    if missing:
        raise TPPError(
            f"ONNX has no operation that jax2onnx knows for {named(missing)}: export "
            "to .stablehlo instead"
        )


def _simplified(converted: Any) -> bytes:
    """Returns a model in which ONNX Runtime has computed and fused what is constant.

    Only operations of the standard remain, none of them particular to this machine.
    """
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "simplified.onnx")
        options = _options()
        options.optimized_model_filepath = str(file)
        level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.graph_optimization_level = level
        onnxruntime.InferenceSession(
            converted.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        model = onnx.load(file)
    used = {node.domain for node in model.graph.node} | {""}
    kept = [one for one in model.opset_import if one.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    model.producer_name = "tpp_jax"
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised too
    return options


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Hides notes on optional packages that are missing, and on shapes left unnamed."""
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
