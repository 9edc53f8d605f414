"""tpp_jax: structured pruning that keeps a network trainable, in JAX."""

from tpp_jax import data, models
from tpp_jax.analysis.groups_svg import draw_groups
from tpp_jax.analysis.groups_text import describe_groups
from tpp_jax.analysis.jacobian import jacobian_singular_values
from tpp_jax.analysis.latency_tables import latency_table
from tpp_jax.callbacks import Callback
from tpp_jax.errors import TPPError, TPPTypeError
from tpp_jax.fitting import FitResult, fit
from tpp_jax.graph.context import Context
from tpp_jax.graph.records import Group, Groups, Member
from tpp_jax.graph.rules import register_rule
from tpp_jax.headline import Headline
from tpp_jax.interop.exporting import Exported, export
from tpp_jax.interop.gguf_files import load_gguf
from tpp_jax.interop.hugging_face import load_hf, save_hf
from tpp_jax.interop.pruned_folders import prune_hf
from tpp_jax.interop.torch_weights import load_torch, save_torch
from tpp_jax.method.gram import gram_penalty, gram_penalty_grad
from tpp_jax.method.isometry import reinitialize
from tpp_jax.method.orthogonality import OrthogonalityState, add_orthogonality
from tpp_jax.method.schedule import GrowingSchedule, growing_schedule
from tpp_jax.method.status import Status, status
from tpp_jax.method.transforms import (
    TPPState,
    ZeroPrunedState,
    add_tpp_penalties,
    zero_pruned,
)
from tpp_jax.pruning.activations import activation_means
from tpp_jax.pruning.channels import channel_groups
from tpp_jax.pruning.checking import Checks, GroupCheck, check_groups
from tpp_jax.pruning.compensation import compensate
from tpp_jax.pruning.curves import Sensitivity
from tpp_jax.pruning.cutting import check_plan, linen_apply, prune
from tpp_jax.pruning.depth import depth_scores, least_blocks
from tpp_jax.pruning.flops import Count, LayerCount, count
from tpp_jax.pruning.folding import Norm, find_norms, fold_norms
from tpp_jax.pruning.moments import Bias, ConsumerMoments, Moments, input_moments
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.planning import make_plan
from tpp_jax.pruning.recalibration import recalibrate
from tpp_jax.pruning.sensitivity import sensitivity
from tpp_jax.pruning.slicing import mask_tree, slice_tree
from tpp_jax.pruning.statistics import hessian_diagonal, loss_gradient
from tpp_jax.pruning.times import LatencyTable
from tpp_jax.saving import load_model, load_model_info, save_model
from tpp_jax.storage.orbax_trees import prune_orbax

__version__ = "0.1.0"

__all__ = [
    "Bias",
    "Callback",
    "Checks",
    "ConsumerMoments",
    "Context",
    "Count",
    "Exported",
    "FitResult",
    "Group",
    "GroupCheck",
    "Groups",
    "GrowingSchedule",
    "Headline",
    "LatencyTable",
    "LayerCount",
    "Member",
    "Moments",
    "Norm",
    "OrthogonalityState",
    "Plan",
    "Sensitivity",
    "Status",
    "TPPError",
    "TPPState",
    "TPPTypeError",
    "ZeroPrunedState",
    "activation_means",
    "add_orthogonality",
    "add_tpp_penalties",
    "channel_groups",
    "check_groups",
    "check_plan",
    "compensate",
    "count",
    "data",
    "depth_scores",
    "describe_groups",
    "draw_groups",
    "export",
    "find_norms",
    "fit",
    "fold_norms",
    "gram_penalty",
    "gram_penalty_grad",
    "growing_schedule",
    "hessian_diagonal",
    "input_moments",
    "jacobian_singular_values",
    "latency_table",
    "least_blocks",
    "linen_apply",
    "load_gguf",
    "load_hf",
    "load_model",
    "load_model_info",
    "load_torch",
    "loss_gradient",
    "make_plan",
    "mask_tree",
    "models",
    "prune",
    "prune_hf",
    "prune_orbax",
    "recalibrate",
    "register_rule",
    "reinitialize",
    "save_hf",
    "save_model",
    "save_torch",
    "sensitivity",
    "slice_tree",
    "status",
    "zero_pruned",
]
