"""A flat dict of arrays and JSON as items of an Orbax checkpoint, with a checksum."""

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
    """The content that was read differs from the content that was written."""


def to_save(arrays: Arrays, meta: Mapping[str, Any]) -> "ocp.args.Composite":
    """Returns the items that Orbax saves: host copies of the arrays, and the JSON.

    Args:
      arrays: Arrays by name.
      meta: Data that JSON can represent.
    """
    import orbax.checkpoint as ocp  # slow to import: only those who save wait for it

    # With host copies a checkpoint does not depend on the devices, and the device's
    # buffers can be donated while Orbax writes in the background.
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
    """Returns an object that saves and restores such items; close it after use.

    Raises:
      TPPError: If Orbax is not installed.
    """
    require("train", "orbax.checkpoint")
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def checked(items: Mapping[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    """Returns the arrays and the JSON that were read, after checking them.

    Orbax detects files that are missing or truncated, but not a flipped bit.

    Args:
      items: Restored items.

    Raises:
      Damaged: If the contents do not match their checksum.
    """
    arrays, meta = items["arrays"], dict(items["meta"])
    if meta.pop("checksum", None) != _checksum(arrays, meta):
        raise Damaged("the content is not what was written")
    return arrays, meta


def reason(error: Exception) -> str:
    """Returns the type of an error of Orbax, or the message of :class:`Damaged`.

    Args:
      error: Exception raised while reading.
    """
    return str(error) if isinstance(error, Damaged) else type(error).__name__


def _checksum(arrays: Arrays, meta: Mapping[str, Any]) -> int:
    """Returns the CRC-32 of the names and contents of all arrays, and of the JSON."""
    crc = zlib.crc32(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        crc = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)
        crc = zlib.crc32(array.tobytes(), crc)
    return crc
