"""Calling the functions and classes of a user that a config names."""

import inspect
from collections.abc import Mapping
from typing import Any

from tpp_jax.callbacks import Callback
from tpp_jax.errors import TPPError
from tpp_jax.experiment.config import RunConfig
from tpp_jax.experiment.dotted import is_dotted, load_object
from tpp_jax.experiment.fields import Tree, flat


def called(section: str, config: RunConfig, *args: Any) -> Any:
    """Calls the object that a section's ``name`` is the dotted path of.

    It gets the section's ``kwargs``, and the config if it has a parameter of that name.

    Args:
      section: Name of the section: ``"task"``, ``"model"`` or ``"data"``.
      config: Config of the run.
      *args: Arguments that come first.

    Returns:
      What the object returns. An object that is no class or function, and for which the
      config has no arguments, is returned itself.

    Raises:
      TPPError: There is no such object, or it does not take the arguments.
    """
    settings = getattr(config, section)
    path, what = settings.name, f"config.{section}.name"
    found = load_object(path, what)
    kwargs: dict[str, Any] = dict(settings.kwargs)
    if not callable(found):
        if args or kwargs:
            raise TPPError(
                f"{what} is {path!r}, of type {type(found).__name__}: it must be a "
                "function or a class"
            )
        return found
    signature = _signature(found)
    if signature is None:
        return found(*args, **kwargs)
    if "config" in signature.parameters:
        kwargs = {"config": config, **kwargs}
    elif section == "task":
        _check_read(config)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = [*["rngs"][: len(args)], *kwargs]
        raise TPPError(
            f"{what} is {path!r}, which cannot be called with "
            f"{', '.join(given) or 'no argument'} ({error}): its arguments are those "
            f"of config.{section}.kwargs"
        ) from None
    return found(*args, **kwargs)


def _signature(found: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(found)
    except (TypeError, ValueError):  # some functions written in C have none
        return None


def _check_read(config: RunConfig) -> None:
    """Raises a TPPError if fields are set that a task without a config cannot read."""
    for name in ("model", "data"):
        section = getattr(config, name)
        for field, value in (("name", section.name), ("kwargs", section.kwargs)):
            if value if field == "kwargs" else is_dotted(value):
                raise TPPError(
                    f"config.{name}.{field} is {value!r}, but the task "
                    f"{config.task.name} has its own {name}: use config.task.kwargs, "
                    "or give the task a parameter named config"
                )


def callbacks_of(config: RunConfig) -> tuple[Callback, ...]:
    """Returns the callbacks that a config names.

    Args:
      config: Config of the run, which a callback gets if it has a parameter of that
        name.

    Raises:
      TPPError: There is no such object, or it makes no callback.
    """
    found = []
    for path in filter(None, map(str.strip, config.callbacks.split(","))):
        what = "config.callbacks"
        if not is_dotted(path):
            raise TPPError(
                f"{what} is {path!r}: write a dotted path, package.module:name"
            )
        make = load_object(path, what)
        signature = _signature(make) if callable(make) else None
        takes = signature is not None and "config" in signature.parameters
        made = make(config=config) if takes else make() if callable(make) else make
        if not isinstance(made, Callback):
            raise TPPError(
                f"{what} is {path!r}, which makes a {type(made).__name__}: it must be "
                "a tpp_jax.Callback"
            )
        found.append(made)
    return tuple(found)


def own_code(config: Tree) -> set[str]:
    """Returns the dotted paths that a config names."""
    values: Mapping[str, Any] = flat(config)
    fields = ("task.name", "model.name", "data.name", "prune.method", "prune.criterion")
    named = [values.get(name, "") for name in fields]
    named += values.get("callbacks", "").split(",")
    return {path for path in named if isinstance(path, str) and is_dotted(path)}


def check_known(found: Tree, given: Tree, where: str) -> None:
    """Checks that code which a file names is named by the user too.

    Otherwise somebody else's folder could make a command run any function.

    Args:
      found: Config that was read from a file.
      given: Config that the user passed.
      where: The folder of the file, for the message.

    Raises:
      TPPError: The file's config names code that the user's does not.
    """
    if unknown := own_code(found) - own_code(given):
        raise TPPError(
            f"the run in {where} uses code of its own, {', '.join(sorted(unknown))}: "
            "pass its config too (--config=…), since code that only a file names is "
            "not imported"
        )
