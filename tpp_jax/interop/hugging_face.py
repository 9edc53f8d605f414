"""Decoder language models in the folders of Hugging Face transformers.

A folder has the settings in ``config.json``, the weights in ``model.safetensors`` or in
several files and an index, and mostly the tokenizer in ``tokenizer.json``. Neither
transformers nor PyTorch is needed.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from flax import nnx

from tpp_jax.errors import TPPError, require
from tpp_jax.graph.arrays import Shardings, placed, sharding_for
from tpp_jax.graph.naming import map_named, named_leaves
from tpp_jax.interop.decoder_config import (
    OWN_FAMILY,
    config_from_json,
    json_of,
    without_idle_layers,
)
from tpp_jax.interop.lazy_tensors import LazyTensors, tensors_of
from tpp_jax.interop.names import shown
from tpp_jax.interop.places import Place, places
from tpp_jax.interop.torch_tensors import Tensors
from tpp_jax.interop.torch_weights import replacing, write_safetensors
from tpp_jax.models.decoder import (
    Decoder,
    DecoderConfig,
    Frequencies,
    rotary_frequencies,
)

_CONFIG, _WEIGHTS, _TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


def load_hf(
    folder: str | pathlib.Path,
    *,
    dtype: Any = None,
    param_dtype: Any = None,
    sharding: Shardings | None = None,
) -> tuple[Decoder, Any]:
    """Loads a language model from a folder of Hugging Face transformers.

    Args:
      folder: Folder with ``config.json`` and with ``model.safetensors`` or the index of
        weights in several files: Llama, SmolLM2, Qwen 2 and 3, Mistral, or Gemma (1);
        or one that :func:`save_hf` wrote.
      dtype: Type of the computation; None for that of the parameters.
      param_dtype: Type of the parameters; None for that of the file.
      sharding: Sharding of all parameters, or function of the name and shape of a
        parameter (``"layers.0.mlp.up_proj.kernel"``) to its sharding; None for the
        default device. Axes of a mesh that do not divide a parameter are left out. One
        tensor at a time is read from safetensors, and each device gets its part.

    Returns:
      The model, and its tokenizer: a ``tokenizers.Tokenizer``, or None if the folder
      has none.

    Raises:
      TPPError: If a file is missing or damaged, the architecture is another one, the
        weights do not fit the settings, a sharding does not fit, or the folder has a
        tokenizer and the package tokenizers is not installed.

    Example:
      >>> import tempfile
      >>> from tpp_jax.models import Decoder, DecoderConfig
      >>> config = DecoderConfig(
      ...     vocabulary=50, width=16, depth=2, heads=4, kv_heads=2, head_size=4,
      ...     hidden=32,
      ... )
      >>> folder = tempfile.mkdtemp()
      >>> save_hf(Decoder(config, rngs=nnx.Rngs(0)), folder)
      >>> model, tokenizer = load_hf(folder)
      >>> model.layers[0].mlp.up_proj.kernel.shape
      (16, 32)
    """
    folder = pathlib.Path(folder)
    settings = settings_of(folder)
    model = decoder_from_torch(
        tensors_of(weights_file(folder)),
        config_from_json(settings, folder / _CONFIG),
        gemma=settings["model_type"] == "gemma",
        dtype=dtype,
        param_dtype=param_dtype,
        sharding=sharding,
    )
    if settings["model_type"] == OWN_FAMILY:
        set_frequencies(model, settings["tpp_jax"].get("frequencies"), folder)
    return model, _tokenizer(folder / _TOKENIZER)


def save_hf(model: Decoder, folder: str | pathlib.Path, tokenizer: Any = None) -> None:
    """Saves a language model as a folder of Hugging Face transformers.

    Transformers opens it and computes the same logits if all layers have equal sizes
    and no dimension of a head was removed. It refuses other models, whose sizes it
    cannot represent; :func:`load_hf` reads both. Layers that have neither heads nor
    units, and no biases behind them, are left out. Each file is replaced atomically.

    Args:
      model: Model, pruned or not.
      folder: Folder to write into; it is created if it does not exist.
      tokenizer: The ``tokenizers.Tokenizer`` of the model; None to write none.

    Raises:
      TPPError: If the model is not a decoder, or is abstract.

    Example:
      >>> import tempfile
      >>> from tpp_jax.models import Decoder, DecoderConfig
      >>> config = DecoderConfig(
      ...     vocabulary=50, width=16, depth=2, heads=4, kv_heads=2, head_size=4,
      ...     hidden=(32, 24),
      ... )
      >>> folder = tempfile.mkdtemp()
      >>> save_hf(Decoder(config, rngs=nnx.Rngs(0)), folder)
      >>> load_hf(folder)[0].config.hidden
      (32, 24)
    """
    if not isinstance(model, Decoder):
        raise TPPError(
            f"this {type(model).__name__} is no tpp_jax.models.Decoder: save it with "
            "save_model, or its weights with save_torch"
        )
    folder, model = pathlib.Path(folder), without_idle_layers(model)
    leaves = named_leaves(_weights(model))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves.values()):
        raise TPPError("this Decoder is abstract: there are no arrays to save")
    settings = json_of(model)
    settings["torch_dtype"] = str(leaves["embed_tokens.embedding"].dtype)
    gemma = settings["model_type"] == "gemma"
    tensors: Tensors = {}
    for leaf, (name, place) in names_of(model).items():
        array = place.to_torch(np.asarray(leaves[leaf]))
        if gemma and leaf.endswith(".scale"):
            array = array - np.ones((), array.dtype)
        tensors[name] = np.ascontiguousarray(array)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / _WEIGHTS) as partial:
        write_safetensors(tensors, partial)
    with replacing(folder / _CONFIG) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n")
    if tokenizer is not None:
        with replacing(folder / _TOKENIZER) as partial:
            partial.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def decoder_from_torch(
    tensors: LazyTensors,
    config: DecoderConfig,
    *,
    gemma: bool = False,
    dtype: Any = None,
    param_dtype: Any = None,
    sharding: Shardings | None = None,
) -> Decoder:
    """Returns a decoder with the weights of one of transformers.

    Args:
      tensors: Arrays by their names in transformers.
      config: Sizes and settings.
      gemma: Whether the scales of the norms are stored less 1.
      dtype: Type of the computation; None for that of the parameters.
      param_dtype: Type of the parameters; None for that of the tensors.
      sharding: Sharding of the parameters, as for :func:`load_hf`.

    Raises:
      TPPError: If tensors are missing, left over, or of other shapes; or a sharding
        does not fit.
    """
    model = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    shapes = {name: leaf.shape for name, leaf in named_leaves(_weights(model)).items()}
    # Some files have a tied embedding twice, or numbers that follow from the settings.
    left = {
        name: array
        for name, array in tensors.items()
        if not (config.tied and name == "lm_head.weight")
        and not name.endswith("rotary_emb.inv_freq")
    }
    arrays = {}
    for leaf, (name, place) in names_of(model).items():
        tensor = tensor_of(left, name, place.shape(shapes[leaf]))
        del left[name]
        array = place.to_ours(np.asarray(tensor))
        if gemma and leaf.endswith(".scale"):
            array = array + np.ones((), array.dtype)
        its_dtype = jax.dtypes.canonicalize_dtype(param_dtype or array.dtype)
        its_sharding = sharding_for(sharding, leaf, array.shape)
        arrays[leaf] = placed(array.astype(its_dtype, copy=False), its_sharding)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise TPPError(
            f"the weights have {shown(next(iter(left)))}{more}, which the settings do "
            "not imply"
        )
    nnx.update(model, map_named(lambda leaf, _: arrays[leaf], _weights(model)))
    for i, layer in enumerate(model.layers):
        frequencies = rotary_frequencies(config, i)
        name = f"layers.{i}.self_attn.frequencies"
        where = sharding_for(sharding, name, frequencies.shape)
        layer.self_attn.frequencies = Frequencies(placed(frequencies, where))
    return model


def tensor_of(tensors: LazyTensors, name: str, shape: tuple[int, ...]) -> Any:
    """Returns a tensor of the shape that the settings imply.

    Raises:
      TPPError: It is missing or of another shape.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise TPPError(f"the weights have no {name}, which the settings imply")
    if tensor.shape != shape:
        raise TPPError(
            f"{name} is {'×'.join(map(str, tensor.shape))} in the weights and "
            f"{'×'.join(map(str, shape))} by the settings"
        )
    return tensor


