"""A run, from one config."""

from tpp_jax.errors import require

require("train", "absl", "ml_collections", "orbax.checkpoint", "tensorboardX")
