"""Plots, tables and pages."""

from tpp_jax.errors import require

require("plots", "matplotlib")
