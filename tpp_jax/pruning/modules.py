"""The sizes that the layers of Flax NNX keep next to their arrays.

Most layers of NNX take their sizes from their arrays, so that the sliced state merged
with the old structure is the smaller model. The others are in the table here, by type.
"""

from collections.abc import Callable

from flax import nnx

from tpp_jax.pruning.functions import modules


def follow_arrays(model: nnx.Module, num_groups: Callable[[str, int], int]) -> None:
    """Sets the static sizes of all layers of Flax to what their arrays say, in place.

    Args:
      model: with arrays of other widths than it was made with.
      num_groups: ``num_groups(leaf, number)`` gives the number of groups of a
        GroupNorm, which its arrays do not tell, from its scale's name and the old one.
    """
    for path, module in modules(model):
        _follow_own_arrays(module, path, num_groups)


def _follow_own_arrays(
    module: nnx.Module, path: str, num_groups: Callable[[str, int], int]
) -> None:
    match module:
        case nnx.Conv(feature_group_count=groups) if groups > 1:
            *_, contracted, produced = module.kernel.shape
            if module.in_features == groups:  # depthwise: the groups are the channels
                groups = produced * groups // module.out_features
            module.feature_group_count = groups
            module.in_features, module.out_features = contracted * groups, produced
        case nnx.GroupNorm() if module.scale is not None:
            module.num_groups = num_groups(f"{path}.scale", module.num_groups)
            module.num_features = module.scale.shape[0]
            module.group_size = module.num_features // module.num_groups
        case nnx.LinearGeneral():
            n = len(module.in_features)
            module.in_features = module.kernel.shape[:n]
            module.out_features = module.kernel.shape[n:]
        case nnx.RNNCellBase():
            recurrent = getattr(module, "dense_h", None) or getattr(module, "hf", None)
            if recurrent is not None:
                module.hidden_features = recurrent.kernel.shape[0]
        case nnx.MultiHeadAttention():
            module.in_features, heads, size = module.query.kernel.shape
            module.num_heads, module.head_dim = heads, size
            module.num_kv_heads = module.key.kernel.shape[1]
            module.qkv_features = heads * size
