"""Decoder language models in GGUF files, quantised or not.

The format keeps queries and keys of Llama models in the order of interleaved rotary
pairs; they are put back into the order of transformers.
"""

import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from tpp_jax.errors import TPPError, require
from tpp_jax.interop.hugging_face import decoder_from_torch
from tpp_jax.interop.names import shown
from tpp_jax.interop.torch_tensors import Tensors
from tpp_jax.models.decoder import Decoder, DecoderConfig, Frequencies

_ACTIVATIONS = {"llama": "silu", "qwen2": "silu", "qwen3": "silu", "gemma": "gelu_tanh"}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHERS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_FACTORS = "rope_freqs.weight"
# How the text is split before byte-pair encoding, by the name of the scheme.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {"llama-bpe": _WORDS % "{1,3}", "qwen2": _WORDS % ""}
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens that are never split


def load_gguf(
    file: str | pathlib.Path, *, dtype: Any = None, param_dtype: Any = jnp.float32
) -> tuple[Decoder, Any]:
    """Loads a language model from a GGUF file; quantised weights become numbers again.

    Args:
      file: File of a Llama, SmolLM2, Mistral, Qwen 2 or 3, or Gemma (1) model.
      dtype: Type of the computation; None for that of the parameters.
      param_dtype: Type of the parameters.

    Returns:
      The model, and its tokenizer: a ``tokenizers.Tokenizer``, or None if the file has
      one of a kind that cannot be built.

    Raises:
      TPPError: If the packages gguf and tokenizers are not installed, the file is
        missing or damaged, or has another architecture.

    Warns:
      UserWarning: If the tokenizer is of an unsupported kind.

    Example:
      >>> load_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
      (Decoder(…), <tokenizers.Tokenizer object at …>)
    """
    require("text", "gguf", "tokenizers")
    import gguf  # pyright: ignore[reportMissingImports]  # late: an optional package

    file = pathlib.Path(file)
    if not file.is_file():
        raise TPPError(f"there is no file {file}")
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
            for tensor in reader.tensors
        }
    except (ValueError, LookupError, OverflowError, TypeError) as error:
        raise TPPError(f"{file} is not a GGUF file, or is damaged: {error}") from error
    config = _config(fields, tensors, file)
    factors = tensors.pop(_FACTORS, None)
    renamed = _renamed(tensors, config, interleaved=_family(fields, file) == "llama")
    model = decoder_from_torch(renamed, config, dtype=dtype, param_dtype=param_dtype)
    if factors is not None:
        for layer in model.layers:
            slow = layer.self_attn.frequencies[...] / jnp.asarray(factors)
            layer.self_attn.frequencies = Frequencies(slow)
    return model, _tokenizer(fields, file)


def _family(fields: Mapping[str, Any], file: pathlib.Path) -> str:
    family = fields.get("general.architecture")
    if family not in _ACTIVATIONS:
        raise TPPError(
            f"{file} has a model of the architecture {shown(family)}: "
            f"{', '.join(_ACTIVATIONS)} can be read"
        )
    return family


def _config(
    fields: Mapping[str, Any], tensors: Tensors, file: pathlib.Path
) -> DecoderConfig:
    family = _family(fields, file)

    def field(name: str, default: Any = None) -> Any:
        value = fields.get(f"{family}.{name}", default)
        if value is None:
            raise TPPError(f"{file} does not say what {family}.{name} is")
        return value

    if field("rope.scaling.type", "none") != "none":
        raise TPPError(f"{file} has scaled rotary embeddings, which are not supported")
    width, heads = field("embedding_length"), field("attention.head_count")
    head_size = field("attention.key_length", width // heads)
    return DecoderConfig(
        vocabulary=len(tensors.get("token_embd.weight", ())),
        width=width,
        depth=field("block_count"),
        heads=heads,
        kv_heads=field("attention.head_count_kv", heads),
        head_size=head_size,
        value_size=_unless(field("attention.value_length", head_size), head_size),
        hidden=field("feed_forward_length"),
        rope_base=field("rope.freq_base", 10_000.0),
        activation=_ACTIVATIONS[family],
        # Files have it as a float32: 9.999999747378752e-06 for 1e-05.
        epsilon=float(str(np.float32(field("attention.layer_norm_rms_epsilon")))),
        tied="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        embedding_scale=width**0.5 if family == "gemma" else 1.0,
    )


def _unless(value: int, usual: int) -> int | None:
    return None if value == usual else value


def _renamed(tensors: Tensors, config: DecoderConfig, *, interleaved: bool) -> Tensors:
    """Returns the tensors by transformers' names, in its order of dimensions."""
    found: Tensors = {}
    of_heads = {
        "attn_q": config.of_layers("heads"),
        "attn_k": config.of_layers("kv_heads"),
    }
    for name, array in tensors.items():
        layer, _, kind = name.rpartition(".")
        if layer.startswith("blk."):
            _, index, part = layer.split(".", 2)
            if part in of_heads and interleaved:
                heads = of_heads[part][0]  # the same in all layers
                pairs = array.reshape(heads, -1, 2, *array.shape[1:])
                array = pairs.swapaxes(1, 2).reshape(array.shape)
            theirs = f"model.layers.{index}.{_LAYER.get(part, part)}"
        else:
            theirs = _OTHERS.get(layer, layer)
        found[f"{theirs}.{kind}"] = array
    return found


def _tokenizer(fields: Mapping[str, Any], file: pathlib.Path) -> Any:
    """Returns the tokenizer that the file describes, or None with a warning."""
    import tokenizers  # pyright: ignore[reportMissingImports]  # as above
    from tokenizers import (  # pyright: ignore[reportMissingImports]
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    kind = fields.get("tokenizer.ggml.model")
    scheme = fields.get("tokenizer.ggml.pre", "default")
    splits: dict[str, Callable[[], Any]] = {
        "default": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": lambda: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        ),
    }
    splits["gpt-2"] = splits["default"]
    if scheme in _PATTERNS:
        pattern = tokenizers.Regex(_PATTERNS[scheme])
        splits[scheme] = lambda: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if kind != "gpt2" or scheme not in splits:
        warnings.warn(
            f"{file} has a tokenizer of the kind {shown(kind)} ({shown(scheme)}), "
            "which cannot be built: take tokenizer.json from the model's folder",
            stacklevel=3,
        )
        return None
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    if scheme == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splits[scheme]()
    tokenizer.decoder = decoders.ByteLevel()
    for token, type_ in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True):
        if type_ in (_CONTROL, _USER_DEFINED):
            special = tokenizers.AddedToken(token, special=type_ == _CONTROL)
            tokenizer.add_tokens([special])
    return tokenizer
