"""The metric that a run is judged by: how it is written and which value is better."""

import dataclasses
import math
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
        """Returns whether a value is better than the best so far.

        None and NaN are the worst.
        """
        if best is None or math.isnan(best):
            return True
        return value > best if self.better == "higher" else value < best

    def text(self, value: float) -> str:
        """Returns a value as tables and messages show it.

        A percentage has two decimals; anything else has four digits at least.
        """
        decimals = self.unit == "%" or abs(value) >= 100
        number = f"{value:.2f}" if decimals else f"{value:#.4g}"
        return f"{number} {self.unit}".rstrip()

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


def title_of(config: Mapping[str, Any]) -> str:
    """Returns the title of a run: its network and data, or the task of a user's own.

    Args:
      config: Config of the run, as nested dicts.

    Example:
      >>> title_of({"model": {"name": "lenet5"}, "data": {"name": "digits"}})
      'lenet5 on digits'
    """
    task = config.get("task", {}).get("name", "")
    if ":" in task:
        return task.partition(":")[2]
    model, data = (config[part]["name"] for part in ("model", "data"))
    return f"{model.rpartition(':')[2]} on {data.rpartition(':')[2]}"
