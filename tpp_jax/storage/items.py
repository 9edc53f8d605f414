"""A flat dict of arrays and JSON as items of an Orbax checkpoint, with a checksum."""

import json
import pathlib
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from tpp_jax.errors import require
from tpp_jax.graph.arrays import Shardings, is_divided, sharding_for
from tpp_jax.storage.contents import content_sum

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

Arrays = dict[str, Any]

_DIVIDED = "divided"  # key of the checksums of arrays that were saved in parts


class Damaged(Exception):
    """The content that was read differs from the content that was written."""


def to_save(arrays: Arrays, meta: Mapping[str, Any]) -> "ocp.args.Composite":
    """Returns the items that Orbax saves: host copies of the arrays, and the JSON.

    Arrays that devices hold in parts are not copied: each process writes its own parts.

    Args:
      arrays: Arrays by name.
      meta: Data that JSON can represent.
    """
    import orbax.checkpoint as ocp  # slow to import: only those who save wait for it

    # With host copies a checkpoint does not depend on the devices, and the device's
    # buffers can be donated while Orbax writes in the background.
    divided = {name: array for name, array in arrays.items() if is_divided(array)}
    rest = {name: array for name, array in arrays.items() if name not in divided}
    if divided:
        sums = {name: content_sum(divided[name]) for name in sorted(divided)}
        meta = {**meta, _DIVIDED: sums}
    rest = jax.device_get(rest)
    meta = {**meta, "checksum": _checksum(rest, meta)}
    arrays = rest | divided
    return ocp.args.Composite(
        arrays=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)
    )


def to_restore() -> "ocp.args.Composite":
    """Returns the items that Orbax restores."""
    import orbax.checkpoint as ocp

    return ocp.args.Composite(
        arrays=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore()
    )


def restore(folder: pathlib.Path, shardings: Shardings | None = None) -> Any:
    """Returns the items in a folder, for :func:`checked`.

    Args:
      folder: Folder that Orbax wrote.
      shardings: Shardings of arrays that were saved in parts, which are read in parts.
        Other arrays are read into NumPy arrays.
    """
    require("train", "orbax.checkpoint")
    import orbax.checkpoint as ocp
    from etils import epath

    with checkpointer() as loader:
        found = loader.restore(folder, ocp.args.Composite(meta=ocp.args.JsonRestore()))
    meta = found["meta"]
    divided = meta.get(_DIVIDED)
    if not divided:
        with checkpointer() as loader:
            return loader.restore(folder, to_restore())
    on_host = ocp.RestoreArgs(restore_type=np.ndarray)
    arguments = {}
    path = epath.Path(folder) / "arrays"
    for name, one in ocp.StandardCheckpointHandler().metadata(path).tree.items():
        sharding = sharding_for(shardings, name, one.shape) if name in divided else None
        arguments[name] = on_host
        # Types that JAX does not have at present are refused by who decodes them.
        known = one.dtype is not None and (
            jax.dtypes.canonicalize_dtype(one.dtype) == one.dtype
        )
        if sharding is not None and known:
            arguments[name] = ocp.ArrayRestoreArgs(
                sharding=sharding, global_shape=one.shape
            )
    with checkpointer() as loader:
        arrays = loader.restore(
            folder,
            ocp.args.Composite(arrays=ocp.args.PyTreeRestore(restore_args=arguments)),
        )
    return {"arrays": arrays["arrays"], "meta": meta}


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
    sums = meta.get(_DIVIDED, {})
    rest = {name: array for name, array in arrays.items() if name not in sums}
    same = meta.pop("checksum", None) == _checksum(rest, meta) and all(
        name in arrays and content_sum(arrays[name]) == sums[name]
        for name in sorted(sums)
    )
    if not same:
        raise Damaged("the content is not what was written")
    meta.pop(_DIVIDED, None)
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
