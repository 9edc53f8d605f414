"""Calls of a user's functions, with errors that name them."""

import inspect
import pathlib
import traceback
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from tpp_jax.errors import TPPError


def tried(run: Callable[..., Any], what: str, *args: Any) -> Any:
    """Calls a user's function.

    Args:
      run: The function, or one that calls it.
      what: Name of the function, for messages.
      *args: Arguments of ``run``.

    Raises:
      TPPError: The function raises an exception, of which the message has the type, the
        first line, and the last place in the user's files.
    """
    try:
        return run(*args)
    except TPPError:
        raise
    except Exception as error:  # whatever a user's function does
        reason = str(error).strip().partition("\n")[0]
        calls = traceback.extract_tb(error.__traceback__)
        ours = pathlib.Path(__file__).parents[1]
        places = [
            f" (line {call.lineno} of {call.filename})"
            for call in calls
            if "site-packages" not in call.filename
            and ours not in pathlib.Path(call.filename).parents
        ]
        raise TPPError(
            f"calling {what} fails with {type(error).__name__}: "
            f"{reason}{''.join(places[-1:])}"
        ) from error


def with_key(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a loss of a model, a batch and a key, of which the user's needs two.

    The key is a parameter of that name, or the third of those without a default.
    """
    try:
        parameters = inspect.signature(loss).parameters
    except (TypeError, ValueError):  # some functions written in C have none
        parameters = {}
    needed = [
        one
        for one in parameters.values()
        if one.default is one.empty
        and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    if "key" in parameters and parameters["key"] not in needed:
        return lambda model, batch, key: loss(model, batch, key=key)
    if len(needed) > 2:
        return loss
    return lambda model, batch, _: loss(model, batch)


def one_number(x: Any, what: str) -> Float[Array, ""]:
    """Returns a mean in single precision, in which it is added up."""
    shape = () if isinstance(x, bool | int | float) else getattr(x, "shape", None)
    if shape != ():
        found = f"of type {type(x).__name__}" if shape is None else f"of shape {shape}"
        raise TPPError(
            f"{what} is {found}, must be one number: take its mean over the batch"
        )
    return jnp.asarray(x, jnp.float32)
