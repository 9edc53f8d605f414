"""The methods: TPP and its rivals, each defined by a row.

A row lists the stages of a run in order, the functions that make its phases and the
numbers that these log. A new rival needs a row here, an optax transform in
:mod:`tpp_jax.method` and a function that chains it into a phase. A user's own row is
named by a dotted path.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from tpp_jax.errors import TPPError
from tpp_jax.experiment.dotted import is_dotted, load_object
from tpp_jax.experiment.phases import (
    Phase,
    extra_phase,
    group_lasso_phase,
    growing_l2_phase,
    tpp_phases,
)
from tpp_jax.experiment.sections import PruneConfig
from tpp_jax.method.orthogonality import OrthogonalityState
from tpp_jax.method.rivals import GroupLassoState, GrowingState
from tpp_jax.method.schedule import GrowingSchedule
from tpp_jax.method.transforms import TPPState
from tpp_jax.pruning.plan import Plan

MakePhases = Callable[[PruneConfig, Plan, GrowingSchedule], tuple[Phase, ...]]
"""Makes phases from the config's section ``prune``, a plan and the schedule of λ."""

Scalars = Mapping[type, Mapping[str, str]]
"""Class of an optimizer's state → name in the log → field of that state."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A row: the stages of a method and how they differ from others.

    Attributes:
      stages: Kinds of the stages in order, separated by spaces. ``dense`` saves the
        network before pruning, ``choose`` makes the plan, ``refit`` makes the network
        independent of what it prunes, ``slice`` cuts; all others train.
      phases: Functions that make the method's phases, except ``pretrain`` and
        ``finetune``, which are made from the config's sections of these names.
      scalars: Numbers in the states of its optax transforms to log.
      repeated: Kinds of the stages of each further round.
      penalizes_first: Whether a phase before the choice penalizes all groups that the
        choice may prune.
      random_weights: Whether the cut network starts from random weights.
      repairs: Whether every cut is followed by a refit and new batch statistics, as
        with ``prune.compensate`` and ``prune.recalibrate``.
    """

    stages: str
    phases: tuple[MakePhases, ...] = ()
    scalars: Scalars = dataclasses.field(default_factory=dict)
    repeated: str = ""
    penalizes_first: bool = False
    random_weights: bool = False
    repairs: bool = False


_TPP = {TPPState: {"strength": "strength", "gram": "gram"}}

METHODS = {
    "tpp": Method(
        "pretrain dense choose regularize stabilize slice finetune",
        (tpp_phases,),
        _TPP,
    ),
    # The channels are cut out immediately.
    "oneshot": Method("pretrain dense choose slice finetune"),
    # The same, then trained for as many steps as TPP regularizes and stabilizes.
    "extra": Method("pretrain dense choose slice extra finetune", (extra_phase,)),
    # The small network, trained from random weights.
    "scratch": Method("choose slice finetune", random_weights=True),
    # All filters are shrunk before channels are chosen by their remaining norms.
    "greg2": Method(
        "pretrain dense grow choose regularize stabilize slice finetune",
        (tpp_phases, growing_l2_phase),
        _TPP | {GrowingState: {"strength": "strength"}},
        penalizes_first=True,
    ),
    "group_lasso": Method(
        "pretrain dense grow choose slice finetune",
        (group_lasso_phase,),
        {GroupLassoState: {"group_lasso": "penalty"}},
        penalizes_first=True,
    ),
    # The last three stages are repeated; each round cuts some of the channels.
    "iterative": Method(
        "pretrain dense choose slice finetune", repeated="choose slice finetune"
    ),
    # The layers behind the cut are refit in closed form, on data without labels.
    "compensated": Method("pretrain dense choose slice finetune", repairs=True),
    # The same refit, but of the unpruned network: a start for TPP.
    "compensated_tpp": Method(
        "pretrain dense choose refit regularize stabilize slice finetune",
        (tpp_phases,),
        _TPP,
    ),
    "none": Method("pretrain dense"),
}
"""Row of each method, by name; :data:`tpp_jax.experiment.sections.METHOD_NAMES` lists
the names."""


def find_method(name: str) -> Method:
    """Returns the row of a method.

    Args:
      name: Name in :data:`METHODS`, or the dotted path of a row,
        ``"package.module:NAME"``.

    Raises:
      TPPError: There is no such method.
    """
    if name in METHODS:
        return METHODS[name]
    if not is_dotted(name):
        raise TPPError(
            f"unknown method {name!r}: choose one of {', '.join(METHODS)}, or write "
            "the dotted path of your own"
        )
    found = load_object(name, "config.prune.method")
    if not isinstance(found, Method):
        raise TPPError(
            f"config.prune.method is {name!r}, of type {type(found).__name__}; it "
            "must be a tpp_jax.experiment.methods.Method"
        )
    return found


UNTRAINED = ("dense", "choose", "refit", "slice")
"""Kinds of the stages that do not train."""

# The plain phases of any method may have a penalty of orthogonality.
_ALWAYS: Scalars = {OrthogonalityState: {"orthogonality": "penalty"}}

# Seeds of some kinds of stages, fixed so that recorded runs can be repeated. The seed
# of all other kinds is a checksum of the name.
_SEEDS = {
    "pretrain": 0,
    "regularize": 1,
    "stabilize": 2,
    "slice": 3,
    "finetune": 4,
    "grow": 5,
    "extra": 6,
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
      kind: Word of :attr:`Method.stages`.
      round: Number of the round, from 1; above 1 only in iterative pruning.
    """

    kind: str
    round: int = 1

    @property
    def name(self) -> str:
        """Unique name within a run, such as ``slice_2``."""
        return self.kind if self.round == 1 else f"{self.kind}_{self.round}"

    def key(self, seed: int) -> PRNGKeyArray:
        """Returns the key of the stage's random numbers."""
        number = _SEEDS.get(self.kind, zlib.crc32(self.kind.encode()))
        key = jax.random.fold_in(jax.random.key(seed), number)
        return key if self.round == 1 else jax.random.fold_in(key, self.round)


def stages_of(
    method: str, rounds: int = 1, *, given: bool = False
) -> tuple[Stage, ...]:
    """Returns the stages of a method, in order.

    Args:
      method: Name of the method; see :func:`find_method`.
      rounds: Number of rounds of a method that repeats stages.
      given: Whether the run starts from a trained network.

    Example:
      >>> [stage.name for stage in stages_of("iterative", 2, given=True)]
      ['dense', 'choose', 'slice', 'finetune', 'choose_2', 'slice_2', 'finetune_2']
    """
    row = find_method(method)
    kinds = [kind for kind in row.stages.split() if not (given and kind == "pretrain")]
    more = [Stage(k, n) for n in range(2, rounds + 1) for k in row.repeated.split()]
    return (*map(Stage, kinds), *more)


def logged_scalars(method: str, opt_state: Any) -> dict[str, float]:
    """Returns the numbers in an optimizer's state that a method logs.

    Args:
      method: Name of the method; see :func:`find_method`.
      opt_state: State of the optimizer. Numbers with the same name are added, since
        there is a penalty of orthogonality for each stride of convolutions.
    """
    scalars = {**_ALWAYS, **find_method(method).scalars}
    found: dict[str, float] = {}
    known = tuple(scalars)
    for state in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, known)):
        for name, field in scalars.get(type(state), {}).items():
            found[name] = found.get(name, 0.0) + float(getattr(state, field))
    return found
