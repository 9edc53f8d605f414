"""Flax's convolutions as arguments of PyTorch's, where PyTorch has the same."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

# PyTorch's padding_mode by Flax's padding.
_MODES = {"CIRCULAR": "circular", "REFLECT": "reflect"}


def describe_convolution(module: nnx.Conv) -> tuple[dict[str, Any], list[str]]:
    """Returns the arguments of ``torch.nn.Conv1d``, ``2d`` or ``3d``.

    Args:
      module: Convolution to describe.

    Returns:
      The arguments, and a sentence for each feature that PyTorch's layer lacks. An
      argument that would be wrong is omitted.
    """
    *kernel, inner, outer = module.kernel.shape
    axes = len(kernel)
    strides = _per_axis(module.strides, axes)
    dilation = _per_axis(module.kernel_dilation, axes)
    padding, notes = _padding(module.padding, kernel, strides, dilation)
    if not 1 <= axes <= 3:
        notes.append(f"PyTorch has no convolution over {axes} axes")
    if _per_axis(module.input_dilation, axes) != [1] * axes:
        notes.append(
            f"it inserts zeros between its inputs (input_dilation "
            f"{module.input_dilation}), as a transposed convolution does"
        )
    if module.mask is not None:
        notes.append("it multiplies its kernel by a mask, which PyTorch's does not")
    if module.conv_general_dilated is not jax.lax.conv_general_dilated:
        notes.append("it uses a custom function (conv_general_dilated)")
    return {
        "type": f"Conv{axes}d",
        "in_channels": inner * module.feature_group_count,
        "out_channels": outer,
        "kernel_size": kernel,
        "stride": strides,
        **padding,
        "dilation": dilation,
        "groups": module.feature_group_count,
        "bias": module.use_bias,
    }, notes


def _per_axis(value: int | Sequence[int] | None, axes: int) -> list[int]:
    if value is None or isinstance(value, int):
        return [1 if value is None else value] * axes
    return list(value)


def _padding(
    padding: Any, kernel: list[int], strides: list[int], dilation: list[int]
) -> tuple[dict[str, Any], list[str]]:
    """Returns PyTorch's arguments of the padding, and notes on the differences."""
    axes = range(len(kernel))
    # Number of pixels in a window apart from its own, on both sides together.
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if not isinstance(padding, str):
        pads = [padding] * len(kernel) if isinstance(padding, int) else padding
        pairs = [(pad, pad) if isinstance(pad, int) else tuple(pad) for pad in pads]
        return _numbers(pairs)
    name = padding.upper()
    if name == "VALID":
        return {"padding": [0] * len(kernel)}, []
    if name == "CAUSAL":
        return _numbers([(total, 0) for total in reach])
    mode = {"padding_mode": _MODES[name]} if name in _MODES else {}
    if all(reach[i] == 0 for i in axes):
        return {"padding": [0] * len(kernel)}, []
    if name in ("SAME", "SAME_LOWER") and any(s > 1 for s in strides):
        return {}, [
            f"its padding {name} with stride {strides} depends on the size n of the "
            "image: max((ceil(n / stride) - 1) · stride + dilation · (kernel - 1) + 1 "
            "- n, 0) zeros along each axis, half of them before and the rest after "
            "(SAME_LOWER: the rest before). Pad the image like this, and set padding "
            "to 0"
        ]
    lower = name == "SAME_LOWER"
    pairs = [
        (total - total // 2, total // 2) if lower else (total // 2, total - total // 2)
        for total in reach
    ]
    if name not in ("SAME", "SAME_LOWER", *_MODES):
        return {}, [f"its padding {padding} is unknown"]
    if all(before == after for before, after in pairs):
        return {"padding": [before for before, _ in pairs], **mode}, []
    if not lower and all(s == 1 for s in strides):
        return {"padding": "same", **mode}, []  # PyTorch also pads more after
    return _numbers(pairs, mode.get("padding_mode", "constant"))


def _numbers(
    pairs: Sequence[tuple[int, ...]], mode: str = "constant"
) -> tuple[dict[str, Any], list[str]]:
    if all(before == after for before, after in pairs):
        return {"padding": [before for before, _ in pairs]}, []
    last_first = [n for pair in reversed(pairs) for n in pair]
    return {}, [
        f"it pads {[list(pair) for pair in pairs]} (before and after, along each "
        "axis), which PyTorch's layer cannot: apply torch.nn.functional.pad(x, "
        f"{last_first}, {mode!r}) first, and set padding to 0"
    ]
