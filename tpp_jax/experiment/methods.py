"""What a run does, one stage after the other: TPP and its rivals as rows of a table."""

from typing import NamedTuple

import jax
from jaxtyping import PRNGKeyArray

_STAGES = {
    "tpp": "pretrain dense choose regularize stabilize slice finetune",
    # The channels are cut out at once.
    "oneshot": "pretrain dense choose slice finetune",
    # The same, trained on for as long as TPP regularizes: its rival of equal epochs.
    "extra": "pretrain dense choose slice extra finetune",
    # The small network from random weights.
    "scratch": "choose slice finetune",
    # All filters are shrunk first, then channels are chosen by what is left of them.
    "greg2": "pretrain dense grow choose regularize stabilize slice finetune",
    "group_lasso": "pretrain dense grow choose slice finetune",
    # The last three over and over, a part of the channels each time.
    "iterative": "pretrain dense choose slice finetune",
    "none": "pretrain dense",
}
METHODS = {method: tuple(kinds.split()) for method, kinds in _STAGES.items()}
"""Method → kinds of its stages. ``dense`` saves the network before pruning, ``choose``
makes the plan, ``slice`` cuts; the others train: :mod:`tpp_jax.experiment.phases`."""

_REPEATED = ("choose", "slice", "finetune")

KINDS = ("pretrain", "regularize", "stabilize", "slice", "finetune", "grow", "extra")
"""The kinds that draw random numbers: a kind's place here seeds them, so that new ones
go to the end."""


class Stage(NamedTuple):
    """One stage of a run.

    Attributes:
      kind: what is done, a word of :data:`METHODS`.
      round: counts from 1; above it only in iterative pruning.
    """

    kind: str
    round: int = 1

    @property
    def name(self) -> str:
        """What no other stage of the run is called: ``slice``, ``slice_2``…"""
        return self.kind if self.round == 1 else f"{self.kind}_{self.round}"

    def key(self, seed: int) -> PRNGKeyArray:
        """Returns what the stage draws its random numbers from."""
        key = jax.random.fold_in(jax.random.key(seed), KINDS.index(self.kind))
        return key if self.round == 1 else jax.random.fold_in(key, self.round)


def stages_of(
    method: str, rounds: int = 1, *, given: bool = False
) -> tuple[Stage, ...]:
    """Returns the stages of a method, in order.

    Args:
      method: a name in :data:`METHODS`.
      rounds: of iterative pruning.
      given: whether the run starts from a network that has been trained already.

    Example:
      >>> [stage.name for stage in stages_of("iterative", 2, given=True)]
      ['dense', 'choose', 'slice', 'finetune', 'choose_2', 'slice_2', 'finetune_2']
    """
    stages = [Stage(k) for k in METHODS[method] if not (given and k == "pretrain")]
    if method == "iterative":
        stages += [Stage(k, n) for n in range(2, rounds + 1) for k in _REPEATED]
    return tuple(stages)
