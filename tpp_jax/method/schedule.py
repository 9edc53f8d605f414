"""How the penalties' strength λ grows, and where the phases begin and end."""

import dataclasses
import functools
import math
import re

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tpp_jax.errors import TPPError

_MOST_INTERVALS = 1_000_000  # each is an entry of a table


@dataclasses.dataclass(frozen=True)
class GrowingSchedule:
    """The strength λ as a function of the step, and the length of the phases.

    Made by :func:`growing_schedule`. Steps count from 0; λ changes only on multiples of
    ``every`` and is 0 throughout the first interval.

    Attributes:
      strengths: λ in each interval, from 0 to the first that reaches the ceiling.
      every: Steps in an interval (τ).
      stabilize: Steps that the run goes on for at full strength.
      zero_out_every: While stabilizing, the layer of index i (in order of execution) is
        set to zero from the ``(i + 1) * zero_out_every``-th step on.
    """

    strengths: tuple[float, ...]
    every: int
    stabilize: int
    zero_out_every: int

    @property
    def regularize_steps(self) -> int:
        """Steps before λ is at its ceiling, where the stabilize phase starts."""
        return (len(self.strengths) - 1) * self.every

    @property
    def total_steps(self) -> int:
        """Steps of both phases, step ``regularize_steps + stabilize`` included."""
        return self.regularize_steps + self.stabilize + 1

    @functools.cached_property
    def _table(self) -> np.ndarray:
        return np.asarray(self.strengths)

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """Returns λ at a step; traceable."""
        interval = jnp.minimum(step // self.every, len(self.strengths) - 1)
        return jnp.asarray(self._table)[interval]

    def zero_out_step(self, layer_index: int) -> int:
        """Returns the first step at which a layer's pruned filters are set to zero."""
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
    """Makes the schedule of the strength λ (GReg; TPP section 3.2, method step 1).

    Args:
      kind: ``"linear"``: λ = Δ·k in the k-th interval, until it reaches the ceiling;
        ``"poly2"``, ``"poly3"``…: λ = λ_max·(k·τ/T)^p over T = ``regularize_steps``.
      granularity: Δ, what λ grows by in an interval; unused by poly.
      every: τ, steps in an interval.
      ceiling: λ_max. The strength is not clipped: with Δ = 0.07 it ends at 1.05.
      stabilize: Steps at full strength afterwards.
      zero_out_every: Steps between the zero-out of one layer and the next.
      regularize_steps: T, for poly only.

    Returns:
      The schedule. The defaults are the original's for CIFAR: 100,000 steps of growth
      and 10,000 of stabilizing.

    Raises:
      TPPError: An unknown kind, a number out of range, poly without its T or with
        one that is no multiple of ``every``, linear with a T.

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
                "ceiling: leave regularize_steps out, or use a poly schedule"
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
            f"the schedule would raise the strength {intervals:.3g} times, at most "
            f"{_MOST_INTERVALS:,} times will do: raise granularity or every"
        )


def _until_ceiling(granularity: float, ceiling: float) -> list[float]:
    # The original compares in float32, where 3 * 0.3 does reach 0.9.
    strengths = [0.0]
    while np.float32(strengths[-1]) < np.float32(ceiling):
        strengths.append(granularity * len(strengths))
    return strengths
