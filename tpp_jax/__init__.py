"""tpp_jax: structured pruning that keeps a network trainable, in JAX."""

import importlib
from typing import Any

from tpp_jax import data, models
from tpp_jax.analysis.groups_svg import draw_groups
from tpp_jax.analysis.groups_text import describe_groups
from tpp_jax.analysis.jacobian import jacobian_singular_values
from tpp_jax.interop.torch_weights import load_torch, save_torch
from tpp_jax.method.gram import gram_penalty, gram_penalty_grad
from tpp_jax.method.isometry import reinitialize
from tpp_jax.method.orthogonality import add_orthogonality
from tpp_jax.method.schedule import growing_schedule
from tpp_jax.method.status import Status, status
from tpp_jax.method.transforms import add_tpp_penalties, zero_pruned
from tpp_jax.pruning.activations import activation_means
from tpp_jax.pruning.channels import channel_groups
from tpp_jax.pruning.checking import check_groups
from tpp_jax.pruning.cutting import check_plan, linen_apply, prune
from tpp_jax.pruning.flops import count
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.planning import make_plan
from tpp_jax.pruning.slicing import mask_tree, slice_tree
from tpp_jax.pruning.statistics import hessian_diagonal, loss_gradient

__all__ = [
    "Plan",
    "Status",
    "activation_means",
    "add_orthogonality",
    "add_tpp_penalties",
    "channel_groups",
    "check_groups",
    "check_plan",
    "count",
    "data",
    "describe_groups",
    "draw_groups",
    "gram_penalty",
    "gram_penalty_grad",
    "growing_schedule",
    "hessian_diagonal",
    "jacobian_singular_values",
    "linen_apply",
    "load_model",
    "load_model_info",
    "load_torch",
    "loss_gradient",
    "make_plan",
    "mask_tree",
    "models",
    "prune",
    "reinitialize",
    "save_model",
    "save_torch",
    "slice_tree",
    "status",
    "zero_pruned",
]

_OF_SAVING = ("load_model", "load_model_info", "save_model")


def __getattr__(name: str) -> Any:
    # Orbax takes a second to import: only who saves or loads a model pays for it.
    if name in _OF_SAVING:
        return getattr(importlib.import_module("tpp_jax.saving"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
