"""Settings of decoders: in transformers' ``config.json``, and of a pruned model."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from tpp_jax.errors import TPPError
from tpp_jax.interop.names import shown
from tpp_jax.models.decoder import (
    Decoder,
    DecoderConfig,
    RopeScaling,
    rotary_frequencies,
)

Json = dict[str, Any]

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_LARGEST = 10_000_000  # of any size in a file
OWN_FAMILY = "tpp_jax_decoder"


def config_from_json(settings: Json, file: object) -> DecoderConfig:
    """Returns the settings of a decoder from a ``config.json``.

    Args:
      settings: Content of the file.
      file: Name of the file, for messages.

    Raises:
      TPPError: If the architecture or a setting is not supported, or a size is missing
        or no number.
    """
    family = settings.get("model_type")
    if family == OWN_FAMILY:
        return _own(settings.get("tpp_jax"), file)
    if family not in _FAMILIES:
        raise TPPError(
            f"{file} describes a {shown(family)}: decoders can be read from "
            f"{', '.join(_FAMILIES)}"
        )

    def size(name: str, default: int | None = None) -> int:
        value = settings.get(name)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < _LARGEST:
            raise TPPError(f"{file} has {name}: {shown(value)}, which is no size")
        return value

    width, heads = size("hidden_size"), size("num_attention_heads")
    gemma, qwen2 = family == "gemma", family == "qwen2"
    usual = 256 if gemma else 128 if family == "qwen3" else width // heads
    bias = bool(settings.get("attention_bias", False))
    return DecoderConfig(
        vocabulary=size("vocab_size"),
        width=width,
        depth=size("num_hidden_layers"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_size=size("head_dim", usual),
        hidden=size("intermediate_size"),
        rope_base=_number(_rope(settings), "rope_theta", file),
        rope_scaling=_rope_scaling(settings, file),
        window=_window(settings, size("num_hidden_layers"), file),
        activation=_activation(settings, gemma, file),
        epsilon=_number({"rms_norm_eps": 1e-6} | settings, "rms_norm_eps", file),
        tied=bool(settings.get("tie_word_embeddings", gemma)),
        qkv_bias=qwen2 or bias,
        output_bias=bias and not qwen2,
        mlp_bias=bool(settings.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        embedding_scale=math.sqrt(width) if gemma else 1.0,
    )


def _own(fields: Any, file: object) -> DecoderConfig:
    """Returns the settings that :func:`json_of` wrote field by field."""
    try:
        values: Json = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
            if name != "frequencies"
        }
        if values["rope_scaling"] is not None:
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        return DecoderConfig(**values)
    except (AttributeError, LookupError, TypeError) as error:
        raise TPPError(f"{file} has settings that tpp_jax did not write") from error


def _number(settings: Mapping[str, Any], name: str, file: object) -> float:
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise TPPError(
            f"{file} has {name}: {shown(value)}, which is no positive number"
        )
    return float(value)


def _rope(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the rotary settings; older versions of transformers have two places."""
    old = {"rope_theta": settings.get("rope_theta", 10_000.0)}
    scaling = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    return old | scaling if isinstance(scaling, dict) else old


def _rope_scaling(settings: Mapping[str, Any], file: object) -> RopeScaling | None:
    rope = _rope(settings)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise TPPError(f"{file} rotates only a part of each head, which is unsupported")
    if kind == "default":
        return None
    number = functools.partial(_number, rope, file=file)
    if kind == "linear":
        return RopeScaling("linear", number("factor"))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=number("factor"),
            low=number("low_freq_factor"),
            high=number("high_freq_factor"),
            original_length=int(number("original_max_position_embeddings")),
        )
    raise TPPError(
        f"{file} has rotary embeddings of type {shown(kind)}: default, linear and "
        "llama3 are supported"
    )


def _window(
    settings: Mapping[str, Any], depth: int, file: object
) -> int | tuple[int | None, ...] | None:
    window = settings.get("sliding_window")
    if window is not None and (type(window) is not int or window < 1):
        raise TPPError(
            f"{file} has sliding_window: {shown(window)}, which is no number of tokens"
        )
    kinds = settings.get("layer_types")
    if isinstance(kinds, list):
        known = {"sliding_attention": window, "full_attention": None}
        if len(kinds) != depth or not all(kind in known for kind in kinds):
            raise TPPError(f"{file} has layer_types that are not supported")
        windows = tuple(known[kind] for kind in kinds)
        return windows[0] if len(set(windows)) == 1 else windows
    if settings["model_type"].startswith("qwen"):
        if not settings.get("use_sliding_window", False):
            return None
        full = settings.get("max_window_layers", 28)
        return tuple(None if i < full else window for i in range(depth))
    return window if settings["model_type"] == "mistral" else None


