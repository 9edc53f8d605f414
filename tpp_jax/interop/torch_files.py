"""PyTorch's files as NumPy arrays by name, without PyTorch and without running code.

``torch.save`` writes a pickle, which only refers to the numbers, and the numbers as raw
bytes: *storages*, of which each tensor is a strided view. Since PyTorch 1.6 both are
entries of a zip archive; before, they followed one another in one stream.

The sizes that a file states are not trusted: memory is limited to a small multiple of
the file's size, whatever the file contains.
"""

import io
import itertools
import json
import pathlib
import struct
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from tpp_jax.errors import TPPError
from tpp_jax.interop.names import shown
from tpp_jax.interop.pickles import Record, read_pickle
from tpp_jax.interop.torch_tensors import (
    Storage,
    Tensors,
    as_numpy,
    described,
    dtype_of_storage,
    is_tensor,
    tensors_of_module,
    why_unreadable,
)

DTYPES_OF_SAFETENSORS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}
_MAGIC_OF_STREAMS = 0x1950A86A20F9469CFC6C
_KEYS_OF_WEIGHTS = ("state_dict", "model_state_dict", "model", "net")
_DEEPEST = 100  # number of checkpoints within checkpoints
_SHOWN = 5  # number of names that a message lists


_DAMAGE = (
    *(ValueError, TypeError, AttributeError, LookupError, OverflowError),
    *(EOFError, struct.error, zipfile.BadZipFile, NotImplementedError, RuntimeError),
)


def read_torch(path: str | pathlib.Path, *, key: str | None = None) -> Tensors:
    """Reads the tensors of a file, whatever its suffix.

    Args:
      path: Path of a ``.safetensors`` file; of a file that ``torch.save`` wrote in any
        version of PyTorch: a state dict, a checkpoint that contains one, or a module;
        or of the ``.index.json`` of a checkpoint in several files, which are in the
        same folder.
      key: Entry of a checkpoint to read; None for the first of ``state_dict``,
        ``model_state_dict``, ``model`` and ``net`` that exists.

    Returns:
      Arrays by PyTorch's names, of PyTorch's shapes and types. They may be read-only.

    Raises:
      TPPError: If the file is missing, damaged, or contains no weights.
    """
    path = pathlib.Path(path)
    content = _content(path)
    shards = _shards(content, path)
    if shards is None:
        return _tensors_of_file(content, path, key)
    tensors: Tensors = {}
    for shard in dict.fromkeys(shards.values()):
        file = path.parent / shard
        if not file.is_file():
            raise TPPError(
                f"{path} is the index of a checkpoint in {len(set(shards.values()))} "
                f"files, but {shown(shard)} is not in its folder: fetch all of them"
            )
        found = _tensors_of_file(_content(file), file, key)
        tensors |= {n: x for n, x in found.items() if shards.get(n, shard) == shard}
    if lost := [name for name in shards if name not in tensors]:
        raise TPPError(
            f"{path} says that {shown(lost[0])} is in {shown(shards[lost[0]])}, which "
            "does not have it: fetch the index and its files again"
        )
    return tensors


def shards_of(path: pathlib.Path) -> dict[str, str] | None:
    """Returns the file of each tensor by an index; None if the file is no index.

    Args:
      path: Path of the index.

    Raises:
      TPPError: If it is damaged, or lists files outside of its folder.
    """
    return _shards(_content(path), path)