def set_frequencies(model: Decoder, values: Any, folder: pathlib.Path) -> None:
    """Sets the rotary frequencies, which pruned dimensions leave out."""
    present = [layer.self_attn for layer in model.layers]
    sizes = [len(attention.frequencies[...]) for attention in present]
    try:
        new = [np.array(row, np.float32) for row in values]
    except (TypeError, ValueError):
        new = []
    if [row.shape for row in new] != [(size,) for size in sizes]:
        raise TPPError(f"{folder / _CONFIG} has other frequencies than its sizes imply")
    for attention, row in zip(present, new, strict=True):
        old = attention.frequencies[...]
        where = old.sharding if old.committed else None
        attention.frequencies = Frequencies(placed(row, where))


def _weights(model: Decoder) -> Any:
    """Returns the state of a decoder that is in files."""
    return nnx.state(model, nnx.Param)


def names_of(model: Decoder) -> dict[str, tuple[str, Place]]:
    """Returns the name in transformers, and the place, of each parameter."""
    found = {}
    for place in places(model):
        if not place.leaf.endswith(".frequencies"):
            prefix = "" if place.leaf.startswith("lm_head.") else "model."
            found[place.leaf] = prefix + place.name, place
    return found


def settings_of(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the content of ``config.json``.

    Raises:
      TPPError: It is missing or damaged.
    """
    file = folder / _CONFIG
    if not file.is_file():
        raise TPPError(
            f"there is no {file}: name a folder with a {_CONFIG} and weights"
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise TPPError(f"{file} is damaged JSON: fetch it again") from error
    if not isinstance(settings, dict):
        raise TPPError(f"{file} has no settings of a model")
    return settings


def weights_file(folder: pathlib.Path) -> pathlib.Path:
    """Returns the file of the weights, or their index."""
    names = _WEIGHTS, f"{_WEIGHTS}.index.json", "pytorch_model.bin"
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise TPPError(f"{folder} has none of {', '.join(names)}")


def _tokenizer(file: pathlib.Path) -> Any:
    if not file.is_file():
        return None
    require("text", "tokenizers")
    # Late, since only these folders need the package.
    import tokenizers  # pyright: ignore[reportMissingImports]

    return tokenizers.Tokenizer.from_file(str(file))
