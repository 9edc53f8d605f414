"""Programs as LiteRT (TFLite) files, converted without TensorFlow or PyTorch.

LiteRT's converter reads StableHLO, which JAX writes.
"""

import collections
import importlib
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from tpp_jax.errors import TPPError, require
from tpp_jax.interop.programs import Program, bind, check_size

# The form that files of StableHLO are stored in, read; calls of functions entered.
_READ = (
    "builtin.module(vhlo-legalize-stablehlo,reconcile-unrealized-casts,"
    "func.func(stablehlo-legalize-composite-to-call),inline,strip-debuginfo)"
)


def write_litert(program: Program, path: pathlib.Path) -> None:
    """Writes a program as a file for LiteRT, which was called TensorFlow Lite.

    Args:
      program: Program.
      path: Path of the file.

    Raises:
      TPPError: A package is missing, the weights are too large for one file, or an
        operation has no equivalent.
    """
    require("litert", "litert_converter", "ai_edge_litert")
    check_size(program)

    def call(*arrays: Any) -> tuple[Any, ...]:
        return tuple(program.run(arrays, _emit))

    exported = jax.export.export(jax.jit(call), platforms=["cpu"])(*program.inputs)
    try:
        path.write_bytes(_converted(program, exported.mlir_module_serialized))
    except _NotReadError as error:  # it knows no operations of other libraries
        targets = re.findall(r"custom_call @(?!shape_)(\w+)", exported.mlir_module())
        raise _refused(targets, str(error)) from error


class _NotReadError(Exception):
    """StableHLO that the converter does not read."""


def _emit(eqn: Any, values: list[Any]) -> list[Any]:
    """Applies an operation in a form that is converted rightly."""
    match eqn.primitive.name:
        case "conv_general_dilated" if set(eqn.params["lhs_dilation"]) - {1}:
            return [_transposed(eqn, *values)]
        case "gather" if not isinstance(values[1], Tracer):
            return [_picked(eqn, *values)]
    return bind(eqn, values)


def _transposed(eqn: Any, images: Any, kernel: Any) -> Any:
    """Applies a transposed convolution as an ordinary one.

    The converter computes other sizes for some transposed ones.
    """
    dims, params = eqn.params["dimension_numbers"], dict(eqn.params)
    config = [(0, 0, 0)] * images.ndim
    for axis, step, (low, high) in zip(
        dims.lhs_spec[2:], params["lhs_dilation"], params["padding"], strict=True
    ):
        config[axis] = low, high, step - 1
    padded = lax.pad(images, jnp.zeros((), images.dtype), config)
    params["lhs_dilation"] = (1,) * len(params["lhs_dilation"])
    params["padding"] = ((0, 0),) * len(params["padding"])
    return eqn.primitive.bind(padded, kernel, **params)


def _picked(eqn: Any, array: Any, indices: Any) -> Any:
    """Applies a look-up, of one entry of an axis (``x[:, 0]``) as a slice.

    Look-ups in an array of any size are not converted.
    """
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    axes = dims.start_index_map
    if len(axes) != 1 or dims.collapsed_slice_dims != axes or np.size(indices) != 1:
        return bind(eqn, [array, indices])[0]
    [axis], index = axes, int(np.asarray(indices).reshape(()))
    others = zip(array.shape, sizes, strict=True)
    every = all(n == size for i, (n, size) in enumerate(others) if i != axis)
    if not every or dims.operand_batching_dims or not 0 <= index < array.shape[axis]:
        return bind(eqn, [array, indices])[0]
    return lax.index_in_dim(array, index, axis, keepdims=False)


def _converted(program: Program, stablehlo: bytes) -> bytes:
    """Returns the content of the file."""
    # Its modules come without types.
    converter = importlib.import_module("litert_converter.converter_api_ext")
    ir = importlib.import_module("litert_converter.mlir.ir")
    passes = importlib.import_module("litert_converter.mlir.passmanager").PassManager
    context = ir.Context()
    converter.prepare_mlir_context(context)
    config = converter.ConvertToTFLConfig()
    config.unsafe_fuse_dynamic_shaped_broadcast = True  # the batch is the same in all
    names = [*program.input_names], [*program.output_names]
    with context, ir.Location.unknown():
        try:
            module = ir.Module.parse(stablehlo)
        except Exception as error:
            raise _NotReadError(str(error)) from error
        try:
            passes.parse(_READ).run(module.operation)
            converter.set_signature(module.operation, "serving_default", *names)
            converter.run_convert_to_tfl_passes(module, passes(), config)
        except Exception as error:
            illegal = re.findall(r"legalize operation '([\w.]+)'", str(error))
            raise _refused(illegal, str(error)) from error
        try:
            return converter.export_flatbuffer_to_bytes(module.operation)
        except Exception as error:
            text = module.operation.get_asm(large_elements_limit=8)
            left = re.findall(r'"((?:vhlo|stablehlo)\.\w+|tfl\.while)"\(', text)
            raise _refused(left, str(error)) from error


def _refused(operations: Sequence[str], text: str) -> TPPError:
    """Returns the error for a program that is not converted.

    Args:
      operations: Names of operations that have no equivalent, if they are known.
      text: Message of the converter.
    """
    names = [re.sub(r"^\w+\.|_v\d+$", "", name) for name in operations]
    named = ", ".join(dict.fromkeys(names))
    lines = [line for line in text.splitlines() if line.strip()]
    what = f"LiteRT has no operation for {named}"
    if not named:
        what = f"LiteRT does not accept the model: {lines[0] if lines else 'no reason'}"
    elif "bf16" in text:
        what += " in bfloat16"
    return TPPError(
        f"{what}. Export to .stablehlo, or with dynamic_batch=False if a size of the "
        "inputs is the cause"
    )


def run_litert(
    path: pathlib.Path, program: Program, arrays: Sequence[Any]
) -> list[np.ndarray]:
    """Returns the outputs of a file in LiteRT's interpreter on the CPU.

    Args:
      path: Path of a file that was written with the same program.
      program: Program, for the names of its inputs and outputs.
      arrays: Arrays of the inputs, in order.

    Raises:
      TPPError: LiteRT does not run it.
    """
    interpreter = importlib.import_module("ai_edge_litert.interpreter").Interpreter
    given = dict(zip(program.input_names, map(np.asarray, arrays), strict=True))
    try:
        outputs = interpreter(str(path)).get_signature_runner()(**given)
    except Exception as error:
        missing = re.findall(r"builtin opcode '(\w+)'", str(error))
        raise _refused(missing, str(error)) from error
    return [np.asarray(outputs[name]) for name in program.output_names]


def operations_in(path: pathlib.Path) -> dict[str, int]:
    """Returns the number of operations of each kind in a LiteRT file."""
    schema = importlib.import_module("ai_edge_litert.schema_py_generated")
    names = {
        number: name
        for name, number in vars(schema.BuiltinOperator).items()
        if isinstance(number, int)
    }
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))
    codes = [
        names[max(code.builtinCode, code.deprecatedBuiltinCode)]
        for code in model.operatorCodes
    ]
    kinds = collections.Counter(
        codes[one.opcodeIndex] for graph in model.subgraphs for one in graph.operators
    )
    return dict(sorted(kinds.items()))
