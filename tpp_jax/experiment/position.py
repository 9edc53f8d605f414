"""The position of a run, as data: the JSON part of its checkpoints."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from tpp_jax.errors import TPPError

FORMAT = 2
"""Version of the JSON that is written. Version 1 had no number, and other names."""

# Names of version 1, which knew of one metric to judge a network by.
_RENAMED = {
    "accuracy": "score",
    "best_accuracy": "best",
    "accuracy_before": "before",
    "accuracy_after": "after",
    "dense_accuracy": "dense",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of a finished stage that trained or cut.

    A score is the headline of the run's task on the test set, an accuracy in percent
    for example.

    Attributes:
      name: Name of the stage.
      steps: Number of its training steps.
      seconds: Time it took.
      score: Score at its end.
      best: Best score in it.
      more: Further entries: the scores ``before`` and ``after`` a cut, ``jacobian``.
    """

    name: str
    steps: int
    seconds: float
    score: float
    best: float
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns a flat dict of all entries."""
        fields = {name: getattr(self, name) for name in _NAMES}
        return {**fields, **self.more}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Reads what :meth:`to_json` returned."""
        more = {name: x for name, x in content.items() if name not in _NAMES}
        return cls(**{name: content[name] for name in _NAMES}, more=more)


_NAMES = [x.name for x in dataclasses.fields(Result) if x.name != "more"]


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run is and what it has found so far. Stages return new ones.

    Attributes:
      config: The run's config, a nested dict.
      phase: Name of the stage that was last trained or cut in; None before any.
      step: Number of steps done in that phase.
      seconds: Time spent in that phase.
      best: Best score in that phase; None before the first evaluation.
      results: Outcomes of the finished stages, in order.
      plans: Plans of the rounds so far, as :meth:`Plan.to_dict` returns them.
      goal: Number of channels of each group that are left after the last round; None
        before the channels are chosen.
      dense: Score of the dense network; None if there was no trained one.
      one_shot: Score after cutting all channels of the first plan at once.
      recent: Numbers of steps and mean metrics of dispatches that are not logged yet.
    """

    config: Mapping[str, Any]
    phase: str | None = None
    step: int = 0
    seconds: float = 0.0
    best: float | None = None
    results: tuple[Result, ...] = ()
    plans: tuple[Mapping[str, Any], ...] = ()
    goal: Mapping[str, int] | None = None
    dense: float | None = None
    one_shot: float | None = None
    recent: tuple[tuple[int, Mapping[str, float]], ...] = ()

    def finished(self, name: str | None) -> bool:
        """Returns whether the stage of a name is done."""
        return any(result.name == name for result in self.results)

    @property
    def steps_before(self) -> int:
        """Number of steps of all finished stages."""
        return sum(result.steps for result in self.results)

    @property
    def steps_done(self) -> int:
        """Number of steps of the run so far."""
        return self.steps_before + (0 if self.finished(self.phase) else self.step)

    def within(self, phase: str) -> Self:
        """Returns the position in a phase: the same, or the start of that phase."""
        if self.phase == phase:
            return self
        return dataclasses.replace(
            self, phase=phase, step=0, seconds=0.0, best=None, recent=()
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON-ready content, with the version of its format."""
        fields = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
        fields["results"] = [result.to_json() for result in self.results]
        fields["plans"], fields["recent"] = list(self.plans), list(self.recent)
        return {"version": FORMAT, **fields}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Reads what :meth:`to_json` returned, in this or an earlier version.

        Raises:
          TPPError: A later version wrote it, or a field is missing or misshapen.
        """
        version = content.get("version", 1)
        if version not in range(1, FORMAT + 1):
            raise TPPError(
                f"the checkpoints of the run have format {version!r}, but this version "
                f"of tpp_jax reads formats up to {FORMAT}: continue the run with the "
                "version that began it, or use another --workdir"
            )
        try:
            results = content["results"]
            if version == 1:
                content, results = _renamed(content), map(_renamed, results)
            fields = {x.name: content[x.name] for x in dataclasses.fields(cls)}
            fields["results"] = tuple(map(Result.from_json, results))
            fields["plans"] = tuple(fields["plans"])
            fields["recent"] = tuple((n, dict(x)) for n, x in fields["recent"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TPPError(
                "the checkpoints of the run are not of a format that this version of "
                f"tpp_jax knows ({type(error).__name__}: {error}): use another "
                "--workdir"
            ) from error
        return cls(**fields)


def _renamed(content: Mapping[str, Any]) -> dict[str, Any]:
    return {_RENAMED.get(name, name): x for name, x in content.items()}
