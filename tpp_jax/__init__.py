"""tpp_jax: structured pruning that keeps a network trainable, in JAX."""

from tpp_jax import models
from tpp_jax.method.gram import gram_penalty, gram_penalty_grad
from tpp_jax.method.schedule import growing_schedule
from tpp_jax.method.transforms import add_tpp_penalties, zero_pruned
from tpp_jax.pruning.flops import count
from tpp_jax.pruning.groups import channel_groups
from tpp_jax.pruning.plan import Plan, make_plan
from tpp_jax.pruning.slicing import mask_tree, prune, slice_tree

__all__ = [
    "Plan",
    "add_tpp_penalties",
    "channel_groups",
    "count",
    "gram_penalty",
    "gram_penalty_grad",
    "growing_schedule",
    "make_plan",
    "mask_tree",
    "models",
    "prune",
    "slice_tree",
    "zero_pruned",
]
