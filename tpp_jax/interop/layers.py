"""A module's layers as types and arguments of ``torch.nn``, at any width."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from tpp_jax.graph.nnx_layers import modules
from tpp_jax.interop.convolutions import describe_convolution
from tpp_jax.interop.places import LAYERS
from tpp_jax.models.layers import BatchNorm
from tpp_jax.models.vit import SelfAttention

# The type and arguments of a layer, and notes on the differences.
Described = tuple[dict[str, Any], list[str]]

_OURS = (BatchNorm,)  # classes of this library that compute the same as Flax's


def describe_layers(model: nnx.Module) -> dict[str, Any]:
    """Describes a model and the type and sizes of each of its layers, as JSON.

    Args:
      model: Module to describe.

    Returns:
      ``model``, the arguments of ``tpp_jax.models.create`` for the unpruned model (None
      for other modules); ``class``; and ``layers``, by name: the ``type`` in
      ``torch.nn`` and its arguments, with the widths after pruning. Where PyTorch's
      layer does not compute the same, a ``note`` describes the difference; since
      ``torch.nn`` rejects it as an argument, no wrong layer is built by mistake.

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
    if isinstance(module, SelfAttention):
        return _attention(module)
    base = next((layer for layer in LAYERS if isinstance(module, layer)), None)
    if base is None:
        return None
    layer, notes = _DESCRIBED[base](module)
    own = type(module)
    if own.__call__ is not base.__call__ and not issubclass(own, _OURS):
        notes.append(f"it is a {own.__name__}, which has a custom __call__")
    return {**layer, "note": "; ".join(notes)} if notes else layer


def _attention(module: SelfAttention) -> dict[str, Any]:
    width, projected = module.in_proj.kernel.shape
    heads = projected // 3 // module.size
    # In PyTorch the heads together are as wide as the embedding. If heads are pruned,
    # their size is given, which PyTorch rejects as an argument.
    pruned = {} if heads * module.size == width else {"head_dim": module.size}
    return {
        "type": "MultiheadAttention",
        "embed_dim": width,
        "num_heads": heads,
        "batch_first": True,
        **pruned,
    }


def _linear(module: nnx.Linear) -> Described:
    before, after = module.kernel.shape
    plain = module.dot_general is jax.lax.dot_general
    return {
        "type": "Linear",
        "in_features": before,
        "out_features": after,
        "bias": module.bias is not None,
    }, [] if plain else ["it uses a custom function (dot_general)"]


def _batch_norm(module: nnx.BatchNorm) -> Described:
    affine, notes = _affine(module)
    if module.mean.ndim != 1 or module.axis != -1:
        notes.append(f"its channels are along the axes {module.axis}, not the last")
    return {
        "type": "BatchNorm2d",
        "num_features": module.mean.shape[0],
        "eps": module.epsilon,
        "momentum": round(1 - module.momentum, 9),  # PyTorch's weights the new value
        **affine,
    }, notes


def _layer_norm(module: nnx.LayerNorm) -> Described:
    has_scale, has_bias = module.scale is not None, module.bias is not None
    layer = {
        "type": "LayerNorm",
        "normalized_shape": [_width(module)],
        "eps": module.epsilon,
    }
    notes = _over_other_axes(module)
    if has_scale and not has_bias:
        layer["bias"] = False
    elif not has_scale:
        layer["elementwise_affine"] = False
        if has_bias:
            notes.append("it has a bias and no scale")
    return layer, notes


def _rms_norm(module: nnx.RMSNorm) -> Described:
    plain = {"elementwise_affine": False} if module.scale is None else {}
    return {
        "type": "RMSNorm",
        "normalized_shape": [_width(module)],
        "eps": module.epsilon,
        **plain,
    }, _over_other_axes(module)


def _group_norm(module: nnx.GroupNorm) -> Described:
    affine, notes = _affine(module)
    if module.reduction_axes is not None:
        notes.append(f"it normalises over the axes {module.reduction_axes}")
    return {
        "type": "GroupNorm",
        "num_groups": module.num_groups,
        "num_channels": module.num_groups * module.group_size,
        "eps": module.epsilon,
        **affine,
    }, notes


def _embedding(module: nnx.Embed) -> Described:
    number, width = module.embedding.shape
    return {
        "type": "Embedding",
        "num_embeddings": number,
        "embedding_dim": width,
    }, []


_DESCRIBED = {
    nnx.Conv: describe_convolution,
    nnx.Linear: _linear,
    nnx.Embed: _embedding,
    nnx.BatchNorm: _batch_norm,
    nnx.LayerNorm: _layer_norm,
    nnx.GroupNorm: _group_norm,
    nnx.RMSNorm: _rms_norm,
}


def _affine(module: Any) -> Described:
    """Returns ``affine`` if it is not PyTorch's default of scale and bias."""
    has = [module.scale is not None, module.bias is not None]
    if all(has):
        return {}, []
    if not any(has):
        return {"affine": False}, []
    only = "scale and no bias" if has[0] else "bias and no scale"
    return {}, [f"it has a {only}, and PyTorch's has both or neither"]


def _width(module: nnx.LayerNorm | nnx.RMSNorm) -> int:
    arrays = [module.scale, getattr(module, "bias", None)]
    return next((a.shape[-1] for a in arrays if a is not None), module.num_features)


def _over_other_axes(module: Any) -> list[str]:
    axes = [module.reduction_axes, module.feature_axes]
    if all(axis in (-1, (-1,), [-1]) for axis in axes):
        return []
    return [f"it normalises over the axes {axes[0]}, with its scale along {axes[1]}"]