def _content(path: pathlib.Path) -> bytes:
    if not path.is_file():
        raise TPPError(f"there is no file of weights at {path}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TPPError(f"{path} cannot be read ({error.strerror})") from error
    if not content:
        raise TPPError(f"{path} is empty: fetch it again")
    return content


def _shards(content: bytes, path: pathlib.Path) -> dict[str, str] | None:
    """Returns the file of each tensor if the content is an index; None if it is not.

    Raises:
      TPPError: If it is other JSON, or an index of files outside of its folder.
    """
    if content[:1] != b"{" or _is_safetensors(content):
        return None
    try:
        index = json.loads(content)
    except (ValueError, RecursionError):
        raise TPPError(f"{path} is damaged JSON: fetch it again") from None
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise TPPError(
            f"{path} is JSON, but neither weights nor an index of their files"
        )
    for shard in shards.values():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise TPPError(
                f"{path} is an index that names {shown(shard)!r}, which is not a file "
                "in its folder: fetch it again from a source that you trust"
            )
    return shards


def _is_plain(name: str) -> bool:
    """Returns whether a name is that of a file, and not a path."""
    return (
        name not in ("", ".", "..")
        and len(name) < 200
        and not any(character in name for character in "/\\:\0")
    )


def _tensors_of_file(content: bytes, path: pathlib.Path, key: str | None) -> Tensors:
    _check_is_a_file_of_weights(content, path)
    try:
        if _is_safetensors(content):
            saved = _read_safetensors(content)
        elif content[:2] == b"PK":
            saved = _read_zip(content)
        else:
            saved = _read_stream(io.BytesIO(content))
        return tensors_in(saved, key)
    except TPPError as error:
        raise TPPError(f"{path}: {error}") from None
    except _DAMAGE as error:
        # The text of a KeyError is only a key. The traceback is dropped, since it may
        # show the content of the file.
        reason = "not a pickle" if isinstance(error, KeyError) else shown(error, 200)
        raise TPPError(
            f"{path} is damaged, or not a file of weights ({reason}): fetch it again"
        ) from None


def tensors_in(saved: Any, key: str | None = None) -> Tensors:
    """Returns the tensors of a saved object: a state dict, or one that contains it.

    If a checkpoint contains several sets of weights, such as ``model`` and
    ``model_ema``, a warning names the one that is read.

    Args:
      saved: Tensors by name (PyTorch's, NumPy's or JAX's), a checkpoint that contains
        them as ``state_dict``, ``model_state_dict``, ``model`` or ``net``, or the
        record of a pickled module.
      key: Entry of a checkpoint to read; None for the first of these.

    Raises:
      TPPError: If there are no tensors, or other values among them.
    """
    if key is not None:
        if not isinstance(saved, Mapping) or not _holds_weights(saved.get(key)):
            raise TPPError(f"there are no weights under the key {shown(key)!r}")
        return tensors_in(saved[key])
    saved = _weights_of_checkpoint(saved)
    if isinstance(saved, Record):
        tensors = tensors_of_module(saved)
        if not tensors:
            raise TPPError(f"it holds {described(saved)}, which contains no weights")
        return tensors
    if not isinstance(saved, Mapping):
        raise TPPError(f"it is {described(saved)} instead of a state dict")
    if not saved:
        raise TPPError("the state dict is empty")
    for name, value in saved.items():
        if not isinstance(name, str) or not is_tensor(value):
            raise TPPError(_why_no_state_dict(saved, name, value))
    return {name: _array_of(name, value) for name, value in saved.items()}


def _weights_of_checkpoint(saved: Any) -> Any:
    """Returns the weights in a checkpoint; other objects are returned unchanged."""
    for depth in range(_DEEPEST):
        if not isinstance(saved, Mapping):
            return saved
        inner = next((k for k in _KEYS_OF_WEIGHTS if _is_container(saved.get(k))), None)
        if inner is None:
            return saved
        _warn_of_others(saved, inner, compare=depth == 0)
        saved = saved[inner]
    raise TPPError("the checkpoint in it contains itself")


def _array_of(name: str, value: Any) -> np.ndarray:
    try:
        return as_numpy(value)
    except TPPError as error:
        raise TPPError(f"{shown(name)}: {error}") from None


def _is_container(value: Any) -> bool:
    return isinstance(value, Mapping | Record) and not is_tensor(value)


def _holds_weights(value: Any) -> bool:
    """Returns whether a value looks like a state dict or module, without reading it."""
    if isinstance(value, Record):
        return isinstance(value.state, dict) and "_modules" in value.state
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(is_tensor(x) for x in itertools.islice(value.values(), 10))
    )


def _warn_of_others(saved: Mapping[str, Any], taken: str, compare: bool) -> None:
    """Warns if a checkpoint contains weights other than those that are read.

    Args:
      saved: Checkpoint.
      taken: Key of the weights that are read.
      compare: Whether to ignore a single other set of the same numbers.
    """
    others = [k for k, x in saved.items() if k != taken and _holds_weights(x)]
    if len(others) == 1 and compare and _are_same(saved[taken], saved[others[0]]):
        return
    if others:
        names = [shown(name) for name in others[:_SHOWN]]
        warnings.warn(
            f"the checkpoint holds several sets of weights: {taken} is taken, and not "
            f"{', '.join(names)}. For another one, pass load_torch the result of "
            f"tpp_jax.interop.torch_files.read_torch(file, key={names[0]!r})",
            stacklevel=4,
        )


def _are_same(first: Any, second: Any) -> bool:
    """Returns whether two sets of weights are views of the same numbers."""
    sets = []
    for value in (first, second):
        if isinstance(value, Record):
            sets.append(tensors_of_module(value))
        elif all(isinstance(k, str) and is_tensor(x) for k, x in value.items()):
            sets.append({name: as_numpy(x) for name, x in value.items()})
        else:
            return False
    ours, theirs = sets
    return ours.keys() == theirs.keys() and all(
        x.__array_interface__ == theirs[name].__array_interface__
        for name, x in ours.items()
    )


def _why_no_state_dict(saved: Mapping[Any, Any], name: Any, value: Any) -> str:
    if reason := why_unreadable(value):
        return f"{shown(name)} is {reason}"
    if str(name).endswith("_packed_params"):
        return (
            f"{shown(name)} belongs to a quantised layer, whose numbers are packed: "
            "save the model before it is quantised"
        )
    some = ", ".join(shown(key) for key in itertools.islice(saved, 5))
    return (
        f"it is a dict of {some} instead of a state dict: {shown(name)} is "
        f"{described(value)}; if it contains a state dict, pass that"
    )


