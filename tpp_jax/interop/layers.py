"""A module's layers in PyTorch's words: enough to build them there, at any width."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx

from tpp_jax.models.vit import SelfAttention
from tpp_jax.pruning.nnx_layers import modules


def describe_layers(model: nnx.Module) -> dict[str, Any]:
    """Tells what a model is and, of each layer, its type and its sizes; JSON-ready.

    Returns:
      ``model``, how ``tpp_jax.models.create`` makes it unpruned (None for others);
      ``class``; and ``layers``, by name: the ``type`` of ``torch.nn`` and the arguments
      that make it, widths as they are after pruning.

    Example:
      >>> from tpp_jax.models.layers import conv
      >>> describe_layers(nnx.List([conv(3, 8, 1, rngs=nnx.Rngs(0))]))["layers"]["0"]
      ... # doctest: +NORMALIZE_WHITESPACE
      {'type': 'Conv2d', 'in_channels': 3, 'out_channels': 8, 'kernel_size': [1, 1],
       'stride': [1, 1], 'padding': [0, 0], 'dilation': [1, 1], 'groups': 1,
       'bias': False}
    """
    spec = getattr(model, "spec", None)
    layers = {path: _describe(module) for path, module in modules(model)}
    attention = [path for path, module in modules(model) if _is_attention(module)]
    inside = tuple(f"{path}." for path in attention)
    return {
        "model": None if spec is None else dataclasses.asdict(spec),
        "class": type(model).__name__,
        "layers": {
            path: layer
            for path, layer in sorted(layers.items())
            if layer and not path.startswith(inside or "\0")
        },
    }


def _is_attention(module: nnx.Module) -> bool:
    return isinstance(module, SelfAttention)


def _describe(module: nnx.Module) -> dict[str, Any] | None:
    match module:
        case SelfAttention():
            width, projected = module.in_proj.kernel.shape
            heads = projected // 3 // module.size
            # PyTorch's attention is as wide as its stream: pruned heads tell their
            # size, which it takes for a mistake.
            pruned = {} if heads * module.size == width else {"head_dim": module.size}
            return {
                "type": "MultiheadAttention",
                "embed_dim": width,
                "num_heads": heads,
                "batch_first": True,
                **pruned,
            }
        case nnx.Conv():
            *kernel, inner, outer = module.kernel.shape
            return {
                "type": f"Conv{len(kernel)}d",
                "in_channels": inner * module.feature_group_count,
                "out_channels": outer,
                "kernel_size": kernel,
                "stride": _per_axis(module.strides, len(kernel)),
                "padding": _padding(module.padding, len(kernel)),
                "dilation": _per_axis(module.kernel_dilation, len(kernel)),
                "groups": module.feature_group_count,
                "bias": module.use_bias,
            }
        case nnx.Linear():
            before, after = module.kernel.shape
            return {
                "type": "Linear",
                "in_features": before,
                "out_features": after,
                "bias": module.use_bias,
            }
        case nnx.BatchNorm():
            return {
                "type": "BatchNorm2d",
                "num_features": module.mean.shape[0],
                "eps": module.epsilon,
                "momentum": round(1 - module.momentum, 9),  # PyTorch's is of the new
            }
        case nnx.LayerNorm() if module.scale is not None:
            return {
                "type": "LayerNorm",
                "normalized_shape": list(module.scale.shape),
                "eps": module.epsilon,
            }
        case nnx.GroupNorm() if module.scale is not None:
            return {
                "type": "GroupNorm",
                "num_groups": module.num_groups,
                "num_channels": module.scale.shape[0],
                "eps": module.epsilon,
            }
        case nnx.Embed():
            number, width = module.embedding.shape
            return {
                "type": "Embedding",
                "num_embeddings": number,
                "embedding_dim": width,
            }
    return None


def _per_axis(value: int | Sequence[int] | None, axes: int) -> list[int]:
    if value is None or isinstance(value, int):
        return [1 if value is None else value] * axes
    return list(value)


def _padding(padding: Any, axes: int) -> Any:
    """One number for each axis where both sides are alike, as PyTorch has it."""
    if isinstance(padding, str):
        return padding.lower()
    if isinstance(padding, int):
        return [padding] * axes
    pairs = [(pad, pad) if isinstance(pad, int) else tuple(pad) for pad in padding]
    same = all(before == after for before, after in pairs)
    return [before for before, _ in pairs] if same else pairs
