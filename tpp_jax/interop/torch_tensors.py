"""Tensors of PyTorch as NumPy arrays, from the records of a pickle.

A tensor is a call of one of PyTorch's functions with a storage, an offset, a size and a
stride; it becomes a view within the bounds of the storage. A pickled module is searched
for its parameters and buffers.
"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from tpp_jax.errors import TPPError
from tpp_jax.interop.names import shown
from tpp_jax.interop.pickles import Global, Record

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
# A module may contain itself, or one twice that contains another one twice, and so on.
_DEEPEST, _MOST_ENTRIES, _MOST_CHARACTERS = 100, 200_000, 30_000_000
_MOST_AXES = 32

_QUANTISED = "quantised: save the model before it is quantised, or dequantize() it"
_SPARSE = "sparse: call its to_dense() before it is saved"
_WITHOUT_NUMBERS = "on PyTorch's meta device, without numbers: load the weights first"


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """The location of a tensor's numbers.

    Attributes:
      dtype: Type of the numbers.
      key: Name of their bytes.
      source: All bytes by name; in a stream they follow the pickle and are added later.
      start: Index of the first number that belongs to this storage.
    """

    dtype: np.dtype
    key: str
    source: Mapping[str, bytes]
    start: int = 0


def dtype_of_storage(storage_type: Any) -> np.dtype:
    """Returns the type of the numbers in a storage of PyTorch.

    Args:
      storage_type: Global such as ``torch.FloatStorage`` or ``torch.cuda.HalfStorage``.

    Raises:
      TPPError: If NumPy does not have the type.
    """
    name = storage_type.name.rpartition(".")[2].removesuffix("Storage")
    if name not in _DTYPES:
        if name.startswith(("Q", "q")):
            raise TPPError(
                f"it has numbers of type {shown(name)}, so it is {_QUANTISED}"
            )
        raise TPPError(f"it has numbers of type {shown(name)}, which is not supported")
    return np.dtype(_DTYPES[name])


def tensors_of_module(root: Record) -> Tensors:
    """Returns what ``state_dict()`` of a pickled module would return.

    Args:
      root: Record of the module.

    Raises:
      TPPError: If a module contains itself, or there are too many entries.
    """
    found: dict[str, Any] = {}
    stack = [("", 0, root)]
    entries = characters = 0
    while stack:
        prefix, depth, module = stack.pop()
        state = module.state if isinstance(module.state, dict) else {}
        parameters, buffers, children = (
            state.get(f"_{table}", {}) for table in ("parameters", "buffers", "modules")
        )
        unsaved = state.get("_non_persistent_buffers_set", [])
        entries += 1 + sum(map(len, (parameters, buffers, children, unsaved)))
        names = [name for table in (parameters, buffers, children) for name in table]
        characters += sum(len(prefix) + len(str(name)) for name in names)
        if depth > _DEEPEST or entries > _MOST_ENTRIES or characters > _MOST_CHARACTERS:
            raise TPPError("the module in it contains itself, or too many modules")
        skipped = {name for name in unsaved if isinstance(name, str)}
        own = {name: value for name, value in buffers.items() if name not in skipped}
        for name, value in {**parameters, **own}.items():
            if value is not None:
                found[f"{prefix}{name}"] = value
        for name, child in children.items():
            if child is not None:
                stack.append((f"{prefix}{name}.", depth + 1, child))
    return {name: as_numpy(value) for name, value in found.items()}


def is_tensor(value: Any) -> bool:
    """Returns whether a value is a tensor of PyTorch, an array or a tensor's record."""
    if isinstance(value, Record):
        return isinstance(value.callee, Global) and value.callee.name in _REBUILDS
    return hasattr(value, "shape") and hasattr(value, "dtype")


def as_numpy(value: Any) -> np.ndarray:
    """Returns a tensor as an array, a view if possible.

    Args:
      value: Tensor of PyTorch, array, or record of a tensor.

    Raises:
      TPPError: If its numbers are missing, or stored in an unsupported way.
      ValueError: If its record is damaged.
    """
    if isinstance(value, Record):
        return _rebuild(value)
    if type(value).__module__.partition(".")[0] != "torch":
        return np.asarray(value)
    for flag, remedy in _OF_TORCH.items():
        if getattr(value, flag, False):
            raise TPPError(f"a tensor is {remedy}")
    # As bytes first, since NumPy lacks some of PyTorch's types.
    value = value.detach().cpu().contiguous()
    torch = sys.modules["torch"]
    numbers = value.reshape(-1).view(torch.uint8).numpy()
    dtype = np.dtype(str(value.dtype).removeprefix("torch."))
    return numbers.view(dtype).reshape(tuple(value.shape))


