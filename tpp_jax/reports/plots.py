"""Pictures of a run, of a sweep and of a sensitivity, by name."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tpp_jax.pruning.curves import Sensitivity
from tpp_jax.reports import grids
from tpp_jax.reports.bars import draw_channels, draw_jacobians, draw_times
from tpp_jax.reports.canvas import Drawing, save
from tpp_jax.reports.curves import draw_curves
from tpp_jax.reports.dots import draw_dots
from tpp_jax.reports.matrices import draw_costs, draw_grams

__all__ = ["of_grid", "of_run", "of_sensitivity", "save"]


def of_run(
    history: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    grams: Mapping[str, np.ndarray],
    profile: Mapping[str, Any] | None = None,
) -> dict[str, Drawing]:
    """Returns functions that draw the pictures of a run, by name.

    Args:
      history: Rows of metrics with ``step`` and ``phase``; other rows and values that
        are not finite numbers are ignored.
      summary: Summary of the run.
      grams: Arrays of ``gram.npz``, empty if it does not exist.
      profile: Content of ``profile.json``; None if the networks were not timed.
    """
    found: dict[str, Drawing] = {
        "curves": functools.partial(draw_curves, history, summary)
    }
    if summary["layers"]:
        found["channels"] = functools.partial(draw_channels, summary["layers"])
    if profile:
        found["profile"] = functools.partial(draw_times, profile["networks"])
    if any("jacobian" in phase for phase in summary["phases"]):
        found["jacobian"] = functools.partial(draw_jacobians, summary["phases"])
    if "chosen" in grams:
        found["gram"] = functools.partial(draw_grams, grams)
    return found


def of_grid(grid: grids.Grid) -> dict[str, Drawing]:
    """Returns functions that draw the pictures of a sweep, by metric.

    Args:
      grid: Results of the sweep.
    """
    return {
        metric: functools.partial(draw_dots, grid, metric) for metric in grid.metrics
    }


def of_sensitivity(result: Sensitivity) -> dict[str, Drawing]:
    """Returns functions that draw what each group costs, by name.

    Args:
      result: Result of :func:`tpp_jax.sensitivity`.
    """
    return {"sensitivity": functools.partial(draw_costs, result)}