def _activation(settings: Mapping[str, Any], gemma: bool, file: object) -> str:
    name = settings.get("hidden_act", "silu")
    if gemma:
        name = settings.get("hidden_activation") or "gelu_pytorch_tanh"
    if name not in _ACTIVATIONS:
        raise TPPError(
            f"{file} has the activation {shown(name)}: {', '.join(_ACTIVATIONS)} are "
            "supported"
        )
    return _ACTIVATIONS[name]


def config_of(model: Decoder) -> DecoderConfig:
    """Returns the settings of a decoder with the sizes that its arrays have.

    Args:
      model: Model, pruned or not.
    """
    names = ("heads", "kv_heads", "head_size", "value_size", "query_scale", "hidden")
    sizes: dict[str, list[Any]] = {name: [] for name in names}
    for layer in model.layers:
        attention = layer.self_attn
        size = 2 * attention.frequencies[...].shape[0]
        kv_heads = attention.k_proj.kernel.shape[1] // size
        values = attention.v_proj.kernel.shape[1]
        value_size = values // kv_heads if kv_heads else size
        scale = attention.scale
        sizes["heads"].append(attention.q_proj.kernel.shape[1] // size)
        sizes["kv_heads"].append(kv_heads)
        sizes["head_size"].append(size)
        sizes["value_size"].append(None if value_size == size else value_size)
        sizes["query_scale"].append(None if scale == size**-0.5 else scale)
        sizes["hidden"].append(layer.mlp.up_proj.kernel.shape[1])
    vocabulary, width = model.embed_tokens.embedding.shape
    together: Json = {
        name: values[0] if len(set(values)) == 1 else tuple(values)
        for name, values in sizes.items()
    }
    return dataclasses.replace(
        model.config, vocabulary=vocabulary, width=width, **together
    )


def busy_layers(model: Decoder) -> list[int]:
    """Returns the indices of the layers that change something.

    Others have neither heads nor units, and their outputs have no biases. If all layers
    are like that, all are returned.
    """
    busy = []
    for i, layer in enumerate(model.layers):
        ends = layer.self_attn.o_proj, layer.mlp.down_proj
        if any(math.prod(end.kernel.shape) or end.bias is not None for end in ends):
            busy.append(i)
    return busy or list(range(len(model.layers)))


def without_idle_layers(model: Decoder) -> Decoder:
    """Returns a decoder with its :func:`busy_layers` alone.

    Args:
      model: Model, pruned or not; not modified, and its arrays are shared.
    """
    busy = busy_layers(model)
    if len(busy) == len(model.layers):
        return model
    fields: Json = {
        name: tuple(value[i] for i in busy) if isinstance(value, tuple) else value
        for name, value in vars(model.config).items()
    }
    fields["depth"] = len(busy)
    short = nnx.merge(*nnx.split(model))
    short.layers = nnx.List([short.layers[i] for i in busy])
    short.config = DecoderConfig(**fields)
    return short


def json_of(model: Decoder) -> Json:
    """Returns the ``config.json`` of a decoder.

    Models that transformers can represent get the settings of one of its families.
    Others, such as those with sizes that differ between layers, get a ``model_type`` of
    their own, which transformers refuses to load.

    Args:
      model: Model, pruned or not.
    """
    config = config_of(model)
    usual = all(
        np.array_equal(layer.self_attn.frequencies[...], rotary_frequencies(config, i))
        for i, layer in enumerate(model.layers)
    )
    if usual and not any(isinstance(value, tuple) for value in vars(config).values()):
        settings = _as_family(config)
        if config_from_json(settings, "config.json") == config:
            return settings
    frequencies = [layer.self_attn.frequencies[...].tolist() for layer in model.layers]
    fields = dataclasses.asdict(config) | {"frequencies": frequencies}
    return {"model_type": OWN_FAMILY, "tpp_jax": fields}


def _as_family(config: DecoderConfig) -> Json:
    """Returns the settings of the family that is most like a decoder."""
    families = {
        "gemma": config.embedding_scale != 1,
        "qwen3": config.qk_norm,
        "qwen2": config.qkv_bias and not config.output_bias,
        "mistral": config.window is not None,
    }
    family = next((name for name, fits in families.items() if fits), "llama")
    theirs = {ours: name for name, ours in reversed(_ACTIVATIONS.items())}
    activation = theirs[config.activation]
    rope: Json = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_scaling is not None:
        kind, factor, low, high, length = dataclasses.astuple(config.rope_scaling)
        rope |= {"rope_type": kind, "factor": factor}
        if kind == "llama3":
            rope |= {"low_freq_factor": low, "high_freq_factor": high}
            rope |= {"original_max_position_embeddings": length}
    return {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.hidden,
        "hidden_act": activation,
        "hidden_activation": activation,
        "rms_norm_eps": config.epsilon,
        # In both spellings, for older and newer versions of transformers.
        "rope_theta": config.rope_base,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "rope_parameters": rope,
        "sliding_window": config.window,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.qkv_bias and config.output_bias,
        "mlp_bias": config.mlp_bias,
    }
