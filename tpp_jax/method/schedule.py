"""Growth of the penalties' strength λ, and the length of the phases."""

import dataclasses
import functools
import math
import re

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tpp_jax.errors import TPPError

_MOST_INTERVALS = 1_000_000  # each takes an entry of a table


@dataclasses.dataclass(frozen=True)
class GrowingSchedule:
    """The strength λ as a function of the step, and the length of the phases.

    Created by :func:`growing_schedule`. Steps count from 0; λ changes only on multiples
    of ``every`` and is 0 throughout the first interval.

    Attributes:
      strengths: Strength λ in each interval, from 0 to the first that reaches the
        ceiling.
      every: Number of steps in an interval (τ).
      stabilize: Number of steps at full strength.
      zero_out_every: Number of steps between the zero-outs of two layers. In the
        stabilize phase the layer of index i (in order of execution) is set to zero from
        the ``(i + 1) * zero_out_every``-th step on.
    """

    strengths: tuple[float, ...]
    every: int
    stabilize: int
    zero_out_every: int

    @property
    def regularize_steps(self) -> int:
        """Number of steps before λ reaches its ceiling, where stabilizing starts."""
        return (len(self.strengths) - 1) * self.every

    @property
    def total_steps(self) -> int:
        """Number of steps of both phases, ``regularize_steps + stabilize + 1``."""
        return self.regularize_steps + self.stabilize + 1

    @functools.cached_property
    def _table(self) -> np.ndarray:
        return np.asarray(self.strengths)

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """Returns λ at a step.

        Args:
          step: Number of the step; may be traced.
        """
        interval = jnp.minimum(step // self.every, len(self.strengths) - 1)
        return jnp.asarray(self._table)[interval]

    def zero_out_step(self, layer_index: int) -> int:
        """Returns the first step at which a layer's pruned filters are set to zero.

        Args:
          layer_index: Index of the layer in order of execution.
        """
        return self.regularize_steps + (layer_index + 1) * self.zero_out_every


def growing_schedule(
    kind: str = "linear",
    granularity: float = 1e-4,
    every: int = 10,
    ceiling: float = 1.0,
    stabilize: int = 10_000,
    zero_out_every: int = 100,
    regularize_steps: int | None = None,
) -> GrowingSchedule:
    """Creates the schedule of the strength λ (GReg; TPP section 3.2).

    Args:
      kind: Form of the growth. ``"linear"``: λ = Δ·k in the k-th interval, until it
        reaches the ceiling; ``"poly2"``, ``"poly3"``…: λ = λ_max·(k·τ/T)^p over
        T = ``regularize_steps``.
      granularity: Increment Δ of λ per interval; unused by poly.
      every: Number τ of steps in an interval.
      ceiling: Final strength λ_max. It is not a bound: with Δ = 0.07 the strength ends
        at 1.05.
      stabilize: Number of steps at full strength afterwards.
      zero_out_every: Number of steps between the zero-outs of two layers.
      regularize_steps: Number T of steps of growth, for poly only.

    Returns:
      The schedule. The defaults are the original's for CIFAR: 100,000 steps of growth
      and 10,000 steps of stabilizing.

    Raises:
      TPPError: If the kind is unknown, a number is out of range, poly lacks T or has
        one that is not a multiple of ``every``, or linear has a T.

    Example:
      >>> schedule = growing_schedule(granularity=0.5, every=2, stabilize=3)
      >>> [float(schedule(t)) for t in range(schedule.total_steps)]
      [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]
    """
    for name, value, low in (
        ("granularity", granularity, 0),
        ("every", every, 0),
        ("ceiling", ceiling, 0),
        ("zero_out_every", zero_out_every, 0),
        ("stabilize", stabilize, -1),
    ):
        if not low < value < math.inf:
            raise TPPError(f"the schedule's {name} is {value}, must be above {low}")
        if name not in ("granularity", "ceiling") and value % 1:
            raise TPPError(
                f"the schedule's {name} is {value}, must be a whole number of steps"
            )
    power = re.fullmatch("poly([0-9]{1,3})", kind)
    if kind == "linear":
        if regularize_steps is not None:
            raise TPPError(
                "a linear schedule's length follows from granularity, every and "
                "ceiling: omit regularize_steps, or use a poly schedule"
            )
        _check_length(ceiling / granularity)
        strengths = _until_ceiling(granularity, ceiling)
    elif power:
        if not regularize_steps or regularize_steps < 0 or regularize_steps % every:
            raise TPPError(
                f"a {kind} schedule needs regularize_steps, a multiple of every "
                f"({every}); it is {regularize_steps}"
            )
        intervals = regularize_steps // every
        _check_length(intervals)
        exponent = int(power[1])
        strengths = [
            ceiling * (k / intervals) ** exponent for k in range(intervals + 1)
        ]
    else:
        raise TPPError(
            f"unknown schedule {kind!r}: choose 'linear', or 'poly' and a power (poly2)"
        )
    return GrowingSchedule(tuple(strengths), every, stabilize, zero_out_every)


def _check_length(intervals: float) -> None:
    if intervals > _MOST_INTERVALS:
        raise TPPError(
            f"the schedule would raise the strength {intervals:.3g} times, but at most "
            f"{_MOST_INTERVALS:,} times are supported: increase granularity or every"
        )


def _until_ceiling(granularity: float, ceiling: float) -> list[float]:
    # The original compares in float32, where 3 * 0.3 reaches 0.9.
    strengths = [0.0]
    while np.float32(strengths[-1]) < np.float32(ceiling):
        strengths.append(granularity * len(strengths))
    return strengths
