"""Plots, tables and pages about runs and sweeps."""

from tpp_jax.errors import require

require("plots", "matplotlib", "jinja2")
