"""PyTorch's files as NumPy arrays by name: without PyTorch, and running nothing.

``torch.save`` writes a pickle, which only refers to the numbers, and the numbers as raw
bytes: *storages*, of which each tensor is a strided view. Since PyTorch 1.6 both are
entries of a zip archive; before, they followed one another in one stream.
"""

import dataclasses
import io
import pathlib
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from tpp_jax.errors import TPPError
from tpp_jax.interop.pickles import Global, Record, read_pickle

Tensors = dict[str, np.ndarray]

_DTYPES = {
    "Double": np.float64,
    "Float": np.float32,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
    "ComplexFloat": np.complex64,
    "ComplexDouble": np.complex128,
    "Untyped": np.uint8,
}
_DTYPES_OF_SAFETENSORS = {
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
_OF_A_CHECKPOINT = ("state_dict", "model_state_dict", "model", "net")
# A module may hold itself, or another one twice, which then is there four times, ….
_DEEPEST, _MOST_MODULES = 100, 100_000

_DAMAGE = (
    *(ValueError, TypeError, AttributeError, LookupError, OverflowError),
    *(EOFError, struct.error, zipfile.BadZipFile, NotImplementedError, RuntimeError),
)


def read_torch(path: str | pathlib.Path) -> Tensors:
    """Reads the tensors of a file, whatever its suffix says.

    Args:
      path: a ``.safetensors`` file, or one that ``torch.save`` wrote in any version of
        PyTorch: a state dict, a checkpoint with one inside, or a whole module.

    Returns:
      Arrays by PyTorch's names, of PyTorch's shapes and types. They may be read-only.

    Raises:
      TPPError: the file is missing, damaged, or holds no weights.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise TPPError(f"there is no file of weights at {path}")
    content = path.read_bytes()
    _check_is_a_file_of_weights(content, path)
    try:
        if _is_safetensors(content):
            return _read_safetensors(content)
        stream = io.BytesIO(content)
        saved = _read_zip(stream) if content[:2] == b"PK" else _read_stream(stream)
        return tensors_in(saved)
    except TPPError as error:
        raise TPPError(f"{path}: {error}") from error
    except _DAMAGE as error:
        # The text of a KeyError is a key, which says nothing to a person.
        reason = "no pickle" if isinstance(error, KeyError) else str(error)
        raise TPPError(
            f"{path} is damaged, or no file of weights ({reason}): fetch it again"
        ) from error


def tensors_in(saved: Any) -> Tensors:
    """Returns the tensors of what was saved: a state dict, or something around one.

    Args:
      saved: tensors by name (PyTorch's, NumPy's or JAX's), a checkpoint that holds them
        as ``state_dict``, ``model`` or ``net``, or what was read off a pickled module.

    Raises:
      TPPError: there are no tensors, or something else among them.
    """
    if isinstance(saved, Record):
        tensors = dict(_tensors_of_module(saved))
        if not tensors:
            raise TPPError(f"it holds {_kind(saved)}, in which there are no weights")
        return tensors
    if not isinstance(saved, Mapping):
        raise TPPError(f"a state dict is wanted, this is {_kind(saved)}")
    for key in _OF_A_CHECKPOINT:
        if isinstance(saved.get(key), Mapping | Record) and not _is_tensor(saved[key]):
            return tensors_in(saved[key])
    for name, value in saved.items():
        if not isinstance(name, str) or not _is_tensor(value):
            some = ", ".join(str(key) for key in list(saved)[:5])
            raise TPPError(
                f"a state dict is wanted, this is a dict of {some}, where {name} is "
                f"{_kind(value)}; a state dict inside it has to be picked by hand"
            )
    if not saved:
        raise TPPError("the state dict is empty")
    return {name: _as_numpy(value) for name, value in saved.items()}


def _check_is_a_file_of_weights(content: bytes, path: pathlib.Path) -> None:
    start = content[:200].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise TPPError(f"{path} is a web page, not weights: fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise TPPError(
            f"{path} only stands for a file that Git LFS keeps: run git lfs pull"
        )
    if not content:
        raise TPPError(f"{path} is empty: fetch it again")


def _is_safetensors(content: bytes) -> bool:
    return content[8:9] == b"{" and int.from_bytes(content[:8], "little") < 2**32


def _read_safetensors(content: bytes) -> Tensors:
    import safetensors  # here, so that only who has such a file needs the package

    try:
        found = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise ValueError(error) from error
    return {
        name: np.frombuffer(it["data"], _DTYPES_OF_SAFETENSORS[it["dtype"]]).reshape(
            it["shape"]
        )
        for name, it in found
    }


def _read_zip(stream: BinaryIO) -> Any:
    archive = zipfile.ZipFile(stream)
    entries = set(archive.namelist())
    pickles = [entry for entry in entries if entry.endswith("data.pkl")]
    if len(pickles) != 1:
        raise TPPError("it is a zip archive, but not one that torch.save wrote")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise TPPError("it is compressed, which torch.save does not do: unpack it")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in entries:
        raise TPPError("it holds a TorchScript program: save its state_dict() instead")
    order = f"{folder}byteorder"
    if order in entries and archive.read(order) != b"little":
        raise TPPError("it is of a big-endian machine: save it as .safetensors there")
    source: dict[str, bytes] = {}

    def refer(identity: Any) -> _Storage:
        _, kind, key, *_ = identity
        if key not in source:
            source[key] = archive.read(f"{folder}data/{key}")
        return _Storage(_dtype(kind), key, source)

    return read_pickle(io.BytesIO(archive.read(pickles[0])), refer)


def _read_stream(stream: BinaryIO) -> Any:
    """Reads five pickles: a magic number, a version, the machine, what was saved, and
    the names of the storages, which follow."""
    if read_pickle(stream) != _MAGIC_OF_STREAMS:
        raise TPPError("it is a pickle, but not one that torch.save wrote")
    read_pickle(stream)
    read_pickle(stream)
    source: dict[str, bytes] = {}
    sizes: dict[str, int] = {}

    def refer(identity: Any) -> Any:
        what, kind, *rest = identity
        if what == "module":  # a class, beside the text of its definition
            return kind
        key, _, _, *view = rest
        dtype = _dtype(kind)
        sizes[key] = dtype.itemsize
        start = view[0][1] if view and view[0] else 0
        return _Storage(dtype, key, source, start)

    saved = read_pickle(stream, refer)
    for key in read_pickle(stream):
        (count,) = struct.unpack("<q", stream.read(8))
        size = count * sizes[key]
        source[key] = stream.read(max(size, 0))
        if len(source[key]) != size:
            raise EOFError("it ends too early")
    return saved


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Where a tensor's numbers are.

    Attributes:
      dtype: type of the numbers.
      key: name of their bytes.
      source: all bytes by name; a stream's come after the pickle and are added then.
      start: first number that belongs to this storage.
    """

    dtype: np.dtype
    key: str
    source: Mapping[str, bytes]
    start: int = 0


def _dtype(kind: Global) -> np.dtype:
    """Returns the type in ``torch.FloatStorage``, ``torch.cuda.HalfStorage``, …"""
    return np.dtype(_DTYPES[kind.name.rpartition(".")[2].removesuffix("Storage")])


def _tensors_of_module(root: Record) -> Iterator[tuple[str, np.ndarray]]:
    """Yields what ``state_dict()`` of a pickled module would."""
    stack, count = [("", root)], 0
    while stack:
        prefix, module = stack.pop()
        count += 1
        if prefix.count(".") > _DEEPEST or count > _MOST_MODULES:
            raise TPPError("the module in it holds itself, or too many modules")
        state = module.state if isinstance(module.state, dict) else {}
        unsaved = state.get("_non_persistent_buffers_set", ())
        buffers = state.get("_buffers", {}).items()
        own = {name: value for name, value in buffers if name not in unsaved}
        for name, value in {**state.get("_parameters", {}), **own}.items():
            if value is not None:
                yield f"{prefix}{name}", _as_numpy(value)
        for name, child in state.get("_modules", {}).items():
            if child is not None:
                stack.append((f"{prefix}{name}.", child))


def _is_tensor(value: Any) -> bool:
    if isinstance(value, Record):
        return isinstance(value.what, Global) and value.what.name in _REBUILDS
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _as_numpy(value: Any) -> np.ndarray:
    if isinstance(value, Record):
        return _rebuild(value.what, value.args)
    if type(value).__module__.partition(".")[0] != "torch":
        return np.asarray(value)
    # By way of its bytes, since NumPy's own types are not all that PyTorch has.
    value = value.detach().cpu().contiguous()
    torch = sys.modules["torch"]
    numbers = value.reshape(-1).view(torch.uint8).numpy()
    dtype = np.dtype(str(value.dtype).removeprefix("torch."))
    return numbers.view(dtype).reshape(tuple(value.shape))


_OF_A_STORAGE = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_OF_A_STORAGE_AND_DTYPE = "torch._utils._rebuild_tensor_v3"
_OF_A_TENSOR = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",  # PyTorch before 0.4
    "torch.autograd.variable.Variable",
)
_OF_A_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
_REBUILDS = (*_OF_A_STORAGE, _OF_A_STORAGE_AND_DTYPE, *_OF_A_TENSOR, _OF_A_SUBCLASS)


def _rebuild(what: Any, args: Any) -> np.ndarray:
    """Does what the function of PyTorch that the pickle names would do."""
    match getattr(what, "name", None), args:
        case name, (storage, offset, size, stride, *_) if name in _OF_A_STORAGE:
            return _strided(storage, storage.dtype, offset, size, stride)
        case name, (storage, offset, size, stride, _, _, dtype, *_) if (
            name == _OF_A_STORAGE_AND_DTYPE
        ):
            dtype = np.dtype(dtype.name.removeprefix("torch."))
            return _strided(storage, dtype, offset, size, stride)
        case name, (Record() as tensor, *_) if name in _OF_A_TENSOR:
            return _rebuild(tensor.what, tensor.args)
        case name, (function, _, inner, *_) if name == _OF_A_SUBCLASS:
            return _rebuild(function, inner)
    raise ValueError(f"it has {_kind(Record(what, args))} where a tensor should be")


def _strided(
    storage: _Storage, dtype: np.dtype, offset: int, size: Any, stride: Any
) -> np.ndarray:
    if 0 in size:
        return np.zeros(size, dtype)
    numbers = np.frombuffer(storage.source[storage.key], dtype)[storage.start :]
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if min(offset, *size, *stride, 0) < 0 or last >= len(numbers):
        raise ValueError("a tensor reaches beyond its numbers")
    strides = [s * dtype.itemsize for s in stride]
    view = np.lib.stride_tricks.as_strided
    return view(numbers[offset:], size, strides, writeable=False)


def _kind(value: Any) -> str:
    """Names what a value is, for a message."""
    if isinstance(value, Record):
        return f"an object of {getattr(value.what, 'name', 'unknown type')}"
    return f"of type {type(value).__name__}"
