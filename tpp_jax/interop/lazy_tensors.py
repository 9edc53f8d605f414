"""Tensors of safetensors files that are read one at a time.

A folder of weights may be as large as the memory of a host. What is read first is the
header of each file, which says where its tensors are.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from tpp_jax.interop.torch_files import DTYPES_OF_SAFETENSORS, read_torch, shards_of

LazyTensors = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class TensorInFile:
    """A tensor that is read when NumPy asks for it.

    Attributes:
      file: Path of the file.
      start: Offset of its first byte.
      shape: Shape of the tensor.
      dtype: Type of its entries.
    """

    file: pathlib.Path
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the tensor."""
        count = int(np.prod(self.shape))
        found = np.fromfile(self.file, self.dtype, count, offset=self.start)
        return found.reshape(self.shape).astype(dtype or self.dtype, copy=False)


def tensors_of(path: pathlib.Path) -> LazyTensors:
    """Returns the tensors of a file of weights, or of the files that an index lists.

    Args:
      path: Path as for :func:`tpp_jax.interop.torch_files.read_torch`, which reads all
        files that are not safetensors, and reports what is wrong with a damaged one.

    Returns:
      Arrays by name, of which those in safetensors files are read later.
    """
    found = _of_files(path)
    return read_torch(path) if found is None else found


def _of_files(path: pathlib.Path) -> LazyTensors | None:
    """Returns the tensors; None if there is a file that is not plain safetensors."""
    if path.suffix != ".json":
        return _of_file(path)
    shards = shards_of(path)
    tensors: dict[str, TensorInFile] = {}
    for shard in dict.fromkeys((shards or {}).values()):
        found = _of_file(path.parent / shard)
        if found is None:
            return None
        assert shards is not None
        tensors |= {n: x for n, x in found.items() if shards.get(n, shard) == shard}
    return tensors if shards and shards.keys() <= tensors.keys() else None


def _of_file(path: pathlib.Path) -> dict[str, TensorInFile] | None:
    import safetensors  # late: only these files need the package

    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "numpy"):
            pass  # the package checks that the header fits the file
    except (safetensors.SafetensorError, OSError):
        return None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    if any(it["dtype"] not in DTYPES_OF_SAFETENSORS for it in header.values()):
        return None
    return {
        name: TensorInFile(
            path,
            8 + length + it["data_offsets"][0],
            tuple(it["shape"]),
            np.dtype(DTYPES_OF_SAFETENSORS[it["dtype"]]),
        )
        for name, it in header.items()
    }
