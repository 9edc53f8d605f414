"""A flat dict of arrays and JSON as the two items of an Orbax checkpoint, checked."""

import json
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from tpp_jax.errors import require

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

Arrays = dict[str, Any]


class Damaged(Exception):
    """What was read is not what was written."""


def to_save(arrays: Arrays, meta: Mapping[str, Any]) -> "ocp.args.Composite":
    """Returns the items that Orbax saves: host copies of the arrays, and the JSON."""
    import orbax.checkpoint as ocp  # slow to import: only those who save wait for it

    # Host copies: a checkpoint then knows nothing of the devices it came from, and the
    # device's buffers are free to be donated while Orbax writes in the background.
    arrays = jax.device_get(arrays)
    meta = {**meta, "checksum": _checksum(arrays, meta)}
    return ocp.args.Composite(
        arrays=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)
    )


def to_restore() -> "ocp.args.Composite":
    """Returns the items that Orbax restores."""
    import orbax.checkpoint as ocp

    return ocp.args.Composite(
        arrays=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore()
    )


def checkpointer() -> "ocp.Checkpointer":
    """Returns what saves and restores such items, to be closed after use.

    Raises:
      TPPError: Orbax is not installed.
    """
    require("train", "orbax.checkpoint")
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def checked(items: Mapping[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    """Returns the arrays and the JSON that were read, if they are what was written.

    Orbax finds files that are missing or cut short, and not a bit that has flipped.

    Raises:
      Damaged: The contents do not match their checksum.
    """
    arrays, meta = items["arrays"], dict(items["meta"])
    if meta.pop("checksum", None) != _checksum(arrays, meta):
        raise Damaged("the content is not what was written")
    return arrays, meta


def kind(error: Exception) -> str:
    """Returns the type of an error that Orbax raised, or what :class:`Damaged` says."""
    return str(error) if isinstance(error, Damaged) else type(error).__name__


def _checksum(arrays: Arrays, meta: Mapping[str, Any]) -> int:
    """CRC-32 of the names and contents of all arrays, and of the JSON."""
    crc = zlib.crc32(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        crc = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)
        crc = zlib.crc32(array.tobytes(), crc)
    return crc