_OF_TORCH = {
    "is_quantized": _QUANTISED,
    "is_sparse": _SPARSE,
    "is_sparse_csr": _SPARSE,
    "is_meta": _WITHOUT_NUMBERS,
}
_NOT_READ = {
    "torch._utils._rebuild_qtensor": _QUANTISED,
    "torch._utils._rebuild_sparse_tensor": _SPARSE,
    "torch._utils._rebuild_sparse_csr_tensor": _SPARSE,
    "torch._utils._rebuild_nested_tensor": "nested: save its parts",
    "torch._utils._rebuild_meta_tensor_no_storage": _WITHOUT_NUMBERS,
}
_OF_A_STORAGE = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_OF_A_NEWER_TYPE = "torch._utils._rebuild_tensor_v3"
_OF_A_TENSOR = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",  # PyTorch before 0.4
    "torch.autograd.variable.Variable",
)
_OF_A_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
_REBUILDS = (*_OF_A_STORAGE, _OF_A_NEWER_TYPE, *_OF_A_TENSOR, _OF_A_SUBCLASS)
_NEWER_DTYPES = {
    *("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
}


def why_unreadable(value: Any) -> str | None:
    """Returns why a tensor is not supported; None if it is.

    Args:
      value: Record of a tensor, or any other value.
    """
    if isinstance(value, Record) and isinstance(value.callee, Global):
        return _NOT_READ.get(value.callee.name)
    return None


def _rebuild(tensor: Record) -> np.ndarray:
    """Rebuilds a tensor as the functions of PyTorch that the pickle names would."""
    callee, args = tensor.callee, tensor.args
    for _ in range(_DEEPEST):  # parameters around tensors, and subclasses around both
        # None of the functions has more arguments than this.
        match getattr(callee, "name", None), args[:8]:
            case name, (Storage() as storage, offset, size, stride, *_) if (
                name in _OF_A_STORAGE
            ):
                return _strided(storage, storage.dtype, offset, size, stride)
            case name, (
                Storage() as storage,
                offset,
                size,
                stride,
                _,
                _,
                dtype,
                *_,
            ) if name == _OF_A_NEWER_TYPE:
                return _strided(storage, _newer_dtype(dtype), offset, size, stride)
            case name, (Record() as inner, *_) if name in _OF_A_TENSOR:
                callee, args = inner.callee, inner.args
            case name, (function, _, inner, *_) if name == _OF_A_SUBCLASS:
                callee, args = function, inner
            case _:
                break
    record = Record(callee, args)
    if reason := why_unreadable(record):
        raise TPPError(f"a tensor is {reason}")
    raise ValueError(f"it has {described(record)} where a tensor should be")


def _newer_dtype(dtype: Any) -> np.dtype:
    name = dtype.name.removeprefix("torch.")
    if name not in _NEWER_DTYPES:
        raise TPPError(f"it has numbers of type {shown(name)}, which is not supported")
    return np.dtype(name)


def _strided(
    storage: Storage, dtype: np.dtype, offset: Any, size: Any, stride: Any
) -> np.ndarray:
    sizes = isinstance(size, tuple | list) and isinstance(stride, tuple | list)
    if not sizes or len(size) > _MOST_AXES or len(size) != len(stride):
        raise ValueError("a tensor has no size and stride, or too many axes")
    if not all(type(n) is int and n >= 0 for n in (storage.start, offset, *size)):
        raise ValueError("a tensor has a size that is not a number")
    if not all(type(n) is int and n >= 0 for n in stride):
        raise ValueError("a tensor has a stride that is not a number")
    if 0 in size:
        return np.zeros(size, dtype)
    numbers = storage.source[storage.key]
    first = storage.start + offset
    last = first + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if (last + 1) * dtype.itemsize > len(numbers):
        raise ValueError("a tensor extends beyond its numbers")
    strides = [n * dtype.itemsize for n in stride]
    return np.ndarray(tuple(size), dtype, numbers, first * dtype.itemsize, strides)


def described(value: Any) -> str:
    """Returns the type of a value, for a message.

    Args:
      value: Any value.
    """
    if isinstance(value, Record):
        name = getattr(value.callee, "name", "unknown type")
        return f"an object of {shown(name)}"
    return f"of type {type(value).__name__}"
