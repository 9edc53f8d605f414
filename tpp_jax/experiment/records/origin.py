"""Where a result comes from: command, date, version and machine."""

import datetime
import json
import math
import os
import pathlib
import platform
import shlex
import sys
from typing import Any

import jax
from flax import nnx

from tpp_jax.experiment.records.folders import ORIGIN, read_if_legible, write
from tpp_jax.headline import Headline


def describe() -> dict[str, str]:
    """Returns what made a result, by the names under which the report shows it."""
    devices = jax.devices()
    now = datetime.datetime.now(datetime.UTC)
    return {
        "command": command(),
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "version": f"tpp_jax {_version()}, jax {jax.__version__}, "
        f"Python {platform.python_version()}",
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "devices": f"{len(devices)} × {devices[0].device_kind}",
    }


def record(workdir: pathlib.Path, headline: Headline) -> None:
    """Writes what makes a result into the folder of its run.

    Args:
      workdir: Folder of the run.
      headline: Metric by which the run is judged.
    """
    content = describe() | {"headline": headline.to_dict()}
    write(workdir / ORIGIN, json.dumps(content, indent=2))


def read(workdir: pathlib.Path) -> dict[str, str]:
    """Returns what :func:`describe` found; empty if there is nothing legible.

    Args:
      workdir: Folder of the run.
    """
    found = read_if_legible(workdir / ORIGIN)
    return {name: x for name, x in found.items() if isinstance(x, str)}


def read_headline(workdir: pathlib.Path) -> Headline | None:
    """Returns the metric by which a run is judged; None if it is not legible.

    Args:
      workdir: Folder of the run.
    """
    try:
        return Headline(**read_if_legible(workdir / ORIGIN)["headline"])
    except (LookupError, TypeError):
        return None


def command() -> str:
    """Returns the command of this process, without the folder of its program."""
    program, *flags = sys.argv or [""]
    path = pathlib.PurePath(program)
    if path.name == "__main__.py":
        return shlex.join(["python", "-m", path.parent.name, *flags])
    name = path.name or "python"
    return shlex.join([*(["python"] if path.suffix == ".py" else []), name, *flags])


def _version() -> str:
    # Imported, the package would import itself in a circle.
    return sys.modules[__name__.partition(".")[0]].__version__


def _processor() -> str:
    file = pathlib.Path("/proc/cpuinfo")
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return named[0] if named else platform.processor() or platform.machine()


def bytes_of(model: nnx.Module) -> int:
    """Returns the size of a model's parameters and statistics in memory.

    Args:
      model: Model, whose arrays may be abstract.
    """
    arrays = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.RngState)))
    return sum(math.prod(x.shape) * _width(x) for x in arrays if hasattr(x, "dtype"))


def _width(x: Any) -> int:
    return getattr(x.dtype, "itemsize", 0)
