"""The metric that a run is judged by: how it is written and which value is better."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Headline:
    """A metric of a task.

    Attributes:
      name: Key of the metric in what a task reports; part of the keys of a summary.
      unit: Unit that follows the number; "" for none.
      better: Direction in which the metric improves.

    Example:
      >>> headline = Headline("accuracy", "%")
      >>> headline.text(97.222), headline.improves(97.2, 97.5)
      ('97.22 %', False)
    """

    name: str
    unit: str = ""
    better: Literal["higher", "lower"] = "higher"

    def improves(self, value: float, best: float | None) -> bool:
        """Returns whether a value is better than the best so far; None is the worst."""
        if best is None:
            return True
        return value > best if self.better == "higher" else value < best

    def text(self, value: float) -> str:
        """Returns a value as tables and messages show it."""
        return f"{value:.2f} {self.unit}".rstrip()

    def to_dict(self) -> dict[str, str]:
        """Returns the fields, to be written into a summary."""
        return dataclasses.asdict(self)


ACCURACY = Headline("accuracy", "%")
"""Headline of image classification: share of the guesses that are right, in percent."""


def headline_of(summary: Mapping[str, Any]) -> Headline:
    """Returns the headline of a run's summary.

    Summaries without one were written when all runs were image classification.
    """
    found = summary.get("headline")
    return ACCURACY if found is None else Headline(**found)
