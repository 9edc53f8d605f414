"""The metrics of a run, a line of JSON each: what the plots are drawn from."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any


class History:
    """A growing file of metrics that forgets what a resumed run will do again."""

    def __init__(self, file: pathlib.Path, step: int, *, quiet: bool = False) -> None:
        """Opens ``file``, dropping what was recorded after ``step``.

        With ``quiet`` nothing is ever written.
        """
        self._file, self._quiet = file, quiet
        if quiet:
            return
        kept = [row for row in self.read() if row["step"] <= step]
        file.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row; ``step`` counts over the whole run."""
        if self._quiet:
            return
        with self._file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Returns all rows."""
        return read_history(self._file)


def read_history(file: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics, but a last one that a kill cut short."""
    if not file.exists():
        return []
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def means(recent: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, float]:
    """Returns the means of metrics over several dispatches.

    Args:
      recent: of each dispatch its number of steps and the means over them. ``accuracy``
        is a share, of steps; ``skipped`` the share of steps that count as zeros.

    Returns:
      ``loss`` and ``accuracy`` (in percent) over the steps that were not skipped, and
      the other metrics.

    Example:
      >>> step = {"loss": 2.0, "accuracy": 0.5}
      >>> means([(3, step), (1, {"loss": 6.0, "accuracy": 0.5})])
      {'loss': 3.0, 'accuracy': 50.0}
    """
    total = sum(n for n, _ in recent)
    found = {
        name: sum(n * float(metrics[name]) for n, metrics in recent) / total
        for name in recent[-1][1]
    }
    counted = 1 - found.get("skipped", 0.0)
    found["loss"] /= counted
    found["accuracy"] *= 100 / counted
    return found
