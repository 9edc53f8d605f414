"""Outputs of an exported file compared with those of its model."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpp_jax.errors import TPPError
from tpp_jax.interop.programs import Program, not_any_batch, shape_text, with_sizes
from tpp_jax.pruning.checking import example

_TOLERANCE = 1e-4  # in standard deviations of an output, for float32
_LEAST = 1 / 64  # of an output's largest entry: less is not seen for rounding


def examples_of(program: Program, given: Sequence[Any]) -> list[list[Any]]:
    """Returns arrays of the inputs for batches of some sizes; the last is the smallest.

    Examples are repeated, or left out, to make batches of other sizes than the given.
    Symbolic sizes are all different, so that none is taken for another.

    Args:
      program: Program that is compared.
      given: Inputs; abstract ones are replaced by random numbers.
    """
    symbols = {str(n): n for x in program.inputs for n in x.shape}
    free = [name for name, size in symbols.items() if not isinstance(size, int)]
    size = given[0].shape[0] if given[0].shape else 1
    sizes = [max(size, 2) if isinstance(size, int) else 4, 1] if free else [1]
    rng = np.random.default_rng(0)
    drawn = [np.asarray(example(with_sizes(x), rng)) for x in given]
    batches = []
    for size in sizes:
        own = {name: size + i for i, name in enumerate(free)}
        shapes = [with_sizes(x, own) for x in program.inputs]
        pairs = zip(drawn, shapes, strict=True)
        batches.append([np.resize(x, own.shape).astype(own.dtype) for x, own in pairs])
    return batches


def outputs_of(program: Program, arrays: Sequence[Any]) -> list[np.ndarray]:
    """Returns the outputs of the model itself, for a batch of another size perhaps.

    Args:
      program: Program of the model.
      arrays: Arrays of the inputs, in order.

    Raises:
      TPPError: The model does not accept a batch of this size.
    """
    structure = jax.tree.structure(program.arguments)
    try:
        outputs = program.call(jax.tree.unflatten(structure, arrays))
    except (TypeError, ValueError) as error:
        raise not_any_batch(error) from error
    return [np.asarray(x) for x in jax.tree.leaves(outputs)]


def warn_if_constant(
    program: Program, arrays: Sequence[Any], expected: Sequence[np.ndarray]
) -> None:
    """Warns if the outputs are the same for random inputs.

    Args:
      program: Program that is compared.
      arrays: Arrays of the inputs, in order.
      expected: Outputs for them.
    """
    if not any(jnp.issubdtype(x.dtype, jnp.floating) for x in expected):
        return  # those of two examples are often the same
    rng = np.random.default_rng(1)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    drawn = [np.asarray(example(x, rng)) for x in shapes]
    if all(map(np.array_equal, arrays, drawn)):
        return
    pairs = zip(expected, outputs_of(program, drawn), strict=True)
    if all(np.array_equal(one, other, equal_nan=True) for one, other in pairs):
        warnings.warn(
            "the model's outputs do not depend on its inputs, so that comparing them "
            "proves little: export it with trained weights",
            stacklevel=3,
        )


def tolerance_of(program: Program) -> float:
    """Returns the difference that is allowed for rounding."""
    types = [*program.met.types, *(x.dtype for x in program.weights)]
    floating = [x for x in types if jnp.issubdtype(x, jnp.floating)]
    coarsest = max((float(jnp.finfo(x).eps) for x in floating), default=0.0)
    # Half precision is rounded to other numbers in other runtimes.
    return max(_TOLERANCE, 16 * coarsest)


def difference(
    expected: Sequence[np.ndarray], found: Sequence[np.ndarray], names: Sequence[str]
) -> float:
    """Returns the largest difference, in standard deviations of the output it is in.

    Args:
      expected: Outputs of the model.
      found: Outputs of a file.
      names: Names of the outputs.

    Raises:
      TPPError: An output is of another type or shape.
    """
    worst = 0.0
    for a, b, name in zip(expected, found, names, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise TPPError(
                f"{name} of the exported model is {shape_text(b)} instead of "
                f"{shape_text(a)}, so that nothing was written. Please report the "
                "model, and export it to another format"
            )
        worst = max(worst, _difference(a, b))
    return worst


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the difference of an output; infinite if one alone is not a number."""
    kind = np.complex128 if np.iscomplexobj(a) else np.float64
    a, b = a.astype(kind), b.astype(kind)
    differ = (a != b) & ~(np.isnan(a) & np.isnan(b))
    if not np.isfinite(a[differ]).all() or not np.isfinite(b[differ]).all():
        return float("inf")
    apart = float(np.abs(a[differ] - b[differ]).max(initial=0.0))
    finite = a[np.isfinite(a)]
    if not finite.size:
        return 0.0
    scale = max(float(finite.std()), _LEAST * float(np.abs(finite).max()))
    return apart / (scale or 1.0)