_OTHER_FORMATS = {
    b"\x89HDF\r\n": "an HDF5 file, such as Keras writes, and not PyTorch's",
    b"GGUF": "a GGUF file, and not PyTorch's",
    b"\x93NUMPY": "an array of NumPy, and not a state dict",
    b"\x1f\x8b": "compressed by gzip: unpack it",
    b"BZh": "compressed by bzip2: unpack it",
    b"\xfd7zXZ": "compressed by xz: unpack it",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
}


def _check_is_a_file_of_weights(content: bytes, path: pathlib.Path) -> None:
    start = content[:200].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise TPPError(f"{path} is a web page, not weights: fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise TPPError(
            f"{path} is only a pointer to a file in Git LFS: run git lfs pull"
        )
    for magic, description in _OTHER_FORMATS.items():
        if content.startswith(magic):
            raise TPPError(f"{path} is {description}")


def _is_safetensors(content: bytes) -> bool:
    return content[8:9] == b"{" and int.from_bytes(content[:8], "little") < 2**32


def _read_safetensors(content: bytes) -> Tensors:
    import safetensors  # late: only these files need the package

    try:
        found = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise ValueError(shown(error, 200)) from None
    tensors = {}
    for name, it in found:
        if it["dtype"] not in DTYPES_OF_SAFETENSORS:
            raise TPPError(
                f"{shown(name)} is of type {shown(it['dtype'])}, which is not supported"
            )
        dtype = np.dtype(DTYPES_OF_SAFETENSORS[it["dtype"]])
        tensors[name] = np.frombuffer(it["data"], dtype).reshape(it["shape"])
    return tensors


def _read_zip(content: bytes) -> Any:
    archive = zipfile.ZipFile(io.BytesIO(content))
    entries = set(archive.namelist())
    if reason := _other_archive(entries):
        raise TPPError(reason)
    pickles = [entry for entry in entries if entry.endswith("data.pkl")]
    if len(pickles) != 1:
        raise TPPError("it is a zip archive, but not one that torch.save wrote")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise TPPError("it is compressed, which torch.save does not do: unpack it")
    if sum(entry.file_size for entry in archive.infolist()) > len(content):
        raise TPPError("its entries overlap, which torch.save does not do")
    folder = pickles[0].removesuffix("data.pkl")
    order = f"{folder}byteorder"
    if order in entries and archive.read(order) != b"little":
        raise TPPError("it is from a big-endian machine: save it as .safetensors there")
    source: dict[str, bytes] = {}

    def refer(identity: Any) -> Storage:
        _, storage_type, key = _fields(identity)[:3]
        if key not in source:
            source[key] = archive.read(f"{folder}data/{key}")
        return Storage(dtype_of_storage(storage_type), key, source)

    return read_pickle(io.BytesIO(archive.read(pickles[0])), refer)


def _other_archive(entries: set[str]) -> str | None:
    """Returns what an archive is if ``torch.save`` did not write it."""
    names = {entry.rpartition("/")[2] for entry in entries}
    if "constants.pkl" in names or any("/code/" in entry for entry in entries):
        return "it holds a TorchScript program: save its state_dict() instead"
    if "archive_format" in names:
        return "it holds a program that torch.export wrote: save its state_dict instead"
    if any(name.endswith(".npy") for name in names):
        return "it is an archive of NumPy: pass load_torch a dict of its arrays"
    if "model.weights.h5" in names:
        return "it is a model of Keras, and not PyTorch's"
    return None


def _fields(identity: Any) -> tuple[Any, ...]:
    """Returns the fields of a reference to a storage: tag, type, key, device, size."""
    if not isinstance(identity, tuple) or not 3 <= len(identity) <= 8:
        raise ValueError("it refers to something that is not a storage")
    if not isinstance(identity[2], str):
        raise ValueError("it refers to a storage by something other than text")
    return identity


def _read_stream(stream: BinaryIO) -> Any:
    """Reads the format before PyTorch 1.6.

    It consists of five pickles: a magic number, a version, the machine, the saved
    object, and the names of the storages; the storages follow.
    """
    magic = read_pickle(stream)
    if type(magic) is not int or magic != _MAGIC_OF_STREAMS:
        raise TPPError("it is a pickle, but not one that torch.save wrote")
    read_pickle(stream)
    read_pickle(stream)
    source: dict[str, bytes] = {}
    sizes: dict[str, int] = {}

    def refer(identity: Any) -> Any:
        if isinstance(identity, tuple) and identity[:1] == ("module",):
            return identity[1]  # a class, which comes with the text of its definition
        _, storage_type, key, _, _, *view = _fields(identity)
        dtype = dtype_of_storage(storage_type)
        sizes[key] = dtype.itemsize
        start = view[0][1] if view and view[0] else 0
        return Storage(dtype, key, source, start)

    saved = read_pickle(stream, refer)
    keys = read_pickle(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("it has no list of its storages")
    for key in keys:
        (count,) = struct.unpack("<q", stream.read(8))
        size = count * sizes[key]
        source[key] = stream.read(max(size, 0))
        if len(source[key]) != size:
            raise EOFError("it ends too early")
    return saved
