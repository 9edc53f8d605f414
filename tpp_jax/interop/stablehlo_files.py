"""Programs as files of StableHLO, which ``jax.export`` reads."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from tpp_jax.errors import TPPError
from tpp_jax.interop.programs import Program, bind, check_size, named
from tpp_jax.xla.convolution import conv_on_cpu

PLATFORMS = "cpu", "cuda", "rocm", "tpu"
# Prints are left out, except inside of loops.
_CALLBACKS = frozenset(
    {"pure_callback", "io_callback", "debug_callback", "debug_print"}
)


def write_stablehlo(
    program: Program, path: pathlib.Path, platforms: Sequence[str] = PLATFORMS
) -> None:
    """Writes a program that ``jax.export.deserialize`` reads.

    Its arguments are those of the model that have arrays, in the same order and with
    the same keywords. Where arguments or outputs are in classes of the user's, which a
    reader may not have, they are flat: arrays in order, and a dict by name.

    Args:
      program: Program.
      path: Path of the file.
      platforms: Platforms that the file is for, as JAX names them.

    Raises:
      TPPError: A platform is unknown, an operation has no form for one of them, or the
        weights are too large for one file.
    """
    if not platforms or not {*platforms} <= {*PLATFORMS}:
        raise TPPError(
            f"platforms={platforms!r} is not a tuple of names of platforms: choose "
            f"from {', '.join(PLATFORMS)}"
        )
    check_size(program)
    calls = {x: at for x, at in program.met.operations.items() if x in _CALLBACKS}
    if calls:
        raise TPPError(
            f"the model calls Python while it runs, by {named(calls)}: a file cannot "
            "hold that"
        )
    inputs, kwargs = _arguments(program)

    def call(*inputs: Any, **kwargs: Any) -> Any:
        arrays = program.run(jax.tree.leaves((inputs, kwargs)), _emit)
        if _is_plain(program.outputs):
            structure = jax.tree.structure(program.outputs)
            return jax.tree.unflatten(structure, arrays)
        return dict(zip(program.output_names, arrays, strict=True))

    try:
        exported = jax.export.export(jax.jit(call), platforms=tuple(platforms))
        made = exported(*inputs, **kwargs)
        data = made.serialize()
    except (ValueError, NotImplementedError) as error:
        line = str(error).strip().partition("\n")[0]
        raise TPPError(
            f"the model cannot be exported for {', '.join(platforms)} "
            f"({line.rstrip('.')}): if it runs on some of them only, name these, as in "
            "platforms=('cuda',)"
        ) from error
    if made.nr_devices > 1:
        raise TPPError(
            f"the program would need {made.nr_devices} devices: export the model "
            "outside of jax.set_mesh"
        )
    path.write_bytes(data)


def run_stablehlo(
    path: pathlib.Path, program: Program, arrays: Sequence[Any]
) -> list[np.ndarray]:
    """Returns the outputs of a file's program on the devices of this process.

    Args:
      path: Path of a file that was written with the same program.
      program: Program, for the structure of its arguments.
      arrays: Arrays of the inputs, in order.

    Raises:
      TPPError: The file is for other platforms.
    """
    inputs, kwargs = jax.tree.unflatten(
        jax.tree.structure(_arguments(program)), list(arrays)
    )
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    try:
        outputs = exported.call(*inputs, **kwargs)
    except ValueError as error:
        if "was exported for platforms" not in str(error):
            raise
        raise TPPError(
            f"a file for {', '.join(exported.platforms)} cannot be compared in a "
            f"process on {jax.default_backend()}: name this platform too, or export "
            "on the other"
        ) from error
    if not _is_plain(program.outputs):
        outputs = [outputs[name] for name in program.output_names]
    return [np.asarray(x) for x in jax.tree.leaves(outputs)]


def _emit(eqn: Any, values: list[Any]) -> list[Any]:
    """Applies an operation; a convolution in the fastest form for each platform."""
    if eqn.primitive.name != "conv_general_dilated":
        return bind(eqn, values)
    [result] = lax.platform_dependent(
        *values,
        cpu=lambda *arrays: [conv_on_cpu(*arrays, **eqn.params)],
        default=lambda *arrays: bind(eqn, arrays),
    )
    return [result]


def _arguments(program: Program) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of the exported function."""
    if not _is_plain(program.arguments):
        return tuple(program.inputs), {}
    inputs, kwargs = program.arguments
    given = tuple(x for x in inputs if jax.tree.leaves(x))
    return given, {name: x for name, x in kwargs.items() if jax.tree.leaves(x)}


def _is_plain(tree: Any) -> bool:
    """Reports whether a tree consists of built-in containers."""
    if type(tree) is dict:
        return all(isinstance(key, str) and _is_plain(x) for key, x in tree.items())
    if type(tree) in (list, tuple):
        return all(map(_is_plain, tree))
    return tree is None or jax.tree_util.treedef_is_leaf(jax.tree.structure(tree))
