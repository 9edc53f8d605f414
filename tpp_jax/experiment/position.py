"""The position of a run, as data: the JSON part of its checkpoints."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from tpp_jax.errors import TPPError

FORMAT = 2
"""Version of the JSON format. Version 1 had no number and other names."""

# Names in version 1, where accuracy was the only score.
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

    A score is the task's headline metric on the test set, such as accuracy in percent.

    Attributes:
      name: Name of the stage.
      steps: Number of training steps.
      seconds: Duration.
      score: Score at the end.
      best: Best score during the stage.
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
        """Reads the result of :meth:`to_json`."""
        more = {name: x for name, x in content.items() if name not in _NAMES}
        return cls(**{name: content[name] for name in _NAMES}, more=more)


_NAMES = [x.name for x in dataclasses.fields(Result) if x.name != "more"]


@dataclasses.dataclass(frozen=True)
class Position:
    """Progress and results of a run so far. Stages return new positions.

    Attributes:
      config: The run's config, a nested dict.
      phase: Name of the last stage that trained or cut; None before any.
      step: Number of steps done in that phase.
      seconds: Duration of that phase so far.
      best: Best score in that phase; None before the first evaluation.
      results: Outcomes of the finished stages, in order.
      plans: Plans of the rounds so far, as :meth:`Plan.to_dict` returns them.
      goal: Number of channels of each group after the last round; None before the
        channels are chosen.
      dense: Score of the trained dense network; None if there is none.
      one_shot: Score after an immediate cut of all channels of the first plan.
      recent: Number of steps and mean metrics of each dispatch that is not logged yet.
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
        """Returns whether a stage is finished, given its name."""
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
        """Returns this position if it is in a phase, else the start of the phase."""
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
        """Reads the result of :meth:`to_json` of this or an earlier version.

        Raises:
          TPPError: A later version wrote it, or a field is missing or malformed.
        """
        version = content.get("version", 1)
        if version not in range(1, FORMAT + 1):
            raise TPPError(
                f"the checkpoints of the run have format {version!r}, but this version "
                f"of tpp_jax reads formats up to {FORMAT}: continue the run with the "
                "version that started it, or use another --workdir"
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
                "the checkpoints of the run have a format that this version of tpp_jax "
                f"cannot read ({type(error).__name__}: {error}): use another "
                "--workdir"
            ) from error
        return cls(**fields)


def _renamed(content: Mapping[str, Any]) -> dict[str, Any]:
    return {_RENAMED.get(name, name): x for name, x in content.items()}
