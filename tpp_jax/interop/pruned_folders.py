"""Folders of language models that are pruned without being loaded: ``prune_hf``.

Each tensor is read when it is scored, and once more when it is cut, so that a model may
be larger than the memory of the host.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpp_jax.errors import TPPError
from tpp_jax.graph.arrays import cut
from tpp_jax.graph.naming import named_leaves
from tpp_jax.interop.decoder_config import (
    OWN_FAMILY,
    busy_layers,
    config_from_json,
    json_of,
    without_idle_layers,
)
from tpp_jax.interop.hugging_face import (
    names_of,
    set_frequencies,
    settings_of,
    tensor_of,
    weights_file,
)
from tpp_jax.interop.lazy_tensors import tensors_of
from tpp_jax.interop.places import Place
from tpp_jax.interop.torch_weights import replacing, write_safetensors
from tpp_jax.models.decoder import Decoder, Frequencies, rotary_frequencies
from tpp_jax.pruning.channels import channel_groups
from tpp_jax.pruning.cutting import prune
from tpp_jax.pruning.masks import keep_masks
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.planning import make_plan

_FILE_BYTES = 2**30
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "generation_config.json"),
)


def prune_hf(
    folder: str | pathlib.Path,
    target: str | pathlib.Path,
    ratios: Any = None,
    **choices: Any,
) -> Plan:
    """Prunes a folder of Hugging Face transformers, one tensor at a time.

    The result is what :func:`tpp_jax.load_hf`, :func:`tpp_jax.prune` and
    :func:`tpp_jax.save_hf` give together, but neither model is ever in memory: only one
    tensor, and the tensors of one file that is written (1 GiB). Weights are not
    rescaled: after TPP, whose pruned filters are zero, use these three.

    Args:
      folder: Folder as for :func:`tpp_jax.load_hf`, with weights in safetensors.
      target: Folder to write, which must not exist or be empty. Files of the tokenizer
        are copied.
      ratios: Share of the channels to prune, as for :func:`tpp_jax.make_plan`.
      **choices: Arguments of :func:`tpp_jax.make_plan`, such as ``counts``, ``params``,
        ``criterion`` and ``scores``.

    Returns:
      The plan.

    Raises:
      TPPError: The folder cannot be read or the plan not be made, or the target has
        files.

    Example:
      >>> import pathlib, tempfile
      >>> from tpp_jax.interop.hugging_face import load_hf, save_hf
      >>> from tpp_jax.models import DecoderConfig
      >>> config = DecoderConfig(
      ...     vocabulary=50, width=16, depth=2, heads=4, kv_heads=2, head_size=4,
      ...     hidden=32,
      ... )
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> save_hf(Decoder(config, rngs=nnx.Rngs(0)), folder / "dense")
      >>> plan = prune_hf(folder / "dense", folder / "small", {"*.mlp.gate_proj": 0.5})
      >>> load_hf(folder / "small")[0].config.hidden
      16
    """
    folder, target = pathlib.Path(folder), pathlib.Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TPPError(f"{target} exists and is not an empty folder: name a new one")
    settings = settings_of(folder)
    config = config_from_json(settings, folder / "config.json")
    tensors = tensors_of(weights_file(folder))
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    for i, layer in enumerate(model.layers):
        layer.self_attn.frequencies = Frequencies(rotary_frequencies(config, i))
    if settings["model_type"] == OWN_FAMILY:
        set_frequencies(model, settings["tpp_jax"].get("frequencies"), folder)
    shapes = {n: x.shape for n, x in named_leaves(nnx.state(model, nnx.Param)).items()}
    sources = {
        leaf: _Leaf(leaf, tensor_of(tensors, name, place.shape(shapes[leaf])), place)
        for leaf, (name, place) in names_of(model).items()
    }
    tokens = jnp.zeros((1, 16), int)
    groups = channel_groups(model, tokens)
    frequencies = {
        f"layers.{i}.self_attn.frequencies": layer.self_attn.frequencies[...]
        for i, layer in enumerate(model.layers)
    }
    plan = make_plan(groups, {**sources, **frequencies}, ratios, **choices)
    small = prune(model, plan)
    short, busy = without_idle_layers(small), busy_layers(small)
    written = {
        leaf: (name, place, sources[_in_dense(leaf, busy)])
        for leaf, (name, place) in names_of(short).items()
    }
    dtype = sources["embed_tokens.embedding"].dtype
    settings = json_of(short) | {"torch_dtype": str(dtype)}
    target.mkdir(parents=True, exist_ok=True)
    _write(written, named_leaves(nnx.state(short, nnx.Param)), plan, target)
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    with replacing(target / "config.json") as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n")
    return plan


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A parameter that is read when NumPy asks for it.

    Attributes:
      leaf: Name of the parameter.
      tensor: Tensor in the file.
      place: Place of the parameter.
    """

    leaf: str
    tensor: Any
    place: Place

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the layout of the model; kernels of a decoder have two axes."""
        shape = self.tensor.shape
        return tuple(shape[::-1]) if self.place.is_kernel else tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        """Type of the tensor."""
        return self.tensor.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the tensor."""
        found = self.place.to_ours(np.asarray(self.tensor))
        return found.astype(dtype or found.dtype, copy=False)


def _in_dense(leaf: str, busy: Sequence[int]) -> str:
    """Returns the name that a parameter has before idle layers are left out."""
    head, _, rest = leaf.partition("layers.")
    if head or not rest:
        return leaf
    number, _, rest = rest.partition(".")
    return f"layers.{busy[int(number)]}.{rest}"


def _write(
    written: Mapping[str, tuple[str, Place, _Leaf]],
    shapes: Mapping[str, Any],
    plan: Plan,
    target: pathlib.Path,
) -> None:
    """Writes the cut tensors, in files of at most 1 GiB, and their index.

    Args:
      written: Name of a parameter of the pruned model → name and place in the folder
        that is written, and where it is read.
      shapes: Parameters of the pruned model, abstract.
      plan: Plan of the cut.
      target: Folder to write.
    """
    files = _files(
        {n: shapes[n].size * x[2].dtype.itemsize for n, x in written.items()}
    )
    index = {}
    for i, leaves in enumerate(files):
        file = "model.safetensors"
        if len(files) > 1:
            file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        tensors = {}
        for leaf in leaves:
            name, place, source = written[leaf]
            small = cut(np.asarray(source), keep_masks(plan, source.leaf))
            tensors[name] = np.ascontiguousarray(place.to_torch(small))
            index[name] = file
        with replacing(target / file) as partial:
            write_safetensors(tensors, partial)
    if len(files) > 1:
        content = {"metadata": {}, "weight_map": index}
        with replacing(target / "model.safetensors.index.json") as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n")


def _files(sizes: Mapping[str, int]) -> Sequence[list[str]]:
    """Returns the parameters of each file that is written."""
    files: list[list[str]] = [[]]
    room = _FILE_BYTES
    for leaf, size in sizes.items():
        if files[-1] and size > room:
            files.append([])
            room = _FILE_BYTES
        files[-1].append(leaf)
        room -= size
    return files
