"""A flat dict of arrays and JSON as items of an Orbax checkpoint, with a checksum."""

import json
import pathlib
import zlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from tpp_jax.errors import require
from tpp_jax.graph.arrays import Shardings, is_divided, sharding_for
from tpp_jax.storage.contents import content_sum

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

Arrays = dict[str, Any]

SUMS = "sums"
"""Key of the JSON: type, shape and checksum of each array; older versions lack it."""

_DIVIDED = "divided"  # what older versions wrote, for arrays that were saved in parts


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
    arrays = jax.device_get(rest) | divided
    meta = {**meta, SUMS: {name: _sum_of(arrays[name]) for name in sorted(arrays)}}
    meta["checksum"] = _checksum({}, meta)
    return ocp.args.Composite(
        arrays=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)
    )


def to_restore() -> "ocp.args.Composite":
    """Returns the items that Orbax restores."""
    import orbax.checkpoint as ocp

    return ocp.args.Composite(
        arrays=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore()
    )


def restore_meta(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON in a folder, for :func:`restore_arrays` and :func:`checked`.

    Args:
      folder: Folder that Orbax wrote.
    """
    require("train", "orbax.checkpoint")
    import orbax.checkpoint as ocp

    with checkpointer() as loader:
        found = loader.restore(folder, ocp.args.Composite(meta=ocp.args.JsonRestore()))
    return found["meta"]


def restore_arrays(
    folder: pathlib.Path,
    shardings: Shardings | None = None,
    on_host: Collection[str] = (),
) -> Arrays:
    """Returns the arrays in a folder, for :func:`checked`.

    Args:
      folder: Folder that Orbax wrote.
      shardings: Shardings of the arrays, whose parts each device reads; an array for
        which there is none is read into a NumPy array.
      on_host: Names of arrays that are read into NumPy arrays in any case.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    path = epath.Path(folder) / "arrays"
    found = ocp.StandardCheckpointHandler().metadata(path).tree
    arguments = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in found}
    for name, one in found.items():
        # Types that JAX does not have at present are refused by who decodes them.
        known = (
            name not in on_host
            and one.dtype is not None
            and (jax.dtypes.canonicalize_dtype(one.dtype) == one.dtype)
        )
        sharding = sharding_for(shardings, name, one.shape) if known else None
        if sharding is not None:
            arguments[name] = ocp.ArrayRestoreArgs(
                sharding=sharding, global_shape=one.shape
            )
    with checkpointer() as loader:
        args = ocp.args.PyTreeRestore(restore_args=arguments)
        return loader.restore(folder, ocp.args.Composite(arrays=args))["arrays"]


def checkpointer() -> "ocp.Checkpointer":
    """Returns an object that saves and restores such items; close it after use.

    Raises:
      TPPError: If Orbax is not installed.
    """
    require("train", "orbax.checkpoint")
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def checked(meta: Mapping[str, Any], arrays: Arrays | None) -> dict[str, Any]:
    """Returns the JSON that was read, after checking it and the arrays.

    Orbax detects files that are missing or truncated, but not a flipped bit.

    Args:
      meta: JSON as it was read.
      arrays: Arrays as they were read; None to check the JSON alone, if it has
        :data:`SUMS`.

    Raises:
      Damaged: If the contents do not match their checksums.
    """
    meta = dict(meta)
    checksum = meta.pop("checksum", None)
    if SUMS in meta:
        same = checksum == _checksum({}, meta)
        sums = meta.pop(SUMS)
        if same and arrays is not None:
            same = arrays.keys() == sums.keys() and all(
                _sum_of(arrays[name]) == sums[name] for name in sorted(sums)
            )
    else:
        arrays = arrays or {}
        sums = meta.get(_DIVIDED, {})
        rest = {name: array for name, array in arrays.items() if name not in sums}
        same = checksum == _checksum(rest, meta) and all(
            name in arrays and content_sum(arrays[name]) == sums[name]
            for name in sorted(sums)
        )
        meta.pop(_DIVIDED, None)
    if not same:
        raise Damaged("the content is not what was written")
    return meta


def reason(error: Exception) -> str:
    """Returns the type of an error of Orbax, or the message of :class:`Damaged`.

    Args:
      error: Exception raised while reading.
    """
    return str(error) if isinstance(error, Damaged) else type(error).__name__


def _sum_of(array: Any) -> list[Any]:
    """Returns the type, shape and checksum of an array, as JSON has them."""
    return [str(array.dtype), list(array.shape), content_sum(array)]


def _checksum(arrays: Arrays, meta: Mapping[str, Any]) -> int:
    """Returns the CRC-32 of the names and contents of all arrays, and of the JSON."""
    crc = zlib.crc32(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        crc = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)
        crc = zlib.crc32(array.tobytes(), crc)
    return crc
